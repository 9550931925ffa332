"""From a trained model to one that answers: SFT and LoRA, end to end on tiny models."""

import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lladax
from lladax import diffusion
from lladax.data import dialogues, sources
from lladax.data.windows import DataConfig
from lladax.devices import sharding
from lladax.evaluation import evaluate, held_out
from lladax.inference import convert
from lladax.model.mask_predictor import MaskPredictorConfig
from lladax.storage import checkpoint
from lladax.training import setup, trainer

pytestmark = pytest.mark.usefixtures("quick_compiles")

COLOURS = ("red", "green", "blue", "gold")


@pytest.fixture(scope="module")
def conversations(tmp_path_factory):
  path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
  records = [{"prompt": f"{c} {i}?", "response": f"{c.upper()} {i}"} for i in range(50) for c in COLOURS]
  path.write_text("".join(json.dumps(record) + "\n" for record in records))
  return path


@pytest.fixture(scope="module")
def sft(conversations, tiny_workdir):
  """Fields of a run on conversations that begins from the tiny one."""
  return {
    "init_from": str(tiny_workdir), "data.corpus": f"files:{conversations}", "data.format": "chat",
    "data.length": 48, "data.batch_size": 16, "data.held_out": 0.1, "steps": 6, "checkpoint.every": 3,
    "optimizer.schedule": ((2, 0.03), (-1, 0.03)),
  }  # fmt: skip


LORA = {"model.lora_rank": 2, "model.lora_targets": ("q", "down")}


def flat(params):
  return {name: np.asarray(x) for name, x in checkpoint.flat(params)}


def losses(workdir):
  return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("lora", [{}, LORA], ids=["all", "adapters"])
def test_a_run_begins_from_the_base(tiny, tiny_workdir, sft, lora, tmp_path):
  """The base's shape is taken, whatever the config says of it; at step 0 nothing differs from the base."""
  run = setup.prepare(tiny(sft | lora | {"model.D": 32}), tmp_path)
  with jax.set_mesh(run.mesh):
    state = setup.begin(run)
  base = flat(lladax.load(tiny_workdir).params)
  found = flat(trainer._llada(run, state, 0).params)
  assert {name: found[name].tobytes() for name in base} == {name: x.tobytes() for name, x in base.items()}
  saved = json.loads((tmp_path / "config.json").read_text())
  assert saved["model"]["D"] == 16 and saved["base"] == str(tiny_workdir / "checkpoints/20")
  assert (set(flat(state.params)) == set(base)) == (not lora)


@pytest.fixture(scope="module")
def adapted(tiny, sft, tmp_path_factory):
  """The workdir of an unbroken run of adapters."""
  workdir = tmp_path_factory.mktemp("adapted") / "run"
  trainer.train(tiny(sft | LORA | {"steps": 40, "checkpoint.every": 40}), workdir)
  return workdir


def test_only_adapters_are_trained_and_saved(tiny, sft, adapted, tiny_workdir):
  tree = checkpoint.metadata(adapted, 40)
  names = {f"blocks/{name}_{x}" for name in ("q", "down") for x in "ab"}
  assert set(dict(checkpoint.flat(tree["params"]))) == set(dict(checkpoint.flat(tree["mu"]))) == names
  base, merged = (flat(lladax.load(workdir).params) for workdir in (tiny_workdir, adapted))
  assert base.keys() == merged.keys()
  changed = {name for name in base if (base[name] != merged[name]).any()}
  assert changed == {"blocks/q", "blocks/down"}
  before, after = (held_out.bound(lladax.load(x), tiny(sft))["nats_per_token"] for x in (tiny_workdir, adapted))
  assert after < 0.8 * before


