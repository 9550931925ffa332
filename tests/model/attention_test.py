import contextlib
import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from lladax.devices import sharding
from lladax.model import attention
from lladax.model.attention import Visible
from lladax.model.mask_predictor import MaskPredictorConfig

pytestmark = pytest.mark.usefixtures("quick_compiles")


def random_qkv(W=3, L=5, H=4, G=2, K=6, dtype=np.float32):
  rng = np.random.default_rng(0)
  return [jnp.asarray(rng.standard_normal((2, *shape)), dtype) for shape in ((W, H, K), (L, G, K), (L, G, K))]


@pytest.mark.parametrize("allowed", [None, [[1, 0, 0, 0, 0], [1, 1, 0, 0, 1], [1, 1, 1, 1, 1]]])
@pytest.mark.parametrize("G", [1, 2, 4])
def test_attend_is_softmax_attention_over_the_allowed_keys(allowed, G):
  q_BWHK, k_BLGK, v_BLGK = random_qkv(G=G)
  allowed_WL = np.ones((3, 5)) if allowed is None else np.array(allowed)
  allowed_BWL = None if allowed is None else jnp.asarray(allowed_WL[None], bool)
  visible = Visible(5, 3, table_BWK=allowed_BWL)
  out_BWHK = jax.jit(attention.attend)(q_BWHK, k_BLGK, v_BLGK, visible)
  k_BLHK, v_BLHK = (np.repeat(x, 4 // G, axis=2) for x in (k_BLGK, v_BLGK))
  e_BHWL = np.exp(np.einsum("BWHK,BLHK->BHWL", q_BWHK, k_BLHK) / np.sqrt(6)) * allowed_WL
  expected_BWHK = np.einsum("BHWL,BLHK->BWHK", e_BHWL / e_BHWL.sum(axis=-1, keepdims=True), v_BLHK)
  np.testing.assert_allclose(out_BWHK, expected_BWHK, atol=1e-5)


def test_a_query_that_may_look_at_nothing_harms_nobody():
  q_BWHK, k_BLGK, v_BLGK = random_qkv(W=5)
  allowed_BWL = jnp.ones((1, 5, 5), bool).at[0, 0].set(False)
  attend = jax.jit(lambda *qkv: attention.attend(*qkv, Visible(5, 5, table_BWK=allowed_BWL)))
  gradients = jax.jit(jax.grad(lambda *qkv: attend(*qkv).sum(), argnums=(0, 1, 2)))(q_BWHK, k_BLGK, v_BLGK)
  assert all(np.isfinite(x).all() for x in (attend(q_BWHK, k_BLGK, v_BLGK), *gradients))


def test_bfloat16_stays_and_is_close_to_float32():
  qkv = random_qkv(dtype=jnp.bfloat16)
  out_BWHK = attention.attend(*qkv, Visible(5, 3))
  assert out_BWHK.dtype == jnp.bfloat16
  expected_BWHK = attention.attend(*(x.astype(np.float32) for x in qkv), Visible(5, 3))
  np.testing.assert_allclose(out_BWHK.astype(np.float32), expected_BWHK, atol=0.03)


def test_who_is_visible_is_the_picture_of_the_docstring():
  picture = Visible.__doc__.partition("```")[2].partition("```")[0].splitlines()
  (header,) = (line for line in picture if line.startswith("  segment"))
  segment_BL, reuse_L = np.array([[1, 1, 1, 2, 2, 0]]), np.array([1, 1, 0, 0, 1, 1], bool)
  drawn = [
    Visible(6, 6, segment_BL=segment_BL),
    Visible(6, 6, "causal", segment_BL),
    Visible(6, 2, segment_BL=segment_BL, start=2),
    Visible(6, 2, segment_BL=segment_BL, start=2, reuse_L=reuse_L),
    Visible(6, 6, "blocks", segment_BL, block=2),
  ]
  columns = list(re.finditer(r"\d(?: \d)+", header))
  for visible, column in zip(drawn, columns, strict=True):
    rows = [line[slice(*column.span())].split() for line in picture[picture.index(header) + 1 :]]
    expected_WK = np.array([[mark == "x" for mark in row] for row in rows if row])
    np.testing.assert_array_equal(visible.drawn().table_BWK[0], expected_WK)
    assert visible.keys == expected_WK.shape[1]


def test_who_is_visible_where_a_canvas_stands_twice():
  picture = Visible.__doc__.split("```")[3].splitlines()
  rows = [line.split()[1:] for line in picture if line.startswith("          ")]
  segment_BL = np.array([[1] * 5 + [2] * 3])
  doubled = Visible(8, 8, "blocks", segment_BL, block=2).doubled()
  np.testing.assert_array_equal(doubled.drawn().table_BWK[0], [[mark == "x" for mark in row] for row in rows])
  assert doubled.keys == 16


def test_where_all_may_look_at_all_there_is_no_table():
  assert Visible(6, 2, start=3).drawn().table_BWK is None
  forward_LL = np.tri(6, dtype=bool)
  np.testing.assert_array_equal(Visible(6, 6, "causal").drawn().table_BWK, forward_LL[None])
  np.testing.assert_array_equal(Visible(6, 2, "causal", start=3).drawn().table_BWK, forward_LL[None, 3:5])


RUNS = (range(256), range(99, 256), range(253, 256), range(40, 200))
SEGMENTS = {
  "none": None,
  "right": (np.arange(256) < [[256], [100], [3], [256]]).astype(np.int32),
  "run": np.array([[i in run for i in range(256)] for run in RUNS], np.int32),
  "row": np.repeat([[1, 2]], 128, axis=1).astype(np.int32),
  "any": np.stack([np.sort(np.random.default_rng(i).integers(0, 3, 256)) for i in range(4)]).astype(np.int32),
  "many": np.repeat(np.tile(np.arange(64, dtype=np.int32), (4, 1)), 4, axis=1),
}


def hidden_of(segments, kernel, *, cached=False, B=4, L=256, **fields):
  """(hidden(params), params) of a model of one layer, which asks for the kernel, over rows with these segments."""
  c = MaskPredictorConfig(**({"D": 32, "N": 1, "H": 4, "F": 32, "V": 17, "attention": kernel} | fields))
  tokens_BL = np.random.default_rng(0).integers(0, c.V, (B, L)).astype(np.int32)

  def hidden(params):
    cache = c.new_cache(B, L) if cached else None
    visible = c.visible(L, SEGMENTS[segments], right_padded=segments == "right", contiguous=segments == "run")
    return c.bind(params).hidden(tokens_BL, visible, cache=cache)[0]

  return hidden, jax.eval_shape(c.init, jax.random.key(0))


@pytest.mark.parametrize(
  ("segments", "G", "causal", "cached", "mesh"),
  [
    ("none", 2, True, False, None),
    ("none", 4, False, True, {"data": 2, "tensor": 2, "context": 2}),
    ("any", 1, True, True, None),
    ("any", 2, False, False, {"data": 2, "tensor": 2, "context": 2}),
    ("right", 4, True, False, {"data": 1, "fsdp": 4, "tensor": 2}),
  ],
)
def test_a_model_with_splash_is_one_with_xla(monkeypatch, segments, G, causal, cached, mesh):
  """Forward and gradients, in Pallas's interpreter, of what the mask predictor hands over: with a cache, too, if the
  window is the canvas. What the model keeps for the backward pass changes neither.
  """
  handed, interpreted = [], functools.partial(attention._splash, interpret=True)

  def splash(*arrays, **options):
    handed.append(len(arrays))
    return interpreted(*arrays, **options)

  monkeypatch.setattr(attention, "_splash", splash)
  monkeypatch.setattr(sharding, "platform", lambda: "tpu")
  rng = np.random.default_rng(0)
  weight = rng.standard_normal((4, 256, 32)).astype(np.float32)
  if segments != "none":  # the padding's own answers are nobody's business
    weight = weight * (SEGMENTS[segments] > 0)[:, :, None]

  def answers(kernel):
    hidden, shapes = hidden_of(
      segments, kernel, cached=cached, G=G, K=16, causal=causal, dtype="float32", remat="attention"
    )
    params = jax.tree.map(lambda x: np.float32(0.3 * np.random.default_rng(0).standard_normal(x.shape)), shapes)
    return jax.jit(jax.value_and_grad(lambda params: jnp.sum(weight * hidden(params))))(params)

  with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(**mesh))) if mesh else contextlib.nullcontext():
    found = answers("splash")
  assert set(handed) == {3 if segments == "none" else 5}  # no segments came in: none arrive
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(answers("xla")), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())


