"""The mask predictor: a Transformer without a causal mask that fills in masked tokens (LLaDA, arXiv 2502.09992).

Letters, everywhere in lladax:
  B batch               L canvas length       W window run through the model in this call (W == L without a cache)
  D model width         H query heads         G key/value heads          K head width
  F feed-forward width  V vocabulary (rows of the embedding)             N layers (the stacked axis)
  A answer length       T tokens of a batch, flattened (B * L)

The module is Flax NNX, used functionally: parameters are a plain nested dict whose names do not depend on
Flax, `MaskPredictorConfig.init` makes them and `MaskPredictorConfig.bind` lends them to a MaskPredictor.
"""

import dataclasses
import functools
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from lladax import autoregressive, diffusion
from lladax.devices import sharding
from lladax.mistake import Mistake
from lladax.model import attention, cross_entropy, quantized
from lladax.model.attention import Visible

Params = dict[str, Any]
Cache = dict[str, jax.Array]  # {"k": k_NBLGK, "v": v_NBLGK}

# What the backward pass finds ready; the rest is computed again. Gathered weights are gathered again in every case.
# Only fused kernels name what they leave: of XLA's attention nothing is worth its place.
_ATTENTION = jax.checkpoint_policies.save_only_these_names("attention")
REMAT = {
  "none": jax.checkpoint_policies.save_anything_except_these_names("gathered"),
  "dots": jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _ATTENTION
  ),
  "attention": _ATTENTION,
  "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class MaskPredictorConfig:
  """Shape and numerics of a mask predictor."""

  D: int = 256  # model width
  N: int = 4  # layers
  H: int = 4  # query heads
  G: int = 4  # key/value heads; fewer than H: grouped-query attention
  K: int = 64  # head width
  F: int = 768  # feed-forward width (SwiGLU, three matrices)
  V: int = 0  # rows of the embedding; 0: what the tokenizer needs
  tied: bool = False  # one matrix for embedding and head
  causal: bool = False  # only for the autoregressive baseline
  block: int = 0  # tokens that look at each other, and at all before them; 0: all of the canvas does
  rope_theta: float = 500_000.0  # base of the rotary positions
  norm_eps: float = 1e-5  # added to the mean square in RMSNorm
  max_length: int = 4096  # longest canvas
  # Of the computation: "auto", float32 on a CPU, bfloat16 on accelerators, float16 on GPUs without it | "float32" |
  # "bfloat16" | "float16" (not to train in).
  dtype: str = "auto"
  # The layers' matrices, where they are not trained: "full", as they are | in bits: "int8" | "int4" | "nf4".
  weights: str = "full"
  attention: str = "auto"  # kernel of full passes: "auto", the fastest exact one | "xla" | "cudnn" | "splash"
  # What the backward pass computes again: "none" | "dots" (all but matmuls and fused attention) | "attention" (all but
  # fused attention) | "full" (all).
  remat: str = "none"
  head_chunk: int = 8192  # tokens of a device whose logits exist at once
  lora_rank: int = 0  # of adapters (LoRA, arXiv 2106.09685), which alone are trained then, on init_from; 0: none
  lora_alpha: float = 16.0  # the adapters' product counts alpha / rank times
  lora_targets: tuple[str, ...] = ("q", "k", "v", "out", "gate", "up", "down")  # the matrices that have adapters

  def __post_init__(self):
    for name in "DNHGKF":
      if getattr(self, name) < 1:
        raise Mistake(f"model.{name}={getattr(self, name)}: must be at least 1")
    if self.H % self.G:
      raise Mistake(f"model.H={self.H} is not a multiple of model.G={self.G}: heads share keys in groups")
    if self.K % 2:
      raise Mistake(f"model.K={self.K}: RoPE rotates pairs, the head width must be even")
    if self.remat not in REMAT:
      raise Mistake(f"model.remat={self.remat!r}: use one of {', '.join(REMAT)}")
    if self.attention not in attention.KERNELS:
      raise Mistake(f"model.attention={self.attention!r}: use one of {', '.join(attention.KERNELS)}")
    if self.head_chunk < 1:
      raise Mistake(f"model.head_chunk={self.head_chunk}: must be at least 1")
    if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
      raise Mistake(f"model.dtype={self.dtype!r}: use auto, float32, bfloat16 or float16")
    if self.weights not in quantized.KINDS:
      raise Mistake(f"model.weights={self.weights!r}: use one of {', '.join(quantized.KINDS)}")
    if self.weights in quantized.PAIRED and (self.D % 2 or self.F % 2):
      raise Mistake(f"model.weights={self.weights!r} keeps two values in a byte: model.D={self.D}, model.F={self.F} are"
                    " not both even; use int8")  # fmt: skip
    object.__setattr__(self, "lora_targets", tuple(self.lora_targets))  # JSON knows lists alone
    if self.block < 0:
      raise Mistake(f"model.block={self.block}: must be at least 1, or 0 for the whole canvas")
    if self.lora_rank < 0:
      raise Mistake(f"model.lora_rank={self.lora_rank}: must be at least 1, or 0 for no adapters")
    for name in self.lora_targets:
      if name not in Block.MATRICES:
        raise Mistake(f"model.lora_targets: {name!r} is not one of {', '.join(Block.MATRICES)}")
    if self.lora_rank and not self.lora_targets:
      raise Mistake("model.lora_targets=(): name the matrices that get adapters")

  @property
  def R(self) -> int:
    """The letter of the adapters' rank."""
    return self.lora_rank

  def visible(self, L: int, segment_BL: Any = None, *, W: int = 0, **window: Any) -> Visible:
    """`Visible` in the model's own order; W 0: all of the canvas."""
    return Visible(L, W or L, self.objective.order, segment_BL, block=self.block, **window)

  @property
  def objective(self) -> diffusion.Masked | diffusion.Blocks | autoregressive.Causal:
    """What such a model is trained for; its noise is the config's to say."""
    if self.causal:
      return autoregressive.Causal()
    return diffusion.Blocks(diffusion.NoiseConfig(block=self.block)) if self.block else diffusion.Masked()

  @property
  def compute_dtype(self) -> jnp.dtype:
    """`dtype`, with "auto" resolved for the devices of the mesh, or of the backend at hand."""
    if self.dtype != "auto":
      return jnp.dtype(self.dtype)
    if sharding.platform() == "cpu":
      return jnp.dtype("float32")
    return jnp.dtype("float16" if (sharding.capability() or (8, 0)) < (8, 0) else "bfloat16")

  @property
  def stream_dtype(self) -> jnp.dtype:
    """Of what the layers add up, which outgrows float16 (65504) in trained models: there it is float32."""
    return jnp.dtype("float32") if self.compute_dtype == jnp.float16 else self.compute_dtype

  def check_mesh(self, mesh: jax.sharding.Mesh, length: int = 0) -> None:
    """Raises Mistake if the parameters, or a canvas of that length, cannot be shared out over the mesh."""
    sizes = {letter: size for letter in "DHGFV" if (size := getattr(self, letter))}
    sharding.check_divides(mesh, sizes, length, pairs="DF" if self.weights in quantized.PAIRED else "")

  def init(self, rng: jax.Array) -> Params:
    """New float32 parameters as a plain nested dict. Pure: jit it, or `jax.eval_shape` it."""
    if self.V < 1:
      raise Mistake(f"model.V={self.V}: set the rows of the embedding, as in V=tokenizer.rows")
    return nnx.to_pure_dict(nnx.state(MaskPredictor(self, rngs=nnx.Rngs(rng)), nnx.Param))

  def bind(self, params: Params) -> "MaskPredictor":
    """A MaskPredictor that computes with `params` (inside or outside of jit)."""
    if self.weights != "full":
      matrices = {name: quantized.Matrix(**params["blocks"][name]) for name in Block.MATRICES}
      params = params | {"blocks": params["blocks"] | matrices}
    return nnx.merge(_graph(self), nnx.State(params))

  def letters(self) -> dict[str, Any]:
    """The dimension letters of every parameter, in the tree of the parameters: {"embedding": "VD", ...}."""
    blocks: Params = {name: "N" + letters for name, letters in Block.letters(self).items()}
    if self.weights != "full":
      blocks |= {name: quantized.letters(blocks[name], inputs) for name, inputs in Block.MATRICES.items()}
    return {"embedding": "VD", "blocks": blocks, "final_norm": "D"} | ({} if self.tied else {"head": "DV"})

  def new_cache(self, batch_size: int, length: int) -> Cache:
    """An empty cache of keys and values for canvases [batch_size, length]."""
    shape = (self.N, batch_size, length, self.G, self.K)
    return {name: sharding.constrain(jnp.zeros(shape, self.compute_dtype), ".B.GK") for name in ("k", "v")}

  @property
  def unrolled(self) -> bool:
    """Whether a program has its layers one behind the other, and no loop over them: shallow models, on a CPU."""
    return sharding.platform() == "cpu" and self.N <= 8

  def apart(self, tree: Any) -> Any:
    """Arrays [N, ...] as a list of every layer's, where layers are unrolled; elsewhere as they are.

    XLA's CPU backend copies what it cuts: all weights, in every pass of a loop, unless they are cut before it.
    """
    return [jax.tree.map(operator.itemgetter(i), tree) for i in range(self.N)] if self.unrolled else tree

  def reading(self, cache: Cache) -> Any:
    """A cache as a loop over passes reads it best: cut and turned before, likewise."""
    return [attention.turned(x["k"], x["v"]) for x in self.apart(cache)] if self.unrolled else cache

  def split(self, params: Params) -> tuple[Params, Params]:
    """(what is trained, what is frozen): the adapters and the rest, or all and nothing."""
    if not self.lora_rank:
      return params, {}
    own = {name for name in Block.letters(self) if name not in Block.LETTERS}
    blocks = params["blocks"]
    rest = {name: x for name, x in blocks.items() if name not in own}
    return {"blocks": {name: blocks[name] for name in sorted(own)}}, params | {"blocks": rest}

  def keep(self, name: str, x: jax.Array, dtype: Any, group: int = quantized.GROUP) -> Any:
    """A stacked parameter of the layers where it is not trained: a matrix in the bits of `weights`, else in `dtype`."""
    if self.weights == "full" or name not in Block.MATRICES:
      return x.astype(dtype)
    one = functools.partial(
      quantized.quantize, of_matrix=Block.LETTERS[name], inputs=Block.MATRICES[name], kind=self.weights, group=group
    )
    return jax.lax.map(one, x)  # a layer at a time

  def freeze(self, params: Params, group: int = quantized.GROUP) -> Params:
    """Parameters that are not trained: in the compute dtype, matrices in the bits of `weights`; pure: jit it."""
    dtype = self.compute_dtype
    blocks = {name: self.keep(name, x, dtype, group) for name, x in params["blocks"].items()}
    return {name: x.astype(dtype) for name, x in params.items() if name != "blocks"} | {"blocks": blocks}

  def join(self, trained: Params, frozen: Params) -> Params:
    """The whole again."""
    return frozen | {"blocks": frozen["blocks"] | trained["blocks"]} if self.lora_rank else trained

  def merge(self, trained: Params, frozen: Params) -> tuple["MaskPredictorConfig", Params]:
    """The model without adapters, W + alpha / rank A B in the dtype of W, which is multiplied out; pure: jit it."""
    blocks = dict(frozen["blocks"])
    for name in Block.MATRICES if self.weights != "full" else ():
      blocks[name] = quantized.dequantize(quantized.Matrix(**blocks[name]), self.weights, self.compute_dtype)
    for name in self.lora_targets:
      a, b = (trained["blocks"][f"{name}_{x}"].astype(jnp.float32) for x in "ab")
      w32 = blocks[name].astype(jnp.float32)
      update = jnp.einsum("NIR,NRO->NIO", a.reshape(self.N, -1, self.R), b.reshape(self.N, self.R, -1))
      blocks[name] = (w32 + self.lora_alpha / self.R * update.reshape(w32.shape)).astype(blocks[name].dtype)
    return dataclasses.replace(self, lora_rank=0, weights="full"), frozen | {"blocks": blocks}

  @functools.cache  # noqa: B019  (configs are few, and small)
  def num_params(self, embedding: bool = True) -> int:
    """Parameter count; without `embedding`, neither the embedding nor the head."""
    shapes = jax.eval_shape(self.init, jax.random.key(0))
    total = sum(x.size for x in jax.tree.leaves(shapes))
    return total if embedding else total - (1 if self.tied else 2) * self.V * self.D


