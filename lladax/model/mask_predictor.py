"""The mask predictor: a Transformer without a causal mask that fills in masked tokens (LLaDA, arXiv 2502.09992).

Letters, everywhere in lladax:
  B batch               L canvas length       W window run through the model in this call (W == L without a cache)
  D model width         H query heads         G key/value heads          K head width
  F feed-forward width  V vocabulary (rows of the embedding)             N layers (the stacked axis)
  E experts             J of them that a token is given to               X width of an expert, S of the shared one
  A answer length       T tokens of a batch, flattened (B * L)           R rank of adapters

The module is Flax NNX, used functionally: parameters are a plain nested dict whose names do not depend on
Flax, `MaskPredictorConfig.init` makes them and `MaskPredictorConfig.bind` lends them to a MaskPredictor. Layers of one
kind are a stack: "blocks", and before it "first", where the first layers of a model with experts are dense.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from lladax import autoregressive, diffusion
from lladax.devices import sharding
from lladax.mistake import Mistake
from lladax.model import attention, cross_entropy, experts, quantized, rope
from lladax.model.attention import Visible

Params = dict[str, Any]
Cache = dict[str, jax.Array]  # {"k": k_NBLGK, "v": v_NBLGK}

# What makes a whole weight of a device's part of it, filled up for its GPU.
_GATHERS = ("sharding_constraint", "all_gather", "reshape", "pad")


def _all_but_gathered(primitive, *_, **params) -> bool:
  """As JAX's `save_anything_except_these_names`, which in 0.10.2 is true of everything."""
  inner = getattr(params.get("call_jaxpr"), "eqns", ())  # of `sharding.gather`, which has a gradient of its own
  gathers = primitive.name in _GATHERS or (inner and all(x.primitive.name in _GATHERS for x in inner))
  return not gathers and params.get("name") != "gathered"


