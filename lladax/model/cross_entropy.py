"""Cross-entropy over a large vocabulary: the head runs on a chunk of tokens at a time, and leaves no logits behind.

Two forms, of one mathematics: `nll`, a token's own, to score with; `weighted_nll`, their weighted sum, to train on. The
weights are known there before the gradient is asked for, so the gradient of a chunk is made while its logits are at
hand: three matmuls with the head in place of four, and beside the logits nothing of their size, which their gradient
overwrites. Letters are those of `mask_predictor.py`; in einsums `g` parts of the batch and `p` of the canvas, one a
device, `b` rows and `w` positions of such a part.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lladax.devices import sharding
from lladax.model import attention


def logits(hidden: jax.Array, head_DV: jax.Array, dtype: jnp.dtype = jnp.float32) -> jax.Array:
  """[..., V] of hidden states [..., D]."""
  product = attention.einsum32 if dtype == jnp.float32 else jnp.einsum
  if sharding.axis_size("context") > 1:
    axes = "abc"[: hidden.ndim - 1]
    return product(f"{axes}D,DV->{axes}V", hidden, head_DV)
  return product("TD,DV->TV", flat(hidden), head_DV).reshape(*hidden.shape[:-1], -1)


def flat(x: jax.Array) -> jax.Array:
  """[..., D] as [tokens, D]: on the CPU backend, matmuls of two axes are several times faster backward."""
  return x.reshape(-1, x.shape[-1])


def nll(head_DV: jax.Array, hidden_BLD: jax.Array, target_BL: jax.Array, *, chunk: int) -> jax.Array:
  """Cross-entropies in nats, float32 [B, L] and of float32 logits; 0 where the target is negative.

  Args:
    head_DV: in the dtype of the hidden states, as the device multiplies with it.
    hidden_BLD: after the final norm.
    target_BL: int32 ids.
    chunk: tokens of a device whose logits exist at once.
  """

  def part(_, hidden, target):
    return (), (_nll(logits(hidden, head_DV), target)[0],)

  part = jax.checkpoint(part, prevent_cse=False)
  return _by_chunks(part, (), hidden_BLD, target_BL, chunk=chunk)[1][0]


def weighted_nll(
  head_DV: jax.Array, hidden_BLD: jax.Array, target_BL: jax.Array, weight_BL: jax.Array, *, chunk: int
) -> tuple[jax.Array, jax.Array]:
  """(the sum of weight x cross-entropy, the cross-entropies [B, L]); only the sum has a gradient.

  Logits are rounded to the dtype of the hidden states, and so is their gradient; all sums over them are float32.

  Args:
    head_DV: as in `nll`.
    hidden_BLD: as there.
    target_BL: as there.
    weight_BL: float32.
    chunk: as there.
  """
  total, nll_BL = _weighted_nll(head_DV, hidden_BLD, target_BL, weight_BL, chunk)
  return total, jax.lax.stop_gradient(nll_BL)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _weighted_nll(head_DV, hidden_BLD, target_BL, weight_BL, chunk):
  def part(_, hidden, target):
    return (), (_nll(logits(hidden, head_DV, hidden.dtype), target)[0],)

  _, (nll_BL,) = _by_chunks(part, (), hidden_BLD, target_BL, chunk=chunk)
  return jnp.sum(weight_BL * nll_BL), nll_BL


def _forward(head, hidden, target, weight, chunk):
  """The sum, and its gradient: of a head that is not trained none."""
  (head_DV, trains_head), dtype = (head.value, head.perturbed), hidden.value.dtype
  rows, parts = sharding.ways("B", len(hidden.value)), sharding.axis_size("context")

  def part(slope_gpDV, hidden, target, weight):
    x = logits(hidden, head_DV, dtype)
    nll, log_sum = _nll(x, target)
    weight = jnp.where(target < 0, 0.0, weight)[..., None]
    slope = (weight * (jnp.exp(x.astype(jnp.float32) - log_sum[..., None]) - _hits(x, target))).astype(dtype)
    if trains_head:
      group = lambda x: x.reshape(rows, -1, *x.shape[1:])  # noqa: E731
      own_gpDV = jnp.einsum("gbpwD,gbpwV->gpDV", group(hidden), group(slope), preferred_element_type=jnp.float32)
      slope_gpDV = sharding.constrain(slope_gpDV + own_gpDV, "BL.V")
    return slope_gpDV, (nll, jnp.einsum("bpwV,DV->bpwD", slope, head_DV))

  slope_gpDV = None
  if trains_head:
    slope_gpDV = sharding.constrain(jnp.zeros((rows, parts, *head_DV.shape), jnp.float32), "BL.V")
  slope_gpDV, (nll_BL, slope_BLD) = _by_chunks(part, slope_gpDV, hidden.value, target.value, weight.value, chunk=chunk)
  slope_DV = None
  if trains_head:  # over the mesh once, and in the dtype of every other gradient
    slope_DV = jax.lax.reduce(slope_gpDV.astype(dtype), jnp.zeros((), dtype), jax.lax.add, (0, 1))
  return (jnp.sum(weight.value * nll_BL), nll_BL), (slope_DV, slope_BLD, nll_BL)


def _backward(chunk, residuals, cotangents):
  slope_DV, slope_BLD, nll_BL = residuals
  by = cotangents[0]
  scaled = lambda x: None if x is None else (by * x).astype(x.dtype)  # noqa: E731
  return scaled(slope_DV), scaled(slope_BLD), None, scaled(nll_BL)


_weighted_nll.defvjp(_forward, _backward, symbolic_zeros=True)


def _nll(x: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(cross-entropies, logarithms of the sums of the exponentials) of logits [..., V]."""
  log_sum = _log_sum(x.astype(jnp.float32))
  own = jnp.take_along_axis(x, jnp.maximum(target, 0)[..., None], axis=-1, mode="promise_in_bounds")[..., 0]
  return jnp.where(target < 0, 0.0, log_sum - own), log_sum


