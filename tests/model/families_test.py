"""What the published families compute, told once more in NumPy: from the papers, token by token, on random shapes."""

import cmath
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lladax.model import rope
from lladax.model.mask_predictor import MaskPredictorConfig

pytestmark = pytest.mark.usefixtures("quick_compiles")


def geometry(seed):
  """A random small model; what the seeds have between them is asserted below."""
  rng = np.random.default_rng(100 + seed)
  any_of = lambda *values: values[rng.integers(len(values))]  # noqa: E731
  G, K = any_of(1, 2, 3), any_of(4, 6, 8, 10, 7)
  fields = dict(D=any_of(9, 12, 13, 16), N=any_of(1, 2, 3), G=G, H=G * any_of(1, 2, 3), K=K, F=any_of(5, 11, 16))
  fields |= dict(V=any_of(11, 17), tied=any_of(False, True), qk_norm=any_of(False, True), qkv_bias=any_of(False, True))
  fields |= dict(norm_eps=any_of(1e-6, 1e-2), rope_theta=any_of(20.0, 1e4), dtype="float32", max_length=32)
  fields["rotary"] = K // 2 // 2 * 2 if K % 2 or any_of(False, True) else 0
  kind = ("mask", "shift", "causal", "causal shift", "blocks", "blocks shift")[seed % 6]
  fields |= {"shift": "shift" in kind, "causal": "causal" in kind, "block": any_of(2, 3) if "blocks" in kind else 0}
  scaling = rope.SCALINGS[seed % 4]
  if scaling != "none":
    few = any_of(0.05, 0.2)
    fields |= dict(rope_scaling=scaling, rope_factor=any_of(2.0, 8.0), rope_length=any_of(6, 40))
    fields |= dict(rope_turns=(few, few * any_of(4.0, 16.0)), rope_attention=any_of(0.0, 0.9))
  if seed % 3:
    groups, size = any_of((0, 5), (2, 3), (3, 2), (4, 2))
    kept = int(rng.integers(1, groups + 1)) if groups else 0
    J = int(rng.integers(1, (size * kept if groups else size) + 1))
    fields |= dict(E=groups * size or size, J=J, X=any_of(3, 7), S=any_of(0, 5), router_groups=groups)
    fields |= dict(router_topk_groups=kept, router=("softmax", "sigmoid")[seed % 2], router_bias=any_of(False, True))
    fields |= dict(router_renormalise=any_of(False, True), router_scale=any_of(1.0, 2.5))
    fields |= dict(dense=int(rng.integers(fields["N"])))
  return MaskPredictorConfig(**fields)


SEEDS = range(24)


def test_the_random_shapes_have_everything():
  found = [geometry(seed) for seed in SEEDS]
  for name in ("shift", "causal", "block", "qk_norm", "qkv_bias", "rotary", "tied", "S", "dense", "router_groups"):
    assert {bool(getattr(c, name)) for c in found} == {False, True}, name
  assert {(c.shift, bool(c.block)) for c in found} == {(x, y) for x in (False, True) for y in (False, True)}
  routed = [c for c in found if c.E]
  assert {c.rope_scaling for c in found} == set(rope.SCALINGS)
  assert {(c.router, c.router_bias) for c in routed} == {(x, y) for x in ("softmax", "sigmoid") for y in (False, True)}
  assert {c.router_renormalise for c in routed} == {False, True} and any(c.K % 2 for c in found)


def random_params(c, seed=0):
  rng, shapes = np.random.default_rng(seed), jax.eval_shape(c.init, jax.random.key(0))
  return jax.tree.map(lambda x: jnp.asarray(0.4 * rng.standard_normal(x.shape), jnp.float32), shapes)


