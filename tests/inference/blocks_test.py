"""Sampling from models of blocks: what the engine does with a cache and batches, a loop of plain passes does alone."""

import dataclasses

import jax
import numpy as np
import pytest

from lladax.inference.llada import LLaDA
from lladax.mistake import Mistake
from lladax.model.mask_predictor import MaskPredictorConfig
from lladax.sampling import SamplerConfig

pytestmark = pytest.mark.usefixtures("quick_compiles")

MASK, EOS = 15, 14


@pytest.fixture(scope="module")
def models():
  found = {}

  def make(n, scale=1.0, **fields):
    key = n, scale, *fields.items()
    if key not in found:
      c = MaskPredictorConfig(D=16, N=2, H=2, G=1, K=8, F=24, V=17, block=n, dtype="float32", max_length=128, **fields)
      shapes = jax.eval_shape(c.init, jax.random.key(0))
      rng = np.random.default_rng(n)
      params = jax.tree.map(lambda x: jax.device_put(np.float32(scale * rng.standard_normal(x.shape))), shapes)
      found[key] = LLaDA(c, params, None, mask_id=MASK, eos_id=EOS, vocab_size=15)
    return found[key]

  return make


def prompts():
  rng = np.random.default_rng(0)
  return [rng.integers(0, 14, length).tolist() for length in (13, 3, 8, 0, 17)]


