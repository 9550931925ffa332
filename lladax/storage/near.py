"""The nearer of two tiers: a state on the disks of the machines that hold it, each process its own part.

It is written often where the workdir is far, and written seldom; and is read after a crash that left the machines and
their disks as they were, by as many processes on the same mesh. What one of them lacks, or finds damaged, none uses:
then it is the checkpoint of the workdir that counts. (Orbax's emergency checkpoints ask for a mesh whose slices hold
whole copies of the state, and for a folder that a scheduler manages.)
"""

import contextlib
import hashlib
import json
import os
import re
import zipfile
from concurrent import futures
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from lladax import address
from lladax.storage import checkpoint, digest, metrics, writing

_KEPT = 2
_NONE = (-1, -1)
_Key = tuple[int, int]  # the start of the run that wrote it, from 1, and its step


class Near:
  """The states of one run, on this process's disk; a write that fails is said, and ends nothing."""

  def __init__(self, folder: str, workdir: Path):
    """`folder` may be that of other runs, too: a run is known by its first start, on record in `workdir`."""
    self._workdir, runs = workdir, workdir / "runs.jsonl"
    self._begun = [row["step"] for row in metrics.read(runs)]  # each start's first step
    first = runs.read_bytes().partition(b"\n")[0] if self._begun else b""
    known = hashlib.blake2b(first, digest_size=8).digest() + len(self._begun).to_bytes(4, "little")
    # Process 0 knows; the mirrors of others may be older.
    *mark, self._start = np.asarray(multihost_utils.broadcast_one_to_all(np.frombuffer(known, np.uint32))).tolist()
    place = f"{jax.process_index()}_of_{jax.process_count()}"
    self._folder = Path(folder).expanduser() / "lladax-{:08x}{:08x}".format(*mark) / place
    self._writer, self._saving = futures.ThreadPoolExecutor(1, "saving near"), None

  def _files(self) -> dict[_Key, Path]:
    """What is here, in the order in which it was written."""
    found = ((re.fullmatch(r"(\d+)-(\d+)\.npz", x.name), x) for x in self._folder.glob("*.npz"))
    return dict(sorted(((int(named[1]), int(named[2])), x) for named, x in found if named))

  def _usable(self) -> list[_Key]:
    """Without those that a later start did not know, on another machine perhaps: the run went another way there."""
    return [(start, step) for start, step in self._files() if all(step <= x for x in self._begun[start:])]

  def newest(self, *, after: int) -> int:
    """The step of the newest state that all processes seem to hold, or `after`, if it is not newer."""
    return max(_newest(self._usable())[1], after)

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
          parts[key] = np.array(shard.data).view(_bits(x.dtype))
    self._saving = self._writer.submit(self._write, step, parts, digests)

  def _write(self, step: int, parts: dict[str, np.ndarray], digests: dict[str, str]) -> None:
    new = self._folder / "new"
    with writing.leniently(self._folder):
      self._folder.mkdir(parents=True, exist_ok=True)
      try:
        with new.open("wb") as file:
          np.savez(file, allow_pickle=False, **{_DIGESTS: np.array(json.dumps(digests))}, **parts)
          file.flush()
          os.fsync(file.fileno())
        new.replace(self._folder / f"{self._start}-{step}.npz")  # whole, before an older one goes
      finally:
        new.unlink(missing_ok=True)  # of a disk that is full it is a part
      for old in list(self._files().values())[:-_KEPT]:
        old.unlink()
    if jax.process_index() == 0:
      address.push(self._workdir, must=False)  # the metrics up to here

  def restore(self, abstract: checkpoint.Tree, *, after: int) -> tuple[int, checkpoint.Tree] | None:
    """The newest state that all processes hold whole, if it is newer than step `after`.

    Args:
      abstract: tree of `jax.ShapeDtypeStruct` with shardings.
      after: what the workdir has.
    """
    mine = self._usable()
    while (key := _newest(mine))[1] > after:
      if (tree := self._read(key, abstract)) is not None:
        return key[1], tree
      mine.remove(key)
    return None

  def _read(self, key: _Key, abstract: checkpoint.Tree) -> checkpoint.Tree | None:
    wanted = dict(checkpoint.flat(abstract))
    try:
      with np.load(self._files()[key], allow_pickle=False) as file:
        parts = {name: file[name] for name in file.files}
      digests = json.loads(str(parts.pop(_DIGESTS)))
      whole = all(
        parts[_key(name, index, x.shape)].dtype == _bits(x.dtype)
        for name, x in wanted.items()
        for index in x.sharding.addressable_devices_indices_map(x.shape).values()
      )
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
      parts, digests, whole = {}, {}, False
    if not _all(whole):  # of another mesh, too
      return None

    def part(name: str, x: Any) -> Any:
      return lambda index: parts[_key(name, index, x.shape)].view(x.dtype)

    arrays: dict[str, jax.Array] = {
      name: jax.make_array_from_callback(x.shape, x.sharding, part(name, x)) for name, x in wanted.items()
    }
    if not _all(digest.of(arrays)[0] == digests):
      return None
    return jax.tree.unflatten(jax.tree.structure(abstract), list(arrays.values()))

  def drop(self, *, after: int) -> None:
    """Removes what is newer than step `after`: the run has gone back there, or is done."""
    self.wait()
    with writing.leniently(self._folder):
      for (_, step), file in self._files().items():
        if step > after:
          file.unlink()
    with contextlib.suppress(OSError):  # not empty
      self._folder.rmdir()
      self._folder.parent.rmdir()

  def wait(self) -> None:
    """Until what was begun is written."""
    if self._saving:
      self._saving.result()
    self._saving = None


_DIGESTS = "digests"


def _bits(dtype: Any) -> np.dtype:
  """Of what has as many bits: NumPy's files know no bfloat16."""
  return np.dtype(f"u{np.dtype(dtype).itemsize}")


def _key(name: str, index: Any, shape: tuple[int, ...]) -> str:
  parts = (x.indices(n)[:2] for x, n in zip(index, shape, strict=True))
  return f"{name}[{','.join(f'{first}:{end}' for first, end in parts)}]"


def _newest(mine: list[_Key]) -> _Key:
  """Of those that every process has."""
  padded = np.array(([_NONE] * (_KEPT + 1) + mine)[-_KEPT - 1 :], np.int32)  # one more: a kill before the oldest goes
  every = np.asarray(multihost_utils.process_allgather(padded)).reshape(-1, _KEPT + 1, 2).tolist()
  return max(set.intersection(*({(start, step) for start, step in row} for row in every)) | {_NONE})


def _all(mine: bool) -> bool:
  return bool(np.all(multihost_utils.process_allgather(np.array(mine))))
