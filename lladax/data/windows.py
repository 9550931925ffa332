"""Rows: their shape (`DataConfig`), what a source of them is (`Source`), and windows of a stream of documents as rows.

The life of a token, in pre-training: a document is tokenised and ends with EOS; all documents are laid end to end in
one circular stream of ids; the stream is cut into windows of `length` tokens, at another offset in every epoch. With
prepared records (`records.Records`) that has been done before, once, and a window is read from disk.
"""

import array
import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from lladax.data.tokenizer import Tokenizer
from lladax.mistake import Mistake

# tokens [L], segment [L], weight [L]: 1 / its length in a response; where all replies are learnt, also clean [L].
Row = tuple[np.ndarray, ...]


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where text comes from, and the shape of a batch."""

  # "unicode" | "stdlib" | "facts" | "files:GLOB_OR_FOLDER[,...]" (text, JSON, Parquet) | "tfds:NAME[:SPLIT]" |
  # "records:FOLDER"
  corpus: str = "unicode"
  mixture: tuple[tuple[str, float], ...] = ()  # ((corpus, weight), ...): several, in place of `corpus`
  # ((length, (weight, ...)), ...): other weights in each stage; lengths as in optimizer.schedule; (): the mixture's.
  stages: tuple[tuple[float, tuple[float, ...]], ...] = ()
  format: str = "text"  # "text": every token is learnt | "chat": the replies of conversations are (fine-tuning)
  text_field: str = "text"  # of records, in text
  prompt_field: str = ""  # of records, in chat, together with response_field; "": known names
  response_field: str = ""  # of records, in chat, together with prompt_field
  bad_lines: str = "stop"  # "stop" at the first line that cannot be used | "skip", and count them
  longest_line: int = 2**26  # bytes; a longer one is a bad line. A file that is read whole may have 16 times as many
  # FILE of a test: documents that share 13 words (50 characters, where no spaces part them) with a text in it, or hold
  # a whole one of 8 (31), are left out. FILE:FIELD,...: the texts of these fields alone, and the shorter ones, too.
  exclude: str = ""
  held_out: float = 0.05  # fraction of the documents kept for evaluation; of records: as they were prepared
  length: int = 64  # tokens of a row
  batch_size: int = 64  # rows of an update, over all devices and micro-batches
  segments: bool = False  # True: documents of a row do not see each other; False: concatenated, as published
  random_lengths: float = 0.0  # fraction of rows cut to a random length; LLaDA: 0.01
  # Of a dialogue "one" reply is learnt in a row, as published | "all" are, each given the dialogue before it: for
  # models of blocks and causal ones, which do not see what follows; with eos_padding="block".
  replies: str = "one"
  # In chat a reply is filled up with EOS, which count: to the batch's longest row, as published ("batch"), to the row's
  # end ("row"), to the end of its block of noise.block ("block"); or it ends with one EOS ("none", as iLLaDA).
  eos_padding: str = "batch"
  packing: bool = False  # several conversations in a row, which do not see each other; with eos_padding none or block
  align: int = 1  # documents that do not see each other begin at multiples of so many tokens: the objective's blocks

  def __post_init__(self):
    for name in ("length", "batch_size", "longest_line"):
      if getattr(self, name) < 1:
        raise Mistake(f"data.{name}={getattr(self, name)}: must be at least 1")
    for name, known in (("format", ("text", "chat")), ("bad_lines", ("stop", "skip")),
                        ("replies", ("one", "all")), ("eos_padding", ("batch", "row", "block", "none"))):  # fmt: skip
      if getattr(self, name) not in known:
        raise Mistake(f"data.{name}={getattr(self, name)!r}: use {', '.join(known)}")
    if not 0.0 <= self.random_lengths <= 1.0:
      raise Mistake(f"data.random_lengths={self.random_lengths}: must lie in [0, 1]")
    if self.exclude and any(map(is_records, self.corpora)):
      raise Mistake(f"data.exclude={self.exclude!r}: records hold what was prepared: give it to --mode=prepare")
    if bool(self.prompt_field) != bool(self.response_field):
      raise Mistake(f"data.prompt_field={self.prompt_field!r}, response_field={self.response_field!r}: name both")
    if self.format == "chat":
      for name in ("segments", "random_lengths"):
        if getattr(self, name):
          raise Mistake(f"data.{name}={getattr(self, name)} is for data.format=text")
      if self.packing and self.eos_padding not in ("none", "block"):
        raise Mistake(
          f"data.packing=True leaves no room for EOS: data.eos_padding={self.eos_padding!r} must be none, or block"
        )
      if self.replies == "all" and self.eos_padding != "block":
        raise Mistake(
          f"data.replies='all': behind a reply its dialogue goes on: data.eos_padding={self.eos_padding!r} must be"
          " block"
        )
    elif self.align > 1 and self.segments and any(map(is_records, self.corpora)):
      raise Mistake(
        "data.segments=True: documents must begin with a block of noise.block, and those of records follow each other:"
        " read files, or set data.segments=False"
      )
    elif self.packing:
      raise Mistake("data.packing=True is for data.format=chat: text fills its rows")
    elif self.replies == "all":
      raise Mistake("data.replies='all' is for data.format=chat: of text every token is learnt")
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
    return self.random_lengths > 0 or self.format == "chat" or any(map(is_records, self.corpora))


def is_records(name: str) -> bool:
  """Whether a corpus is a folder of prepared records."""
  return name.startswith("records:")


class Source(Protocol):
  """Rows, numbered; what a row holds may differ from epoch to epoch."""

  about: str  # one line for the console

  @property
  def digest(self) -> str:
    """Of the tokens."""
    ...

  def __len__(self) -> int: ...

  def shape(self, row: int, epoch: int) -> tuple[float, int]:
    """(responses, tokens) of a row, without reading it; one of a dialogue's replies, all learnt, is a part."""
    ...

  def row(self, row: int, epoch: int, end: int) -> Row:
    """The row; `end`: where the batch's longest row ends."""
    ...


