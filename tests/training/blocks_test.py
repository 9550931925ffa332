"""A run whose objective is block diffusion: trained, cut off and continued, judged, sampled from."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rows import Letters, talk
from runs import Crash, assert_bitwise_equal, at_batch, crash, curve

import lladax
from lladax import autoregressive
from lladax.config import Phase
from lladax.data import dialogues
from lladax.data.windows import DataConfig
from lladax.evaluation import held_out
from lladax.mistake import Mistake
from lladax.model.mask_predictor import MaskPredictorConfig
from lladax.storage import checkpoint, metrics
from lladax.training import setup, step, trainer

pytestmark = pytest.mark.usefixtures("quick_compiles")

BLOCKS = {"noise.block": 4, "noise.masking": "exact", "noise.times": "antithetic", "data.segments": True, "steps": 12}


def test_a_run_of_blocks_from_end_to_end(tiny, tmp_path, monkeypatch):
  whole = trainer.train(tiny(BLOCKS), tmp_path / "whole")
  with monkeypatch.context() as patch:
    at_batch(patch, 8, crash)
    with pytest.raises(Crash):
      trainer.train(tiny(BLOCKS | {"checkpoint.every": 5}), tmp_path / "cut")
  again = trainer.train(tiny(BLOCKS | {"checkpoint.every": 5}), tmp_path / "cut")
  assert_bitwise_equal(tmp_path / "cut", tmp_path / "whole")
  assert again["bits_per_byte"] == whole["bits_per_byte"] < 8
  llada = lladax.load(tmp_path / "whole")
  assert llada.model.block == 4 and llada.model.objective.order == "blocks"
  out = llada.sample(["red", "a"], gen_length=8, steps=8, threshold=0.5, edit_threshold=0.5)
  assert len(out.text) == 2 and out.edited_at is not None
  assert np.isfinite(llada.log_likelihood("red", " is", num_samples=4))
  with pytest.raises(Mistake, match="noise.block: 4 there, 8 here"):
    trainer.train(tiny(BLOCKS | {"noise.block": 8}), tmp_path / "whole")


def test_a_length_that_blocks_do_not_fit_is_refused(tiny):
  with pytest.raises(Mistake, match="is not a multiple of noise.block=5: rows hold whole blocks"):
    tiny({"noise.block": 5})


def test_what_a_step_of_blocks_costs(tiny):
  """The layers run twice a token, and look at L + n keys in all; the head runs once."""
  full, blocks, pairs = (
    step.flops_per_token(tiny({"model.V": 32} | more))
    for more in ({}, {"noise.block": 4}, {"noise.block": 4, "noise.weights": "flat", "noise.complements": True})
  )
  c = tiny({"model.V": 32}).model
  layers = step.matmuls(tiny({"model.V": 32})) - c.V * c.D
  assert blocks - full == 6 * layers + 12 * c.N * c.H * c.K * 4
  assert pairs == 2 * blocks


CHAT = {"data.format": "chat", "data.length": 64, "data.replies": "all", "data.eos_padding": "block", "steps": 6}
PHASES = BLOCKS | {"noise.block": 0, "noise.blocks": ((3, 1), (2, 4), (0.25, 0), (-1, 2)), "evaluate.every": 4}


@pytest.fixture(scope="module")
def phases(tiny, tmp_path_factory):
  """(the workdir of a run of blocks of 1, 4, the whole canvas and 2, whose checkpoints stay; its batches)."""
  workdir, batches = tmp_path_factory.mktemp("phases") / "whole", []
  with pytest.MonkeyPatch.context() as patch:
    at_batch(patch, None, batches.append)
    trainer.train(tiny(PHASES | {"checkpoint.every": 1, "checkpoint.keep": 12}), workdir)
  return workdir, batches


def bounds(workdir):
  """Step -> held-out bits per byte, also of the last evaluation."""
  rows = [row for name in ("metrics", "evaluations") for row in metrics.read(workdir / f"{name}.jsonl")]
  return {row["step"]: row[name] for row in rows for name in ("held_out_bits_per_byte", "bits_per_byte") if name in row}


def test_the_phases_of_a_run(tiny):
  c = tiny(PHASES)
  assert c.phases == [Phase(0, 3, 1), Phase(3, 5, 4), Phase(5, 8, 0), Phase(8, 12, 2)]
  assert (c.data.align, c.model.block, c.aim.noise.block) == (4, 2, 2)
  assert [c.at(n).model.block for n in range(13)] == [1, 1, 1, 1, 4, 4, 0, 0, 0, 2, 2, 2, 2]
  assert all(dataclasses.replace(c.at(n), model=c.model) == c for n in range(13))
  baseline = tiny(PHASES | {"objective": "autoregressive"})
  assert baseline.phases == [Phase(0, 12, 0)] and baseline.data.align == 1


@pytest.mark.slow
def test_what_a_run_of_phases_leaves(phases):
  workdir, batches = phases
  for batch in batches:  # in every phase documents begin at multiples of every block
    begins_BL = (np.diff(batch["segment"], axis=1, prepend=0) != 0) & (batch["segment"] > 0)
    assert begins_BL.any() and not begins_BL.reshape(len(begins_BL), -1, 4)[..., 1:].any()
  assert lladax.load(workdir).model.block == 2 == json.loads((workdir / "config.json").read_text())["model"]["block"]


@pytest.mark.slow
def test_a_run_goes_on_bitwise_over_changes_of_the_block(tiny, phases, tmp_path, monkeypatch):
  """From the middle of a phase (step 4), and from where one begins (step 8)."""
  config = tiny(PHASES | {"checkpoint.every": 4})
  for cut in (6, 10):
    with monkeypatch.context() as patch:
      at_batch(patch, cut, crash)
      with pytest.raises(Crash):
        trainer.train(config, tmp_path)
    assert checkpoint.steps(tmp_path)[-1] == {6: 4, 10: 8}[cut]
  trainer.train(config, tmp_path)
  assert_bitwise_equal(tmp_path, phases[0])
  assert bounds(tmp_path) == bounds(phases[0])


@pytest.mark.slow
def test_every_phase_is_what_a_run_of_its_block_would_be(tiny, phases, tmp_path):
  """The loss of its steps, from the same state and batch, and its bound."""
  workdir = shutil.copytree(phases[0], tmp_path / "copy")
  config = tiny(PHASES)
  run = setup.prepare(config, workdir)
  ids = {"mask_id": run.text.mask_id, "eos_id": run.text.eos_id, "vocab_size": run.text.vocab_size}
  losses = {n: loss for n, loss, *_ in curve(workdir)}
  for n, block in ((12, 2), (9, 2), (8, 0), (5, 4), (4, 4), (1, 1)):
    alone = tiny(PHASES | {"noise.blocks": (), "noise.block": block, "model.V": run.config.model.V})
    tx, _, at, batch_at = step.program(alone, run.mesh)
    checkpoint.drop(workdir, after=n - 1)
    with jax.set_mesh(run.mesh):
      state = setup.restore(run) or setup.begin(run)
      assert int(state.step) == n - 1
      batch = {name: jax.device_put(x, batch_at[name]) for name, x in phases[1][n - 1].items()}
      _, scalars = step.jit_step(alone, tx, at, **ids)(state, batch)
    assert float(scalars["loss"]) == losses[n], (n, block)
  for n, block in ((4, 4), (8, 0), (12, 2)):
    llada = lladax.load(phases[0], step=n)
    llada = dataclasses.replace(llada, model=dataclasses.replace(llada.model, block=block))
    assert bounds(phases[0])[n] == pytest.approx(held_out.bound(llada, config)["bits_per_byte"], rel=1e-6)


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"noise.block": 4}, "noise.block=4, noise.blocks=.*: one block or a schedule of them, not both"),
    ({"noise.blocks": ((3, 2), (4, 3), (-1, 8))}, "noise.blocks: 3 does not divide 8, the largest"),
    ({"noise.blocks": ((3, 5), (-1, 0))}, "data.length=16 is not a multiple of noise.blocks=5"),
    ({"noise.blocks": ((3, 2), (0, 4))}, r"noise.blocks: \(0.0, 4\) is not \(steps, block\)"),
    ({"noise.blocks": ((3, -2),)}, r"noise.blocks: \(3.0, -2\) is not \(steps, block\)"),
    ({"noise.blocks": ((-1, 2), (-1, 4))}, "noise.blocks: a length is a number of steps"),
    ({"noise.blocks": ((8, 2), (4, 4), (-1, 8))}, r"noise.blocks: of steps=12 \(-1.0, 8\) gets none"),
    ({"noise.blocks": ((8, 2), (5, 4), (-1, 8))}, "noise.blocks: its pieces take 13 steps"),
    ({"noise.blocks": ((12, 2), (5, 4))}, r"noise.blocks: of steps=12 \(5.0, 4\) gets none"),
    ({"noise.blocks": (4,)}, "noise.blocks.0.=4: expected tuple"),
    (CHAT | {"data.segments": False, "steps": 12}, "a canvas that is one block sees what"),
    ({"sample.cache": "dual"}, "a model of blocks keeps the finished ones by itself"),
  ],
)
def test_a_schedule_of_blocks_that_is_none_is_refused(tiny, changes, said):
  with pytest.raises(Mistake, match=said):
    tiny(PHASES | changes)


@pytest.mark.slow
def test_a_schedule_of_blocks_may_be_changed_deliberately(tiny, phases, tmp_path):
  """By --allow, as that of the learning rate, as long as the rows stay what they are."""
  workdir = shutil.copytree(phases[0], tmp_path / "copy")
  longer, later = PHASES | {"steps": 14}, {"noise.blocks": ((3, 1), (2, 4), (3, 0), (4, 2), (-1, 4))}
  with pytest.raises(Mistake, match=r"another config \(noise.blocks: .* or say --allow=noise.blocks$"):
    trainer.train(tiny(longer | later), workdir)
  with pytest.raises(Mistake, match=r"data.align: 4 there, 8 here\): .* follows from the largest block"):
    trainer.train(tiny(longer | {"noise.blocks": ((12, 4), (-1, 8))}), workdir, allow=["noise.blocks"])
  trainer.train(tiny(longer | later), workdir, allow=["noise.blocks"])
  assert lladax.load(workdir).model.block == 4 and len(curve(workdir)) == 14
  *_, last = metrics.read(workdir / "runs.jsonl")
  assert set(last["changed"]) >= {"steps", "noise.blocks"}


@pytest.mark.parametrize(("name", "value"), [("complements", True), ("replace", 0.1)])
def test_a_causal_model_knows_no_noise(tiny, name, value):
  with pytest.raises(Mistake, match=f"^noise.{name}={value}: a causal model knows no noise: leave it out"):
    tiny({"objective": "autoregressive", "noise.weights": "flat", f"noise.{name}": value})


TALKS = [
  talk("ab", "c", "d", "efghi", "j", "kl"),
  talk("a", "b" * 5, "cdefgh", "ij"),
  talk("xy", "z"),
  talk("a", "b", "c" * 40, "d"),
]


@pytest.mark.parametrize("block", [0, 1, 4])
def test_of_a_dialogue_whose_replies_are_all_learnt_each_is_judged_as_if_alone(block):
  """0: the causal baseline. With the same masks the loss and its gradient are those of the replies one by one."""
  c = DataConfig(format="chat", length=48, eos_padding="block", replies="all", packing=True, align=block or 1)
  apart_c = dataclasses.replace(c, replies="one", packing=False)
  together = dialogues.Dialogues(TALKS, Letters(), c, seed=0)
  apart = dialogues.Dialogues(TALKS, Letters(), apart_c, seed=0, every_turn=True)
  dialogue, single = (
    dict(zip(("tokens", "segment", "weight", "clean"), map(np.stack, zip(*rows, strict=False)), strict=False))
    for rows in ([source.row(i, 0, 0) for i in range(len(source))] for source in (together, apart))
  )
  single["clean"] = single["tokens"]
  single["weight"] /= np.bincount(apart._of_R)[apart._of_R][:, None]
  assert len(together) < len(apart) and (dialogue["clean"] != dialogue["tokens"]).any()
  rng = np.random.default_rng(0)
  masks = {name: np.zeros(x["tokens"].shape, bool) for name, x in (("dialogue", dialogue), ("single", single))}
  for row in range(len(together)):
    for number, i in enumerate(together._items(row), start=1):
      first = np.flatnonzero(dialogue["segment"][row] == number)[0]
      for turn in together._learnt(i, 0):
        (at_N,) = np.nonzero(single["weight"][turn])
        drawn_N = rng.random(len(at_N)) < 0.6
        masks["single"][turn, at_N] = drawn_N
        masks["dialogue"][row, first + at_N] = drawn_N
        np.testing.assert_array_equal(dialogue["tokens"][row, first + at_N], single["tokens"][turn, at_N])
  model = MaskPredictorConfig(D=16, N=2, H=2, G=1, K=8, F=16, V=128, dtype="float32", causal=not block, block=block)
  params = jax.tree.map(
    lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), jnp.float32),
    jax.eval_shape(model.init, jax.random.key(0)),
  )

  def loss(params, batch, masked_BL):
    weighted_nll = functools.partial(model.bind(params).weighted_nll, visible=model.visible(48, batch["segment"]))
    if not block:
      return autoregressive.Causal().loss(weighted_nll, batch, eos_id=0)[0]
    tokens_BL = batch["tokens"]
    input_BL, target_BL = jnp.where(masked_BL, 7, tokens_BL), jnp.where(masked_BL, tokens_BL, -1)
    return weighted_nll(input_BL, target_BL, batch["weight"], clean_BL=batch["clean"])[0]

  step = jax.jit(jax.value_and_grad(loss))
  a, b = step(params, dialogue, masks["dialogue"]), step(params, single, masks["single"])
  np.testing.assert_allclose(a[0], b[0], rtol=1e-5)
  for x, y in zip(jax.tree.leaves(a[1]), jax.tree.leaves(b[1]), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-6)


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
  """The option that names 40 dialogues of two replies."""
  path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
  said = [talk(f"{i}?", "red", "and?", "blue") for i in range(40)]
  path.write_text("".join(json.dumps({"messages": x}) + "\n" for x in said))
  return {"data.corpus": f"files:{path}"}


@pytest.mark.parametrize("more", [
  pytest.param({"noise.block": 4, "data.packing": True}, marks=pytest.mark.slow), {"objective": "autoregressive"},
])  # fmt: skip
def test_a_run_that_learns_all_replies(tiny, chats, tmp_path, more):
  config = tiny(CHAT | chats | more | {"data.length": 192, "data.batch_size": 8})
  result = trainer.train(config, tmp_path)
  assert 0 < result["bits_per_byte"] < 20


@pytest.mark.parametrize(("changes", "said"), [
  ({}, "data.replies='all' is for models of blocks, and a canvas that is one block sees what follows a reply: set"
       " noise.block, or data.replies=one"),
  ({"data.replies": "one"}, "data.eos_padding='block' is for models of blocks"),
])  # fmt: skip
def test_a_canvas_that_sees_what_follows_learns_one_reply(tiny, chats, changes, said):
  with pytest.raises(Mistake) as error:
    tiny(CHAT | chats | changes)
  assert str(error.value).startswith(said) and "\n" not in str(error.value)
