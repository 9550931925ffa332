"""A corpus to prepared records (see records.py), with Apache Beam: on this machine, or on any cluster that runs Beam.

The life of a document:

  its file is read by some worker; its hash says whether it is held out, and to which shard it goes;
  a shard's documents meet on some worker, are sorted by their hash (which shuffles them) and lose their duplicates;
  they are tokenised, each followed by EOS, laid end to end, and cut into records; a shard's last record is padded;
  the shard is written under another name, renamed when it is whole, and its counts are written beside it.

A conversation is a record of its own, rendered in the chat template, and none is dropped: a table of each shard says
where in the corpus it stood, and where its replies lie, so that a run on records is the run on the files.

Nothing of this depends on the number of workers, and neither do the bytes of the files. A preparation that was cut off
goes on with the same command: shards that are whole are kept. Memory: a worker holds one shard's text.
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

import fsspec
import numpy as np
from rich.table import Table

from lladax import address
from lladax.data import contamination, corpus, dialogues, reading, records
from lladax.data import tokenizer as tokenizers
from lladax.data.sources import texts
from lladax.data.tokenizer import Tokenizer, TokenizerConfig
from lladax.data.windows import DataConfig
from lladax.mistake import Mistake
from lladax.terminal import Console

_BATCH_BYTES = 4_000_000  # of documents that travel together
_COUNTS = {
  "text": ("documents", "bytes", "tokens", "records", "padding", "duplicates"),
  "chat": ("documents", "replies", "bytes", "tokens", "records"),
}
Key = tuple[str, int]  # (split, shard)
Item = tuple[Any, str]  # (what it is sorted by, a document or the JSON of a conversation)


@dataclasses.dataclass(frozen=True)
class Recipe:
  """What decides every byte of the records."""

  corpus: str
  text_field: str
  exclude: str
  held_out: float
  length: int
  shards: int
  tokenizer_fingerprint: str
  holds: str = "text"  # or "chat"
  prompt_field: str = ""
  response_field: str = ""

  @property
  def stated(self) -> dict[str, Any]:
    """As it is written down: what plays a part."""
    only = {"text": ("text_field", "length"), "chat": ("holds", "prompt_field", "response_field")}
    others = {name for kind, names in only.items() if kind != self.holds for name in names}
    return {name: x for name, x in dataclasses.asdict(self).items() if name not in others}

  def key(self, text: str) -> tuple[Key, bytes]:
    """((split, shard), hash) of a document."""
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    split = records.SPLITS[corpus.is_held_out(text, self.held_out)]
    return (split, int.from_bytes(digest[:8]) % self.shards), digest


def run(
  data: DataConfig, tokenizer: TokenizerConfig | Tokenizer, target: str, shards: int, beam_options: list[str]
) -> dict[str, Any]:
  """Prepares the corpus of a config; returns the manifest.

  Args:
    data: corpus, format, the fields of a record, bad_lines, exclude, held_out and, of text, length.
    tokenizer: as for training; SentencePiece without a path is trained on the whole corpus, on this machine. Or one
      that is at hand, of the model that a run begins with.
    target: folder, or an address that fsspec can write to.
    shards: files of each split; each is made by one worker, in memory.
    beam_options: as for any Beam pipeline, such as --runner=DataflowRunner, or --direct_num_workers=2
      --direct_running_mode=multi_processing.

  Raises:
    Mistake, Missing: bad input, one line.
  """
  console = Console(stderr=True, soft_wrap=True)
  if data.mixture:
    raise Mistake("--mode=prepare makes records of one corpus: data.corpus, no data.mixture")
  if shards < 1:
    raise Mistake(f"--shards={shards}: must be at least 1")
  logging.disable(logging.WARNING)  # Beam complains of clouds that are not installed
  try:
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions
  except ImportError as error:
    raise Mistake(f"--mode=prepare needs Apache Beam ({error}): pip install 'lladax[prepare]'") from None
  finally:
    logging.disable(logging.NOTSET)
  parts = corpus.parts(data.corpus)
  if data.exclude:
    contamination.excluded(data.exclude)  # says now what is wrong with it
  if address.is_address(target):
    address.system(target)  # says what is not installed
  system, root = fsspec.url_to_fs(os.path.expanduser(target))
  folder = _Folder(target, root)
  text = _tokenizer(folder, tokenizer, data, console)
  if data.format == "chat":
    text.check_chat()
  recipe = Recipe(
    data.corpus, data.text_field, data.exclude, data.held_out, data.length, shards, text.fingerprint, data.format,
    data.prompt_field, data.response_field,
  )  # fmt: skip
  _save(folder, text)
  done = folder.begin(recipe)
  if manifest := folder.read(records.MANIFEST):
    console.print(f"{target} is finished already")
    return json.loads(manifest)
  if done:
    console.print(f"{len(done)} of {2 * shards} shards of {target} are whole already, and are kept")
  options = PipelineOptions(["--default_sdk_harness_log_level=CRITICAL", *beam_options])
  logging.getLogger("apache_beam").setLevel(logging.CRITICAL)  # what goes wrong, the exception tells too
  began = time.monotonic()
  try:
    with (
      _stderr_aside() as terminal,
      _progress(folder, 2 * shards, terminal),
      beam.Pipeline(options=options) as pipeline,
    ):
      read = (
        pipeline
        | "parts" >> beam.Create(list(enumerate(parts)))
        | "spread" >> beam.Reshuffle()
        | "read" >> beam.ParDo(_reader(recipe, data, done)).with_outputs("tally", main="documents")
      )
      _ = read.documents | "shards" >> beam.GroupByKey() | "write" >> beam.Map(_write, recipe, folder, text)
      _ = read.tally | "tallies" >> beam.combiners.ToList() | "sum" >> beam.Map(_write_tally, folder)
  except (Exception, KeyboardInterrupt, SystemExit) as error:
    signalled = re.search(r"SystemExit: (\d+)", str(error))  # what is raised in a worker, Beam keeps as text
    if not isinstance(error, Exception) or signalled or "KeyboardInterrupt" in str(error):
      console.print("stopped; the same command goes on with the shards that are not whole yet")
      threading.excepthook = lambda _: None  # Beam's threads would tell of the end of their workers
      code = error.code if isinstance(error, SystemExit) else int(signalled[1]) if signalled else 130
      raise SystemExit(code) from None
    if line := _own_error(error):
      raise Mistake(line) from None
    raise
  for key in ((split, shard) for split in records.SPLITS for shard in range(shards)):
    if not folder.counts(key):  # no document went there
      _write((key, []), recipe, folder, text)
  manifest = _finish(folder, recipe, text)
  _report(manifest, 0.0 if done else time.monotonic() - began, target, console)
  return manifest


class _Folder:
  """The target: files are written here and put there, whole or not at all. Travels to workers as its address."""

  def __init__(self, target: str, root: str):
    self.target, self.root = target, root

  @property
  def system(self) -> Any:
    return fsspec.url_to_fs(os.path.expanduser(self.target))[0]

  def read(self, name: str) -> bytes | None:
    """A file's content; None if it is not there."""
    path = f"{self.root}/{name}"
    return self.system.cat_file(path) if self.system.exists(path) else None

  def write(self, name: str, content: bytes) -> None:
    self.system.makedirs(self.root, exist_ok=True)
    part = self._part(name)
    self.system.pipe_file(f"{self.root}/{part}", content)
    if part != name:
      self.system.mv(f"{self.root}/{part}", f"{self.root}/{name}")

  def put(self, local: str, name: str) -> None:
    part = self._part(name)
    self.system.put_file(local, f"{self.root}/{part}")
    if part != name:
      self.system.mv(f"{self.root}/{part}", f"{self.root}/{name}")

  def _part(self, name: str) -> str:
    """What a file is called until it is whole: in an object store there is none that is not."""
    return name if address.is_address(self.target) else f"{name}.incomplete"

  def counts(self, key: Key) -> dict[str, int] | None:
    """The counts of a shard that is whole."""
    return self.json(_counts_name(key))

  def json(self, name: str) -> Any:
    """What a file of a preparation holds; None without it."""
    try:
      return json.loads(self.read(name) or b"null")
    except (ValueError, RecursionError) as error:
      raise Mistake(
        f"--target={self.target}: {name} is damaged ({error}): delete the folder, and prepare it again"
      ) from None

  def begin(self, recipe: Recipe) -> set[Key]:
    """The shards that are whole; refuses a folder that was begun otherwise."""
    given = recipe.stated
    found = self.json("recipe.json")
    if found is None:
      self.write("recipe.json", json.dumps(given, indent=2).encode())
      return set()
    now = dict.fromkeys(found) | given
    differ = [f"{name}: {found.get(name)!r} there, {x!r} here" for name, x in now.items() if found.get(name) != x]
    if differ:
      raise Mistake(f"--target={self.target} was begun otherwise ({'; '.join(differ)}): choose another folder")
    keys = [(split, shard) for split in records.SPLITS for shard in range(recipe.shards)]
    names = {path.rsplit("/", 1)[-1] for path in self.system.ls(self.root, detail=False)}
    return {key for key in keys if _counts_name(key) in names}

  def done(self) -> int:
    """How many shards are whole."""
    return len(self.system.glob(f"{self.root}/counts-*.json"))


