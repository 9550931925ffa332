"""Where text comes from: a corpus is a list of documents (strings), or of conversations (lists of messages).

Three corpora need no download, so that a first run works anywhere: "unicode", the names of the characters (one name a
document), and "stdlib", the source of the Python standard library (one file a document), both as the running Python
has them; and "facts", see facts.py. "files:GLOB[,GLOB...]" reads files and folders, see reading.py.
"tfds:NAME[:SPLIT]" reads a data set of TensorFlow Datasets, or a folder of one. Items keep a fixed order, empty ones
are left out and counted, those that hold a text of a test too (contamination.py), and `split` sets some aside for
judging.
"""

import functools
import hashlib
import importlib
import itertools
import json
import os
import pathlib
import sysconfig
import tokenize
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from lladax.data import contamination, facts, reading
from lladax.data.reading import Tally
from lladax.data.tokenizer import ROLES
from lladax.mistake import Mistake

# {"role": "user", "content": "Hi"}, oldest first; with "weight": 0 where a reply is not to be learnt.
Messages = list[dict[str, Any]]

_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_SPOKEN = ("messages", "conversations", "conversation")  # what a record calls its messages
_ROLES = {"human": "user", "gpt": "assistant", "developer": "system"} | {role: role for role in ROLES}
_ENDS = ("output", "response", "completion")  # what an answer is called beside an instruction or a prompt
# Of a record, and of no message: what a reply may be to. Of a message: what changes nothing.
_UNREAD = "tools functions history image images audio audios video videos".split()
_ABOUT = "id name model source lang language timestamp created_at".split()
_TOGETHER = 100_000  # characters that are compared with a test together
_TFDS_PARTS = 64  # a data set is read in so many pieces


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
    raise Mistake(f"data.corpus={corpus!r} holds no text: {_why(tally, 'document')}")
  return found


def conversations(
  corpus: str, prompt_field: str = "", response_field: str = "", tally: Tally | None = None
) -> list[Messages]:
  """All conversations of a corpus: records of chat (`messages`), of instructions, or of prompt and response.

  Args:
    corpus: as in `documents`.
    prompt_field: with `response_field`, the fields of a record; "" recognises `messages` (role, content) and
      `conversations` (from, value); `instruction`, `input` and `output`; `prompt` and `response`; a `system` beside.
    response_field: see `prompt_field`.
    tally: what to do with bad lines; a record without a reply, or with an empty one, is empty.

  Raises:
    Missing, Mistake: as `documents`; a role that the chat template does not know.
  """
  tally = tally or Tally()
  found = [x for part in parts(corpus) for x in read_conversations(part, prompt_field, response_field, tally)]
  if not found:
    raise Mistake(f"data.corpus={corpus!r} holds no conversation with a reply: {_why(tally, 'record')}")
  return found


def _why(tally: Tally, what: str) -> str:
  left_out = {"empty": tally.empty, "bad lines": tally.bad, "holding a text of data.exclude": tally.excluded.total()}
  if not tally.bad and not tally.excluded:
    return f"every {what} is empty"
  return f"every {what} was left out ({', '.join(f'{n:,} {why}' for why, n in left_out.items() if n)})"


def replies(messages: Messages) -> list[int]:
  """Which messages are learnt: what the assistant says to something, but for those of weight 0."""
  return [
    i for i, x in enumerate(messages) if i and x["role"] == "assistant" and x["content"].strip() and x.get("weight", 1)
  ]


def said(messages: Messages) -> str:
  """What is said in a conversation, as one text."""
  return "\n".join(message["content"] for message in messages)


def stamp(corpus: str, exclude: str = "") -> Any:
  """What changes when the files of a corpus, or of `contamination.excluded`, do: a key for what was read of them."""
  kind, _, rest = corpus.partition(":")
  files = reading.stamp(rest) if kind == "files" and rest else None
  return files, contamination.stamp(exclude) if exclude else None


def read_texts(part: str, text_field: str, tally: Tally) -> Iterator[str]:
  """The documents of one of `parts(corpus)`."""
  return _read(part, tally, functools.partial(_text, field=text_field), tuple(text_field.split(",")))


def read_conversations(part: str, prompt_field: str, response_field: str, tally: Tally) -> Iterator[Messages]:
  """The conversations of one of `parts(corpus)`."""
  make = functools.partial(_conversation, prompt_field=prompt_field, response_field=response_field)
  return _read(part, tally, make)


def spelled(item: str | Messages) -> str:
  """A document, or a conversation, as the text that says whether it is held out."""
  return item if isinstance(item, str) else json.dumps(item)


def parts(corpus: str) -> list[str]:
  """What a corpus is made of, in a fixed order; each can be read by itself, on another machine too.

  Raises:
    Missing, Mistake: as `documents`.
  """
  kind, _, rest = corpus.partition(":")
  if corpus in ("unicode", "stdlib", "facts"):
    return [corpus]
  if kind == "files" and rest:
    return list(reading.match(rest))
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
    kept[is_held_out(spelled(item), held_out)].append(item)
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


def _read(part: str, tally: Tally, make: Callable[[Any, str], Any], columns: tuple[str, ...] = ()) -> Iterator[Any]:
  """What `make` makes of every record of a part; None, and a text without letters, is empty."""
  if part == "unicode":
    records = _unicode()
  elif part == "facts":
    records = (("facts", text) for text in facts.documents())
  elif part == "stdlib":
    records = _stdlib(pathlib.Path(sysconfig.get_path("stdlib")))
  elif part.startswith("tfds:"):
    records = _examples(part)
  else:
    records = reading.records(part, tally, columns)
  items = _made(records, tally, make)
  for item in _without(contamination.excluded(tally.exclude), items, tally) if tally.exclude else items:
    tally.items += 1
    yield item


