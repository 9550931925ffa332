"""The mesh, and where each dimension letter lives. The one table of the whole house."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Letters as in mask_predictor.py. A letter that is not here is on every device.
AXES = {
  "B": ("data", "fsdp"),  # the batch
  "L": ("context",),  # the canvas
  "D": ("fsdp",),  # parameters are sliced along the width, and gathered layer by layer
  "H": ("tensor",),
  "G": ("tensor",),
  "F": ("tensor",),
  "V": ("tensor",),
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """How many devices along each axis; one of them may be -1, "the rest"."""

  data: int = -1  # copies of the parameters, each with its part of the batch
  fsdp: int = 1  # parameters and batch sliced
  tensor: int = 1  # heads, feed-forward and vocabulary sliced
  context: int = 1  # the canvas sliced


def make_mesh(c: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A mesh over all devices (or those given), with the axes data, fsdp, tensor, context."""
  devices = list(jax.devices() if devices is None else devices)
  sizes = dataclasses.asdict(c)
  rest = [name for name, size in sizes.items() if size == -1]
  for name, size in sizes.items():
    if size < 1 and size != -1:
      raise ValueError(f"mesh.{name}={size}: must be at least 1, or -1 for the rest")
  if len(rest) > 1:
    raise ValueError(f"mesh.{rest[0]} and mesh.{rest[1]} are both -1: only one axis can take the rest")
  fixed = math.prod(size for size in sizes.values() if size != -1)
  if rest and len(devices) % fixed == 0:
    sizes[rest[0]] = len(devices) // fixed
  if math.prod(sizes.values()) != len(devices):
    axes = ", ".join(f"mesh.{name}={size}" for name, size in dataclasses.asdict(c).items())
    raise ValueError(f"{axes} do not multiply to the {len(devices)} devices there are")
  auto = (jax.sharding.AxisType.Auto,) * len(sizes)
  return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=auto, devices=devices)


def spec(letters: str) -> PartitionSpec:
  """The partition of an array with these dimension letters; no mesh axis is used twice."""
  used: set[str] = set()
  parts = []
  for letter in letters:
    axes = tuple(axis for axis in AXES.get(letter, ()) if axis not in used)
    used.update(axes)
    parts.append(axes or None)
  return PartitionSpec(*parts)


def shardings(mesh: Mesh, letters: Any) -> Any:
  """The `NamedSharding` of every array in a tree of dimension letters."""
  return jax.tree.map(lambda x: NamedSharding(mesh, spec(x)), letters)


def check_batch(mesh: Mesh, batch_size: int, field: str = "data.batch_size") -> None:
  """Raises ValueError if the devices cannot divide the batch."""
  ways = math.prod(mesh.shape[axis] for axis in AXES["B"])
  if batch_size % ways:
    near = [n for n in (batch_size // ways * ways, (batch_size // ways + 1) * ways) if n]
    raise ValueError(
      f"{field}={batch_size} does not divide over mesh.data x mesh.fsdp = {ways} devices:"
      f" use {' or '.join(map(str, near))}"
    )
