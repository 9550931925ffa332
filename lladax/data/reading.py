"""Files to records: JSON lines, lists of JSON, Parquet, plain text; here or at an address, plain or packed.

The name says the kind, in letters of any size: .jsonl, .ndjson and .jsonlines hold a record a line; .json holds lines,
one list or one object, whichever it is; .parquet a record a row; anything else is one text. .gz, .xz, .bz2 and .zst
are unpacked. A folder stands for all files in it, at any depth; hidden ones are left out, as by a shell.

A line can hold anything. One that cannot be used ends reading, or is counted and named (`Tally`), and the next one is
read; what cannot be opened at all always ends it.
"""

import bz2
import codecs
import collections
import contextlib
import dataclasses
import gzip
import importlib
import io
import itertools
import json
import logging
import lzma
import os
import pathlib
import re
import reprlib
import sys
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import fsspec

from lladax import fields
from lladax.mistake import Missing, Mistake

if sys.version_info >= (3, 14):
  from compression import zstd
else:
  from backports import zstd

Record = tuple[str, Any]  # (where it stands, a dictionary or a text)

CORPUS = "data.corpus=files:"  # how a file is called in messages, up to its name
NAMED = 5  # so many bad lines are named
LONGEST_LINE = 2**26  # bytes; a longer one is a bad line, and is never held whole
WHOLE = 16  # times as many may have a file that is read whole: a text, one list of JSON
_PACKED: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open, ".zst": zstd.open}
_LINES = (".jsonl", ".ndjson", ".jsonlines")
_ARCHIVES = (".tar", ".tgz", ".tbz2", ".txz", ".zip", ".7z")
_SHORT = reprlib.Repr()
_SHORT.maxlist, _SHORT.maxstring = 12, 40
short = _SHORT.repr  # a value in a message, on one line of a readable length
_DAMAGED = (EOFError, lzma.LZMAError, zlib.error, zstd.ZstdError, OSError)


@dataclasses.dataclass
class Tally:
  """What reading met. A line that cannot be used ends the run (`bad_lines="stop"`), or is counted ("skip")."""

  bad_lines: str = "stop"
  exclude: str = ""  # see `contamination.excluded`
  longest: int = LONGEST_LINE  # bytes of a line
  items: int = 0
  empty: int = 0
  bad: int = 0
  named: list[str] = dataclasses.field(default_factory=list)  # the first bad lines
  excluded: collections.Counter = dataclasses.field(default_factory=collections.Counter)  # by the file of the test
  files: collections.Counter = dataclasses.field(default_factory=collections.Counter)  # by kind

  def spoiled(self, message: str) -> None:
    """Takes note of one bad line; the first ones are named."""
    if self.bad_lines == "stop":
      raise Mistake(f"{message}; mend it, or leave such lines out: --config.data.bad_lines=skip")
    self.bad += 1
    if self.bad <= NAMED:
      self.named.append(message)
      logging.warning("left out: %s%s", message, "; further ones are only counted" if self.bad == NAMED else "")


def match(patterns: str, field: str = CORPUS) -> dict[str, str]:
  """The files of comma-separated globs and folders, each once, in the order of their paths.

  Args:
    patterns: `~` and `**` work; a folder is all files in it, but those that are hidden.
    field: what the patterns were given as, for messages.

  Returns:
    {path: what changes when the file does, its size and time among it}.

  Raises:
    Missing: nothing matches, or a link leads nowhere.
    Mistake: an address that cannot be opened.
  """
  found: dict[str, str] = {}
  for pattern in map(str.strip, patterns.split(",")):
    if not pattern:
      raise Mistake(f"{field}{patterns}: a name between the commas is empty")
    try:
      system, path = fsspec.url_to_fs(os.path.expanduser(pattern))
      system.invalidate_cache()
      files = {}
      for name, about in system.glob(path, detail=True).items():
        whole = about["type"] == "directory" and name == path.rstrip("/")  # a folder that was named, not met
        files |= system.find(name, detail=True) if whole else {name: about}
      fixed = re.split(r"[*?[]", path)[0]
      fixed = len(path if fixed == path else fixed.rpartition("/")[0])  # characters of a folder that was named
      shown = {name: x for name, x in files.items() if "/." in path[fixed:] or "/." not in name[fixed:]}
      stamps = {}
      for name, about in shown.items():
        if about.get("islink"):
          if not system.exists(name):
            raise Missing(f"{field}{patterns}: {name} is a link to {about.get('destination', 'a file')}, which is gone")
          about = system.info(name)  # of what it leads to
        if about["type"] == "file":
          stamps[system.unstrip_protocol(name) if "://" in pattern else name] = repr(sorted(about.items()))
    except Mistake:
      raise
    except (ImportError, ValueError, OSError) as error:  # such as: Please install gcsfs to access Google Storage
      raise Mistake(f"{field}{patterns}: {pattern!r} cannot be opened: {error}") from None
    if not stamps:
      raise Missing(f"{field}{patterns}: no file matches {pattern!r}")
    found |= stamps
  return dict(sorted(found.items(), key=lambda item: pathlib.PurePath(item[0]).as_posix()))


