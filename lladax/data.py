"""Rows to batches.

The life of a token, in pre-training (`Windows`):

  a document is tokenised and ends with EOS; all documents are laid end to end in one circular stream of ids;
  the stream is cut into windows of `length` tokens, at another offset in every epoch.

With prepared records (`Records`) that has been done before, once, and a window is read from disk.

The life of a conversation, in fine-tuning (`Dialogues`):

  a conversation is rendered in the chat template; one of its replies is drawn (another in every epoch), and what
  precedes it is its prompt, cut at the left where the row is too short for both;
  the prompt is given; the reply, its EoT and EOS are what the loss sees.

From there on all are rows of a source, numbered 0 .. len - 1. The mixture says which source example number `index` is
taken from, and how many were taken before; Grain's index permutation says which row that is (another order in every
epoch). Examples step * B .. step * B + B - 1 are the batch of a step, so the position in the data is the step alone.

Every batch has the same columns, whatever the objective:
  tokens  int32   [B, L]  x_0
  weight  float32 [B, L]  loss weight, 0 = given or padding; every response sums to the same, and all to 1
  segment int32   [B, L]  document within the row, 0 = padding; 1 everywhere if documents may see each other
  index   int32   [B]     global example index, from which the noise is drawn
"""

import array
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import grain
import numpy as np

from lladax import corpus, optimizer, reading, records
from lladax.mistake import Mistake
from lladax.tokenizer import Tokenizer

Batch = dict[str, np.ndarray]
Row = tuple[np.ndarray, np.ndarray, np.ndarray]  # tokens [L], segment [L], weight [L]: 1 / its length in a response
_MIX = 1000  # a mixture is exact over so many rows


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where text comes from, and the shape of a batch."""

  corpus: str = "unicode"  # or "stdlib", "facts", "files:GLOB_OR_FOLDER[,...]", "tfds:NAME[:SPLIT]", "records:FOLDER"
  mixture: tuple[tuple[str, float], ...] = ()  # (corpus, weight), ...: several, in place of `corpus`
  # (length, weights), ...: other weights in each stage; lengths as in optimizer.schedule; (): those of the mixture
  stages: tuple[tuple[float, tuple[float, ...]], ...] = ()
  format: str = "text"  # "text": every token is learnt | "chat": replies to prompts, fine-tuning
  text_field: str = "text"  # of records, in text
  prompt_field: str = ""  # of records, in chat, with response_field; "": known names
  response_field: str = ""
  bad_lines: str = "stop"  # "stop" at a line that cannot be used | "skip" and count it
  exclude: str = ""  # FILE or FILE:FIELD,... of a test; a document that holds one of its texts is left out
  held_out: float = 0.05  # fraction of the documents kept for evaluation; of records: as prepared
  length: int = 64  # tokens of a row
  batch_size: int = 64  # rows of an update, over all devices and micro-batches
  segments: bool = False  # True: documents of a row do not see each other; False: concatenated, as published
  random_lengths: float = 0.0  # fraction of rows cut to a random length; LLaDA: 0.01
  # A reply is filled up with EOS, which count: to the batch's longest row, as published ("batch"), to the row's end
  # ("row"); or it ends with one EOS ("none", as iLLaDA).
  eos_padding: str = "batch"
  packing: bool = False  # several conversations in a row, which do not see each other

  def __post_init__(self):
    for name in ("length", "batch_size"):
      if getattr(self, name) < 1:
        raise Mistake(f"data.{name}={getattr(self, name)}: must be at least 1")
    for name, known in (("format", ("text", "chat")), ("bad_lines", ("stop", "skip")),
                        ("eos_padding", ("batch", "row", "none"))):  # fmt: skip
      if getattr(self, name) not in known:
        raise Mistake(f"data.{name}={getattr(self, name)!r}: use {', '.join(known)}")
    if not 0.0 <= self.random_lengths <= 1.0:
      raise Mistake(f"data.random_lengths={self.random_lengths}: must lie in [0, 1]")
    if self.exclude and any(map(_is_records, self.corpora)):
      raise Mistake(f"data.exclude={self.exclude!r}: records hold what was prepared: give it to --mode=prepare")
    if bool(self.prompt_field) != bool(self.response_field):
      raise Mistake(f"data.prompt_field={self.prompt_field!r}, response_field={self.response_field!r}: name both")
    if self.format == "chat":
      for name in ("segments", "random_lengths"):
        if getattr(self, name):
          raise Mistake(f"data.{name}={getattr(self, name)} is for data.format=text")
      if self.packing and self.eos_padding != "none":
        raise Mistake(f"data.packing=True leaves no room for EOS: data.eos_padding={self.eos_padding!r} must be none")
      for name in self.corpora:
        if name.startswith("records:"):
          raise Mistake(f"data.corpus={name!r} holds text: data.format=chat reads conversations from files")
    elif self.packing:
      raise Mistake("data.packing=True is for data.format=chat: text fills its rows")
    self._check_weights()

  def _check_weights(self):
    if not all(self.corpora):
      raise Mistake(f"data.mixture={self.mixture}: a corpus has no name" if self.mixture else "data.corpus is empty")
    weights = [("mixture", tuple(weight for _, weight in self.mixture))] if self.mixture else []
    weights += [("stages", stage) for _, stage in self.stages]
    if self.stages and not self.mixture:
      raise Mistake("data.stages is for a mixture: give data.mixture=((corpus, weight), ...)")
    for name, values in weights:
      if len(values) != len(self.mixture) or min(values) < 0 or not sum(values) > 0:
        raise Mistake(f"data.{name}: the weights {values} must be {len(self.mixture)}, none negative, not all 0")

  @property
  def corpora(self) -> list[str]:
    """The corpora of the mixture, or the only one."""
    return [name for name, _ in self.mixture] or [self.corpus]

  @property
  def separates(self) -> bool:
    """Whether a row holds several segments, and not one and padding to its right."""
    return self.segments or self.packing

  @property
  def pads(self) -> bool:
    """Whether rows may end in padding."""
    return self.random_lengths > 0 or self.format == "chat" or any(map(_is_records, self.corpora))


class Source(Protocol):
  """Rows, numbered; what a row holds may differ from epoch to epoch."""

  about: str  # one line for the console

  @property
  def digest(self) -> str:
    """Of the tokens."""
    ...

  def __len__(self) -> int: ...

  def shape(self, row: int, epoch: int) -> tuple[int, int]:
    """(responses, tokens) of a row, without reading it."""
    ...

  def row(self, row: int, epoch: int, end: int) -> Row:
    """The row; `end`: where the batch's longest row ends."""
    ...