def _counts_name(key: Key) -> str:
  return f"counts-{key[0]}-{key[1]:05d}.json"


def _tokenizer(folder: _Folder, config: TokenizerConfig | Tokenizer, data: DataConfig, console: Console) -> Tokenizer:
  """What was given; else the tokenizer of the target where it was begun before, else a new one."""
  if isinstance(config, Tokenizer):
    return config
  remote = f"{folder.root}/tokenizer"
  if folder.system.exists(f"{remote}/{tokenizers.SETTINGS}"):
    with tempfile.TemporaryDirectory() as here:
      folder.system.get(f"{remote}/", here + "/", recursive=True)
      return tokenizers.load(here)
  trains = config.kind == "sentencepiece" and not config.path
  if trains:
    console.print("training the tokenizer on the corpus")
  return tokenizers.create(config, texts(data)[0] if trains else None)


def _save(folder: _Folder, text: Tokenizer) -> None:
  """The tokenizer goes to the target, unless it is there."""
  remote = f"{folder.root}/tokenizer"
  if folder.system.exists(f"{remote}/{tokenizers.SETTINGS}"):
    return
  with tempfile.TemporaryDirectory() as here:
    text.save(here)
    names = sorted(os.listdir(here), key=lambda name: name == tokenizers.SETTINGS)  # the settings last
    for name in names:
      folder.system.makedirs(remote, exist_ok=True)
      folder.system.put_file(f"{here}/{name}", f"{remote}/{name}")


