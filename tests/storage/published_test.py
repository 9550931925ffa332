"""Published checkpoints: golden answers, the round trip, what is refused, where the bytes go."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from template_test import CHATML, folder_of

import lladax
from lladax.data import tokenizer
from lladax.devices import sharding
from lladax.inference import convert
from lladax.mistake import Mistake
from lladax.storage import checkpoint, published, transfer
from lladax.training import setup, trainer

pytestmark = pytest.mark.usefixtures("quick_compiles")

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "llada-tiny"
BF16 = np.dtype(ml_dtypes.bfloat16)

LLADA = {
  "model_type": "llada", "architectures": ["LLaDAModelLM"], "d_model": 64, "n_layers": 3, "n_heads": 8, "n_kv_heads": 8,
  "mlp_hidden_size": 96, "vocab_size": 250, "embedding_size": 256, "max_sequence_length": 128, "rope_theta": 5e5,
  "rms_norm_eps": 1e-5, "weight_tying": False, "block_type": "llama", "activation_type": "silu",
  "layer_norm_type": "rms", "mask_token_id": 249, "eos_token_id": 1, "pad_token_id": 1, "torch_dtype": "bfloat16",
}  # fmt: skip
ILLADA = {
  "model_type": "illada", "architectures": ["ILLaDAForCausalLM"], "hidden_size": 64, "num_hidden_layers": 3,
  "num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 256,
  "max_position_embeddings": 256, "rope_theta": 1e6, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
  "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "rope_scaling": None, "layer_norm_eps": None,
  "mask_token_id": 5, "eos_token_id": 2, "torch_dtype": "bfloat16",
}  # fmt: skip
GQA_TIED = LLADA | {"n_kv_heads": 2, "weight_tying": True}  # LLaDA's names, iLLaDA's shape


def shapes(config):
  """Name -> shape of every tensor, written down a second time."""
  if "d_model" in config:
    D, F, V = config["d_model"], config["mlp_hidden_size"], config["embedding_size"]
    G = D // config["n_heads"] * config["n_kv_heads"]
    outer = {"wte": (V, D), "ln_f": (D,)} | ({} if config["weight_tying"] else {"ff_out": (V, D)})
    block = {
      "attn_norm": (D,), "q_proj": (D, D), "k_proj": (G, D), "v_proj": (G, D), "attn_out": (D, D), "ff_norm": (D,),
      "ff_proj": (F, D), "up_proj": (F, D), "ff_out": (D, F),
    }  # fmt: skip
    prefix, blocks, N = "model.transformer.", "blocks", config["n_layers"]
  else:
    D, F, V = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    G = D // config["num_attention_heads"] * config["num_key_value_heads"]
    outer = {"embed_tokens": (V, D), "norm": (D,)}
    block = {
      "input_layernorm": (D,), "self_attn.q_proj": (D, D), "self_attn.k_proj": (G, D), "self_attn.v_proj": (G, D),
      "self_attn.o_proj": (D, D), "post_attention_layernorm": (D,), "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D),
      "mlp.down_proj": (D, F),
    }  # fmt: skip
    prefix, blocks, N = "model.", "layers", config["num_hidden_layers"]
  outer |= {f"{blocks}.{i}.{name}": shape for i in range(N) for name, shape in block.items()}
  return {f"{prefix}{name}.weight": shape for name, shape in outer.items()}


def publish(folder, config, dtype=BF16, files=3, seed=0, **changes):
  """A published folder of random tensors, written by the format's own library. `changes`: name -> array, or None."""
  rng = np.random.default_rng(seed)
  draw = (
    (lambda shape: np.zeros(shape, dtype)) if seed is None else (lambda s: (0.1 * rng.standard_normal(s)).astype(dtype))
  )
  names = list(shapes(config))
  parts = [names[i::files] for i in range(files)]
  folder.mkdir(parents=True)
  index = {}
  for number, part in enumerate(parts, 1):
    name = f"model-{number:05}-of-{files:05}.safetensors" if files > 1 else "model.safetensors"
    tensors = {tensor: draw(shapes(config)[tensor]) for tensor in part} | (changes if number == files else {})
    tensors = {
      tensor: value for tensor, value in tensors.items() if changes.get(tensor, value) is value and value is not None
    }
    safetensors.numpy.save_file(tensors, folder / name, {"format": "pt"})
    index |= dict.fromkeys(tensors, name)
  if files > 1:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
  (folder / "config.json").write_text(json.dumps(config))
  return folder


def tensors(folder):
  """Name -> (dtype, shape, bytes) of all files, read by the format's own library."""
  found = {}
  for path in folder.glob("*.safetensors"):
    found |= {name: (x.dtype, x.shape, x.tobytes()) for name, x in safetensors.numpy.load_file(path).items()}
  return found


def command(*flags):
  env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
  done = subprocess.run(
    [sys.executable, "-m", "lladax.main", *map(str, flags)], cwd=ROOT, env=env, capture_output=True, text=True
  )
  return done.returncode, done.stdout, done.stderr