class Windows:
  """Windows of a circular stream of documents, cut at another offset in every epoch."""

  def __init__(self, stream_T: np.ndarray, c: DataConfig, *, eos_id: int, seed: int, about: str = ""):
    self.stream_T, self.about = stream_T, about
    self._c, self._eos_id, self._seed = c, eos_id, seed
    if len(stream_T) < c.length:
      raise Mistake(
        f"data.length={c.length} is longer than the corpus: data.corpus={c.corpus!r} has {len(stream_T)} tokens;"
        " use a smaller length"
      )

  @property
  def digest(self) -> str:
    """Of the ids."""
    return hashlib.blake2b(self.stream_T.tobytes()).hexdigest()

  def __len__(self) -> int:
    return -(-len(self.stream_T) // self._c.length)

  def shape(self, row: int, epoch: int) -> tuple[int, int]:
    """As `Source.shape`."""
    return 1, self._c.length

  def row(self, row: int, epoch: int, end: int) -> Row:
    """As `Source.row`."""
    L = self._c.length
    start = row * L + _hash(self._seed, epoch) % L
    tokens_RL, segment_RL = windows(self.stream_T, np.array([start]), self._c, self._eos_id)
    return tokens_RL[0], segment_RL[0], np.full(L, 1.0 / L)


class Records:
  """Prepared records; the number of tokens of a shard's last one may be less than `length`."""

  def __init__(self, name: str, c: DataConfig, split: str = "train"):
    self._folder, self._c = records.open_folder(name.removeprefix("records:")), c
    manifest = self._folder.manifest
    if manifest["length"] != c.length:
      raise Mistake(f"data.length={c.length}: data.corpus={name!r} was prepared with data.length={manifest['length']}")
    counts = manifest["splits"][split]
    if not counts["records"]:
      raise Mistake(f"data.corpus={name!r} holds no {split} records: prepare it with another data.held_out")
    self._source = self._folder.source(split)
    self.tokenizer = self._folder.tokenizer
    self.num_bytes = counts["bytes"] + counts["documents"]  # a separator each, as in the held-out text of files
    self.num_tokens = counts["tokens"]
    self.about = "{documents:,} documents ({bytes:,} bytes, {tokens:,} tokens) as {records:,} records".format(**counts)

  @property
  def digest(self) -> str:
    """Of the manifest."""
    return self._folder.digest

  def __len__(self) -> int:
    return len(self._source)

  def shape(self, row: int, epoch: int) -> tuple[int, int]:
    """As `Source.shape`."""
    return 1, self._c.length

  def row(self, row: int, epoch: int, end: int) -> Row:
    """As `Source.row`."""
    tokens_L, segment_L = records.decode(self._source[row])
    kept_L = segment_L > 0
    return tokens_L, segment_L if self._c.segments else kept_L.astype(np.int32), kept_L / kept_L.sum()


class Turn(NamedTuple):
  """A reply and its prompt: places in `Dialogues.ids_T`. The prompt ends where the header of the reply is added."""

  prompt: int
  prompt_end: int
  reply: int
  reply_end: int


class Dialogues:
  """Conversations in the chat template: a row is a reply with its prompt, or several where they are packed."""

  def __init__(
    self,
    conversations: Sequence[corpus.Messages],
    text: Tokenizer,
    c: DataConfig,
    *,
    seed: int,
    every_turn: bool = False,
  ):
    """`every_turn`: each reply is a row, for evaluation; else one of them is drawn."""
    self._c, self._seed, self._eos_id = c, seed, text.eos_id
    opening = [] if text.bos_id is None else [text.bos_id]
    ours = text.template is None  # else each prompt is rendered whole, as the template of others wants it
    self._opening, self._header = (opening, text.chat([])[len(opening) :]) if ours else ([], [])
    L, ids = c.length, array.array("i")
    self._turns: list[list[Turn]] = []
    self.num_bytes = self.num_tokens = cut = too_long = 0  # of the replies
    for messages in conversations:
      turns, prompt = [], len(ids)
      replies = corpus.replies(messages)
      history: list[int] = []
      for i, message in enumerate(messages):
        if i in replies:
          asked, reply = ([], text.reply(message["content"])) if ours else text.turn(messages[: i + 1])
          begin = 0 if ours else len(history)
          history += asked
          reply = reply if reply[-1] == text.eos_id else [*reply, text.eos_id]
          if len(reply) + len(self._header) > L:
            too_long += 1
          else:
            turns.append((begin, len(history), reply))
            cut += len(self._opening) + len(history) - begin + len(self._header) + len(reply) > L
            self.num_bytes += len(message["content"].strip().encode()) + 1
            self.num_tokens += len(reply)
        history += text.message(message) if ours else []
      ids.extend(history)
      made = []
      for begin, end, reply in turns:
        made.append(Turn(prompt + begin, prompt + end, len(ids), len(ids) + len(reply)))
        ids.extend(reply)
      self._turns += [[turn] for turn in made] if every_turn else [made] if made else []
    if not self._turns:
      raise Mistake(f"data.length={L}: no reply of {len(conversations)} conversations fits a row; use a larger length")
    self.ids_T = np.asarray(ids, np.int32)
    longest = [max(map(self._length, turns)) for turns in self._turns]
    self._rows = pack(longest, L) if c.packing else [[i] for i in range(len(longest))]
    turns = sum(map(len, self._turns))
    self.about = f"{len(conversations):,} conversations, {turns:,} replies"
    if c.packing:
      self.about += f", packed into {len(self._rows):,} rows"
    if cut:
      self.about += f"; {cut:,} prompts cut at the left to data.length={L}"
    if too_long:
      self.about += f"; {too_long:,} replies left out: longer than data.length={L}"

  @property
  def digest(self) -> str:
    """Of the ids."""
    return hashlib.blake2b(self.ids_T.tobytes()).hexdigest()

  def __len__(self) -> int:
    return len(self._rows)

  def shape(self, row: int, epoch: int) -> tuple[int, int]:
    """As `Source.shape`."""
    return len(self._rows[row]), sum(self._length(self._draw(i, epoch)) for i in self._rows[row])

  def row(self, row: int, epoch: int, end: int) -> Row:
    """As `Source.row`."""
    c, L = self._c, self._c.length
    end = {"batch": end, "row": L, "none": 0}[c.eos_padding]
    tokens_L, segment_L = np.full(L, self._eos_id, np.int32), np.zeros(L, np.int32)
    weight_L, at = np.zeros(L), 0
    for number, i in enumerate(self._rows[row], start=1):
      prompt, reply = self.ids(self._draw(i, epoch))
      begin, stop = at + len(prompt), max(at + len(prompt) + len(reply), end)
      tokens_L[at:begin], tokens_L[begin : begin + len(reply)] = prompt, reply
      segment_L[at:stop], weight_L[begin:stop] = number, 1.0 / (stop - begin)
      at = stop
    return tokens_L, segment_L, weight_L

  def ids(self, turn: Turn) -> tuple[np.ndarray, np.ndarray]:
    """(prompt, reply up to its EOS) as a row of its own holds them."""
    prompt = np.concatenate([self._opening, self.ids_T[turn.prompt : turn.prompt_end], self._header]).astype(np.int32)
    reply = self.ids_T[turn.reply : turn.reply_end]
    return prompt[max(0, len(prompt) + len(reply) - self._c.length) :], reply

  def _length(self, turn: Turn) -> int:
    prompt = len(self._opening) + turn.prompt_end - turn.prompt + len(self._header)
    return min(prompt + turn.reply_end - turn.reply, self._c.length)

  def _draw(self, i: int, epoch: int) -> Turn:
    """One reply of conversation `i`, uniformly (P section 2.3)."""
    turns = self._turns[i]
    return turns[_hash(self._seed, epoch, i) % len(turns) if len(turns) > 1 else 0]


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
  """Which items share a row: best fit, the longest first. Every length must be at most the capacity."""
  found: list[list[int]] = []
  with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # rows, by the room left
  rooms = 0  # bit n: there is a row with room for exactly n
  for i in np.argsort(-np.asarray(lengths), kind="stable").tolist():
    n = lengths[i]
    if least := (rooms >> n) & -(rooms >> n):
      room = n + least.bit_length() - 1
      row = with_room[room].pop()
      rooms &= ~(0 if with_room[room] else 1 << room)
    else:
      room, row = capacity, len(found)
      found.append([])
    found[row].append(i)
    with_room[room - n].append(row)
    rooms |= 1 << (room - n)
  return found


def stream(documents: Sequence[str], tokenizer: Tokenizer) -> np.ndarray:
  """All documents as one array of ids, each followed by EOS."""
  ids = array.array("i")  # a list would take nine times the memory
  for text in documents:
    ids.extend(tokenizer.encode(text))
    ids.append(tokenizer.eos_id)
  return np.asarray(ids, np.int32)


def windows(stream_T: np.ndarray, starts: np.ndarray, c: DataConfig, eos_id: int) -> tuple[np.ndarray, np.ndarray]:
  """Windows of a circular stream: tokens and segment [len(starts), L]."""
  at = starts[:, None] + np.arange(c.length)[None, :]
  tokens = stream_T[at % len(stream_T)]
  segment = np.ones_like(tokens)
  if c.segments:
    segment[:, 1:] += np.cumsum(tokens[:, :-1] == eos_id, axis=1, dtype=np.int32)
  return tokens, segment


def texts(c: DataConfig) -> tuple[list[str], list[str]]:
  """(training, held-out) documents of the corpora that are no records; of conversations, what is said in them."""
  both: tuple[list[str], list[str]] = ([], [])
  for name in c.corpora:
    if not _is_records(name):
      for found, items in zip(both, _items(name, c)[:2], strict=True):
        found += [x if isinstance(x, str) else corpus.said(x) for x in items]
  return both


def prepared_tokenizer(c: DataConfig) -> Tokenizer | None:
  """The tokenizer of the records among the corpora, which must be one; None without records."""
  found = {x: records.open_folder(x.removeprefix("records:")).tokenizer for x in c.corpora if _is_records(x)}
  for name, text in found.items():
    first, of_first = next(iter(found.items()))
    if text.fingerprint != of_first.fingerprint:
      raise Mistake(
        f"data.mixture: {name} was prepared with another tokenizer than {first}: prepare them with one,"
        " by tokenizer.path"
      )
  return next(iter(found.values()), None)


def sources(c: DataConfig, text: Tokenizer, seed: int) -> list[Source]:
  """The sources of training rows, one for each corpus.

  Raises:
    Mistake, Missing: a corpus is empty, or cannot be read, or was prepared with another tokenizer.
  """
  return [_source(name, c, text, seed) for name in c.corpora]


def _source(name: str, c: DataConfig, text: Tokenizer, seed: int) -> Source:
  if _is_records(name):
    found = Records(name, c)
    if found.tokenizer.fingerprint != text.fingerprint:
      raise Mistake(f"data.corpus={name!r} was prepared with another tokenizer than this run's: prepare it again")
    return found
  items, held_out, tally = _items(name, c)
  if c.format == "chat":
    found = Dialogues(items, text, c, seed=seed)
  else:
    stream_T = _stream(name, 0, c, text)
    size = sum(len(x.encode()) for x in items)
    about = f"{len(items):,} documents ({size:,} bytes, {len(stream_T):,} tokens)"
    alone = dataclasses.replace(c, corpus=name, mixture=(), stages=())
    found = Windows(stream_T, alone, eos_id=text.eos_id, seed=seed, about=about)
  counted = {"held out": len(held_out), "empty": tally.empty, "bad lines left out": tally.bad}
  counted |= {f"left out: they hold a text of {test}": n for test, n in sorted(tally.excluded.items())}
  found.about += "".join(f"; {n:,} {what}" for what, n in counted.items() if n)
  if tally.files.total() > 1:
    found.about += f"; files: {', '.join(f'{n:,} {kind}' for kind, n in sorted(tally.files.items()))}"
  if c.exclude:
    found.about += f"; looked for: {corpus.contaminated(c.exclude).about}"
  return found


def _items(name: str, c: DataConfig) -> tuple[list[Any], list[Any], reading.Tally]:
  """(training, held-out) items of a corpus, and what reading it met."""
  fields = c.format, c.text_field, c.prompt_field, c.response_field, c.bad_lines, c.exclude, c.held_out
  return _read(corpus.stamp(name, c.exclude), name, *fields)


@functools.lru_cache(maxsize=8)
def _read(_, name, format, text_field, prompt_field, response_field, bad_lines, exclude, held_out):
  tally = reading.Tally(bad_lines, exclude)
  if format == "chat":
    items = corpus.conversations(name, prompt_field, response_field, tally)
  else:
    items = corpus.documents(name, text_field, tally)
  return *corpus.split(items, held_out), tally


def _stream(name: str, part: int, c: DataConfig, text: Tokenizer) -> np.ndarray:
  """`stream` of the training (0) or held-out (1) documents of a corpus."""
  return _tokenised(corpus.stamp(name, c.exclude), name, part, c, text)


@functools.lru_cache(maxsize=8)
def _tokenised(_: Any, name: str, part: int, c: DataConfig, text: Tokenizer) -> np.ndarray:
  items: Any = _items(name, c)
  return stream(items[part], text)


def train_stream(c: DataConfig, text: Tokenizer) -> np.ndarray:
  """The training documents of the corpora that are files, tokenised, one corpus after the other."""
  return np.concatenate([_stream(name, 0, c, text) for name in c.corpora])


def _is_records(name: str) -> bool:
  return name.startswith("records:")


class Mixture:
  """index -> (source, rows taken of it before): exact over every 1,000 rows of a stage, in random order."""

  def __init__(self, c: DataConfig, *, seed: int, steps: int):
    stages = c.stages or ((-1, tuple(weight for _, weight in c.mixture) or (1.0,)),)
    lengths = optimizer.lengths([n for n, _ in stages], steps, "data.stages")
    self._stages: list[
      tuple[int, np.ndarray, np.ndarray]
    ] = []  # first index, rows of each source in 1,000, rows before
    begin, before = 0, np.zeros(len(stages[0][1]), int)

    def shuffled(block: int, stage: int) -> tuple[np.ndarray, np.ndarray]:
      """Of a block of 1,000 rows: the source of each, and how many rows of that source precede it."""
      counts = self._stages[stage][1]
      source_P = np.random.default_rng((seed, 2, stage, block)).permutation(np.repeat(np.arange(len(counts)), counts))
      number_P = np.zeros(_MIX, int)
      for source, count in enumerate(counts):
        number_P[source_P == source] = block * count + np.arange(count)
      return source_P, number_P

    self._shuffled = functools.lru_cache(maxsize=16)(shuffled)
    for stage, (n, (_, weights)) in enumerate(zip(lengths, stages, strict=True)):
      share = np.array(weights) * (_MIX / sum(weights))
      counts = np.floor(share).astype(int)
      counts[np.argsort(counts - share, kind="stable")[: _MIX - counts.sum()]] += 1  # the largest remainders
      for name, weight, count in zip(c.corpora, weights, counts, strict=True):
        if weight and not count:
          raise Mistake(f"data.mixture: the weight {weight} of {name!r} is less than 1 in {_MIX} rows: leave it out")
      self._stages.append((begin, counts, before))
      blocks, rest = divmod(n * c.batch_size, _MIX)
      before = before + blocks * counts + np.bincount(shuffled(blocks, stage)[0][:rest], minlength=len(counts))
      begin += n * c.batch_size

  def __getitem__(self, index: int) -> tuple[int, int]:
    stage = max(i for i, (begin, *_) in enumerate(self._stages) if begin <= index)
    begin, counts, before = self._stages[stage]
    if len(counts) == 1:
      return 0, index
    block, at = divmod(index - begin, _MIX)
    source_P, number_P = self._shuffled(block, stage)
    source = int(source_P[at])
    return source, int(before[source] + number_P[at])


def batches(
  sources: Sequence[Source], c: DataConfig, *, eos_id: int, seed: int, steps: int, start: int, stop: int,
  rows_R: np.ndarray | None = None,
) -> Iterator[Batch]:  # fmt: skip
  """Batches of the steps start .. stop - 1, read ahead on a thread.

  Args:
    sources: of rows, in the order of `c.corpora`.
    c: shape of the batch.
    eos_id: fills what random lengths cut off.
    seed: of the order; the same seed gives the same batch at the same step, always.
    steps: of the whole run, for the stages of the mixture.
    start: first step.
    stop: one past the last step.
    rows_R: which rows of each batch are read, those of this process; None: all.
  """
  B, L = c.batch_size, c.length
  mixture = Mixture(c, seed=seed, steps=steps)
  orders = [
    grain.MapDataset.range(len(source)).seed(_hash(seed, 3, s) if s else seed).shuffle().repeat()
    for s, source in enumerate(sources)
  ]
  local_R = np.arange(B) if rows_R is None else rows_R

  def place(index: int) -> tuple[Source, int, int]:
    s, number = mixture[index]
    row: Any = orders[s][number]
    return sources[s], int(row), number // len(sources[s])

  def batch(step: int) -> Batch:
    first, responses, end = step * B, B, L
    if c.format == "chat":  # all processes must know how many responses the batch has, and its longest row
      responses, ends = np.array([x.shape(row, epoch) for x, row, epoch in map(place, range(first, first + B))]).T
      responses, end = int(responses.sum()), int(ends.max())
    picked = [source.row(row, epoch, end) for source, row, epoch in map(place, (first + local_R).tolist())]
    tokens, segment, weight = (np.stack(column) for column in zip(*picked, strict=True))
    index = first + local_R
    if c.random_lengths:
      cut = [np.random.default_rng((seed, 1, int(i))) for i in index]
      length = np.array([g.integers(1, L + 1) if g.random() < c.random_lengths else L for g in cut])
      kept = (np.arange(L)[None, :] < length[:, None]) & (segment > 0)
      tokens, segment = np.where(kept, tokens, eos_id), np.where(kept, segment, 0)
      weight = kept / kept.sum(axis=1, keepdims=True)
    return {
      "tokens": tokens.astype(np.int32),
      "weight": (weight / responses).astype(np.float32),
      "segment": segment.astype(np.int32),
      "index": index.astype(np.int32),
    }

  numbers = grain.MapDataset.range(start, stop).map(batch)
  return iter(numbers.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))


