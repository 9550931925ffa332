"""Mixtures of experts, beside all experts asked for all tokens: answers, gradients, meshes, what programs hold."""

import dataclasses
import functools
import math
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from lladax import optimizer
from lladax.devices import hlo, sharding
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
  lora_targets: tuple[str, ...] = ("gate", "up", "down")


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
  return jnp.asarray(np.random.default_rng(seed).standard_normal((B, W, c.D)), jnp.float32)


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
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(found), strict=True):
    scale = max(1.0, float(np.abs(x).max()))
    np.testing.assert_allclose(y, x, atol=tolerance * scale, rtol=0, err_msg=jax.tree_util.keystr(path))


@every_kind
def test_all_experts_asked_for_all_tokens_say_the_same(c):
  n_BWD, weights, ask, out_BWD, gradients = expected(c)
  found_BWD, found_gradients, _ = jax.jit(functools.partial(found, c=c))(n_BWD, weights, ask)
  assert_close((found_BWD, found_gradients), (out_BWD, gradients))
  if "choice" in weights:
    assert not np.any(found_gradients[1]["choice"])


@pytest.mark.parametrize("tiles", [(1, 1), (4, 3), (32, 32), (24, 0), "tpu"], ids=str)
def test_tiles_of_any_size_say_the_same(tiles, monkeypatch):
  """As on GPUs, many tiles at once; as on TPUs, `ragged_dot`."""
  n_BWD, weights, ask, out_BWD, gradients = expected(ADAPTED)
  if tiles == "tpu":
    monkeypatch.setattr(sharding, "platform", lambda: "tpu")
  else:
    monkeypatch.setattr(experts, "tiling", lambda T, c: tiles)
  found_BWD, found_gradients, _ = jax.jit(functools.partial(found, c=ADAPTED))(n_BWD, weights, ask)
  assert_close((found_BWD, found_gradients), (out_BWD, gradients))


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_tiles_are_half_as_large_as_a_load(platform, monkeypatch):
  monkeypatch.setattr(sharding, "platform", lambda: platform)
  most, chunk = {"cpu": (128, 1), "gpu": (256, 32), "tpu": (256, 1)}[platform]
  few = (8, 0) if platform == "gpu" else (16, chunk)  # a tile for each expert, of all tokens
  assert [experts.tiling(T, Config(E=64, J=8)) for T in (8, 800, 40_000)] == [few, (32, chunk), (most, chunk)]


