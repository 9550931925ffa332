"""Folders at an address, gs://BUCKET/FOLDER or s3://BUCKET/FOLDER, mirrored here.

Object stores know neither appending nor renaming. So the small files of such a folder are brought to a folder here when
it is first named, are read and written there, and are put back now and then (`push`). Checkpoints, which are large, are
read and written where they are, each process its part (`at`).
"""

import atexit
import contextlib
import importlib.util
import logging
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lladax.mistake import Mistake

_LIBRARY = {"gs": "gcsfs", "s3": "s3fs"}
_mirrors: dict[Path, str] = {}  # folder here -> address
_stamps: dict[Path, tuple[int, int]] = {}  # of the files here as they are there
_pushing = threading.Lock()  # checkpoints are saved in threads
_SMALL = 2**26  # bytes: what is read at once, as a run may be writing it


def is_address(name: Any) -> bool:
  """Whether it is one of an object store."""
  return str(name).startswith(tuple(f"{kind}://" for kind in _LIBRARY))


def system(name: str) -> tuple[Any, str]:
  """(fsspec's file system, the path there); Mistake where its library is not installed."""
  import fsspec
  from fsspec import config

  kind = name.partition(":")[0]
  if importlib.util.find_spec(_LIBRARY[kind]) is None:
    raise Mistake(f"{name}: {_LIBRARY[kind]} is not installed: pip install 'lladax[{kind}]'")
  for known in ("gs", "gcs", "s3"):  # other processes write there, too
    config.conf.setdefault(known, {})["use_listings_cache"] = False
  return fsspec.url_to_fs(name)


def mirror(name: str | os.PathLike) -> Path:
  """The folder here that stands for one at an address; of a folder here, itself.

  Of WORKDIR/checkpoints/STEP it is checkpoints/STEP in the mirror of WORKDIR, and nothing is there.

  Raises:
    Mistake: it cannot be read.
  """
  name = os.path.expanduser(os.fspath(name))
  if not is_address(name):
    return Path(name)
  found = re.fullmatch(r"(.+?)(/checkpoints(?:/\d+)?)?/*", name)
  assert found
  root, inside = found[1], (found[2] or "").lstrip("/")
  here = next((folder for folder, known in _mirrors.items() if known == root), None)
  if here is None:
    files, path = system(root)
    above = tempfile.mkdtemp(prefix="lladax-")
    atexit.register(shutil.rmtree, above, ignore_errors=True)
    here = Path(above, *root.replace("://", "/").split("/"))
    here.mkdir(parents=True)
    with asked(root):
      _pull(files, path, here)
    _mirrors[here] = root
  return here / inside


def _pull(files: Any, path: str, here: Path) -> None:
  try:
    inside = files.ls(path, detail=True)
  except FileNotFoundError:
    return
  for about in inside:
    name = about["name"].rstrip("/")
    target = here / name.rpartition("/")[2]
    if about["type"] == "directory":
      if target.name != "checkpoints":
        target.mkdir(exist_ok=True)
        _pull(files, name, target)
    elif name != path.rstrip("/"):
      files.get_file(about["name"], str(target))
      _stamps[target] = _stamp(target)


def push(here: Path, *, must: bool = True) -> None:
  """Puts back what changed in a mirror, config.json last; of another folder, nothing.

  Args:
    here: the mirror.
    must: whether a failure is a Mistake, or is said alone.
  """
  if here not in _mirrors:
    return
  try:
    with _pushing, asked(_mirrors[here], "written", missing=True):
      files, path = system(_mirrors[here])
      for file in sorted(here.rglob("*"), key=lambda x: x.name == "config.json"):
        if not file.is_file() or file.suffix == ".new" or _stamps.get(file) == (stamp := _stamp(file)):
          continue  # what ends so is about to be renamed
        there = f"{path}/{file.relative_to(here).as_posix()}"
        if stamp[1] <= _SMALL:
          files.pipe_file(there, file.read_bytes())
        else:
          files.put_file(str(file), there)
        _stamps[file] = stamp
  except Mistake as error:
    if must:
      raise
    logging.warning("%s; the files of the run are put there with the next checkpoint", error)


@contextlib.contextmanager
def asked(name: Any, how: str = "read", *, missing: bool = False) -> Iterator[None]:
  """Around what asks a store, which is asked again and again by its library before that gives up; here, nothing.

  Args:
    name: the address.
    how: what it cannot be, then.
    missing: whether FileNotFoundError, which else passes, is no answer either.

  Raises:
    Mistake: it cannot be reached, or refuses.
  """
  try:
    yield
  except Exception as error:  # each library has errors of its own
    if not is_address(name) or isinstance(error, Mistake):
      raise
    if isinstance(error, FileNotFoundError) and not missing:
      raise
    raise Mistake(f"{name} cannot be {how}: {_line(error)}") from error


def unreachable(error: BaseException | None) -> bool:
  """Whether it, or what it was raised from, is of a store that is away or refuses; not of what is read there."""
  while error is not None:
    library = type(error).__module__.partition(".")[0]
    if library in ("aiohttp", "botocore", "aiobotocore", "gcsfs", "google", "requests"):
      return True
    if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
      return True
    if re.search(r"\b(PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|ABORTED|DEADLINE_EXCEEDED)\b", str(error)):
      return True
    error = error.__cause__
  return False


def of(here: Path) -> str:
  """What a mirror, or what is in one, is called; of another path, that path."""
  for folder, name in _mirrors.items():
    if here == folder or folder in here.parents:
      return f"{name}/{here.relative_to(folder).as_posix()}".removesuffix("/.")
  return str(here)


def at(here: Path) -> Any:
  """The path itself: at its address, if it is in a mirror."""
  if (name := of(here)) == str(here):
    return here
  from etils import epath

  system(name)
  return epath.Path(name)


def move(path: Any, target: Any) -> None:
  """Renames a folder, wherever it is: at an address file by file, and what is there is whole until all are copied."""
  if not is_address(path):
    path.rename(target)
    return
  files, old = system(str(path))
  new = files._strip_protocol(str(target))
  every = files.find(old)
  for x in every:
    files.cp_file(x, new + x[len(old) :])
  for x in every:
    files.rm_file(x)


def said(text: str) -> str:
  """A message, with the addresses of what is mirrored."""
  for folder, name in _mirrors.items():
    text = text.replace(str(folder), name)
  return text


def _stamp(path: Path) -> tuple[int, int]:
  found = path.stat()
  return found.st_mtime_ns, found.st_size


def _line(error: BaseException) -> str:
  return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
