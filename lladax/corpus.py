"""Where text comes from: a corpus is a list of documents (strings), or of conversations (lists of messages).

Three corpora need no download, so that a first run works anywhere: "unicode", the names of the characters (one name a
document), and "stdlib", the source of the Python standard library (one file a document), both as the running Python
has them; and "facts", see facts.py. "files:GLOB[,GLOB...]" reads files, here or at any address that fsspec knows
(gs://, s3://, https://): .jsonl, .json (one list) and .parquet hold a record a line, item or row, anything else is one
document; .gz, .xz, .bz2 and .zst are unpacked. "tfds:NAME[:SPLIT]" reads a data set of TensorFlow Datasets, or a folder
of one. Items keep a fixed order, empty ones are left out and counted, and `split` sets some aside for judging.
"""

import bz2
import contextlib
import dataclasses
import functools
import gzip
import hashlib
import importlib
import json
import logging
import lzma
import os
import pathlib
import sys
import sysconfig
import tokenize
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import fsspec

from lladax import facts
from lladax.mistake import Missing, Mistake
from lladax.tokenizer import ROLES

if sys.version_info >= (3, 14):
  from compression import zstd
else:
  from backports import zstd

Messages = list[dict[str, str]]  # {"role": "user", "content": "Hi"}, oldest first

_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_PACKED: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open, ".zst": zstd.open}
_ENDS = ("output", "response", "completion")  # what an answer is called beside an instruction or a prompt
NAMED = 5  # so many bad lines are named
_TFDS_PARTS = 64  # a data set is read in so many pieces


@dataclasses.dataclass
class Tally:
  """What reading met. A line that cannot be used ends the run (`bad_lines="stop"`), or is counted ("skip")."""

  bad_lines: str = "stop"
  exclude: str = ""  # see `contaminated`
  items: int = 0
  empty: int = 0
  bad: int = 0
  excluded: int = 0
  named: list[str] = dataclasses.field(default_factory=list)  # the first bad lines

  def spoiled(self, message: str) -> None:
    """Takes note of one bad line; the first ones are named."""
    if self.bad_lines == "stop":
      raise Mistake(f"{message}; mend it, or leave such lines out: --config.data.bad_lines=skip")
    self.bad += 1
    if self.bad <= NAMED:
      self.named.append(message)
      logging.warning("left out: %s%s", message, "; further ones are only counted" if self.bad == NAMED else "")


def documents(corpus: str, text_field: str = "text", tally: Tally | None = None) -> list[str]:
  """All documents of a corpus, in an order that does not depend on the machine.

  Args:
    corpus: "unicode", "stdlib", "facts", "files:GLOB[,GLOB...]" (`~` and `**` work in a glob) or "tfds:NAME[:SPLIT]".
    text_field: the field of a record that holds the text: a string, or a list of lines. Several, "question,answer",
      are joined by a newline.
    tally: what to do with bad lines; counts what was read.

  Raises:
    Missing: a glob matches no file.
    Mistake: an unknown corpus, a file that cannot be read as its name says, a bad line, or no text at all.
  """
  tally = tally or Tally()
  found = [text for part in parts(corpus) for text in read_texts(part, text_field, tally)]
  if not found:
    raise Mistake(f"data.corpus={corpus!r} holds no text: every document is empty")
  return found


def conversations(
  corpus: str, prompt_field: str = "", response_field: str = "", tally: Tally | None = None
) -> list[Messages]:
  """All conversations of a corpus: records of chat (`messages`), of instructions, or of prompt and response.

  Args:
    corpus: as in `documents`.
    prompt_field: with `response_field`, the fields of a record; "" recognises `messages`; `instruction`, `input` and
      `output`; `prompt` and `response`.
    response_field: see `prompt_field`.
    tally: what to do with bad lines; a record without a reply, or with an empty one, is empty.

  Raises:
    Missing, Mistake: as `documents`; a role that the chat template does not know.
  """
  tally = tally or Tally()
  of = functools.partial(_conversation, prompt_field=prompt_field, response_field=response_field)
  found = [messages for part in parts(corpus) for messages in _read(part, tally, of)]
  if not found:
    raise Mistake(f"data.corpus={corpus!r} holds no conversation with a reply")
  return found


def said(messages: Messages) -> str:
  """What is said in a conversation, as one text."""
  return "\n".join(message["content"] for message in messages)