@pytest.mark.parametrize("seed", range(6))
def test_a_layout_holds_every_pair_once(seed):
  rng = np.random.default_rng(seed)
  E, first, here = 8, int(rng.integers(0, 4)), int(rng.integers(1, 5))
  tile, chunk, M = int(rng.integers(1, 6)), int(rng.integers(1, 4)), int(rng.integers(1, 40))
  expert_M = rng.integers(0, E, M) if seed else np.full(M, first)  # all want the same
  layout = jax.jit(experts.lay_out, static_argnums=(1, 2, 3))(expert_M - first, here, tile, chunk)
  pair_P, place_M, expert_Q, tiles_E = (np.asarray(x) for x in layout)
  assert pair_P.size == expert_Q.size * tile and expert_Q.size % chunk == 0
  assert sorted(pair_P[pair_P < M]) == [i for i in range(M) if first <= expert_M[i] < first + here]
  for i, expert in enumerate(expert_M):
    if first <= expert < first + here:
      assert pair_P[place_M[i]] == i and expert_Q[place_M[i] // tile] == expert - first
      assert place_M[i] // tile < tiles_E.sum()
    else:
      assert place_M[i] == pair_P.size
  np.testing.assert_array_equal(tiles_E, [-(-np.sum(expert_M == first + e) // tile) for e in range(here)])


@pytest.mark.parametrize("seed", range(8))
def test_the_router_chooses_and_weighs(seed):
  """Shapes and kinds by chance, beside NumPy."""
  rng = np.random.default_rng(seed)
  groups = int(rng.choice([0, 2, 4]))
  kept = int(rng.integers(1, groups + 1)) if groups else 0
  E = max(groups, 1) * int(rng.integers(2, 7))
  c = Config(
    D=int(rng.integers(2, 20)), E=E, J=int(rng.integers(1, min(5, E * kept // groups if groups else E) + 1)),
    router=["softmax", "sigmoid"][seed % 2], router_groups=groups, router_topk_groups=kept, router_bias=seed % 4 > 1,
    router_renormalise=bool(rng.integers(2)), router_scale=float(rng.uniform(0.5, 3)),
  )  # fmt: skip
  weights, n_TD = weights_of(c, seed), rng.standard_normal((50, c.D)).astype(np.float32)
  expert_TJ, weight_TJ, _, _ = experts.route(n_TD, weights["router"], weights.get("choice"), c)
  for t, n_D in enumerate(n_TD):
    expert_J, weight_J = chosen(n_D, weights, c)
    np.testing.assert_array_equal(expert_TJ[t], expert_J)
    np.testing.assert_allclose(weight_TJ[t], weight_J, rtol=1e-5)


def test_only_experts_of_the_best_groups_are_chosen():
  """A group's score is the sum of its best two: the best expert of all is in a group that loses."""
  c = dataclasses.replace(LLADA2, D=1, E=6, J=2, router_groups=2, router_topk_groups=1)
  router_DE = jnp.array([[3.0, -3.0, -3.0, 2.0, 1.0, 1.5]])
  expert_TJ, weight_TJ, *_ = experts.route(jnp.ones((1, 1)), router_DE, None, c)
  np.testing.assert_array_equal(expert_TJ, [[3, 5]])
  np.testing.assert_allclose(weight_TJ.sum(), 2.5, rtol=1e-6)
  by_bias_TJ = experts.route(jnp.ones((1, 1)), router_DE, jnp.array([0.0, 1, 0, 0, 0, 0]), c)[0]
  np.testing.assert_array_equal(by_bias_TJ, [[1, 0]])  # 0.05 + 1 before 0.95: the bias chooses the group too


def test_the_choosing_bias_does_not_weigh():
  c = dataclasses.replace(LLADA_MOE, J=8, router_bias=True)  # all are chosen
  n_TD, weights = stream(c)[0], weights_of(c)
  plain, biased = (experts.route(n_TD, weights["router"], bias, c) for bias in (None, weights["choice"]))
  np.testing.assert_allclose(np.sort(biased[1]), np.sort(plain[1]), rtol=1e-6)
  assert np.any(biased[0] != plain[0])


@every_kind
def test_what_statistics_count(c):
  n_BWD, weights = stream(c), weights_of(c)
  counted_BW = np.random.default_rng(2).random(n_BWD.shape[:2]) < 0.6
  ask = np.zeros_like(n_BWD)
  _, _, stats = jax.jit(functools.partial(found, c=c))(n_BWD, weights, ask, counted_BW=counted_BW)
  n_TD = np.asarray(n_BWD)[counted_BW]
  logits_TE = (n_TD @ weights["router"]).astype(np.float64)
  score_TE = np.exp(logits_TE) if c.router == "softmax" else 1 / (1 + np.exp(-logits_TE))
  p_TE = score_TE / score_TE.sum(1, keepdims=True)
  load_E = np.bincount(np.concatenate([chosen(n_D, weights, c)[0] for n_D in n_TD]), minlength=c.E)
  total = experts.summed(stats)
  np.testing.assert_array_equal(total.load_BE, load_E)
  np.testing.assert_allclose(total.probability_BE, p_TE.sum(0), rtol=1e-5)
  np.testing.assert_allclose(total.z_B, (np.log(np.exp(logits_TE).sum(1)) ** 2).sum(), rtol=1e-5)
  np.testing.assert_allclose(total.entropy_B, -(p_TE * np.log(p_TE)).sum(), rtol=1e-5)
  assert total.tokens_B == len(n_TD)
  row_T = np.nonzero(counted_BW)[0]  # the balance and z of each row alone
  chosen_TE = np.stack([np.bincount(chosen(n_D, weights, c)[0], minlength=c.E) for n_D in n_TD])
  balance_B = [c.E * np.sum(chosen_TE[row_T == b].mean(0) * p_TE[row_T == b].mean(0)) for b in range(len(n_BWD))]
  z_B = [(np.log(np.exp(logits_TE[row_T == b]).sum(1)) ** 2).mean() for b in range(len(n_BWD))]
  np.testing.assert_allclose(experts.balance_loss(stats, c), balance_B, rtol=1e-5)
  # Parts of a batch add up, layers stack.
  half = jax.jit(lambda n_BWD, counted_BW: experts.feed_forward(n_BWD, weights, c, counted_BW)[1])
  halves = [half(n_BWD[i], counted_BW[i]) for i in (slice(2), slice(2, None))]
  both = jax.tree.map(lambda *x: jnp.concatenate(x), *halves)
  for x, y in zip(both, stats, strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-5)
  layers = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), stats)
  np.testing.assert_allclose(experts.balance_loss(layers, c), balance_B, rtol=1e-5)
  np.testing.assert_allclose(experts.z_loss(layers), z_B, rtol=1e-5)
  share_B = jnp.array([0.1, 0.2, 0.3, 0.4])
  weighed = SimpleNamespace(E=c.E, balance=0.5, z_loss=0.25, balance_rate=0.0)
  found_loss = experts.auxiliary(layers, share_B, None, weighed)
  np.testing.assert_allclose(
    found_loss, 0.5 * share_B @ np.array(balance_B) + 0.25 * share_B @ np.array(z_B), rtol=1e-5
  )


def test_even_loads_and_none():
  c = Config(E=4, J=2)
  of_row = experts.Statistics(*map(jnp.asarray, ([[5.0] * 4], [[2.5] * 4], [40.0], [10 * np.log(4)], [10.0])))
  assert experts.balance_loss(of_row, c) == 2.0  # J
  metrics = experts.metrics(experts.summed(of_row))
  assert (metrics["expert_load"], metrics["dropped"]) == (1.0, 0.0)
  np.testing.assert_allclose(metrics["router_entropy"], np.log(4), rtol=1e-6)
  nothing = jax.tree.map(jnp.zeros_like, of_row)
  load = lambda stats: experts.metrics(experts.summed(stats))["expert_load"]  # noqa: E731
  assert experts.balance_loss(nothing, c) == experts.z_loss(nothing) == load(nothing) == 0
  one = of_row._replace(load_BE=jnp.array([[20.0, 0, 0, 0]]), probability_BE=jnp.array([[10.0, 0, 0, 0]]))
  assert experts.balance_loss(one, c) == 8.0 and load(one) == 4.0
  two = jax.tree.map(lambda *x: jnp.stack(x), of_row, one)
  assert experts.balance_loss(two, c) == 5.0 and load(two) == 4.0


def test_the_balance_loss_spreads_the_tokens():
  """Its gradient reaches the router alone; so does that of the z-loss."""
  c, (n_BWD, weights) = LLADA_MOE, (stream(LLADA_MOE), weights_of(LLADA_MOE))

  def loss(weights, of):
    stats = experts.feed_forward(n_BWD, weights, c)[1]
    return (experts.balance_loss(stats, c) if of == "balance" else experts.z_loss(stats)).mean()

  for of in ("balance", "z"):
    loss_of = jax.jit(functools.partial(loss, of=of))
    gradient = jax.jit(jax.grad(loss_of))(weights)
    assert not any(np.any(x) for name, x in gradient.items() if name != "router")
    after = weights | {"router": weights["router"] - 0.1 * gradient["router"]}
    assert loss_of(after) < loss_of(weights)


def test_the_choosing_bias_levels_the_loads():
  c = dataclasses.replace(LLADA2, router_groups=0)
  n_BWD, weights = stream(c, W=64), weights_of(c)
  weights["choice"] = np.zeros(c.E, np.float32)
  moving = SimpleNamespace(E=c.E, balance=0.0, z_loss=0.0, balance_rate=0.01)
  tx = optimizer.create(optimizer.OptimizerConfig(), 60, {"choice": "E"}, moving.balance_rate)

  @jax.jit
  def step(choice_E):
    """The largest load, and the bias after a step."""

    def loss(choice_E):
      stats = experts.feed_forward(n_BWD, weights | {"choice": choice_E}, c)[1]
      share_B = jnp.full(len(n_BWD), 1 / len(n_BWD))
      return experts.auxiliary(stats, share_B, choice_E, moving), experts.metrics(experts.summed(stats))["expert_load"]

    (total, load), loads_E = jax.value_and_grad(loss, has_aux=True)(choice_E)
    updates, _ = tx.update({"choice": loads_E}, tx.init({"choice": choice_E}), {"choice": choice_E}, good=True)
    return total, load, choice_E + updates["choice"]

  choice_E = jnp.zeros(c.E)
  total, before, choice_E = step(choice_E)
  assert total == 0
  for _ in range(60):
    _, after, choice_E = step(choice_E)
  assert after < 1.2 < before


@pytest.mark.parametrize(("compute", "of_stream"), [("bfloat16", "bfloat16"), ("float16", "float32")])
def test_in_sixteen_bits(compute, of_stream):
  n_BWD, weights, ask, out_BWD, gradients = expected(LLADA2)
  c = dataclasses.replace(LLADA2, compute_dtype=jnp.dtype(compute), stream_dtype=jnp.dtype(of_stream))
  found_BWD, found_gradients, _ = jax.jit(functools.partial(found, c=c))(n_BWD.astype(compute), weights, ask)
  assert found_BWD.dtype == of_stream and {x.dtype.name for x in found_gradients[1].values()} == {"float32"}
  # A token at the border may have gone to another expert.
  far_T = np.abs(found_BWD.astype(jnp.float32) - out_BWD).max(-1) > 0.03 * np.abs(out_BWD).max()
  assert far_T.mean() < 0.1


MESHES = [
  {"data": 1, "fsdp": 8}, {"data": 1, "fsdp": 2, "tensor": 4}, {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 8},
  {"data": 1, "fsdp": 2, "tensor": 2, "context": 2}, {"slices": 2, "data": 1, "tensor": 4},
]  # fmt: skip


def on_mesh(c, sizes, B=8, W=6):
  mesh = sharding.make_mesh(MeshConfig(**sizes))
  n_BWD, weights = stream(c, B, W), weights_of(c)
  at = sharding.shardings(mesh, {name: experts.letters(c)[name] for name in weights})
  return mesh, jax.device_put(n_BWD, sharding.shardings(mesh, "BLD")), jax.device_put(weights, at)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("c", [LLADA_MOE, ADAPTED], ids=["llada-moe", "adapted"])
def test_a_mesh_says_the_same(c, sizes):
  ask = np.cos(np.arange(8 * 6 * c.D, dtype=np.float32)).reshape(8, 6, c.D)
  counted_BW = np.arange(48).reshape(8, 6) % 5 > 0
  program = functools.partial(found, c=c)
  alone = jax.jit(program)(stream(c, B=8), weights_of(c), ask, counted_BW=counted_BW)
  mesh, n_BWD, weights = on_mesh(c, sizes)
  with jax.set_mesh(mesh):
    there = jax.jit(program)(n_BWD, weights, ask, counted_BW=counted_BW)
  assert_close(jax.device_get(there), jax.device_get(alone), 1e-5)


@pytest.mark.parametrize("sizes", [MESHES[0], MESHES[1], MESHES[4]], ids=str)
@pytest.mark.parametrize("c", [LLADA_MOE, LLADA2], ids=["llada-moe", "llada2"])
def test_on_a_mesh_losses_of_the_router_have_the_same_gradient(c, sizes):
  def loss(n_BWD, weights):
    stats = experts.feed_forward(n_BWD, weights, c)[1]
    return (experts.balance_loss(stats, c) + experts.z_loss(stats)).mean()

  program = jax.value_and_grad(loss, argnums=(0, 1))
  alone = jax.jit(program)(stream(c, B=8), weights_of(c))
  mesh, n_BWD, weights = on_mesh(c, sizes)
  with jax.set_mesh(mesh):
    there = jax.jit(program)(n_BWD, weights)
  assert np.abs(alone[1][1]["router"]).max() > 0.01 and np.any(alone[1][0])
  assert_close(jax.device_get(there), jax.device_get(alone), 1e-6)


def test_a_batch_and_experts_that_the_mesh_does_not_divide():
  c = dataclasses.replace(LLADA_MOE, E=6)
  ask = np.ones((1, 6, c.D), np.float32)
  alone = jax.jit(functools.partial(found, c=c))(stream(c, B=1), weights_of(c), ask)
  with jax.set_mesh(sharding.make_mesh(MeshConfig(data=1, fsdp=2, tensor=4))):
    there = jax.jit(functools.partial(found, c=c))(stream(c, B=1), weights_of(c), ask)
  assert_close(jax.device_get(there), jax.device_get(alone), 1e-5)


def test_copies_of_the_parameters_meet_once():
  """Within `sum_over_copies` a copy counts its own tokens."""
  c, sizes = LLADA2, {"slices": 2, "data": 1, "fsdp": 2, "tensor": 2}
  ask = np.ones((8, 6, c.D), np.float32)
  alone = jax.jit(functools.partial(found, c=c))(stream(c, B=8), weights_of(c), ask)
  mesh, n_BWD, weights = on_mesh(c, sizes)

  def part(n_BWD, weights):
    _, gradients, stats = found(n_BWD, weights, jnp.ones_like(n_BWD), c)
    return gradients[1], experts.summed(stats)

  with jax.set_mesh(mesh):
    of_weights, stats = jax.jit(functools.partial(sharding.sum_over_copies, part))(n_BWD, weights)
  assert_close(jax.device_get((of_weights, stats)), jax.device_get((alone[1][1], experts.summed(alone[2]))), 1e-5)


def arrays_of(text):
  """[(the kind of collective, or "", its arrays' dimensions)] of a compiled program."""
  lines = [x for lines in hlo.parse(text).computations.values() for x in lines]
  return [(x.collective, [array.dims for array in x.results]) for x in lines]


def test_no_device_holds_all_experts():
  """From the compiled program: weights are gathered along the width alone, a device's own, and scattered likewise."""
  c = Config(E=8, D=32, X=24)
  mesh, n_BWD, weights = on_mesh(c, {"data": 1, "fsdp": 2, "tensor": 4})
  at = jax.tree.map(lambda x: x.sharding, (n_BWD, weights))
  with jax.set_mesh(mesh):
    program = jax.jit(lambda *args: found(*args, c)[1], out_shardings=at)
    held = arrays_of(program.lower(n_BWD, weights, n_BWD).compile().as_text())
  own, part = c.E // 4, c.D // 2
  assert not [dims for _, arrays in held for dims in arrays if math.prod(dims) >= c.E * c.D * c.X]
  of = {kind: sorted(dims for x, arrays in held if x == kind for dims in arrays) for kind in hlo.COLLECTIVES}
  matrices, parts = [(own, c.X, c.D)] + 2 * [(own, c.D, c.X)], [(own, c.X, part)] + 2 * [(own, part, c.X)]
  assert of["all-gather"] == sorted([*matrices, (c.D, own), (c.D, c.E)])  # the router, along both
  assert of["reduce-scatter"] == sorted([*parts, (part, own), (c.D, own)])
  rows = {(4, c.E), (4,)}  # what statistics say of a device's rows
  # (Also "added up" by each device alone: what axes of one device would.)
  assert set(of["all-reduce"]) <= {(8 // 2, 6, c.D), *parts, (part, own), (c.E,), (), *rows}
  assert not of["all-to-all"] + of["collective-permute"]


def test_no_array_of_all_tokens_times_all_experts_times_a_width():
  c, T = Config(E=32, J=2, D=16, X=24), 512
  text = jax.jit(functools.partial(found, c=c)).lower(stream(c, 1, T), weights_of(c), 1.0).compile().as_text()
  largest = max(math.prod(dims) for _, arrays in arrays_of(text) for dims in arrays)
  assert largest <= 2 * c.J * T * c.X < c.E * T * c.D / 5  # rows of tiles that are half empty


@pytest.mark.parametrize("parts", [1, 4])
def test_what_the_plan_is_told_of_the_loops_over_tiles(parts):
  """Of a device's experts, forward and backward, where loads are even."""
  c = Config(E=8, J=2, D=32, X=24)
  mesh, n_BWD, weights = on_mesh(c, {"data": 8 // parts, "fsdp": 1, "tensor": parts}, W=64)
  tokens = n_BWD.shape[0] * n_BWD.shape[1] // (8 // parts)  # of a device
  with jax.set_mesh(mesh):
    text = jax.jit(functools.partial(found, c=c)).lower(n_BWD, weights, n_BWD).compile().as_text()
  program, (tile, chunk) = hlo.parse(text), experts.tiling(tokens, c)
  own = c.E // parts
  loops = [
    program.trips(x)
    for lines in program.computations.values()
    for x in lines
    if x.op == "while" and "rounds:" in x.rest
  ]
  expected = (tokens * c.J // parts // tile + own // 2) // chunk
  assert 1 < expected < tokens and len(loops) >= 9 and set(loops) == {expected}


def loops(policy):
  c = LLADA_MOE

  def loss(n_BWD, weights):
    run = jax.checkpoint(lambda *args: experts.feed_forward(*args, c)[0], policy=policy)
    return run(n_BWD, weights).sum()

  return str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(stream(c), weights_of(c))).count(" while[")


def test_what_the_backward_pass_multiplies_again():
  """Three products forward and two for each of them backward; again `gate` and `up`, unless "grouped" are kept."""
  policies = jax.checkpoint_policies
  assert loops(policies.everything_saveable) == loops(policies.save_only_these_names("grouped")) == 9
  assert loops(policies.nothing_saveable) == 11


@pytest.mark.parametrize("policy", ["nothing", "gathered", "grouped"])
def test_rematerialised_on_a_mesh(policy):
  """Gathered weights are not kept: matrices are gathered forward and again backward."""
  policies = jax.checkpoint_policies
  known = {"nothing": policies.nothing_saveable, "grouped": policies.save_only_these_names("grouped"),
           "gathered": lambda x, *_, **more: x.name != "all_gather" and more.get("name") != "gathered"}  # fmt: skip
  c, ask = LLADA_MOE, jnp.ones((8, 6, 16))
  mesh, n_BWD, weights = on_mesh(c, {"data": 1, "fsdp": 2, "tensor": 4})

  def gradient(run):
    return jax.grad(lambda *args: (run(*args, c)[0] * ask).sum(), argnums=(0, 1))

  with jax.set_mesh(mesh):
    plain = gradient(experts.feed_forward)
    again = gradient(jax.checkpoint(experts.feed_forward, policy=known[policy], static_argnums=2))
    assert_close(*(jax.device_get(jax.jit(program)(n_BWD, weights)) for program in (again, plain)))
    once, twice = (str(jax.make_jaxpr(x)(n_BWD, weights)).count(" all_gather[") for x in (plain, again))
  assert (once, twice) == (5, 5 + 3 + 2)  # three matrices; the router, along both of its axes


DEVICES = {
  "cpu": AbstractDevice("cpu", None, "cpu"),
  "cuda": AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu"),
  "tpu": AbstractDevice("TPU v5 lite", 1, "tpu"),
}


@pytest.mark.parametrize("platform", DEVICES)
def test_lowered_for_devices_that_are_not_here(platform):
  c = Config(D=48, E=64, J=8, X=32, compute_dtype=jnp.dtype("bfloat16"), stream_dtype=jnp.dtype("bfloat16"))
  n_BWD = jnp.asarray(stream(c, 2, 512), jnp.bfloat16)
  axes = ("slices", "data", "fsdp", "tensor", "context")
  mesh = AbstractMesh((1,) * 5, axes, axis_types=(AxisType.Auto,) * 5, abstract_device=DEVICES[platform])
  with jax.sharding.use_abstract_mesh(mesh):
    traced = jax.jit(functools.partial(found, c=c)).trace(n_BWD, weights_of(c), 1.0)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
  assert text.count('chlo.ragged_dot"(') == (6 if platform == "tpu" else 0)
  tiles = 32 if platform == "cuda" else 1  # so many tiles' experts are at hand at once, or their gradients
  assert f"tensor<{tiles}x48x32x{'f32' if platform == 'tpu' else 'bf16'}>" in text
  assert "tensor<64x8192x" not in text and "tensor<8192x64x" not in text  # every pair with every expert


@pytest.mark.parametrize(("platform", "few"), [("gpu", False), ("gpu", True), ("tpu", False)])
def test_a_mesh_of_accelerators_says_the_same(platform, few, monkeypatch):
  """Of CPUs that say they are such."""
  monkeypatch.setattr(sharding, "platform", lambda: platform)
  c, W = ADAPTED, 6 if few else 140
  ask = jnp.ones((2, W, c.D))
  alone = jax.jit(functools.partial(found, c=c))(stream(c, 2, W), weights_of(c), ask)
  mesh, n_BWD, weights = on_mesh(c, {"data": 1, "fsdp": 2, "tensor": 4}, 2, W)
  with jax.set_mesh(mesh):
    there = jax.jit(functools.partial(found, c=c))(n_BWD, weights, ask)
  assert_close(jax.device_get(there), jax.device_get(alone), 1e-5)
