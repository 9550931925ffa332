"""The layers' matrices in 8 or 4 bits, for devices that 16 bits are too many for; the arithmetic is qwix's.

A quantised matrix is {"bits", "scale"} in the parameters, two values of 4 bits in a byte: the nearest of evenly spaced
ones ("int8", "int4"), or of the 16 that suit normal weights ("nf4", QLoRA, arXiv 2305.14314, appendix E), times a scale
that `GROUP` inputs of an output share. It is multiplied out where it is used, a matrix at a time, in the compute dtype.
Embedding, head and norms stay in it: the head of an 8B is one matrix of 1 GiB, which every pass would have to multiply
out whole, so that bits would save nothing of it.
"""

import functools
import importlib
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lladax.devices import sharding
from lladax.mistake import Mistake

KINDS = ("full", "int8", "int4", "nf4")
PAIRED = ("int4", "nf4")  # two values share a byte
GROUP = 64  # inputs that share a scale: docs/results.md compares


@functools.cache
def library() -> Any:
  """The package qwix; Mistake where it is not installed."""
  try:
    return importlib.import_module("qwix")
  except ImportError:
    raise Mistake("model.weights in 8 or 4 bits needs qwix: pip install 'lladax[quantize]'") from None


def letters(of_matrix: str, inputs: str) -> dict[str, str]:
  """The letters of a quantised matrix's parts; scales are not cut where inputs share them."""
  return {"bits": of_matrix, "scale": of_matrix.replace(inputs[-1], ".")}


class Matrix(NamedTuple):
  """A quantised matrix, as it is lent to a model."""

  bits: jax.Array
  scale: jax.Array


def quantize(x: jax.Array, of_matrix: str, inputs: str, kind: str, group: int = GROUP) -> dict[str, jax.Array]:
  """A matrix in fewer bits: {"bits", "scale"}.

  What `dequantize` makes of it differs from `x` by at most half a step, scale / 2 (nf4: 0.152 scale, of which the
  group's largest value is 1), and a 256th of `x`, since scales are bfloat16.

  Args:
    x: with these letters.
    of_matrix: letters of `x`.
    inputs: those of them that are summed over in its product; the last one is cut into groups.
    kind: "int8", "int4" or "nf4".
    group: inputs that share a scale; fewer where that does not divide them. 0: all of them.
  """
  channels, tiles = [i for i, letter in enumerate(of_matrix) if letter not in inputs], {}
  if group:
    axis = of_matrix.index(inputs[-1])
    tiles = {axis: math.gcd(x.shape[axis], group)}
    channels = [i for i in range(x.ndim) if i != axis]
  found = library().quantize(
    x.astype(jnp.float32), kind, channelwise_axes=channels, tiled_axes=tiles, scale_dtype=jnp.bfloat16
  )
  bits = found.qvalue
  if kind in PAIRED:  # neighbours share a byte: arrays of 4 bits are copied, transposed or refused here and there
    pairs = (bits.astype(jnp.uint8) & 15).reshape(*bits.shape[:-1], -1, 2)
    bits = pairs[..., 0] | pairs[..., 1] << 4
  return {"bits": bits, "scale": found.scale}


def dequantize(matrix: Matrix, kind: str, dtype: Any) -> jax.Array:
  """A matrix multiplied out."""
  bits = matrix.bits
  if kind in PAIRED:
    shifts = jnp.array([0, 4], jnp.uint8).reshape(*[1] * bits.ndim, 2)
    bits = (bits[..., None] >> shifts & 15).reshape(*bits.shape[:-1], -1)
  if kind == "int4":
    bits = (bits ^ 8).astype(jnp.int8) - 8
  return library().dequantize(library().QArray(bits, matrix.scale.astype(dtype), qtype=kind))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def matmul(x: Any, matrix: Matrix, kind: str, of_matrix: str, dtype: Any) -> Any:
  """[..., I] times a quantised matrix with these letters, in `dtype`.

  The backward pass multiplies it out again: kept, the matrices of all layers would be the model in 16 bits.
  """
  return jnp.matmul(x, _whole(matrix, kind, of_matrix, x), preferred_element_type=dtype)


def _whole(matrix: Matrix, kind: str, of_matrix: str, x: jax.Array) -> jax.Array:
  """[I, O], gathered along the width while it is in bits."""
  gathered = jax.tree.map(lambda part: sharding.constrain(part, of_matrix.replace("D", ".")), matrix)
  return dequantize(gathered, kind, x.dtype).reshape(x.shape[-1], -1)


def _backward(kind, of_matrix, dtype, residuals, cotangent):
  matrix, like_x = residuals
  whole = _whole(matrix, kind, of_matrix, like_x)
  return jnp.matmul(cotangent.astype(like_x.dtype), whole.T), None


matmul.defvjp(
  lambda x, matrix, kind, of_matrix, dtype: (matmul(x, matrix, kind, of_matrix, dtype), (matrix, x[:0])), _backward
)