def radians(c):
  """What each pair turns in a position, by the definition of each scaling, pair by pair."""
  width, found = c.rotary or c.K, []
  plain = [1 / c.rope_theta ** (2 * p / width) for p in range(width // 2)]
  within = lambda p: c.rope_length / (2 * math.pi * c.rope_theta ** (2 * p / width))  # noqa: E731  (turns)
  slow, fast = c.rope_turns
  for p, angle in enumerate(plain):
    if c.rope_scaling == "none":
      found.append(angle)
    elif c.rope_scaling == "linear":
      found.append(angle / c.rope_factor)
    elif c.rope_scaling == "llama3":  # by the wavelength
      wavelength = 2 * math.pi / angle
      if wavelength < c.rope_length / fast:
        found.append(angle)
      elif wavelength > c.rope_length / slow:
        found.append(angle / c.rope_factor)
      else:
        smooth = (c.rope_length / wavelength - slow) / (fast - slow)
        found.append((1 - smooth) * angle / c.rope_factor + smooth * angle)
    else:  # YaRN as its authors' code ramps: from the last pair that is fast enough to the first that is slow enough
      first = max([q for q in range(width) if within(q) >= fast], default=0)
      last = min([q for q in range(width) if within(q) <= slow], default=width - 1)
      kept = 1 - min(max((p - first) / (last - first or 1e-3), 0), 1)
      found.append(kept * angle + (1 - kept) * angle / c.rope_factor)
  sharper = c.rope_attention or 1 + 0.1 * math.log(c.rope_factor) if c.rope_scaling == "yarn" else 1.0
  return found, sharper


def silu(x):
  return x / (1 + np.exp(-x))


def routed(c, w, n):
  """What the experts answer to one token."""
  logit = n @ w["router"]
  if c.router == "softmax":
    score = np.exp(logit) / np.exp(logit).sum()
  else:
    score = 1 / (1 + np.exp(-logit))
  wish = {e: score[e] + (w["choice"][e] if c.router_bias else 0.0) for e in range(c.E)}
  if c.router_groups:
    size = c.E // c.router_groups
    groups = [range(g * size, (g + 1) * size) for g in range(c.router_groups)]
    best_two = lambda group: sum(sorted((wish[e] for e in group), reverse=True)[:2])  # noqa: E731
    groups = sorted(groups, key=best_two, reverse=True)[: c.router_topk_groups]
    wish = {e: wish[e] for group in groups for e in group}
  chosen = sorted(wish, key=wish.get, reverse=True)[: c.J]
  total = sum(score[e] for e in chosen) if c.router_renormalise else 1.0
  out = 0.0
  for e in chosen:
    inner = silu(n @ w["experts_gate"][e]) * (n @ w["experts_up"][e])
    out = out + c.router_scale * score[e] / total * (inner @ w["experts_down"][e])
  if c.S:
    out = out + (silu(n @ w["shared_gate"]) * (n @ w["shared_up"])) @ w["shared_down"]
  return out


def documents(segment_L):
  """Where each position's document begins."""
  begins, found = 0, []
  for i, segment in enumerate(segment_L):
    begins = i if i == 0 or segment != segment_L[i - 1] else begins
    found.append(begins)
  return found


def looks(c, i, j, segment_L, begins_L):
  """Whether i may look at j."""
  if segment_L[i] != segment_L[j]:
    return False
  if c.block:
    return (j - begins_L[j]) // c.block <= (i - begins_L[i]) // c.block
  if c.causal and c.shift and j == begins_L[j]:  # the token a text is begun with
    return i == j
  return j <= i or not c.causal


def reference(c, params, tokens_L, segment_L, position_L):
  """Logits [L, V] of one row, in double precision."""
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  L, begins_L, (angles, sharper) = len(tokens_L), documents(segment_L), radians(c)
  P = len(angles)

  def norm(x, scale):
    return x / math.sqrt((x**2).mean() + c.norm_eps) * scale

  def turned(x, position):  # the pair (p, p + P) is a complex number
    z = [sharper * (x[p] + 1j * x[p + P]) * cmath.exp(1j * position * angles[p]) for p in range(P)]
    return np.array([*(y.real for y in z), *(y.imag for y in z), *x[2 * P :]])

  layers = [
    {name: x[i] for name, x in params[stack].items()}
    for stack, depth in (("first", c.dense), ("blocks", c.N - c.dense))
    for i in range(depth)
  ]
  x_LD = params["embedding"][tokens_L]
  for w in layers:
    n_LD = [norm(x, w["attention_norm"]) for x in x_LD]

    def heads(name, i, w=w, n_LD=n_LD):
      x = np.einsum("d,dhk->hk", n_LD[i], w[name]) + (w[name + "_bias"] if c.qkv_bias else 0.0)
      if name == "v":
        return x
      return [turned(norm(y, w[name + "_norm"]) if c.qk_norm else y, position_L[i]) for y in x]

    q, k, v = ([heads(name, i) for i in range(L)] for name in "qkv")
    attended = []
    for i in range(L):
      seen, out = [j for j in range(L) if looks(c, i, j, segment_L, begins_L)], 0.0
      for h in range(c.H):
        g = h // (c.H // c.G)
        e = np.exp([q[i][h] @ k[j][g] / math.sqrt(c.K) for j in seen])
        out = out + sum(p * v[j][g] for p, j in zip(e / e.sum(), seen, strict=True)) @ w["out"][h]
      attended.append(out)
    x_LD = x_LD + np.stack(attended)
    more = []
    for x in x_LD:
      n = norm(x, w["ff_norm"])
      more.append(routed(c, w, n) if "router" in w else (silu(n @ w["gate"]) * (n @ w["up"])) @ w["down"])
    x_LD = x_LD + np.stack(more)
  hidden_LD = [norm(x, params["final_norm"]) for x in x_LD]
  if c.shift and not c.causal:  # the state at i - 1 predicts i, and a document's first token its own
    hidden_LD = [hidden_LD[i if i == begins_L[i] else i - 1] for i in range(L)]
  return np.stack(hidden_LD) @ (params["embedding"].T if c.tied else params["head"])


@functools.partial(jax.jit, static_argnums=0)
def logits(c, params, tokens_BL, segment_BL, position_BL):
  return c.bind(params)(tokens_BL, c.visible(tokens_BL.shape[1], segment_BL), position_BL)


SEGMENTS = np.array([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 2, 2, 2, 3, 0]], np.int32)  # left-padded | packed


@pytest.mark.parametrize("seed", SEEDS)
def test_logits_equal_the_definitions(seed):
  c = geometry(seed)
  params = random_params(c, seed)
  tokens_BL = np.random.default_rng(seed).integers(0, c.V, SEGMENTS.shape).astype(np.int32)
  position_BL = np.stack([np.maximum(np.arange(9) - 3, 0), np.arange(9)]).astype(np.int32)
  out_BLV = np.asarray(logits(c, params, tokens_BL, SEGMENTS, position_BL))
  assert np.isfinite(out_BLV).all()
  for out_LV, tokens_L, segment_L, position_L in zip(out_BLV, tokens_BL, SEGMENTS, position_BL, strict=True):
    expected_LV, real_L = reference(c, params, tokens_L, segment_L, position_L), segment_L > 0
    scale = max(1.0, np.abs(expected_LV).max())
    np.testing.assert_allclose(out_LV[real_L], expected_LV[real_L], atol=1e-4 * scale)


@pytest.mark.parametrize("scaling", rope.SCALINGS)
@pytest.mark.parametrize(
  "fields",
  [
    {"K": 128, "rope_theta": 1e6, "rope_factor": 4.0, "rope_length": 32768},  # as Qwen says
    {"K": 128, "rope_theta": 5e5, "rope_factor": 8.0, "rope_length": 8192, "rope_turns": (1.0, 4.0)},  # and Llama
    {"K": 64, "rotary": 32, "rope_theta": 1e4, "rope_factor": 40.0, "rope_length": 4096},
    {"K": 8, "rope_theta": 10.0, "rope_factor": 2.0, "rope_length": 5, "rope_turns": (0.5, 0.6)},  # between two pairs
    {"K": 8, "rope_theta": 1e4, "rope_factor": 2.0, "rope_length": 3},  # no pair turns
  ],
  ids=str,
)
def test_radians_are_the_published_ones(fields, scaling):
  """One and the same pair may be both ends of a ramp; there may be no fast pair at all."""
  c = MaskPredictorConfig(**fields, rope_scaling=scaling)
  expected_P, sharper = radians(c)
  np.testing.assert_allclose(rope.frequencies(c), expected_P, rtol=1e-5)
  assert rope.magnitude(c) == pytest.approx(sharper)


def test_yarn_s_ends():
  """The fastest pairs stay, the slowest are divided, between them the ramp falls (arXiv 2309.00071, Eq. 18 ff.)."""
  c = MaskPredictorConfig(K=128, rope_theta=1e6, rope_scaling="yarn", rope_factor=4.0, rope_length=32768)
  share_P = rope.frequencies(c) / rope.frequencies(dataclasses.replace(c, rope_scaling="none"))
  turns_P = 32768 * rope.frequencies(dataclasses.replace(c, rope_scaling="none")) / (2 * np.pi)
  np.testing.assert_allclose(share_P[turns_P > 33], 1.0, rtol=0.04)
  np.testing.assert_allclose(share_P[turns_P < 0.8], 0.25, rtol=0.04)
  assert (np.diff(share_P) <= 1e-6).all() and rope.magnitude(c) == pytest.approx(1.13863, abs=1e-5)
