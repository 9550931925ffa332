"""The nearer of two tiers: a state on the disks of the machines that hold it, each process its own part.

It is written often where the workdir is far, and written seldom; and is read after a crash that left the machines and
their disks as they were, by as many processes on the same mesh. What one of them lacks, or finds damaged, none uses:
then it is the checkpoint of the workdir that counts. (Orbax's emergency checkpoints ask for a mesh whose slices hold
whole copies of the state, and for a folder that a scheduler manages.)
"""

import hashlib
import json
import os
import zipfile
from concurrent import futures
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from lladax.storage import checkpoint, digest, writing

_KEPT = 2
_NONE = -1


class Near:
  """The states of one run, on this process's disk; a write that fails is said, and ends nothing."""

  def __init__(self, folder: str, workdir: Path):
    """`folder` may be that of other runs, too: a run is known by its first start, on record in `workdir`."""
    try:
      begun = (workdir / "runs.jsonl").read_bytes().partition(b"\n")[0]
    except FileNotFoundError:  # of another process's mirror
      begun = b""
    mark = np.frombuffer(hashlib.blake2b(begun, digest_size=8).digest(), np.uint32)
    mark = np.asarray(multihost_utils.broadcast_one_to_all(mark)).tobytes().hex()
    place = f"{jax.process_index()}_of_{jax.process_count()}"
    self._folder = Path(folder).expanduser() / f"lladax-{mark}" / place
    self._writer, self._saving = futures.ThreadPoolExecutor(1, "saving near"), None

  def _steps(self) -> list[int]:
    return sorted(int(x.stem) for x in self._folder.glob("*.npz") if x.stem.isdecimal())

  def save(self, step: int, tree: checkpoint.Tree) -> None:
    """Begins to write; the arrays may be donated as soon as this returns. What is not a number is not written."""
    self.wait()
    digests, broken = digest.of(dict(checkpoint.flat(tree)))
    if broken:
      return
    parts: dict[str, np.ndarray] = {}
    for name, x in checkpoint.flat(tree):
      for shard in x.addressable_shards:
        key = _key(name, shard.index, x.shape)
        if key not in parts:
          parts[key] = np.array(shard.data)
    self._saving = self._writer.submit(self._write, step, parts, digests)

  def _write(self, step: int, parts: dict[str, np.ndarray], digests: dict[str, str]) -> None:
    with writing.leniently(self._folder):
      self._folder.mkdir(parents=True, exist_ok=True)
      new = self._folder / "new"
      with new.open("wb") as file:
        np.savez(file, allow_pickle=False, **{_DIGESTS: np.array(json.dumps(digests))}, **parts)
        file.flush()
        os.fsync(file.fileno())
      new.replace(self._folder / f"{step}.npz")  # whole, before an older one goes
      for old in self._steps()[:-_KEPT]:
        (self._folder / f"{old}.npz").unlink()

  def restore(self, abstract: checkpoint.Tree, *, after: int) -> tuple[int, checkpoint.Tree] | None:
    """The newest state that all processes hold whole, if it is newer than step `after`.

    Args:
      abstract: tree of `jax.ShapeDtypeStruct` with shardings.
      after: what the workdir has.
    """
    mine = self._steps()[-_KEPT:]
    while (step := _newest(mine)) > after:
      if (tree := self._read(step, abstract)) is not None:
        return step, tree
      mine.remove(step)
    return None

  def _read(self, step: int, abstract: checkpoint.Tree) -> checkpoint.Tree | None:
    wanted = dict(checkpoint.flat(abstract))
    try:
      with np.load(self._folder / f"{step}.npz", allow_pickle=False) as file:
        parts = {name: file[name] for name in file.files}
      digests = json.loads(str(parts.pop(_DIGESTS)))
      whole = all(
        parts[_key(name, index, x.shape)].dtype == x.dtype
        for name, x in wanted.items()
        for index in x.sharding.addressable_devices_indices_map(x.shape).values()
      )
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
      parts, digests, whole = {}, {}, False
    if not _all(whole):
      return None
    arrays = {
      name: jax.make_array_from_callback(x.shape, x.sharding, lambda i, n=name, x=x: parts[_key(n, i, x.shape)])
      for name, x in wanted.items()
    }
    if not _all(digest.of(arrays)[0] == digests):
      return None
    return jax.tree.unflatten(jax.tree.structure(abstract), list(arrays.values()))

  def drop(self, *, after: int) -> None:
    """Removes what is newer than step `after`: the run has gone back there."""
    self.wait()
    for step in self._steps():
      if step > after:
        (self._folder / f"{step}.npz").unlink()

  def wait(self) -> None:
    """Until what was begun is written."""
    if self._saving:
      self._saving.result()
    self._saving = None


_DIGESTS = "digests"


def _key(name: str, index: Any, shape: tuple[int, ...]) -> str:
  parts = (x.indices(n)[:2] for x, n in zip(index, shape, strict=True))
  return f"{name}[{','.join(f'{first}:{end}' for first, end in parts)}]"


def _newest(mine: list[int]) -> int:
  """Of the steps that every process has."""
  padded = np.array(([_NONE] * _KEPT + mine)[-_KEPT:], np.int32)
  every = np.asarray(multihost_utils.process_allgather(padded)).reshape(-1, _KEPT)
  return max(set.intersection(*(set(row.tolist()) for row in every)) | {_NONE})


def _all(mine: bool) -> bool:
  return bool(np.all(multihost_utils.process_allgather(np.array(mine))))
