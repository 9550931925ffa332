"""Rows that come and go answer as each would alone."""

import dataclasses
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lladax.inference import engine as engines
from lladax.inference.engine import Engine
from lladax.inference.slots import Row, Seat, Slots, length_of, rows_of
from lladax.mistake import Mistake
from lladax.model.mask_predictor import MaskPredictorConfig
from lladax.sampling import SamplerConfig

pytestmark = pytest.mark.usefixtures("quick_compiles")

MASK, EOS, EOT = 30, 29, 28


def make(**fields):
  c = MaskPredictorConfig(
    **({"D": 12, "N": 2, "H": 2, "G": 1, "K": 6, "F": 16, "V": 32, "max_length": 256, "dtype": "float32"} | fields)
  )
  rng, shapes = np.random.default_rng(1), jax.eval_shape(c.init, jax.random.key(0))
  params = jax.tree.map(lambda x: jnp.asarray(0.6 * rng.standard_normal(x.shape), jnp.float32), shapes)
  params["final_norm"] = jnp.abs(params["final_norm"])
  return Engine(c, params | {"head": 3 * params["head"]}, MASK, (EOS, EOT), 31)  # sure enough for thresholds


BASE = {"gen_length": 16, "block_length": 8, "steps": 8}
RAGGED = [1, 2, 7, 8, 9, 20, 33, 40]
EACH = [
  {}, {"threshold": 0.3}, {"temperature": 0.8, "factor": 2.0}, {"temperature": 1.5, "steps": 3},
  {"gen_length": 32, "early_stop": True, "temperature": 2.0}, {"threshold": 0.5, "gen_length": 8}, {"block_steps": 2},
  {"temperature": 1.0, "eps": 1e-3, "block_steps": 6},
]  # fmt: skip


def rows(common, each=EACH, lengths=RAGGED, **more):
  rng = np.random.default_rng(0)
  made = []
  for i, (options, n) in enumerate(zip(each, lengths, strict=True)):
    given = BASE | {"seed": i} | options | common
    if "threshold" in common:
      given.pop("factor", None)
    made.append(Row(tuple(rng.integers(0, 28, n).tolist()), SamplerConfig(**given), **more))
  return made


def alone(engine, row):
  """(tokens, unmasked_at, confidence, passes) of a row by itself, without its padding."""
  c = dataclasses.replace(row.settings, seed=(row.settings.seed,))
  job = engine.fill([list(row.ids)], c) if row.fills else engine.extend([list(row.ids)], c)
  *_, filled = engine.run(job)
  canvas, n = filled.canvas, int(filled.padding_B[0])
  return canvas.tokens_BL[0, n:], canvas.unmasked_at_BL[0, n:], canvas.confidence_BL[0, n:], int(canvas.step_B[0])


def served(engine, asked, seed=0):
  """What becomes of rows that join between blocks, whenever it happens: row -> its last snapshot."""
  rng, waiting, slots, out, last = random.Random(seed), list(range(len(asked))), Slots(engine), {}, {}
  while waiting or slots.seats:
    for i in rng.sample(waiting, min(len(waiting), rng.randint(0, 3))):
      waiting.remove(i)
      slots.add(i, asked[i])
    kinds = {seat.kind for seat in slots.seats.values()}
    for kind in sorted(kinds, key=str):
      slots.begin([i for i, seat in slots.seats.items() if seat.kind == kind])
      goes_on = True
      while goes_on:
        goes_on = slots.step()
        for i, seat in slots.seats.items():
          snapshot = seat.snapshot()
          if i in last:  # what was said to be final is
            old = last[i]
            np.testing.assert_array_equal(old.tokens_L[: old.stable], snapshot.tokens_L[: old.stable])
            assert snapshot.stable >= old.stable and snapshot.passes >= old.passes
          last[i] = snapshot
    done = [i for i, seat in slots.seats.items() if seat.done]
    out |= {i: last[i] for i in done}
    slots.drop(done)
  return out


def assert_as_alone(engine, asked, seed=0):
  found = served(engine, asked, seed)
  for i, row in enumerate(asked):
    tokens, at, confidence, passes = alone(engine, row)
    x = found[i]
    L = len(x.tokens_L)  # alone a canvas may have grown further: what is behind is EOS
    np.testing.assert_array_equal(x.tokens_L, tokens[:L], err_msg=str(row))
    np.testing.assert_array_equal(x.unmasked_at_L, at[:L], err_msg=str(row))
    np.testing.assert_allclose(x.confidence_L, confidence[:L], atol=2e-5)
    assert x.passes == passes and (tokens[L:] == EOS).all() and x.done and x.stable == L
    assert x.first == (0 if row.fills else len(row.ids))