def complaint(folder):
  with pytest.raises(ValueError) as error:
    published.read(folder)
  assert "\n" not in str(error.value)
  return str(error.value)


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


@pytest.mark.parametrize("config", [LLADA, ILLADA], ids=["llada", "illada"])
def test_sharded_load_is_the_plain_one_and_sharded(tmp_path, config):
  theirs = published.read(publish(tmp_path / "source", config))
  mesh = sharding.make_mesh(sharding.MeshConfig(data=1, fsdp=4, tensor=2))
  at = sharding.shardings(mesh, theirs.model.letters())
  plain, sharded = transfer.load_params(theirs), transfer.load_params(theirs, at)
  jax.tree.map(np.testing.assert_array_equal, sharded, plain)
  assert jax.tree.map(lambda x: x.sharding, sharded) == at
  for name, x in checkpoint.flat(sharded):
    held = x.addressable_shards[0].data.size
    assert held == x.size // (4 if "norm" in name else 8), name  # all but the norms are cut both ways


def test_everything_wrong_is_named_at_once(tmp_path):
  q, k, extra = (f"model.transformer.blocks.1.{name}.weight" for name in ("q_proj", "k_proj", "q_norm"))
  config = LLADA | {"alibi": True, "attention_dropout": 0.1, "activation_type": "gelu", "include_qkv_bias": True}
  up = "model.transformer.blocks.0.up_proj.weight"
  changes = {q: None, k: np.zeros((8, 64), BF16), extra: np.zeros(8, BF16), up: np.zeros((96, 64), np.int8)}
  said = complaint(publish(tmp_path / "source", config, **changes))
  for part in (
    "alibi=true is not supported, only false", "attention_dropout=0.1", 'activation_type="gelu"',
    "include_qkv_bias=true",
    f"{q} is missing", f"{k} is of shape [8, 64], expected [64, 64]", f"{extra} is not known", f"{up} is of dtype I8",
  ):  # fmt: skip
    assert part in said, (part, said)


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"n_layers": None, "d_model": "64"}, 'd_model="64": expected int; n_layers is missing'),
    ({"n_heads": 5}, "d_model=64 is not n_heads=5 heads of one width"),
    ({"n_kv_heads": 3}, "model.H=8 is not a multiple of model.G=3"),
    ({"rope_theta": True}, "rope_theta=true: expected float"),
    ({"mask_token_id": None}, "mask_token_id=None, and the embedding has 256 rows"),
    ({"eos_token_id": 256}, "eos_token_id=256, and the embedding has 256 rows"),
    ({"n_layers": 2}, r"blocks.2.attn_norm.weight is not known; .*up_proj.weight is not known; and 1 more$"),
    ({"n_layers": 10**9}, "n_layers=1000000000, and there are 30 tensors$"),
    ({"d_model": None}, 'architectures=."LLaDAModelLM".: there is neither d_model nor hidden_size in it'),
    (
      {"model_type": None, "architectures": None},
      "neither a workdir's nor a published model's: there is no model_type",
    ),
    ({"rope_theta": None}, "rope_theta is missing"),
    ({"vocab_size": "250"}, 'vocab_size="250": expected int'),
    ({"eos_token_id": []}, r"eos_token_id=\[\]: expected int"),
    ({"mask_token_id": "[MASK]"}, r'mask_token_id="\[MASK\]": expected int'),
    ({"rope_theta": float("inf")}, "rope_theta=Infinity: must be a number above 0"),
    ({"rope_theta": 0}, "rope_theta=0: must be a number above 0"),
    ({"head_dim": 16}, "d_model=64 is not n_heads=8 heads of head_dim=16"),
    ({"head_dim": "8"}, 'd_model=64 is not n_heads=8 heads of head_dim="8"'),
    # Every key is read, harmless, or refused by name.
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported, only 1.0"),
    ({"sliding_window": 16}, "sliding_window=16 is not supported, only null"),
    ({"sliding_window": 16, "use_sliding_window": True}, "use_sliding_window=true is not supported, only false"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, 'layer_types=."full_attention", "sliding_attention".'),
    ({"is_causal": True}, "is_causal=true is not supported"),
    ({"rope": False}, "rope=false is not supported"),
    ({"logit_softcap": 30.0}, "logit_softcap=30.0 is not known: it may change what the model computes"),
    ({"logit_softcap": "x" * 10**6}, 'logit_softcap="x{99}… is not known'),
    ({"y" * 10**6: [1] * 10**6}, r": y{100}…=\[1, .*… is not known"),
    ({"new\nline": 1}, "new line=1 is not known"),
    ({"hidden_size": 32}, "d_model=64 and hidden_size=32 disagree"),
    ({"max_position_embeddings": 64}, "max_sequence_length=128 and max_position_embeddings=64 disagree"),
    # Rotary embeddings, as transformers 4 and 5 write them.
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 'rope_scaling.type="linear" is not supported'),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 'rope_scaling.rope_type="llama3" is not supported'),
    ({"rope_scaling": {"type": "default", "factor": 2.0}}, "rope_scaling.factor=2.0 is not supported"),
    ({"rope_scaling": 4.0}, "rope_scaling=4.0: expected an object"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, 'rope_parameters.rope_type="yarn" is not supported'),
    ({"rope_parameters": {"rope_type": "dynamic", "alpha": 1}}, 'rope_parameters.rope_type="dynamic" is not supported'),
    ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "rope_parameters.partial_rotary_factor=0.25 is not supp"),
    ({"rope_parameters": {"rope_theta": 1e4}}, "rope_theta=500000.0 and rope_parameters.rope_theta=10000.0 disagree"),
    (
      {"rope_theta": None, "rope_parameters": {"a": {"rope_theta": 1.0}, "b": {"rope_theta": 2.0}}},
      "rope_parameters.a.rope_theta=1.0 and rope_parameters.b.rope_theta=2.0 disagree",
    ),
  ],
)
def test_a_wrong_config(tmp_path, changes, said):
  source = publish(tmp_path / "source", LLADA)
  config = {name: value for name, value in (LLADA | changes).items() if value is not None}
  (source / "config.json").write_text(json.dumps(config))
  with pytest.raises(ValueError, match=said):
    published.read(source)


