"""The safetensors format: eight bytes of length, a JSON header that says where each tensor lies, the tensors.

Read by the format's own library, which holds a header against its file (lengths, shapes, overlaps, gaps) and slices
bfloat16 for NumPy, too. Written here: the library wants all tensors of a file in memory at once.
"""

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from lladax import fields
from lladax.mistake import Mistake

DTYPES = {"F32": np.dtype(jnp.float32), "BF16": np.dtype(jnp.bfloat16), "F16": np.dtype(jnp.float16)}
INDEX = "model.safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor of a file."""

  file: Path
  name: str
  shape: tuple[int, ...]
  dtype: str  # the format's name of it

  def rows(self, start: int, size: int, index: tuple[slice, ...] = (slice(None),)) -> np.ndarray:
    """Some rows, or the part `index` of them; no more of the file is read.

    The file is opened anew: the library maps it, and what was touched counts as this process's until it is closed.
    """
    first, *others = index
    low, high, _ = first.indices(size)
    with safe_open(self.file, "numpy") as file:
      return file.get_slice(self.name)[(slice(start + low, start + high), *others)]


def headers(folder: Path, problems: list[str]) -> dict[str, Tensor]:
  """Name -> tensor, of all files of a folder; what is wrong with them is added to `problems`."""
  files = sorted(path.name for path in folder.glob("*.safetensors"))
  if os.path.lexists(folder / INDEX):
    listed = read_json(folder / INDEX).get("weight_map")
    if not listed or not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
      problems.append(f"{INDEX} has no weight_map from tensors to files")
      return {}
    files = sorted(set(listed.values()))
  if not files:
    others = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".gguf", ".pt", ".pth"))
    problems.append("there is no *.safetensors in it" + (f", only {shown(others)}" if others else ""))
  tensors: dict[str, Tensor] = {}
  for name in files:
    path = folder / name
    if Path(name).name != name or path.suffix != ".safetensors":
      problems.append(f"{INDEX} names {shown(name)}, which is no *.safetensors of this folder")
    elif instead := stand_in(path):
      problems.append(f"{name} {instead}")
    elif not os.path.isfile(path):
      problems.append(f"{named(name)} is missing, and {INDEX} names it")
    else:
      try:
        with safe_open(path, "numpy") as file:
          slices = {tensor: file.get_slice(tensor) for tensor in file.keys()}
          found = {x: Tensor(path, x, tuple(part.get_shape()), part.get_dtype()) for x, part in slices.items()}
      except SafetensorError as error:
        why = str(error).removeprefix("Error while deserializing header: ")
        problems.append(f"{name} is no whole safetensors file, get it again: {named(why, 200)}")
        continue
      for twice in sorted(tensors.keys() & found.keys()):
        problems.append(f"{named(twice)} is in {tensors[twice].file.name} and in {name}")
      tensors |= found
  return tensors


def stand_in(path: Path) -> str | None:
  """What is there in place of a file's content: a link to nowhere, a git-lfs pointer; None if it is neither."""
  if os.path.islink(path) and not os.path.exists(path):
    return f"is a link to {named(os.readlink(path))}, which is not there: download it again"
  if os.path.isfile(path):
    with path.open("rb") as file:
      if file.read(64).startswith(b"version https://git-lfs"):
        return "is a git-lfs pointer, not the file itself: run `git lfs pull` in its folder"
  return None


def read_json(path: Path) -> dict[str, Any]:
  """The object that a file holds; raises Mistake if there is something else."""
  if instead := stand_in(path):
    raise Mistake(f"{path} {instead}")
  value = fields.read_json(path)
  if not isinstance(value, dict):
    raise Mistake(f"{path} holds {shown(value)}, expected a JSON object")
  return value


def shown(value: Any, most: int = 100) -> str:
  """A value of a file as JSON, cut to what can be read; what is cut off is not written either."""
  value = value[: most + 1] if isinstance(value, str) else value
  text = "".join(itertools.islice(json.JSONEncoder(ensure_ascii=False).iterencode(value), most + 1))
  return text if len(text) <= most else f"{text[:most]}…"


def named(name: str, most: int = 100) -> str:
  """A name in a file, or what a library said of it, on one line and cut likewise."""
  text = "".join(x if x.isprintable() else " " for x in name[: most + 1])
  return text if len(text) <= most else f"{text[:most]}…"


def write(path: Path, shapes: dict[str, tuple[np.dtype, tuple[int, ...]]], slabs: Iterable[np.ndarray]) -> None:
  """Writes a file: what each tensor is, and then their rows, in the same order, as they come."""
  names = {dtype: name for name, dtype in DTYPES.items()}
  header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
  end = 0
  for name, (dtype, shape) in shapes.items():
    size = math.prod(shape) * dtype.itemsize
    header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [end, end := end + size]}
  content = json.dumps(header).encode()
  content += b" " * (-len(content) % 8)
  with path.open("wb") as file:
    file.write(len(content).to_bytes(8, "little") + content)
    for slab in slabs:
      file.write(slab.tobytes())