def often(*each, of):
  """The first so many are tried by default, the rest with the slow tests."""
  return [pytest.param(x, marks=[pytest.mark.slow] * (i >= of)) for i, x in enumerate(each)]


COMMON = often(
  {"cache": "dual"}, {"gen_length": None, "steps": 3}, {"edit_threshold": 0.4}, {}, {"cache": "prefix"},
  {"guidance_scale": 0.7}, {"remasking": "random"}, {"top_p": 0.8}, {"logit_bias": ((3, 2.0), (5, -9.0))}, of=2,
)  # fmt: skip


@pytest.mark.parametrize("common", COMMON, ids=str)
def test_rows_that_come_and_go_answer_as_each_would_alone(common):
  assert_as_alone(make(), rows(common))


BLOCKS = often(
  {"gen_length": 13, "threshold": 0.4}, {"guidance_scale": 0.7}, {}, {"gen_length": None, "steps": 3},
  {"edit_threshold": 0.4, "threshold": 0.6}, of=1,
)  # fmt: skip


@pytest.mark.parametrize("common", BLOCKS, ids=str)
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_rows_of_a_model_of_blocks_answer_as_each_would_alone(common, seed):
  assert_as_alone(make(block=8), rows(common), seed)


def test_rows_of_shifted_blocks_answer_as_each_would_alone():
  assert_as_alone(make(block=8, shift=True), rows({"gen_length": 13, "threshold": 0.4}))


@pytest.mark.parametrize("block", [pytest.param(0, marks=pytest.mark.slow), 8])
def test_canvases_answer_as_each_would_alone(block):
  rng, asked = np.random.default_rng(3), []
  for n in (5, 8, 21, 40, 64):
    ids = np.where(rng.random(n) < 0.4, MASK, rng.integers(0, 28, n))
    ids[n // 2] = MASK
    asked.append(Row(tuple(ids.tolist()), SamplerConfig(steps=6, block_length=8, temperature=0.5, seed=n), fills=True))
  gap = [*range(8), *[MASK] * 3, *range(29), MASK]  # whole blocks that are given
  asked.append(Row(tuple(gap), SamplerConfig(steps=6, block_length=8, seed=1), fills=True))
  assert_as_alone(make(block=block), asked)


@pytest.mark.parametrize("block", [0, pytest.param(8, marks=pytest.mark.slow)])
def test_what_is_warm_compiles_nothing_more(block):
  """Whatever the lengths, who shares a batch, and what is a number to the sampler."""
  engine = make(block=block, F=17, max_length=48)  # which no other test compiles
  asked = rows({}, each=EACH[:4] * 2, lengths=[1, 5, 8, 9, 16, 20, 30, 32])
  said = []
  count = Slots(engine).warm(SamplerConfig(**BASE), rows=8, longest=48, say=said.append)
  assert count == len(said) == len(set(said))
  before = [x._cache_size() for x in (engines.unmask_until, engines.prefill)]
  assert len(served(engine, asked)) == len(asked)
  assert [x._cache_size() for x in (engines.unmask_until, engines.prefill)] == before


@pytest.mark.parametrize("W", [1, 4, 32, 160])
def test_lengths_are_few_and_whole_blocks(W):
  lengths = [length_of(n, W) for n in range(1, 4097)]
  assert all(L >= n and L % W == 0 for n, L in enumerate(lengths, 1)) and len(set(lengths)) <= 14
  assert all(L <= max(64, 1.5 * n) + W for n, L in enumerate(lengths, 1))
  assert [rows_of(n) for n in (1, 2, 3, 5, 8, 9)] == [1, 2, 4, 8, 8, 16]


def test_a_causal_model_and_a_canvas_that_grows_are_refused():
  for engine, row, said in (
    (make(causal=True), Row((1,), SamplerConfig()), "a causal model is not served"),
    (
      make(),
      Row((1, MASK), SamplerConfig(gen_length=None), fills=True),
      "sample.gen_length=None: a canvas has a length",
    ),
    (make(), Row((1,) * 250, SamplerConfig(gen_length=None)), "leaves no block of 32 within model.max_length=256"),
    (make(), Row((1,) * 250, SamplerConfig()), "a canvas of 314 tokens is longer than model.max_length=256"),
  ):
    with pytest.raises(Mistake, match=said):
      Seat(engine, row)
