import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lladax import diffusion
from lladax.diffusion import NoiseConfig
from lladax.mistake import Mistake

pytestmark = pytest.mark.usefixtures("quick_compiles")

MASK = 4  # behind a vocabulary of four tokens
COMBINATIONS = list(itertools.product(("independent", "exact"), ("uniform", "stratified", "antithetic")))
every_combination = pytest.mark.parametrize("masking, times", COMBINATIONS)

# A step of four rows: with everything maskable, with given tokens, one token, and nothing to mask at all.
TOKENS = np.array([[0, 1, 2, 3], [3, 3, 0, 1], [2, 0, 1, 0], [1, 2, 3, 0]], np.int32)
WEIGHT = np.array([[0.1, 0.2, 0.1, 0.3], [0, 0.2, 0.5, 0.1], [0, 0, 1, 0], [0, 0, 0, 0]], np.float32)
B, L = TOKENS.shape
TABLE = 2.0 * np.random.default_rng(0).standard_normal((5**L, L, 4), np.float32)
TABLE -= np.log(np.exp(TABLE).sum(axis=-1, keepdims=True))


def table_nll(input_BL, target_BL):
  """A model as general as can be: an arbitrary prediction for every canvas."""
  predicted_BLV = jnp.asarray(TABLE)[jnp.sum(input_BL * 5 ** jnp.arange(L)[None], axis=1)]
  nll_BL = -jnp.take_along_axis(predicted_BLV, jnp.maximum(target_BL, 0)[..., None], axis=-1)[..., 0]
  return jnp.where(target_BL < 0, 0.0, nll_BL)


def weighted(nll):
  """What a loss asks of a model: the weighted sum, and its parts."""

  def weighted_nll(input_BL, target_BL, weight_BL):
    nll_BL = nll(input_BL, target_BL)
    return jnp.sum(weight_BL * nll_BL), nll_BL

  return weighted_nll


def enumerate_masks(tokens_L, weight_L):
  """Yields (n, k, weighted cross-entropy) for each way to mask k >= 1 of the n tokens that have a weight."""
  maskable = np.flatnonzero(weight_L)
  for k in range(1, len(maskable) + 1):
    for chosen in itertools.combinations(maskable, k):
      masked_L = np.isin(np.arange(L), chosen)
      nll_1L = table_nll(np.where(masked_L, MASK, tokens_L)[None], np.where(masked_L, tokens_L, -1)[None])
      yield len(maskable), k, float(np.sum(weight_L * nll_1L[0]))


def exact_loss(masking, eps):
  """The mean of the loss over the noise, masks enumerated and time integrated."""
  node, node_weight = np.polynomial.legendre.leggauss(20)
  p, dt = eps + (1 - eps) * (node + 1) / 2, node_weight / 2
  total = 0.0
  for row in zip(TOKENS, WEIGHT, strict=True):
    for n, k, nll in enumerate_masks(*row):
      if masking == "independent":
        total += nll * np.sum(dt * p**k * (1 - p) ** (n - k) / p)
      else:  # k is one of 1 .. n, and these k tokens are one of n choose k subsets
        total += nll * (n / k) / (n * math.comb(n, k))
  return total


def assert_mean(draws, expected):
  """The mean is the expected one within five of its own standard errors, and these are small."""
  draws = np.asarray(draws, np.float64).reshape(-1)
  error = draws.std() / np.sqrt(len(draws))
  assert error < 0.005 * abs(expected), "draw more"
  assert abs(draws.mean() - expected) < 5 * error, (draws.mean(), expected, error)


def draw_losses(noise, draws):
  """Losses of that many steps."""

  def step(i):
    batch = {"tokens": jnp.asarray(TOKENS), "weight": jnp.asarray(WEIGHT), "index": i * B + jnp.arange(B)}
    rng = jax.random.fold_in(jax.random.key(1), i)
    return diffusion.Masked(noise).loss(weighted(table_nll), batch, rng, mask_id=MASK, batch_size=B)[0]

  return jax.jit(lambda: jax.lax.map(step, jnp.arange(draws), batch_size=10_000))()


