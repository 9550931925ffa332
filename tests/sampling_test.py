import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lladax import sampling
from lladax.model.mask_predictor import MaskPredictorConfig
from lladax.sampling import REMASKING, SamplerConfig

pytestmark = pytest.mark.usefixtures("quick_compiles")

MASK, V = 15, 18
ALLOWED = (np.arange(V) != MASK) & (np.arange(V) < 17) & (np.arange(V) != 3)
ROUTES = {"fixed": {}, "threshold": {"threshold": 0.25}, "factor": {"factor": 1.2}}
TABLE = np.random.default_rng(0).standard_normal((3, V, V)).astype(np.float32)


def predict(tokens_BL, start, W):
  """A cheap model: what stands here, on the left and on the right, and how many [MASK]s there are, all matter."""
  seen = (jnp.roll(tokens_BL, 1, axis=1), tokens_BL, jnp.roll(tokens_BL, -1, axis=1))
  logits_BLV = sum(jnp.asarray(TABLE[i])[x] for i, x in enumerate(seen))
  masks_B11 = jnp.sum(tokens_BL == MASK, axis=1)[:, None, None]
  logits_BLV *= 1 + jnp.sin(masks_B11 + jnp.arange(tokens_BL.shape[1])[None, :, None]) / 2
  return jax.lax.dynamic_slice_in_dim(logits_BLV, start, W, axis=1)


def keys(rows, seed=0):
  return jax.random.split(jax.random.key(seed), rows)


def sample(predict, tokens_BL, key_B, c, **options):
  """`start` and `run` in one; `c`: one config, or one a row."""
  shape, settings = sampling.split(c, len(tokens_BL))
  return _sample(predict, tokens_BL, key_B, settings, shape, **options)


def _sample(predict, tokens_BL, key_B, settings, shape, *, ends=(17,), first=0):
  """By default nothing that is drawn ends a row."""
  state = sampling.start(tokens_BL, settings.steps, shape, mask_id=MASK, first=first)
  return sampling.run(
    predict, state, key_B, settings, shape, mask_id=MASK, allowed_V=jnp.asarray(ALLOWED), ends=ends,
    origin=tokens_BL.shape[1], first=first,
  ).canvas  # fmt: skip


@functools.partial(jax.jit, static_argnames=("shape", "predict", "first"))
def run(tokens_BL, key_B, settings, shape, predict, **options):
  """One program for all settings of a shape."""
  return _sample(
    lambda tokens_BL, start, W, cache: (predict(tokens_BL, start, W), cache), tokens_BL, key_B, settings, shape,
    **options,
  )  # fmt: skip


def fill(tokens_BL, c, seed=0, predict=predict, **options):
  tokens_BL = np.asarray(tokens_BL, np.int32)
  shape, settings = sampling.split(c, len(tokens_BL))
  return jax.tree.map(np.asarray, run(tokens_BL, keys(len(tokens_BL), seed), settings, shape, predict, **options))


def canvases(B=4, L=12, seed=0):
  """Rows with [MASK]s strewn about: none in the first row, nothing else in the last."""
  rng = np.random.default_rng(seed)
  return np.where(rng.random((B, L)) < np.linspace(0, 1, B)[:, None], MASK, rng.integers(0, 15, (B, L)))