def reference(
  llada, prompt, gen_length, *, steps=None, block_steps=None, tokens_per_step=None, threshold=np.inf, edit=np.inf,
  most=16, early_stop=False,
):  # fmt: skip
  """Greedy, as published (LLaDA2.0's generate; with `edit` 2.1's): a pass over the whole canvas up to the block.

  Returns (tokens, unmasked_at, edited_at, passes, the smallest gap that decided something).
  """
  n = llada.model.block
  steps = min(steps or gen_length, gen_length) * n / gen_length
  per_block = block_steps or int(-(-steps // 1))
  P = len(prompt)
  L = -(-(P + gen_length) // n) * n
  x = np.array(prompt + [MASK] * (L - P))
  at, edited, nfe, gap = np.zeros(L, int), np.zeros(L, int), 0, 1.0
  for start in range(P // n * n, L, n):
    if (x[start:] == EOS).all() and early_stop:
      break
    step = post = 0
    while True:
      masked = x[start : start + n] == MASK
      if not masked.any():
        post += 1
        if edit == np.inf or post > most:
          break
      logits = llada.logits(x[None, : start + n])[0, start:].astype(np.float64)
      nfe += 1
      log_p = (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
      )
      candidate = np.where(np.arange(17)[None] < 15, logits, -np.inf).argmax(-1)
      p = np.exp(np.take_along_axis(log_p, candidate[:, None], 1)[:, 0])
      if (x[: start + n] == MASK).all():  # places that nothing tells apart are filled in order
        p, candidate = p[-1] - 1e-4 * np.arange(n), np.full(n, candidate[-1])
      two = np.sort(np.where(np.arange(17)[None] < 15, log_p, -np.inf), axis=-1)[:, -2:]
      gap = min([gap, *np.diff(two), *np.diff(np.sort(p[masked])), *abs(p - threshold), *abs(p - edit)], key=np.min)
      gap = float(np.min(gap))
      quota = tokens_per_step or max(n // per_block + (step < n % per_block), 1)
      rank = np.argsort(np.argsort(-np.where(masked, p, -1), kind="stable"), kind="stable")
      commits = masked & ((rank < quota) | (p > threshold))
      edits = ~masked & (np.arange(start, start + n) >= P) & (p > edit) & (candidate != x[start : start + n])
      x[start : start + n] = np.where(commits | edits, candidate, x[start : start + n])
      at[start : start + n][commits], edited[start : start + n][edits] = nfe, nfe
      step += 1
      ends = np.flatnonzero((x == EOS) & (at > 0))
      if early_stop and edit == np.inf and len(ends) and MASK not in x[: ends[0]]:
        x[x == MASK] = EOS
      if MASK not in x[start : start + n] and (edit == np.inf or not (masked | edits).any()):
        break
    if early_stop and ((x == EOS) & (at > 0)).any():
      x[x == MASK] = EOS
  return x[: P + gen_length], at[: P + gen_length], edited[: P + gen_length], nfe, gap


CASES = {
  "one a pass": {}, "threshold": {"threshold": 0.3}, "few steps": {"steps": 9},
  "least and threshold": {"steps": 9, "threshold": 0.5}, "edits": {"threshold": 0.3, "edit_threshold": 0.25},
  "one edit": {"edit_threshold": 0.2, "max_post_passes": 1}, "stops": {"early_stop": True, "threshold": 0.3},
  "edits and stops": {"early_stop": True, "threshold": 0.3, "edit_threshold": 0.4},
  "steps of a block": {"block_steps": 3},
  "edits, and three a step": {"tokens_per_step": 3, "threshold": 0.5, "edit_threshold": 0.3, "max_post_passes": 4},
}  # fmt: skip


SHIFTED = ("threshold", "edits", "stops", "steps of a block")


@pytest.mark.parametrize("n", [4, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 8))])
@pytest.mark.parametrize("case, shift", [*((case, False) for case in CASES), *((case, True) for case in SHIFTED)])
def test_the_cache_and_the_batch_change_nothing(models, n, case, shift):
  llada, options = models(n, shift=shift), CASES[case]
  gen_length = 24
  out = llada.sample(prompts(), gen_length=gen_length, **({"steps": gen_length} | options))
  told = {{"edit_threshold": "edit", "max_post_passes": "most"}.get(name, name): x for name, x in options.items()}
  edits = compared = 0
  for i, prompt in enumerate(prompts()):
    tokens, at, edited, nfe, gap = reference(llada, prompt, gen_length, **told)
    if gap < 1e-5:  # rounding decides
      continue
    compared += 1
    np.testing.assert_array_equal(out.tokens[i, out.padding[i] :], tokens)
    if not options.get("early_stop"):
      np.testing.assert_array_equal(out.unmasked_at[i, out.padding[i] :], at)
    if "edit_threshold" in options:
      np.testing.assert_array_equal(out.edited_at[i, out.padding[i] :], edited)
      edits += (edited > 0).sum()
    alone = llada.sample([prompt], gen_length=gen_length, **({"steps": gen_length} | options))
    np.testing.assert_array_equal(alone.tokens[0, alone.padding[0] :], tokens)
    assert alone.nfe == nfe <= out.nfe
  assert (edits > 0) == ("edit_threshold" in options)
  assert out.tokens.shape == (5, 17 + 24) and compared >= 3


def test_what_a_model_of_blocks_has_decided(models):
  with pytest.raises(Mistake, match="sample.cache='dual': a model of blocks keeps the finished ones by itself"):
    models(4).sample([[1]], cache="dual")
  with pytest.raises(Mistake, match="sample.block_length=8: this model's blocks have 4 tokens: set it to that"):
    models(4).unmask([[1, MASK]], block_length=8)
  llada = models(4)
  short = dataclasses.replace(llada, model=dataclasses.replace(llada.model, max_length=130))
  with pytest.raises(Mistake, match="a prompt of 129 tokens leaves no block of 4 within model.max_length=130"):
    short.sample([[1] * 129], gen_length=None)
  with pytest.raises(Mistake, match="sample.edit_threshold=0.5 changes what the dual cache keeps"):
    SamplerConfig(edit_threshold=0.5, cache="dual")


@pytest.mark.parametrize("shift", [False, True])
def test_canvases_with_gaps(models, shift):
  """Blocks are filled from left to right; a given block behind a gap sees what was filled in."""
  llada = models(4, shift=shift)
  rows = [[1, MASK, 3, 4, 5, 6, 7, 8, 9, MASK], [MASK] * 6, [1, 2, 3, 4, 5, 6, 7, MASK, 9, 10, 11, 12, MASK]]
  out = llada.unmask(rows, steps=99)
  for i, row in enumerate(rows):
    x = np.array(row)
    for start in range(0, len(x), 4):
      while MASK in x[start : start + 4]:
        logits = llada.logits(x[None, : start + 4])[0, start:]
        log_p = np.asarray(jax.nn.log_softmax(logits))
        token = logits[:, :15].argmax(-1)
        p = np.where(x[start : start + 4] == MASK, np.take_along_axis(log_p, token[:, None], 1)[:, 0], -np.inf)
        x[start + p.argmax()] = token[p.argmax()]
    np.testing.assert_array_equal(out.tokens[i, out.padding[i] :], x)


@pytest.mark.parametrize(
  "options",
  [
    {"temperature": 1.0, "seed": 3},
    *(pytest.param(x, marks=pytest.mark.slow) for x in ({}, {"guidance_scale": 1.5}, {"edit_threshold": 0.3})),
  ],
)
def test_streams_and_growth_end_as_the_whole(models, options):
  llada = models(4)
  whole = llada.sample(prompts(), gen_length=16, steps=16, **options)
  for every in ("block", "step"):
    *_, last = llada.stream(prompts(), every=every, gen_length=16, steps=16, **options)
    np.testing.assert_array_equal(last.tokens, whole.tokens)
    np.testing.assert_array_equal(last.unmasked_at, whole.unmasked_at)
  grown = llada.sample(prompts(), gen_length=None, steps=4, **options)
  for i, prompt in enumerate(prompts()):
    row, more = whole.tokens[i, whole.padding[i] :], grown.tokens[i, grown.padding[i] :]
    end = next((k + 1 for k in range(len(prompt), len(row)) if row[k] == EOS), len(row) - 4)
    np.testing.assert_array_equal(more[:end], row[:end])
