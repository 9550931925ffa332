"""The mesh, and where each dimension letter lives. The one table of the whole house.

`jax.set_mesh` says on which mesh a program is traced; `constrain` and the kernels find it there. Without one, or on a
mesh of a single device, nothing here does anything.
"""

import contextlib
import dataclasses
import functools
import logging
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lladax.devices import gpus
from lladax.mistake import Mistake

# Letters as in mask_predictor.py. A letter that is not here is on every device.
AXES = {
  "B": ("slices", "data", "fsdp"),  # the batch
  "C": ("slices", "data"),  # the batch, sliced among the copies of the parameters alone
  "L": ("context",),  # the canvas
  "D": ("fsdp",),  # parameters are sliced along the width, and gathered layer by layer
  "H": ("tensor",),
  "G": ("tensor",),
  "F": ("tensor",),
  "S": ("tensor",),
  "V": ("tensor",),
  "E": ("tensor",),
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """How many devices along each axis; one of them may be -1, "the rest", besides the slices."""

  # Groups of devices that only the network joins, each with a copy of the parameters; -1: as many as there are.
  slices: int = 1
  data: int = -1  # copies of the parameters within a slice, each with its part of the batch
  fsdp: int = 1  # parameters and batch sliced
  tensor: int = 1  # heads, feed-forward and vocabulary sliced
  context: int = 1  # the canvas sliced


def _island(device: jax.Device) -> int:
  """The group that it is wired into, where only the network joins groups: a slice of TPUs, a node of GPUs."""
  return getattr(device, "slice_index", None) or 0


def make_mesh(c: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A mesh over all devices (or those given), with the axes slices, data, fsdp, tensor, context.

  On TPUs a slice is what the devices say, or else a run of neighbours, and the axes within it follow the wiring of the
  chips. On GPUs any axis may cross from node to node, which is said; neighbours in a node are neighbours in the inner
  axes.

  Raises:
    Mistake: sizes that do not fit the devices; on TPUs another number of slices than there are.
  """
  devices = list(jax.devices() if devices is None else devices)
  islands, platform = len(set(map(_island, devices))), devices[0].platform
  sizes = dataclasses.asdict(c)
  for name, size in sizes.items():
    if size < 1 and size != -1:
      raise Mistake(f"mesh.{name}={size}: must be at least 1, or -1 for the rest")
  if c.slices == -1:
    sizes["slices"] = islands
  rest = [name for name, size in sizes.items() if size == -1]
  if len(rest) > 1:
    raise Mistake(f"mesh.{rest[0]} and mesh.{rest[1]} are both -1: only one axis can take the rest")
  fixed = math.prod(size for size in sizes.values() if size != -1)
  if rest and len(devices) % fixed == 0:
    sizes[rest[0]] = len(devices) // fixed
  if math.prod(sizes.values()) != len(devices):
    axes = ", ".join(f"mesh.{name}={size}" for name, size in dataclasses.asdict(c).items())
    groups = f", in {islands} groups" if islands > 1 else ""
    raise Mistake(f"{axes} do not multiply to the {len(devices)} devices there are{groups}")
  if platform == "tpu":
    if islands not in (1, sizes["slices"]):
      raise Mistake(f"mesh.slices={sizes['slices']}: the devices are in {islands} slices; use as many, or -1")
    devices.sort(key=_island)
    shape = tuple(size for name, size in sizes.items() if name != "slices")
    groups = np.split(np.asarray(devices), sizes["slices"])
    grid = np.stack(
      [mesh_utils.create_device_mesh(shape, list(group), allow_split_physical_axes=True) for group in groups]
    )
  else:  # the ids of GPUs follow their wiring, their order in jax.devices() need not
    devices.sort(key=lambda device: (_island(device), device.id if platform == "gpu" else 0))
    grid = np.asarray(devices).reshape(tuple(sizes.values()))
    _say_what_crosses(tuple(sizes), np.vectorize(_island)(grid))
  return Mesh(grid, tuple(sizes), axis_types=(jax.sharding.AxisType.Auto,) * len(sizes))


# What crosses the network where an axis does; slices are meant to.
_CROSSING = {
  "data": "the gradients are added up over the network",
  "fsdp": "every layer's parameters are gathered over the network, forward and again backward",
  "tensor": "the activations of every layer are added up over the network",
  "context": "the keys and values of every layer are gathered over the network",
}


def _say_what_crosses(axes: tuple[str, ...], islands: np.ndarray) -> None:
  """Says which axes of a grid of islands cross from one to another, and what that costs."""
  for i, axis in enumerate(axes):
    if axis in _CROSSING and np.diff(islands, axis=i).any() and jax.process_index() == 0:
      instead = "; mesh.slices=-1 leaves it the gradients, and each node a copy of the parameters"
      _say(
        f"mesh.{axis}={islands.shape[i]} crosses between {len(np.unique(islands))} nodes: {_CROSSING[axis]},"
        " for every part of a batch" + instead * (axis != "data")
      )


@functools.cache  # once: a mesh is made more often than that
def _say(message: str) -> None:
  logging.getLogger("lladax").info(message)


def _axes(letters: str) -> list[tuple[str, ...]]:
  used: set[str] = set()
  parts = []
  for letter in letters:
    parts.append(tuple(axis for axis in AXES.get(letter, ()) if axis not in used))
    used.update(parts[-1])
  return parts


def spec(letters: str) -> PartitionSpec:
  """The partition of an array with these dimension letters; no mesh axis is used twice."""
  return PartitionSpec(*(axes or None for axes in _axes(letters)))


def shardings(mesh: Mesh, letters: Any) -> Any:
  """The `NamedSharding` of every array in a tree of dimension letters."""
  return jax.tree.map(lambda x: NamedSharding(mesh, spec(x)), letters)


def axis_size(axis: str) -> int:
  """Devices along an axis of the mesh that is traced on; 1 without a mesh, and 1 of copies, in `sum_over_copies`."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if axis in mesh.manual_axes else dict(mesh.shape).get(axis, 1)


def ways(letter: str, size: int) -> int:
  """Devices that share out a dimension of that letter and size; 1 where they do not divide it."""
  return _ways(AXES[letter], size)


def _ways(axes: tuple[str, ...], size: int) -> int:
  found = math.prod(map(axis_size, axes))
  return 1 if size % found else found


def platform() -> str:
  """Where what is traced will run: "cpu", "gpu" or "tpu". A plan is made for devices that are not at hand."""
  device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
  return device.platform if device else jax.default_backend()


# What XLA is asked of a program, by platform.
OPTIONS: dict[str, dict[str, Any]] = {
  # To multiply matrices by Eigen, and not by YNNPACK, which lays a matrix that it multiplies by out anew in every call:
  # 32 rows through a head of 32,768 columns take three and a half times as long, and a training step is a tenth slower.
  "cpu": {"xla_cpu_experimental_ynn_fusion_type": ""},
  # To multiply matrices by cuBLAS alone, each by itself: only then a layer's are read where all layers' lie. For
  # Triton's kernels, or joined to one product, they are copied out first, in every pass: 13 GiB of an 8B, nine
  # of 22 ms. A training step is 7% faster with Triton's (docs/results.md).
  "gpu": {"xla_gpu_enable_triton_gemm": False, "xla_gpu_dot_merger_threshold_mb": 0},
}


class jit:
  """`jax.jit`, with the compiler's `OPTIONS` of the platform that is traced for; on a GPU not if it `trains`."""

  def __init__(self, fn: Callable[..., Any], *, trains: bool = False, **options: Any):
    functools.update_wrapper(self, fn)
    self.programs, self.trains = {}, trains
    self.make = functools.partial(jax.jit, fn, **options)

  @property
  def program(self) -> Any:
    """What is called where it is traced for."""
    on = platform()
    if on not in self.programs:
      self.programs[on] = self.make(compiler_options=None if self.trains and on == "gpu" else _known(on))
    return self.programs[on]

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    """As what `jax.jit` returns is called; so are its methods."""
    return self.program(*args, **kwargs)

  def __getattr__(self, name: str) -> Any:
    return getattr(self.program, name)


@functools.cache
def _known(on: str) -> dict[str, Any] | None:
  """The options of a platform; None of an XLA that has one of them no longer."""
  options = OPTIONS.get(on)
  try:
    jax.jit(lambda x: x, compiler_options=options).lower(0.0).compile()
  except jax.errors.JaxRuntimeError:
    return None
  return options


def capability(device: jax.Device | None = None) -> tuple[int, ...] | None:
  """(9, 0) of an NVIDIA GPU with compute capability 9.0: one that is given, or that is traced for; None of others."""
  if device is None:
    traced: Any = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    device = here = jax.devices()[0]
    if traced and traced.device_kind != here.device_kind:  # a plan's
      facts = gpus.named(traced.device_kind)
      return version(facts.capability) if facts else None
  said = getattr(device, "compute_capability", "")
  return version(said) if re.fullmatch(r"\d+\.\d+", said) else None


def version(dotted: str) -> tuple[int, ...]:
  """(9, 0) of "9.0"."""
  return tuple(map(int, dotted.split(".")))


def fit(letters: str, shape: Sequence[int]) -> PartitionSpec:
  """`spec` on the mesh that is traced on, without the axes that do not divide their dimension (a batch of one)."""
  parts, apart = [], jax.sharding.get_abstract_mesh().manual_axes
  for size, axes in zip(shape, _axes(letters), strict=True):
    parts.append(tuple(axis for axis in axes if axis not in apart) if _ways(axes, size) > 1 else None)
  return PartitionSpec(*parts)


def sliced(letters: str, shape: Sequence[int]) -> tuple[str, ...]:
  """The axes of the mesh that is traced on which share out an array's dimensions."""
  parts = (axes if isinstance(axes, tuple) else (axes,) for axes in fit(letters, shape) if axes)
  return tuple(axis for axes in parts for axis in axes)


def constrain(x: jax.Array, letters: str) -> jax.Array:
  """`x`, laid out as its letters say on the mesh that is traced on; a letter without axes (".") is gathered."""
  if jax.sharding.get_abstract_mesh().size <= 1:
    return x
  return jax.lax.with_sharding_constraint(x, fit(letters, x.shape))


def gather(x: jax.Array, letters: str) -> jax.Array:
  """A parameter with these letters, gathered along its width; its gradient is scattered in the same movement.

  (The gradient of a plain constraint is gathered as well: summed in full on every device, and sliced afterwards.)
  """
  return _gather(x, letters)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather(x: Any, letters: str) -> Any:
  return constrain(constrain(x, letters), letters.replace("D", "."))  # as it is: XLA would gather it before it is cast


_gather.defvjp(
  lambda x, letters: (_gather(x, letters), None), lambda letters, _, cotangent: (constrain(cotangent, letters),)
)


def on_each_device(fn: Callable[..., Any], *arrays: tuple[jax.Array, str], beside: str = "") -> Any:
  """`fn` of the part of each (array, letters) that a device holds; the result has the letters of the first.

  With `beside`, `fn` returns (that, a tree of arrays that begin with these letters, of the first array's sizes).
  """
  args, mesh = [x for x, _ in arrays], jax.sharding.get_abstract_mesh()
  if mesh.size <= 1:
    return fn(*args)
  specs, axes = tuple(fit(letters, x.shape) for x, letters in arrays), set(mesh.axis_names) - set(mesh.manual_axes)
  out_specs = (specs[0], fit(beside, args[0].shape[: len(beside)])) if beside else specs[0]
  return jax.shard_map(fn, in_specs=specs, out_specs=out_specs, axis_names=axes, check_vma=False)(*args)


def sum_over_copies(fn: Callable[[Any, Any], Any], batch: Any, copied: Any) -> Any:
  """The sum of `fn(part, copied)` over the parts of a batch, one for each copy of the parameters.

  Within `fn` the copies know nothing of each other: what a loop adds up is added up in each of them alone, and they
  meet once, behind it. A plain sum over the batch would have them meet in every round of it, over the network.
  """
  axes = tuple(axis for axis in AXES["C"] if axis_size(axis) > 1)
  if not axes:
    return fn(batch, copied)
  total = jax.shard_map(
    lambda *args: jax.lax.psum(fn(*args), axes), in_specs=(PartitionSpec(axes), PartitionSpec()),
    out_specs=PartitionSpec(), axis_names=set(axes), check_vma=False,
  )  # fmt: skip
  return total(batch, copied)


def on_mesh_of(tree: Any) -> contextlib.AbstractContextManager:
  """Programs called in this context are traced on the mesh that the arrays of `tree` lie on, if they lie on one."""
  where = next((x.sharding for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)), None)
  mesh = where.mesh if isinstance(where, NamedSharding) else None
  return jax.set_mesh(mesh) if isinstance(mesh, Mesh) else contextlib.nullcontext()


def local_rows(where: NamedSharding, shape: tuple[int, ...]) -> np.ndarray:
  """The indices along the first dimension that this process's devices hold, in order."""
  index = where.addressable_devices_indices_map(shape).values()
  parts: Iterable[slice] = (i[0] for i in index if i)
  return np.unique(np.concatenate([np.arange(shape[0])[part] for part in parts]))


def check_batch(mesh: Mesh, batch_size: int, field: str = "data.batch_size", multiple: int = 1) -> None:
  """Raises Mistake if the devices cannot divide the batch into parts of a multiple of `multiple` rows."""
  ways = math.prod(mesh.shape[axis] for axis in AXES["B"])
  if batch_size % (ways * multiple):
    step = ways * multiple
    near = [n for n in (batch_size // step * step, (batch_size // step + 1) * step) if n]
    axes = " x ".join(f"mesh.{axis}" for axis in AXES["B"] if axis != "slices" or mesh.shape[axis] > 1)
    raise Mistake(
      f"{field}={batch_size} does not divide over {axes} = {ways} devices"
      + (f" in rows that come in {multiple}s" if multiple > 1 else "")
      + f": use {' or '.join(map(str, near))}"
    )


def check_divides(mesh: Mesh, sizes: dict[str, int], length: int = 0, pairs: str = "") -> None:
  """Raises Mistake if an axis of the mesh does not divide the model's dimensions (letter -> size) or the canvas.

  Of letters in `pairs` two neighbours stay together.
  """
  fields = {f"model.{letter}": (letter, size) for letter, size in sizes.items()} | {"data.length": ("L", length)}
  for field, (letter, size) in fields.items():
    for axis in AXES.get(letter, ()):
      if size % (mesh.shape[axis] * (2 if letter in pairs else 1)):
        said = f"mesh.{axis}={mesh.shape[axis]} does not divide {field}={size}"
        raise Mistake(f"{said}{' in pairs, which share a byte' if letter in pairs else ''}: use a divisor of it")


def replicated(tree: dict[str, Any], at_least: int) -> list[tuple[str, int]]:
  """(name, bytes) of the arrays of `at_least` bytes that every device of a mesh holds in full."""
  found = []
  for path, x in jax.tree_util.tree_leaves_with_path(tree):
    if x.nbytes >= at_least and len(x.sharding.device_set) > 1 and x.sharding.is_fully_replicated:
      found.append((jax.tree_util.keystr(path, simple=True, separator="/"), x.nbytes))
  return found