def _made(records: Iterable[reading.Record], tally: Tally, make: Callable[[Any, str], Any]) -> Iterator[Any]:
  for where, record in records:
    try:
      item = make(record, where)
    except Mistake as error:
      tally.spoiled(str(error))
      continue
    if item is None or (isinstance(item, str) and not item.strip()):
      tally.empty += 1
    else:
      yield item


def _without(test: contamination.Test, items: Iterator[Any], tally: Tally) -> Iterator[Any]:
  """The items that hold no text of the test. Many are looked at together: a short one costs more alone."""
  waiting, texts, size = [], [], 0
  for item in itertools.chain(items, [None]):  # None: the end
    if item is not None:
      waiting.append(item)
      texts.append(item if isinstance(item, str) else said(item))
      size += len(texts[-1])
    if size > _TOGETHER or item is None:
      for kept, name in zip(waiting, test.held_by(texts), strict=True):
        if name:
          tally.excluded[name] += 1
        else:
          yield kept
      waiting, texts, size = [], [], 0


def _examples(part: str) -> Iterator[tuple[str, Any]]:
  """The examples start .. stop - 1 of "tfds:NAME:SPLIT[start:stop]"; bytes become text."""
  corpus, _, span = part.removesuffix("]").rpartition("[")
  *_, builder = _tfds(corpus)
  source = builder.as_data_source(corpus.rpartition(":")[2])
  for i in range(*map(int, span.split(":"))):
    yield f"data.corpus={corpus} example {i}", reading.plain(source[i])


def _text(record: Any, where: str, field: str) -> str:
  """The text of a record."""
  if isinstance(record, str):
    return _unicode_text(record, where)
  if "," in field:
    return "\n".join(_text(record, where, name.strip()) for name in field.split(","))
  if not isinstance(record, dict) or field not in record:
    fields = reading.short(list(record)) if isinstance(record, dict) else f"a {type(record).__name__}"
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
    return _pair(record, [prompt_field], response_field, where)
  for name in _UNREAD:
    if record.get(name):
      raise Mistake(f"{where}: the field {name!r} of a conversation is not read: leave it out, or such records")
  system = [{"role": "system", "content": record["system"]}] if record.get("system") else []
  for name in _SPOKEN:
    if record.get(name) is not None:
      return _messages(record[name], where, name, system)
  prompt = "instruction" if "instruction" in record else "prompt"
  prompts = [prompt, "input"] if prompt == "instruction" and record.get("input") else [prompt]
  response = next((name for name in _ENDS if name in record), _ENDS[0])
  return _pair(record, prompts, response, where, system)


def _pair(
  record: dict[str, Any], prompts: list[str], response: str, where: str, system: Sequence[Any] = ()
) -> Messages | None:
  for name in (*prompts, response):
    if name not in record:
      raise Mistake(
        f"{where} has the fields {reading.short(list(record))}, and no {name!r}: use messages; conversations;"
        " instruction, input and output; prompt and response; or name two fields, --config.data.prompt_field=..."
        " --config.data.response_field=..."
      )
  prompt = "\n\n".join(_content(record[name], where, name) for name in prompts)
  answer = {"role": "assistant", "content": _content(record[response], where, response)}
  return _messages([{"role": "user", "content": prompt}, answer], where, "messages", system)


def _content(value: Any, where: str, name: str) -> str:
  """A text; of a list of parts, their texts one after the other."""
  if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
    for part in value:
      if part.get("type") not in ("text", "input_text", "output_text"):
        raise Mistake(f"{where}: {name} has a part of type {reading.short(part.get('type'))}: only text is read")
    value = "".join(_content(part.get("text"), where, f"the text of a part of {name}") for part in value)
  if not isinstance(value, str):
    raise Mistake(f"{where}: {name} is no text but {type(value).__name__}")
  return _unicode_text(value, where)


def _messages(messages: Any, where: str, name: str, system: Sequence[Any] = ()) -> Messages | None:
  """The same messages, checked; those behind the last reply that is learnt are left out."""
  if not isinstance(messages, list | tuple) or not all(isinstance(message, dict) for message in messages):
    raise Mistake(f"{where}: {name} is no list of objects with role and content")
  found = [_message(message, where) for message in (*system, *messages)]
  learnt = replies(found)
  return found[: learnt[-1] + 1] if learnt else None


def _message(message: dict[str, Any], where: str) -> dict[str, Any]:
  """{"role", "content"} of one message, and its weight if that is 0. What would be lost is refused by name."""
  keys = ("role", "content") if "role" in message else ("from", "value")
  if keys[0] not in message:
    raise Mistake(
      f"{where}: a message has the fields {reading.short(list(message))}, and no 'role': use role and content"
    )
  role, weight = message[keys[0]], message.get("weight")
  if not isinstance(role, str) or role not in _ROLES:
    known = ", ".join(ROLES)
    raise Mistake(f"{where}: the role {reading.short(role)} is unknown to the chat template: use {known}")
  for field, value in message.items():
    if value not in (None, "", [], {}) and field not in (*keys, "weight", *_ABOUT):  # False may mean something
      raise Mistake(f"{where}: the field {reading.short(field)} of a message is not read: leave it out")
  if weight is not None and weight not in (0, 1):
    raise Mistake(f"{where}: a message of weight {reading.short(weight)}: use 1, learnt, or 0, not learnt")
  content = _content(message.get(keys[1]), where, keys[1])
  return {"role": _ROLES[role], "content": content} | ({"weight": 0} if weight is not None and not weight else {})
