import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from layouts import (
  BF16,
  CONFIGS,
  GOLDEN,
  GQA_TIED,
  ILLADA,
  LLADA,
  complaint,
  publish,
  random_config,
  shapes,
  tensors,
)

import lladax
from lladax.data import tokenizer
from lladax.devices import sharding
from lladax.model.mask_predictor import MaskPredictorConfig
from lladax.storage import checkpoint, layout, published, transfer

pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.mark.parametrize("dtype", [np.dtype("float32"), BF16, np.dtype("float16")], ids=str)
@pytest.mark.parametrize("config", [LLADA, GQA_TIED, ILLADA], ids=["llada", "gqa-tied", "illada"])
def test_round_trip_is_the_identity(tmp_path, config, dtype, monkeypatch):
  monkeypatch.setattr(transfer, "ROWS", 100)  # the vocabulary in three unequal slabs
  source = publish(tmp_path / "source", config, dtype)
  theirs = published.read(source)
  params = transfer.load_params(theirs)
  assert {x.dtype for x in jax.tree.leaves(params)} == {dtype}
  assert jax.tree.map(lambda x: x.shape, params) == jax.tree.map(
    lambda x: x.shape, jax.eval_shape(theirs.model.init, jax.random.key(0))
  )
  wide = transfer.load_params(theirs, dtype=jnp.float32)  # as training wants them
  assert {x.dtype for x in jax.tree.leaves(wide)} == {np.dtype("float32")}
  for i, tree in enumerate((params, wide)):
    target = tmp_path / f"target{i}"
    transfer.export(tree, theirs.model, target, config, dtype=dtype, max_shard_bytes=50_000)
    assert tensors(target) == tensors(source) and json.loads((target / "config.json").read_text()) == config
    files = sorted(path.name for path in target.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == shapes(config).keys() and set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(len(content) for _, _, content in tensors(source).values())


QUICK = ("LLaDA", "iLLaDA", "Dream")
EXPERTS = [name for name, config in CONFIGS.items() if "num_experts" in config]


def test_there_is_a_config_of_every_family():
  assert list(CONFIGS) and set(CONFIGS) == {family.name for family in layout.FAMILIES}
  for name, config in CONFIGS.items():
    assert layout.family_of(config).name == name


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
  ("name", "merged"), [*((name, False) for name in CONFIGS), *((name, True) for name in EXPERTS)]
)
def test_every_family_comes_back_as_it_was(tmp_path, name, merged, seed, monkeypatch):
  """Byte for byte, from several files to several; a bias that chooses experts is in float32, as theirs is."""
  monkeypatch.setattr(transfer, "ROWS", 100)
  config = random_config(name, seed)
  choice = {tensor: shape for tensor, shape in shapes(config, merged).items() if tensor.endswith("expert_bias")}
  choice = {
    tensor: np.random.default_rng(1).standard_normal(shape).astype("float32") for tensor, shape in choice.items()
  }
  source, target = publish(tmp_path / "source", config, merged=merged, **choice), tmp_path / "target"
  theirs = published.read(source)
  assert (theirs.family.name, theirs.merged) == (name, merged)
  params = transfer.load_params(theirs)
  assert jax.tree.map(lambda x: x.shape, params) == jax.tree.map(
    lambda x: x.shape, jax.eval_shape(theirs.model.init, jax.random.key(0))
  )
  transfer.export(params, theirs.model, target, config, merged=merged, max_shard_bytes=3_000)
  assert len(list(target.glob("*.safetensors"))) > 1
  assert tensors(target) == tensors(source) and tensors(source).keys() == shapes(config, merged).keys()
  assert json.loads((target / "config.json").read_text()) == config


def test_experts_apart_are_experts_in_one_tensor(tmp_path):
  source = publish(tmp_path / "source", CONFIGS["LLaDA2"])
  theirs = published.read(source)
  (tmp_path / "merged").mkdir()
  transfer.export(transfer.load_params(theirs), theirs.model, tmp_path / "merged", CONFIGS["LLaDA2"], merged=True)
  assert {name: shape for name, (_, shape, _) in tensors(tmp_path / "merged").items()} == shapes(
    CONFIGS["LLaDA2"], True
  )
  again = published.read(tmp_path / "merged")
  jax.tree.map(np.testing.assert_array_equal, transfer.load_params(again), transfer.load_params(theirs))


def test_golden_checkpoint_and_its_round_trip(tmp_path):
  llada = lladax.load(GOLDEN)
  with np.load(GOLDEN / "golden.npz") as answers:
    np.testing.assert_allclose(llada.logits(answers["x_masked"]), answers["logits"], atol=1e-4)
  assert (llada.tokenizer, llada.mask_id, llada.eos_id, llada.vocab_size) == (None, 503, 500, 504)
  config = json.loads((GOLDEN / "config.json").read_text())
  transfer.export(llada.params, llada.model, tmp_path, config)
  assert [path.name for path in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]  # one file, no index
  assert tensors(tmp_path) == tensors(GOLDEN)


def test_bfloat16_parameters_compute_as_their_float32_copies(tmp_path):
  theirs = published.read(publish(tmp_path / "source", ILLADA))
  tokens_BL = np.random.default_rng(0).integers(0, 256, (2, 16))
  logits = [
    lladax.LLaDA(theirs.model, transfer.load_params(theirs, dtype=dtype), **theirs.identity).logits(tokens_BL)
    for dtype in (None, jnp.float32)
  ]
  np.testing.assert_allclose(*logits, atol=1e-5)