@pytest.mark.parametrize(
  ("segments", "G", "causal", "mesh"),
  [
    ("right", 2, False, {"data": 2, "tensor": 2, "context": 2}),
    ("right", 4, True, None),
    ("run", 2, False, None),
    ("any", 1, True, None),
  ],
)
def test_a_model_with_cudnn_is_one_with_xla(monkeypatch, segments, G, causal, mesh):
  """Forward and gradients, with JAX's own attention in cuDNN's place: it, too, leaves zeros in padding. What the model
  keeps for the backward pass changes neither.
  """
  there, handed = jax.nn.dot_product_attention, []

  def stand_in(*qkv, implementation, **rest):
    handed.append((implementation, *sorted(name for name, x in rest.items() if x is not False)))
    return there(*qkv, implementation="xla", **rest)

  weight = np.random.default_rng(0).standard_normal((4, 256, 32)).astype(np.float32)
  if segments != "none":
    weight = weight * (SEGMENTS[segments] > 0)[:, :, None]

  def answers(kernel):
    hidden, shapes = hidden_of(segments, kernel, G=G, K=16, causal=causal, dtype="float32", remat="attention")
    params = jax.tree.map(lambda x: np.float32(0.3 * np.random.default_rng(0).standard_normal(x.shape)), shapes)
    return jax.jit(jax.value_and_grad(lambda params: jnp.sum(weight * hidden(params))))(params)

  expected = answers("xla")
  monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
  monkeypatch.setattr(attention, "choose", lambda *_, **__: "cudnn")  # in float32, to be compared
  with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(**mesh))) if mesh else contextlib.nullcontext():
    found = answers("cudnn")
  lengths = ["query_seq_lengths", "key_value_seq_lengths"]
  told = {"right": lengths, "run": lengths, "any": ["bias"], "none": []}[segments]
  told = sorted(told + ["is_causal"] * (causal and segments != "any"))
  assert set(handed) == {("cudnn", *told)}
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())


