"""Where text comes from: a corpus is a list of documents, a document is a string.

Two corpora need no download, so that a first run works anywhere: "unicode", the names of the
characters (one name a document), and "stdlib", the source of the Python standard library (one file
a document). Both are as the running Python has them. The third kind is "files:GLOB[,GLOB...]":
plain text (one document a file) or JSON lines (one document a line), as they are or compressed.
Documents keep a fixed order, empty ones are dropped, and `split` sets some aside for judging.
"""

import glob
import gzip
import hashlib
import json
import lzma
import pathlib
import sysconfig
import tokenize
import unicodedata
import zlib
from collections.abc import Iterable, Iterator, Sequence

_OPEN = {".gz": gzip.open, ".xz": lzma.open}
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def documents(corpus: str, text_field: str = "text") -> list[str]:
  """All documents of a corpus, in an order that does not depend on the machine.

  Args:
    corpus: "unicode", "stdlib" or "files:GLOB[,GLOB...]"; `~` and `**` work in a glob, and the
      suffixes .jsonl, .gz and .xz say how a file is read.
    text_field: the field of a JSON line that holds the text: a string, or a list of lines.

  Raises:
    FileNotFoundError: a glob matches no file.
    ValueError: an unknown corpus, a file that cannot be read as its name says, or no text at all.
  """
  kind, _, patterns = corpus.partition(":")
  if corpus == "unicode":
    texts = _unicode()
  elif corpus == "stdlib":
    texts = _stdlib(pathlib.Path(sysconfig.get_path("stdlib")))
  elif kind == "files" and patterns:
    texts = (text for path in _match(patterns) for text in _read(path, text_field))
  else:
    raise ValueError(f"data.corpus={corpus!r} is unknown: use unicode, stdlib or files:GLOB[,GLOB]")
  found = [text for text in texts if text.strip()]
  if not found:
    raise ValueError(f"data.corpus={corpus!r} holds no text: every document is empty")
  return found


def split(documents: Sequence[str], held_out: float) -> tuple[list[str], list[str]]:
  """(training, held-out) documents: by a hash of the text, so equal texts are in the same part.

  Args:
    documents: any texts; their order is kept.
    held_out: the expected fraction of distinct documents held out, in [0, 1).
  """
  if not 0 <= held_out < 1:
    raise ValueError(f"data.held_out={held_out}: must be at least 0 and less than 1")
  parts: tuple[list[str], list[str]] = ([], [])
  for text in documents:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    parts[int.from_bytes(digest) < held_out * 2**64].append(text)
  if held_out and not all(parts):
    empty = "held-out" if parts[0] else "training"
    raise ValueError(
      f"data.held_out={held_out} leaves the {empty} part of {len(documents)} documents empty: "
      "use another fraction, or 0"
    )
  return parts


def _unicode() -> Iterator[str]:
  """Names in code point order, without those made by a rule (CJK UNIFIED IDEOGRAPH-4E00, ...)."""
  for code in range(0x110000):
    name = unicodedata.name(chr(code), "")
    if not name.endswith(f"-{code:04X}") and not name.startswith("HANGUL SYLLABLE "):
      yield name


def _stdlib(root: pathlib.Path) -> Iterator[str]:
  """Sources in the order of their paths, without tests and what pip installed."""
  paths = {path.relative_to(root): path for path in root.rglob("*.py")}
  for name in sorted(paths, key=pathlib.PurePath.as_posix):
    if _LEFT_OUT.isdisjoint(name.parts):
      try:
        with tokenize.open(paths[name]) as file:
          yield file.read()
      except (OSError, SyntaxError, UnicodeDecodeError):  # unreadable, or not in its encoding
        continue


def _match(patterns: str) -> list[pathlib.Path]:
  """The files of comma-separated globs, each once, in the order of their paths."""
  found: set[pathlib.Path] = set()
  for pattern in patterns.split(","):
    names = glob.iglob(str(pathlib.Path(pattern.strip()).expanduser()), recursive=True)
    paths = {path for path in map(pathlib.Path, names) if path.is_file()}
    if not paths:
      raise FileNotFoundError(f"data.corpus=files:{patterns}: no file matches {pattern.strip()!r}")
    found |= paths
  return sorted(found, key=pathlib.PurePath.as_posix)


def _read(path: pathlib.Path, text_field: str) -> Iterator[str]:
  """The documents of one file."""
  where = f"data.corpus=files:... {path}"
  lines_of_json = path.with_suffix("").suffix if path.suffix in _OPEN else path.suffix
  try:
    # utf-8-sig: a byte order mark is no text.
    with _OPEN.get(path.suffix, open)(path, "rt", encoding="utf-8-sig") as file:
      if lines_of_json == ".jsonl":
        yield from _records(file, where, text_field)
      else:
        yield file.read()
  except UnicodeDecodeError as error:
    raise ValueError(f"{where} is not UTF-8 ({error.reason}): convert it") from None
  except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
    raise ValueError(f"{where} cannot be read: {error}") from error


def _records(lines: Iterable[str], where: str, text_field: str) -> Iterator[str]:
  """The text field of every JSON line."""
  for number, line in enumerate(lines, start=1):
    if not line.strip():
      continue
    try:
      record = json.loads(line)
    except json.JSONDecodeError as error:
      raise ValueError(f"{where} line {number} is not JSON: {error}") from None
    fields = list(record) if isinstance(record, dict) else f"a {type(record).__name__}"
    if not isinstance(record, dict) or text_field not in record:
      raise ValueError(f"data.text_field={text_field!r} is not in {where} line {number}: {fields}")
    text = record[text_field]
    if isinstance(text, list) and all(isinstance(part, str) for part in text):
      text = "\n".join(text)
    if not isinstance(text, str):
      raise ValueError(f"data.text_field={text_field!r} is no text in {where} line {number}")
    try:
      text.encode()
    except UnicodeEncodeError:
      raise ValueError(f"{where} line {number}: a lone surrogate is not Unicode") from None
    yield text