def test_the_metric_is_the_mean_over_masked_tokens_whatever_their_weight():
  """As a sum and a count of each part of a batch, which add up to those of the whole."""
  batch = {"tokens": jnp.asarray(TOKENS), "weight": jnp.asarray(WEIGHT), "index": jnp.arange(B)}
  rng, noise = jax.random.key(1), NoiseConfig()
  nats = []

  def nll(input_BL, target_BL):
    nll_BL = table_nll(input_BL, target_BL)
    nats.extend(np.asarray(nll_BL)[np.asarray(target_BL) >= 0])
    return nll_BL

  def metric(rows):
    part = {name: x[rows] for name, x in batch.items()}
    total, count = diffusion.Masked(noise).loss(weighted(nll), part, rng, mask_id=MASK, batch_size=B)[1]["masked_nll"]
    return float(total), int(count)

  total, count = metric(slice(None))
  assert 1 < count == len(nats) < (WEIGHT > 0).sum() and total / count == pytest.approx(np.mean(nats))
  (a, n), (b, m) = metric(slice(2)), metric(slice(2, None))
  assert n + m == count and a + b == pytest.approx(total) and n and m


@every_combination
def test_mean_of_the_loss_is_the_exact_bound(masking, times):
  eps = 0.1  # large enough to be missed where it is forgotten
  assert_mean(draw_losses(NoiseConfig(masking, times, eps), 100_000), exact_loss(masking, eps))


def test_masking_and_eps_of_the_bound_can_be_told_apart():
  exact, small, large = exact_loss("exact", 0.1), exact_loss("independent", 1e-6), exact_loss("independent", 0.1)
  assert abs(small / exact - 1) < 1e-5  # both are the published bound
  assert abs(large / exact - 1) > 0.03  # which the test above would see six times over


forward_process = jax.jit(diffusion.forward_process, static_argnames=("noise", "batch_size"))


def process(noise, tokens_BL, maskable_BL, index_B, seed=0):
  """The forward process of (a part of) a batch of 64."""
  rng = jax.random.key(seed)
  out = forward_process(tokens_BL, maskable_BL, index_B, rng, mask_id=99, noise=noise, batch_size=64)
  return [np.asarray(x) for x in out]


def ragged(rows=64, length=9):
  """Rows of which any number of tokens is maskable, none and all of them too."""
  rng = np.random.default_rng(0)
  maskable_BL = rng.random((rows, length)) < rng.permutation(rows)[:, None] / (rows - 1)
  maskable_BL[:2], maskable_BL[2:4] = True, False
  return rng.integers(0, 50, (rows, length)).astype(np.int32), maskable_BL


@every_combination
def test_only_maskable_tokens_are_masked(masking, times):
  tokens_BL, maskable_BL = ragged()
  noise = NoiseConfig(masking, times)
  input_BL, masked_BL, scale_BL = process(noise, tokens_BL, maskable_BL, 64 + np.arange(64))
  scale_B = scale_BL[:, 0]
  np.testing.assert_array_equal(scale_BL, np.broadcast_to(scale_B[:, None], (64, 9)))
  np.testing.assert_array_equal(input_BL, np.where(masked_BL, 99, tokens_BL))
  assert not np.any(masked_BL & ~maskable_BL)
  assert 0.3 < masked_BL.sum() / maskable_BL.sum() < 0.7
  assert np.isfinite(scale_B).all()
  n_B, l_B = maskable_BL.sum(axis=1), masked_BL.sum(axis=1)
  if masking == "exact":
    assert np.all((1 <= l_B) == (1 <= n_B))
    np.testing.assert_allclose(scale_B * l_B, n_B, rtol=1e-6)
  else:
    assert np.all((1 <= scale_B) & (scale_B <= 1 / noise.eps))