def _log_sum(x: jax.Array) -> jax.Array:
  """Of the exponentials of float32 logits [..., V]. On GPUs maximum and sum are one reduction: they are read once."""
  if sharding.platform() != "gpu":
    return jax.nn.logsumexp(x, axis=-1)

  def join(one, other):  # maximum, and sum of the exponentials relative to it
    (m, s), (n, t) = one, other
    top = jnp.maximum(m, n)
    less = jnp.exp(jnp.minimum(m, n) - top)
    return top, jnp.where(m > n, s + less * t, less * s + t)

  lowest = jnp.float32(jnp.finfo(jnp.float32).min)  # of nothing: finite, two of them make no NaN
  top, total = jax.lax.reduce((x, jnp.ones_like(x)), (lowest, jnp.float32(0)), join, (x.ndim - 1,))
  return top + jnp.log(total)


def _hits(x: jax.Array, target: jax.Array) -> jax.Array:
  """Where the target's logit is; made within the loop that reads x, and nowhere else."""
  return jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1) == target[..., None]


def _by_chunks(fn: Callable[..., Any], carry: Any, *arrays: jax.Array, chunk: int) -> tuple[Any, tuple[jax.Array, ...]]:
  """Scans `fn(carry, parts [b, p, w, ...] of the arrays) -> (carry, results)`; the results are [B, L, ...] again.

  A chunk takes the same positions of every row, and of every part of a canvas that the mesh slices: nothing moves.
  What fills up the last one is zeros.
  """
  B, L = arrays[0].shape[:2]
  parts = sharding.axis_size("context")
  length = -(-L // parts)
  chunks = -(-length // max(1, chunk // (B // sharding.ways("B", B))))
  width = -(-length // chunks)

  def cut(x):
    x = jnp.pad(x, ((0, 0), (0, parts * chunks * width - L), *[(0, 0)] * (x.ndim - 2)))
    x = jnp.moveaxis(x.reshape(B, parts, chunks, width, *x.shape[2:]), 2, 0)
    return sharding.constrain(x, ".BL" + "." * (x.ndim - 3))

  def join(x):
    return jnp.moveaxis(x, 0, 2).reshape(B, -1, *x.shape[4:])[:, :L]

  pieces = tuple(map(cut, arrays))
  if chunks == 1:
    carry, results = fn(carry, *(x[0] for x in pieces))
    return carry, tuple(join(x[None]) for x in results)
  carry, results = jax.lax.scan(lambda carry, xs: fn(carry, *xs), carry, pieces)
  return carry, tuple(map(join, results))