def beginnings_of_cudnn(q_BLHK, k_BLGK, v_BLGK, *, q_seqlen, kv_seqlen, q_offsets, kv_offsets, scale, mask_type):
  """What JAX's function makes of documents: as many beginnings as lengths, -1 where there is none."""
  assert mask_type == fused_attention_stablehlo.MaskType.PADDING
  assert (q_seqlen is kv_seqlen, q_offsets is kv_offsets, len(q_BLHK)) == (True, True, 1)
  at_11L = jnp.arange(q_BLHK.shape[1])[None, None]
  begin_BM1, length_BM1 = q_offsets[:, :-1, None], q_seqlen[:, :, None]
  inside_BML = (begin_BM1 >= 0) & (at_11L >= begin_BM1) & (at_11L < begin_BM1 + length_BM1)
  allowed_BLL = jnp.einsum("BML,BMK->BLK", inside_BML.astype(jnp.float32), inside_BML.astype(jnp.float32)) > 0
  return jax.nn.dot_product_attention(
    q_BLHK, k_BLGK, v_BLGK, mask=allowed_BLL[:, None], scale=scale, implementation="beginnings"
  )


@pytest.mark.parametrize(("segments", "fits", "G"), [("any", True, 2), ("many", False, 1)])
def test_documents_by_their_beginnings_are_those_by_a_table(monkeypatch, segments, fits, G):
  """Forward and gradients, with a stand-in; and those that do not fit into the room go by a bias. (Shapes differ, since
  JAX remembers what branches were.)
  """
  there, weight = jax.nn.dot_product_attention, (SEGMENTS[segments] > 0)[:, :, None]
  found, shapes = {}, None

  def stand_in(*qkv, implementation, **rest):  # of the two ways, the one that is not meant would be seen
    return there(*qkv, implementation="xla", **rest) * (1 if (implementation == "beginnings") == fits else jnp.nan)

  monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
  monkeypatch.setattr(fused_attention_stablehlo, "dot_product_attention", beginnings_of_cudnn)
  for kernel in ("xla", "documents"):
    monkeypatch.setattr(attention, "choose", lambda *_, kernel=kernel, **__: kernel)
    hidden, shapes = hidden_of(segments, "auto", G=G, K=16, dtype="float32", remat="attention")
    params = jax.tree.map(lambda x: np.float32(0.3 * np.random.default_rng(0).standard_normal(x.shape)), shapes)
    found[kernel] = jax.jit(jax.value_and_grad(lambda params, f=hidden: jnp.sum(weight * f(params) ** 2)))(params)
  for a, b in zip(*map(jax.tree.leaves, found.values()), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(a).max())


