"""One attention call. Who may look at whom is data (`allowed_BWL`), not code.

Letters are those of `mask_predictor.py`. Softmax runs in float32 whatever the compute dtype.
"""

import jax
import jax.numpy as jnp

# Finite, so that a row that may look at nothing (padding) gives garbage and never a NaN.
_NEVER = -1e30


def attend(q_BWHK: jax.Array, k_BLGK: jax.Array, v_BLGK: jax.Array, allowed_BWL: jax.Array | None = None) -> jax.Array:
  """Scaled dot-product attention; `H` query heads share `G` key/value heads in groups of H/G.

  Args:
    q_BWHK: queries of the window that is run.
    k_BLGK: keys of the whole canvas.
    v_BLGK: values of the whole canvas.
    allowed_BWL: True where query w may look at key l (B may be 1); None allows everything.

  Returns:
    [B, W, H, K] in the dtype of the queries. A query that may look at nothing gets the mean value.
  """
  B, W, H, K = q_BWHK.shape
  L, G = k_BLGK.shape[1:3]
  q_BGRWK = (q_BWHK * K**-0.5).reshape(B, W, G, H // G, K).transpose(0, 2, 3, 1, 4)
  k_BGLK, v_BGLK = k_BLGK.transpose(0, 2, 1, 3), v_BLGK.transpose(0, 2, 1, 3)
  scores_BGRWL = jnp.einsum("BGRWK,BGLK->BGRWL", q_BGRWK, k_BGLK, preferred_element_type=jnp.float32)
  if allowed_BWL is not None:
    scores_BGRWL = jnp.where(allowed_BWL[:, None, None], scores_BGRWL, _NEVER)
  # Softmax, divided after the values: K numbers a query instead of L, and 0.8 of the time on a CPU.
  highest = jax.lax.stop_gradient(jnp.max(scores_BGRWL, axis=-1, keepdims=True))
  exp_BGRWL = jnp.exp(scores_BGRWL - highest)
  sum_BGRW1 = jnp.sum(exp_BGRWL, axis=-1, keepdims=True)
  out_BGRWK = jnp.einsum(
    "BGRWL,BGLK->BGRWK", exp_BGRWL.astype(v_BGLK.dtype), v_BGLK, preferred_element_type=jnp.float32
  )
  out_BGRWK = (out_BGRWK / sum_BGRW1).astype(q_BWHK.dtype)
  return out_BGRWK.transpose(0, 3, 1, 2, 4).reshape(B, W, H, K)


def allowed(
  query_segment_BW: jax.Array,
  segment_BL: jax.Array,
  query_position_BW: jax.Array,
  position_BL: jax.Array,
  *,
  causal: bool,
) -> jax.Array:
  """Which keys each query may look at: those of its own segment (0 = padding), never later ones if causal.

  ```
  segment 1 1 1 2 2 0        causal
        1 x x x . . .        x . . . . .
        1 x x x . . .        x x . . . .
        1 x x x . . .        x x x . . .
        2 . . . x x .        . . . x . .
        2 . . . x x .        . . . x x .
        0 . . . . . .        . . . . . .
  ```
  """
  same_BWL = query_segment_BW[:, :, None] == segment_BL[:, None, :]
  same_BWL &= segment_BL[:, None, :] > 0
  if causal:
    same_BWL &= query_position_BW[:, :, None] >= position_BL[:, None, :]
  return same_BWL