FULL = {"rope_type": "default", "rope_theta": 5e5}


@pytest.mark.parametrize(
  "changes",
  [
    {"rope_theta": None, "rope_parameters": FULL},  # as transformers 5 writes it
    {"rope_parameters": FULL, "rope_scaling": None},
    {"rope_theta": None, "rope_parameters": {"full_attention": FULL, "sliding_attention": FULL}},
    {"rope_scaling": {"type": "default"}},
    {"rope_scaling": {"rope_type": "default", "factor": 1.0}, "partial_rotary_factor": 1},
    {"layer_types": ["full_attention"] * 3, "use_sliding_window": False, "sliding_window": 8, "max_window_layers": 2},
    {"hidden_size": 64, "num_hidden_layers": 3, "head_dim": 8, "tie_word_embeddings": True},
    {"is_decoder": True, "id2label": {"0": "LABEL_0"}, "temperature": 1.0, "use_cache": True, "pretraining_tp": 2},
    {"_name_or_path": "x", "_attn_implementation_autoset": True, "auto_map": {"AutoModel": "a.b"}, "never_seen": None},
    {"architectures": None}, {"model_type": None},
  ],
)  # fmt: skip
def test_a_config_that_says_the_same(tmp_path, changes):
  """Whatever transformers adds to it, the model is the one of LLADA; and it comes back from an export as it was."""
  source = publish(tmp_path / "source", LLADA)
  config = LLADA | changes
  if changes.get("rope_theta", 0) is None:
    del config["rope_theta"]
  (source / "config.json").write_text(json.dumps(config))
  theirs = published.read(source)
  assert theirs.model == published.read(publish(tmp_path / "plain", LLADA)).model
  transfer.export(transfer.load_params(theirs), theirs.model, tmp_path / "target", config)
  assert json.loads((tmp_path / "target" / "config.json").read_text()) == config


LLAMA = ILLADA | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
MOE = {"model_type": "llada", "architectures": ["LLaDAMoEModelLM"], "hidden_size": 64, "num_experts": 8}


@pytest.mark.parametrize(
  ("config", "said"),
  [
    (MOE, 'model_type="llada", architectures=["LLaDAMoEModelLM"]: it is a mixture of experts'),
    (ILLADA | {"num_experts": 8}, "it is a mixture of experts (num_experts=8)"),
    ({"model_type": "llada2_moe", "num_experts": 8}, "it generates by blocks, and is a mixture of experts"),
    (ILLADA | {"model_type": "Dream", "architectures": ["DreamModel"]}, "its logits are shifted by one position"),
    (ILLADA | {"model_type": "sdar", "architectures": ["SDARForCausalLM"]}, "it generates by blocks"),
    (LLAMA | {"mask_token_id": None}, "it names no mask_token_id, so it is no mask predictor"),
    ({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "hidden_size": 64}, "it names no mask_token_id"),
    ({"model_type": "t5", "d_model": 512, "mask_token_id": 3}, "this layout is not known"),
    ({"model_type": "bert", "hidden_size": 512, "mask_token_id": 3}, "this layout is not known"),
    ({}, "neither a workdir's nor a published model's"),
  ],
)  # fmt: skip
def test_other_models_are_refused_by_their_names(tmp_path, config, said):
  """Before anything else is asked of the folder: no list of what is missing."""
  (tmp_path / "config.json").write_text(json.dumps(config))
  message = complaint(tmp_path)
  assert said in message and len(message) < 400
  if config:
    assert json.dumps(config["model_type"]) in message
  with pytest.raises(ValueError, match=re.escape(said)):
    lladax.load(tmp_path)


def test_a_llama_with_a_mask_token_is_read(tmp_path):
  theirs = published.read(publish(tmp_path / "source", LLAMA))
  assert theirs.model == published.read(publish(tmp_path / "illada", ILLADA)).model


