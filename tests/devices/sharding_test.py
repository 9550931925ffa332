import dataclasses
import logging
import math
import random
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lladax.config import parse
from lladax.configs import llada_8b
from lladax.devices import hlo, sharding
from lladax.devices.sharding import MeshConfig
from lladax.model.mask_predictor import Block
from lladax.storage import checkpoint
from lladax.training import setup, step


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


class _Gpu:
  device_kind, compute_capability = "NVIDIA L4", "8.9"


def test_the_capability_of_a_gpu(monkeypatch):
  assert sharding.capability() is None and sharding.capability(jax.devices()[0]) is None
  monkeypatch.setattr(jax, "devices", lambda: [_Gpu()])
  assert sharding.capability() == (8, 9)
  monkeypatch.setattr(_Gpu, "compute_capability", "gfx942")
  assert sharding.capability() is None


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


@dataclasses.dataclass(eq=False)
class Fake:
  """A device as one reports itself: of several nodes of GPUs each has a slice index of its own, as TPU slices have."""

  id: int
  slice_index: int
  platform: str = "gpu"
  device_kind: str = "NVIDIA H100 80GB HBM3"
  process_index: int = 0
  coords: tuple[int, int, int] | None = None
  core_on_chip: int = 0


def nodes(n, each=8):
  """GPUs of n nodes, one process each; JAX promises no order."""
  found = [Fake(i, i // each, process_index=i) for i in range(n * each)]
  random.Random(0).shuffle(found)
  return found


def pods(n):
  """TPUs of n slices of 2 x 2."""
  at = [(x, y, 0) for y in range(2) for x in range(2)]
  return [Fake(4 * s + i, s, "tpu", "TPU v4", s, at[i]) for s in range(n) for i in range(4)]


@pytest.fixture
def said(caplog):
  """What this test makes the package say: its `messages`."""
  sharding._say.cache_clear()
  caplog.set_level(logging.INFO, "lladax")
  return caplog


@pytest.mark.parametrize("n", [1, 2, 8])
@pytest.mark.parametrize(
  ("sizes", "shape", "crossing"),
  [
    ({}, (1, -1, 1, 1, 1), {2: ["data"], 8: ["data"]}),
    ({"data": 1, "fsdp": -1}, (1, 1, -1, 1, 1), {2: ["fsdp"], 8: ["fsdp"]}),  # configs/llada_8b.py
    ({"slices": -1, "data": 1, "fsdp": -1}, ("n", 1, 8, 1, 1), {}),
    ({"slices": -1, "tensor": 2, "context": 2}, ("n", 2, 1, 2, 2), {}),
    ({"data": 2, "fsdp": -1, "tensor": 4}, (1, 2, -1, 4, 1), {2: ["data"], 8: ["data", "fsdp"]}),
    ({"data": 1, "fsdp": 4, "tensor": -1}, (1, 1, 4, -1, 1), {2: ["fsdp"], 8: ["fsdp", "tensor"]}),
    ({"data": 1, "context": -1}, (1, 1, 1, 1, -1), {2: ["context"], 8: ["context"]}),
  ],
  ids=str,
)
def test_gpus_of_any_nodes_and_what_crosses_between_them(n, sizes, shape, crossing, said):
  devices = nodes(n)
  for _ in range(2):
    mesh = sharding.make_mesh(MeshConfig(**sizes), devices)
  shape = [n if size == "n" else size for size in shape]
  shape = [-8 * n // math.prod(shape) if size == -1 else size for size in shape]
  assert list(mesh.shape.values()) == shape
  # Neighbours of a node are neighbours in the inner axes.
  assert [device.id for device in mesh.devices.flat] == list(range(8 * n))
  crossing = crossing.get(n, [])
  for axis, line in zip(crossing, said.messages, strict=True):
    assert line.startswith(f"mesh.{axis}={mesh.shape[axis]} crosses between {n} nodes: ") and "over the network" in line
    assert ("mesh.slices=-1 leaves it" in line) == (axis != "data")


def test_the_8b_run_starts_on_eight_nodes_of_eight_gpus(said):
  for slices in (1, -1):
    values = llada_8b.get_config()
    values.mesh.slices = slices
    config = parse(values.to_dict())
    step.check_mesh(config, sharding.make_mesh(config.mesh, nodes(8)))
  said.clear()
  for topology, n in (("h100_8", 1), ("h100_8x8", 8)):
    config = parse(llada_8b.get_config(topology).to_dict())
    mesh = sharding.make_mesh(config.mesh, nodes(n))
    step.check_mesh(config, mesh)
    assert (mesh.shape["slices"], mesh.shape["fsdp"]) == (n, 8)
  assert not said.messages  # nothing but gradients crosses


@pytest.mark.parametrize("n", [1, 2, 8])
def test_slices_of_tpus_are_those_there_are(n, said):
  for slices in (n, -1):
    mesh = sharding.make_mesh(MeshConfig(slices=slices, data=1, fsdp=-1), pods(n))
    assert list(mesh.shape.values()) == [n, 1, 4, 1, 1]
    assert [{device.slice_index for device in part.flat} for part in mesh.devices] == [{i} for i in range(n)]
  if n > 1:
    with pytest.raises(ValueError, match=f"mesh.slices=1: the devices are in {n} slices; use as many, or -1"):
      sharding.make_mesh(MeshConfig(), pods(n))
  assert not said.messages


def test_slices_beside_other_rests():
  with pytest.raises(ValueError, match="mesh.data and mesh.fsdp are both -1"):
    sharding.make_mesh(MeshConfig(slices=-1, fsdp=-1), nodes(2))
  with pytest.raises(ValueError, match="mesh.slices=-1.* do not multiply to the 16 devices there are, in 2 groups"):
    sharding.make_mesh(MeshConfig(slices=-1, data=1, fsdp=16), nodes(2))


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
  run = setup.prepare(tiny({"mesh.data": 1, "mesh.fsdp": 4, "mesh.tensor": 2}), tmp_path / "run")
  init = jax.jit(run.init, out_shardings=run.shardings).lower()
  state = init.compile({"xla_backend_optimization_level": 0})()
  tree = step.to_tree(state)
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


def test_pairs_that_share_a_byte_stay_together():
  mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=8))
  sharding.check_divides(mesh, {"D": 24, "F": 7})  # nothing slices 7 here
  sharding.check_divides(mesh, {"D": 32}, pairs="D")
  with pytest.raises(ValueError, match="mesh.fsdp=8 does not divide model.D=24 in pairs, which share a byte: use a"):
    sharding.check_divides(mesh, {"D": 24}, pairs="D")


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


def test_the_axes_that_share_out_an_array():
  with jax.set_mesh(sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
    assert sharding.sliced("BL", (4, 3)) == ("slices", "data", "fsdp")
    assert sharding.sliced("EDX", (6, 8, 3)) == ("tensor", "fsdp")
    assert sharding.sliced("E", (5,)) == ()
  assert sharding.sliced("BL", (4, 4)) == ()  # no mesh


@pytest.mark.parametrize("sizes", [{"data": 1}, {"data": 2, "tensor": 4}])
def test_what_is_beside_has_letters_of_its_own(sizes):
  mesh = sharding.make_mesh(MeshConfig(**sizes), jax.devices()[: math.prod(sizes.values())])
  x_BE = np.arange(32.0).reshape(4, 8)

  with jax.set_mesh(mesh):
    axes = sharding.sliced("E", x_BE.shape[1:])

    def on_device(x_BE):
      return 2 * x_BE, {"sum": jax.lax.psum(x_BE.sum(1), axes) if axes else x_BE.sum(1)}

    twice, beside = jax.jit(lambda x: sharding.on_each_device(on_device, (x, "BE"), beside="B"))(x_BE)
  np.testing.assert_array_equal(twice, 2 * x_BE)
  np.testing.assert_array_equal(beside["sum"], x_BE.sum(1))


def test_the_rows_of_a_process_are_those_of_its_devices():
  mesh = sharding.make_mesh(MeshConfig(data=2, context=4))
  np.testing.assert_array_equal(sharding.local_rows(sharding.shardings(mesh, "B"), (6,)), range(6))


def test_large_replicated_arrays_are_found():
  mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=8))
  whole, sliced = (jax.device_put(np.zeros((8, 8), np.float32), sharding.shardings(mesh, x)) for x in ("", "DF"))
  assert sharding.replicated({"a": {"whole": whole}, "sliced": sliced}, at_least=256) == [("a/whole", 256)]
  assert sharding.replicated({"whole": whole}, at_least=257) == []


