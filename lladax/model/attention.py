"""One attention call, three kernels. Who may look at whom is a value (`Visible`), not code.

  xla     plain einsums: every case, every device; the scores of all heads exist at once
  cudnn   NVIDIA's fused kernel: bfloat16, head widths up to 128. Padding at the right end goes by lengths; other
          segments (packed documents, padding at the left) as a bias of one row of scores for all heads
  splash  the Pallas kernel for TPUs: lengths that are multiples of 128, any head width; segments are native

Letters are those of `mask_predictor.py`. Softmax runs in float32 whatever the compute dtype.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lladax.mistake import Mistake

KERNELS = ("auto", "xla", "cudnn", "splash")

# Finite, so that a row that may look at nothing (padding) gives garbage and never a NaN.
_NEVER = -1e30


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=["segment_BL", "start", "reuse_L", "table_BWK"],
  meta_fields=["L", "W", "order", "right_padded"],
)  # fmt: skip
@dataclasses.dataclass(frozen=True)
class Visible:
  """Who may look at whom on a canvas: made by who knows it, read by `choose` and `attend`, and by nobody between.

  A row is what a position of the window may look at, `x`; a column is a key.
  ```
  order         full           causal         full, window       full, window 2 .. 3 over a
                                              at 2 .. 3          cache: reuse 1 1 . . 1 1
  segment   1 1 1 2 2 0    1 1 1 2 2 0    1 1 1 2 2 0    1 1 1 2 2 0 1 2
          1 x x x . . .    x . . . . .
          1 x x x . . .    x x . . . .
          1 x x x . . .    x x x . . .    x x x . . .    x x . . . . x .
          2 . . . x x .    . . . x . .    . . . x x .    . . . . x . . x
          2 . . . x x .    . . . x x .
          0 . . . . . .    . . . . . .
  ```
  """

  L: int  # positions of the canvas
  W: int  # of them in the window, which asks
  order: str = "full"  # | "causal": later keys are hidden
  segment_BL: Any = None  # int32 document of every position, 0 = padding (B may be 1); None: one document, no padding
  right_padded: bool = False  # segments are 1s and then padding, which some kernels know how to use
  start: Any = 0  # where the window begins
  # Bool: keys that are taken from a cache, which is then left as it is. The others are the window's own, and stand
  # behind the cache's. None: the window's are put into their places, and all are used.
  reuse_L: Any = None
  table_BWK: Any = None  # what `drawn` drew

  @property
  def keys(self) -> int:
    """How many there are to look at."""
    return self.L if self.reuse_L is None else self.L + self.W

  @property
  def segments(self) -> str:
    """What kernels must know of the segments: "none"; "right", 1s and then padding; "any"."""
    return "none" if self.segment_BL is None else "right" if self.right_padded else "any"

  def window(self, array_BL: jax.Array) -> jax.Array:
    """The window's part of what there is of every position."""
    if self.W == self.L:
      return array_BL
    return jax.lax.dynamic_slice_in_dim(array_BL, self.start, self.W, axis=1)

  def drawn(self) -> "Visible":
    """With `table_BWK`, bool [B or 1, W, keys]: True where a query may look; None where all may look at all."""
    if self.segment_BL is None and self.order == "full" and self.reuse_L is None:
      return self
    at_1L = jnp.arange(self.L)[None]
    # Made up for the table alone: a kernel that was chosen for no segments must not be handed any.
    segment_BL = jnp.ones_like(at_1L) if self.segment_BL is None else self.segment_BL
    table_BWK = self.window(segment_BL)[:, :, None] == segment_BL[:, None, :]
    table_BWK &= segment_BL[:, None, :] > 0
    if self.order == "causal":
      table_BWK &= self.window(at_1L)[:, :, None] >= at_1L[:, None, :]
    if self.reuse_L is not None:
      reuse_11L = jnp.asarray(self.reuse_L)[None, None]
      fresh_BWW = jax.lax.dynamic_slice_in_dim(table_BWK & ~reuse_11L, self.start, self.W, axis=2)
      table_BWK = jnp.concatenate([table_BWK & reuse_11L, fresh_BWW], axis=2)
    return dataclasses.replace(self, table_BWK=table_BWK)