def test_a_llama_whose_vocabulary_names_a_mask_is_read(tmp_path):
  config = {name: value for name, value in LLAMA.items() if name != "mask_token_id"} | {"vocab_size": 384}
  source = publish(tmp_path / "source", config)
  assert "it names no mask_token_id, so it is no mask predictor" in complaint(source)
  add_tokenizer(source, mask="<hole>")
  assert "it names no mask_token_id, so it is no mask predictor" in complaint(source)
  add_tokenizer(source, mask="<|mdm_mask|>")
  assert lladax.load(source).mask_id == 258
  (source / "tokenizer.json").write_text("{")
  assert "tokenizer.json is no vocabulary: " in complaint(source)


def test_broken_files(tmp_path):
  source = publish(tmp_path / "source", LLADA)
  first, second, third = sorted(source.glob("*.safetensors"))
  first.unlink()
  second.write_bytes(second.read_bytes()[:-10])
  third.write_bytes(b"\x00" * 100)
  said = complaint(source)
  assert f"{first.name} is missing, and model.safetensors.index.json names it" in said
  for path in (second, third):
    assert f"{path.name} is no whole safetensors file, get it again: " in said
  assert "weight is missing" not in said and len(said) < 1000  # what the broken files hold is not known
  (source / "config.json").write_text("{")
  assert "config.json is no JSON" in complaint(source)
  (source / "config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
  assert "config.json is no JSON that can be read: its lists and objects are too deep" in complaint(source)
  (source / "config.json").write_text(json.dumps(["x"] * 10_000))
  assert "expected a JSON object" in complaint(source) and len(complaint(source)) < 400
  (source / "config.json").unlink()
  with pytest.raises(FileNotFoundError, match="there is no config.json in it"):
    published.read(source)


def test_a_list_of_problems_is_cut(tmp_path):
  source = publish(tmp_path / "source", LLADA | {"n_layers": 9})  # 84 tensors, under names that are none of LLaDA's
  (source / "config.json").write_text(json.dumps(ILLADA | {"num_hidden_layers": 9}))
  said = complaint(source)
  assert said.endswith("; and 159 more") and len(said) < 1000


HEADER = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
  ("header", "content", "length"),
  [
    ({"a": HEADER | {"shape": [3]}}, 8, None),  # the shape says more than the offsets
    ({"a": HEADER, "b": HEADER | {"data_offsets": [4, 12]}}, 12, None),  # they overlap
    ({"a": HEADER, "b": HEADER | {"data_offsets": [12, 20]}}, 20, None),  # a gap
    ({"a": HEADER}, 4, None),  # past the end
    ({"a": HEADER}, 12, None),  # more than there should be
    ({"a": HEADER | {"data_offsets": [-8, 0]}}, 8, None),
    ({"a": HEADER | {"dtype": "Q7"}}, 8, None),
    ({"a": HEADER}, 8, 4 * 2**30),  # a header of 4 GiB
    ({"a": HEADER}, 8, 2**64 - 1),
    ({"x" * 10**6: HEADER | {"shape": [3]}}, 8, None),
    ([1], 8, None),
  ],
)
def test_a_header_that_lies(tmp_path, header, content, length):
  text = json.dumps(header).encode()
  length = len(text) if length is None else length
  (tmp_path / "model.safetensors").write_bytes(length.to_bytes(8, "little") + text + b"\0" * content)
  (tmp_path / "config.json").write_text(json.dumps(LLADA))
  said = complaint(tmp_path)
  assert "model.safetensors is no whole safetensors file" in said and len(said) < 500


@pytest.mark.parametrize(
  ("index", "said"),
  [
    ("{", "model.safetensors.index.json is no JSON"),
    ("[]", "model.safetensors.index.json holds [], expected a JSON object"),
    ("{}", "has no weight_map"),
    ('{"weight_map": ["a"]}', "has no weight_map"),
    ('{"weight_map": {"a": 3}}', "has no weight_map"),
    ('{"weight_map": {"a": "../model.safetensors"}}', 'names "../model.safetensors", which is no *.safetensors of'),
    ('{"weight_map": {"a": "/etc/passwd"}}', 'names "/etc/passwd", which is no *.safetensors of this folder'),
    ('{"weight_map": {"a": ".."}}', 'names "..", which is no *.safetensors'),
    (json.dumps({"weight_map": {"a": "x" * 5000 + ".safetensors"}}), "… is missing, and model.safetensors.index.json"),
    (json.dumps({"weight_map": {str(i): f"{i}.safetensors" for i in range(999)}}), "; and 991 more"),
    ('{"weight_map": {}}', 'there is no *.safetensors in it, only ["pytorch_model.bin"]'),
  ],
)
def test_a_damaged_index(tmp_path, index, said):
  source = publish(tmp_path / "source", LLADA, files=1)
  (tmp_path / "model.safetensors").touch()
  (source / "pytorch_model.bin").touch()
  (source / "model.safetensors.index.json").write_text(index)
  assert said in complaint(source) and len(complaint(source)) < 1000


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 16060556376\n"


