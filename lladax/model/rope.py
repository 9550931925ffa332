"""Rotary positions (RoPE, arXiv 2104.09864): plain, of a part of each head, and stretched as published.

Letters: `mask_predictor.py`; here P is the pairs of a head that are turned.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lladax.devices import sharding
from lladax.mistake import Mistake

SCALINGS = ("none", "linear", "yarn", "llama3")


def check(c: Any) -> None:
  """Raises Mistake if the fields of a `MaskPredictorConfig` about rotary positions do not fit each other."""
  if c.K % 2 and not c.rotary:
    raise Mistake(f"model.K={c.K}: RoPE rotates pairs, the head width must be even")
  if c.rotary % 2 or not 0 <= c.rotary <= c.K:
    raise Mistake(f"model.rotary={c.rotary}: RoPE rotates pairs of a head's model.K={c.K}: use an even part; 0: all")
  if not 1 < c.rope_theta < math.inf:
    raise Mistake(f"model.rope_theta={c.rope_theta}: must be above 1, or all pairs turn alike")
  if c.rope_scaling not in SCALINGS:
    raise Mistake(f"model.rope_scaling={c.rope_scaling!r}: use one of {', '.join(SCALINGS)}")
  if c.rope_scaling == "none":
    return
  if not 1.0 <= c.rope_factor < math.inf:
    raise Mistake(f"model.rope_factor={c.rope_factor}: model.rope_scaling stretches positions by at least 1")
  if c.rope_scaling == "linear":
    return
  if c.rope_length < 1:
    raise Mistake(
      f"model.rope_length={c.rope_length}: model.rope_scaling={c.rope_scaling!r} needs the longest canvas before it was"
      " stretched"
    )
  if len(c.rope_turns) != 2 or not 0 < c.rope_turns[0] < c.rope_turns[1]:
    raise Mistake(f"model.rope_turns={c.rope_turns}: give two numbers above 0, the smaller one first")


def frequencies(c: Any) -> np.ndarray:
  """Radians a position of every pair [P], float32."""
  width = c.rotary or c.K
  place_P = np.arange(0, width, 2, dtype=np.float32)
  plain_P = np.float32(c.rope_theta) ** (-place_P / np.float32(width))
  if c.rope_scaling == "none":
    return plain_P
  slow_P = plain_P / np.float32(c.rope_factor)
  if c.rope_scaling == "linear":  # arXiv 2306.15595
    return slow_P
  few, many = c.rope_turns
  if c.rope_scaling == "llama3":  # by how often a pair turns within the old length: pairs that do so often stay
    turns_P = c.rope_length * plain_P / (2 * math.pi)
    stays_P = np.clip((turns_P - few) / (many - few), 0, 1)
  else:  # YaRN, arXiv 2309.00071: likewise, but straight in the number of the pair

    def pair(turns):
      return width * math.log(c.rope_length / (turns * 2 * math.pi)) / (2 * math.log(c.rope_theta))

    first, last = max(math.floor(pair(many)), 0), min(math.ceil(pair(few)), width - 1)
    stays_P = 1 - np.clip((np.arange(width // 2) - first) / max(last - first, 1e-3), 0, 1)
  return (stays_P * plain_P + (1 - stays_P) * slow_P).astype(np.float32)


def magnitude(c: Any) -> float:
  """What cosine and sine are multiplied by: YaRN sharpens attention (arXiv 2309.00071, Eq. 22)."""
  if c.rope_scaling != "yarn":
    return 1.0
  return c.rope_attention or 0.1 * math.log(c.rope_factor) + 1.0


def turns(position_BW: Any, c: Any, length: int) -> tuple[jax.Array, jax.Array]:
  """Cosine and sine [B, W, 1, P] in float32, of positions 0 .. `length` - 1."""
  frequency_P, by = frequencies(c), np.float32(magnitude(c))
  if sharding.platform() == "cpu":
    # A table: where XLA's CPU backend can compute cosines it does so within every loop that turns a query or a key,
    # for each head of each row again, and one by one.
    angle_LP = np.arange(length, dtype=np.float32)[:, None] * frequency_P[None]
    tables = (jnp.asarray(f(angle_LP) * by) for f in (np.cos, np.sin))
    cos, sin = (x.at[position_BW].get(mode="fill", fill_value=jnp.nan) for x in tables)
    return cos[:, :, None], sin[:, :, None]
  angle = position_BW.astype(jnp.float32)[:, :, None, None] * frequency_P[None, None, None]
  return jnp.cos(angle) * by, jnp.sin(angle) * by


def turn(x_BWHK: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Rotates the pairs (p, p + P) of each head in float32, and casts back; what stands behind 2 P stays as it is."""
  P = cos.shape[-1]
  a, b, *rest = jnp.split(x_BWHK.astype(jnp.float32), [P, 2 * P], axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, *rest], axis=-1).astype(x_BWHK.dtype)