# What the backward pass finds ready; the rest is computed again. Gathered weights are gathered again in every case.
# Only fused kernels name what they leave: of XLA's attention nothing is worth its place; and experts the products of
# their rows, which no policy for matmuls sees.
_ATTENTION = jax.checkpoint_policies.save_only_these_names("attention", "grouped")
REMAT = {
  "none": _all_but_gathered,
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
  # What is read and predicted: False, the state at i predicts token i | True, token i + 1, as in models that were
  # autoregressive (Dream, Fast-dLLM v2); of a causal one, that nobody sees the token it is begun with (Llama, Qwen).
  shift: bool = False
  qk_norm: bool = False  # queries and keys are normed, each head by itself
  qkv_bias: bool = False  # queries, keys and values have biases
  rope_theta: float = 500_000.0  # base of the rotary positions
  rotary: int = 0  # of a head's K so many, the first ones, are rotated; 0: all
  # How positions behind rope_length are made to look like earlier ones: "none" | "linear" | "yarn" (arXiv 2309.00071) |
  # "llama3".
  rope_scaling: str = "none"
  rope_factor: float = 1.0  # by so much
  rope_length: int = 0  # longest canvas before it was stretched; of "yarn" and "llama3"
  # Pairs that turn less often than the first number within rope_length are stretched, those that turn more often than
  # the second are not.
  rope_turns: tuple[float, float] = (1.0, 32.0)
  rope_attention: float = 0.0  # of "yarn", what cosines and sines are multiplied by; 0: 0.1 ln(rope_factor) + 1
  norm_eps: float = 1e-5  # added to the mean square in RMSNorm
  max_length: int = 4096  # longest canvas
  E: int = 0  # experts, in place of the feed-forward of F; 0: none
  J: int = 0  # so many of them a token is given to
  X: int = 0  # width of an expert
  S: int = 0  # width of the shared expert, which all tokens go through; 0: none
  dense: int = 0  # of a model with experts: so many layers, the first ones, have none
  router: str = "softmax"  # how the experts' scores become weights: "softmax" over all (LLaDA-MoE) | "sigmoid" (LLaDA2)
  router_bias: bool = False  # a bias for each expert that chooses, and does not weigh
  router_groups: int = 0  # neighbouring experts are a group; the best groups alone are chosen from; 0: no groups
  router_topk_groups: int = 0  # so many groups; a group scores as its two best
  router_renormalise: bool = False  # the weights of the chosen sum to 1
  router_scale: float = 1.0  # and are multiplied by this
  balance: float = 0.0  # weight of the auxiliary loss that balances the experts' loads (LLaDA-MoE: 0.01)
  balance_rate: float = 0.0  # a step of the choosing bias towards balance, after each update (Ling: 1e-3)
  z_loss: float = 0.0  # weight of the router's squared log-sum-exp (LLaDA-MoE: 0.001)
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
    for name in (*"DNHGKF", "max_length"):
      if getattr(self, name) < 1:
        raise Mistake(f"model.{name}={getattr(self, name)}: must be at least 1")
    if self.H % self.G:
      raise Mistake(f"model.H={self.H} is not a multiple of model.G={self.G}: heads share keys in groups")
    self._check_experts()
    object.__setattr__(self, "rope_turns", tuple(self.rope_turns))  # JSON knows lists alone
    rope.check(self)
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
    object.__setattr__(self, "lora_targets", tuple(self.lora_targets))
    if self.block < 0:
      raise Mistake(f"model.block={self.block}: must be at least 1, or 0 for the whole canvas")
    if self.lora_rank < 0:
      raise Mistake(f"model.lora_rank={self.lora_rank}: must be at least 1, or 0 for no adapters")
    for name in self.lora_targets:
      if name not in Block.MATRICES:
        raise Mistake(f"model.lora_targets: {name!r} is not one of {', '.join(Block.MATRICES)}")
    if self.lora_rank and not self.lora_targets:
      raise Mistake("model.lora_targets=(): name the matrices that get adapters")

  def _check_experts(self):
    for name in (
      "E",
      "J",
      "X",
      "S",
      "dense",
      "router_groups",
      "router_topk_groups",
      "balance",
      "balance_rate",
      "z_loss",
    ):
      if not getattr(self, name) >= 0:
        raise Mistake(f"model.{name}={getattr(self, name)}: must be at least 0")
    if not self.E:
      needs = (
        "J",
        "X",
        "S",
        "dense",
        "router_bias",
        "router_groups",
      )  # what balances may be of a base's: `check_trains`
      if name := next((name for name in needs if getattr(self, name)), None):
        raise Mistake(f"model.{name}={getattr(self, name)}: there are no experts: set model.E, or leave it out")
      return
    if self.router not in ("softmax", "sigmoid"):
      raise Mistake(f"model.router={self.router!r}: use softmax or sigmoid")
    if not 1 <= self.J <= self.E:
      raise Mistake(f"model.J={self.J}: a token is given to at least 1 of model.E={self.E} experts, and at most to all")
    if self.X < 1:
      raise Mistake(f"model.X={self.X}: an expert has a width of at least 1")
    if self.dense >= self.N:
      raise Mistake(f"model.dense={self.dense}: of model.N={self.N} layers at least one has experts")
    groups, kept = self.router_groups, self.router_topk_groups
    if groups and (self.E % groups or self.E // groups < 2):
      raise Mistake(
        f"model.router_groups={groups} does not divide model.E={self.E} into groups of at least two experts"
      )
    if groups and not (1 <= kept <= groups and self.J <= self.E // groups * kept):
      raise Mistake(
        f"model.router_topk_groups={kept}: of model.router_groups={groups} so many are kept that"
        f" model.J={self.J} experts are in them"
      )
    if kept and not groups:
      raise Mistake(f"model.router_topk_groups={kept}: there are no groups: set model.router_groups too")
    if self.balance_rate and not self.router_bias:
      raise Mistake(f"model.balance_rate={self.balance_rate} moves the choosing bias: set model.router_bias=True")
    if self.weights != "full":
      raise Mistake(f"model.weights={self.weights!r}: experts are not kept in bits; use full")

  @property
  def stacks(self) -> dict[str, "MaskPredictorConfig"]:
    """Layers of one kind, from the first to the last: the name of their parameters, and what they are."""
    if not self.dense:
      return {"blocks": self}
    none = {"E": 0, "J": 0, "X": 0, "S": 0, "dense": 0, "router_bias": False, "router_groups": 0}
    none |= {"router_topk_groups": 0, "balance": 0.0, "balance_rate": 0.0, "z_loss": 0.0}
    first = dataclasses.replace(self, N=self.dense, **none)
    return {"first": first, "blocks": dataclasses.replace(self, N=self.N - self.dense, dense=0)}

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
    letters = "DHGV" + "ES" * (self.E > 0) + "F" * (not self.E or self.dense > 0)
    sizes = {letter: size for letter in letters if (size := getattr(self, letter))}
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
    stacks: Params = {}
    for stack, c in self.stacks.items():
      stacks[stack] = {name: "N" + letters for name, letters in Block.letters(c).items()}
      if c.weights != "full":
        stacks[stack] |= {name: quantized.letters("N" + Block.LETTERS[name], x) for name, x in Block.MATRICES.items()}
    return {"embedding": "VD", **stacks, "final_norm": "D"} | ({} if self.tied else {"head": "DV"})

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
    trained, rest = {}, {}
    for stack, c in self.stacks.items():
      given, own = params[stack], Block.letters(c).keys() - Block.own(c).keys()
      trained[stack] = {name: given[name] for name in sorted(own)}
      rest[stack] = {name: x for name, x in given.items() if name not in own}
    return trained, params | rest

  def keep(self, name: str, x: jax.Array, dtype: Any, group: int = quantized.GROUP) -> Any:
    """A stacked parameter of the layers where it is not trained: a matrix in the bits of `weights`, else in `dtype`."""
    if self.weights == "full" or name not in Block.MATRICES:
      return x if name in experts.FLOAT32 else x.astype(dtype)
    one = functools.partial(
      quantized.quantize, of_matrix=Block.LETTERS[name], inputs=Block.MATRICES[name], kind=self.weights, group=group
    )
    return jax.lax.map(one, x)  # a layer at a time

  def freeze(self, params: Params, group: int = quantized.GROUP) -> Params:
    """Parameters that are not trained: in the compute dtype, matrices in the bits of `weights`; pure: jit it."""
    dtype = self.compute_dtype
    stacks = {
      stack: {name: self.keep(name, x, dtype, group) for name, x in params[stack].items()} for stack in self.stacks
    }
    return {name: x.astype(dtype) for name, x in params.items() if name not in stacks} | stacks

  def join(self, trained: Params, frozen: Params) -> Params:
    """The whole again."""
    if not self.lora_rank:
      return trained
    return frozen | {stack: frozen[stack] | trained[stack] for stack in self.stacks}

  def merge(self, trained: Params, frozen: Params) -> tuple["MaskPredictorConfig", Params]:
    """The model without adapters, W + alpha / rank A B in the dtype of W, which is multiplied out; pure: jit it."""
    stacks = {stack: dict(frozen[stack]) for stack in self.stacks}
    for stack, c in self.stacks.items():
      merged = stacks[stack]
      for name in Block.MATRICES if self.weights != "full" else ():
        merged[name] = quantized.dequantize(quantized.Matrix(**merged[name]), self.weights, self.compute_dtype)
      for name in Block.adapted(c):
        a, b = (trained[stack][f"{name}_{x}"].astype(jnp.float32) for x in "ab")
        each = a.shape[: 1 + name.startswith("experts")]  # layers, and experts
        update = a.reshape(*each, -1, self.R) @ b.reshape(*each, self.R, -1)
        w32 = merged[name].astype(jnp.float32)
        merged[name] = (w32 + self.lora_alpha / self.R * update.reshape(w32.shape)).astype(merged[name].dtype)
    return dataclasses.replace(self, lora_rank=0, weights="full"), frozen | stacks

  @functools.cache  # noqa: B019  (configs are few, and small)
  def num_params(self, embedding: bool = True, *, active: bool = False) -> int:
    """Parameter count; without `embedding`, neither the embedding nor the head; `active`: of those a token meets.

    The bias that only chooses experts is none, as in the published counts.
    """
    shapes = jax.eval_shape(self.init, jax.random.key(0))
    total = 0
    for path, x in jax.tree_util.tree_leaves_with_path(shapes):
      name = str(getattr(path[-1], "key", ""))
      met = x.size // self.E * self.J if active and name.startswith("experts") else x.size
      total += 0 if name == "choice" else met
    return total if embedding else total - (1 if self.tied else 2) * self.V * self.D


# The fields that parameters come with: a run that begins with those of another takes them over.
SHAPE = (
  "D", "N", "H", "G", "K", "F", "V", "tied", "shift", "qk_norm", "qkv_bias", "rope_theta", "rotary", "rope_scaling",
  "rope_factor", "rope_length", "rope_turns", "rope_attention", "norm_eps", "max_length", "E", "J", "X", "S", "dense",
  "router", "router_bias", "router_groups", "router_topk_groups", "router_renormalise", "router_scale",
)  # fmt: skip


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
  """x += out(attention(norm(x))); x += down(silu(gate(norm(x))) * up(norm(x))), or experts that do the like."""

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
  # What some models have besides, or in the place of gate, up and down; matrices with their input's letters.
  HEAD_NORMS = {"q_norm": "K", "k_norm": "K"}
  BIASES = {"q_bias": "HK", "k_bias": "GK", "v_bias": "GK"}
  SHARED = {"shared_gate": "DS", "shared_up": "DS", "shared_down": "SD"}
  INPUTS = MATRICES | experts.MATRICES | {name: letters[0] for name, letters in SHARED.items()}

  @classmethod
  def own(cls, c: MaskPredictorConfig) -> dict[str, str]:
    """The dimension letters of a layer's parameters, without adapters."""
    found = cls.LETTERS | (cls.HEAD_NORMS if c.qk_norm else {}) | (cls.BIASES if c.qkv_bias else {})
    if not c.E:
      return found
    found = {name: letters for name, letters in found.items() if "F" not in letters}
    of_experts = {name: x for name, x in experts.LETTERS.items() if name != "choice" or c.router_bias}
    return found | of_experts | (cls.SHARED if c.S else {})

  @classmethod
  def adapted(cls, c: MaskPredictorConfig) -> list[str]:
    """The matrices that have adapters: "gate", "up" and "down" name those of experts, too."""
    found = [name for name in cls.own(c) if name in cls.INPUTS] if c.lora_rank else []
    return [name for name in found if name.rpartition("_")[2] in c.lora_targets]

  @classmethod
  def letters(cls, c: MaskPredictorConfig) -> dict[str, str]:
    """`own`, and of a matrix's adapters, NAME_a and NAME_b, too."""
    found = cls.own(c)
    for name in cls.adapted(c):
      each, inputs = "E" * name.startswith("experts"), cls.INPUTS[name]
      outputs = found[name].removeprefix(each + inputs)
      found = found | {name + "_a": each + inputs + "R", name + "_b": each + "R" + outputs}
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
    for name, letters in Block.letters(c).items():
      shape = [getattr(c, letter) for letter in letters]
      kind = name.rpartition("_")[2]
      if name.endswith("_a"):  # of each expert alone
        setattr(self, name, _weight(rngs, c, letters, math.prod(getattr(c, x) for x in letters[:-1].lstrip("E"))))
      elif name == "choice" or kind in ("b", "bias"):
        setattr(self, name, nnx.Param(jnp.zeros(shape)))
      elif name in Block.HEAD_NORMS:
        setattr(self, name, nnx.Param(jnp.ones(shape)))
      elif not hasattr(self, name):  # router, gate, up, down
        inputs = Block.INPUTS.get(name, "D")
        setattr(self, name, _weight(rngs, c, letters, getattr(c, inputs), residual if kind == "down" else 1.0))

  def weight(self, name: str, dtype: jnp.dtype) -> jax.Array:
    """A parameter in the compute dtype, gathered along its width: cast first, so that half the bytes travel."""
    letters = Block.letters(self.c)[name]
    gathered = sharding.gather(getattr(self, name)[...].astype(dtype), letters)
    # Beside matrices in bits, which are not padded, adapters are not either.
    return checkpoint_name(_aligned(gathered, letters) if self.c.weights == "full" else gathered, "gathered")

  def __call__(self, x_BWD, cache: Any, *, cos, sin, start, attend, counted_BW):
    """The new stream, the layer's keys and values over the canvas if there is a cache to write, and its statistics.

    `start` None: the cache is read only, it comes `attention.turned`, and the window's own keys stand behind it.
    """
    c, dtype, stream_dtype, adapted = self.c, self.c.compute_dtype, x_BWD.dtype, Block.adapted(self.c)

    def project(x, name, letters, out_dtype=dtype):  # the axes behind B and W times the weight, to these letters
      x_BWI = x.reshape(*x.shape[:2], -1)
      x_I = cross_entropy.flat(x_BWI) if sharding.axis_size("context") == 1 else x_BWI
      out: Any
      if c.weights == "full":
        weight = self.weight(name, dtype).reshape(x_BWI.shape[-1], -1)
        out = jnp.matmul(x_I, weight, preferred_element_type=out_dtype)
      else:
        out = quantized.matmul(x_I, getattr(self, name).get_value(), c.weights, Block.LETTERS[name], out_dtype)
      if name + "_bias" in Block.BIASES and c.qkv_bias:
        out += jnp.expand_dims(self.weight(name + "_bias", out_dtype).reshape(-1), range(out.ndim - 1))
      if name in adapted:
        low = x_I @ self.weight(name + "_a", dtype).reshape(-1, c.R)
        out += (c.lora_alpha / c.R) * (low @ self.weight(name + "_b", dtype).reshape(c.R, -1))
      widths = (-1,) if letters == "F" else (getattr(c, letter) for letter in letters)  # F may be padded
      out = out.reshape(*x.shape[:2], *widths)
      return sharding.constrain(out, "BL" + letters)

    n_BWD = rms_norm(x_BWD, self.weight("attention_norm", dtype), c.norm_eps).astype(dtype)
    q_BWHK, k_BLGK = project(n_BWD, "q", "HK"), project(n_BWD, "k", "GK")
    if c.qk_norm:
      q_BWHK = rms_norm(q_BWHK, self.weight("q_norm", dtype), c.norm_eps)
      k_BLGK = rms_norm(k_BLGK, self.weight("k_norm", dtype), c.norm_eps)
    q_BWHK, k_BLGK = rope.turn(q_BWHK, cos, sin), rope.turn(k_BLGK, cos, sin)
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

    def feed_forward(n_BWD, of="", width="F"):
      gate, up = (project(n_BWD, of + name, width, stream_dtype) for name in ("gate", "up"))
      inner = jax.nn.silu(gate) * up
      if dtype != stream_dtype:  # a product that float16 cannot say is its largest number, not infinity
        most = jnp.finfo(dtype).max
        inner = jnp.clip(inner, -most, most).astype(dtype)
      return project(inner, of + "down", "D", stream_dtype)

    n_BWD = rms_norm(x_BWD, self.weight("ff_norm", dtype), c.norm_eps).astype(dtype)
    if not c.E:
      return x_BWD + feed_forward(n_BWD), cache, None
    weights = {name: getattr(self, name)[...] for name in experts.letters(c)}
    out_BWD, statistics = experts.feed_forward(n_BWD, weights, c, counted_BW)
    out_BWD = out_BWD + feed_forward(n_BWD, "shared_", "S") if c.S else out_BWD
    return x_BWD + out_BWD, cache, statistics


class MaskPredictor(nnx.Module):
  """p(x_0 | x_t): for every position of a partly masked canvas, a distribution over the vocabulary."""

  blocks: Any  # and `first`, where the first layers are of another kind

  def __init__(self, c: MaskPredictorConfig, *, rngs: nnx.Rngs):
    self.c = c

    def create(stack, depth):
      @nnx.split_rngs(splits=stack.N)
      @nnx.vmap(in_axes=(0, 0), out_axes=0, transform_metadata={nnx.PARTITION_NAME: "N"})
      def each(rngs, depth):
        return Block(stack, depth, rngs=rngs)

      return each(rngs, depth)

    self.embedding = _weight(rngs, c, "VD", c.D)
    for name, stack in c.stacks.items():
      setattr(self, name, create(stack, jnp.arange(stack.N) + (c.dense if name == "blocks" else 0)))
    self.final_norm = nnx.Param(jnp.ones(c.D))
    if not c.tied:
      self.head = _weight(rngs, c, "DV", c.D)

  def layers(self) -> Any:
    """The layers as a loop over passes reads them best: see `MaskPredictorConfig.apart`. None: as they are."""
    if not self.c.unrolled:
      return None
    return [layer for name, stack in self.c.stacks.items() for layer in stack.apart(getattr(self, name))]

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
      layers: what `layers` gave before a loop over calls; the cache may have been through `reading`.

    Returns:
      (hidden_BWD after the final norm, the cache or None). Where the model shifts, what is predicted for a place stands
      in that place, but for the first one of a window that begins within the canvas.
    """
    return self._hidden(tokens_BW, visible, position_BL, cache, layers)[:2]

  def _hidden(
    self, tokens_BW, visible=None, position_BL=None, cache=None, layers=None
  ) -> tuple[jax.Array, Any, list[Any]]:
    """`hidden`, and the statistics of the stacks of layers that have experts, each [N, ...]."""
    c = self.c
    B, W = tokens_BW.shape
    visible = c.visible(W) if visible is None else visible
    assert visible.W == W and (cache is not None or visible.L == W)
    position_BW = visible.window(jnp.arange(visible.L)[None] if position_BL is None else position_BL)
    cos, sin = rope.turns(position_BW, c, visible.L)
    counted_BW = None if visible.segment_BL is None else visible.window(visible.segment_BL) > 0
    if c.shift and c.causal:
      visible = visible.begun_apart()
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
      x_BWD, layer_cache, told = block(
        x_BWD, layer_cache, cos=cos, sin=sin, start=write_at, attend=attend, counted_BW=counted_BW
      )
      return sharding.constrain(x_BWD, "BLD"), (layer_cache, told)

    if c.remat != "none" or sharding.axis_size("fsdp") > 1:
      body = jax.checkpoint(body, policy=REMAT[c.remat], prevent_cse=False)
    x_BWD = sharding.constrain(_look_up(self.embedding[...].astype(c.compute_dtype), tokens_BW, c.V), "BLD")
    x_BWD = x_BWD.astype(c.stream_dtype)
    written, statistics, at = [], [], 0
    if layers is not None:
      for layer in zip(layers, cache if isinstance(cache, list) else c.apart(cache), strict=True):
        x_BWD, (layer_cache, _) = body(x_BWD, layer)
        written.append(layer_cache)
      written = jax.tree.map(lambda *x: jnp.stack(x), *written)
    else:
      for name, stack in c.stacks.items():
        of_stack = jax.tree.map(lambda x: x[at : at + stack.N], cache) if c.dense else cache  # noqa: B023
        # XLA's CPU backend copies the residuals of a loop into stacked arrays: unrolled, a step takes 0.75 of the time.
        unroll = stack.N if c.unrolled else 1
        x_BWD, (of_stack, told) = jax.lax.scan(body, x_BWD, (getattr(self, name), of_stack), unroll=unroll)
        written.append(of_stack)
        statistics += [told] if told is not None else []
        at += stack.N
      written = jax.tree.map(lambda *x: jnp.concatenate(x) if x[1:] else x[0], *written)
    final_norm_D = sharding.gather(self.final_norm[...], "D")
    hidden_BWD = rms_norm(x_BWD, final_norm_D, c.norm_eps).astype(c.compute_dtype)
    if c.shift and not c.causal:
      before_BWD = jnp.concatenate([hidden_BWD[:, :1], hidden_BWD[:, :-1]], axis=1)
      if visible.order == "noised blocks":  # a block's first token is predicted where the clean one before it ends
        noised_BLD, clean_BLD = jnp.split(before_BWD, 2, axis=1)
        noised_BLD = jnp.where(visible.opens_BL()[..., None], clean_BLD, noised_BLD)
        before_BWD = jnp.concatenate([noised_BLD, clean_BLD], axis=1)
      begins_BW = visible.window(visible.begins_BL())
      hidden_BWD = sharding.constrain(jnp.where(begins_BW[..., None], hidden_BWD, before_BWD), "BLD")
    return hidden_BWD, cache if reads else written, statistics

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
    return self._seen(input_BL, visible, clean_BL)[0]

  def _seen(self, input_BL, visible=None, clean_BL=None) -> tuple[jax.Array, list[Any]]:
    """`seen`, and the statistics of `_hidden`."""
    if clean_BL is None:
      hidden_BLD, _, statistics = self._hidden(input_BL, visible)
      return hidden_BLD, statistics
    L = input_BL.shape[1]
    visible = self.c.visible(L) if visible is None else visible
    both_BL = sharding.constrain(jnp.concatenate([input_BL, clean_BL], axis=1), "BL")
    position_1L = jnp.tile(jnp.arange(L)[None], (1, 2))
    hidden_BLD, _, statistics = self._hidden(both_BL, visible.doubled(), position_1L)
    return sharding.constrain(hidden_BLD[:, :L], "BLD"), statistics

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
    self, input_BL, target_BL, weight_BL, visible: Visible | None = None, *, clean_BL=None, per_pair: int | None = None,
    share_B: jax.Array | None = None, tell: Callable[[Any], None] | None = None,
  ) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """(the sum of weight x cross-entropy, the cross-entropies [B, L]), to train on: only the sum has a gradient.

    Of a model with experts the sum holds its auxiliary losses, too, where `share_B` is given.

    Args:
      input_BL: int32 ids that the model sees.
      target_BL: int32 ids to score, negative where nothing is asked.
      weight_BL: float32, what each of them counts.
      visible: as in `hidden`.
      clean_BL: as in `nll`.
      per_pair: at most so many targets are asked of each two neighbouring rows: the head then runs on
        those only. (With exact counts and antithetic times it is L + 1 of 2 L.)
      share_B: what of the batch's auxiliary losses is each row's; they add up to 1 over the batch.
      tell: is given the statistics of the experts.
    """
    hidden_BLD, statistics = self._seen(input_BL, visible, clean_BL)
    auxiliary = 0.0
    if self.c.E and share_B is not None:
      choice_NE = self.blocks.choice[...] if self.c.router_bias else None
      auxiliary = experts.auxiliary(statistics[0], share_B, choice_NE, self.c)
    if tell and statistics:
      tell(experts.summed(statistics[0]))
    loss = functools.partial(cross_entropy.weighted_nll, self.head_DV(hidden_BLD.dtype), chunk=self.c.head_chunk)
    if per_pair is None:
      total, nll_BL = loss(hidden_BLD, target_BL, weight_BL)
      return total + auxiliary, nll_BL
    B, L = input_BL.shape
    hidden_BLD = sharding.constrain(hidden_BLD, "B.D")
    asked_PA = jnp.argsort(target_BL.reshape(B // 2, 2 * L) < 0, axis=1, stable=True)[:, :per_pair]
    # Gathers and scatters within a pair: rows never leave their device, and no position is hit twice.
    unique = {"unique_indices": True, "indices_are_sorted": False, "mode": "promise_in_bounds"}
    pick = jax.vmap(lambda x_S, at_A: x_S.at[at_A].get(**unique))
    pairs = (x.reshape(B // 2, 2 * L, *x.shape[2:]) for x in (hidden_BLD, target_BL, weight_BL))
    total, nll_PA = loss(*(pick(x_PS, asked_PA) for x_PS in pairs))
    put = jax.vmap(lambda nll_A, at_A: jnp.zeros(2 * L).at[at_A].set(nll_A, **unique))
    return total + auxiliary, put(nll_PA, asked_PA).reshape(B, L)