def test_adapters_are_merged_on_export(adapted, tmp_path):
  convert.to_published(adapted, tmp_path / "published", "float32")
  a, b = flat(lladax.load(adapted).params), flat(lladax.load(tmp_path / "published").params)
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize("lora", [pytest.param({}, marks=pytest.mark.slow), LORA], ids=["all", "adapters"])
def test_a_run_goes_on_bitwise(tiny, sft, lora, tmp_path, monkeypatch):
  monkeypatch.setattr(held_out, "bound", lambda *_: {})
  trainer.train(tiny(sft | lora), tmp_path / "unbroken")
  trainer.train(tiny(sft | lora | {"steps": 3}), tmp_path / "stopped")
  trainer.train(tiny(sft | lora), tmp_path / "stopped")
  assert losses(tmp_path / "stopped") == losses(tmp_path / "unbroken")
  a, b = (flat(lladax.load(tmp_path / name).params) for name in ("stopped", "unbroken"))
  assert {name: x.tobytes() for name, x in a.items()} == {name: x.tobytes() for name, x in b.items()}


@pytest.mark.slow
@pytest.mark.parametrize("lora", [{}, LORA], ids=["all", "adapters"])
def test_every_mesh_is_the_same(tiny, sft, lora, tmp_path, monkeypatch):
  monkeypatch.setattr(held_out, "bound", lambda *_: {})
  fields = sft | lora | {"steps": 3, "checkpoint.every": 3, "data.packing": True, "data.eos_padding": "none"}
  trainer.train(tiny(fields), tmp_path / "data")
  trainer.train(tiny(fields | {"mesh.data": 1, "mesh.fsdp": 4, "mesh.tensor": 2}), tmp_path / "sliced")
  np.testing.assert_allclose(losses(tmp_path / "sliced"), losses(tmp_path / "data"), rtol=2e-6)
  mesh = sharding.make_mesh(sharding.MeshConfig(data=1, fsdp=4, tensor=2))
  here, there = (flat(lladax.load(tmp_path / "sliced", mesh=at).params) for at in (None, mesh))
  for name in here:
    np.testing.assert_allclose(here[name], there[name], rtol=1e-6, atol=1e-7)


def test_the_base_must_be_there(tiny, sft, adapted, tiny_workdir, tmp_path):
  with pytest.raises(FileNotFoundError, match="init_from=.*nowhere: there is no checkpoint; name a workdir"):
    setup.prepare(tiny(sft | {"init_from": str(tmp_path / "nowhere")}), tmp_path / "run")
  with pytest.raises(FileNotFoundError, match=r"there are the steps \[.*20\]; name a workdir"):
    setup.prepare(tiny(sft | {"init_from": str(tiny_workdir / "checkpoints/7")}), tmp_path / "run")
  with pytest.raises(ValueError, match="model.lora_rank=2: adapters need a model to adapt; name it as init_from"):
    tiny(LORA)
  orphan = shutil.copytree(adapted, tmp_path / "orphan")
  saved = json.loads((orphan / "config.json").read_text())
  (orphan / "config.json").write_text(json.dumps(saved | {"base": str(tmp_path / "gone/checkpoints/20")}))
  with pytest.raises(FileNotFoundError, match="holds adapters of .*gone/checkpoints/20, which is not there"):
    lladax.load(orphan)


def test_another_base_is_refused_on_the_way(tiny, sft, adapted, tiny_workdir, tmp_path):
  workdir = shutil.copytree(adapted, tmp_path / "run")
  with pytest.raises(FileNotFoundError, match="init_from=elsewhere: there is no checkpoint"):
    setup.prepare(tiny(sft | LORA | {"init_from": "elsewhere"}), workdir)
  with pytest.raises(ValueError, match=r"checkpoints/15: .*/run began from another checkpoint, .*checkpoints/20$"):
    setup.prepare(tiny(sft | LORA | {"init_from": str(tiny_workdir / "checkpoints/15")}), workdir)