@functools.cache
def _graph(c: MaskPredictorConfig) -> nnx.GraphDef:
  return nnx.split(nnx.eval_shape(lambda: MaskPredictor(c, rngs=nnx.Rngs(0))), nnx.Param)[0]


def _weight(
  rngs: nnx.Rngs, c: MaskPredictorConfig, letters: str, width_in: int, scale: float | jax.Array = 1.0
) -> nnx.Param:
  """`mitchell` initialisation: normal, cut at 3 sigma, sigma = 1 / sqrt(width of the input)."""
  shape = tuple(getattr(c, letter) for letter in letters)
  normal = jax.random.truncated_normal(rngs.params(), -3.0, 3.0, shape, jnp.float32)
  return nnx.Param(normal * (scale * width_in**-0.5))


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
  """RMSNorm in float32, cast back to the dtype of `x`, then times the weight (LLaDA's order)."""
  x32 = x.astype(jnp.float32)
  x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
  return x32.astype(x.dtype) * jnp.expand_dims(scale.astype(x.dtype), range(x.ndim - 1))


def rotary(position_BW: Any, c: MaskPredictorConfig, length: int) -> tuple[jax.Array, jax.Array]:
  """Cosine and sine [B, W, 1, K/2] of RoPE in float32, of positions 0 .. `length` - 1; half-split layout."""
  if sharding.platform() == "cpu":
    # A table: where XLA's CPU backend can compute cosines it does so within every loop that turns a query or a key,
    # for each head of each row again, and one by one.
    frequency = np.float32(c.rope_theta) ** (-np.arange(0, c.K, 2, dtype=np.float32) / np.float32(c.K))
    angle = np.arange(length, dtype=np.float32)[:, None] * frequency
    cos, sin = (jnp.asarray(f(angle)).at[position_BW].get(mode="fill", fill_value=jnp.nan) for f in (np.cos, np.sin))
    return cos[:, :, None], sin[:, :, None]
  frequency = c.rope_theta ** (-jnp.arange(0, c.K, 2, dtype=jnp.float32) / c.K)
  angle = position_BW.astype(jnp.float32)[:, :, None, None] * frequency[None, None, None, :]
  return jnp.cos(angle), jnp.sin(angle)