class HeldOut(NamedTuple):
  """Rows to judge a model on; every token once."""

  num_rows: int
  num_tokens: int  # that are scored
  num_bytes: int  # of them as text, with one for each end of a document
  raw: bytes | None  # that text, where it is whole documents and at hand
  take: Callable[[np.ndarray], list[np.ndarray]]  # of row numbers: tokens [R, L], segment [R, L], scored bool [R, L]


def held_out(c: DataConfig, text: Tokenizer) -> HeldOut | None:
  """The held-out parts of all corpora, in order; None where data.held_out is 0."""
  if not c.held_out:
    return None
  found = [_held_out(name, c, text) for name in c.corpora]
  rows, tokens, sizes, raws, takes = zip(*found, strict=True)
  ends = np.cumsum(rows)

  def take(keep: np.ndarray) -> list[np.ndarray]:
    corpus_R = np.searchsorted(ends, keep, side="right")
    parts = [takes[i](keep[corpus_R == i] - int(ends[i]) + rows[i]) for i in np.unique(corpus_R)]
    return [np.concatenate(column) for column in zip(*parts, strict=True)]

  raw = None if None in raws else b"".join(raws)
  return HeldOut(sum(rows), sum(tokens), sum(sizes), raw, take)


def _held_out(name: str, c: DataConfig, text: Tokenizer) -> HeldOut:
  if _is_records(name):
    source = Records(name, c, "validation")
    tokens = source.num_tokens
  elif c.format == "text":
    items = _items(name, c)[1]
    raw = "".join(x + "\n" for x in items).encode()
    tokens_RL, segment_RL = held_out_rows(stream_T := _stream(name, 1, c, text), c, text.eos_id)
    columns = [tokens_RL, segment_RL, segment_RL > 0]
    return HeldOut(len(tokens_RL), len(stream_T), len(raw), raw, lambda keep: [x[keep] for x in columns])
  else:
    alone = dataclasses.replace(c, packing=False, eos_padding="none")
    source = Dialogues(_items(name, c)[1], text, alone, seed=0, every_turn=True)
    tokens = source.num_tokens

  def take(keep: np.ndarray) -> list[np.ndarray]:
    columns = zip(*(source.row(int(row), 0, 0) for row in keep), strict=True)
    tokens_RL, segment_RL, weight_RL = map(np.stack, columns)
    return [tokens_RL, segment_RL, weight_RL > 0]

  return HeldOut(len(source), tokens, source.num_bytes, None, take)


def held_out_rows(stream_T: np.ndarray, c: DataConfig, eos_id: int) -> tuple[np.ndarray, np.ndarray]:
  """The held-out stream as rows in order, each token once: (tokens, segment) [rows, L]; segment 0 = padding."""
  starts = np.arange(0, len(stream_T), c.length)
  tokens_RL, segment_RL = windows(stream_T, starts, c, eos_id)
  kept = starts[:, None] + np.arange(c.length)[None, :] < len(stream_T)
  return np.where(kept, tokens_RL, eos_id), np.where(kept, segment_RL, 0)


def _hash(*numbers: int) -> int:
  """The same number on every machine and in every process."""
  numbers = tuple(map(int, numbers))  # NumPy's are spelled otherwise
  return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=6).digest(), "little")