@pytest.mark.parametrize(
  "name",
  ["config.json", "tokenizer.json", "tokenizer.model", "model-00001-of-00003.safetensors",
   "model.safetensors.index.json"],
)  # fmt: skip
def test_what_stands_in_for_a_file_is_named(tmp_path, name):
  source = publish(tmp_path / "source", LLADA)
  (source / name).write_text(POINTER)
  for read in (published.read, lladax.load):
    with pytest.raises(Mistake, match=f"{name} is a git-lfs pointer, not the file itself: run `git lfs pull`") as error:
      read(source)
    assert len(str(error.value)) < 400
  (source / name).unlink()
  (source / name).symlink_to("../../blobs/0123")
  for read in (published.read, lladax.load):
    with pytest.raises(Mistake, match=f"{name} is a link to ../../blobs/0123, which is not there") as error:
      read(source)
    assert len(str(error.value)) < 400


def test_a_repository_in_the_hub_s_cache(tmp_path):
  root = tmp_path / "models--OWNER--NAME"
  (root / "snapshots").mkdir(parents=True)
  with pytest.raises(FileNotFoundError, match="is a repository in the hub's cache: and there is no snapshot in it"):
    lladax.load(root)
  shutil.copytree(GOLDEN, root / "snapshots" / "abc")
  assert published.find(root) == root / "snapshots" / "abc"  # the only one
  assert lladax.load(root).mask_id == 503
  shutil.copytree(GOLDEN, root / "snapshots" / "def")
  with pytest.raises(FileNotFoundError, match="name one of its snapshots: abc; def$"):
    published.find(root)
  (root / "refs").mkdir()
  (root / "refs" / "main").write_text("def")
  assert published.find(root) == root / "snapshots" / "def"


def test_a_path_that_is_not_there(tmp_path, monkeypatch, tiny_workdir):
  """One line, and never a question to the hub."""
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  monkeypatch.chdir(tmp_path)
  shutil.copytree(tiny_workdir, tmp_path / "runs" / "quickstart")
  hint = "a repository on the Hugging Face hub is written hf://"
  for path, said in (
    ("runs/quickstat", "there is no such folder; did you mean runs/quickstart?"),
    ("runs/quickstat/", "there is no such folder; did you mean runs/quickstart?"),
    ("GSAI-ML/LLaDA-8B-Base", f"there is no such folder; {hint}GSAI-ML/LLaDA-8B-Base"),
    ("nowhere", "there is no such folder"),
    ("~nobody_of_this_name/x", "there is no such folder"),
    ("x" * 5000, "there is no such folder"),
    ("runs", "there is no config.json in it; did you mean runs/quickstart?"),
    ("runs/quickstart/config.json", "it is a file: give its folder, runs/quickstart"),
    ("gs://bucket/run", "models are read from folders, and from hf://"),
    ("hf://NAME", "a hub name is written hf://OWNER/NAME or hf://OWNER/NAME@REVISION"),
    ("hf://OWNER/NAME/folder", "a hub name is written hf://OWNER/NAME or hf://OWNER/NAME@REVISION"),
    ("hf://OWNER/NAME", "to ask the Hugging Face hub: pip install huggingface_hub"),
  ):
    with pytest.raises(Mistake) as error:
      lladax.load(path)
    assert str(error.value) == f"{path}: {said}"
  monkeypatch.setenv("HOME", str(tmp_path / "runs"))
  steps = ["runs/quickstart/", "~/quickstart", "runs/quickstart/checkpoints", "~/quickstart/checkpoints/20/"]
  params = [lladax.load(path).params for path in steps]
  jax.tree.map(np.testing.assert_array_equal, params, [params[0]] * 4)


def test_a_tied_head_may_be_spelled_out_if_it_is_the_embedding(tmp_path):
  embedding = np.random.default_rng(1).standard_normal((256, 64)).astype(BF16)
  both = {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding}
  source = publish(tmp_path / "equal", ILLADA, **both)
  assert "head" not in transfer.load_params(published.read(source))
  source = publish(tmp_path / "other", ILLADA, **both | {"lm_head.weight": embedding + embedding})
  assert "lm_head.weight is not the embedding, and the two are tied" in complaint(source)


