"""Mixtures of experts, beside all experts asked for all tokens: answers, gradients, meshes, what programs hold."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from lladax.devices import sharding
from lladax.devices.sharding import MeshConfig
from lladax.model import experts

pytestmark = pytest.mark.usefixtures("quick_compiles")


@dataclasses.dataclass(frozen=True)
class Config:
  """What of a model's config its experts read."""

  D: int = 16
  E: int = 8
  J: int = 2
  X: int = 12
  router: str = "softmax"
  router_groups: int = 0
  router_topk_groups: int = 0
  router_renormalise: bool = False
  router_scale: float = 1.0
  router_bias: bool = False
  compute_dtype: Any = jnp.dtype("float32")
  stream_dtype: Any = jnp.dtype("float32")
  lora_rank: int = 0
  lora_alpha: float = 6.0
  lora_targets: tuple[str, ...] = ("experts_gate", "experts_up", "experts_down")


LLADA_MOE = Config()
QWEN3_MOE = Config(router_renormalise=True)
LLADA2 = Config(
  E=16, J=4, router="sigmoid", router_groups=4, router_topk_groups=2, router_renormalise=True, router_scale=2.5,
  router_bias=True,
)  # fmt: skip
ADAPTED = dataclasses.replace(LLADA2, lora_rank=3)
KINDS = {"llada-moe": LLADA_MOE, "qwen3-moe": QWEN3_MOE, "llada2": LLADA2, "adapted": ADAPTED}
every_kind = pytest.mark.parametrize("c", KINDS.values(), ids=KINDS)


def weights_of(c, seed=0):
  rng, sizes = np.random.default_rng(seed), {"D": c.D, "E": c.E, "X": c.X, "R": c.lora_rank}
  shapes = {name: tuple(sizes[letter] for letter in x) for name, x in experts.letters(c).items()}
  return {name: (rng.standard_normal(x) * max(1, x[-2:][0]) ** -0.5).astype(np.float32) for name, x in shapes.items()}


def stream(c, B=4, W=6, seed=1):
  return np.random.default_rng(seed).standard_normal((B, W, c.D)).astype(np.float32)


def chosen(n_D, weights, c):
  """(experts, their weights) of one token, in NumPy and float64, as the papers say it."""
  logits_E = n_D.astype(np.float64) @ weights["router"]
  if c.router == "sigmoid":
    score_E = 1 / (1 + np.exp(-logits_E))
  else:
    score_E = np.exp(logits_E - logits_E.max())
    score_E /= score_E.sum()
  wish_E = score_E + weights.get("choice", 0)
  if c.router_groups:
    groups = np.split(np.arange(c.E), c.router_groups)
    best = sorted(groups, key=lambda group: -np.sort(wish_E[group])[-2:].sum())[: c.router_topk_groups]
    wish_E = np.where(np.isin(np.arange(c.E), np.concatenate(best)), wish_E, -np.inf)
  expert_J = np.argsort(-wish_E)[: c.J]
  weight_J = score_E[expert_J]
  return expert_J, weight_J * c.router_scale / (weight_J.sum() if c.router_renormalise else 1)


def dense(n_BWD, weights, c):
  """Every expert for every token, times what it counts there; differentiable."""
  n_TD = n_BWD.reshape(-1, c.D)
  expert_TJ = np.stack([chosen(n_D, weights_of(c), c)[0] for n_D in np.asarray(jax.lax.stop_gradient(n_TD))])
  logits_TE = n_TD @ weights["router"]
  score_TE = jax.nn.sigmoid(logits_TE) if c.router == "sigmoid" else jax.nn.softmax(logits_TE)
  weight_TE = score_TE * (expert_TJ[:, :, None] == np.arange(c.E)).any(1)
  if c.router_renormalise:
    weight_TE = weight_TE / weight_TE.sum(-1, keepdims=True)

  def matrix(name):
    if not c.lora_rank:
      return weights[name]
    return weights[name] + c.lora_alpha / c.lora_rank * weights[name + "_a"] @ weights[name + "_b"]

  gate, up = (jnp.einsum("TD,EDX->TEX", n_TD, matrix(name)) for name in ("experts_gate", "experts_up"))
  out = jnp.einsum("TEX,EXD,TE->TD", jax.nn.silu(gate) * up, matrix("experts_down"), weight_TE * c.router_scale)
  return out.reshape(n_BWD.shape)


@functools.cache
def expected(c):
  """The dense answer, and its gradients by stream and weights."""
  n_BWD, weights = stream(c), weights_of(c)
  ask = np.cos(np.arange(n_BWD.size, dtype=np.float32)).reshape(n_BWD.shape)
  with jax.numpy_rank_promotion("allow"):
    out, back = jax.vjp(lambda n, w: dense(n, w, c), jnp.asarray(n_BWD), jax.tree.map(jnp.asarray, weights))
  return n_BWD, weights, ask, out, back(jnp.asarray(ask))


def found(n_BWD, weights, ask, c, counted_BW=None):
  def loss(n_BWD, weights):
    out_BWD, stats = experts.feed_forward(n_BWD, weights, c, counted_BW)
    return (out_BWD * ask).sum(), (out_BWD, stats)

  gradients, (out_BWD, stats) = jax.grad(loss, argnums=(0, 1), has_aux=True)(n_BWD, weights)
  return out_BWD, gradients, stats


def assert_close(found, expected, tolerance=2e-6):
  for path, x in jax.tree_util.tree_leaves_with_path(expected):
    y = functools.reduce(lambda tree, key: tree[getattr(key, "key", getattr(key, "idx", None))], path, found)
    scale = max(1.0, float(np.abs(x).max()))
    np.testing.assert_allclose(y, x, atol=tolerance * scale, rtol=0, err_msg=jax.tree_util.keystr(path))


@every_kind
def test_all_experts_asked_for_all_tokens_say_the_same(c):
  n_BWD, weights, ask, out_BWD, gradients = expected(c)
  found_BWD, found_gradients, _ = jax.jit(functools.partial(found, c=c))(n_BWD, weights, ask)
  assert_close((found_BWD, found_gradients), (out_BWD, gradients))
  if "choice" in weights:
    assert not np.any(found_gradients[1]["choice"])