_stamps: dict[tuple[str, str], Any] = {}


def stamp(patterns: str, field: str = CORPUS) -> Any:
  """What changes when one of the files does: a key for what was read of them.

  Files that were looked at once and are gone count as unchanged: what a run has read it does not need again.
  """
  try:
    _stamps[patterns, field] = tuple(match(patterns, field).items())
  except Mistake:
    if (patterns, field) not in _stamps:
      raise
  return _stamps[patterns, field]


def records(path: str, tally: Tally, columns: tuple[str, ...] = (), field: str = CORPUS) -> Iterator[Record]:
  """The records of one file of `match`.

  Args:
    path: of the file.
    tally: what to do with bad lines.
    columns: the columns of a table that are read, where it has any of them.
    field: as in `match`.
  """
  where = f"{field}{path}"
  name = pathlib.PurePath(path.lower())
  kind = name.with_suffix("").suffix if name.suffix in _PACKED else name.suffix
  if kind in _ARCHIVES:
    raise Mistake(f"{where} is an archive of several files: unpack it, and name the folder")
  tally.files[kind or "plain"] += 1
  unpacked = _PACKED.get(name.suffix, contextlib.nullcontext)
  try:
    with fsspec.open(path, "rb") as packed, unpacked(packed) as raw, io.BufferedReader(raw) as file:
      if kind == ".parquet":
        yield from _rows(file, where, columns, tally)
      elif kind in _LINES:
        yield from _lines(_raw_lines(file, where, tally), where, tally)
      elif kind == ".json":
        yield from _json(file, where, tally)
      elif text := _decode(_whole(file, where, tally), where, tally):
        yield where, text.replace("\r\n", "\n").replace("\r", "\n")
  except _DAMAGED as error:
    if not _is_damage(error):
      raise Mistake(f"{where} cannot be read: {error}") from error
    tally.spoiled(f"{where} cannot be read: {error}")


def _is_damage(error: BaseException) -> bool:
  """Whether the bytes are to blame, and not the file system, whose errors have a number."""
  return not isinstance(error, OSError) or error.errno is None


def _decode(raw: bytes, where: str, tally: Tally) -> str:
  try:
    return raw.decode("utf-8-sig")  # a byte order mark is no text
  except UnicodeDecodeError as error:
    tally.spoiled(f"{where} is not UTF-8 ({error.reason} at byte {error.start})")
    return ""


def _whole(file: Any, where: str, tally: Tally, start: bytes = b"") -> bytes:
  """All that a file holds behind its `start`; nothing of one that unpacks to more than can be held."""
  parts, room = [start], WHOLE * tally.longest - len(start)
  while room >= 0 and (part := file.read(min(2**20, room + 1))):  # one long read would take the room at once
    parts.append(part)
    room -= len(part)
  if room >= 0:
    return b"".join(parts)
  tally.spoiled(f"{where} is longer than {WHOLE} x data.longest_line={tally.longest:,} bytes, and is read whole")
  return b""