@functools.lru_cache(maxsize=2)
def contaminated(path: str) -> Callable[[str], bool]:
  """Whether a document holds one of the texts of a test, letter for letter: it is not to be learnt then.

  Args:
    path: as the GLOB of files:GLOB, of JSON; every string in it counts, at any depth, but not the names of fields.

  Raises:
    Missing, Mistake: there is no such file, or it is no JSON, or holds no text.
  """
  texts: set[str] = set()

  def collect(value: Any) -> None:
    if isinstance(value, str) and value.strip():
      texts.add(value.strip())
    elif isinstance(value, dict | list):
      for x in value.values() if isinstance(value, dict) else value:
        collect(x)

  try:
    for part in _match(path):
      for _, record in _file(part, Tally(), ()):
        collect(record)
  except Mistake as error:
    raise type(error)(str(error).replace("data.corpus=files:", "data.exclude=", 1).partition("; mend")[0]) from None
  if not texts:
    raise Mistake(f"data.exclude={path!r} holds no text")
  lengths = sorted(set(map(len, texts)))
  return lambda text: any(text[i : i + n] in texts for n in lengths for i in range(len(text) - n + 1))


def read_texts(part: str, text_field: str, tally: Tally) -> Iterator[str]:
  """The documents of one of `parts(corpus)`."""
  return _read(part, tally, functools.partial(_text, field=text_field), tuple(text_field.split(",")))


def parts(corpus: str) -> list[str]:
  """What a corpus is made of, in a fixed order; each can be read by itself, on another machine too.

  Raises:
    Missing, Mistake: as `documents`.
  """
  kind, _, rest = corpus.partition(":")
  if corpus in ("unicode", "stdlib", "facts"):
    return [corpus]
  if kind == "files" and rest:
    return _match(rest)
  if kind == "tfds" and rest:
    name, split, count = _tfds(corpus)[:3]
    edges = [count * i // _TFDS_PARTS for i in range(_TFDS_PARTS + 1)]
    return [f"tfds:{name}:{split}[{a}:{b}]" for a, b in zip(edges, edges[1:], strict=False) if a < b]
  known = "unicode, stdlib, facts, files:GLOB[,GLOB], tfds:NAME[:SPLIT] or, to train on, records:FOLDER"
  raise Mistake(f"data.corpus={corpus!r} is unknown: use {known}")


def split(items: Sequence[Any], held_out: float) -> tuple[list[Any], list[Any]]:
  """(training, held-out) items: by a hash of their text, so equal ones are in the same part.

  Args:
    items: texts, or conversations; their order is kept.
    held_out: the expected fraction of distinct items held out, in [0, 1).
  """
  if not 0 <= held_out < 1:
    raise Mistake(f"data.held_out={held_out}: must be at least 0 and less than 1")
  kept: tuple[list[Any], list[Any]] = ([], [])
  for item in items:
    kept[is_held_out(item if isinstance(item, str) else json.dumps(item), held_out)].append(item)
  if held_out and not all(kept):
    empty = "held-out" if kept[0] else "training"
    raise Mistake(
      f"data.held_out={held_out} leaves the {empty} part of {len(items)} documents empty: use another fraction, or 0"
    )
  return kept


def is_held_out(text: str, held_out: float) -> bool:
  """Whether a document is set aside: a matter of its text alone."""
  return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) < held_out * 2**64


def _unicode() -> Iterator[tuple[str, str]]:
  """Names in code point order, without those made by a rule (CJK UNIFIED IDEOGRAPH-4E00, ...)."""
  for code in range(0x110000):
    name = unicodedata.name(chr(code), "")
    if name and not name.endswith(f"-{code:04X}") and not name.startswith("HANGUL SYLLABLE "):
      yield f"U+{code:04X}", name


def _stdlib(root: pathlib.Path) -> Iterator[tuple[str, str]]:
  """Sources in the order of their paths, without tests and what pip installed."""
  paths = {path.relative_to(root): path for path in root.rglob("*.py")}
  for name in sorted(paths, key=pathlib.PurePath.as_posix):
    if _LEFT_OUT.isdisjoint(name.parts):
      try:
        with tokenize.open(paths[name]) as file:
          yield str(name), file.read()
      except (OSError, SyntaxError, UnicodeDecodeError):  # unreadable, or not in its encoding
        continue