def add_tokenizer(folder, mask="<|mdm_mask|>"):
  """A byte-level tokenizer.json of 256 bytes and LLaDA's special tokens; returns name -> id."""
  import tokenizers

  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  vocabulary = {character: i for i, character in enumerate(alphabet)}
  model = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
  model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  model.decoder = tokenizers.decoders.ByteLevel()
  special = ["<|startoftext|>", "<|endoftext|>", mask, "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
  model.add_special_tokens(special)
  model.save(str(folder / "tokenizer.json"))
  template = (
    "{% for m in messages %}{{ (bos_token if loop.first else '') + '<|start_header_id|>' + m['role'] + "
    "'<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
  )
  (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|startoftext|>", "chat_template": template}))
  return {name: model.token_to_id(name) for name in special}


WITH_TEXT = LLADA | {
  "embedding_size": 384,
  "vocab_size": 384,
  "eos_token_id": 257,
  "mask_token_id": 258,
  "pad_token_id": 257,
}


@pytest.fixture
def with_text(tmp_path):
  source = publish(tmp_path / "with_text", WITH_TEXT)
  add_tokenizer(source)
  return source


def test_tokenizer_files_make_text(with_text):
  llada = lladax.load(with_text)
  text = llada.tokenizer
  assert (llada.mask_id, llada.eos_id, llada.vocab_size, text.bos_id, text.eot_id) == (258, 257, 262, 256, 261)
  assert text.chat([{"role": "user", "content": "Hi"}])[0] == 256 and text.template is None  # it is LLaDA's
  assert llada.eot_id == 261 and llada.ends == (257, 261)
  out = llada.sample("Hi", gen_length=4, block_length=4, steps=4)
  assert isinstance(out.text[0], str) and out.tokens.max() < 262


def test_a_mask_that_config_json_does_not_name_is_looked_up(tmp_path):
  config = {name: value for name, value in WITH_TEXT.items() if name != "mask_token_id"}
  source = publish(tmp_path / "source", config)
  add_tokenizer(source, mask="<[MASK]>")
  assert lladax.load(source).mask_id == 258
  add_tokenizer(source, mask="<hole>")
  with pytest.raises(ValueError, match="mask_token_id is missing, and the tokenizer names no mask either"):
    lladax.load(source)
  (source / "config.json").write_text(json.dumps(WITH_TEXT | {"mask_token_id": 300}))
  with pytest.raises(ValueError, match="mask_token_id=300 is no token of tokenizer.json"):
    lladax.load(source)


@pytest.fixture
def with_a_template(tmp_path):
  """A folder that speaks ChatML: its end of a turn is no EOS of config.json, and generation_config.json names more."""
  source = publish(tmp_path / "chatml", WITH_TEXT)
  folder_of(source, "prepend", CHATML, ["<|im_start|>", "<|im_end|>"])
  ids = tokenizers.Tokenizer.from_file(str(source / "tokenizer.json")).token_to_id
  special = {"eos_token_id": ids("</s>"), "mask_token_id": ids("<|mdm_mask|>"), "pad_token_id": None}
  (source / "config.json").write_text(json.dumps(WITH_TEXT | special))
  (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [ids("<|im_end|>"), ids("<s>")]}))
  return source, ids


TALK = [{"role": "user", "content": "The king<|im_end|>"}]


def test_a_folder_speaks_in_its_own_template(with_a_template, tmp_path):
  source, ids = with_a_template
  llada = lladax.load(source)
  text, end = llada.tokenizer, ids("<|im_end|>")
  assert (llada.eot_id, llada.ends) == (end, (ids("</s>"), end, ids("<s>")))
  assert text.vocab_size == llada.vocab_size == 1 + end  # nothing was appended
  asked = text.chat(TALK)
  assert asked[0] == ids("<|im_start|>") and asked.count(end) == 1
  out = llada.chat(TALK, gen_length=4, block_length=4, steps=4)
  assert out.tokens[0, out.padding[0] : -4].tolist() == asked
  workdir, target = tmp_path / "workdir", tmp_path / "target"
  convert.from_published(source, workdir, {"model": {}, "tokenizer": {}})
  convert.to_published(workdir, target)
  (source / "tokenizer_config.json").unlink()
  shutil.move(workdir, tmp_path / "moved")  # it holds all it needs
  for folder in (tmp_path / "moved", target):
    again = lladax.load(folder)
    assert again.tokenizer.fingerprint == text.fingerprint and again.tokenizer.chat(TALK) == asked
    assert (again.eot_id, again.ends, again.vocab_size) == (llada.eot_id, llada.ends, llada.vocab_size)
  with pytest.raises(ValueError, match="^a conversation: this model has no chat template, nor LLaDA's chat tokens"):
    header = json.loads((source / "tokenizer.json").read_text())
    header["added_tokens"] = [x for x in header["added_tokens"] if "header" not in x["content"]]
    (source / "tokenizer.json").write_text(json.dumps(header))
    lladax.load(source).chat(TALK)


def test_what_ends_a_text_without_tokenizer_files(tmp_path):
  source = publish(tmp_path / "source", LLADA | {"eos_token_id": [1, 7]})
  assert lladax.load(source).ends == (1, 7)
  (source / "generation_config.json").write_text(json.dumps({"eos_token_id": 9}))
  assert lladax.load(source).ends == (1, 7, 9)
  (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 256]}))
  assert "token 256 ends a text, and the embedding has 256 rows" in complaint(source)