def test_layers_and_heads_are_where_they_belong(tmp_path):
  """GQA: group g of layer i is rows g K .. (g + 1) K of the file's tensor, transposed."""
  source = publish(tmp_path / "source", ILLADA, np.dtype("float32"), files=1)
  params = transfer.load_params(published.read(source))
  loaded = safetensors.numpy.load_file(source / "model.safetensors")
  k = loaded["model.layers.2.self_attn.k_proj.weight"]
  np.testing.assert_array_equal(params["blocks"]["k"][2, :, 1], k[8:16].T)
  out = loaded["model.layers.1.self_attn.o_proj.weight"]
  np.testing.assert_array_equal(params["blocks"]["out"][1, 3], out[:, 24:32].T)
  assert "head" not in params


@pytest.mark.parametrize(
  ("name", "merged"),
  [
    *((name, False) for name in QUICK), ("LLaDA2", True),
    *(pytest.param(name, False, marks=pytest.mark.slow) for name in CONFIGS if name not in QUICK),
    pytest.param("LLaDA-MoE", True, marks=pytest.mark.slow),
  ],
)  # fmt: skip
def test_sharded_load_is_the_plain_one_and_sharded(tmp_path, name, merged):
  """Experts among the devices of `tensor`, and along their width, or that of the stream, among those of `fsdp`."""
  config = CONFIGS[name] | ({"num_key_value_heads": 2} if name == "iLLaDA" else {})
  theirs = published.read(publish(tmp_path / "source", config, merged=merged))
  mesh = sharding.make_mesh(sharding.MeshConfig(data=1, fsdp=4, tensor=2))
  at = sharding.shardings(mesh, theirs.model.letters())
  plain, sharded = transfer.load_params(theirs), transfer.load_params(theirs, at)
  jax.tree.map(np.testing.assert_array_equal, sharded, plain)
  assert jax.tree.map(lambda x: x.sharding, sharded) == at
  for path, x in checkpoint.flat(sharded):
    held, last = x.addressable_shards[0].data.size, path.rpartition("/")[2]
    # All but the norms and biases are cut both ways.
    parts = (
      1 if last in ("q_norm", "k_norm") else 4 if "norm" in last else 2 if "bias" in last or last == "choice" else 8
    )
    assert held == x.size // parts, path


def test_a_tied_head_may_be_spelled_out_if_it_is_the_embedding(tmp_path):
  embedding = np.random.default_rng(1).standard_normal((256, 64)).astype(BF16)
  both = {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding}
  source = publish(tmp_path / "equal", ILLADA, **both)
  assert "head" not in transfer.load_params(published.read(source))
  source = publish(tmp_path / "other", ILLADA, **both | {"lm_head.weight": embedding + embedding})
  assert "lm_head.weight is not the embedding, and the two are tied" in complaint(source)


@pytest.mark.parametrize(
  ("model", "said"),
  [
    ({"causal": True}, "a causal model of ours reads an EOS before each text, which no published layout says"),
    ({"qkv_bias": True}, "no published layout that is known says such a model: .*model.qkv_bias=True"),
    ({"block": 4}, "model.block=4, "),
    ({"E": 4, "J": 2, "X": 8, "router_scale": 2.0}, "model.E=4, "),
  ],
)
def test_what_no_published_layout_says(model, said):
  with pytest.raises(ValueError, match=said):
    layout.of_model(MaskPredictorConfig(**model))


@pytest.mark.parametrize(
  ("model", "name"),
  [
    ({}, "LLaDA"), ({"K": 8}, "iLLaDA"), ({"rotary": 8}, "iLLaDA"), ({"shift": True, "qkv_bias": True}, "Dream"),
    ({"block": 4, "shift": True, "qkv_bias": True}, "Fast-dLLM v2"),
    ({"block": 4, "qk_norm": True}, "SDAR"), ({"causal": True, "shift": True}, "Llama"),
    ({"causal": True, "shift": True, "qkv_bias": True}, "Qwen2"),
    ({"causal": True, "shift": True, "qk_norm": True, "K": 8}, "Qwen3"),
    ({"causal": True, "shift": True, "qk_norm": True, "E": 4, "J": 2, "X": 8, "router_renormalise": True}, "Qwen3-MoE"),
    ({"E": 4, "J": 2, "X": 8, "qk_norm": True, "dense": 1}, "LLaDA-MoE"),
    ({"E": 4, "J": 2, "X": 8, "S": 16, "qk_norm": True, "router": "sigmoid", "router_groups": 2, "block": 32,
      "router_topk_groups": 1, "dense": 1, "router_bias": True, "router_scale": 2.5, "router_renormalise": True},
     "LLaDA2"),
  ],
)  # fmt: skip
def test_a_model_of_ours_is_of_a_family(model, name):
  """And the config.json that says it is read as that model."""
  c = MaskPredictorConfig(**model, V=128)
  assert layout.of_model(c).name == name
  text = tokenizer.create(tokenizer.TokenizerConfig("bytes"))
  config, problems = layout.new_config(dataclasses.replace(c, V=384), text), []
  theirs = layout.model_of(json.loads(json.dumps(config)), layout.family_of(config), problems)
  assert not problems
  assert theirs == dataclasses.replace(c, V=384, block=0)
