import jax
import pytest
from jax.sharding import PartitionSpec as P

from lladax import checkpoint, sharding, train
from lladax.sharding import MeshConfig


@pytest.mark.parametrize(
  ("sizes", "shape"),
  [
    ({}, (1, 8, 1, 1, 1)),
    ({"fsdp": 4, "tensor": 2}, (1, 1, 4, 2, 1)),
    ({"data": 2, "fsdp": -1}, (1, 2, 4, 1, 1)),
    ({"data": 1, "tensor": 2, "context": -1}, (1, 1, 1, 2, 4)),
    ({"data": 2, "fsdp": 2, "tensor": 2, "context": 1}, (1, 2, 2, 2, 1)),
    ({"slices": 2, "fsdp": 2}, (2, 2, 2, 1, 1)),
  ],
)
def test_mesh_sizes(sizes, shape):
  mesh = sharding.make_mesh(MeshConfig(**sizes))
  assert dict(mesh.shape) == dict(zip(("slices", "data", "fsdp", "tensor", "context"), shape, strict=True))


def test_a_mesh_of_some_devices():
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[2:5])
  assert list(mesh.devices.flat) == jax.devices()[2:5]


@pytest.mark.parametrize(
  ("sizes", "message"),
  [
    ({"fsdp": 3}, "mesh.fsdp=3.* do not multiply to the 8 devices"),
    ({"data": 2}, "mesh.data=2.* do not multiply to the 8 devices"),
    ({"data": 16}, "mesh.data=16.* do not multiply to the 8 devices"),
    ({"tensor": -1}, "mesh.data and mesh.tensor are both -1"),
    ({"tensor": 0}, "mesh.tensor=0: must be at least 1"),
    ({"context": -2}, "mesh.context=-2: must be at least 1"),
  ],
)
def test_bad_meshes_are_named(sizes, message):
  with pytest.raises(ValueError, match=message):
    sharding.make_mesh(MeshConfig(**sizes))


@pytest.mark.parametrize(
  ("letters", "expected"),
  [
    ("BL", P(("slices", "data", "fsdp"), ("context",))),
    ("NDHK", P(None, ("fsdp",), ("tensor",), None)),
    ("VD", P(("tensor",), ("fsdp",))),
    ("BLD", P(("slices", "data", "fsdp"), ("context",), None)),  # the batch has taken fsdp
    ("HF", P(("tensor",), None)),
    ("", P()),
  ],
)
def test_no_axis_is_used_twice(letters, expected):
  assert sharding.spec(letters) == expected


@pytest.mark.parametrize(("batch_size", "use"), [(12, "8 or 16"), (3, "8"), (17, "16 or 24")])
def test_a_batch_that_the_devices_cannot_divide(batch_size, use):
  mesh = sharding.make_mesh(MeshConfig(data=4, fsdp=2))
  sharding.check_batch(mesh, 16)
  with pytest.raises(ValueError, match=f"data.batch_size={batch_size} does not divide .* = 8 devices: use {use}$"):
    sharding.check_batch(mesh, batch_size)


def test_the_moments_lie_where_their_parameters_lie(tiny, tmp_path):
  run = train.prepare(tiny({"mesh.data": 1, "mesh.fsdp": 4, "mesh.tensor": 2}), tmp_path / "run")
  init = jax.jit(run.init, out_shardings=run.shardings).lower()
  state = init.compile({"xla_backend_optimization_level": 0})()
  tree = train.to_tree(state)
  params, mu, nu = (
    {path: x.sharding.shard_shape(x.shape) for path, x in checkpoint.flat(tree[name])}
    for name in ("params", "mu", "nu")
  )
  assert params == mu == nu
  # D over 4 devices; V, H, G and F over 2; vectors along D too.
  assert params["embedding"] == (384 // 2, 16 // 4)
  assert params["blocks/q"] == (2, 16 // 4, 2 // 2, 8)
  assert params["blocks/down"] == (2, 32 // 2, 16 // 4)
  assert params["blocks/ff_norm"] == (2, 16 // 4)
