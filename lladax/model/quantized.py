"""The layers' matrices in 8 or 4 bits, for devices that 16 bits are too many for; the arithmetic is qwix's.

A quantised matrix is {"bits", "scale"} in the parameters: the nearest of evenly spaced values ("int8", "int4"), or of
the 16 that suit normal weights ("nf4", QLoRA, arXiv 2305.14314, appendix E), times a scale that `GROUP` inputs of an
output share. It is multiplied out where it is used, a matrix at a time, in the compute dtype. Embedding, head and norms
stay as they are: the head of an 8B is one matrix of 1 GiB, which every pass would need in 16 bits anyway.
"""

import dataclasses
import functools
import importlib
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from lladax.devices import sharding
from lladax.mistake import Mistake

KINDS = ("full", "int8", "int4", "nf4")
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
  return {"bits": found.qvalue, "scale": found.scale}


def lent(matrix: dict[str, jax.Array], kind: str) -> Any:
  """A quantised matrix as qwix's QArray."""
  return library().QArray(matrix["bits"], matrix["scale"], qtype=kind)


def dequantize(matrix: Any, dtype: Any) -> jax.Array:
  """A QArray multiplied out."""
  if matrix.qvalue.dtype == jnp.int4:
    # Else XLA has a GPU's matmul read the layers' int4 along the inputs, and makes a transposed copy of all of them.
    bits = with_layout_constraint(matrix.qvalue, Layout(tuple(range(matrix.ndim))))
    matrix = dataclasses.replace(matrix, qvalue=bits)
  return library().dequantize(matrix.astype(dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def matmul(x: Any, matrix: Any, of_matrix: str, dtype: Any) -> Any:
  """[..., I] times a QArray with these letters, in `dtype`.

  The backward pass multiplies it out again: kept, the matrices of all layers would be the model in 16 bits.
  """
  return jnp.matmul(x, _whole(matrix, of_matrix, x), preferred_element_type=dtype)


def _whole(matrix: Any, of_matrix: str, x: jax.Array) -> jax.Array:
  """[I, O], gathered along the width while it is in bits."""
  gathered = jax.tree.map(lambda part: sharding.constrain(part, of_matrix.replace("D", ".")), matrix)
  return dequantize(gathered, x.dtype).reshape(x.shape[-1], -1)


def _backward(of_matrix, dtype, residuals, cotangent):
  matrix, like_x = residuals
  whole = _whole(matrix, of_matrix, like_x)
  return jnp.matmul(cotangent.astype(like_x.dtype), whole.T), None


matmul.defvjp(lambda x, matrix, of_matrix, dtype: (matmul(x, matrix, of_matrix, dtype), (matrix, x[:0])), _backward)
