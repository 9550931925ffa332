"""Digests of arrays, made where they lie: whether what is read is what was written, and whether it is all numbers.

A digest is two sums, modulo 2^32, of what every element's bits and place mix to. Integers add up to the same in any
order, so a mesh does not matter; and an element's mix differs for any two values of its bits, so that a change of one
element is never missed, and one of several with a probability of 2^-64.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def of(arrays: dict[str, jax.Array]) -> tuple[dict[str, str], list[str]]:
  """(the digest of each array: its dtype, and 16 hexadecimal digits; the names of those with NaN or infinity)."""
  # One after the other: programs with collectives that are under way together can wait for each other on the devices
  # that a CPU plays.
  found = {name: jax.device_get(_of(x)) for name, x in arrays.items()}
  digests = {name: f"{x.dtype}:{found[name][0]:08x}{found[name][1]:08x}" for name, x in arrays.items()}
  return digests, [name for name in arrays if not found[name][2]]


@jax.jit
def _of(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  bits = x.astype(jnp.uint8) if x.dtype == bool else x
  unsigned = np.dtype(f"uint{8 * bits.dtype.itemsize}")
  bits = jax.lax.bitcast_convert_type(bits, unsigned).astype(jnp.uint32)
  place = jnp.zeros(x.shape, jnp.uint32)
  for axis, factor in zip(range(x.ndim), itertools.count(0x9E3779B1, 0x3C6EF372), strict=False):
    place = place * np.uint32(factor % 2**32 | 1) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
  first = _mix(bits ^ _mix(place))
  second = _mix(first + np.uint32(0x85EBCA6B))
  finite = jnp.isfinite(x) if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.ones(x.shape, bool)
  none = np.uint32(0), np.uint32(0), np.bool_(True)  # one reduction of all three: nothing of x's size is kept
  return jax.lax.reduce((first, second, finite), none, _both, tuple(range(x.ndim)))


def _both(a: Any, b: Any) -> Any:
  return a[0] + b[0], a[1] + b[1], a[2] & b[2]


def _mix(x: jax.Array) -> jax.Array:
  """A bijection of 32 bits, in which each bit touches all others (the last step of MurmurHash3)."""
  x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
  return x ^ (x >> 16)
