"""Writing where it may fail: what is refused before, and what is said when it happens, in one wording."""

import contextlib
import functools
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lladax.mistake import Mistake, refusal


def check_writable(path: Path, field: str, *, is_folder: bool = False, parents: bool = False) -> None:
  """Raises Mistake if a file, or a folder for files, could not be written; leaves nothing behind.

  Args:
    path: of what will be written, or written again.
    field: by which the user named it.
    is_folder: it is a folder.
    parents: missing folders above it will be made.
  """
  path = at = path.absolute()
  why = ""
  while not why:
    try:
      os.lstat(at)
      break
    except (FileNotFoundError, NotADirectoryError):
      at = at.parent
    except OSError as error:  # a name that is too long
      why = str(error.strerror)
  if why:
    pass
  elif at.is_symlink() and not at.exists():
    why = f"{at} is a link to nowhere"
  elif not is_folder and at == path and at.is_dir():
    why = "it is a folder"
  elif (is_folder or at != path) and not at.is_dir():
    why = f"{at} is a file, where a folder is needed"
  elif not (parents or at in (path, path.parent)):
    why = f"there is no folder {path.parent}"
  else:
    why = _tried(at)
  if why:
    raise Mistake(f"{field}: {str(path)[:200]} cannot be written: {why}")


def _tried(at: Path) -> str:
  """Why nothing can be written there."""
  try:
    if at.is_dir():
      with tempfile.TemporaryFile(dir=at):
        pass
    else:
      with at.open("ab"):
        pass
  except OSError as error:
    return str(error.strerror)
  return ""


def reason(error: BaseException) -> str:
  """Why something could not be written, in one line: as the system says it, or what the library said."""
  if isinstance(error, Mistake):
    return str(error)
  return (
    refusal(error).rpartition(": ")[2]
    or getattr(error, "strerror", None)
    or f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
  )


@contextlib.contextmanager
def leniently(path: Path, *others: type[Exception]) -> Iterator[None]:
  """Around what writes there and may fail without ending a run: that is said, once for each reason.

  Args:
    path: what is written.
    others: what a library makes of an OSError.
  """
  try:
    yield
  except (OSError, *others) as error:
    _say(str(path), reason(error))


@functools.cache
def _say(path: str, why: str) -> None:
  logging.warning("%s cannot be written: %s; the run goes on without", path, why)