def test_the_beginnings_of_documents():
  segment_BL = jnp.asarray([[1, 1, 2, 2, 2, 3, 0, 0], [5] * 8, [1, 2, 1, 2, 0, 0, 0, 0]], jnp.int32)
  begin_BM = np.asarray(attention._beginnings(segment_BL))
  assert begin_BM.shape == (3, attention._DOCUMENTS + 1)
  np.testing.assert_array_equal(begin_BM[:2, :5], [[0, 2, 5, 6, 8], [0, 8, 8, 8, 8]])
  assert (begin_BM[2] == -1).all()  # a document in two parts
  row_1L = jnp.arange(4 * attention._DOCUMENTS, dtype=jnp.int32)[None] // 4
  assert (attention._beginnings(row_1L)[0] >= 0).all()
  assert (attention._beginnings(jnp.pad(row_1L, ((0, 0), (0, 1)), constant_values=99)) == -1).all()  # one too many


def test_jax_has_what_documents_need():
  """Names that are not public: where they go, this fails, and users get the bias."""
  module = attention._cudnn()
  assert module.MaskType.PADDING
  assert {"q_seqlen", "kv_seqlen", "q_offsets", "kv_offsets"} <= set(
    inspect.signature(module.dot_product_attention).parameters
  )


def test_documents_by_their_beginnings_need_hopper_and_a_new_jax(monkeypatch):
  packed = {"segments": "any", "W": 4096, "L": 4096}
  monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
  assert choose("auto", "gpu", **packed, capability=(9, 0)) == choose("cudnn", "gpu", **packed, capability=(10, 0))
  assert choose("auto", "gpu", **packed, capability=(9, 0)) == "documents"
  others = [{"capability": (8, 0)}, {"capability": None}, {"causal": True}, {"context": 2}]
  assert {choose("auto", "gpu", **packed | {"capability": (9, 0)} | other) for other in others} == {"cudnn"}
  monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
  assert choose("auto", "gpu", **packed, capability=(9, 0)) == "cudnn"
  monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
  monkeypatch.setattr(attention, "_cudnn", lambda: None)
  assert choose("auto", "gpu", **packed, capability=(9, 0)) == "cudnn"


def test_documents_are_lowered_for_a_gpu(monkeypatch):
  monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
  monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda _: True)
  monkeypatch.setattr(sharding, "capability", lambda: (9, 0))
  text = lowered_gradient(monkeypatch, "any", remat="attention")
  assert set(re.findall(r"max_seg_per_batch\\22: (\d+)", text)) == {"1", str(attention._DOCUMENTS)}
  assert "tensor<4x1x256x256xbf16>" in text  # in the branch for rows that do not fit


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("segments", ["none", "right", "run", "any"])
@pytest.mark.parametrize("G", [2, 4])
def test_cudnn_is_asked_for_what_is_meant(monkeypatch, segments, G, causal):
  """Lowered for a GPU, not run: the fused kernels are called, and scores exist only as the bias of packed segments."""
  text = lowered_gradient(monkeypatch, segments, G=G, causal=causal)
  bias = segments == "any" or (segments == "run" and causal)
  name = "fmhaScaleBiasSoftmax" if bias else "fmhaSoftmax"
  assert f"__cudnn${name}(" in text and f"__cudnn${name}Backward(" in text
  padding = "PADDING_CAUSAL" if causal else "PADDING"
  told = {"none": "CAUSAL" if causal else "NO_MASK", "right": padding, "run": padding, "any": ""}[segments]
  told = "NO_MASK" if bias else told
  assert set(re.findall(r"mask_type\\22: \\22(\w+)", text)) == {told}
  assert ("256x256" in text) == bias
  assert "4x4x256x256" not in text
  # Nothing is masked where the kernel knows lengths, and a bias is made once for all layers, not in their loop.
  assert "4x256x4x32xi1" not in text
  assert len(re.findall(r"select .*tensor<4x256x256x", text)) == bias


