import re

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lladax import checkpoint, sharding, train
from lladax.mask_predictor import Block
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


@pytest.mark.parametrize(
  ("model", "length", "message"),
  [
    ({"D": 12}, 16, "mesh.fsdp=8 does not divide model.D=12: use a divisor of it"),
    ({"D": 16, "G": 1}, 16, "mesh.tensor=2 does not divide model.G=1"),
    ({"D": 16, "G": 2}, 15, "mesh.context=2 does not divide data.length=15"),
  ],
)
def test_a_model_that_the_mesh_cannot_divide(model, length, message):
  sizes = {"data": 1} | ({"fsdp": 8} if model["D"] == 12 else {"fsdp": 2, "tensor": 2, "context": 2})
  with pytest.raises(ValueError, match=message):
    sharding.check_divides(sharding.make_mesh(MeshConfig(**sizes)), model, length)


def test_a_pair_lives_on_one_device():
  mesh = sharding.make_mesh(MeshConfig())
  with pytest.raises(ValueError, match="size=24 does not divide .* = 8 devices in rows that come in 2s: use 16 or 32"):
    sharding.check_batch(mesh, 24, multiple=2)


def test_axes_that_do_not_divide_are_left_out():
  with jax.set_mesh(sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
    assert sharding.fit("BLD", (4, 3, 5)) == P(("slices", "data", "fsdp"), None, None)
    assert sharding.fit("BLF", (1, 3, 6)) == P(None, None, ("tensor",))
    assert sharding.fit("BLF", (1, 3, 5)) == P(None, None, None)
  assert sharding.fit("BLF", (4, 4, 4)) == P(None, None, None)  # no mesh


def test_the_rows_of_a_process_are_those_of_its_devices():
  mesh = sharding.make_mesh(MeshConfig(data=2, context=4))
  np.testing.assert_array_equal(sharding.local_rows(sharding.shardings(mesh, "B"), (6,)), range(6))


def test_large_replicated_arrays_are_found():
  mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=8))
  whole, sliced = (jax.device_put(np.zeros((8, 8), np.float32), sharding.shardings(mesh, x)) for x in ("", "DF"))
  assert sharding.replicated({"a": {"whole": whole}, "sliced": sliced}, at_least=256) == [("a/whole", 256)]
  assert sharding.replicated({"whole": whole}, at_least=257) == []


COLLECTIVE = re.compile(r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")


def step_collectives(tiny, mesh):
  """(config, [(kind, [shape, ...]), ...]) of the collectives of the compiled train step."""
  changes = {"model.N": 12, "model.D": 32, "model.F": 64, "model.V": 384, "model.head_chunk": 8, "model.remat": "full"}
  config = tiny(changes | {f"mesh.{axis}": size for axis, size in mesh.items()})
  grid = sharding.make_mesh(config.mesh)
  tx, init, at, batch_at = train.program(config, grid)
  dtypes = {"tokens": "int32", "weight": "float32", "segment": "int32", "index": "int32"}
  with jax.set_mesh(grid):
    state = jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), jax.eval_shape(init), at)
    batch = {
      name: jax.ShapeDtypeStruct((32,) if name == "index" else (32, 16), dtype, sharding=batch_at[name])
      for name, dtype in dtypes.items()
    }
    hlo = train.jit_step(config, tx, at, mask_id=3, eos_id=2).lower(state, batch).compile().as_text()
  found = []
  for line in hlo.replace("/*index=5*/", "").splitlines():
    if match := COLLECTIVE.search(line):
      dims = re.findall(r"[a-z]\w*\[([\d,]*)\]", match[1])
      found.append((match[2], [tuple(map(int, filter(None, x.split(",")))) for x in dims]))
  return config, found


def test_weights_are_gathered_layer_by_layer(tiny):
  """From the compiled program: 9 weights a layer, forward and again backward, and the three outside of the layers."""
  config, found = step_collectives(tiny, {"data": 1, "fsdp": 8})
  c = config.model
  gathered = [shape for kind, shapes in found if kind == "all-gather" for shape in shapes]
  layer = [(1, *(getattr(c, letter) for letter in letters)) for letters in Block.LETTERS.values()]
  assert sorted(gathered) == sorted(2 * layer + [(c.V, c.D), (c.D, c.V), (c.D,)])
  assert {kind for kind, _ in found} <= {"all-gather", "all-reduce", "reduce-scatter"}


def test_only_keys_and_values_are_gathered_along_the_context(tiny):
  """No full activation, no tree of parameters, on a mesh with every axis."""
  config, found = step_collectives(tiny, {"data": 1, "fsdp": 2, "tensor": 2, "context": 2})
  c, rows = config.model, 32 // 2
  gathered = {shape for kind, shapes in found if kind == "all-gather" for shape in shapes}
  kv = (rows, 16, c.G // 2, c.K)  # the rows and heads of a device, the whole canvas
  assert kv in gathered
  split = {"H": c.H // 2, "G": c.G // 2, "F": c.F // 2, "V": c.V // 2}
  layer = {(1, *(split.get(x, getattr(c, x)) for x in letters)) for letters in Block.LETTERS.values()}
  assert gathered - {kv} <= layer | {(c.V // 2, c.D), (c.D, c.V // 2), (c.D,)}
  assert "all-to-all" not in {kind for kind, _ in found}