def choose(kernel: str, visible: Visible, *, K: int, dtype: jnp.dtype, platform: str, context: int = 1) -> str:
  """The kernel that runs: the one asked for, or for "auto" the fastest that is exact for the input.

  Args:
    kernel: one of `KERNELS`.
    visible: shapes will do for its arrays. More keys than queries: a window over a cache, whose table is its own;
      always "xla".
    K: head width.
    dtype: of the queries.
    platform: "cpu", "gpu" or "tpu".
    context: into how many parts the mesh slices the queries.

  Raises:
    Mistake: the kernel asked for cannot do it; the message says why.
  """
  W, keys, segments = visible.W, visible.keys, visible.segments

  def why_not(name: str) -> str | None:
    home = {"cudnn": "gpu", "splash": "tpu"}[name]
    if platform != home:
      return f"it runs on a {home}, and this is a {platform}"
    if visible.order == "causal" and context > 1:
      return f"it cannot be causal with mesh.context={context}"
    if name == "cudnn" and dtype not in (jnp.bfloat16, jnp.float16):
      return f"it computes in bfloat16, not {dtype}"
    if name == "cudnn" and (K % 8 or K > 128):
      return f"model.K={K} is not a multiple of 8 up to 128"
    if name == "cudnn" and segments == "any" and (W // context % 2 or keys % 2):
      return f"there are segments, and the length {keys} on {context} devices is not even on each"
    if name == "splash" and (W // context % 128 or keys % 128):
      return f"the length {keys} on {context} devices is not a multiple of 128 on each"
    return None

  if W < keys or kernel == "xla":
    return "xla"
  if kernel == "auto":
    if platform == "tpu":
      return _said("xla" if why_not("splash") else "splash", why_not("splash"))
    if platform == "gpu":
      small = segments == "any" and W * keys < 2**20 and "there are segments and few tokens"
      return _said("xla" if why_not("cudnn") or small else "cudnn", why_not("cudnn") or small or None)
    return "xla"
  if reason := why_not(kernel):
    raise Mistake(f"model.attention={kernel!r}: {reason}; use auto or xla")
  return _said(kernel, None)


@functools.cache
def _said(kernel: str, reason: str | None) -> str:
  logging.getLogger("lladax").info("attention kernel: %s%s", kernel, f" ({reason})" if reason else "")
  return kernel


def attend(
  q_BWHK: jax.Array, k_BLGK: jax.Array, v_BLGK: jax.Array, visible: Visible, *, kernel: str = "xla",
  cached: tuple[jax.Array, jax.Array] | None = None,
  on_each_device: Callable[..., jax.Array] = lambda fn, *arrays: fn(*(x for x, _ in arrays)),
) -> jax.Array:  # fmt: skip
  """Scaled dot-product attention; `H` query heads share `G` key/value heads in groups of H/G.

  Args:
    q_BWHK: queries of the window that is run.
    k_BLGK: keys of the whole canvas; with `visible.reuse_L`, of the window, which stand behind those that are cached.
    v_BLGK: their values.
    visible: as `Visible.drawn` drew it, with a row of segments for each row of the batch.
    kernel: as `choose` chose.
    cached: with `visible.reuse_L`, keys and values of the whole canvas, `turned`; they are read where they are.
    on_each_device: `sharding.on_each_device` on a mesh, for the kernels that XLA cannot slice by itself.

  Returns:
    [B, W, H, K] in the dtype of the queries. A query that may look at nothing gets a finite value that means nothing.
  """
  segment_BL, causal = visible.segment_BL, visible.order == "causal"
  qkv: Any = ((q_BWHK, "BLHK"), (k_BLGK, "B.GK"), (v_BLGK, "B.GK"))
  segments: Any = () if segment_BL is None else ((segment_BL, "BL"), (segment_BL, "B."))
  if kernel == "xla":
    out_BWHK = _xla(q_BWHK, ([cached] if cached else []) + [turned(k_BLGK, v_BLGK)], visible.table_BWK)
  elif kernel == "splash":
    out_BWHK = on_each_device(functools.partial(_splash, causal=causal), *qkv, *segments)
  elif visible.segments != "any":
    out_BWHK = on_each_device(functools.partial(_cudnn_lengths, causal=causal), *qkv, *segments)
  else:
    out_BWHK = on_each_device(_cudnn_bias, *qkv, (visible.table_BWK, "BL."))
  # Splash names its own residuals, the log-sum-exp among them.
  return out_BWHK if kernel == "splash" else checkpoint_name(out_BWHK, "attention")


def einsum32(formula: str, a: jax.Array, b: jax.Array) -> jax.Array:
  """An einsum of two arrays of one dtype with a float32 result, whose gradient is computed in that dtype too.

  (JAX would multiply the float32 cotangent with them: a float32 matmul, a tenth of the speed of a bfloat16 one.)
  """
  if a.dtype == jnp.float32:  # nothing to gain, and XLA's own transposes are the faster ones on a CPU
    return jnp.einsum(formula, a, b)
  return _einsum32(formula, a, b)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _einsum32(formula, a, b):
  return jnp.einsum(formula, a, b, preferred_element_type=jnp.float32)


def _einsum32_backward(formula, residuals, cotangent):
  a, b = residuals
  inputs, out = formula.split("->")
  letters_a, letters_b = inputs.split(",")
  cotangent = cotangent.astype(a.dtype)
  gradient_a = jnp.einsum(f"{out},{letters_b}->{letters_a}", cotangent, b, preferred_element_type=a.dtype)
  gradient_b = jnp.einsum(f"{letters_a},{out}->{letters_b}", a, cotangent, preferred_element_type=b.dtype)
  return gradient_a, gradient_b


_einsum32.defvjp(lambda formula, a, b: (_einsum32(formula, a, b), (a, b)), _einsum32_backward)


def turned(k_BLGK: jax.Array, v_BLGK: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(k_BGKL, v_BGLK), as the matmuls of attention read them."""
  return k_BLGK.transpose(0, 2, 3, 1), v_BLGK.transpose(0, 2, 1, 3)


def _xla(q_BWHK, parts, allowed_BWL):
  """`parts`: (keys, values), `turned`, that stand one behind the other; L counts the positions of all."""
  B, W, H, K = q_BWHK.shape
  G = parts[0][0].shape[1]
  q_BGRWK = (q_BWHK * K**-0.5).reshape(B, W, G, H // G, K).transpose(0, 2, 3, 1, 4)
  scores = [einsum32("BGRWK,BGKL->BGRWL", q_BGRWK, k_BGKL) for k_BGKL, _ in parts]
  scores_BGRWL = scores[0] if len(parts) == 1 else jnp.concatenate(scores, axis=-1)
  if allowed_BWL is not None:
    scores_BGRWL = jnp.where(allowed_BWL[:, None, None], scores_BGRWL, _NEVER)
  # Softmax, divided after the values: K numbers a query instead of L, and 0.8 of the time on a CPU.
  highest = jax.lax.stop_gradient(jnp.max(scores_BGRWL, axis=-1, keepdims=True))
  exp_BGRWL = jnp.exp(scores_BGRWL - highest)
  sum_BGRW1 = jnp.sum(exp_BGRWL, axis=-1, keepdims=True)
  exp_BGRWL = exp_BGRWL.astype(q_BWHK.dtype)
  cuts = [v_BGLK.shape[2] for _, v_BGLK in parts[:-1]]
  exps = jnp.split(exp_BGRWL, cuts, axis=-1)
  outs = [einsum32("BGRWL,BGLK->BGRWK", exp, v_BGLK) for exp, (_, v_BGLK) in zip(exps, parts, strict=True)]
  out_BGRWK = (functools.reduce(jnp.add, outs) / sum_BGRW1).astype(q_BWHK.dtype)
  return out_BGRWK.transpose(0, 3, 1, 2, 4).reshape(B, W, H, K)


def _cudnn_lengths(q_BWHK, k_BLGK, v_BLGK, query_segment_BW=None, segment_BL=None, *, causal):
  if segment_BL is None:
    return jax.nn.dot_product_attention(q_BWHK, k_BLGK, v_BLGK, is_causal=causal, implementation="cudnn")
  assert query_segment_BW is not None
  valid_BW = query_segment_BW > 0
  out_BWHK = jax.nn.dot_product_attention(
    q_BWHK, k_BLGK, v_BLGK, is_causal=causal, implementation="cudnn",
    query_seq_lengths=valid_BW.sum(axis=1, dtype=jnp.int32),
    key_value_seq_lengths=(segment_BL > 0).sum(axis=1, dtype=jnp.int32),
  )  # fmt: skip
  # What cuDNN leaves in the rows of the padding is nobody's business: neither the value nor a gradient gets through.
  return jnp.where(valid_BW[:, :, None, None], out_BWHK, 0)


def _cudnn_bias(q_BWHK, k_BLGK, v_BLGK, allowed_BWL):
  return jax.nn.dot_product_attention(q_BWHK, k_BLGK, v_BLGK, mask=allowed_BWL[:, None], implementation="cudnn")


def _splash(q_BWHK, k_BLGK, v_BLGK, query_segment_BW=None, segment_BL=None, *, causal, interpret=False):
  """Splash attention on one device. Padding looks at padding here: what it sees, nobody does."""
  from jax.experimental.pallas.ops.tpu import splash_attention  # Pallas takes a while to import

  _, W, H, K = q_BWHK.shape
  L = k_BLGK.shape[1]
  mask = splash_attention.CausalMask((W, L)) if causal else splash_attention.FullMask((W, L))
  q_tile, k_tile = (next(n for n in (512, 256, 128) if size % n == 0) for size in (W, L))
  kernel = splash_attention.make_splash_mha(
    splash_attention.MultiHeadMask([mask] * H), head_shards=1, q_seq_shards=1, interpret=interpret,
    residual_checkpoint_name="attention",
    block_sizes=splash_attention.BlockSizes(
      block_q=q_tile, block_kv=k_tile, block_kv_compute=k_tile, block_q_dkv=q_tile, block_kv_dkv=k_tile,
      block_kv_dkv_compute=k_tile, block_q_dq=q_tile, block_kv_dq=k_tile,
    ),
  )  # fmt: skip
  q_BHWK, k_BGLK, v_BGLK = (x.transpose(0, 2, 1, 3) for x in (q_BWHK * K**-0.5, k_BLGK, v_BLGK))
  if segment_BL is None:
    out_BHWK: Any = jax.vmap(kernel)(q_BHWK, k_BGLK, v_BGLK)
  else:
    assert query_segment_BW is not None
    out_BHWK = jax.vmap(kernel)(q_BHWK, k_BGLK, v_BGLK, splash_attention.SegmentIds(query_segment_BW, segment_BL))
  return out_BHWK.transpose(0, 2, 1, 3)
