"""The safetensors format: eight bytes of length, a JSON header that says where each tensor lies, the tensors.

Read and written here rather than by the format's library, which reads a whole tensor to give a part of it, and takes
a whole file of tensors to write one. The tests hold both against that library.
"""

import dataclasses
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

DTYPES = {"F32": np.dtype(jnp.float32), "BF16": np.dtype(jnp.bfloat16), "F16": np.dtype(jnp.float16)}
INDEX = "model.safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class Tensor:
  """Where a tensor lies in a file."""

  file: Path
  offset: int
  shape: tuple[int, ...]
  dtype: str  # the format's name of it

  def rows(self, start: int = 0, size: int | None = None) -> np.ndarray:
    """Some rows, or all: read when they are touched, and no longer in memory when they are dropped."""
    size = self.shape[0] if size is None else size
    offset = self.offset + start * math.prod(self.shape[1:]) * DTYPES[self.dtype].itemsize
    return np.memmap(self.file, DTYPES[self.dtype], "r", offset, (size, *self.shape[1:]))


def headers(folder: Path, problems: list[str]) -> dict[str, Tensor]:
  """Name -> place of every tensor of a folder; what is wrong with its files is added to `problems`."""
  if (folder / INDEX).is_file():
    listed = json.loads((folder / INDEX).read_text()).get("weight_map", {})
    files = sorted({folder / name for name in listed.values()})
  else:
    files = sorted(folder.glob("*.safetensors"))
  if not files:
    problems.append("there is no *.safetensors in it")
  tensors: dict[str, Tensor] = {}
  for path in files:
    if not path.is_file():
      problems.append(f"{path.name} is missing, and {INDEX} names it")
      continue
    with path.open("rb") as file:
      length = int.from_bytes(file.read(8), "little")
      size = path.stat().st_size
      try:
        if length > size:
          raise ValueError
        header: dict[str, Any] = json.loads(file.read(length))
        header.pop("__metadata__", None)
        ends = [entry["data_offsets"][1] for entry in header.values()]
      except (ValueError, AttributeError, KeyError, TypeError):
        problems.append(f"{path.name} is no safetensors file")
        continue
    end = 8 + length + max(ends, default=0)
    if end > size:
      problems.append(f"{path.name} ends after {size} of {end} bytes")
    for name, entry in header.items():
      if name in tensors:
        problems.append(f"{name} is in {tensors[name].file.name} and in {path.name}")
      start = 8 + length + entry["data_offsets"][0]
      tensors[name] = Tensor(path, start, tuple(entry["shape"]), entry["dtype"])
  return tensors


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
