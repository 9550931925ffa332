"""Rows that come and go answer as each would alone."""

import dataclasses
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lladax.inference.engine import Engine
from lladax.inference.slots import Row, Slots
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


COMMON = [
  {}, {"cache": "dual"}, {"cache": "prefix"}, {"guidance_scale": 0.7}, {"remasking": "random"},
  {"gen_length": None, "steps": 3}, {"edit_threshold": 0.4}, {"top_p": 0.8}, {"logit_bias": ((3, 2.0), (5, -9.0))},
]  # fmt: skip


@pytest.mark.parametrize("common", COMMON, ids=str)
def test_rows_that_come_and_go_answer_as_each_would_alone(common):
  assert_as_alone(make(), rows(common))


BLOCKS = [
  {}, {"gen_length": 13, "threshold": 0.4}, {"guidance_scale": 0.7}, {"gen_length": None, "steps": 3},
  {"edit_threshold": 0.4, "threshold": 0.6},
]  # fmt: skip


@pytest.mark.parametrize("common", BLOCKS, ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_rows_of_a_model_of_blocks_answer_as_each_would_alone(common, seed):
  assert_as_alone(make(block=8), rows(common), seed)


@pytest.mark.parametrize("block", [0, 8])
def test_canvases_answer_as_each_would_alone(block):
  rng, asked = np.random.default_rng(3), []
  for n in (5, 8, 21, 40, 64):
    ids = np.where(rng.random(n) < 0.4, MASK, rng.integers(0, 28, n))
    ids[n // 2] = MASK
    asked.append(Row(tuple(ids.tolist()), SamplerConfig(steps=6, block_length=8, temperature=0.5, seed=n), fills=True))
  gap = [*range(8), *[MASK] * 3, *range(29), MASK]  # whole blocks that are given
  asked.append(Row(tuple(gap), SamplerConfig(steps=6, block_length=8, seed=1), fills=True))
  assert_as_alone(make(block=block), asked)
