"""Records to batches.

The life of a token:

  a document is tokenised and ends with EOS; all documents are laid end to end in one circular stream of ids;
  the stream is cut into windows of `length` tokens, at another offset in every epoch;
  Grain's index permutation says which window is example number `index` (another order in every epoch);
  examples step * B .. step * B + B - 1 are the batch of a step, so the position in the data is the step alone.

Every batch has the same columns, whatever the objective:
  tokens  int32   [B, L]  x_0
  weight  float32 [B, L]  loss weight, 0 = given or padding; already divided by B and by the row's own length
  segment int32   [B, L]  document within the row, 0 = padding; 1 everywhere if documents may see each other
  index   int32   [B]     global example index, from which the noise is drawn
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from lladax import corpus
from lladax.tokenizer import Tokenizer

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where text comes from, and the shape of a batch."""

  corpus: str = "unicode"  # "unicode", "stdlib" or "files:GLOB[,GLOB]": see corpus.py
  text_field: str = "text"  # of JSON lines
  held_out: float = 0.05  # fraction of the documents kept for evaluation
  length: int = 64  # tokens of a row
  batch_size: int = 64  # rows of an update, over all devices and micro-batches
  segments: bool = False  # True: documents of a row do not see each other; False: concatenated, as published
  random_lengths: float = 0.0  # fraction of rows cut to a random length; LLaDA: 0.01

  def __post_init__(self):
    for name in ("length", "batch_size"):
      if getattr(self, name) < 1:
        raise ValueError(f"data.{name}={getattr(self, name)}: must be at least 1")
    if not 0.0 <= self.random_lengths <= 1.0:
      raise ValueError(f"data.random_lengths={self.random_lengths}: must lie in [0, 1]")


@functools.lru_cache(maxsize=2)
def texts(c: DataConfig) -> tuple[list[str], list[str]]:
  """(training, held-out) documents of the corpus."""
  return corpus.split(corpus.documents(c.corpus, c.text_field), c.held_out)


def stream(documents: Sequence[str], tokenizer: Tokenizer) -> np.ndarray:
  """All documents as one array of ids, each followed by EOS."""
  ids: list[int] = []
  for text in documents:
    ids += tokenizer.encode(text)
    ids.append(tokenizer.eos_id)
  return np.asarray(ids, np.int32)


def rows(stream_T: np.ndarray, starts: np.ndarray, length: int, eos_id: int, segments: bool) -> Batch:
  """Windows of a circular stream: tokens and segment [len(starts), length]."""
  at = starts[:, None] + np.arange(length)[None, :]
  tokens = stream_T[at % len(stream_T)]
  segment = np.ones_like(tokens)
  if segments:
    segment[:, 1:] += np.cumsum(tokens[:, :-1] == eos_id, axis=1, dtype=np.int32)
  return {"tokens": tokens, "segment": segment}


def batches(
  stream_T: np.ndarray,
  c: DataConfig,
  *,
  eos_id: int,
  seed: int,
  start: int,
  stop: int,
  rows_R: np.ndarray | None = None,
) -> Iterator[Batch]:
  """Batches of the steps start .. stop - 1, read ahead on a thread.

  Args:
    stream_T: ids of the corpus.
    c: shape of the batch.
    eos_id: ends a document in the stream.
    seed: of the order; the same seed gives the same batch at the same step, always.
    start: first step.
    stop: one past the last step.
    rows_R: which rows of each batch are read, those of this process; None: all.
  """
  B, L, total = c.batch_size, c.length, len(stream_T)
  if total < L:
    raise ValueError(
      f"data.length={L} is longer than the corpus: data.corpus={c.corpus!r} has {total} tokens; use a smaller length"
    )
  count = -(-total // L)
  order = grain.MapDataset.range(count).seed(seed).shuffle().repeat()
  local_R = np.arange(B) if rows_R is None else rows_R
  local = len(local_R)

  def batch(step: int) -> Batch:
    index = step * B + local_R
    offset = np.array([_hash(seed, int(epoch)) % L for epoch in index // count])
    window = np.array([order[int(i)] for i in index])
    columns = rows(stream_T, window * L + offset, L, eos_id, c.segments)
    length = np.full(local, L)
    if c.random_lengths:
      cut = [np.random.default_rng((seed, 1, int(i))) for i in index]
      length = np.array([g.integers(1, L + 1) if g.random() < c.random_lengths else L for g in cut])
    kept = np.arange(L)[None, :] < length[:, None]
    return {
      "tokens": np.where(kept, columns["tokens"], eos_id).astype(np.int32),
      "weight": (kept / (B * length[:, None])).astype(np.float32),
      "segment": np.where(kept, columns["segment"], 0).astype(np.int32),
      "index": index.astype(np.int32),
    }

  steps = grain.MapDataset.range(start, stop).map(batch)
  return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))


def held_out_rows(stream_T: np.ndarray, c: DataConfig, eos_id: int) -> tuple[np.ndarray, np.ndarray]:
  """The held-out stream as rows in order, each token once: (tokens, segment) [rows, L]; segment 0 = padding."""
  starts = np.arange(0, len(stream_T), c.length)
  columns = rows(stream_T, starts, c.length, eos_id, c.segments)
  kept = starts[:, None] + np.arange(c.length)[None, :] < len(stream_T)
  return np.where(kept, columns["tokens"], eos_id), np.where(kept, columns["segment"], 0)


def _hash(*numbers: int) -> int:
  """The same number on every machine and in every process."""
  return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=6).digest(), "little")