COLLECTIVE = re.compile(r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")


def without_ones(shape):
  """A layer's slice may have the axis of the layers, or not."""
  return tuple(n for n in shape if n > 1)


def compiled_step(tiny, mesh, **more):
  """(config, the text of its compiled train step)."""
  changes = {"model.N": 12, "model.D": 32, "model.F": 64, "model.V": 384, "model.head_chunk": 8, "model.remat": "full"}
  config = tiny(changes | more | {f"mesh.{axis}": size for axis, size in mesh.items()})
  grid = sharding.make_mesh(config.mesh)
  tx, init, at, batch_at = step.program(config, grid)
  dtypes = {"tokens": "int32", "weight": "float32", "segment": "int32", "index": "int32"}
  with jax.set_mesh(grid):
    state = jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), jax.eval_shape(init), at)
    batch = {
      name: jax.ShapeDtypeStruct((32,) if name == "index" else (32, 16), dtype, sharding=batch_at[name])
      for name, dtype in dtypes.items()
    }
    return config, step.jit_step(config, tx, at, mask_id=3, eos_id=2).lower(state, batch).compile().as_text()


def collectives(text):
  """[(kind, [shape, ...]), ...] of a compiled program."""
  found = []
  for line in re.sub(r"/\*index=\d+\*/", "", text).splitlines():
    if match := COLLECTIVE.search(line):
      dims = re.findall(r"[a-z]\w*\[([\d,]*)\]", match[1])
      shapes = [tuple(map(int, filter(None, x.split(",")))) for x in dims]
      found.append((match[2], list(map(without_ones, shapes))))
  return found


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compiles")
def test_weights_are_gathered_layer_by_layer(tiny):
  """From the compiled program: 9 weights a layer, forward and again backward, and two outside of the layers.

  The embedding is not: the tokens are gathered, forward and backward, and what is looked up is exchanged.
  """
  config, text = compiled_step(tiny, {"data": 1, "fsdp": 8})
  c, found = config.model, collectives(text)
  gathered = [shape for kind, shapes in found if kind == "all-gather" for shape in shapes]
  layer = [without_ones(getattr(c, letter) for letter in letters) for letters in Block.LETTERS.values()]
  assert sorted(gathered) == sorted(2 * layer + 2 * [(32, 16)] + [(c.D, c.V), (c.D,)])
  assert {kind for kind, _ in found} <= {"all-gather", "all-reduce", "reduce-scatter", "all-to-all"}
  exchanged = [shapes for kind, shapes in found if kind == "all-to-all"]
  assert [sum(map(math.prod, shapes)) for shapes in exchanged] == 2 * [32 // 8 * 16 * c.D]  # rows of a device


@pytest.mark.usefixtures("quick_compiles")
def test_only_keys_and_values_are_gathered_along_the_context(tiny):
  """No full activation, no tree of parameters, on a mesh with every axis."""
  config, text = compiled_step(tiny, {"data": 1, "fsdp": 2, "tensor": 2, "context": 2})
  c, rows, found = config.model, 32 // 2, collectives(text)
  gathered = {shape for kind, shapes in found if kind == "all-gather" for shape in shapes}
  kv = without_ones((rows, 16, c.G // 2, c.K))  # the rows and heads of a device, the whole canvas
  assert kv in gathered
  split = {"H": c.H // 2, "G": c.G // 2, "F": c.F // 2, "V": c.V // 2}
  layer = {without_ones(split.get(x, getattr(c, x)) for x in letters) for letters in Block.LETTERS.values()}
  assert gathered - {kv} <= layer | {(32, 16 // 2), (c.D, c.V // 2), (c.D,)}
  # The look-up, and its gradient: the canvas of a device, of one row or its half of the width at a time.
  exchanged = [shapes for kind, shapes in found if kind == "all-to-all"]
  assert [sum(map(math.prod, shapes)) for shapes in exchanged] == 2 * [rows * 16 // 2 * c.D]


@pytest.mark.usefixtures("quick_compiles")
def test_copies_that_are_sliced_both_ways_add_up_their_parts(tiny):
  """XLA's partitioner dies of a gather from slices, where what it does not see slices the batch."""
  compiled_step(tiny, {"data": 2, "fsdp": 2, "tensor": 2}, micro_batches=2, **{"model.N": 1})


@pytest.mark.usefixtures("quick_compiles")
@pytest.mark.parametrize("parts", [4, pytest.param(2, marks=pytest.mark.slow)])
def test_gradients_of_micro_batches_cross_between_slices_once(tiny, parts):
  """From the compiled program: so many bytes, whatever the micro-batches, and none of them in a loop."""
  config, text = compiled_step(tiny, {"slices": 2, "data": 1, "fsdp": 4}, micro_batches=parts)
  program = hlo.parse(text)

  def crossing(name, times):  # (kind, bytes, how often) of what a computation moves between the slices
    for x in program.computations[name]:
      groups = [pair.split(",") for pair in re.findall(r"[{](\d+,\d+)[}]", x.rest)] or [hlo.members(x)]
      if x.collective and any(len({int(place) // 4 for place in group}) > 1 for group in groups):
        yield x.collective, x.nbytes, times
      for called in x.called():
        yield from crossing(called, times * program.trips(x) if x.op == "while" else times)

  kinds, sizes, times = zip(*crossing(program.entry, 1), strict=True)
  assert set(kinds) == {"all-reduce"} and set(times) == {1}
  # A device's part of the parameters in float32; the loss, and a metric's sum and count.
  assert sum(sizes) == 4 * (config.model.num_params() // 4 + 3)
  loops = [program.trips(x) for lines in program.computations.values() for x in lines if x.op == "while"]
  assert parts in loops and config.model.N in loops


def test_matrices_are_multiplied_by_eigen_on_a_cpu(monkeypatch):
  x = jnp.ones((512, 512))
  by_default = jax.jit(jnp.matmul).lower(x, x).compile().as_text()
  assert "ynn_fusion" in by_default  # no other way is needed where XLA does not do it
  program = sharding.jit(jnp.matmul)
  text = program.lower(x, x).compile().as_text()
  assert "ynn_fusion" not in text and " dot(" in text
  np.testing.assert_array_equal(program(x, x), jnp.full((512, 512), 512.0))
  assert program._cache_size() == 1
  monkeypatch.setattr(sharding, "platform", lambda: "tpu")  # another program, without options
  assert program.program is not sharding.jit(jnp.matmul).program and list(program.programs) == ["cpu", "tpu"]


@pytest.mark.parametrize("trains", [False, True])
def test_matrices_are_multiplied_by_cublas_on_a_gpu_unless_it_trains(trains, monkeypatch):
  asked = []
  monkeypatch.setattr(sharding, "platform", lambda: "gpu")
  monkeypatch.setattr(jax, "jit", lambda fn, **options: asked.append(options))
  monkeypatch.setattr(sharding, "_known", sharding.OPTIONS.get)
  sharding.jit(jnp.matmul, trains=trains, donate_argnums=0).program  # noqa: B018
  options = None if trains else {"xla_gpu_enable_triton_gemm": False, "xla_gpu_dot_merger_threshold_mb": 0}
  assert asked == [{"compiler_options": options, "donate_argnums": 0}]


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_an_xla_without_an_option_compiles_without_it(platform, monkeypatch):
  assert sharding._known.__wrapped__(platform) == sharding.OPTIONS[platform]  # this one has them
  monkeypatch.setitem(sharding.OPTIONS, platform, {"xla_no_such": ""})
  assert sharding._known.__wrapped__(platform) is None