@pytest.mark.slow
def test_a_run_goes_on_without_its_base(tiny, sft, tiny_workdir, tmp_path, monkeypatch):
  """The workdir holds everything, of adapters all but what they adapt; where that is now is said by init_from."""
  monkeypatch.setattr(held_out, "bound", lambda *_: {})
  base, moved = shutil.copytree(tiny_workdir, tmp_path / "base"), tmp_path / "moved"
  fields = sft | {"init_from": str(base), "steps": 3}
  trainer.train(tiny(fields), tmp_path / "all")
  trainer.train(tiny(fields | LORA), tmp_path / "adapters")
  setup.prepare(tiny(fields), tmp_path / "new")
  before = flat(lladax.load(tmp_path / "adapters").params)
  base.rename(moved)

  trainer.train(tiny(fields | {"steps": 4}), tmp_path / "all")
  assert len(losses(tmp_path / "all")) == 4
  with pytest.raises(FileNotFoundError, match="adapters trains adapters of .*base/checkpoints/20, which is not there"):
    trainer.train(tiny(fields | LORA), tmp_path / "adapters")
  with pytest.raises(FileNotFoundError, match="new has no checkpoint yet, and begins from .*/20, .*: say as init_from"):
    trainer.train(tiny(fields), tmp_path / "new")
  with pytest.raises(FileNotFoundError, match="holds adapters of .*/20, which is not there: .* init_from"):
    lladax.load(tmp_path / "adapters")
  for name in (moved, moved / "checkpoints/20"):  # at its end already: it is only evaluated
    trainer.train(tiny(fields | LORA | {"init_from": str(name)}), tmp_path / "adapters")
  after = flat(lladax.load(tmp_path / "adapters").params)
  assert {x: v.tobytes() for x, v in before.items()} == {x: v.tobytes() for x, v in after.items()}


def test_held_out_replies_under_uniform_predictions(tiny, sft, tiny_workdir):
  """Replies cost log2(V) bits a token, EoT and EOS among them, whatever precedes them."""
  config, llada = tiny(sft), lladax.load(tiny_workdir)
  zeros = jax.tree.map(jnp.zeros_like, llada.params)
  found = held_out.bound(lladax.LLaDA(**(vars(llada) | {"params": zeros})), config)
  found_rows = sources.held_out(config.data, llada.tokenizer)
  per_token = math.log(llada.model.V)
  assert found["nats_per_token"] == pytest.approx(per_token, rel=1e-5)
  per_byte = per_token / math.log(2) * found_rows.num_tokens / found_rows.num_bytes
  assert found["bits_per_byte"] == pytest.approx(per_byte, rel=1e-5)
  assert found.keys() == {"bits_per_byte", "bits_per_byte_stderr", "perplexity", "perplexity_stderr", "nats_per_token"}
  assert found_rows.num_tokens == found_rows.num_bytes + found_rows.num_rows  # bytes, EoT, EOS; a byte for the end


def test_prompts_are_answered_at_the_end(tiny, sft, tiny_workdir):
  config = tiny(sft | {"evaluate.canvases": ("red 1?", "blue 2?"), "sample.gen_length": 8, "sample.block_length": 8})
  llada = lladax.load(tiny_workdir)
  out = evaluate.samples(llada, config)
  asked = llada.tokenizer.chat([{"role": "user", "content": "red 1?"}])
  np.testing.assert_array_equal(out.tokens[0, out.padding[0] :][: len(asked)], asked)
  assert out.tokens.shape[1] - out.padding[0] == len(asked) + 8


class Template:
  """Enough of a tokenizer for `data.Dialogues`; ids below 8 are special."""

  eos_id, eot_id, bos_id, template = 0, 1, None, None

  def reply(self, text):
    return [*text.encode(), self.eot_id]

  def message(self, message):
    return [2 + ("user", "assistant").index(message["role"]), *self.reply(message["content"])]

  def chat(self, messages, ask=True):
    return [id for message in messages for id in self.message(message)] + [3] * ask