@pytest.mark.parametrize("same_length", [True, False])
def test_antithetic_pairs_share_out_their_masks(same_length):
  tokens_BL, maskable_BL = ragged()
  if same_length:
    maskable_BL[1::2] = maskable_BL[::2, ::-1]
  noise = NoiseConfig("exact", "antithetic")
  pairs = []
  for seed in range(20):
    masked_BL = process(noise, tokens_BL, maskable_BL, np.arange(64), seed)[1]
    pairs.append(masked_BL.sum(axis=1).reshape(-1, 2).sum(axis=1))
  if same_length:
    n_P = maskable_BL[::2].sum(axis=1)
    np.testing.assert_array_equal(pairs, np.tile(np.where(n_P, n_P + 1, 0), (20, 1)))
  assert np.max(pairs) == diffusion.Masked(noise).targets_per_pair(9) == 10


@every_combination
def test_only_exact_antithetic_noise_promises_a_cheaper_head(masking, times):
  promised = (masking, times) == ("exact", "antithetic")
  assert diffusion.Masked(NoiseConfig(masking, times)).targets_per_pair(7) == (8 if promised else None)


def test_mask_exactly_draws_every_subset_alike():
  maskable_L = jnp.array([True, True, False, True, True])
  draw = jax.vmap(lambda key, count: diffusion.mask_exactly(key, maskable_L, count), in_axes=(0, None))
  keys = jax.random.split(jax.random.key(0), 6000)
  for count in range(5):
    subsets, times = np.unique(jax.jit(draw)(keys, count), axis=0, return_counts=True)
    assert np.all(subsets.sum(axis=1) == count) and not subsets[:, 2].any()
    expected = 6000 / math.comb(4, count)
    assert len(subsets) == math.comb(4, count) and np.all(abs(times - expected) <= 5 * np.sqrt(expected))


@pytest.mark.parametrize("times", ["uniform", "stratified", "antithetic"])
def test_every_examples_own_time_is_uniform(times):
  step = jax.vmap(lambda rng: diffusion.draw_times(rng, 16 + jnp.arange(8), times, 8))
  t_SB, mirrored_SB = jax.jit(step)(jax.random.split(jax.random.key(0), 4000))
  np.testing.assert_array_equal(mirrored_SB, np.tile(np.arange(8) % 2 * (times == "antithetic"), (4000, 1)))
  assert 0 <= np.min(t_SB) and np.max(t_SB) < 1
  uniform = (np.arange(4000) + 0.5) / 4000
  distance_B = np.abs(np.sort(t_SB, axis=0) - uniform[:, None]).max(axis=0)
  assert np.all(distance_B < 2.2 / np.sqrt(4000))  # Kolmogorov-Smirnov: less than 1 in 10,000

  strata = {"uniform": None, "stratified": 8, "antithetic": 4}[times]
  if times == "antithetic":
    np.testing.assert_array_equal(t_SB[:, ::2], t_SB[:, 1::2])
    t_SB = t_SB[:, ::2]
  if strata:  # one example in each slice, in every step
    slices = np.sort(np.floor(np.asarray(t_SB) * strata), axis=1)
    np.testing.assert_array_equal(slices, np.tile(np.arange(strata), (4000, 1)))
    assert len(np.unique(np.floor(t_SB[:, 0] * strata))) == strata  # and not always in the same


@every_combination
def test_noise_is_a_function_of_rng_and_index_alone(masking, times):
  tokens_BL, maskable_BL = ragged()
  noise, index_B = NoiseConfig(masking, times), 128 + np.arange(64)
  run = functools.partial(process, noise)
  whole = run(tokens_BL, maskable_BL, index_B)
  parts = [run(tokens_BL[i : i + 16], maskable_BL[i : i + 16], index_B[i : i + 16]) for i in range(0, 64, 16)]
  order = np.random.default_rng(0).permutation(64)
  permuted = run(tokens_BL[order], maskable_BL[order], index_B[order])
  for x, part, other in zip(whole, zip(*parts, strict=True), permuted, strict=True):
    np.testing.assert_array_equal(np.concatenate(part), x)
    np.testing.assert_array_equal(other, x[order])
  for changed in (run(tokens_BL, maskable_BL, index_B + 64), run(tokens_BL, maskable_BL, index_B, seed=1)):
    assert np.mean(changed[1] != whole[1]) > 0.1