def lowered_gradient(monkeypatch, segments, kernel="cudnn", **fields):
  """The text of a model's gradient for a GPU or a TPU that is not here."""
  platform = {"cudnn": "gpu", "splash": "tpu"}[kernel]
  monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
  monkeypatch.setattr(sharding, "platform", lambda: platform)
  hidden, params = hidden_of(segments, kernel, **({"K": 32, "G": 2, "dtype": "bfloat16"} | fields))
  grad = jax.jit(jax.grad(lambda params: hidden(params).astype(jnp.float32).sum()))
  return grad.trace(params).lower(lowering_platforms=({"gpu": "cuda"}.get(platform, platform),)).as_text()


@pytest.mark.parametrize(
  ("remat", "forward", "segments", "mesh"),
  [
    ("none", 1, "right", None),
    ("dots", 1, "right", None),
    ("attention", 1, "right", None),
    ("attention", 1, "any", None),
    ("attention", 1, "right", {"data": 2, "tensor": 2, "context": 2}),
    ("full", 2, "right", None),
  ],
)
def test_the_forward_kernel_runs_again_only_where_all_is_computed_again(monkeypatch, remat, forward, segments, mesh):
  """Layers are a loop: each of its bodies, forward and backward, stands once in the text."""
  with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(**mesh))) if mesh else contextlib.nullcontext():
    text = lowered_gradient(monkeypatch, segments, N=9, remat=remat)
  assert len(re.findall(r"custom_call @__cudnn\$fmha\w*Softmax\(", text)) == forward
  assert len(re.findall(r"custom_call @__cudnn\$fmha\w*SoftmaxBackward\(", text)) == 1


@pytest.mark.parametrize(("remat", "forward"), [("dots", 1), ("full", 2)])
def test_what_splash_leaves_waits_without_the_filling_of_a_tpu(monkeypatch, remat, forward):
  """Heads of a width below 128 lie end to end from the forward pass to the backward pass, of all layers."""
  text = lowered_gradient(monkeypatch, "right", "splash", N=9, remat=remat)
  assert len(re.findall(r"custom_call @tpu_custom_call\(.*splash_mha_fwd", text)) == forward
  assert ("tensor<9x4x4x8192xbf16>" in text) == (remat == "dots")
  assert "tensor<9x4x4x256x32xbf16>" not in text and "tensor<9x4x256x4x32xbf16>" not in text


@pytest.mark.parametrize(("kernel", "platform"), [("xla", "cpu"), ("splash", "tpu"), ("cudnn", "gpu")])
def test_segments_may_be_one_row_for_all(monkeypatch, kernel, platform):
  monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
  monkeypatch.setattr(sharding, "platform", lambda: platform)
  hidden, params = hidden_of("row", kernel, G=2, K=32, dtype="bfloat16")
  assert jax.eval_shape(hidden, params).shape == (4, 256, 32)


def choose(
  kernel, platform, *, W=256, L=256, causal=False, segments="none", K=64, dtype=jnp.bfloat16, **where
):  # fmt: skip
  segment_BL = None if segments == "none" else jax.ShapeDtypeStruct((1, L), jnp.int32)
  order, padded = "causal" if causal else "full", {"right_padded": segments == "right", "contiguous": segments == "run"}
  visible = Visible(L, W, order, segment_BL, **padded)
  return attention.choose(kernel, visible, K=K, dtype=dtype, platform=platform, **where)