def _reader(recipe: Recipe, data: DataConfig, done: set[Key]) -> Any:
  """The DoFn from numbered parts of the corpus to (key, [item, ...]), and a tally of each part."""
  import apache_beam as beam
  from apache_beam.pvalue import TaggedOutput

  bad_lines, longest = data.bad_lines, data.longest_line

  class Read(beam.DoFn):
    def process(self, part: tuple[int, str]) -> Iterator[Any]:
      tally = reading.Tally(bad_lines, recipe.exclude, longest)
      waiting, size = collections.defaultdict(list), 0
      for number, item in enumerate(_read(recipe, part[1], tally)):
        text = corpus.spelled(item)
        key, digest = recipe.key(text)
        if key in done:
          continue
        waiting[key].append((digest if recipe.holds == "text" else (part[0], number), text))
        size += len(text)
        if size > _BATCH_BYTES:
          yield from waiting.items()
          waiting, size = collections.defaultdict(list), 0
      yield from waiting.items()
      yield TaggedOutput("tally", tally)

  return Read()


def _read(recipe: Recipe, part: str, tally: reading.Tally) -> Iterator[Any]:
  if recipe.holds == "text":
    return corpus.read_texts(part, recipe.text_field, tally)
  return corpus.read_conversations(part, recipe.prompt_field, recipe.response_field, tally)


def _write(gathered: tuple[Key, Iterable[list[Item]]], recipe: Recipe, folder: _Folder, text: Tokenizer) -> None:
  """Writes a shard and its counts."""
  from array_record.python.array_record_module import ArrayRecordWriter

  (split, shard), batches = gathered
  found = sorted(item for batch in batches for item in batch)
  count: dict[str, Any] = dict.fromkeys(_COUNTS[recipe.holds], 0)
  name = records.file_name(split, shard, recipe.shards)
  with tempfile.TemporaryDirectory() as here:
    local = f"{here}/{name}"
    writer = ArrayRecordWriter(local, "group_size:1")
    if recipe.holds == "chat":
      table, count["turns"] = records.encode_table(list(_write_talks(writer, found, text, count)))
      folder.write(records.turns_name(split, shard, recipe.shards), table)
    else:
      _write_windows(writer, found, recipe.length, text, count)
    writer.close()
    folder.put(local, name)
  folder.write(_counts_name((split, shard)), json.dumps(count).encode())


