"""Cross-entropy over a large vocabulary: the head runs on a chunk of tokens at a time, and leaves no logits behind.

Two forms, of one mathematics: `nll`, a token's own, to score with; `weighted_nll`, their weighted sum, to train on. The
weights are known there before the gradient is asked for, so the gradient of a chunk is made while its logits are at
hand: three matmuls with the head in place of four, and beside the logits nothing of their size, which their gradient
overwrites. Letters are those of `mask_predictor.py`; `slope` is the gradient of the sum.
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

  def part(_, hidden_TD, target_T):
    return (), (_nll(logits(hidden_TD, head_DV), target_T)[0],)

  part = jax.checkpoint(part, prevent_cse=False)
  return _by_chunks(part, (), hidden_BLD, target_BL, chunk=chunk)[1][0]


def weighted_nll(
  head_DV: jax.Array, hidden_BLD: jax.Array, target_BL: jax.Array, weight_BL: jax.Array, *, chunk: int
) -> tuple[jax.Array, jax.Array]:
  """(the sum of weight x cross-entropy, the cross-entropies [B, L]); only the sum has a gradient.

  Logits are rounded to the dtype of the hidden states (not on CPUs), and so is their gradient; all sums over them are
  float32.

  Args:
    head_DV: as in `nll`.
    hidden_BLD: as there.
    target_BL: as there.
    weight_BL: float32.
    chunk: as there.
  """
  found: Any = _weighted_nll(head_DV, hidden_BLD, target_BL, weight_BL, chunk)  # type checkers do not see the pair
  return found[0], jax.lax.stop_gradient(found[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _weighted_nll(head_DV, hidden_BLD, target_BL, weight_BL, chunk):
  def part(_, hidden_TD, target_T):
    return (), (_nll(_rounded_logits(hidden_TD, head_DV), target_T)[0],)

  _, (nll_BL,) = _by_chunks(part, (), hidden_BLD, target_BL, chunk=chunk)
  return jnp.sum(weight_BL * nll_BL), nll_BL


def _forward(head, hidden, target, weight, chunk):
  """The sum, and its gradient: of a head that is not trained none."""
  (head_DV, trains_head), dtype = (head.value, head.perturbed), hidden.value.dtype
  grid = sharding.axis_size("context"), sharding.ways("B", len(hidden.value))

  def part(slope_LBDV, hidden_TD, target_T, weight_T):
    logits_TV = _rounded_logits(hidden_TD, head_DV)
    nll_T, log_sum_T = _nll(logits_TV, target_T)
    weight_T1 = jnp.where(target_T < 0, 0.0, weight_T)[:, None]
    p_TV = jnp.exp(logits_TV.astype(jnp.float32) - log_sum_T[:, None])
    slope_TV = (weight_T1 * (p_TV - _hits(logits_TV, target_T))).astype(dtype)
    if trains_head:
      apart = (x.reshape(*grid, -1, x.shape[-1]) for x in (hidden_TD, slope_TV))
      own_LBDV = jnp.einsum("LBTD,LBTV->LBDV", *apart, preferred_element_type=jnp.float32)
      slope_LBDV = sharding.constrain(slope_LBDV + own_LBDV, "LB.V")
    return slope_LBDV, (nll_T, jnp.einsum("TV,DV->TD", slope_TV, head_DV))

  slope_LBDV = None
  if trains_head:  # what each device adds up of its own tokens
    slope_LBDV = sharding.constrain(jnp.zeros((*grid, *head_DV.shape), jnp.float32), "LB.V")
  arrays = hidden.value, target.value, weight.value
  slope_LBDV, (nll_BL, slope_BLD) = _by_chunks(part, slope_LBDV, *arrays, chunk=chunk)
  slope_DV = None
  if trains_head:  # over the mesh once, and in the dtype of every other gradient
    slope_DV = jax.lax.reduce(slope_LBDV.astype(dtype), jnp.zeros((), dtype), jax.lax.add, (0, 1))
    if sharding.axis_size("fsdp") > 1:
      # Scattered before the layers' backward pass begins: what a device adds up of its own is as large as many layers.
      slope_DV, slope_BLD = jax.lax.optimization_barrier((sharding.constrain(slope_DV, "DV"), slope_BLD))
  return (jnp.sum(weight.value * nll_BL), nll_BL), (slope_DV, slope_BLD, nll_BL)


def _backward(chunk, residuals, cotangents):
  slope_DV, slope_BLD, nll_BL = residuals
  by = cotangents[0]
  scaled = lambda x: None if x is None else (by * x).astype(x.dtype)  # noqa: E731
  return scaled(slope_DV), scaled(slope_BLD), None, scaled(nll_BL)


_weighted_nll.defvjp(_forward, _backward, symbolic_zeros=True)


def _rounded_logits(hidden_TD: jax.Array, head_DV: jax.Array) -> jax.Array:
  """In the dtype of the hidden states; not on CPUs, where XLA has float32 ones, and would round only some uses."""
  return logits(hidden_TD, head_DV, jnp.float32 if sharding.platform() == "cpu" else hidden_TD.dtype)


def _nll(logits_TV: jax.Array, target_T: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(cross-entropies, logarithms of the sums of the exponentials), both float32.

  On GPUs maximum, sum and the target's logit are one reduction: the logits are read once, and done with when it ends.
  """
  x_TV = logits_TV.astype(jnp.float32)
  if sharding.platform() == "gpu":

    def join(one, other):  # a maximum, the sum of the exponentials relative to it, a plain sum
      (m, s, a), (n, t, b) = one, other
      top = jnp.maximum(m, n)
      less = jnp.exp(jnp.minimum(m, n) - top)
      return top, jnp.where(m > n, s + less * t, less * s + t), a + b

    nothing = jnp.float32(jnp.finfo(jnp.float32).min), jnp.float32(0), jnp.float32(0)  # finite: two make no NaN
    parts = x_TV, jnp.ones_like(x_TV), jnp.where(_hits(logits_TV, target_T), x_TV, 0.0)
    top_T, sum_T, own_T = jax.lax.reduce(parts, nothing, join, (1,))
    log_sum_T = top_T + jnp.log(sum_T)
  else:
    log_sum_T = jax.nn.logsumexp(x_TV, axis=1)
    if sharding.axis_size("tensor") > 1:  # of slices; within `sum_over_copies` XLA's partitioner dies of such a gather
      own_T = jnp.where(_hits(logits_TV, target_T), logits_TV, 0).sum(axis=1)
    else:
      at_T1 = jnp.maximum(target_T, 0)[:, None]
      own_T = jnp.take_along_axis(logits_TV, at_T1, axis=1, mode="promise_in_bounds")[:, 0]
    log_sum_T = own_T + (log_sum_T - own_T)  # of both, so that XLA reads both before it overwrites the logits
  return jnp.where(target_T < 0, 0.0, log_sum_T - own_T), log_sum_T


