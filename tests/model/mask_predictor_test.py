import dataclasses
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lladax.devices import sharding
from lladax.model.mask_predictor import Block, MaskPredictorConfig

pytestmark = pytest.mark.usefixtures("quick_compiles")

TINY = MaskPredictorConfig(D=12, N=2, H=4, G=2, K=6, F=20, V=23, dtype="float32")
GEOMETRIES = {
  "heads": TINY,
  # Nine layers: a loop on every backend.
  "odd widths, one key head, tied": MaskPredictorConfig(D=13, N=9, H=3, G=1, K=2, F=7, V=11, tied=True),
  "every head its key, another base": MaskPredictorConfig(D=8, N=1, H=2, G=2, K=10, F=9, V=5, rope_theta=100.0),
  "causal": dataclasses.replace(TINY, causal=True, norm_eps=0.1),
}
PUBLISHED = {
  "LLaDA 1B": (dict(D=2048, N=22, H=32, G=4, K=64, F=5634, V=126464), 1_487_243_264, 969_246_720),
  "LLaDA 8B": (dict(D=4096, N=32, H=32, G=32, K=128, F=12288, V=126464), 8_015_581_184, 6_979_588_096),
  "iLLaDA 8B": (
    dict(D=4096, N=32, H=32, G=8, K=128, F=14336, V=155136, tied=True),
    7_615_025_152,
    7_615_025_152 - 155136 * 4096,
  ),
}


def random_params(c):
  """Parameters that are all random, the scales of the norms too; by NumPy, which has nothing to compile."""
  rng, shapes = np.random.default_rng(0), jax.eval_shape(c.init, jax.random.key(0))
  return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), jnp.float32), shapes)


def random_tokens(c, *shape, seed=0):
  return np.random.default_rng(seed).integers(0, c.V, shape).astype(np.int32)


@functools.partial(jax.jit, static_argnums=0)
def logits(c, params, tokens_BL, segment_BL=None, position_BL=None):
  return c.bind(params)(tokens_BL, c.visible(tokens_BL.shape[1], segment_BL), position_BL)


@functools.partial(jax.jit, static_argnums=0)
def hidden(c, params, tokens_BW, segment_BL=None, position_BL=None, cache=None, start=0):
  W = tokens_BW.shape[1]
  visible = c.visible(W if cache is None else cache["k"].shape[2], segment_BL, W=W, start=start)
  return c.bind(params).hidden(tokens_BW, visible, position_BL, cache)


