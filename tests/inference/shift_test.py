"""Models that predict token i from the state at i - 1 (Dream, Qwen): what sampling and likelihoods make of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lladax.inference.llada import LLaDA
from lladax.model.mask_predictor import MaskPredictorConfig

pytestmark = pytest.mark.usefixtures("quick_compiles")

MASK, EOS, VOCABULARY = 30, 29, 31
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7]]


@functools.cache
def make(**fields):
  c = MaskPredictorConfig(
    **({"D": 12, "N": 2, "H": 2, "G": 1, "K": 6, "F": 16, "V": 32, "max_length": 64, "dtype": "float32"} | fields)
  )
  rng, shapes = np.random.default_rng(1), jax.eval_shape(c.init, jax.random.key(0))
  params = jax.tree.map(lambda x: jnp.asarray(0.6 * rng.standard_normal(x.shape), jnp.float32), shapes)
  return LLaDA(c, params | {"head": 3 * params["head"]}, None, MASK, EOS, VOCABULARY)


def dream(**fields):
  return make(shift=True, qkv_bias=True, **fields)


def log_softmax(x):
  return np.asarray(jax.nn.log_softmax(jnp.asarray(x)))


def explicit(llada, prompt, n, W, cached=False):
  """One row, greedily, a token a step, from `LLaDA.logits` alone; [MASK]s of later blocks are there."""
  row = [*prompt, *[MASK] * n]
  for start in range(len(prompt), len(row), W):
    for _ in range(W):
      logits_LV = llada.logits([row])[0].astype(np.float64)
      logits_LV[:, [MASK, 31]] = -np.inf
      p_LV = np.exp(log_softmax(logits_LV))
      masked = [i for i in range(start, start + W) if row[i] == MASK]
      best = max(masked, key=lambda i: p_LV[i].max())
      row[best] = int(p_LV[best].argmax())
  return row[len(prompt) :]


def answers(out, n):
  return [row[-n:].tolist() for row in out.tokens]


def test_sampling_reads_the_state_before():
  """And a row begins with its own first token's: of an empty prompt, too."""
  llada = dream()
  out = llada.sample(PROMPTS, gen_length=8, block_length=4, steps=8)
  assert answers(out, 8) == [explicit(llada, prompt, 8, 4) for prompt in PROMPTS]
  canvases = [[MASK, MASK, 7, MASK], [3, MASK, MASK, 1, MASK, MASK]]
  filled = llada.unmask(canvases, steps=32)
  for canvas, row, padding in zip(canvases, filled.tokens, filled.padding, strict=True):
    expected = list(canvas)
    while MASK in expected:
      p_LV = np.exp(log_softmax(np.where(np.isin(np.arange(32), [MASK, 31]), -np.inf, llada.logits([expected])[0])))
      best = max((i for i, x in enumerate(expected) if x == MASK), key=lambda i: p_LV[i].max())
      expected[best] = int(p_LV[best].argmax())
    assert row[padding:].tolist() == expected


SETTINGS = [{}, {"guidance_scale": 0.7}, {"temperature": 0.8, "seed": 3}, {"threshold": 0.4}, {"early_stop": True}]


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("options", SETTINGS[:3], ids=str)
def test_the_first_pass_of_each_block_is_the_one_without_a_cache(cache, options):
  """A step a block, so there is no other pass."""
  options = {"gen_length": 16, "block_length": 4, "steps": 4} | options
  plain, cached = (dream().sample(PROMPTS, **options, cache=x) for x in (None, cache))
  np.testing.assert_array_equal(cached.tokens, plain.tokens)
  np.testing.assert_allclose(cached.confidence, plain.confidence, atol=1e-5)


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize(
  "options", [*SETTINGS[:2], *(pytest.param(x, marks=pytest.mark.slow) for x in SETTINGS[2:])], ids=str
)
def test_of_one_layer_a_cache_changes_nothing(cache, options):
  """Its keys and values are their tokens' own: what a cached pass reads is what is there, at every step."""
  options = {"gen_length": 16, "block_length": 4, "steps": 16} | options
  plain, cached = (dream(N=1).sample(PROMPTS, **options, cache=x) for x in (None, cache))
  np.testing.assert_array_equal(cached.tokens, plain.tokens)
  np.testing.assert_allclose(cached.confidence, plain.confidence, atol=1e-5)


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_of_a_block_as_long_as_the_canvas_a_cache_changes_nothing(cache):
  """Where the window begins with the canvas there is no state before it."""
  canvases = [[MASK] * 9, [MASK, 3, MASK, MASK, 8, MASK], [4, *[MASK] * 20]]
  options = {"steps": 16, "temperature": 0.5}
  plain, cached = (dream().unmask(canvases, **options, cache=x) for x in (None, cache))
  np.testing.assert_array_equal(cached.tokens, plain.tokens)
  np.testing.assert_allclose(cached.confidence, plain.confidence, atol=1e-5)


