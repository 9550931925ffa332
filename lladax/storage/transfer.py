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
from lladax.storage.layout import ROWS, check_exportable, disk_shape, family_of, pieces
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
  for path, group in itertools.groupby(pieces(c, published.family), key=lambda piece: piece.path):
    parts = list(group)
    letters, disk = parts[0].letters, parts[0].disk
    kept = dtype or functools.reduce(
      jnp.promote_types, {safetensors.DTYPES[published.tensors[x.name].dtype] for x in parts}
    )
    name = path.removeprefix("blocks/")
    # A parameter is an array, or where it is quantised the arrays of its parts.
    kept_at = at[path] if path in at else {part: at[f"{path}/{part}"] for part in ("bits", "scale")}
    disk_at, where = jax.tree.leaves(kept_at)[0], {}
    if isinstance(disk_at, NamedSharding):  # the axes of the file are cut as ours will be
      where = dict(zip(letters, disk_at.spec, strict=False))
      disk_at = NamedSharding(disk_at.mesh, PartitionSpec(*(where.get(axis[0]) for axis in disk.split())))
    most = ROWS if where.get("V") is None else c.V
    new = jax.ShapeDtypeStruct(tuple(getattr(c, letter) for letter in letters), kept)
    new = jax.eval_shape(lambda x, name=name: c.keep(name, x, x.dtype), new)
    x = jax.jit(lambda new=new: jax.tree.map(jnp.zeros_like, new), out_shardings=kept_at)()
    fill = functools.partial(_fill, c=c, name=name, disk=disk, letters=letters, axis=parts[0].axis)
    fill = jax.jit(fill, out_shardings=kept_at, donate_argnums=0)
    for piece in parts:
      tensor = published.tensors[piece.name]
      for start, size in piece.moves(c, most):
        rows = (start, size) if "V" in letters else (0, tensor.shape[0])
        shape, part = (rows[1], *tensor.shape[1:]), functools.partial(tensor.rows, *rows)
        slab = jax.make_array_from_callback(shape, disk_at, part)
        x = jax.block_until_ready(fill(x, slab, start))  # or slabs would pile up
    flat[path] = x
  blocks = {path.removeprefix("blocks/"): x for path, x in flat.items() if path.startswith("blocks/")}
  return {path: x for path, x in flat.items() if "/" not in path} | {"blocks": blocks}


def _fill(x, slab: jax.Array, start, *, c: MaskPredictorConfig, name: str, disk: str, letters: str, axis: int):
  """Writes a tensor of a file, or some rows of it, into its place in a parameter."""
  sizes = [
    [getattr(c, letter) for letter in group] if group[1:] else [n]
    for group, n in zip(disk.split(), slab.shape, strict=True)
  ]
  order = disk.replace(" ", "")
  slab = slab.reshape(list(itertools.chain(*sizes))).transpose([order.index(letter) for letter in letters.lstrip("N")])
  slab = slab[None] if letters[0] == "N" else slab
  put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=axis)
  return jax.tree.map(put, x, c.keep(name, slab, jax.tree.leaves(x)[0].dtype))


@functools.partial(jax.jit, static_argnames=("disk", "letters", "axis", "size", "dtype"))
def _take(x: jax.Array, start, *, disk: str, letters: str, axis: int, size: int, dtype: np.dtype) -> jax.Array:
  """The inverse of `_fill`."""
  slab = jax.lax.dynamic_slice_in_dim(x, start, size, axis)
  slab, letters = (slab[0], letters[1:]) if letters[0] == "N" else (slab, letters)
  slab = slab.transpose([letters.index(letter) for letter in disk.replace(" ", "")])
  sizes = iter(slab.shape)
  return slab.reshape([math.prod(itertools.islice(sizes, len(group))) for group in disk.split()]).astype(dtype)


def export(
  params: Params, model: MaskPredictorConfig, folder: Path, config: dict[str, Any], *, dtype: Any = None,
  max_shard_bytes: int = 4 * 2**30,
) -> None:  # fmt: skip
  """Writes parameters in the published layout: files of tensors, an index if there are several, config.json.

  Args:
    params: of the model.
    model: its shape.
    folder: new, or without tensors.
    config: to be config.json; its names decide between LLaDA's and iLLaDA's.
    dtype: of the tensors; None keeps that of the parameters.
    max_shard_bytes: of the tensors of a file.

  Raises:
    Mistake: the layout cannot say this, or the folder holds tensors already.
  """
  check_exportable(model)
  if any(folder.glob("*.safetensors")):
    raise Mistake(f"{folder} holds *.safetensors already: name a new folder")
  flat = dict(checkpoint.flat(params))
  shards, sizes = [[]], [0]
  for piece in pieces(model, family_of(config)):
    kept = np.dtype(dtype or flat[piece.path].dtype)
    size = math.prod(disk_shape(model, piece.disk)) * kept.itemsize
    if sizes[-1] and sizes[-1] + size > max_shard_bytes:
      shards.append([])
      sizes.append(0)
    shards[-1].append((piece, kept))
    sizes[-1] += size

  def slabs(shard) -> Iterator[np.ndarray]:
    for piece, kept in shard:
      options = {"disk": piece.disk, "letters": piece.letters, "axis": piece.axis, "dtype": kept}
      for start, size in piece.moves(model, ROWS):
        yield np.asarray(_take(flat[piece.path], start, size=size, **options))

  folder.mkdir(parents=True, exist_ok=True)
  index = {}
  for number, shard in enumerate(shards, 1):
    name = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
    shapes = {piece.name: (kept, disk_shape(model, piece.disk)) for piece, kept in shard}
    safetensors.write(folder / name, shapes, slabs(shard))
    index |= dict.fromkeys(shapes, name)
  if len(shards) > 1:
    values = {"metadata": {"total_size": sum(sizes)}, "weight_map": index}
    (folder / safetensors.INDEX).write_text(json.dumps(values, indent=2) + "\n")
  (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