def _write_talks(writer: Any, found: list[Item], text: Tokenizer, count: dict[str, Any]) -> Iterator[np.ndarray]:
  """Writes conversations; what is said of each in the table of the shard."""
  render = dialogues.Renderer(text)
  for place, item in found:
    messages = json.loads(item)
    talk = render(messages)
    record, rows = records.encode_talk(place, talk.ids, talk.turns)
    writer.write(record)
    said = corpus.said(messages)
    sizes = {"documents": 1, "records": 1, "replies": len(rows), "bytes": len(said.encode()), "tokens": len(talk.ids)}
    for name, size in sizes.items():
      count[name] += size
    yield rows


def _write_windows(writer: Any, found: list[Item], L: int, text: Tokenizer, count: dict[str, Any]) -> None:
  """Writes documents, each once, end to end."""
  unique = [item for i, item in enumerate(found) if not i or item != found[i - 1]]
  count |= {"documents": len(unique), "duplicates": len(found) - len(unique)}
  for tokens_L, segment_L in _cut(_encoded(unique, text, count), L, text.eos_id):
    writer.write(records.encode(tokens_L, segment_L))
    count["records"] += 1
    count["padding"] += int((segment_L == 0).sum())


def _encoded(documents: list[Item], text: Tokenizer, count: dict[str, int]) -> Iterator[np.ndarray]:
  for _, document in documents:
    ids = np.array([*text.encode(document), text.eos_id], np.int32)
    count["tokens"] += len(ids)
    count["bytes"] += len(document.encode())
    yield ids