class Windows:
  """Windows of a circular stream of documents, cut at another offset in every epoch."""

  def __init__(self, stream_T: np.ndarray, c: DataConfig, *, eos_id: int, seed: int, about: str = ""):
    self.stream_T, self.about = aligned(stream_T, c, eos_id), about
    self._c, self._eos_id, self._seed = c, eos_id, seed
    if len(stream_T) < c.length:
      raise Mistake(
        f"data.length={c.length} is longer than the corpus: data.corpus={c.corpus!r} has {len(stream_T)} tokens;"
        " use a smaller length"
      )

  @property
  def digest(self) -> str:
    """Of the ids."""
    return hashlib.blake2b(self.stream_T[self.stream_T >= 0].tobytes()).hexdigest()

  def __len__(self) -> int:
    return -(-len(self.stream_T) // self._c.length)

  def shape(self, row: int, epoch: int) -> tuple[int, int]:
    """As `Source.shape`."""
    return 1, self._c.length

  def row(self, row: int, epoch: int, end: int) -> Row:
    """As `Source.row`."""
    L = self._c.length
    start = row * L + stable_hash(self._seed, epoch) % L // self._c.align * self._c.align
    tokens_RL, segment_RL = at(np.array([start]), self.stream_T, self._c, self._eos_id)
    kept_L = segment_RL[0] > 0
    return tokens_RL[0], segment_RL[0], kept_L / kept_L.sum()


def stream(documents: Sequence[str], tokenizer: Tokenizer) -> np.ndarray:
  """All documents as one array of ids, each followed by EOS."""
  ids = array.array("i")  # a list would take nine times the memory
  for text in documents:
    ids.extend(tokenizer.encode(text))
    ids.append(tokenizer.eos_id)
  return np.asarray(ids, np.int32)


def aligned(stream_T: np.ndarray, c: DataConfig, eos_id: int) -> np.ndarray:
  """The stream with -1 behind each document that does not fill its last block, if documents are apart."""
  if c.align == 1 or not c.segments:
    return stream_T
  length_D = np.diff(np.flatnonzero(stream_T == eos_id), prepend=-1)
  room_D = -(-length_D // c.align) * c.align
  behind_D = np.cumsum(room_D - length_D) - (room_D - length_D)  # that stand before a document
  out_T = np.full(room_D.sum(), -1, np.int32)
  out_T[np.arange(len(stream_T)) + np.repeat(behind_D, length_D)] = stream_T
  return out_T


def at(starts: np.ndarray, stream_T: np.ndarray, c: DataConfig, eos_id: int) -> tuple[np.ndarray, np.ndarray]:
  """Windows of a circular stream: tokens and segment [len(starts), L]; -1 is padding."""
  place_RL = starts[:, None] + np.arange(c.length)[None, :]
  tokens = stream_T[place_RL % len(stream_T)]
  segment = np.ones_like(tokens)
  if c.segments:
    segment[:, 1:] += np.cumsum(tokens[:, :-1] == eos_id, axis=1, dtype=np.int32)
  return np.where(tokens < 0, eos_id, tokens), np.where(tokens < 0, 0, segment)


def in_order(stream_T: np.ndarray, c: DataConfig, eos_id: int) -> tuple[np.ndarray, np.ndarray]:
  """A stream as rows, each token once: (tokens, segment) [rows, L]; segment 0 = padding."""
  stream_T = aligned(stream_T, c, eos_id)
  starts = np.arange(0, len(stream_T), c.length)
  tokens_RL, segment_RL = at(starts, stream_T, c, eos_id)
  kept = starts[:, None] + np.arange(c.length)[None, :] < len(stream_T)
  return np.where(kept, tokens_RL, eos_id), np.where(kept, segment_RL, 0)


def stable_hash(*numbers: int) -> int:
  """The same number on every machine and in every process."""
  numbers = tuple(map(int, numbers))  # NumPy's are spelled otherwise
  return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=6).digest(), "little")
