"""Published tensors to stacked parameters on devices, and back.

The life of a tensor: rows of a file -> the device, in the file's shape and dtype -> one compiled program that reshapes,
transposes, casts (or quantises) and writes them into their place in the stacked parameter, where they stay. The host
never holds more than one tensor of a layer, or `ROWS` rows of the vocabulary; export is the same backwards.
"""

import functools
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lladax.mistake import Mistake
from lladax.model.mask_predictor import MaskPredictorConfig, Params
from lladax.storage import checkpoint, safetensors
from lladax.storage.layout import ROWS, Piece, disk_shapes, family_of, parameters, pieces
from lladax.storage.published import Published


def load_params(published: Published, shardings: Any = None, dtype: Any = None) -> Params:
  """Reads the tensors into stacked parameters, in the bits of `model.weights`; every device reads what it keeps.

  Args:
    published: what `published.read` returned; its model says in which bits.
    shardings: tree like the parameters', as from `sharding.shardings(mesh, model.letters())`; None: on one device.
    dtype: of the parameters; None keeps that of the files.
  """
  c, flat = published.model, {}
  here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  at = dict(checkpoint.flat(shardings or jax.tree.map(lambda _: here, c.letters())))
  shapes = parameters(c)
  found = pieces(c, published.family.column, published.merged)
  for path, group in itertools.groupby(found, key=lambda piece: piece.path):
    parts = list(group)
    letters, disk = parts[0].letters, parts[0].disk
    kept = dtype or functools.reduce(
      jnp.promote_types, {safetensors.DTYPES[published.tensors[x.name].dtype] for x in parts}
    )
    name = path.rpartition("/")[2]
    # A parameter is an array, or where it is quantised the arrays of its parts.
    kept_at = at[path] if path in at else {part: at[f"{path}/{part}"] for part in ("bits", "scale")}
    disk_at, where = jax.tree.leaves(kept_at)[0], {}
    if isinstance(disk_at, NamedSharding):  # the axes of the file are cut as ours will be
      where = dict(zip(letters, disk_at.spec, strict=False))
      disk_at = NamedSharding(disk_at.mesh, PartitionSpec(*(where.get(axis[0]) for axis in disk.split())))
    most = ROWS if where.get("V") is None else c.V
    new = jax.ShapeDtypeStruct(shapes[path][1], kept)
    new = jax.eval_shape(lambda x, name=name: c.keep(name, x, x.dtype), new)
    x = jax.jit(lambda new=new: jax.tree.map(jnp.zeros_like, new), out_shardings=kept_at)()
    fill = functools.partial(_fill, c=c, name=name, disk=disk, letters=letters)
    fill = jax.jit(fill, out_shardings=kept_at, donate_argnums=0)
    for piece in parts:
      tensor = published.tensors[piece.name]
      for start, size in piece.moves(c, most):
        shape = (size, *tensor.shape[1:])
        part: Any = functools.partial(tensor.rows, piece.row + start, size)
        slab = jax.make_array_from_callback(shape, disk_at, part)
        x = jax.block_until_ready(fill(x, slab, piece.place(len(letters), start)))  # or slabs would pile up
    flat[path] = x
  return checkpoint.nested(flat)


def _fill(x, slab: jax.Array, place, *, c: MaskPredictorConfig, name: str, disk: str, letters: str):
  """Writes a tensor of a file, or some rows of it, into its place in a parameter."""
  sizes = [
    [getattr(c, letter) for letter in group] if group[1:] else [n]
    for group, n in zip(disk.split(), slab.shape, strict=True)
  ]
  order = disk.replace(" ", "")
  slab = slab.reshape(list(itertools.chain(*sizes)))
  slab = slab.transpose([order.index(letter) for letter in letters if letter in order])
  slab = jnp.expand_dims(slab, range(len(letters) - len(order)))  # of a layer, of an expert
  put = lambda x, part: jax.lax.dynamic_update_slice(x, part, place[: x.ndim])  # noqa: E731
  return jax.tree.map(put, x, c.keep(name, slab, jax.tree.leaves(x)[0].dtype))


@functools.partial(jax.jit, static_argnames=("disk", "letters", "size", "dtype"))
def _take(x: jax.Array, place, *, disk: str, letters: str, size: int, dtype: np.dtype) -> jax.Array:
  """The inverse of `_fill`."""
  order = disk.replace(" ", "")
  outer = len(letters) - len(order)  # of a layer, of an expert
  sizes = [1] * outer + [size if letter == "V" else n for letter, n in zip(letters, x.shape, strict=True)][outer:]
  slab = jax.lax.dynamic_slice(x, place, sizes).reshape(sizes[outer:])
  slab = slab.transpose([letters[outer:].index(letter) for letter in order])
  sizes = iter(slab.shape)
  return slab.reshape([math.prod(itertools.islice(sizes, len(group))) for group in disk.split()]).astype(dtype)


def export(
  params: Params, model: MaskPredictorConfig, folder: Path, config: dict[str, Any], *, dtype: Any = None,
  merged: bool = False, max_shard_bytes: int = 4 * 2**30,
) -> None:  # fmt: skip
  """Writes parameters in the published layout: files of tensors, an index if there are several, config.json.

  Args:
    params: of the model.
    model: its shape.
    folder: new, or without tensors.
    config: to be config.json; what it says it is decides the names.
    dtype: of the tensors; None keeps that of the parameters.
    merged: whether a layer's experts are one tensor.
    max_shard_bytes: of the tensors of a file.

  Raises:
    Mistake: the folder holds tensors already.
  """
  if any(folder.glob("*.safetensors")):
    raise Mistake(f"{folder} holds *.safetensors already: name a new folder")
  flat = dict(checkpoint.flat(params))
  shards: list[dict[str, list[Piece]]] = [{}]  # the pieces of every tensor
  sizes, tensors = [0], {}
  found = list(pieces(model, family_of(config).column, merged))
  for piece in found:
    tensors.setdefault(piece.name, []).append(piece)
  shapes = disk_shapes(found, model)
  kept = {name: np.dtype(dtype or flat[parts[0].path].dtype) for name, parts in tensors.items()}
  for name, parts in tensors.items():
    size = math.prod(shapes[name]) * kept[name].itemsize
    if sizes[-1] and sizes[-1] + size > max_shard_bytes:
      shards.append({})
      sizes.append(0)
    shards[-1][name] = parts
    sizes[-1] += size

  def slabs(shard) -> Iterator[np.ndarray]:
    for name, parts in shard.items():
      for piece in parts:
        options = {"disk": piece.disk, "letters": piece.letters, "dtype": kept[name]}
        for start, size in piece.moves(model, ROWS):
          place = piece.place(len(piece.letters), start)
          yield np.asarray(_take(flat[piece.path], place, size=size, **options))

  folder.mkdir(parents=True, exist_ok=True)
  index = {}
  for number, shard in enumerate(shards, 1):
    name = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
    safetensors.write(folder / name, {tensor: (kept[tensor], shapes[tensor]) for tensor in shard}, slabs(shard))
    index |= dict.fromkeys(shard, name)
  if len(shards) > 1:
    values = {"metadata": {"total_size": sum(sizes)}, "weight_map": index}
    (folder / safetensors.INDEX).write_text(json.dumps(values, indent=2) + "\n")
  (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