def _cut(documents: Iterable[np.ndarray], L: int, eos_id: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Documents end to end, in windows: (tokens, segment) [L]; the last one is padded."""
  tokens_L, segment_L, at, number = np.full(L, eos_id, np.int32), np.zeros(L, np.int32), 0, 0
  for ids in documents:
    number += 1
    while len(ids):
      taken = ids[: L - at]
      tokens_L[at : at + len(taken)], segment_L[at : at + len(taken)] = taken, number
      ids, at = ids[len(taken) :], at + len(taken)
      if at == L:
        yield tokens_L, segment_L
        tokens_L, segment_L, at, number = np.full(L, eos_id, np.int32), np.zeros(L, np.int32), 0, int(len(ids) > 0)
  if at:
    yield tokens_L, segment_L


def _write_tally(tallies: list[reading.Tally], folder: _Folder) -> None:
  names = {"items": "documents", "empty": "empty", "bad": "bad_lines"}
  content: dict[str, Any] = {told: sum(getattr(x, name) for x in tallies) for name, told in names.items()}
  for name in ("excluded", "files"):  # {file of a test: documents}, {kind: files}
    content[name] = dict(sorted(sum((getattr(x, name) for x in tallies), collections.Counter()).items()))
  if exclude := next((x.exclude for x in tallies), ""):
    content["looked_for"] = contamination.excluded(exclude).about
  named = sorted(message for x in tallies for message in x.named)[: reading.NAMED]
  content |= {"parts": len(tallies), "first_bad_lines": named}
  folder.write("read.json", json.dumps(content).encode())


def _finish(folder: _Folder, recipe: Recipe, text: Tokenizer) -> dict[str, Any]:
  """The manifest, from the counts of the shards, and what TFDS wants to know."""
  shards = {split: [folder.counts((split, i)) or {} for i in range(recipe.shards)] for split in records.SPLITS}
  names = _COUNTS[recipe.holds]
  splits = {split: {name: sum(x[name] for x in counts) for name in names} for split, counts in shards.items()}
  read = folder.json("read.json") or {}
  documents = sum(x["documents"] + x.get("duplicates", 0) for x in splits.values())
  if documents != read["documents"]:
    raise Mistake(
      f"--target={folder.target}: {read['documents']} documents were read, and {documents} are in its shards: the"
      " corpus has changed since it was begun; delete it, and prepare it again"
    )
  if not documents:
    nothing = "text: every document" if recipe.holds == "text" else "conversation with a reply: every record"
    raise Mistake(f"data.corpus={recipe.corpus!r} holds no {nothing} is empty")
  about = {"vocab_size": text.vocab_size, "eos_id": text.eos_id, "read": read, "splits": splits}
  if recipe.holds == "chat":
    about["turns"] = {split: [x["turns"] for x in counts] for split, counts in shards.items()}
  manifest = {"format": 1} | recipe.stated | about
  _describe_to_tfds(folder, recipe, {split: [x["records"] for x in counts] for split, counts in shards.items()})
  folder.write(records.MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())
  return manifest


def _describe_to_tfds(folder: _Folder, recipe: Recipe, lengths: dict[str, list[int]]) -> None:
  import tensorflow_datasets as tfds
  from etils import epath

  kept = ("dataset_info.json", "features.json")
  shapes: dict[str, tuple[int | None, ...]] = {"tokens": (recipe.length,), "segment": (recipe.length,)}
  about = f"records of {recipe.length} token ids"
  if recipe.holds == "chat":
    shapes, about = {"tokens": (None,), "turns": (None, 4)}, "token ids of conversations"
  features = {name: tfds.features.Tensor(shape=x, dtype=np.int32, encoding="bytes") for name, x in shapes.items()}
  with tempfile.TemporaryDirectory() as here:
    template = tfds.core.ShardedFileTemplate(
      data_dir=epath.Path(here), dataset_name=records.NAME, filetype_suffix="array_record",
      template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
    )  # fmt: skip
    splits = [
      tfds.core.SplitInfo(name=split, shard_lengths=counts, num_bytes=0, filename_template=template)
      for split, counts in lengths.items()
    ]
    for split, counts in lengths.items():
      for shard in range(len(counts)):
        Path(here, records.file_name(split, shard, len(counts))).touch()  # their names are looked for
    tfds.folder_dataset.write_metadata(
      data_dir=here, features=features, split_infos=splits, filename_template=template, check_data=False,
      description=f"{recipe.corpus} as {about}, by lladax",
    )  # fmt: skip
    for name in kept:
      folder.write(name, Path(here, name).read_bytes())


@contextlib.contextmanager
def _stderr_aside() -> Iterator[TextIO]:
  """Standard error for us alone: what Beam's worker processes print of their own is dropped meanwhile."""
  sys.stderr.flush()
  with os.fdopen(os.dup(2), "w") as terminal, open(os.devnull, "w") as nowhere:
    os.dup2(nowhere.fileno(), 2)
    try:
      yield terminal
    finally:
      sys.stderr.flush()
      os.dup2(terminal.fileno(), 2)


@contextlib.contextmanager
def _progress(folder: _Folder, total: int, terminal: TextIO) -> Iterator[None]:
  """Says on the terminal how many shards are whole."""
  ended, status = threading.Event(), Console(file=terminal).status("reading")

  def watch():
    with status:
      while not ended.wait(1.0):
        done = folder.done()
        status.update(f"{done} of {total} shards are whole" if done else "reading and sorting")

  thread = threading.Thread(target=watch, daemon=True)
  thread.start()
  try:
    yield
  finally:
    ended.set()
    thread.join()


def _own_error(error: Exception) -> str:
  """The line that lladax raised on a worker, out of what Beam made of it."""
  told = f"Mistake: {error}" if isinstance(error, Mistake) else str(error)
  found = re.findall(r"(?:Mistake|Missing): ([^\n]*?)(?: \[while running|\\n|\n|$)", told)
  return found[-1] if found else ""


def _report(manifest: dict[str, Any], seconds: float, target: str, console: Console) -> None:
  splits, read = manifest["splits"], manifest["read"]
  table = Table("", *splits, title=target, title_justify="left")
  for name in next(iter(splits.values())):
    table.add_row(name, *(f"{splits[split][name]:,}" for split in splits))
  console.print(table)
  line = f"read {read['documents']:,} documents in {read['parts']:,} parts; left out {read['empty']:,} empty ones"
  line += f" and {read['bad_lines']:,} bad lines"
  line += "".join(f", and {n:,} that hold a text of {test}" for test, n in read["excluded"].items())
  if seconds:
    size, tokens = (sum(x[name] for x in splits.values()) for name in ("bytes", "tokens"))
    line += f"; {seconds:.0f} s, {size / seconds / 1e6:.2f} MB/s, {tokens / seconds:,.0f} tokens/s"
  console.print(line)
  if looked_for := read.get("looked_for"):
    console.print(f"looked for: {looked_for}")
  for message in read["first_bad_lines"]:
    console.print(f"left out: {message}")