def rotate(x_BWHK: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Rotates the pairs (k, k + K/2) in float32, and casts back."""
  a, b = jnp.split(x_BWHK.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BWHK.dtype)


def _aligned(x: jax.Array, letters: str) -> jax.Array:
  """On a GPU, with zeros behind an F that is no multiple of 8: it has no fast matmuls for such (LLaDA 1B's 5634).

  What the zeros stand for is silu(0) * 0, and nothing of it comes out of `down`. A mesh's parts of F are padded each.
  """
  parts = sharding.axis_size("tensor")
  F = x.shape[letters.index("F")] // parts if "F" in letters else 0
  if sharding.platform() != "gpu" or F % 8 == 0:
    return x
  axis = letters.index("F")
  before, behind = x.shape[:axis], x.shape[axis + 1 :]
  pad = [(0, 0)] * (axis + 1) + [(0, -F % 64)] + [(0, 0)] * len(behind)
  return jnp.pad(x.reshape(*before, parts, F, *behind), pad).reshape(*before, -1, *behind)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _look_up(embedding_VD: jax.Array, tokens_BW: jax.Array, V: int) -> jax.Array:
  """Rows of the embedding, whose gradient adds up in float32 and is rounded once.

  In bfloat16 the sum for [MASK], half of all tokens, would soon stand still, and a GPU, which has no such addition in
  memory, would spend a twentieth of a step on it. Devices that hold parts of the width look them up for each other:
  activations travel, a fraction of the matrix, and of its gradient each device makes its part and no more.
  """
  return sharding.constrain(embedding_VD[sharding.constrain(tokens_BW, "CL")], "CLD")


def _look_up_forward(embedding_VD, tokens_BW, V):
  return _look_up(embedding_VD, tokens_BW, V), tokens_BW


def _look_up_backward(V, tokens_BW, gradient_BWD):
  zeros_VD = sharding.constrain(jnp.zeros((V, gradient_BWD.shape[-1]), jnp.float32), "VD")
  gradient_BWD = sharding.constrain(gradient_BWD, "CLD")
  sum_VD = zeros_VD.at[sharding.constrain(tokens_BW, "CL")].add(gradient_BWD.astype(jnp.float32))
  return sharding.constrain(sum_VD, "VD").astype(gradient_BWD.dtype), None


_look_up.defvjp(_look_up_forward, _look_up_backward)


class Block(nnx.Module):
  """x += out(attention(norm(x))); x += down(silu(gate(norm(x))) * up(norm(x)))."""

  LETTERS = {
    "attention_norm": "D", "q": "DHK", "k": "DGK", "v": "DGK", "out": "HKD",
    "ff_norm": "D", "gate": "DF", "up": "DF", "down": "FD",
  }  # fmt: skip
  MATRICES = {
    "q": "D",
    "k": "D",
    "v": "D",
    "out": "HK",
    "gate": "D",
    "up": "D",
    "down": "F",
  }  # and their input's letters

  @classmethod
  def letters(cls, c: MaskPredictorConfig) -> dict[str, str]:
    """The dimension letters of a layer's parameters; of a matrix's adapters, NAME_a and NAME_b, too."""
    found = dict(cls.LETTERS)
    for name in c.lora_targets if c.lora_rank else ():
      inputs = cls.MATRICES[name]
      found |= {name + "_a": inputs + "R", name + "_b": "R" + cls.LETTERS[name].removeprefix(inputs)}
    return found

  def __init__(self, c: MaskPredictorConfig, depth: jax.Array, *, rngs: nnx.Rngs):
    self.c = c
    residual = (2.0 * (depth + 1)) ** -0.5  # what is added to the stream shrinks with depth
    self.attention_norm = nnx.Param(jnp.ones(c.D))
    self.q = _weight(rngs, c, "DHK", c.D)
    self.k = _weight(rngs, c, "DGK", c.D)
    self.v = _weight(rngs, c, "DGK", c.D)
    self.out = _weight(rngs, c, "HKD", c.H * c.K, residual)
    self.ff_norm = nnx.Param(jnp.ones(c.D))
    self.gate = _weight(rngs, c, "DF", c.D)
    self.up = _weight(rngs, c, "DF", c.D)
    self.down = _weight(rngs, c, "FD", c.F, residual)
    for name, letters in Block.letters(c).items():
      if name.endswith("_a"):
        setattr(self, name, _weight(rngs, c, letters, math.prod(getattr(c, letter) for letter in letters[:-1])))
      elif name.endswith("_b"):
        setattr(self, name, nnx.Param(jnp.zeros([getattr(c, letter) for letter in letters])))

  def weight(self, name: str, dtype: jnp.dtype) -> jax.Array:
    """A parameter in the compute dtype, gathered along its width: cast first, so that half the bytes travel."""
    letters = Block.letters(self.c)[name]
    gathered = sharding.gather(getattr(self, name)[...].astype(dtype), letters)
    # Beside matrices in bits, which are not padded, adapters are not either.
    return checkpoint_name(_aligned(gathered, letters) if self.c.weights == "full" else gathered, "gathered")

  def __call__(self, x_BWD, cache: Any, *, cos, sin, start, attend):
    """Returns the new stream, and the layer's keys and values over the canvas if there is a cache to write.

    `start` None: the cache is read only, it comes `attention.turned`, and the window's own keys stand behind it.
    """
    c, dtype, stream_dtype = self.c, self.c.compute_dtype, x_BWD.dtype

    def project(x, name, letters, out_dtype=dtype):  # the axes behind B and W times the weight, to these letters
      x_BWI = x.reshape(*x.shape[:2], -1)
      x_I = cross_entropy.flat(x_BWI) if sharding.axis_size("context") == 1 else x_BWI
      out: Any
      if c.weights == "full":
        weight = self.weight(name, dtype).reshape(x_BWI.shape[-1], -1)
        out = jnp.matmul(x_I, weight, preferred_element_type=out_dtype)
      else:
        out = quantized.matmul(x_I, getattr(self, name).get_value(), c.weights, Block.LETTERS[name], out_dtype)
      if c.lora_rank and name in c.lora_targets:
        low = x_I @ self.weight(name + "_a", dtype).reshape(-1, c.R)
        out += (c.lora_alpha / c.R) * (low @ self.weight(name + "_b", dtype).reshape(c.R, -1))
      widths = (-1,) if letters == "F" else (getattr(c, letter) for letter in letters)  # F may be padded
      out = out.reshape(*x.shape[:2], *widths)
      return sharding.constrain(out, "BL" + letters)

    n_BWD = rms_norm(x_BWD, self.weight("attention_norm", dtype), c.norm_eps).astype(dtype)
    q_BWHK = rotate(project(n_BWD, "q", "HK"), cos, sin)
    k_BLGK = rotate(project(n_BWD, "k", "GK"), cos, sin)
    v_BLGK = project(n_BWD, "v", "GK")
    cached = None
    if cache is not None and start is None:
      cached, cache = cache, None
    elif cache is not None:
      k_BLGK = jax.lax.dynamic_update_slice_in_dim(cache["k"], k_BLGK, start, axis=1)
      v_BLGK = jax.lax.dynamic_update_slice_in_dim(cache["v"], v_BLGK, start, axis=1)
      cache = {"k": k_BLGK, "v": v_BLGK}
    # A mesh may slice the canvas: keys and values are gathered, queries stay.
    k_BLGK, v_BLGK = sharding.constrain(k_BLGK, "B.GK"), sharding.constrain(v_BLGK, "B.GK")
    mixed_BWHK = attend(q_BWHK, k_BLGK, v_BLGK, cached=cached)
    x_BWD = x_BWD + project(mixed_BWHK, "out", "D", stream_dtype)

    n_BWD = rms_norm(x_BWD, self.weight("ff_norm", dtype), c.norm_eps).astype(dtype)
    inner_BWF = jax.nn.silu(project(n_BWD, "gate", "F", stream_dtype)) * project(n_BWD, "up", "F", stream_dtype)
    if dtype != stream_dtype:  # a product that float16 cannot say is its largest number, not infinity
      most = jnp.finfo(dtype).max
      inner_BWF = jnp.clip(inner_BWF, -most, most).astype(dtype)
    return x_BWD + project(inner_BWF, "down", "D", stream_dtype), cache


class MaskPredictor(nnx.Module):
  """p(x_0 | x_t): for every position of a partly masked canvas, a distribution over the vocabulary."""

  def __init__(self, c: MaskPredictorConfig, *, rngs: nnx.Rngs):
    self.c = c

    @nnx.split_rngs(splits=c.N)
    @nnx.vmap(in_axes=(0, 0), out_axes=0, transform_metadata={nnx.PARTITION_NAME: "N"})
    def create(rngs, depth):
      return Block(c, depth, rngs=rngs)

    self.embedding = _weight(rngs, c, "VD", c.D)
    self.blocks = create(rngs, jnp.arange(c.N))
    self.final_norm = nnx.Param(jnp.ones(c.D))
    if not c.tied:
      self.head = _weight(rngs, c, "DV", c.D)

  def hidden(
    self, tokens_BW: jax.Array, visible: Visible | None = None, position_BL: jax.Array | None = None,
    cache: Any = None, layers: Any = None,
  ) -> tuple[jax.Array, Any]:  # fmt: skip
    """Runs the blocks over a window of the canvas.

    Args:
      tokens_BW: int32 ids at the canvas positions of the window.
      visible: who may look at whom, and which part of the canvas is run; None: all of it, one document a row.
      position_BL: int32 positions for RoPE, less than L (B may be 1); None: 0 .. L - 1.
      cache: keys and values of the canvas, L positions; the window's are replaced, or, with `visible.reuse_L`, none
        are: those that are not reused must be the window's then. None: the window is the canvas.
      layers: `self.blocks`, as `MaskPredictorConfig.apart` left them before a loop over calls; the cache may have been
        through `reading`.

    Returns:
      (hidden_BWD after the final norm, the cache or None).
    """
    c = self.c
    B, W = tokens_BW.shape
    visible = c.visible(W) if visible is None else visible
    assert visible.W == W and (cache is not None or visible.L == W)
    position_BW = visible.window(jnp.arange(visible.L)[None] if position_BL is None else position_BL)
    cos, sin = rotary(position_BW, c, visible.L)
    if visible.segment_BL is not None:  # kernels read a row each
      visible = dataclasses.replace(visible, segment_BL=jnp.broadcast_to(visible.segment_BL, (B, visible.L)))
    kernel = attention.choose(
      c.attention, visible, K=c.K, dtype=c.compute_dtype, platform=sharding.platform(),
      capability=sharding.capability(), context=sharding.axis_size("context"),
    )  # fmt: skip
    reads = visible.reuse_L is not None
    write_at = None if reads else visible.start
    attend = functools.partial(
      attention.attend, visible=visible.drawn(kernel, c.compute_dtype), kernel=kernel,
      on_each_device=sharding.on_each_device,
    )  # fmt: skip

    def body(x_BWD, layer):
      block, layer_cache = layer
      if reads and isinstance(layer_cache, dict):
        layer_cache = attention.turned(layer_cache["k"], layer_cache["v"])
      x_BWD, layer_cache = block(x_BWD, layer_cache, cos=cos, sin=sin, start=write_at, attend=attend)
      return sharding.constrain(x_BWD, "BLD"), layer_cache

    if c.remat != "none" or sharding.axis_size("fsdp") > 1:
      body = jax.checkpoint(body, policy=REMAT[c.remat], prevent_cse=False)
    x_BWD = sharding.constrain(_look_up(self.embedding[...].astype(c.compute_dtype), tokens_BW, c.V), "BLD")
    x_BWD = x_BWD.astype(c.stream_dtype)
    if isinstance(layers, list):
      caches, written = cache if isinstance(cache, list) else c.apart(cache), []
      for layer in zip(layers, caches, strict=True):
        x_BWD, layer_cache = body(x_BWD, layer)
        written.append(layer_cache)
      written = jax.tree.map(lambda *x: jnp.stack(x), *written)
    else:
      # XLA's CPU backend copies the residuals of a loop into stacked arrays: unrolled, a step takes 0.75 of the time.
      x_BWD, written = jax.lax.scan(body, x_BWD, (self.blocks, cache), unroll=c.N if c.unrolled else 1)
    final_norm_D = sharding.gather(self.final_norm[...], "D")
    return rms_norm(x_BWD, final_norm_D, c.norm_eps).astype(c.compute_dtype), cache if reads else written

  def head_DV(self, dtype: jnp.dtype) -> jax.Array:
    """The matrix from hidden states to logits, gathered along its width."""
    if self.c.tied:
      return sharding.gather(self.embedding[...].astype(dtype), "VD").T
    return sharding.gather(self.head[...].astype(dtype), "DV")

  def logits(self, hidden: jax.Array) -> jax.Array:
    """Float32 logits [..., V] of hidden states [..., D]."""
    return cross_entropy.logits(hidden, self.head_DV(hidden.dtype))

  def __call__(self, tokens_BL: jax.Array, visible: Visible | None = None, position_BL=None) -> jax.Array:
    """Float32 logits [B, L, V]; see `hidden` for the arguments."""
    return self.logits(self.hidden(tokens_BL, visible, position_BL)[0])

  def seen(self, input_BL, visible: Visible | None = None, clean_BL=None) -> jax.Array:
    """`hidden` of the input; of its blocks, given the clean ones before each, by one pass over both."""
    if clean_BL is None:
      return self.hidden(input_BL, visible)[0]
    L = input_BL.shape[1]
    visible = self.c.visible(L) if visible is None else visible
    both_BL = sharding.constrain(jnp.concatenate([input_BL, clean_BL], axis=1), "BL")
    position_1L = jnp.tile(jnp.arange(L)[None], (1, 2))
    return sharding.constrain(self.hidden(both_BL, visible.doubled(), position_1L)[0][:, :L], "BLD")

  def nll(self, input_BL, target_BL, visible: Visible | None = None, *, clean_BL=None) -> jax.Array:
    """Cross-entropy in nats of `target` given `input`, float32 [B, L]; 0 where the target is negative.

    Args:
      input_BL: int32 ids that the model sees.
      target_BL: int32 ids to score, negative where nothing is asked.
      visible: as in `hidden`.
      clean_BL: int32, of a model of blocks: what each block of the input sees of those before it; None: the input.
    """
    hidden_BLD = self.seen(input_BL, visible, clean_BL)
    return cross_entropy.nll(self.head_DV(hidden_BLD.dtype), hidden_BLD, target_BL, chunk=self.c.head_chunk)

  def weighted_nll(
    self, input_BL, target_BL, weight_BL, visible: Visible | None = None, *, clean_BL=None, per_pair: int | None = None
  ) -> tuple[jax.Array, jax.Array]:
    """(the sum of weight x cross-entropy, the cross-entropies [B, L]), to train on: only the sum has a gradient.

    Args:
      input_BL: int32 ids that the model sees.
      target_BL: int32 ids to score, negative where nothing is asked.
      weight_BL: float32, what each of them counts.
      visible: as in `hidden`.
      clean_BL: as in `nll`.
      per_pair: at most so many targets are asked of each two neighbouring rows: the head then runs on
        those only. (With exact counts and antithetic times it is L + 1 of 2 L.)
    """
    hidden_BLD = self.seen(input_BL, visible, clean_BL)
    loss = functools.partial(cross_entropy.weighted_nll, self.head_DV(hidden_BLD.dtype), chunk=self.c.head_chunk)
    if per_pair is None:
      return loss(hidden_BLD, target_BL, weight_BL)
    B, L = input_BL.shape
    hidden_BLD = sharding.constrain(hidden_BLD, "B.D")
    asked_PA = jnp.argsort(target_BL.reshape(B // 2, 2 * L) < 0, axis=1, stable=True)[:, :per_pair]
    # Gathers and scatters within a pair: rows never leave their device, and no position is hit twice.
    unique = {"unique_indices": True, "indices_are_sorted": False, "mode": "promise_in_bounds"}
    pick = jax.vmap(lambda x_S, at_A: x_S.at[at_A].get(**unique))
    pairs = (x.reshape(B // 2, 2 * L, *x.shape[2:]) for x in (hidden_BLD, target_BL, weight_BL))
    total, nll_PA = loss(*(pick(x_PS, asked_PA) for x_PS in pairs))
    put = jax.vmap(lambda nll_A, at_A: jnp.zeros(2 * L).at[at_A].set(nll_A, **unique))
    return total, put(nll_PA, asked_PA).reshape(B, L)