def test_an_odd_batch_has_no_antithetic_pairs():
  with pytest.raises(Mistake, match="noise.times='antithetic' pairs neighbouring rows: a batch of 7 must be even"):
    diffusion.draw_times(jax.random.key(0), jnp.arange(7), "antithetic", 7)


@pytest.mark.parametrize("masking, times", [("independent", "uniform"), ("exact", "antithetic")])
def test_gradient_of_the_loss_is_finite(masking, times):
  def loss(table):
    def nll(input_BL, target_BL):
      return jnp.where(target_BL < 0, 0.0, table[input_BL, jnp.maximum(target_BL, 0)])

    batch = {"tokens": jnp.asarray(TOKENS), "weight": jnp.asarray(WEIGHT), "index": jnp.arange(B)}
    noise = NoiseConfig(masking, times)
    return diffusion.Masked(noise).loss(weighted(nll), batch, jax.random.key(0), mask_id=MASK, batch_size=B)[0]

  gradient = np.asarray(jax.jit(jax.grad(loss))(jnp.zeros((5, 4))))
  assert np.isfinite(gradient).all() and gradient[MASK].any()
  assert not gradient[:MASK].any()  # what is seen is not asked


@functools.partial(jax.jit, static_argnames=("num_samples", "keys", "nll"))
def draw_log_likelihoods(scored_L, num_samples, keys, nll=table_nll):
  """[keys, num_samples] estimates for the first row."""

  def one(key):
    rows = [jnp.tile(jnp.asarray(x)[None], (num_samples, 1)) for x in (TOKENS[0], scored_L)]
    key_B = jnp.broadcast_to(key, num_samples)
    samples_B = jnp.full(num_samples, num_samples)
    return diffusion.Masked().log_likelihood(nll, *rows, None, key_B, jnp.arange(num_samples), samples_B, mask_id=MASK)

  return jax.vmap(one)(jax.random.split(jax.random.key(0), keys))


@pytest.mark.parametrize("scored", [[0, 1, 1, 1], [1, 0, 1, 0], [1, 1, 1, 1]])
@pytest.mark.parametrize("num_samples", [1, 5])
def test_mean_of_the_log_likelihood_is_the_enumerated_one(scored, num_samples):
  expected = -sum(nll / k / math.comb(n, k) for n, k, nll in enumerate_masks(TOKENS[0], np.array(scored)))
  draws = draw_log_likelihoods(np.array(scored, bool), num_samples, 40_000)
  assert_mean(np.mean(draws, axis=1), expected)


@pytest.mark.parametrize("at", range(L))
def test_one_token_is_judged_exactly_by_one_draw(at):
  draws = draw_log_likelihoods(np.arange(L) == at, 1, 3)
  masked_L = np.where(np.arange(L) == at, MASK, TOKENS[0])
  np.testing.assert_allclose(draws, TABLE[np.sum(masked_L * 5 ** np.arange(L)), at, TOKENS[0, at]], rtol=1e-6)


def test_counts_are_stratified_over_the_draws():
  def nll(input_BL, target_BL):  # sums to 1, so that the estimate is -n / l
    return jnp.where(target_BL < 0, 0.0, 1 / jnp.sum(target_BL >= 0, axis=1, keepdims=True))

  draws = draw_log_likelihoods(np.ones(L, bool), L, 1000, nll)
  # L slices of time, not aligned to the L counts: each touches two of them.
  assert abs(np.sort(-L / np.asarray(draws), axis=1) - np.arange(1, L + 1)[None]).max() == 1


@pytest.mark.parametrize(
  "fields, said",
  [({"masking": "some"}, "noise.masking='some'"), ({"times": "odd"}, "noise.times='odd'")]
  + [({"eps": eps}, f"noise.eps={eps}") for eps in (0.0, 1.0, -0.1)],
)
def test_a_bad_config_is_one_clear_line(fields, said):
  with pytest.raises(ValueError, match="noise") as error:
    NoiseConfig(**fields)
  assert said in str(error.value) and "\n" not in str(error.value)