@pytest.mark.parametrize(
  ("platform", "changes", "chosen"),
  [
    ("cpu", {}, "xla"),
    ("tpu", {}, "splash"),
    ("tpu", {"segments": "any", "context": 2}, "splash"),
    ("tpu", {"L": 200, "W": 200}, "xla"),
    ("tpu", {"causal": True, "context": 2}, "xla"),
    ("tpu", {"W": 128}, "xla"),  # a window over a cache
    ("gpu", {}, "cudnn"),
    ("gpu", {"segments": "right"}, "cudnn"),
    ("gpu", {"segments": "run"}, "cudnn"),
    ("gpu", {"segments": "run", "causal": True}, "xla"),  # few tokens, and their places matter
    ("gpu", {"segments": "any"}, "xla"),
    ("gpu", {"segments": "any", "W": 4096, "L": 4096}, "cudnn"),
    ("gpu", {"segments": "any", "W": 4095, "L": 4095}, "xla"),
    ("gpu", {"segments": "right", "W": 4095, "L": 4095}, "cudnn"),
    ("gpu", {"W": 128}, "xla"),
    ("gpu", {"dtype": jnp.float32}, "xla"),
    ("gpu", {"K": 256}, "xla"),
    ("gpu", {"capability": (7, 5)}, "xla"),
    ("gpu", {"capability": (8, 0), "dtype": jnp.float16}, "cudnn"),
    ("gpu", {"capability": (10, 0)}, "cudnn"),
  ],
)
def test_the_fastest_exact_kernel_is_chosen(platform, changes, chosen):
  assert choose("auto", platform, **changes) == chosen
  assert choose("xla", platform, **changes) == "xla"


@pytest.mark.parametrize(
  ("kernel", "platform", "changes", "why"),
  [
    ("splash", "cpu", {}, "it runs on a tpu, and this is a cpu"),
    ("cudnn", "tpu", {}, "it runs on a gpu, and this is a tpu"),
    ("cudnn", "gpu", {"dtype": jnp.dtype("float32")}, "it computes in 16 bits, not in float32"),
    ("cudnn", "gpu", {"K": 200}, "model.K=200 is not a multiple of 8 up to 128"),
    ("cudnn", "gpu", {"causal": True, "context": 4}, "it cannot be causal with mesh.context=4"),
    ("cudnn", "gpu", {"segments": "any", "L": 255, "W": 255}, "there are segments, and the length 255 .* is not even"),
    ("cudnn", "gpu", {"capability": (7, 5)}, "it needs a GPU of capability 8.0, and this one has 7.5"),
    ("splash", "tpu", {"L": 192, "W": 192}, "the length 192 on 1 devices is not a multiple of 128"),
  ],
)
def test_an_explicit_kernel_that_cannot_is_an_error(kernel, platform, changes, why):
  with pytest.raises(ValueError, match=f"model.attention={kernel!r}: {why}.*; use auto or xla"):
    choose(kernel, platform, **changes)


def test_the_choice_is_logged_once(caplog):
  attention._said.cache_clear()
  with caplog.at_level("INFO", "lladax"):
    for _ in range(3):
      choose("auto", "tpu", L=200, W=200)
  assert [record.getMessage() for record in caplog.records] == [
    "attention kernel: xla (the length 200 on 1 devices is not a multiple of 128 on each)"
  ]


def test_the_gradient_of_einsum32_is_in_the_dtype_of_its_inputs():
  a, b = (jnp.asarray(np.random.default_rng(i).standard_normal((8, 8)), jnp.bfloat16) for i in range(2))
  gradient = jax.grad(lambda a, b: jnp.sum(attention.einsum32("TD,DV->TV", a, b) ** 2), argnums=(0, 1))
  text = jax.jit(gradient).lower(a, b).as_text()
  assert all("f32>, " not in line.split("->")[0] for line in text.splitlines() if "dot_general" in line)
  exact = jax.grad(lambda a, b: jnp.sum((a @ b) ** 2), argnums=(0, 1))(a.astype(jnp.float32), b.astype(jnp.float32))
  for x, y in zip(gradient(a, b), exact, strict=True):
    np.testing.assert_allclose(x.astype(jnp.float32), y, atol=0.02 * float(jnp.abs(y).max()))
