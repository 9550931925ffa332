"""A run whose objective is block diffusion: trained, cut off and continued, judged, sampled from."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rows import Letters, talk
from runs import Crash, assert_bitwise_equal, at_batch, crash

import lladax
from lladax import autoregressive
from lladax.data import dialogues
from lladax.data.windows import DataConfig
from lladax.mistake import Mistake
from lladax.model.mask_predictor import MaskPredictorConfig
from lladax.training import step, trainer

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


CHAT = {"data.format": "chat", "data.length": 64, "data.replies": "all", "data.eos_padding": "block", "steps": 6}


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