def _hits(logits_TV: jax.Array, target_T: jax.Array) -> jax.Array:
  """Where the target is; made anew by each loop that reads the logits, and nowhere kept."""
  return jax.lax.broadcasted_iota(jnp.int32, logits_TV.shape, 1) == target_T[:, None]


def _by_chunks(fn: Callable[..., Any], carry: Any, *arrays: jax.Array, chunk: int) -> tuple[Any, tuple[jax.Array, ...]]:
  """Scans `fn(carry, T tokens of each array) -> (carry, results [T, ...])`; the results are [B, L, ...] again.

  A chunk takes the same positions of every row, and of every part of a canvas that the mesh slices: nothing moves.
  Parts come before rows: so the tokens of a device stand together. What fills up the last chunk is zeros.
  """
  B, L = arrays[0].shape[:2]
  parts = sharding.axis_size("context")
  length = -(-L // parts)
  chunks = -(-length // max(1, chunk // (B // sharding.ways("B", B))))
  width = -(-length // chunks)

  def cut(x):
    x = jnp.pad(x, ((0, 0), (0, parts * chunks * width - L), *[(0, 0)] * (x.ndim - 2)))
    x = x.reshape(B, parts, chunks, width, *x.shape[2:])
    x = sharding.constrain(jnp.moveaxis(x, 0, 2).swapaxes(0, 1), ".LB." + "." * (x.ndim - 4))
    return x.reshape(chunks, parts * B * width, *x.shape[4:])

  def join(x):
    x = x.reshape(chunks, parts, B, width, *x.shape[2:])
    x = sharding.constrain(x, ".LB." + "." * (x.ndim - 4))
    return jnp.moveaxis(x.swapaxes(0, 1), 2, 0).reshape(B, -1, *x.shape[4:])[:, :L]

  pieces = tuple(map(cut, arrays))
  if chunks == 1:
    carry, results = fn(carry, *(x[0] for x in pieces))
    return carry, tuple(join(x[None]) for x in results)
  carry, results = jax.lax.scan(lambda carry, xs: fn(carry, *xs), carry, pieces)
  return carry, tuple(map(join, results))
