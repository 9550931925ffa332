"""Matrices in 8 and 4 bits: how far they are from what they were, and that what computes with them says the same."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layouts import GOLDEN

import lladax
from lladax.devices import sharding
from lladax.mistake import Mistake
from lladax.model import quantized
from lladax.model.mask_predictor import Block, MaskPredictorConfig

pytest.importorskip("qwix")
pytestmark = pytest.mark.usefixtures("quick_compiles")
KINDS = quantized.KINDS[1:]
TINY = MaskPredictorConfig(D=64, N=2, H=4, G=2, K=16, F=96, V=128, max_length=64)


def params_of(c):
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(c.init, jax.random.key(0))
  return jax.tree.map(lambda x: (rng.standard_normal(x.shape) / 8).astype(np.float32), shapes)


def multiplied_out(c, params):
  """Float32 parameters of the model without bits: what `c` computes with."""
  return dataclasses.replace(c, lora_rank=1).merge({"blocks": adapters(c, 0.0)}, params)[1]


def adapters(c, scale, rank=1):
  with_them = dataclasses.replace(c, lora_rank=rank)
  shapes = with_them.split(jax.eval_shape(with_them.init, jax.random.key(0)))[0]["blocks"]
  rng = np.random.default_rng(0)
  return {name: jnp.asarray(scale * rng.standard_normal(x.shape), jnp.float32) for name, x in shapes.items()}


@pytest.mark.parametrize("group", [32, 64, 0])
@pytest.mark.parametrize("kind", KINDS)
def test_no_value_is_further_than_half_a_step(kind, group):
  """Scales are bfloat16: one that was rounded moves a value by a 256th of itself at most."""
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.standard_normal((4, 128, 24)) * 10.0 ** rng.integers(-3, 2, 24), jnp.float32)  # HKD
  found = quantized.quantize(x, "HKD", "HK", kind, group)
  packed = kind != "int8"
  assert (found["bits"].shape, found["bits"].dtype) == ((4, 128, 24 // (1 + packed)), jnp.uint8 if packed else jnp.int8)
  shape = (4, 128 // group, 24) if group else (1, 1, 24)
  assert (found["scale"].shape, found["scale"].dtype) == (shape, jnp.bfloat16)
  back = quantized.dequantize(quantized.Matrix(**found), kind, jnp.float32)
  scale = np.asarray(found["scale"], np.float32)
  step = np.broadcast_to(scale[:, :, None], (*shape[:2], x.size // 24 // shape[0] // shape[1], 24)).reshape(x.shape)
  widest = {"int8": 0.5, "int4": 0.5, "nf4": 0.152}[kind]
  distance = np.abs(back - x)
  assert np.all(distance <= widest * step * (1 + 2**-8) + np.abs(x) * 2**-8)
  assert np.max(distance / step) > 0.9 * widest  # the bound is met


def test_groups_are_as_wide_as_divides_the_inputs():
  found = quantized.quantize(jnp.ones((96, 4)), "DF", "D", "int4")
  assert found["scale"].shape == (3, 4)


@pytest.mark.parametrize("kind", ["int8", "nf4", pytest.param("int4", marks=pytest.mark.slow)])
def test_a_model_in_bits_is_the_model_of_what_they_mean(kind):
  c = dataclasses.replace(TINY, weights=kind)
  full = params_of(TINY)
  params = jax.jit(c.freeze)(full)
  assert jax.tree.structure(params) == jax.tree.structure(c.letters())
  plain = multiplied_out(c, params)
  tokens_BL = np.random.default_rng(0).integers(0, 128, (2, 32))

  def logits(c, params):
    return np.asarray(jax.jit(lambda params: c.bind(params)(tokens_BL))(params))

  expected_BLV = logits(TINY, plain)
  np.testing.assert_allclose(logits(c, params), expected_BLV, atol=1e-5 * np.abs(expected_BLV).max())
  apart = np.abs(logits(TINY, full) - expected_BLV).mean() / np.abs(expected_BLV).std()
  assert 0 < apart < {"int8": 0.05, "int4": 0.5, "nf4": 0.5}[kind]
  for name in Block.MATRICES:  # nothing else is in bits
    assert params["blocks"][name]["bits"].nbytes == full["blocks"][name].size // (1 if kind == "int8" else 2)
  for name in ("embedding", "head", "final_norm"):
    np.testing.assert_array_equal(params[name], full[name])


@pytest.mark.parametrize("remat", ["none", *(pytest.param(x, marks=pytest.mark.slow) for x in ("dots", "full"))])
def test_the_gradient_of_adapters_over_bits(remat):
  """It is that over what the bits mean, and no layer's matrix is kept for it."""
  c = dataclasses.replace(TINY, weights="nf4", lora_rank=2, remat=remat)
  frozen = jax.jit(dataclasses.replace(c, lora_rank=0).freeze)(params_of(TINY))
  trained = {"blocks": adapters(c, 0.1, rank=2)}
  plain_c = dataclasses.replace(c, weights="full")
  plain = multiplied_out(dataclasses.replace(c, lora_rank=0), frozen)
  tokens_BL = np.random.default_rng(0).integers(0, 128, (2, 12))

  def loss(c, trained, frozen):
    return c.bind(c.join(trained, frozen)).nll(tokens_BL, tokens_BL).mean()

  step = jax.jit(jax.value_and_grad(loss, argnums=1), static_argnums=0)
  value, found = step(c, trained, frozen)
  expected_value, expected = step(plain_c, trained, plain)
  np.testing.assert_allclose(value, expected_value, rtol=1e-6)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max()), found, expected)
  _, vjp = jax.vjp(functools.partial(loss, c, frozen=frozen), trained)
  kept = [x.shape for x in jax.tree.leaves(vjp) if getattr(x, "dtype", None) == jnp.float32]
  assert kept and not {full.shape for full in jax.tree.leaves(params_of(TINY)["blocks"]) if full.ndim > 2} & {*kept}


@pytest.mark.parametrize("kind", ["int4", *(pytest.param(x, marks=pytest.mark.slow) for x in ("int8", "nf4"))])
def test_on_a_mesh(kind):
  c = dataclasses.replace(TINY, weights=kind)
  params = jax.jit(c.freeze)(params_of(TINY))
  tokens_BL = np.random.default_rng(0).integers(0, 128, (4, 32))
  logits = jax.jit(lambda params: c.bind(params)(tokens_BL))
  expected_BLV = np.asarray(logits(params))
  mesh = sharding.make_mesh(sharding.MeshConfig(data=1, fsdp=4, tensor=2))
  sliced = jax.device_put(params, sharding.shardings(mesh, c.letters()))
  for name in Block.MATRICES:
    bits, scale = sliced["blocks"][name]["bits"], sliced["blocks"][name]["scale"]
    assert bits.addressable_shards[0].data.size == bits.size // 8
    assert scale.addressable_shards[0].data.size <= scale.size // 2
  with jax.set_mesh(mesh):
    np.testing.assert_allclose(logits(sliced), expected_BLV, atol=1e-5 * np.abs(expected_BLV).max())


def test_without_the_library(monkeypatch):
  monkeypatch.setattr(quantized.importlib, "import_module", lambda name: exec("raise ImportError(name)"))
  quantized.library.cache_clear()
  with pytest.raises(Mistake, match=r"model.weights .*needs qwix: pip install 'lladax\[quantize\]'$"):
    lladax.load(GOLDEN, weights="int8")
  monkeypatch.undo()
  quantized.library.cache_clear()