def _match(patterns: str) -> list[str]:
  """The files of comma-separated globs, each once, in the order of their paths."""
  found: set[str] = set()
  for pattern in map(str.strip, patterns.split(",")):
    try:
      system, path = fsspec.url_to_fs(os.path.expanduser(pattern))
      paths = [name for name, about in system.glob(path, detail=True).items() if about["type"] == "file"]
    except (ImportError, ValueError, OSError) as error:  # such as: Please install gcsfs to access Google Storage
      raise Mistake(f"data.corpus=files:{patterns}: {pattern!r} cannot be opened: {error}") from None
    if not paths:
      raise Missing(f"data.corpus=files:{patterns}: no file matches {pattern!r}")
    remote = "://" in pattern
    found.update(system.unstrip_protocol(name) if remote else name for name in paths)
  return sorted(found, key=lambda name: pathlib.PurePath(name).as_posix())


def _tfds(corpus: str) -> tuple[str, str, int, Any]:
  """(name, split, number of examples, builder) of "tfds:NAME[:SPLIT]"."""
  name, _, split = corpus.removeprefix("tfds:").partition(":")
  try:
    tfds = importlib.import_module("tensorflow_datasets")
  except ImportError:
    raise Mistake(f"data.corpus={corpus!r} needs TensorFlow Datasets: pip install 'lladax[tfds]'") from None
  split = split or "train"
  try:
    builder = tfds.builder_from_directory(name) if os.path.isdir(name) else tfds.builder(name)
    return name, split, builder.info.splits[split].num_examples, builder
  except Exception as error:  # the library raises many kinds
    why = str(error).strip().splitlines()[0]
    raise Mistake(f"data.corpus={corpus!r} cannot be opened: {why}") from None


def _read(part: str, tally: Tally, of: Callable[[Any, str], Any], columns: tuple[str, ...] = ()) -> Iterator[Any]:
  """What `of` makes of every record of a part; None, and a text without letters, is empty."""
  if part == "unicode":
    records = _unicode()
  elif part == "facts":
    records = (("facts", text) for text in facts.documents())
  elif part == "stdlib":
    records = _stdlib(pathlib.Path(sysconfig.get_path("stdlib")))
  elif part.startswith("tfds:"):
    records = _examples(part)
  else:
    records = _file(part, tally, columns)
  for where, record in records:
    try:
      item = of(record, where)
    except Mistake as error:
      tally.spoiled(str(error))
      continue
    if item is None or (isinstance(item, str) and not item.strip()):
      tally.empty += 1
    elif tally.exclude and contaminated(tally.exclude)(item if isinstance(item, str) else said(item)):
      tally.excluded += 1
    else:
      tally.items += 1
      yield item


def _examples(part: str) -> Iterator[tuple[str, Any]]:
  """The examples start .. stop - 1 of "tfds:NAME:SPLIT[start:stop]"; bytes become text."""
  corpus, _, span = part.removesuffix("]").rpartition("[")
  *_, builder = _tfds(corpus)
  source = builder.as_data_source(corpus.rpartition(":")[2])
  for i in range(*map(int, span.split(":"))):
    example = {
      name: x.decode("utf-8", "surrogateescape") if isinstance(x, bytes) else x for name, x in source[i].items()
    }
    yield f"data.corpus={corpus} example {i}", example


