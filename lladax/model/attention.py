"""One attention call, three kernels. Who may look at whom is a value (`Visible`), not code.

  xla     plain einsums: every case, every device; the scores of all heads exist at once
  cudnn   NVIDIA's fused kernel: 16 bits, head widths up to 128. Padding goes by lengths, at the left as well; packed
          documents by where they begin, from Hopper on and with a new JAX, and else as a bias for all heads and layers;
          blocks by a causal part and one within the block, merged
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
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from lladax.mistake import Mistake

KERNELS = ("auto", "xla", "cudnn", "splash")

# Finite, so that a row that may look at nothing (padding) gives garbage and never a NaN.
_NEVER = -1e30
_NEVER_16 = -(2.0**15)  # of the 16 bits of a bias
# Documents of a row that cuDNN has room for: its workspace, 70 MB each at 4096 x 32 x 64, is there for all of them.
_DOCUMENTS = 32
_WITHIN = 256  # tokens of a block whose scores exist at once, twice as many a token and head, beside cuDNN's


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=["segment_BL", "start", "reuse_L", "table_BWK", "begin_BM"],
  meta_fields=["L", "W", "order", "block", "right_padded", "contiguous", "aligned"],
)  # fmt: skip
@dataclasses.dataclass(frozen=True)
class Visible:
  """Who may look at whom on a canvas: made by who knows it, read by `choose` and `attend`, and by nobody between.

  A row is what a position of the window may look at, `x`; a column is a key.
  ```
  order         full           causal         full, window       full, window 2 .. 3 over a    blocks of 2
                                              at 2 .. 3          cache: reuse 1 1 . . 1 1
  segment   1 1 1 2 2 0    1 1 1 2 2 0    1 1 1 2 2 0    1 1 1 2 2 0 1 2               1 1 1 2 2 0
          1 x x x . . .    x . . . . .                                                 x x . . . .
          1 x x x . . .    x x . . . .                                                 x x . . . .
          1 x x x . . .    x x x . . .    x x x . . .    x x . . . . x .               x x x . . .
          2 . . . x x .    . . . x . .    . . . x x .    . . . . x . . x               . . . x x .
          2 . . . x x .    . . . x x .                                                 . . . x x .
          0 . . . . . .    . . . . . .                                                 . . . . . .
  ```
  To train on blocks a canvas stands there twice, noised and then clean (BD3-LM, arXiv 2503.09573): a noised block
  looks at itself and at clean blocks before it, a clean one at clean blocks up to itself, and nobody at noised ones.
  ```
  order     noised blocks of 2 (`doubled`)
  segment   1 1 1 1 1 2 2 2 1 1 1 1 1 2 2 2
          1 x x . . . . . . . . . . . . . .
          1 x x . . . . . . . . . . . . . .
          1 . . x x . . . . x x . . . . . .
          1 . . x x . . . . x x . . . . . .
          1 . . . . x . . . x x x x . . . .
          2 . . . . . x x . . . . . . . . .
          2 . . . . . x x . . . . . . . . .
          2 . . . . . . . x . . . . . x x .
          1 . . . . . . . . x x . . . . . .
          1 . . . . . . . . x x . . . . . .
          1 . . . . . . . . x x x x . . . .
          1 . . . . . . . . x x x x . . . .
          1 . . . . . . . . x x x x x . . .
          2 . . . . . . . . . . . . . x x .
          2 . . . . . . . . . . . . . x x .
          2 . . . . . . . . . . . . . x x x
  ```
  """

  L: int  # positions of the canvas
  W: int  # of them in the window, which asks
  # | "causal": later keys are hidden | "blocks": those of later blocks are | "noised blocks": see above.
  order: str = "full"
  segment_BL: Any = None  # int32 document of every position, 0 = padding (B may be 1); None: one document, no padding
  right_padded: bool = False  # segments are 1s and then padding, which some kernels know how to use
  contiguous: bool = False  # segments are 1s in one run, padding before it or behind it: keys are turned to the front
  block: int = 0  # of the orders of blocks: its tokens, counted from each document's own start
  aligned: bool = False  # documents begin at multiples of the block, which some kernels must rely on
  start: Any = 0  # where the window begins
  # Bool: keys that are taken from a cache, which is then left as it is. The others are the window's own, and stand
  # behind the cache's. None: the window's are put into their places, and all are used.
  reuse_L: Any = None
  table_BWK: Any = None  # what `drawn` drew for the kernel
  begin_BM: Any = None  # for "documents": see there

  @property
  def keys(self) -> int:
    """How many there are to look at."""
    return self.L if self.reuse_L is None else self.L + self.W

  @property
  def once(self) -> int:
    """Positions of the canvas, where it stands here twice."""
    return self.L // 2 if self.order == "noised blocks" else self.L

  @property
  def segments(self) -> str:
    """What kernels must know of the segments: "none"; "right", 1s and then padding; "run", 1s in one run; "any"."""
    if self.segment_BL is None:
      return "none"
    # Later keys are those behind the query's own place: they must stay in theirs.
    return "right" if self.right_padded else "run" if self.contiguous and self.order == "full" else "any"

  def doubled(self) -> "Visible":
    """Of a canvas in the order of its blocks: the same canvas noised and then clean, 2 L positions."""
    assert self.order == "blocks" and self.W == self.L
    segment_BL = None if self.segment_BL is None else jnp.tile(self.segment_BL, (1, 2))
    return dataclasses.replace(self, L=2 * self.L, W=2 * self.L, order="noised blocks", segment_BL=segment_BL)

  def blocks_BL(self) -> jax.Array:
    """Int32 number of every position's block in its document (B may be 1)."""
    L = self.once
    place_BL = jnp.arange(L)[None]
    if self.segment_BL is not None:
      segment_BL = jnp.asarray(self.segment_BL)[:, :L]
      place_BL -= jax.lax.cummax(jnp.where(_begins(segment_BL), place_BL, 0), axis=1)
    return jnp.tile(place_BL // self.block, (1, self.L // L))

  def begins_BL(self) -> jax.Array:
    """Bool: where a document begins, or padding (B may be 1)."""
    return jnp.arange(self.L)[None] == 0 if self.segment_BL is None else _begins(jnp.asarray(self.segment_BL))

  def opens_BL(self) -> jax.Array:
    """Bool: where a block begins, of the canvas once (B may be 1)."""
    block_BL = self.blocks_BL()[:, : self.once]
    return (block_BL != jnp.roll(block_BL, 1, axis=1)) | self.begins_BL()[:, : self.once]

  def begun_apart(self) -> "Visible":
    """The same, but the first position of a document sees itself alone, and is seen by nobody else."""
    segment_BL = jnp.ones((1, self.L), jnp.int32) if self.segment_BL is None else jnp.asarray(self.segment_BL)
    apart_BL = jnp.where(segment_BL > 0, 2 * segment_BL - self.begins_BL(), 0)
    return dataclasses.replace(self, segment_BL=apart_BL, right_padded=False, contiguous=False)

  def window(self, array_BL: jax.Array) -> jax.Array:
    """The window's part of what there is of every position."""
    if self.W == self.L:
      return array_BL
    return jax.lax.dynamic_slice_in_dim(array_BL, self.start, self.W, axis=1)

  def drawn(self, kernel: str = "xla", dtype: Any = None) -> "Visible":
    """With `table_BWK`, what the kernel reads of [B or 1, W, keys]; None where it needs none.

    For XLA it is bool, True where a query may look. For cuDNN it is what is added to the scores, in `dtype`; there
    padding looks at padding, so that no query is without a key (whose log-sum-exp would be far below 0). Of blocks it
    knows the documents alone, of the canvas once.
    """
    if kernel == "documents":
      return dataclasses.replace(self, begin_BM=_beginnings(self.segment_BL))
    bias = kernel == "cudnn"
    if kernel == "splash" or (bias and self.segments != "any"):
      return self
    if self.segment_BL is None and self.order == "full" and self.reuse_L is None:
      return self
    at_1L = jnp.arange(self.L)[None]
    # Made up for the table alone: a kernel that was chosen for no segments must not be handed any.
    segment_BL = jnp.ones_like(at_1L) if self.segment_BL is None else self.segment_BL
    if bias and "blocks" in self.order:
      segment_BL = segment_BL[:, : self.once]
      table_BWK = segment_BL[:, :, None] == segment_BL[:, None, :]
    else:
      table_BWK = self.window(segment_BL)[:, :, None] == segment_BL[:, None, :]
    if not bias:
      table_BWK &= segment_BL[:, None, :] > 0
    if self.order == "causal":
      table_BWK &= self.window(at_1L)[:, :, None] >= at_1L[:, None, :]
    elif self.order != "full" and not bias:
      block_BL, noised_1L = self.blocks_BL(), at_1L < self.L - self.once
      asks_BW1, noised_1W1 = (self.window(x)[:, :, None] for x in (block_BL, noised_1L))
      table_BWK &= _in_blocks(asks_BW1, block_BL[:, None], noised_1W1, noised_1L[:, None])
    if self.reuse_L is not None:
      reuse_11L = jnp.asarray(self.reuse_L)[None, None]
      fresh_BWW = jax.lax.dynamic_slice_in_dim(table_BWK & ~reuse_11L, self.start, self.W, axis=2)
      table_BWK = jnp.concatenate([table_BWK & reuse_11L, fresh_BWW], axis=2)
    return dataclasses.replace(self, table_BWK=jnp.where(table_BWK, 0, _NEVER_16).astype(dtype) if bias else table_BWK)


def _in_blocks(asks: Any, key: Any, asks_noised: Any, key_noised: Any) -> Any:
  """Whether a position of block number `asks` may look at one of block `key`, where each is noised or clean."""
  clean = ~key_noised & ((key < asks) | ((key == asks) & ~asks_noised))
  return clean | (key_noised & asks_noised & (key == asks))


def choose(
  kernel: str, visible: Visible, *, K: int, dtype: jnp.dtype, platform: str, capability: tuple[int, ...] | None = None,
  context: int = 1,
) -> str:  # fmt: skip
  """The kernel that runs: the one asked for, or for "auto" the fastest that is exact for the input.

  It is one of `KERNELS`, or "documents": cuDNN's, told where the documents of a row begin.

  Args:
    kernel: one of `KERNELS`.
    visible: shapes will do for its arrays. More keys than queries: a window over a cache, whose table is its own;
      always "xla".
    K: head width.
    dtype: of the queries.
    platform: "cpu", "gpu" or "tpu".
    capability: of the GPU, (9, 0), where it is known.
    context: into how many parts the mesh slices the queries.

  Raises:
    Mistake: the kernel asked for cannot do it; the message says why.
  """
  W, keys, segments = visible.W, visible.keys, visible.segments
  order = "causal" if visible.order == "causal" else "in blocks"

  def why_not(name: str) -> str | None:
    home = {"cudnn": "gpu", "splash": "tpu"}[name]
    if platform != home:
      return f"it runs on a {home}, and this is a {platform}"
    if visible.order != "full" and context > 1:
      return f"it cannot be {order} with mesh.context={context}"
    if "blocks" in visible.order and segments == "any" and not visible.aligned:
      return "documents begin within a block"
    if "blocks" in visible.order and name == "cudnn":
      if visible.once % visible.block or visible.once == visible.block:
        return f"the length {visible.once} is not several blocks of {visible.block}"
      if visible.block > _WITHIN:
        return f"it takes blocks of up to {_WITHIN}, and these are of {visible.block}"
      if segments == "any" and visible.block % 2:
        return f"there are segments, and blocks of {visible.block} are not even"
    if name == "cudnn" and capability and capability < (8, 0):
      return f"it needs a GPU of capability 8.0, and this one has {'.'.join(map(str, capability))}"
    if name == "cudnn" and dtype not in (jnp.bfloat16, jnp.float16):
      return f"it computes in 16 bits, not in {jnp.dtype(dtype)}"
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
    kernel = {"tpu": "splash", "gpu": "cudnn"}.get(platform, "xla")
    if kernel == "xla":
      return kernel
    few = kernel == "cudnn" and segments == "any" and W * keys < 2**20
    if reason := why_not(kernel) or (few and "there are segments and few tokens"):
      return _said("xla", reason)
  elif reason := why_not(kernel):
    raise Mistake(f"model.attention={kernel!r}: {reason}; use auto or xla")
  if kernel == "splash" or segments != "any":
    return _said(kernel, None)
  reason = _no_beginnings(visible, capability, context)
  return _said("cudnn", f"documents in a row by a bias: {reason}") if reason else _said("documents", "of cuDNN")


def _no_beginnings(visible: Visible, capability: tuple[int, ...] | None, context: int) -> str | None:
  """Why cuDNN cannot be told where documents begin, if it cannot."""
  if visible.order != "full" or context > 1:
    return f"they are {'causal' if visible.order == 'causal' else 'in blocks'}, or sliced"
  if not capability or capability < (9, 0):
    return "no GPU of capability 9.0"
  # Before, keys were those of other tokens where heads share them (github.com/jax-ml/jax/pull/39521).
  if jax.__version_info__ < (0, 11, 2):
    return f"JAX {jax.__version__}, not 0.11.2"
  return None if _cudnn() else "this JAX has no function for more"


@functools.cache
def _cudnn() -> Any:
  """JAX's module of cuDNN's attention, where documents are told of without a public name; None if it is not there."""
  try:
    from jax._src.cudnn import fused_attention_stablehlo as module
  except ImportError:
    return None
  return module if hasattr(module, "dot_product_attention") and hasattr(module, "MaskType") else None


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
    return _xla(q_BWHK, ([cached] if cached else []) + [turned(k_BLGK, v_BLGK)], visible.table_BWK)
  if kernel == "splash":
    return on_each_device(functools.partial(_splash, order=visible.order, block=visible.block), *qkv, *segments)
  if kernel == "documents":
    return on_each_device(_cudnn_documents, *qkv, segments[1], (visible.begin_BM, "B."))
  if "blocks" in visible.order:
    bias: Any = ((visible.table_BWK, "B..") for _ in range(visible.table_BWK is not None))
    fn = functools.partial(_cudnn_blocks, order=visible.order, block=visible.block)
    return on_each_device(fn, *qkv, *segments[1:], *bias)
  if visible.segments == "any":
    return on_each_device(_cudnn_bias, *qkv, (visible.table_BWK, "BL."))
  if visible.segments == "run":
    return on_each_device(_cudnn_run, *qkv, segments[1])
  return on_each_device(functools.partial(_cudnn_lengths, causal=causal), *qkv, *segments)


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
  """In rows of padding cuDNN leaves zeros, as values and as gradients (JAX's own tests say so): nothing is masked."""
  fn = functools.partial(jax.nn.dot_product_attention, is_causal=causal, implementation="cudnn")
  if segment_BL is None:
    return _kept(fn, (q_BWHK, k_BLGK, v_BLGK), {})
  length = {"query_seq_lengths": query_segment_BW, "key_value_seq_lengths": segment_BL}
  length = {name: (x > 0).sum(axis=1, dtype=jnp.int32) for name, x in length.items()}
  return _kept(fn, (q_BWHK, k_BLGK, v_BLGK), length)


def _cudnn_run(q_BWHK, k_BLGK, v_BLGK, segment_BL):
  """The order of the keys is nothing to a query: each row's are turned until its run is in front."""
  (B, W), L = q_BWHK.shape[:2], k_BLGK.shape[1]
  there_BL = segment_BL > 0
  at_BL = jnp.minimum(jnp.argmax(there_BL, axis=1)[:, None] + jnp.arange(L)[None], L - 1)
  turn = jax.vmap(lambda x_LGK, at_L: x_LGK.at[at_L].get(mode="promise_in_bounds"))
  length = {
    "query_seq_lengths": jnp.full(B, W, jnp.int32),
    "key_value_seq_lengths": jnp.maximum(there_BL.sum(axis=1, dtype=jnp.int32), 1),  # a row of padding alone
  }
  fn = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
  return _kept(fn, (q_BWHK, turn(k_BLGK, at_BL), turn(v_BLGK, at_BL)), length)


def _cudnn_bias(q_BWHK, k_BLGK, v_BLGK, bias_BWL):
  fn = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
  return _kept(fn, (q_BWHK, k_BLGK, v_BLGK), {"bias": bias_BWL[:, None]})


def _cudnn_blocks(q_BLHK, k_BLGK, v_BLGK, segment_BL=None, bias_BLL=None, *, order, block):
  """Causal attention knows no blocks; what it lacks of them lies within one, and is added by the log-sum-exps of both.

  A clean token at place p of its block lacks its later places. A noised one looks n tokens back, and from there on:
  it lacks the later places of the block before, and all of its own, which is noised.
  """
  if order == "blocks":
    return _blocks(block, q_BLHK, k_BLGK, v_BLGK, (), segment_BL, bias_BLL)
  L = q_BLHK.shape[1] // 2
  segment_BL = None if segment_BL is None else segment_BL[:, :L]
  (k_noised, k_clean), (v_noised, v_clean) = ((x[:, :L], x[:, L:]) for x in (k_BLGK, v_BLGK))
  noised: Any = _blocks(block, q_BLHK[:, :L], k_clean, v_clean, (k_noised, v_noised), segment_BL, bias_BLL)
  clean: Any = _blocks(block, q_BLHK[:, L:], k_clean, v_clean, (), segment_BL, bias_BLL)
  return jnp.concatenate([noised, clean], axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocks(n, q_BLHK, k_BLGK, v_BLGK, own, segment_BL, bias_BLL):
  """Clean queries; or with `own` (keys, values) noised ones, which look at these in their own block alone."""
  return _blocks_forward(n, q_BLHK, k_BLGK, v_BLGK, own, segment_BL, bias_BLL)[0]


def _blocks_forward(n, *arrays):
  q_BLHK, k_BLGK, v_BLGK, own, segment_BL, bias_BLL = arrays
  ago = n if own else 0
  scores_BGRMIJ = _near_scores(n, q_BLHK, _near(n, k_BLGK, *own[:1]), segment_BL)
  (far_BLHK, far_lse_BHL), _ = _far(ago, q_BLHK, k_BLGK, v_BLGK, bias_BLL)
  behind = ((0, 0), (0, 0), (ago, 0))
  far_lse_BHL = jnp.pad(far_lse_BHL, behind, constant_values=_NEVER)
  lse_BHL = jnp.logaddexp(far_lse_BHL, jax.nn.logsumexp(scores_BGRMIJ, axis=-1).reshape(far_lse_BHL.shape))
  share_BLH1 = jnp.exp(far_lse_BHL - lse_BHL).transpose(0, 2, 1)[..., None]
  out_BLHK = _within(scores_BGRMIJ, _near(n, v_BLGK, *own[1:]), lse_BHL)
  out_BLHK += share_BLH1 * jnp.pad(far_BLHK, ((0, 0), (ago, 0), (0, 0), (0, 0)))
  out_BLHK = checkpoint_name(out_BLHK.astype(q_BLHK.dtype), "attention")
  return out_BLHK, (*arrays, out_BLHK, checkpoint_name(lse_BHL, "attention"))


def _blocks_backward(n, kept, cotangent_BLHK):
  """Of each part alone, from the result and the log-sum-exp of both (Dao, arXiv 2307.08691, algorithm 2)."""
  q_BLHK, k_BLGK, v_BLGK, own, segment_BL, bias_BLL, out_BLHK, lse_BHL = kept
  ago = n if own else 0

  def near(q, k, v, own):
    scores_BGRMIJ = _near_scores(n, q, _near(n, k, *own[:1]), segment_BL)
    return _within(scores_BGRMIJ, _near(n, v, *own[1:]), lse_BHL, out_BLHK)

  q, k, v, own = jax.vjp(near, q_BLHK, k_BLGK, v_BLGK, own)[1](cotangent_BLHK.astype(jnp.float32))
  of_both = (out_BLHK[:, ago:], lse_BHL[:, :, ago:])
  far = _far(ago, q_BLHK, k_BLGK, v_BLGK, bias_BLL, of_both)[1](cotangent_BLHK[:, ago:])
  before, behind = ((0, 0), (ago, 0), (0, 0), (0, 0)), ((0, 0), (0, ago), (0, 0), (0, 0))
  far = [jnp.pad(x, pad) for x, pad in zip(far, (before, behind, behind), strict=True)]
  return *(x + y for x, y in zip((q, k, v), far, strict=True)), own, None, None


_blocks.defvjp(_blocks_forward, _blocks_backward)


def _far(ago, q_BLHK, k_BLGK, v_BLGK, bias_BLL, of_both=None):
  """((out, log-sum-exp [B, H, L - ago]), pull-back) of queries that look at keys from so many tokens ago on.

  JAX has no public function that takes a log-sum-exp: it stands among the leaves of what `jax.vjp` returns, with `out`;
  `of_both` takes their places.
  """
  L = q_BLHK.shape[1]
  bias = {} if bias_BLL is None else {"bias": bias_BLL[:, None, ago:, : L - ago]}
  fn = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn", **bias)
  out, pull = jax.vjp(fn, q_BLHK[:, ago:], k_BLGK[:, : L - ago], v_BLGK[:, : L - ago])
  shape = (out.shape[0], out.shape[2], out.shape[1])
  leaves = jax.tree.leaves(pull)
  (lse,) = (x for x in leaves if x.shape == shape and x.dtype == jnp.float32)
  assert sum(x is out for x in leaves) == 1, "JAX keeps other things for cuDNN's backward pass than it did"
  if of_both:
    pull = jax.tree.map(lambda x: of_both[0] if x is out else of_both[1] if x is lse else x, pull)
  return (out, lse), pull


def _near(n, x_BLGK, own_BLGK=None):
  """[B, L / n, n or 2 n, G, K]: of each block what it lacks, and with `own` that, behind the block before."""
  B, L, G, K = x_BLGK.shape
  if own_BLGK is None:
    return x_BLGK.reshape(B, L // n, n, G, K)
  before_BLGK = jnp.pad(x_BLGK[:, : L - n], ((0, 0), (n, 0), (0, 0), (0, 0)))
  return jnp.concatenate([x.reshape(B, L // n, n, G, K) for x in (before_BLGK, own_BLGK)], axis=2)


def _near_scores(n, q_BLHK, k_BMJGK, segment_BL):
  """[B, G, H / G, L / n, n, n or 2 n]; `_NEVER` where a query may not look."""
  B, L, H, K = q_BLHK.shape
  _, M, J, G, _ = k_BMJGK.shape
  noised = J > n
  q_BMIGRK = (q_BLHK * K**-0.5).reshape(B, M, n, G, H // G, K)
  scores_BGRMIJ = einsum32("BMIGRK,BMJGK->BGRMIJ", q_BMIGRK, k_BMJGK)
  # Later places, and with `own` all that is behind them; nothing is before the first block.
  allowed_BMIJ: Any = np.arange(J) > np.arange(n)[:, None] + np.zeros((1, M, 1, 1))
  if noised:
    allowed_BMIJ &= (np.arange(J) >= n) | (np.arange(M) > 0)[:, None, None]
  if segment_BL is not None:
    asks_BMI = segment_BL.reshape(-1, M, n)
    before_BMI = jnp.pad(asks_BMI[:, :-1], ((0, 0), (1, 0), (0, 0)))
    key_BMJ = jnp.concatenate([before_BMI, asks_BMI], axis=2) if noised else asks_BMI
    allowed_BMIJ = allowed_BMIJ & (asks_BMI[..., None] == key_BMJ[:, :, None]) & (key_BMJ > 0)[:, :, None]
  return jnp.where(allowed_BMIJ[:, None, None], scores_BGRMIJ, _NEVER)


def _within(scores_BGRMIJ, v_BMJGK, lse_BHL, out_BLHK=None):
  """Float32 part of the result, where `lse_BHL` is that of all there is to see.

  With `out_BLHK`, the whole result, its gradient is that of this part: the softmax's sum is not taken here.
  """
  (B, H, L), K = lse_BHL.shape, v_BMJGK.shape[-1]
  p_BGRMIJ = jnp.exp(scores_BGRMIJ - lse_BHL.reshape(*scores_BGRMIJ.shape[:-1])[..., None])
  found_BLHK = einsum32("BGRMIJ,BMJGK->BMIGRK", p_BGRMIJ.astype(v_BMJGK.dtype), v_BMJGK).reshape(B, L, H, K)
  if out_BLHK is None:
    return found_BLHK
  return found_BLHK - p_BGRMIJ.sum(axis=-1).reshape(B, H, L).transpose(0, 2, 1)[..., None] * out_BLHK


def _begins(segment_BL: jax.Array) -> jax.Array:
  """Bool: where a position is of another segment than the one before it; the first one is."""
  return jnp.pad(segment_BL[:, 1:] != segment_BL[:, :-1], ((0, 0), (1, 0)), constant_values=True)


def _beginnings(segment_BL):
  """Int32 [B, `_DOCUMENTS` + 1]: where the runs of a row begin, padding's too, and L for those that are not there.

  -1 in rows with more of them, or with a document in several.
  """
  L = segment_BL.shape[1]
  new_BL = _begins(segment_BL)
  sorted_BL = jnp.sort(segment_BL, axis=1)
  runs_B, documents_B = new_BL.sum(axis=1), 1 + (sorted_BL[:, 1:] != sorted_BL[:, :-1]).sum(axis=1)
  begin_BL = jnp.pad(jnp.where(new_BL, jnp.arange(L)[None], L), ((0, 0), (0, _DOCUMENTS + 1)), constant_values=L)
  begin_BM = jnp.sort(begin_BL, axis=1)[:, : _DOCUMENTS + 1]
  return jnp.where(((runs_B <= _DOCUMENTS) & (runs_B == documents_B))[:, None], begin_BM, -1)


def _row_of_documents(q_LHK, k_LGK, v_LGK, _, begin_M):
  """A row alone: the workspace is that of one row."""
  L, _, K = q_LHK.shape
  # Beginnings alone, -1 behind them: cuDNN is given as many as there are lengths.
  at_M = jnp.where(begin_M < L, begin_M, -1).at[-1].set(-1).astype(jnp.int32)
  length_M = jnp.where(begin_M[:-1] < L, jnp.diff(begin_M), -1).astype(jnp.int32)
  q_1LHK, k_1LGK, v_1LGK, at_1M, length_1M = (x[None] for x in (q_LHK, k_LGK, v_LGK, at_M, length_M))
  return _cudnn().dot_product_attention(
    q_1LHK, k_1LGK, v_1LGK, q_seqlen=length_1M, kv_seqlen=length_1M, q_offsets=at_1M, kv_offsets=at_1M, scale=K**-0.5,
    mask_type=_cudnn().MaskType.PADDING,
  )[0]  # fmt: skip


def _biased_documents(q_BLHK, k_BLGK, v_BLGK, segment_BL, _):
  allowed_BLL = segment_BL[:, :, None] == segment_BL[:, None, :]
  return jax.nn.dot_product_attention(q_BLHK, k_BLGK, v_BLGK, mask=allowed_BLL[:, None], implementation="cudnn")


@jax.custom_vjp
def _cudnn_documents(q_BLHK, k_BLGK, v_BLGK, segment_BL, begin_BM):
  """Padding looks at padding. Where a row does not fit into the room for its documents, all go by a bias."""

  def rows(*arrays):
    return jax.lax.map(lambda row: _row_of_documents(*row), arrays)

  return jax.lax.cond(begin_BM.min() >= 0, rows, _biased_documents, q_BLHK, k_BLGK, v_BLGK, segment_BL, begin_BM)


def _cudnn_documents_forward(*arrays):
  return checkpoint_name(_cudnn_documents(*arrays), "attention"), arrays


def _cudnn_documents_backward(arrays, cotangent_BLHK):
  """Runs the forward kernel again, an eighth of the time: the two ways to go leave things of different shapes."""

  def pull(fn, q, k, v, segment, begin, cotangent):
    return jax.vjp(lambda *qkv: fn(*qkv, segment, begin), q, k, v)[1](cotangent)

  def rows(*arrays):
    return jax.lax.map(lambda row: pull(_row_of_documents, *row), arrays)

  biased = functools.partial(pull, _biased_documents)
  return *jax.lax.cond(arrays[-1].min() >= 0, rows, biased, *arrays, cotangent_BLHK), None, None


_cudnn_documents.defvjp(_cudnn_documents_forward, _cudnn_documents_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _kept(fn, qkv, rest):
  """fn(*qkv, **rest), with the name "attention" for what its backward pass needs besides these: `remat` may keep it.

  (These are the result and the log-sum-exp. The function that `jax.vjp` returns is a tree of them. `rest` gets no
  gradient. Heads lie end to end while they wait: a TPU would fill up a width of 64 to 128.)
  """
  return fn(*qkv, **rest)


def _kept_forward(fn, qkv, rest):
  out, backward = jax.vjp(lambda *qkv: fn(*qkv, **rest), *qkv)
  given = jax.tree.leaves((qkv, rest))

  def name(x):
    if x.ndim < 2 or x.shape[-1] % 128 == 0:
      return checkpoint_name(x, "attention")
    return checkpoint_name(x.reshape(*x.shape[:-2], -1), "attention").reshape(x.shape)

  named = name(out)
  return named, jax.tree.map(lambda x: named if x is out else x if any(x is y for y in given) else name(x), backward)


_kept.defvjp(_kept_forward, lambda fn, backward, cotangent: (backward(cotangent), None))


def _splash(q_BWHK, k_BLGK, v_BLGK, query_segment_BW=None, segment_BL=None, *, order="full", block=0, interpret=False):
  """Splash attention on one device. Padding looks at padding here: what it sees, nobody does."""
  q_BHWK, k_BGLK, v_BGLK = (x.transpose(0, 2, 1, 3) for x in (q_BWHK * q_BWHK.shape[-1] ** -0.5, k_BLGK, v_BLGK))
  segments = {} if segment_BL is None else {"query_segment_BW": query_segment_BW, "segment_BL": segment_BL}
  fn = functools.partial(_splash_kernel, order=order, block=block, interpret=interpret)
  out_BHWK: Any = _kept(fn, (q_BHWK, k_BGLK, v_BGLK), segments)  # type checkers do not see an array
  return out_BHWK.transpose(0, 2, 1, 3)


def _splash_kernel(q_BHWK, k_BGLK, v_BGLK, query_segment_BW=None, segment_BL=None, *, order, block, interpret):
  from jax.experimental.pallas.ops.tpu import splash_attention  # Pallas takes a while to import

  (_, H, W, _), L = q_BHWK.shape, k_BGLK.shape[2]
  if "blocks" in order:
    mask = _splash_blocks(L, order, block)
  else:
    mask = splash_attention.CausalMask((W, L)) if order == "causal" else splash_attention.FullMask((W, L))
  q_tile, k_tile = (next(n for n in (512, 256, 128) if size % n == 0) for size in (W, L))
  kernel = splash_attention.make_splash_mha(
    splash_attention.MultiHeadMask([mask] * H), head_shards=1, q_seq_shards=1, interpret=interpret,
    block_sizes=splash_attention.BlockSizes(
      block_q=q_tile, block_kv=k_tile, block_kv_compute=k_tile, block_q_dkv=q_tile, block_kv_dkv=k_tile,
      block_kv_dkv_compute=k_tile, block_q_dq=q_tile, block_kv_dq=k_tile,
    ),
  )  # fmt: skip
  if segment_BL is None:
    return jax.vmap(kernel)(q_BHWK, k_BGLK, v_BGLK)
  assert query_segment_BW is not None
  return jax.vmap(kernel)(q_BHWK, k_BGLK, v_BGLK, splash_attention.SegmentIds(query_segment_BW, segment_BL))


@functools.cache
def _splash_blocks(L: int, order: str, block: int) -> Any:
  """The mask of blocks: computed in the kernel, tile by tile, of which the empty ones are left out."""
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

  half = L // 2 if order == "noised blocks" else 0

  def visible(asks, key):
    asks_noised, key_noised = asks < half, key < half

    def number(at, noised):
      if isinstance(at, np.ndarray):
        return (at - np.where(noised, 0, half)) // block
      return jax.lax.div(at - jnp.where(noised, 0, half), jnp.full(at.shape, block, at.dtype))

    return _in_blocks(number(asks, asks_noised), number(key, key_noised), asks_noised, key_noised)

  class Blocks(masks._ComputableMask):
    def __init__(self):
      super().__init__((L, L), visible)

    def __eq__(self, other):
      return isinstance(other, Blocks)

    def __hash__(self):
      return hash((Blocks, L, order, block))

  return Blocks()
