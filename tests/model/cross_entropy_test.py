import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lladax.devices import sharding
from lladax.model import cross_entropy

B, L, D, V = 4, 6, 16, 331


@functools.cache
def arrays(scale=1.0, D=D, V=V):
  """(head_DV, hidden_BLD, target_BL, weight_BL); a third of the targets are not asked."""
  rng = np.random.default_rng(0)
  hidden_BLD = rng.standard_normal((B, L, D), np.float32)
  head_DV = (scale / np.sqrt(D)) * rng.standard_normal((D, V), np.float32)
  target_BL = np.where(rng.random((B, L)) < 0.3, -1, rng.integers(0, V, (B, L))).astype(np.int32)
  target_BL[0, :2] = V - 1, 0
  return tuple(map(jnp.asarray, (head_DV, hidden_BLD, target_BL, rng.random((B, L), np.float32))))


def reference(head_DV, hidden_BLD, target_BL, weight_BL):
  """(nll_BL, gradients of the weighted sum for head and hidden states), in float64."""
  target_BL, weight_BL = np.asarray(target_BL), np.asarray(weight_BL)
  head_DV, hidden_BLD = (np.asarray(x, np.float64) for x in (head_DV, hidden_BLD))
  logits_BLV = hidden_BLD @ head_DV
  top_BL1 = logits_BLV.max(axis=-1, keepdims=True)
  log_sum_BL1 = top_BL1 + np.log(np.exp(logits_BLV - top_BL1).sum(axis=-1, keepdims=True))
  own_BL1 = np.take_along_axis(logits_BLV, np.maximum(target_BL, 0)[..., None], axis=-1)
  asked_BL = target_BL >= 0
  hits_BLV = np.arange(head_DV.shape[1]) == target_BL[..., None]
  slope_BLV = (weight_BL * asked_BL)[..., None] * (np.exp(logits_BLV - log_sum_BL1) - hits_BLV)
  gradients = np.einsum("BLD,BLV->DV", hidden_BLD, slope_BLV), slope_BLV @ head_DV.T
  return np.where(asked_BL, (log_sum_BL1 - own_BL1)[..., 0], 0.0), gradients


def ours(values, chunk=8192):
  loss = functools.partial(cross_entropy.weighted_nll, chunk=chunk)
  return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(*values)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("scale", [1.0, 300.0])  # logits whose exponentials overflow, too
@pytest.mark.parametrize("chunk", [8192, 8, 5])
def test_values_and_gradients_are_those_of_float64(platform, scale, chunk, monkeypatch):
  monkeypatch.setattr(sharding, "platform", lambda: platform)  # whose reduction runs here as well
  values = arrays(scale)
  nll_BL, gradients = reference(*values)
  (total, ours_BL), found = ours(values, chunk)
  np.testing.assert_allclose(ours_BL, nll_BL, rtol=1e-6, atol=1e-6 * max(scale, 3))
  np.testing.assert_allclose(total, np.sum(values[3] * nll_BL), rtol=1e-6)
  for x, y in zip(found, gradients, strict=True):
    assert np.linalg.norm(x - y) < 1e-6 * max(scale, 3) * np.linalg.norm(y)
  np.testing.assert_allclose(cross_entropy.nll(*values[:3], chunk=chunk), nll_BL, rtol=1e-6, atol=1e-6 * max(scale, 3))


def test_the_sum_is_linear_in_its_weights_and_its_parts_have_no_gradient():
  head_DV, hidden_BLD, target_BL, weight_BL = arrays()
  loss = functools.partial(cross_entropy.weighted_nll, head_DV, hidden_BLD, target_BL, chunk=5)
  gradient_BL = jax.grad(lambda weight_BL: 3.0 * loss(weight_BL)[0])(weight_BL)
  np.testing.assert_allclose(gradient_BL, 3.0 * loss(weight_BL)[1], rtol=1e-6)


def test_the_parts_of_the_sum_have_no_gradient():
  head_DV, hidden_BLD, *rest = arrays()
  parts = lambda hidden_BLD: cross_entropy.weighted_nll(head_DV, hidden_BLD, *rest, chunk=5)[1].sum()  # noqa: E731
  assert not np.any(jax.grad(parts)(hidden_BLD))


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_bfloat16_is_as_exact_as_its_logits(platform, monkeypatch):
  """Against float64 of the same rounded inputs. A logit of 8 .. 16 is rounded by up to 1/32, at random: sums gain."""
  monkeypatch.setattr(sharding, "platform", lambda: platform)
  values = arrays(3.0, D=64, V=4096)
  values = *(x.astype(jnp.bfloat16) for x in values[:2]), *values[2:]
  nll_BL, gradients = reference(*values)
  (total, ours_BL), found = ours(values, chunk=8)
  assert ours_BL.dtype == np.float32 and np.all(np.asarray(ours_BL) >= 0)
  assert np.abs(ours_BL - nll_BL).max() < 1 / 32 + 0.01
  assert abs(total / np.sum(values[3] * nll_BL) - 1) < 1e-3
  for x, y in zip(found, gradients, strict=True):
    assert x.dtype == jnp.bfloat16
    assert np.linalg.norm(np.asarray(x, np.float64) - y) < 0.01 * np.linalg.norm(y)


def memory(values, wants, chunk):
  """Bytes of what lives while the compiled program runs."""
  loss = functools.partial(cross_entropy.weighted_nll, chunk=chunk)
  program = jax.jit(jax.value_and_grad(loss, wants, has_aux=True)).lower(*values).compile()
  found = program.memory_analysis()
  assert found
  return found.temp_size_in_bytes


@pytest.mark.parametrize("chunk", [8192, B])
def test_nothing_of_the_logits_size_lives_beside_the_logits(chunk):
  """From the compiled program; an iota, exponentials or a gradient kept beside them would be as much again."""
  values = arrays(D=16, V=20_000)
  logits = min(chunk, B * L) * 20_000 * 4
  head = 16 * 20_000 * 4
  frozen = memory(values, (1,), chunk)
  assert logits <= frozen < 1.2 * logits
  trained = memory(values, (0, 1), chunk)
  assert trained < 1.2 * logits + 2 * head


def test_a_frozen_head_has_no_gradient_computed():
  values = arrays()
  loss = functools.partial(cross_entropy.weighted_nll, chunk=5)
  matmuls = [
    str(jax.make_jaxpr(jax.grad(loss, wants, has_aux=True))(*values)).count("dot_general") for wants in [(1,), (0, 1)]
  ]
  assert matmuls == [2, 3]  # logits are computed once