def batch_of(source, c, rows):
  picked = [source.row(row, 0, 0) for row in rows]
  tokens, segment, weight = (np.stack(x) for x in zip(*picked, strict=True))
  replies = sum(source.shape(row, 0)[0] for row in rows)
  return {"tokens": tokens, "segment": segment, "weight": (weight / replies).astype(np.float32)}


def test_a_packed_batch_has_the_loss_and_gradient_of_its_dialogues_alone():
  """The same masks, time by time: what the loss of a packed row adds up is what unpacked rows add up."""
  rng = np.random.default_rng(0)
  chats = []
  for _ in range(12):
    texts = ["".join(rng.choice(list("abcdef"), int(rng.integers(1, 8)))) for _ in range(2)]
    chats.append([{"role": role, "content": text} for role, text in zip(("user", "assistant"), texts, strict=True)])
  unpacked_c = DataConfig(format="chat", length=40, eos_padding="none")
  packed_c = DataConfig(format="chat", length=40, eos_padding="none", packing=True)
  alone, packed = (dialogues.Dialogues(chats, Template(), c, seed=0) for c in (unpacked_c, packed_c))
  batch = batch_of(packed, packed_c, range(len(packed)))
  assert len(packed) < len(alone) / 2

  c = MaskPredictorConfig(D=16, N=2, H=2, G=1, K=8, F=16, V=128, dtype="float32")
  params = jax.tree.map(
    lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), jnp.float32), jax.eval_shape(c.init, jax.random.key(0))
  )
  masked_BL, scale_BL = None, None

  def remember(noised):
    nonlocal masked_BL, scale_BL
    _, masked_BL, scale_BL = noised

  index_B = jnp.arange(len(packed))
  noise = diffusion.NoiseConfig()
  remember(
    diffusion.forward_process(batch["tokens"], batch["weight"] > 0, index_B, jax.random.key(3), 7, noise, len(packed))
  )

  def loss(params, tokens_BL, segment_BL, weight_BL, masked_BL, scale_BL):
    input_BL = jnp.where(masked_BL, 7, tokens_BL)
    nll_BL = c.bind(params).nll(
      input_BL, jnp.where(masked_BL, tokens_BL, -1), c.visible(tokens_BL.shape[1], segment_BL)
    )
    return jnp.sum(weight_BL * nll_BL * scale_BL)

  def weighted_nll(input_BL, target_BL, weight_BL):
    visible = c.visible(input_BL.shape[1], batch["segment"])
    return c.bind(params).weighted_nll(input_BL, target_BL, weight_BL, visible)

  step = batch | {"index": index_B}
  ours, _ = diffusion.Masked(noise).loss(weighted_nll, step, jax.random.key(3), mask_id=7, batch_size=len(packed))
  together = jax.jit(jax.value_and_grad(loss))(
    params, batch["tokens"], batch["segment"], batch["weight"], masked_BL, scale_BL
  )
  np.testing.assert_allclose(together[0], ours, rtol=1e-5)

  # The same tokens, one dialogue a row, with the masks they had.
  single = batch_of(alone, unpacked_c, range(len(alone)))
  masks, scales = np.zeros(single["tokens"].shape, bool), np.ones(single["tokens"].shape)
  for row in range(len(packed)):
    for number, i in enumerate(packed._rows[row], start=1):
      at = np.flatnonzero(batch["segment"][row] == number)
      np.testing.assert_array_equal(batch["tokens"][row, at], single["tokens"][i, : len(at)])
      masks[i, : len(at)], scales[i, : len(at)] = np.asarray(masked_BL)[row, at], scale_BL[row, at]
  apart = jax.jit(jax.value_and_grad(loss))(
    params, single["tokens"], single["segment"], single["weight"], masks, scales
  )
  np.testing.assert_allclose(together[0], apart[0], rtol=1e-5)
  for a, b in zip(jax.tree.leaves(together[1]), jax.tree.leaves(apart[1]), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("masking", ["independent", "exact"])
def test_packing_keeps_the_expected_loss(masking):
  """Over many noises, for a model that answers by what it sees of its own segment, packed and alone are the same."""
  noise = diffusion.NoiseConfig(masking=masking)
  tokens = np.full((1, 9), 5)
  packed_segment = np.array([[1, 1, 1, 1, 2, 2, 2, 2, 2]])
  given = np.array([[1, 0, 0, 0, 1, 0, 0, 0, 0]], bool)
  per_reply = np.where(packed_segment == 1, 1 / 3, 1 / 4) * ~given / 2

  def estimate(segment, weight, draws=20_000):
    weight = jnp.asarray(weight, jnp.float32)

    def weighted_nll(input_BL, target_BL, weight_BL):
      share = [(input_BL == 7) & (segment == s) for s in (1, 2)]
      seen = sum(jnp.where(segment == s, x.sum(axis=1, keepdims=True), 0) for s, x in zip((1, 2), share, strict=True))
      nll_BL = jnp.where(target_BL < 0, 0.0, 1.0 + seen.astype(jnp.float32) ** 2)
      return jnp.sum(weight_BL * nll_BL), nll_BL

    batch = {"tokens": jnp.asarray(tokens), "weight": weight}

    def one(index):
      return diffusion.Masked(noise).loss(
        weighted_nll, batch | {"index": index[None]}, jax.random.key(0), mask_id=7, batch_size=1
      )[0]

    found = np.asarray(jax.jit(jax.vmap(one))(jnp.arange(draws)))
    return found.mean(), found.std() / math.sqrt(draws)

  together, error = estimate(packed_segment, per_reply)
  apart = [estimate(np.where(packed_segment == s, s, 0), np.where(packed_segment == s, per_reply, 0)) for s in (1, 2)]
  total_error = math.sqrt(error**2 + sum(e**2 for _, e in apart))
  assert abs(together - sum(mean for mean, _ in apart)) < 4 * total_error
  assert total_error < 0.02 * together


def test_neither_bits_nor_float16_are_trained(tiny, sft, tmp_path):
  with pytest.raises(ValueError, match="model.weights='nf4': what is in bits has no gradient: train adapters over it"):
    setup.prepare(tiny(sft | {"model.weights": "nf4"}), tmp_path / "all")
  with pytest.raises(ValueError, match="model.dtype='float16' is float16 here, .*: set model.dtype=float32"):
    setup.prepare(tiny(sft | {"model.dtype": "float16"}), tmp_path / "half")


@pytest.mark.slow
def test_adapters_over_bits(tiny, sft, tiny_workdir, tmp_path):
  """The base is never as it was; what is trained stays beside it, and is merged with what the bits mean."""
  pytest.importorskip("qwix")
  fields = sft | LORA | {"model.weights": "nf4", "steps": 3, "log.tensorboard": False}
  trainer.train(tiny(fields), tmp_path / "run")
  beside, merged = lladax.load(tmp_path / "run"), lladax.load(tmp_path / "run", weights="full")
  assert (beside.model.weights, beside.model.lora_rank) == ("nf4", 2)
  assert (merged.model.weights, merged.model.lora_rank) == ("full", 0)
  assert beside.params["blocks"]["q"]["bits"].dtype == jnp.uint8
  tokens_BL = np.random.default_rng(0).integers(0, 100, (2, 16))
  expected = merged.logits(tokens_BL)
  np.testing.assert_allclose(beside.logits(tokens_BL), expected, atol=1e-5 * np.abs(expected).max())
  base = lladax.load(tiny_workdir, weights="nf4")
  assert np.abs(base.logits(tokens_BL) - expected).max() > 1e-3  # something is learnt
  with pytest.raises(ValueError, match="model.weights='nf4': .*checkpoints/3 holds adapters: export it, import that"):
    setup.prepare(tiny(fields | {"init_from": str(tmp_path / "run")}), tmp_path / "again")
  trainer.train(tiny(fields | {"steps": 4}), tmp_path / "run")  # goes on
  assert len(losses(tmp_path / "run")) == 4
