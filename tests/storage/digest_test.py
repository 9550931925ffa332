import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lladax.storage import digest


def draw(dtype, shape=(6, 8, 16)):
  bits = np.random.default_rng(0).integers(0, 256, (*shape, np.dtype(dtype).itemsize), np.uint8)
  return jnp.asarray(bits.view(dtype)[..., 0]) if dtype is not bool else jnp.asarray(bits[..., 0] % 2 == 1)


def one(x):
  digests, _ = digest.of({"x": x})
  return digests["x"]


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16, np.int32, np.uint8, bool])
def test_any_bit_of_any_element_changes_the_digest(dtype):
  x = np.asarray(draw(dtype))
  rng, seen = np.random.default_rng(1), {one(jnp.asarray(x))}
  for count in range(2, 40):
    bits = x.copy().reshape(-1)
    at = rng.integers(len(bits))
    raw = bits[at : at + 1].view(np.uint8)
    raw[rng.integers(len(raw))] ^= 1 if dtype is bool else 1 << rng.integers(8)
    seen.add(one(jnp.asarray(bits.reshape(x.shape))))
    assert len(seen) <= count
  assert len(seen) > 30  # some flips are drawn twice


def test_places_and_shapes_and_dtypes_count():
  x = draw(np.float32)
  others = [x[::-1], x[:, ::-1], x.swapaxes(1, 2), x.at[0, 0].set(x[0, 1]).at[0, 1].set(x[0, 0]), x.view(jnp.int32)]
  assert len({one(x), *map(one, others)}) == 6
  assert one(jnp.zeros((4, 4))) != one(jnp.zeros((4, 5)))


def test_a_mesh_does_not_matter():
  x = draw(np.float32)
  mesh = jax.make_mesh((2, 4), ("a", "b"), devices=jax.devices())
  for spec in (P(), P("a"), P(None, "b", "a"), P(None, None, ("a", "b"))):
    assert one(jax.device_put(x, NamedSharding(mesh, spec))) == one(x)


def test_what_is_not_a_number_is_named():
  arrays = {"good": jnp.ones(3), "int": jnp.arange(3), "nan": jnp.array([1, jnp.nan]), "inf": -jnp.inf * jnp.ones(())}
  assert digest.of(arrays)[1] == ["nan", "inf"]
