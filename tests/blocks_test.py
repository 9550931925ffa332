"""Block diffusion: the mathematics on a table of arbitrary predictions, and the pass over [x_t, x_0] of the model."""

import contextlib
import dataclasses
import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusion_test import MASK, TABLE, TOKENS, WEIGHT, B, L, assert_mean, every_combination
from jax._src.cudnn import fused_attention_stablehlo

from lladax import diffusion
from lladax.devices import sharding
from lladax.diffusion import Blocks, NoiseConfig
from lladax.mistake import Mistake
from lladax.model import attention
from lladax.model.attention import Visible
from lladax.model.mask_predictor import MaskPredictorConfig

pytestmark = pytest.mark.usefixtures("quick_compiles")


def table_nll(n):
  """An arbitrary prediction for what a block and the clean ones before it hold; those behind it are not seen."""

  def nll(input_BL, target_BL, clean_BL):
    block_1L, parts = np.arange(L)[None] // n, []
    for b in range(-(-L // n)):
      canvas_BL = jnp.where(block_1L < b, clean_BL, jnp.where(block_1L == b, input_BL, MASK))
      predicted_BLV = jnp.asarray(TABLE)[jnp.sum(canvas_BL * 5 ** jnp.arange(L)[None], axis=1)]
      nll_BL = -jnp.take_along_axis(predicted_BLV, jnp.maximum(target_BL, 0)[..., None], axis=-1)[..., 0]
      parts.append(jnp.where((target_BL < 0) | (block_1L != b), 0.0, nll_BL))
    return sum(parts)

  return nll


def enumerated(tokens_L, weight_L, n, masking="exact", eps=0.1):
  """The mean of the loss of a row over all noise, block by block."""
  node, node_weight = np.polynomial.legendre.leggauss(20)
  p, dt = eps + (1 - eps) * (node + 1) / 2, node_weight / 2
  total = 0.0
  for first in range(0, L, n):
    maskable = [i for i in range(first, min(first + n, L)) if weight_L[i] > 0]
    m = len(maskable)
    for k in range(1, m + 1):
      share = 1 / k / math.comb(m, k) if masking == "exact" else np.sum(dt * p ** (k - 1) * (1 - p) ** (m - k))
      for chosen in itertools.combinations(maskable, k):
        masked_1L = np.isin(np.arange(L), chosen)[None]
        nll_1L = table_nll(n)(
          np.where(masked_1L, MASK, tokens_L), np.where(masked_1L, tokens_L, -1), np.asarray(tokens_L)[None]
        )
        total += share * float(np.sum(weight_L * nll_1L[0]))
  return total


def draw_losses(noise, draws):
  """Losses of that many steps of the four rows."""
  nll = table_nll(noise.block)

  def weighted_nll(input_BL, target_BL, weight_BL, clean_BL):
    nll_BL = nll(input_BL, target_BL, clean_BL)
    return jnp.sum(weight_BL * nll_BL), nll_BL

  def step(i):
    batch = {"tokens": jnp.asarray(TOKENS), "weight": jnp.asarray(WEIGHT), "index": i * B + jnp.arange(B)}
    return Blocks(noise).loss(
      weighted_nll, batch, jax.random.fold_in(jax.random.key(1), i), mask_id=MASK, batch_size=B
    )[0]

  return np.asarray(jax.jit(lambda: jax.lax.map(step, jnp.arange(draws), batch_size=10_000))())


@pytest.mark.parametrize("n", [1, 2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("masking, times, per", [
  ("independent", "uniform", "row"), ("independent", "stratified", "block"), ("exact", "antithetic", "block"),
  ("exact", "uniform", "row"),
])  # fmt: skip
def test_mean_of_the_loss_is_the_sum_of_the_bounds_of_blocks(n, masking, times, per):
  expected = sum(enumerated(*row, n, masking) for row in zip(TOKENS, WEIGHT, strict=True))
  noise = NoiseConfig(masking, times, 0.1, block=n, times_per=per)
  if (n, masking) == (1, "exact"):
    np.testing.assert_allclose(draw_losses(noise, 100), expected, rtol=1e-5)  # without variance
  else:
    assert_mean(draw_losses(noise, 40_000), expected)


@every_combination
def test_times_of_blocks_are_uniform_and_stratified_in_a_row_and_over_rows(masking, times):
  del masking
  draw = jax.vmap(lambda rng: diffusion.draw_times(rng, 16 + jnp.arange(8), times, 8, blocks=4))
  t_SBU, mirrored_SB = draw(jax.random.split(jax.random.key(0), 2000))
  assert t_SBU.shape == (2000, 8, 4) and (t_SBU >= 0).all() and (t_SBU < 1).all()
  deciles = np.histogram(t_SBU[:, 3, 2], bins=10, range=(0, 1))[0]
  assert np.all(abs(deciles - 200) < 6 * np.sqrt(200))
  if times == "uniform":
    assert abs(np.corrcoef(t_SBU[:, 0, 0], t_SBU[:, 0, 1])[0, 1]) < 0.1
  else:
    np.testing.assert_array_equal(np.sort(np.floor(t_SBU[0, 0] * 4)), np.arange(4))
    rows = t_SBU[0, ::2] if times == "antithetic" else t_SBU[0]
    np.testing.assert_array_equal(np.sort(np.floor(rows.reshape(-1) * rows.size)), np.arange(rows.size))
  if times == "antithetic":
    np.testing.assert_array_equal(t_SBU[:, ::2], t_SBU[:, 1::2])
  np.testing.assert_array_equal(mirrored_SB[0], [times == "antithetic" and i % 2 == 1 for i in range(8)])


def test_pairs_of_rows_share_out_the_masks_of_each_block():
  noise, tokens_BL = NoiseConfig("exact", "antithetic", block=4), jnp.zeros((8, 10), jnp.int32)
  masked_BL = diffusion.forward_process(tokens_BL, tokens_BL == 0, jnp.arange(8), jax.random.key(0), 9, noise, 8)[1]
  pairs_P = masked_BL.reshape(4, -1).sum(axis=1)
  np.testing.assert_array_equal(pairs_P, [13] * 4)
  assert Blocks(noise).targets_per_pair(10) == 13


def model(n, **fields):
  sizes: dict = {"D": 16, "N": 2, "H": 2, "G": 1, "K": 8, "F": 24, "V": 12, "dtype": "float32"}
  c = MaskPredictorConfig(block=n, **sizes | fields)
  params = jax.tree.map(
    lambda x: np.float32(0.5 * np.random.default_rng(x.size).standard_normal(x.shape)),
    jax.eval_shape(c.init, jax.random.key(0)),
  )
  return c, params


def canvases(rows=3, length=12):
  rng = np.random.default_rng(1)
  clean_BL = rng.integers(0, 11, (rows, length)).astype(np.int32)
  return clean_BL, np.where(rng.random((rows, length)) < 0.5, 11, clean_BL).astype(np.int32)


def by_block(c, params, noised_BL, clean_BL, target_BL, weight_BL):
  """The weighted sum by a pass for each block, over it and the clean ones before it."""
  n, total = c.block, 0.0
  for first in range(0, noised_BL.shape[1], n):
    end = min(first + n, noised_BL.shape[1])
    canvas_BL = np.concatenate([clean_BL[:, :first], noised_BL[:, first:end]], axis=1)
    nll_BL = c.bind(params).nll(
      canvas_BL, np.concatenate([np.full_like(clean_BL[:, :first], -1), target_BL[:, first:end]], 1)
    )
    total += jnp.sum(weight_BL[:, first:end] * nll_BL[:, first:])
  return total


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("n", [4, 12, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3, 5, 32))])
def test_one_pass_over_both_halves_is_the_loop_over_blocks(n, shift):
  """Loss and gradient; also where the last block is short, or there is one alone."""
  c, params = model(n, shift=shift)
  clean_BL, noised_BL = canvases()
  target_BL = np.where(noised_BL == 11, clean_BL, -1)
  weight_BL = np.random.default_rng(2).random(clean_BL.shape).astype(np.float32)
  both = lambda params: c.bind(params).weighted_nll(noised_BL, target_BL, weight_BL, clean_BL=clean_BL)[0]  # noqa: E731
  loop = functools.partial(
    by_block, c, noised_BL=noised_BL, clean_BL=clean_BL, target_BL=target_BL, weight_BL=weight_BL
  )
  found, expected = (jax.jit(jax.value_and_grad(f))(params) for f in (both, loop))
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())
  if n >= 12:  # one block: a mask predictor of whole canvases
    whole, _ = model(0, shift=shift)
    np.testing.assert_allclose(found[0], whole.bind(params).weighted_nll(noised_BL, target_BL, weight_BL)[0], rtol=1e-5)


def test_blocks_of_one_are_the_chain_rule_whatever_the_noise():
  c, params = model(1)
  clean_BL, _ = canvases(length=6)
  objective = Blocks(NoiseConfig("exact", block=1))
  assert objective.exact and not Blocks(NoiseConfig("exact", block=2)).exact
  batch = {"tokens": clean_BL, "weight": np.ones(clean_BL.shape, np.float32), "index": jnp.arange(3)}
  loss = lambda rng: objective.loss(c.bind(params).weighted_nll, batch, rng, mask_id=11, batch_size=3)[0]  # noqa: E731
  expected = sum(
    float(c.bind(params).nll(
      np.concatenate([clean_BL[:, :i], np.full((3, 1), 11)], axis=1),
      np.concatenate([np.full((3, i), -1), clean_BL[:, i : i + 1]], axis=1),
    ).sum()) for i in range(6)
  )  # fmt: skip
  first, second = (float(jax.jit(loss)(jax.random.key(i))) for i in range(2))
  assert first == second == pytest.approx(expected, rel=1e-5)
  found_B = objective.log_likelihood(
    c.bind(params).nll, clean_BL, clean_BL >= 0, None, jax.random.split(jax.random.key(5), 3), jnp.zeros(3, int),
    jnp.ones(3, int), mask_id=11,
  )  # fmt: skip
  assert -float(found_B.sum()) == pytest.approx(expected, rel=1e-5)


def test_shifted_blocks_of_one_are_the_causal_model():
  """The state before each token is that of the clean ones before it: nothing noised is looked at but a first token."""
  c, params = model(1, shift=True)
  causal = dataclasses.replace(c, block=0, causal=True, shift=False)
  clean_BL, _ = canvases()
  found_BL = c.bind(params).nll(np.full_like(clean_BL, 11), clean_BL, clean_BL=clean_BL)
  expected_BL = causal.bind(params).nll(clean_BL, np.roll(clean_BL, -1, axis=1))
  np.testing.assert_allclose(found_BL[:, 1:], expected_BL[:, :-1], rtol=1e-5)


@pytest.mark.parametrize("n", [2, 3])
def test_the_likelihood_is_the_enumeration(n):
  """Of an answer behind a prompt that ends within a block."""
  tokens_L = TOKENS[0]
  scored_L = np.arange(L) >= 1
  draws = 20_000
  tokens_BL, scored_BL = (np.broadcast_to(x, (draws, L)) for x in (tokens_L, scored_L))
  found_B = jax.jit(functools.partial(Blocks(NoiseConfig(block=n)).log_likelihood, table_nll(n), mask_id=MASK))(
    tokens_BL, scored_BL, None, jnp.broadcast_to(jax.random.key(0), draws), jnp.arange(draws), jnp.full(draws, draws)
  )
  assert_mean(found_B, -enumerated(tokens_L, scored_L.astype(float), n))


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("n", [2, 4])
def test_packed_documents_are_those_of_rows_of_their_own(n, shift):
  """Documents begin at multiples of the block; between them lies padding."""
  c, params = model(n, shift=shift)
  clean_BL, noised_BL = canvases(rows=1)
  segment_BL = np.array([[1, 1, 1, 0, 2, 2, 2, 2, 2, 0, 0, 0]])
  target_BL = np.where((noised_BL == 11) & (segment_BL > 0), clean_BL, -1)
  visible = c.visible(12, segment_BL, aligned=True)
  packed_BL = c.bind(params).nll(noised_BL, target_BL, visible, clean_BL=clean_BL)
  for part in (slice(0, 3), slice(4, 9)):
    alone_BL = c.bind(params).nll(noised_BL[:, part], target_BL[:, part], clean_BL=clean_BL[:, part])
    np.testing.assert_allclose(packed_BL[:, part], alone_BL, rtol=1e-4, atol=1e-5)


def draws(noise, rows=4096, length=8, **options):
  tokens_BL = jnp.broadcast_to(jnp.arange(length) % 4, (rows, length))
  return [
    np.asarray(x)
    for x in diffusion.forward_process(
      tokens_BL, tokens_BL >= 0, jnp.arange(rows), jax.random.key(0), MASK, noise, rows, **options
    )
  ]


@pytest.mark.parametrize("masking", ["independent", "exact"])
@pytest.mark.parametrize("times", ["uniform", "antithetic"])
@pytest.mark.parametrize("n", [0, 8])
def test_times_in_a_band(masking, times, n):
  """Shares of masked tokens lie in it; flat weights are one a token in the mean."""
  noise = NoiseConfig(masking, times, block=n, band=(0.3, 0.8))
  _, masked_BL, scale_BL = draws(noise)
  share_B = masked_BL.mean(axis=1)
  assert abs(share_B.mean() - 0.55) < 0.02
  if masking == "exact":
    assert set(share_B * 8) == {3.0, 4.0, 5.0, 6.0}
    np.testing.assert_allclose(scale_BL, np.broadcast_to(1 / share_B[:, None], scale_BL.shape), rtol=1e-6)
  else:
    assert 1 / 0.81 < scale_BL.min() and scale_BL.max() < 1 / 0.299
  flat = NoiseConfig(masking, times, block=n, band=(0.3, 0.8), weights="flat")
  _, masked_BL, scale_BL = draws(flat)
  assert len(np.unique(scale_BL)) == 1 and abs((masked_BL * scale_BL).mean() - 1) < 0.02
  assert diffusion.Masked(flat).targets_per_pair(8) is None


def test_complements_ask_for_each_token_once():
  asked, inputs = [], []

  def weighted_nll(input_BL, target_BL, weight_BL, clean_BL):
    asked.append(np.asarray(target_BL))
    inputs.append(np.asarray(input_BL))
    nll_BL = jnp.where(target_BL < 0, 0.0, 1.0)
    return jnp.sum(weight_BL * nll_BL), nll_BL

  noise = NoiseConfig(block=2, weights="flat", complements=True)
  batch = {"tokens": jnp.asarray(TOKENS), "weight": jnp.asarray(WEIGHT), "index": jnp.arange(B)}
  loss, metrics = Blocks(noise).loss(weighted_nll, batch, jax.random.key(0), mask_id=MASK, batch_size=B)
  np.testing.assert_array_equal(np.maximum(*asked), np.where(WEIGHT > 0, TOKENS, -1))
  assert not ((asked[0] >= 0) & (asked[1] >= 0)).any() and all((x >= 0).any() for x in asked)
  for target_BL, input_BL in zip(asked, inputs, strict=True):
    np.testing.assert_array_equal(input_BL, np.where(target_BL >= 0, MASK, TOKENS))
  assert float(loss) == pytest.approx(WEIGHT.sum()) and int(metrics["masked_nll"][1]) == (WEIGHT > 0).sum()
  with pytest.raises(Mistake, match="noise.complements=True: .*set noise.weights=flat"):
    NoiseConfig(complements=True)


@pytest.mark.parametrize("mask_id", [2, 9])
def test_some_of_the_masked_tokens_become_others(mask_id):
  tokens_BL = jnp.zeros((2048, 8), jnp.int32)
  noise = NoiseConfig(replace=0.25)
  input_BL, masked_BL, _ = diffusion.forward_process(
    tokens_BL, tokens_BL == 0, jnp.arange(2048), jax.random.key(0), mask_id, noise, 2048, 5
  )
  taken = np.asarray(input_BL)[np.asarray(masked_BL)]
  np.testing.assert_array_equal(np.asarray(input_BL)[~np.asarray(masked_BL)], 0)
  share = {i: (taken == i).mean() for i in np.unique(taken)}
  others = [i for i in range(5) if i != mask_id]
  assert set(share) == {mask_id, *others} and abs(share[mask_id] - 0.75) < 0.02
  assert all(abs(share[i] - 0.25 / len(others)) < 0.01 for i in others)


@pytest.mark.parametrize(
  "field, said",
  [
    ({"band": (0.8, 0.3)}, r"noise.band=\(0.8, 0.3\)"), ({"weights": "t"}, "noise.weights='t': use elbo or flat"),
    ({"replace": 1.0}, "noise.replace=1.0"), ({"block": -1}, "noise.block=-1"),
    ({"times_per": "token"}, "noise.times_per='token': use block or row"),
  ],
)  # fmt: skip
def test_noise_that_makes_no_sense(field, said):
  with pytest.raises(Mistake, match=said):
    NoiseConfig(**field)


@pytest.mark.parametrize("n", [32, pytest.param(24, marks=pytest.mark.slow)])
@pytest.mark.parametrize("packed", [pytest.param(False, marks=pytest.mark.slow), True])
def test_both_halves_with_splash_are_those_with_xla(monkeypatch, n, packed):
  """Forward and gradients, in Pallas's interpreter; documents begin at multiples of the block."""
  L, handed, interpreted = 384 if n == 24 else 256, [], functools.partial(attention._splash, interpret=True)

  def splash(*arrays, **options):
    handed.append((len(arrays), options["order"]))
    return interpreted(*arrays, **options)

  monkeypatch.setattr(attention, "_splash", splash)
  monkeypatch.setattr(sharding, "platform", lambda: "tpu")
  clean_BL, noised_BL = canvases(rows=2, length=L)
  segment_BL = np.where(np.arange(L) < 96, 1, np.where(np.arange(L) < 96 + n // 2, 0, 2)) if packed else None
  if packed:  # the second document begins with a block
    segment_BL = np.where((np.arange(L) >= 96 + n // 2) & (np.arange(L) < 96 + n), 0, segment_BL)[None]
  weight_BL = np.random.default_rng(2).random((2, L)).astype(np.float32) * (1 if segment_BL is None else segment_BL > 0)

  def answers(kernel):
    c, params = model(n, attention=kernel)
    visible = c.visible(L, segment_BL, aligned=True)
    loss = lambda params: c.bind(params).weighted_nll(noised_BL, clean_BL, weight_BL, visible, clean_BL=clean_BL)[0]  # noqa: E731
    return jax.jit(jax.value_and_grad(loss))(params)

  found, expected = answers("splash"), answers("xla")
  assert set(handed) == {(5 if packed else 3, "noised blocks")}
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max())


@jax.custom_vjp
def flash(q_BLHK, k_BLGK, v_BLGK, bias_BHLL):
  """Causal attention as cuDNN's: its backward pass is told the log-sum-exp and the result, and believes them."""
  return flash_forward(q_BLHK, k_BLGK, v_BLGK, bias_BHLL)[0]


def flash_scores(q_BLHK, k_BLHK, bias_BHLL):
  scores_BHLL = jnp.einsum("BIHK,BJHK->BHIJ", q_BLHK, k_BLHK) * q_BLHK.shape[-1] ** -0.5 + bias_BHLL
  return jnp.where(np.tril(np.ones(scores_BHLL.shape[2:], bool))[None, None], scores_BHLL, -1e30)


def flash_forward(q_BLHK, k_BLHK, v_BLHK, bias_BHLL):
  scores_BHLL = flash_scores(q_BLHK, k_BLHK, bias_BHLL)
  out_BLHK = jnp.einsum("BHIJ,BJHK->BIHK", jax.nn.softmax(scores_BHLL), v_BLHK)
  return out_BLHK, (q_BLHK, k_BLHK, v_BLHK, bias_BHLL, jax.nn.logsumexp(scores_BHLL, axis=-1), out_BLHK)


def flash_backward(kept, cotangent_BLHK):
  q_BLHK, k_BLHK, v_BLHK, bias_BHLL, lse_BHL, out_BLHK = kept
  p_BHLL = jnp.exp(flash_scores(q_BLHK, k_BLHK, bias_BHLL) - lse_BHL[..., None])
  of_p_BHLL = jnp.einsum("BIHK,BJHK->BHIJ", cotangent_BLHK, v_BLHK)
  of_p_BHLL -= (cotangent_BLHK * out_BLHK).sum(-1).transpose(0, 2, 1)[..., None]
  of_scores_BHLL = p_BHLL * of_p_BHLL * q_BLHK.shape[-1] ** -0.5
  return (
    jnp.einsum("BHIJ,BJHK->BIHK", of_scores_BHLL, k_BLHK), jnp.einsum("BHIJ,BIHK->BJHK", of_scores_BHLL, q_BLHK),
    jnp.einsum("BHIJ,BIHK->BJHK", p_BHLL, cotangent_BLHK), None,
  )  # fmt: skip


flash.defvjp(flash_forward, flash_backward)


@pytest.mark.parametrize(
  ("n", "segments", "G", "mesh", "noised"),
  [
    (1, "none", 2, None, True),
    (8, "any", 4, {"data": 1, "fsdp": 2, "tensor": 2}, True),
    *(
      pytest.param(*case, marks=pytest.mark.slow)
      for case in (
        (24, "right", 2, {"data": 2, "tensor": 2}, True),
        (32, "any", 2, None, True),
        (1, "none", 2, None, False),
        (24, "right", 2, {"data": 2, "tensor": 2}, False),
        (32, "any", 2, None, False),
      )
    ),
  ],
)
def test_blocks_with_cudnn_are_those_with_xla(monkeypatch, n, segments, G, mesh, noised):
  """Forward and gradients, with a stand-in that answers as cuDNN does: a causal part and one within the blocks."""
  L, H, handed = 96, 4, []
  segment_BL = {
    "none": None, "right": np.arange(L)[None] < np.asarray([[L], [50]]),
    "any": np.repeat([[1, 0, 2, 0], [3, 3, 1, 1]], [30, 2, 58, 6], axis=1),
  }[segments]  # fmt: skip
  segment_BL = None if segment_BL is None else segment_BL.astype(np.int32)
  weight = np.random.default_rng(2).random((2, L, 32)).astype(np.float32)
  weight *= 1 if segment_BL is None else (segment_BL > 0)[..., None]
  clean_BL, noised_BL = canvases(rows=2, length=L)

  def stand_in(q, k, v, *, implementation, is_causal, bias=None):
    handed.append((implementation, is_causal, q.shape[1], bias is not None))
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    return flash(q, k, v, jnp.zeros((1, 1, 1, 1)) if bias is None else bias)

  def answers(kernel):
    monkeypatch.setattr(attention, "choose", lambda *_, **__: kernel)  # in float32, to be compared
    c, params = model(n, H=H, G=G, attention="auto", remat="attention")
    visible = c.visible(L, segment_BL, right_padded=segments == "right", aligned=True)

    def loss(params):
      bound = c.bind(params)
      if noised:
        return bound.weighted_nll(noised_BL, clean_BL, weight[..., 0], visible, clean_BL=clean_BL)[0]
      hidden_BLD = bound.hidden(clean_BL, visible)[0]
      return jnp.sum(weight[..., : hidden_BLD.shape[-1]] * hidden_BLD)

    on_four = sharding.make_mesh(sharding.MeshConfig(**mesh), jax.devices()[:4]) if mesh else None
    with jax.set_mesh(on_four) if on_four else contextlib.nullcontext():
      return jax.jit(jax.value_and_grad(loss))(params)

  expected = answers("xla")
  monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
  found = answers("cudnn")
  assert set(handed) == {("cudnn", True, length, segments == "any") for length in ([L, L - n] if noised else [L])}
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max())


@pytest.mark.parametrize("segments", ["none", "right", "any"])
@pytest.mark.parametrize("remat", ["attention", "full"])
def test_blocks_are_lowered_for_a_gpu(monkeypatch, segments, remat):
  """The fused kernel, causal, and nothing of 2 L x 2 L; JAX keeps for it what the parts are merged by."""
  monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91400)
  monkeypatch.setattr(sharding, "platform", lambda: "gpu")
  L, n = 256, 32
  c, params = model(n, H=4, G=2, K=64, attention="cudnn", dtype="bfloat16", remat=remat)
  clean_BL, noised_BL = canvases(rows=2, length=L)
  segment_BL = None if segments == "none" else jnp.ones((2, L), jnp.int32)
  visible = c.visible(L, segment_BL, right_padded=segments == "right", aligned=True)

  def loss(params):
    return c.bind(params).weighted_nll(noised_BL, clean_BL, jnp.ones((2, L)), visible, clean_BL=clean_BL)[0]

  text = jax.jit(jax.grad(loss)).trace(params).lower(lowering_platforms=("cuda",)).as_text()
  told = set(re.findall(r"custom_call @__cudnn\$fmha(\w*?)Softmax(Backward)?\(.*?mask_type\\22: \\22(\w+)", text))
  assert told == {("ScaleBias" if segments == "any" else "", behind, "CAUSAL") for behind in ("", "Backward")}
  assert "512x512" not in text
  assert ("256x256" in text) == (segments == "any")  # documents, by a bias


def test_kernels_that_cannot_do_these_blocks_are_not_taken():
  options = {"K": 64, "dtype": jnp.bfloat16, "platform": "gpu", "capability": (9, 0)}
  assert attention.choose("auto", Visible(256, 256, "blocks", block=32), **options) == "cudnn"
  assert attention.choose("auto", Visible(512, 512, "noised blocks", block=32), **options) == "cudnn"
  row_1L = np.ones((1, 2048), np.int32)
  for visible, why in (
    (Visible(256, 256, "blocks", block=3), "the length 256 is not several blocks of 3"),
    (Visible(512, 512, "noised blocks", block=256), "the length 256 is not several blocks of 256"),
    (Visible(2048, 2048, "blocks", block=512), "it takes blocks of up to 256, and these are of 512"),
    (Visible(2048, 2048, "blocks", row_1L, block=1, aligned=True), "there are segments, and blocks of 1 are not even"),
    (Visible(2048, 2048, "blocks", row_1L, block=32), "documents begin within a block"),
  ):
    assert attention.choose("auto", visible, **options) == "xla"
    with pytest.raises(Mistake, match=f"model.attention='cudnn': {why}"):
      attention.choose("cudnn", visible, **options)
  tpu = options | {"platform": "tpu", "capability": None}
  segment_BL = np.ones((2, 256), np.int32)
  for aligned, kernel in ((True, "splash"), (False, "xla")):
    assert attention.choose("auto", Visible(256, 256, "blocks", segment_BL, block=32, aligned=aligned), **tpu) == kernel