@pytest.mark.parametrize("cache", ["dual", *(pytest.param(x, marks=pytest.mark.slow) for x in (None, "prefix"))])
def test_canvases_that_grow(cache):
  """A canvas that grows sees no later block: of one layer, and with the cache, it is the explicit loop."""
  llada = dream(N=1)
  out = llada.sample(PROMPTS[:1], gen_length=None, block_length=4, steps=4, cache=cache)
  row, n = list(PROMPTS[0]), out.tokens.shape[1] - out.padding[0] - len(PROMPTS[0])
  expected = []
  while EOS not in expected and len(expected) < n:
    expected += explicit(llada, row + expected, 4, 4)
  np.testing.assert_array_equal(out.tokens[0, -n:][: len(expected)], expected)


@pytest.mark.parametrize("guidance_scale", [0.0, 0.5])
def test_likelihoods_are_those_of_explicit_logits(guidance_scale):
  """Chain rule, and answers of one token, which share a pass; of an empty prompt as well."""
  llada = dream()
  pairs = [*((PROMPTS[0], [i]) for i in (2, 7)), ([], [4]), (PROMPTS[2], [1, 2, 3]), ([], [5, 6])]

  def log_p(row, at):
    logits_V = llada.logits([row])[0][at]
    if guidance_scale:
      un_V = llada.logits([[MASK if i < begin else x for i, x in enumerate(row)]])[0][at]
      logits_V = un_V + (1 + guidance_scale) * (logits_V - un_V)
    return log_softmax(logits_V)

  expected = []
  for prompt, answer in pairs:
    total, begin = 0.0, len(prompt)
    for i, token in enumerate(answer):
      row = [*prompt, *answer[:i], *[MASK] * (len(answer) - i)]
      total += log_p(row, begin + i)[token]
    expected.append(total)
  prompts, targets = (list(x) for x in zip(*pairs, strict=True))
  found = llada.log_likelihood(prompts, targets, guidance_scale=guidance_scale, method="chain_rule")
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  one = llada.log_likelihood(prompts[:3], targets[:3], guidance_scale=guidance_scale)  # by any method
  np.testing.assert_allclose(one, expected[:3], rtol=1e-5)


def test_a_monte_carlo_likelihood_is_that_of_its_masks():
  """Of two tokens: half the terms mask both, the others one of them; all three cases are explicit."""
  llada, (p, a) = dream(), (PROMPTS[0], [7, 11])
  both = llada.logits([[*p, MASK, MASK]])[0]
  left, right = llada.logits([[*p, MASK, a[1]]])[0], llada.logits([[*p, a[0], MASK]])[0]
  both = log_softmax(both[-2])[a[0]] + log_softmax(both[-1])[a[1]]
  one = np.array([log_softmax(left[-2])[a[0]], log_softmax(right[-1])[a[1]]])
  found = llada.log_likelihood(p, a, num_samples=4000)
  np.testing.assert_allclose(found, (both + one.sum()) / 2, atol=0.15 * np.abs(one[0] - one[1]))
  assert found != pytest.approx(both, abs=1e-3)


def test_a_causal_shifted_model_answers_as_its_logits_say():
  """Qwen's kind: the token it is begun with changes nothing, and greedy text is that of explicit logits."""
  llada = make(causal=True, shift=True, qk_norm=True)
  out = llada.sample(PROMPTS, gen_length=6, logits_eos_inf=True)
  for prompt, answer in zip(PROMPTS, answers(out, 6), strict=True):
    row = list(prompt)
    for _ in range(6):
      logits_V = llada.logits([[*row, 0]])[0][-1]
      row.append(int(np.where(np.isin(np.arange(32), [MASK, EOS, 31]), -np.inf, logits_V).argmax()))
    assert answer == row[len(prompt) :]
    total = sum(log_softmax(llada.logits([row])[0][i])[row[i]] for i in range(len(prompt), len(row)))
    np.testing.assert_allclose(llada.log_likelihood(prompt, answer), total, rtol=1e-5)