def _file(path: str, tally: Tally, columns: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
  """The records of one file: (where it stands, a dictionary or a text)."""
  where = f"data.corpus=files:{path}"
  name = pathlib.PurePath(path)
  kind = name.with_suffix("").suffix if name.suffix in _PACKED else name.suffix
  try:
    with fsspec.open(path, "rb") as packed, _PACKED.get(name.suffix, contextlib.nullcontext)(packed) as file:
      if kind == ".parquet":
        yield from _rows(file, where, columns)
      elif kind == ".jsonl":
        yield from _lines(file, where, tally)
      elif text := _decode(file.read(), where, tally):
        if kind == ".json":
          yield from _list(text, where, tally)
        else:
          yield where, text.replace("\r\n", "\n").replace("\r", "\n")
  except (OSError, EOFError, lzma.LZMAError, zlib.error, zstd.ZstdError) as error:
    raise Mistake(f"{where} cannot be read: {error}") from error


def _decode(raw: bytes, where: str, tally: Tally) -> str:
  try:
    return raw.decode("utf-8-sig")  # a byte order mark is no text
  except UnicodeDecodeError as error:
    tally.spoiled(f"{where} is not UTF-8 ({error.reason} at byte {error.start})")
    return ""


def _lines(lines: Iterable[bytes], where: str, tally: Tally) -> Iterator[tuple[str, Any]]:
  for number, raw in enumerate(lines, start=1):
    here = f"{where} line {number}"
    line = _decode(raw, here, tally)
    if not line.strip():
      continue
    try:
      yield here, json.loads(line)
    except json.JSONDecodeError as error:
      tally.spoiled(f"{here} is not JSON: {error}")


def _list(text: str, where: str, tally: Tally) -> Iterator[tuple[str, Any]]:
  """The items of a JSON file that is one list, as many data sets of instructions are."""
  try:
    items = json.loads(text)
  except json.JSONDecodeError as error:
    return tally.spoiled(f"{where} is not JSON: {error}")
  if not isinstance(items, list):
    return tally.spoiled(f"{where} holds a {type(items).__name__}, not a list of records")
  yield from ((f"{where} item {number}", item) for number, item in enumerate(items, start=1))


def _rows(file: Any, where: str, columns: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
  try:
    parquet = importlib.import_module("pyarrow.parquet")
  except ImportError:
    raise Mistake(f"{where} needs pyarrow: pip install pyarrow") from None
  try:
    table = parquet.ParquetFile(file)
  except Exception as error:  # ArrowInvalid is a ValueError, others are not
    raise Mistake(f"{where} cannot be read: {error}") from None
  wanted = [name for name in columns if name in table.schema_arrow.names]
  number = 0
  for batch in table.iter_batches(batch_size=1024, columns=wanted if wanted else None):
    for row in batch.to_pylist():
      number += 1
      yield f"{where} row {number}", row


def _text(record: Any, where: str, field: str) -> str:
  """The text of a record."""
  if isinstance(record, str):
    return record
  if "," in field:
    return "\n".join(_text(record, where, name.strip()) for name in field.split(","))
  fields = list(record) if isinstance(record, dict) else f"a {type(record).__name__}"
  if not isinstance(record, dict) or field not in record:
    raise Mistake(f"data.text_field={field!r} is not in {where}: {fields}")
  text = record[field]
  if isinstance(text, list) and all(isinstance(part, str) for part in text):
    text = "\n".join(text)
  if not isinstance(text, str):
    raise Mistake(f"data.text_field={field!r} is no text in {where}")
  return _unicode_text(text, where)


def _unicode_text(text: str, where: str) -> str:
  try:
    text.encode()
  except UnicodeEncodeError:
    raise Mistake(f"{where}: a lone surrogate is not Unicode") from None
  return text


def _conversation(record: Any, where: str, prompt_field: str, response_field: str) -> Messages | None:
  """The messages of a record, up to its last reply; None without any."""
  if not isinstance(record, dict):
    raise Mistake(f"{where} is no record with fields")
  if prompt_field or response_field:
    pair = [prompt_field], response_field
  elif "messages" in record:
    return _messages(record["messages"], where)
  elif "instruction" in record:
    pair = ["instruction", "input"] if record.get("input") else ["instruction"], _first(record, _ENDS)
  else:
    pair = ["prompt"], _first(record, _ENDS)
  for name in (*pair[0], pair[1]):
    if name not in record:
      raise Mistake(
        f"{where} has the fields {list(record)}, and no {name!r}: use messages; instruction, input and output; prompt"
        " and response; or name two fields, --config.data.prompt_field=... --config.data.response_field=..."
      )
  prompt = "\n\n".join(_content(record[name], where, name) for name in pair[0])
  response = _content(record[pair[1]], where, pair[1])
  return _messages([{"role": "user", "content": prompt}, {"role": "assistant", "content": response}], where)


def _first(record: dict[str, Any], names: Sequence[str]) -> str:
  return next((name for name in names if name in record), names[0])


def _content(value: Any, where: str, name: str) -> str:
  if not isinstance(value, str):
    raise Mistake(f"{where}: {name} is no text but {type(value).__name__}")
  return _unicode_text(value, where)


def _messages(messages: Any, where: str) -> Messages | None:
  """The same messages, checked; those behind the last reply, and replies to nothing, are left out."""
  if not isinstance(messages, list | tuple) or not all(isinstance(message, dict) for message in messages):
    raise Mistake(f"{where}: messages is no list of objects with role and content")
  found: Messages = []
  for message in messages:
    if "role" not in message:
      raise Mistake(f"{where}: a message has the fields {list(message)}, and no 'role': use role and content")
    role = message["role"]
    if role not in ROLES:
      raise Mistake(f"{where}: the role {role!r} is unknown to the chat template: use {', '.join(ROLES)}")
    found.append({"role": role, "content": _content(message.get("content"), where, "content")})
  replies = [
    i for i, message in enumerate(found) if i and message["role"] == "assistant" and message["content"].strip()
  ]
  return found[: replies[-1] + 1] if replies else None