def test_fine_tuning_speaks_the_bases_template(with_a_template, tiny, tmp_path):
  """What is learnt is what `chat` asks for, and the run's workdir goes on without the base."""
  source, _ = with_a_template
  convert.from_published(source, tmp_path / "base", {"model": {}, "tokenizer": {}})
  lines = [{"messages": [*TALK, {"role": "assistant", "content": f"Paris {i}"}]} for i in range(20)]
  (tmp_path / "talks.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
  fields = {"init_from": str(tmp_path / "base"), "data.corpus": f"files:{tmp_path / 'talks.jsonl'}",
            "data.format": "chat", "data.length": 96}  # fmt: skip
  run = setup.prepare(tiny(fields), tmp_path / "run")
  text, rows = tokenizer.load(tmp_path / "run" / "tokenizer"), run.sources[0]
  assert text.fingerprint == run.text.fingerprint == json.loads((tmp_path / "run" / "config.json").read_text())[
    "tokenizer_fingerprint"
  ]  # fmt: skip
  prompt, reply = rows.ids(rows._turns[0][0])
  assert prompt.tolist() == text.chat(TALK) and reply.tolist()[-2:] == [text.eot_id, text.eos_id]
  assert text.decode(reply, behind=prompt).startswith("Paris ")
  with jax.set_mesh(run.mesh):
    found = trainer._llada(run, setup.begin(run))
  assert found.ends == lladax.load(source).ends and found.eot_id == text.eot_id


def test_hub_names(monkeypatch):
  import huggingface_hub
  from huggingface_hub import errors

  asked = []

  def download(name, revision, allow_patterns):
    asked.append((name, revision))
    assert {"*.safetensors", "*.json"} <= set(allow_patterns)
    return str(GOLDEN)

  monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
  names = ["hf://GSAI-ML/LLaDA-8B-Base", "hf://GSAI-ML/LLaDA-8B-Base/", "hf://GSAI-ML/LLaDA-8B-Base@refs/pr/1"]
  for name in (*names, pathlib.Path(names[0])):
    assert lladax.load(name).mask_id == 503
  repository = "GSAI-ML/LLaDA-8B-Base"
  assert asked == [(repository, None), (repository, None), (repository, "refs/pr/1"), (repository, None)]

  def refused(name, revision, allow_patterns):
    raise failure

  monkeypatch.setattr(huggingface_hub, "snapshot_download", refused)
  response = types.SimpleNamespace(headers={}, request=None)
  network = errors.HfHubHTTPError.__bases__[0]  # the base of all that the HTTP library raises
  for error, said in (
    (errors.LocalEntryNotFoundError("no network\nat all"), "no network"),
    (errors.GatedRepoError("403", response=response), "it is gated: ask for access on its page"),
    (errors.RepositoryNotFoundError("404", response=response), "there is no such repository on the hub, or it is"),
    (errors.RevisionNotFoundError("404", response=response), "the repository has no such revision"),
    (errors.HFValidationError("bad name"), "bad name"),
    (OSError(28, "No space left on device"), ".Errno 28. No space left on device"),
    (network("x" * 10_000), "x{300}…$"),
    (ConnectionError(), "ConnectionError$"),
  ):
    failure = error
    with pytest.raises(FileNotFoundError, match=f"^hf://OWNER/NAME@v1: {said}") as raised:
      lladax.load("hf://OWNER/NAME@v1")
    assert "\n" not in str(raised.value)
  failure = AttributeError("of a bug, not of the network")
  with pytest.raises(AttributeError):  # a crash stays one
    lladax.load("hf://OWNER/NAME")


@pytest.mark.slow
def test_import_and_export_from_the_command_line(with_text, tmp_path):
  workdir, target = tmp_path / "workdir", tmp_path / "target"
  assert command("--mode=import", f"--source={with_text}", f"--workdir={workdir}") == (0, "", "")
  llada, direct = lladax.load(workdir), lladax.load(with_text)
  assert llada.model == direct.model and llada.tokenizer.fingerprint == direct.tokenizer.fingerprint
  assert (llada.mask_id, llada.eos_id, llada.vocab_size, llada.eot_id) == (258, 257, 262, 261)
  jax.tree.map(np.testing.assert_array_equal, llada.params, direct.params)
  assert llada.params["embedding"].dtype == BF16
  code, stdout, stderr = command("--mode=sample", f"--workdir={workdir}", "--prompt=Hi")
  assert code == 0 and stdout, stderr

  assert command("--mode=export", f"--workdir={workdir}", f"--target={target}") == (0, "", "")
  assert tensors(target) == tensors(with_text)
  for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
    assert json.loads((target / name).read_text()) == json.loads((with_text / name).read_text())

  for flags, said in (
    (["--mode=import"], "--source is missing: --mode=import needs it"),
    (["--mode=export"], "--target is missing: --mode=export needs it"),
    (["--mode=import", f"--source={with_text}"], f"--workdir={workdir} is not empty: an import needs a new workdir"),
    (["--mode=export", f"--target={target}"], f"--target={target} is not empty: an export needs a new folder"),
  ):
    code, stdout, stderr = command(*flags, f"--workdir={workdir}")
    assert (code, stdout, stderr) == (1, "", f"lladax: {said}\n")


def test_fine_tuning_can_start_from_an_import(tmp_path):
  """The parameters alone, cast to float32, onto any mesh."""
  source, workdir = publish(tmp_path / "source", LLADA), tmp_path / "workdir"
  values = {"model": {"remat": "dots"}, "tokenizer": {}}
  convert.from_published(source, workdir, values)
  assert json.loads((workdir / "config.json").read_text())["model"]["remat"] == "dots"
  theirs = published.read(source)
  mesh = sharding.make_mesh(sharding.MeshConfig(data=1, fsdp=-1))
  at = sharding.shardings(mesh, theirs.model.letters())
  wanted = jax.eval_shape(theirs.model.init, jax.random.key(0))
  wanted = jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), wanted, at)
  params = checkpoint.restore(workdir, 0, {"params": wanted})["params"]
  jax.tree.map(np.testing.assert_array_equal, params, transfer.load_params(theirs, dtype=jnp.float32))
  assert jax.tree.map(lambda x: (x.dtype, x.sharding), params) == jax.tree.map(lambda x: (jnp.dtype("float32"), x), at)
  llada = lladax.load(workdir)  # ids only
  assert llada.tokenizer is None and llada.mask_id == 249 and llada.unmask([[1, 249]]).tokens.shape == (1, 32)
  with pytest.raises(FileNotFoundError, match="nowhere: there is no such folder"):
    convert.from_published(tmp_path / "nowhere", tmp_path / "new", values)
  assert not (tmp_path / "new").exists()