def reference(c, params, tokens_L, segment_L):
  """The model of one row in plain NumPy and double precision, head by head."""
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  at_L = np.arange(len(tokens_L))
  allowed_LL = (segment_L[:, None] == segment_L[None]) & ((at_L[:, None] >= at_L[None]) | (not c.causal))
  angle = at_L[:, None] * c.rope_theta ** (-2 * np.arange(c.K // 2) / c.K)

  def norm(x, scale):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + c.norm_eps) * scale

  def rotate(x):  # the pair (k, k + K/2) is a complex number
    z = (x[:, : c.K // 2] + 1j * x[:, c.K // 2 :]) * np.exp(1j * angle)
    return np.concatenate([z.real, z.imag], axis=1)

  x = params["embedding"][tokens_L]
  for i in range(c.N):
    w = {name: value[i] for name, value in params["blocks"].items()}
    n, mixed = norm(x, w["attention_norm"]), 0.0
    for h in range(c.H):
      g = h // (c.H // c.G)
      q, k, v = rotate(n @ w["q"][:, h]), rotate(n @ w["k"][:, g]), n @ w["v"][:, g]
      e = np.exp(q @ k.T / np.sqrt(c.K)) * allowed_LL
      mixed = mixed + e / e.sum(axis=1, keepdims=True) @ v @ w["out"][h]
    x = x + mixed
    n = norm(x, w["ff_norm"])
    gate = n @ w["gate"]
    x = x + (gate / (1 + np.exp(-gate)) * (n @ w["up"])) @ w["down"]
  return norm(x, params["final_norm"]) @ (params["embedding"].T if c.tied else params["head"])


@pytest.mark.parametrize("fields, total, without_embedding", PUBLISHED.values(), ids=PUBLISHED)
def test_parameter_counts_are_the_published_ones(fields, total, without_embedding):
  c = MaskPredictorConfig(**fields)
  assert c.num_params() == total
  assert c.num_params(embedding=False) == without_embedding


@pytest.mark.parametrize("c", GEOMETRIES.values(), ids=GEOMETRIES)
def test_logits_equal_a_plain_numpy_model(c):
  params, tokens_BL = random_params(c), random_tokens(c, 2, 9)
  segment_BL = np.array([[1] * 9, [1] * 4 + [2] * 5], np.int32)
  expected_BLV = np.stack([reference(c, params, *row) for row in zip(tokens_BL, segment_BL, strict=True)])
  np.testing.assert_allclose(logits(c, params, tokens_BL, segment_BL), expected_BLV, atol=2e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_without_segments_a_row_is_one_document(causal):
  c = dataclasses.replace(TINY, causal=causal)
  params, tokens_BL = random_params(c), random_tokens(c, 2, 9)
  expected_BLV = np.stack([reference(c, params, tokens_L, np.ones(9)) for tokens_L in tokens_BL])
  np.testing.assert_allclose(logits(c, params, tokens_BL), expected_BLV, atol=2e-5)


def test_every_parameter_has_the_shape_its_letters_say():
  shapes = jax.eval_shape(TINY.init, jax.random.key(0))
  expected = jax.tree.map(
    lambda letters: jax.ShapeDtypeStruct([getattr(TINY, letter) for letter in letters], np.float32), TINY.letters()
  )
  chex.assert_trees_all_equal_shapes_and_dtypes(shapes, expected)


def test_initialisation_is_mitchells():
  c = MaskPredictorConfig(D=64, N=3, H=4, G=2, K=24, F=96, V=200)
  params = jax.tree.map(np.asarray, jax.jit(c.init)(jax.random.key(0)))
  depth = np.sqrt(2 * np.arange(1, c.N + 1))[:, None]
  blocks = {name: value.reshape(c.N, -1) for name, value in params["blocks"].items()}
  unit = {name: blocks[name] * np.sqrt(c.D) for name in ("q", "k", "v", "gate", "up")}
  unit |= {"out": blocks["out"] * np.sqrt(c.H * c.K) * depth, "down": blocks["down"] * np.sqrt(c.F) * depth}
  unit |= {name: params[name].reshape(1, -1) * np.sqrt(c.D) for name in ("embedding", "head")}
  assert unit.keys() | {"attention_norm", "ff_norm"} == set(Block.LETTERS) | {"embedding", "head"}
  for name, value in unit.items():
    std = value.std(axis=1)  # 0.9866 for a normal distribution that is cut at 3
    assert np.all(abs(std - 0.9866) < 0.05) and 2.5 < abs(value).max() < 3.001, (name, std)
  assert len(np.unique(np.concatenate([blocks["q"][:, 0], blocks["gate"][:, 0]]))) == 2 * c.N


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("segment", [None, [1, 1, 1, 2, 2, 0]])
def test_who_influences_whom(causal, segment):
  c, L = dataclasses.replace(TINY, causal=causal), 6
  tokens_L = random_tokens(c, L)
  changed_LL = np.where(np.eye(L, dtype=bool), (tokens_L + 1) % c.V, tokens_L)
  rows_BL = np.concatenate([tokens_L[None], changed_LL])
  segment_BL = np.tile(segment or [1] * L, (L + 1, 1)).astype(np.int32)
  out_BLV = logits(c, random_params(c), rows_BL, segment_BL if segment else None)
  difference_LL = np.abs(out_BLV[1:] - out_BLV[:1]).max(axis=-1).T  # of output i when token j changes
  expected_LL = segment_BL[0][:, None] == segment_BL[0][None]
  if causal:
    expected_LL &= np.tri(L, dtype=bool)
  real_L = segment_BL[0] > 0
  np.testing.assert_array_equal(difference_LL[real_L] > 1e-4, expected_LL[real_L])
  assert difference_LL[real_L][~expected_LL[real_L]].max(initial=0) < 1e-6


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("own_positions", [False, True])
@pytest.mark.parametrize("left, right", [(3, 0), (0, 3), (2, 1)])
def test_padding_changes_nothing(causal, own_positions, left, right):
  c = dataclasses.replace(TINY, causal=causal)
  params, tokens_BL = random_params(c), random_tokens(c, 2, 5)
  pad = ((0, 0), (left, right))
  segment_BL = np.pad(np.ones_like(tokens_BL), pad)
  position_BL = np.maximum(np.arange(5 + left + right) - left, 0)[None] if own_positions else None
  out_BLV = logits(c, params, np.pad(tokens_BL, pad, constant_values=7), segment_BL, position_BL)
  np.testing.assert_allclose(out_BLV[:, left : left + 5], logits(c, params, tokens_BL), atol=1e-5)
  chex.assert_tree_all_finite(out_BLV)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("W", [1, 3])
def test_cached_window_over_a_fresh_cache_equals_the_full_pass(causal, W):
  c = dataclasses.replace(TINY, causal=causal, N=2 if causal else 9)  # unrolled, and in a loop
  params, tokens_BL = random_params(c), random_tokens(c, 2, 8)
  segment_BL = np.array([[1] * 8, [0] * 2 + [1] * 6], np.int32)
  position_BL = np.maximum(segment_BL.cumsum(axis=1) - 1, 0)
  expected_BLD, _ = hidden(c, params, tokens_BL, segment_BL, position_BL)
  hidden_BLD, cache = hidden(c, params, tokens_BL, segment_BL, position_BL, c.new_cache(2, 8), 0)
  np.testing.assert_allclose(hidden_BLD, expected_BLD, atol=1e-5)
  for start in range(2, 9 - W):
    window_BW = tokens_BL[:, start : start + W]
    hidden_BWD, same = hidden(c, params, window_BW, segment_BL, position_BL, cache, start)
    np.testing.assert_allclose(hidden_BWD, expected_BLD[:, start : start + W], atol=1e-5)
    chex.assert_trees_all_close(same, cache, atol=1e-5)


def test_window_replaces_its_own_keys_and_values():
  c = dataclasses.replace(TINY, N=1)  # one layer: keys and values depend on their own token alone
  params, old_BL = random_params(c), random_tokens(c, 2, 8)
  new_BL = old_BL.copy()
  new_BL[:, 3:6] = random_tokens(c, 2, 3, seed=1)
  _, cache = hidden(c, params, old_BL, None, None, c.new_cache(2, 8), 0)
  hidden_BWD, _ = hidden(c, params, new_BL[:, 3:6], None, None, cache, 3)
  np.testing.assert_allclose(hidden_BWD, hidden(c, params, new_BL)[0][:, 3:6], atol=1e-5)


def test_causal_decoding_from_an_empty_cache_equals_the_full_pass():
  c = dataclasses.replace(TINY, causal=True)
  params, tokens_BL = random_params(c), random_tokens(c, 2, 6)
  cache, columns = c.new_cache(2, 6), []
  for i in range(6):
    hidden_B1D, cache = hidden(c, params, tokens_BL[:, i : i + 1], None, None, cache, i)
    columns.append(hidden_B1D)
  np.testing.assert_allclose(np.concatenate(columns, axis=1), hidden(c, params, tokens_BL)[0], atol=1e-5)


def targets(c, B=4, L=6):
  """Input, and targets of which each pair of rows has at most L + 1; one row is asked nothing."""
  input_BL, target_BL = random_tokens(c, B, L), random_tokens(c, B, L, seed=1)
  asked_BL = np.zeros((B, L), bool)
  asked_BL[0], asked_BL[1, 2], asked_BL[3, 1:4] = True, True, True
  return jnp.asarray(input_BL), jnp.asarray(np.where(asked_BL, target_BL, -1))


@functools.cache
def loss_and_gradient(c, per_pair=None):
  """A sum that weighs each cross-entropy of `targets` differently, these, and its gradient."""
  input_BL, target_BL = targets(c)
  weight_BL = np.linspace(0.5, 2.0, input_BL.size, dtype=np.float32).reshape(input_BL.shape)

  def total(params):
    return c.bind(params).weighted_nll(input_BL, target_BL, weight_BL, per_pair=per_pair)

  return jax.jit(jax.value_and_grad(total, has_aux=True))(random_params(c))


@pytest.mark.parametrize("tied", [False, True])
def test_nll_is_the_cross_entropy_of_the_target(tied):
  c = dataclasses.replace(TINY, tied=tied)
  params, (input_BL, target_BL) = random_params(c), targets(c)
  segment_BL = np.tile([1, 1, 2, 2, 2, 2], (4, 1)).astype(np.int32)
  log_p_BLV = jax.nn.log_softmax(logits(c, params, input_BL, segment_BL))
  picked_BL = np.take_along_axis(np.asarray(log_p_BLV), np.maximum(target_BL, 0)[..., None], axis=-1)[..., 0]
  nll_BL = jax.jit(lambda params: c.bind(params).nll(input_BL, target_BL, c.visible(6, segment_BL)))(params)
  np.testing.assert_allclose(nll_BL, np.where(target_BL < 0, 0.0, -picked_BL), atol=1e-5)
  assert not np.any(np.asarray(nll_BL)[target_BL < 0]) and nll_BL.dtype == np.float32


@pytest.mark.parametrize(
  "fields, per_pair",
  [
    ({"N": 1, "head_chunk": 5}, None),  # does not divide the tokens
    ({"N": 1, "head_chunk": 8, "tied": True}, None),  # does
    ({"N": 1}, 7),
    ({"N": 1, "head_chunk": 4, "tied": True}, 7),
    ({"N": 2, "remat": "full"}, None),
    ({"N": 9, "remat": "full"}, None),  # in a loop
    ({"N": 9, "remat": "dots"}, None),
  ],
)
def test_what_saves_memory_or_time_changes_neither_loss_nor_gradient(fields, per_pair):
  actual = loss_and_gradient(dataclasses.replace(TINY, **fields), per_pair)
  plain = {name: value for name, value in fields.items() if name in ("N", "tied")}
  expected = loss_and_gradient(dataclasses.replace(TINY, **plain))
  chex.assert_trees_all_close(actual, expected, atol=2e-5)


@pytest.mark.parametrize("experts", [{}, {"E": 4, "J": 2, "X": 256}], ids=["dense", "experts"])
def test_gathered_weights_do_not_wait_for_the_backward_pass(experts):
  """What a layer more takes of a device that has an eighth of each matrix is less than its matrices; it was twice."""
  mesh = sharding.make_mesh(sharding.MeshConfig(data=1, fsdp=8))
  tokens_BL = jax.ShapeDtypeStruct((8, 2), jnp.int32, sharding=sharding.shardings(mesh, "BL"))

  def of(N):
    """(temporary bytes, bytes of a layer's matrices) of the loss's gradient by a loop over N layers."""
    c = MaskPredictorConfig(D=128, N=N, H=4, G=4, K=32, F=512, V=16, dtype="bfloat16", **experts)
    loss = lambda params, x_BL: c.bind(params).weighted_nll(x_BL, x_BL, jnp.ones((8, 2)))[0]  # noqa: E731
    with jax.set_mesh(mesh):
      at = sharding.shardings(mesh, c.letters())
      shapes = jax.eval_shape(c.init, jax.random.key(0))
      shapes = jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, at)
      program = jax.jit(jax.grad(loss), out_shardings=at).lower(shapes, tokens_BL).compile()
    return program.memory_analysis().temp_size_in_bytes, 2 * sum(x.size for x in jax.tree.leaves(shapes["blocks"])) / N

  (few, layer), (more, _) = of(9), of(13)
  assert few < more < few + 4 * layer


def test_bfloat16_computes_float32_logits():
  c = dataclasses.replace(TINY, dtype="bfloat16")
  params, tokens_BL = random_params(c), random_tokens(c, 2, 6)
  expected_BLV = np.asarray(logits(TINY, params, tokens_BL))
  # Not under jit, where XLA may skip a rounding that the program asks for.
  out_BLV = np.asarray(c.bind(params).logits(hidden(c, params, tokens_BL)[0]))
  assert out_BLV.dtype == logits(c, params, tokens_BL).dtype == np.float32
  assert np.any(out_BLV != out_BLV.astype(jnp.bfloat16))  # nor were they rounded on the way
  difference = abs(out_BLV - expected_BLV).max()
  assert 1e-4 < difference < 0.1 * abs(expected_BLV).max()  # bfloat16 it was, and no worse
  weighted_nll = lambda params: c.bind(params).weighted_nll(*targets(c), jnp.ones((4, 6)))  # noqa: E731
  loss_and_gradients = jax.eval_shape(jax.value_and_grad(weighted_nll, has_aux=True), params)
  assert {x.dtype for x in jax.tree.leaves(loss_and_gradients)} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
  "fields, said",
  [
    ({"D": 0}, "model.D=0"),
    ({"N": -1}, "model.N=-1"),
    ({"H": 3}, "model.H=3 is not a multiple of model.G=2"),
    ({"K": 5}, "model.K=5"),
    ({"remat": "some"}, "model.remat='some': use one of none, dots, attention, full"),
    ({"weights": "int5"}, "model.weights='int5': use one of full, int8, int4, nf4"),
    (
      {"weights": "nf4", "F": 7},
      "model.weights='nf4' keeps two values in a byte: model.D=12, model.F=7 are not both even; use int8",
    ),
    ({"dtype": "float64"}, "model.dtype='float64': use auto, float32, bfloat16 or float16"),
  ],
)
def test_a_bad_config_is_one_clear_line(fields, said):
  with pytest.raises(ValueError, match="model") as error:
    dataclasses.replace(TINY, **fields)
  assert said in str(error.value) and "\n" not in str(error.value)


def test_parameters_need_a_vocabulary():
  with pytest.raises(ValueError, match="model.V=0: set the rows"):
    dataclasses.replace(TINY, V=0).init(jax.random.key(0))


LORA = dataclasses.replace(TINY, lora_rank=3, lora_alpha=6.0)


@pytest.mark.parametrize("targets", [("q",), ("out", "down"), LORA.lora_targets])
def test_merged_adapters_answer_as_the_adapted_model(targets):
  c = dataclasses.replace(LORA, lora_targets=targets)
  params = random_params(c)  # the second factors, too, which begin as zeros
  trained, frozen = c.split(params)
  assert sorted(trained["blocks"]) == sorted(f"{name}_{x}" for name in targets for x in "ab")
  merged_c, merged = c.merge(trained, frozen)
  assert merged_c == dataclasses.replace(c, lora_rank=0)
  assert jax.tree.structure(merged) == jax.tree.structure(merged_c.letters())
  tokens_BL = jnp.asarray(np.random.default_rng(1).integers(0, c.V, (2, 7)), jnp.int32)
  adapted = c.bind(c.join(trained, frozen))(tokens_BL)
  np.testing.assert_allclose(adapted, merged_c.bind(merged)(tokens_BL), rtol=1e-4, atol=1e-4)
  plain = merged_c.bind(frozen)(tokens_BL)
  assert np.abs(np.asarray(adapted - plain)).max() > 0.01


def test_new_adapters_change_nothing():
  base = dataclasses.replace(LORA, lora_rank=0).init(jax.random.key(0))
  params = LORA.init(jax.random.key(0))
  trained, frozen = LORA.split(params)
  chex.assert_trees_all_equal(base, frozen)
  _, merged = LORA.merge(trained, frozen)
  chex.assert_trees_all_equal(merged, frozen)
  assert LORA.num_params() == dataclasses.replace(LORA, lora_rank=0).num_params() + sum(
    x.size for x in jax.tree.leaves(trained)
  )


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"lora_rank": -1}, "model.lora_rank=-1"),
    ({"lora_targets": ("head",)}, "model.lora_targets: 'head' is not one of q, k, v, out"),
    ({"lora_targets": (), "lora_rank": 1}, "name the matrices that get adapters"),
  ],
)
def test_bad_adapters_are_named(fields, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(TINY, **fields)


def test_the_embeddings_gradient_adds_up_in_float32():
  """Thousands of [MASK]s: a sum in bfloat16 stops at 256 times what is added (on a GPU; XLA's CPU backend has none)."""
  c = dataclasses.replace(TINY, dtype="bfloat16", N=1, max_length=4096)
  tokens_BL = jnp.full((1, 4096), 3)

  def gradient(c):
    def loss(params):
      return jnp.mean(c.bind(params).hidden(tokens_BL)[0][:, :, 0].astype(jnp.float32))

    return jax.grad(loss)

  assert re.findall(r"(\w+)\[\d+,\d+\] = scatter-add", str(jax.make_jaxpr(gradient(c))(random_params(c)))) == ["f32"]
  exact = dataclasses.replace(c, dtype="float32")
  ours_D, exact_D = (jax.jit(gradient(c))(random_params(c))["embedding"][3] for c in (c, exact))
  assert jnp.linalg.norm(ours_D - exact_D) < 0.05 * jnp.linalg.norm(exact_D)


def test_a_position_behind_the_canvas_is_no_other_position():
  """On a CPU cosines are looked up, and what is not in the table must not be taken for its last row."""
  params, tokens_BL = random_params(TINY), random_tokens(TINY, 1, 4)

  def hidden(*positions):
    return TINY.bind(params).hidden(tokens_BL, position_BL=jnp.array([positions]))[0]

  assert jnp.isfinite(hidden(0, 1, 2, 3)).all() and jnp.isnan(hidden(0, 1, 2, 4)).any()


@pytest.mark.parametrize("tensor", [1, 2])
def test_a_width_that_gpus_are_slow_with_is_padded(monkeypatch, tensor):
  """What is computed, and every gradient, stays; the matmuls' widths are multiples of 64 on each device."""
  c = dataclasses.replace(TINY, N=1, F=20, attention="xla", dtype="float32", lora_rank=2)
  params, tokens_BL = random_params(c), random_tokens(c, 2, 6)

  def run():
    with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(data=1, tensor=tensor), jax.devices()[:tensor])):
      program = jax.jit(jax.value_and_grad(lambda params: jnp.mean(c.bind(params)(tokens_BL)[:, :, 0]))).lower(params)
      return program.as_text(), program.compile()(params)

  text, expected = run()
  with monkeypatch.context() as patch:
    patch.setattr(sharding, "platform", lambda: "gpu")
    padded_text, padded = run()
  wide = f"x{64 * tensor}xf32"
  assert wide not in text and wide in padded_text
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-5), padded, expected)


def test_float16_holds_what_outgrows_it():
  """The stream is float32, and a product of the feed-forward that float16 cannot say is its largest number."""
  c, params, tokens_BL = dataclasses.replace(TINY, dtype="float16"), random_params(TINY), random_tokens(TINY, 2, 8)
  blocks = params["blocks"]
  params["blocks"] = blocks | {"down": 3e4 * blocks["down"]}
  expected = np.asarray(logits(TINY, params, tokens_BL))
  np.testing.assert_allclose(logits(c, params, tokens_BL), expected, atol=0.02 * np.abs(expected).max())
  params["blocks"] = blocks | {name: 1e3 * blocks[name] for name in ("gate", "up")}
  assert np.isfinite(logits(c, params, tokens_BL)).all()