def _raw_lines(file: io.BufferedReader, where: str, tally: Tally, first: int = 1) -> Iterator[tuple[int, bytes]]:
  """Numbered lines; only a newline ends one. What a damaged archive still gives is read."""
  for number in itertools.count(first):
    here = f"{where} line {number}"
    try:
      raw = rest = file.readline(tally.longest + 1)
      while len(raw) > tally.longest and rest and not rest.endswith(b"\n"):
        rest = file.readline(2**20)
    except _DAMAGED as error:
      if not _is_damage(error):
        raise
      return tally.spoiled(f"{where} cannot be read from line {number} on: {error}")
    if not raw:
      return
    if len(raw) > tally.longest:
      tally.spoiled(f"{here} is longer than data.longest_line={tally.longest:,} bytes")
    else:
      yield number, raw


def _lines(lines: Iterable[tuple[int, bytes]], where: str, tally: Tally) -> Iterator[Record]:
  for number, raw in lines:
    here = f"{where} line {number}"
    line = _decode(raw, here, tally)
    if not line.strip():
      continue
    try:
      record = _parse(line, here)
    except Mistake as error:
      tally.spoiled(str(error))
    else:
      yield here, record


def _json(file: io.BufferedReader, where: str, tally: Tally) -> Iterator[Record]:
  """Lines where the first one is an object; else one list of records, or one record."""
  start = b""
  if file.peek(64).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"{":
    start = file.readline(tally.longest + 1)
    if start.rstrip().endswith(b"}"):
      numbered = itertools.chain([(1, start)], _raw_lines(file, where, tally, first=2))
      yield from _lines(numbered, where, tally)
      return
  text = _decode(_whole(file, where, tally, start), where, tally)
  if not text.strip():
    return
  try:
    found = _parse(text, where)
  except Mistake as error:
    return tally.spoiled(str(error))
  if isinstance(found, list):
    yield from ((f"{where} item {number}", item) for number, item in enumerate(found, start=1))
  else:
    yield where, found


def _parse(text: str, where: str) -> Any:
  try:
    return json.loads(text, object_pairs_hook=fields.json_object)
  except RecursionError:
    raise Mistake(f"{where} is not JSON that can be read: it is nested too deeply") from None
  except ValueError as error:  # also of a number of more digits than Python takes
    raise Mistake(f"{where} is not JSON: {error}") from None


def _rows(file: Any, where: str, columns: tuple[str, ...], tally: Tally) -> Iterator[Record]:
  try:
    parquet = importlib.import_module("pyarrow.parquet")
  except ImportError:
    raise Mistake(f"{where} needs pyarrow: pip install pyarrow") from None
  number = 0
  try:
    table = parquet.ParquetFile(file)
    wanted = [name for name in columns if name in table.schema_arrow.names]
    batches = table.iter_batches(batch_size=1024, columns=wanted if wanted else None)
    for batch in batches:
      for row in _batch(batch):
        number += 1
        if isinstance(row, Exception):
          tally.spoiled(f"{where} row {number} cannot be read: {_line(row)}")
        else:
          yield f"{where} row {number}", plain(row)
  except Mistake:
    raise
  except Exception as error:  # ArrowInvalid is a ValueError, others are not
    if isinstance(error, OSError) and not _is_damage(error):
      raise
    behind = f" behind row {number}" if number else ""
    tally.spoiled(f"{where} cannot be read{behind}: {_line(error)}")


def _batch(batch: Any) -> list[Any]:
  """The rows of a batch; in place of one that cannot be read, what is wrong with it."""
  try:
    return batch.to_pylist()
  except (ValueError, ArithmeticError) as error:  # a text that is not UTF-8, a time that Python does not know
    if batch.num_rows == 1:
      return [error]
    return [_batch(batch.slice(i, 1))[0] for i in range(batch.num_rows)]  # ten times as slow


def plain(value: Any) -> Any:
  """Bytes as text, arrays as lists, at any depth; what is not UTF-8 becomes a lone surrogate, which is found later."""
  if isinstance(value, bytes):
    return value.decode("utf-8", "surrogateescape")
  if isinstance(value, dict):
    return {name: plain(x) for name, x in value.items()}
  if hasattr(value, "tolist"):
    value = value.tolist()
    return plain(value) if isinstance(value, list | bytes) else value
  return [plain(x) for x in value] if isinstance(value, list) else value


def _line(error: BaseException) -> str:
  return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