def log_softmax(x):
  x = x - x.max(axis=-1, keepdims=True)
  return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def reference(tokens_L, c):
  """Greedy sampling of one row as the papers tell it, in NumPy: (tokens, unmasked_at, confidence, steps)."""
  x, at, confidence, step = tokens_L.copy(), np.zeros(len(tokens_L), int), np.ones(len(tokens_L)), 0
  starts = [s for s in range(0, len(x), c.block_length) if MASK in x[s : s + c.block_length]]
  for n, start in enumerate(starts):
    block = np.arange(start, start + c.block_length)
    steps = max(c.steps // len(starts) + (n < c.steps % len(starts)), 1)
    masks = np.sum(x[block] == MASK)
    quotas = [masks // steps + (i < masks % steps) for i in range(steps)]
    while MASK in x[block]:
      step, quota = step + 1, quotas.pop(0)
      log_p = log_softmax(np.asarray(predict(jnp.asarray(x[None]), 0, len(x)))[0].astype(np.float64))
      token = np.argmax(np.where(ALLOWED, log_p, -np.inf), axis=1)
      p = np.exp(log_p[np.arange(len(x)), token])
      top = np.sort(np.exp(log_p), axis=1)
      score = {
        "low_confidence": p,
        "low_margin": top[:, -1] - top[:, -2],
        "high_entropy": np.sum(np.exp(log_p) * log_p, axis=1),
        "sequential": -np.arange(len(x)),
      }[c.remasking]
      best = sorted([i for i in block if x[i] == MASK], key=lambda i: -score[i])
      kept = best[: max(quota, 1)]
      if c.threshold is not None:
        kept = best[:1] + [i for i in best[1:] if p[i] > c.threshold]
      if c.factor is not None:
        kept = best[:1] + [i for k, i in enumerate(best[1:], 2) if (k + 1) * (1 - p[i]) < c.factor]
      x[kept], at[kept], confidence[kept] = token[kept], step, p[kept]
      quotas = quotas or [len(x)]
  return x, at, confidence, step


def check_filled(tokens_BL, out, block_length):
  """What holds however a canvas is filled."""
  given_BL = tokens_BL != MASK
  np.testing.assert_array_equal(out.tokens_BL[given_BL], tokens_BL[given_BL])
  np.testing.assert_array_equal(out.unmasked_at_BL == 0, given_BL)
  np.testing.assert_array_equal(out.confidence_BL[given_BL], 1)
  assert ALLOWED[out.tokens_BL[~given_BL]].all()  # no [MASK], and nothing banned
  assert np.all((0 < out.confidence_BL[~given_BL]) & (out.confidence_BL[~given_BL] < 1))
  for at_L, given_L, steps in zip(out.unmasked_at_BL, given_BL, out.step_B, strict=True):
    at_block = sorted(set(zip(at_L[~given_L], np.flatnonzero(~given_L) // block_length, strict=True)))
    assert [at for at, _ in at_block] == list(range(1, steps + 1))  # every step commits, in one block
    assert [block for _, block in at_block] == sorted(block for _, block in at_block)
  assert max(out.step_B) <= out.nfe <= sum(out.step_B)


@pytest.mark.parametrize(
  "remasking, route, block_length",
  [
    *itertools.product(("low_confidence", "low_margin", "high_entropy"), ROUTES, [4]),
    ("low_confidence", "fixed", 12),
    ("sequential", "fixed", 4),
  ],  # fmt: skip
)
def test_every_row_is_filled_as_the_papers_tell_it(remasking, route, block_length):
  c = SamplerConfig(block_length=block_length, steps=7, remasking=remasking, **ROUTES[route])
  tokens_BL = canvases()
  out = fill(tokens_BL, c)
  check_filled(tokens_BL, out, block_length)
  for i, expected in enumerate(map(functools.partial(reference, c=c), tokens_BL)):
    for actual, wanted in zip(out[:4], expected, strict=True):
      np.testing.assert_allclose(actual[i], wanted, rtol=1e-5)


@pytest.mark.parametrize(
  "remasking, temperature, route",  # with the combinations of the test above: every pair of options
  [("random", 0.0, route) for route in ROUTES]
  + [(remasking, 1.5, "fixed") for remasking in REMASKING]
  + [("low_confidence", 1.5, "threshold"), ("low_confidence", 1.5, "factor")],
)
def test_no_mask_is_left_and_nothing_given_changes(remasking, route, temperature):
  tokens_BL = canvases(seed=1)
  c = SamplerConfig(block_length=4, steps=5, temperature=temperature, remasking=remasking, **ROUTES[route])
  check_filled(tokens_BL, fill(tokens_BL, c), 4)


@pytest.mark.parametrize("masks", [1, 7, 12])
@pytest.mark.parametrize("steps", [1, 5, 12, 20])
def test_quota_follows_lladas_table(masks, steps):
  tokens_BL = np.array([[MASK] * masks + [0] * (12 - masks), [0] * 11 + [MASK]])
  out = fill(tokens_BL, SamplerConfig(block_length=12, steps=steps))
  table = [masks // steps + (i < masks % steps) for i in range(steps)]
  expected = [quota for quota in table if quota]
  assert np.bincount(out.unmasked_at_BL[0])[-len(expected) :].tolist() == expected
  assert out.nfe == len(expected) == out.step_B[0] and out.step_B[1] == 1


@pytest.mark.parametrize(
  "blocks, steps, expected",
  [
    ([4, 4, 4], 6, [2, 2, 2]),
    ([4, 4, 4], 8, [3, 3, 2]),  # what does not divide goes to the first blocks
    ([4, 0, 4], 6, [3, 0, 3]),  # a finished block costs nothing, and leaves its steps to the others
    ([0, 0, 1], 6, [0, 0, 1]),
    ([4, 4, 4], 1, [1, 1, 1]),  # no block does with less than one
    ([0, 0, 0], 6, [0, 0, 0]),
  ],
)
def test_steps_are_shared_by_the_blocks_that_hold_a_mask(blocks, steps, expected):
  row = [token for masks in blocks for token in [MASK] * masks + [0] * (4 - masks)]
  out = fill([row], SamplerConfig(block_length=4, steps=steps))
  assert [len(set(at) - {0}) for at in np.split(out.unmasked_at_BL[0], 3)] == expected
  assert out.nfe == out.step_B[0] == sum(expected)


def test_the_batch_makes_the_passes_of_its_slowest_row_in_each_block():
  rows = [[MASK] * 4 + [0] * 8, [0] * 8 + [MASK] * 2 + [0] * 2, [0] * 12]
  out = fill(rows, SamplerConfig(block_length=4, steps=12))
  assert out.step_B.tolist() == [4, 2, 0] and out.nfe == 6


def test_a_confident_model_needs_fewer_passes():
  sure = lambda tokens_BL, start, W: 20 * predict(tokens_BL, start, W)  # noqa: E731
  tokens_BL = np.full((2, 12), MASK)
  for route in ({"threshold": 0.9}, {"factor": 1.0}):
    c = SamplerConfig(block_length=12, steps=12, **route)
    assert fill(tokens_BL, c, predict=sure).nfe < 12 == fill(tokens_BL, SamplerConfig(block_length=12, steps=12)).nfe
    assert fill(tokens_BL, SamplerConfig(block_length=12, steps=1, threshold=1.0)).nfe == 12  # one a step


@pytest.mark.parametrize("first", [0, 4])
def test_blocks_begin_at_first(first):
  tokens_BL = np.array([[1] * 4 + [MASK] * 8])
  out = fill(tokens_BL, SamplerConfig(block_length=8 if first else 6, steps=8), first=first)
  assert MASK not in out.tokens_BL
  assert (max(out.unmasked_at_BL[0, :6]) < min(out.unmasked_at_BL[0, 6:])) == (first == 0)


def test_an_uneven_canvas_is_refused():
  with pytest.raises(ValueError, match="a canvas of 12 positions is not cut evenly into blocks of 5"):
    fill(canvases(), SamplerConfig(block_length=5))


@pytest.mark.parametrize(
  "remasking, route", [*zip(REMASKING, (*ROUTES, "fixed", "fixed"), strict=True), ("random", "factor")]
)
def test_a_broken_model_ends(remasking, route):
  def broken(tokens_BL, start, W):
    return jnp.broadcast_to(jnp.array([[[jnp.nan]], [[jnp.inf]], [[-jnp.inf]]]), (3, W, V))

  c = SamplerConfig(block_length=6, steps=3, remasking=remasking, **ROUTES[route])
  out = fill(np.full((3, 12), MASK), c, predict=broken)
  assert ALLOWED[out.tokens_BL].all() and out.nfe == (3 if route == "fixed" else 12)


def test_a_model_that_insists_on_banned_ids_does_not_get_them():
  insists = lambda tokens_BL, start, W: predict(tokens_BL, start, W) + jnp.where(ALLOWED, 0.0, 30.0)[None, None]  # noqa: E731
  for temperature in (0.0, 2.0):
    out = fill(canvases(), SamplerConfig(block_length=12, temperature=temperature), predict=insists)
    assert ALLOWED[out.tokens_BL[canvases() == MASK]].all()
    assert out.confidence_BL[canvases() == MASK].max() < 1e-6  # the banned ids count


@pytest.mark.parametrize(
  "options, tokens_differ, order_differs",
  [({}, False, False), ({"remasking": "random"}, True, True), ({"temperature": 1.0}, True, True)],
)
def test_the_seed_decides_what_is_random_and_no_more(options, tokens_differ, order_differs):
  tokens_BL, c = np.full((3, 12), MASK), SamplerConfig(block_length=12, steps=12, **options)
  one, same, two = (fill(tokens_BL, c, seed=seed) for seed in (1, 1, 2))
  jax.tree.map(np.testing.assert_array_equal, one, same)
  assert np.any(one.tokens_BL != two.tokens_BL) == tokens_differ
  assert np.any(one.unmasked_at_BL != two.unmasked_at_BL) == order_differs
  rows_differ = np.any(one.unmasked_at_BL[0] != one.unmasked_at_BL[1])
  assert rows_differ == order_differs  # equal rows have noise of their own


def test_temperature_draws_from_the_softmax():
  def fixed(tokens_BL, start, W):
    return jnp.broadcast_to(jnp.asarray(TABLE[0, 0]), (len(tokens_BL), W, V))

  out = fill(np.full((1, 6000), MASK), SamplerConfig(block_length=6000, steps=1, temperature=2.0), predict=fixed)
  expected_V = np.where(ALLOWED, np.exp(TABLE[0, 0].astype(np.float64) / 2), 0)
  expected_V *= 6000 / expected_V.sum()
  counts_V = np.bincount(out.tokens_BL[0], minlength=V)
  assert np.all(abs(counts_V - expected_V) <= 4.5 * np.sqrt(expected_V))
  np.testing.assert_allclose(out.confidence_BL[0], np.exp(log_softmax(TABLE[0, 0]))[out.tokens_BL[0]], rtol=1e-5)


@pytest.mark.parametrize("options", [{"temperature": 1.0}, {"remasking": "random", "threshold": 0.3}])
def test_no_row_depends_on_its_neighbours_or_its_padding(options):
  c = MaskPredictorConfig(D=12, N=1, H=2, G=1, K=6, F=16, V=V, dtype="float32")
  rng, shapes = np.random.default_rng(0), jax.eval_shape(c.init, jax.random.key(0))
  params = jax.tree.map(lambda x: jnp.asarray(0.5 * rng.standard_normal(x.shape), jnp.float32), shapes)
  sampler = SamplerConfig(block_length=4, steps=6, **options)

  @jax.jit
  def answer(tokens_BL, segment_BL, key_B):
    position_BL = jnp.maximum(jnp.cumsum(segment_BL, axis=1) - 1, 0)

    def predict(tokens_BL, start, W, cache):
      hidden_BLD, _ = c.bind(params).hidden(tokens_BL, c.visible(tokens_BL.shape[1], segment_BL), position_BL)
      return c.bind(params).logits(jax.lax.dynamic_slice_in_dim(hidden_BLD, start, W, axis=1)), cache

    return sample(predict, tokens_BL, key_B, sampler)

  tokens_BL = np.where(np.arange(16) >= 11, MASK, canvases(B=3, L=16, seed=2))
  # With nothing given all positions look alike, and rounding decides between equal confidences.
  tokens_BL[2, 9] = 7
  segment_BL = np.stack([np.arange(16) >= 16 - length for length in (16, 12, 7)]).astype(np.int32)
  tokens_BL = np.where(segment_BL, tokens_BL, 0)
  together = answer(tokens_BL, segment_BL, keys(3))
  order = np.array([2, 0, 1])
  permuted = answer(tokens_BL[order], segment_BL[order], keys(3)[order])
  alone = answer(tokens_BL[2:, 8:], segment_BL[2:, 8:], keys(3)[2:])  # on as many blocks as it needs
  for i, length in enumerate((16, 12, 7)):
    answers = [jax.tree.map(lambda x: x[np.argmax(order == i), -length:], permuted[:3])]  # noqa: B023
    answers += [jax.tree.map(lambda x: x[0, -7:], alone[:3])] if i == 2 else []
    for tokens_L, at_L, confidence_L in answers:
      np.testing.assert_array_equal(tokens_L, together.tokens_BL[i, -length:])
      np.testing.assert_array_equal(at_L, together.unmasked_at_BL[i, -length:])
      np.testing.assert_allclose(confidence_L, together.confidence_BL[i, -length:], rtol=1e-4)


@pytest.mark.parametrize("remasking", REMASKING)
@pytest.mark.parametrize("temperature", [0.0, 0.3])
def test_late_ids_wait_for_all_others_at_any_temperature(remasking, temperature):
  late_V = np.isin(np.arange(V), (1, 2))
  likely_L = np.array([1, 5, 2, 6, 1, 7, 8, 2])  # where the late ids are likely, they are more so than others elsewhere
  logits_LV = np.where(np.arange(V) == likely_L[:, None], np.where(late_V, 30.0, 12.0), TABLE[0, :8]).astype(np.float32)

  def fixed(tokens_BL, start, W, cache):
    return jnp.broadcast_to(jnp.asarray(logits_LV), (len(tokens_BL), W, V)), cache

  def answer(late):
    c = SamplerConfig(
      block_length=8, steps=8, remasking=remasking, temperature=temperature, confidence_eos_eot_inf=late
    )
    return sample(fixed, jnp.full((2, 8), MASK), keys(2), c, ends=(1, 2))

  out, late_L = jax.tree.map(np.asarray, answer(True)), np.isin(likely_L, (1, 2))
  np.testing.assert_array_equal(out.tokens_BL, [likely_L] * 2)
  assert out.unmasked_at_BL[:, late_L].min() > out.unmasked_at_BL[:, ~late_L].max()
  assert (out.confidence_BL[:, late_L] == 0).all() and (out.confidence_BL[:, ~late_L] > 0.9).all()
  if remasking not in ("random", "sequential"):
    assert np.asarray(answer(False).unmasked_at_BL)[:, late_L].max() == 4  # left alone, they come first


@pytest.mark.parametrize(
  "fields, said",
  [
    ({"gen_length": 0}, "sample.gen_length=0"),
    ({"block_length": -1}, "sample.block_length=-1"),
    ({"steps": 0}, "sample.steps=0"),
    ({"temperature": -0.5}, "sample.temperature=-0.5"),
    ({"guidance_scale": -1.0}, "sample.guidance_scale=-1.0"),
    ({"remasking": "high"}, "sample.remasking='high': use one of low_confidence, random, low_margin, high_entropy, "),
    ({"threshold": 0.9, "factor": 1.0}, "sample.threshold and sample.factor"),
    ({"block_steps": 0}, "sample.block_steps=0"),
    ({"block_steps": 4, "tokens_per_step": 1}, "sample.block_steps and sample.tokens_per_step"),
    ({"eps": 1e-3, "tokens_per_step": 1}, "sample.eps and sample.tokens_per_step"),
    ({"eps": 1.0}, "sample.eps=1.0: must be at least 0, and less than 1"),
    ({"top_p": 0.0}, "sample.top_p=0.0: must be more than 0, and at most 1"),
    ({"top_k": 0}, "sample.top_k=0"),
  ],
)
def test_a_bad_option_is_one_clear_line(fields, said):
  with pytest.raises(ValueError, match="sample") as error:
    SamplerConfig(**fields)
  assert said in str(error.value) and "\n" not in str(error.value)