def test_a_run_of_ours_becomes_a_published_folder(tiny_workdir, tmp_path):
  target = tmp_path / "target"
  convert.to_published(tiny_workdir, target, "bfloat16")
  ours, theirs = lladax.load(tiny_workdir), lladax.load(target)
  assert {x.dtype for x in jax.tree.leaves(theirs.params)} == {BF16}
  assert theirs.tokenizer.fingerprint == ours.tokenizer.fingerprint and theirs.mask_id == ours.mask_id
  assert json.loads((target / "config.json").read_text())["dtype"] == "bfloat16"
  shutil.rmtree(target)
  convert.to_published(tiny_workdir, target)
  theirs = lladax.load(target)
  jax.tree.map(np.testing.assert_array_equal, theirs.params, ours.params)
  prompt = {"gen_length": 8, "block_length": 8, "steps": 8}
  assert theirs.sample("red", **prompt).text == ours.sample("red", **prompt).text


def test_what_the_published_layout_cannot_say(tiny_workdir, tmp_path):
  import dataclasses

  llada = lladax.load(GOLDEN)
  config = json.loads((GOLDEN / "config.json").read_text())
  for change, said in (({"causal": True}, "model.causal=True"), ({"K": 8}, "model.H=4 times model.K=8")):
    with pytest.raises(ValueError, match=said):
      transfer.export(llada.params, dataclasses.replace(llada.model, **change), tmp_path, config)


MEASURE = """
import sys, jax
import lladax
def status(name):
  return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))
jax.block_until_ready(jax.numpy.zeros(8))
before = status("VmRSS")
{what}
print((status("VmHWM") - before) / {size})
"""


def peak(what, size):
  """Peak memory over that of a process that has imported jax, in units of `size`."""
  env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
  code = MEASURE.format(what=what, size=size)
  return float(subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, check=True, stdout=-1).stdout)


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="reads Linux's account of memory")
def test_rows_are_read_alone(tmp_path):
  """16 MiB of a tensor of 1 GiB: at most those, mapped and copied."""
  path, shape = tmp_path / "model.safetensors", (2**16, 2**13)
  header = json.dumps({"a": {"dtype": "BF16", "shape": shape, "data_offsets": [0, 2**30]}}).encode()
  path.write_bytes(len(header).to_bytes(8, "little") + header)
  os.truncate(path, path.stat().st_size + 2**30)
  imports = "from lladax.storage import safetensors; from pathlib import Path"
  tensor = f"safetensors.headers(Path({str(tmp_path)!r}), [])['a']"
  assert peak(f"{imports}; x = {tensor}.rows(1000, 1024); assert x.shape == (1024, 8192)", 2**30) < 0.1


SHAPES = {
  "270M": {"d_model": 1024, "n_layers": 16, "n_heads": 16, "n_kv_heads": 16, "mlp_hidden_size": 2816,
           "vocab_size": 32000, "embedding_size": 32000},
  "1B": {"d_model": 2048, "n_layers": 22, "n_heads": 32, "n_kv_heads": 4, "mlp_hidden_size": 5634,
         "vocab_size": 126464, "embedding_size": 126464},
}  # fmt: skip


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="reads Linux's account of memory")
@pytest.mark.slow
@pytest.mark.parametrize("shape", ["270M", "1B"])
def test_memory_while_importing(tmp_path, shape):
  config = LLADA | SHAPES[shape]
  source = publish(tmp_path / "source", config, files=4, seed=None)
  size = 2 * sum(int(np.prod(x)) for x in shapes(config).values())
  assert peak(f"llada = lladax.load({str(source)!r})", size) < 1.3
  if shape == "1B":
    imports = (
      "from lladax.inference import convert; from lladax.storage import published, transfer; from pathlib import Path"
    )
    wide = f"transfer.load_params(published.read(Path({str(source)!r})), dtype='float32')"
    assert peak(f"{imports}; params = {wide}", 2 * size) < 1.3
    values, workdir = {"model": {}, "tokenizer": {}}, str(tmp_path / "workdir")
    assert peak(f"{imports}; convert.from_published({str(source)!r}, Path({workdir!r}), {values!r})", size) < 1.3
