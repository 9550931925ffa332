"""The held-out parts of the corpora as rows to judge a model on."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from lladax.data import windows
from lladax.data.batches import corpus_items, token_stream
from lladax.data.dialogues import Dialogues
from lladax.data.records import Records
from lladax.data.tokenizer import Tokenizer
from lladax.data.windows import DataConfig, is_records


class HeldOut(NamedTuple):
  """Rows to judge a model on; every token once."""

  num_rows: int
  num_tokens: int  # that are scored
  num_bytes: int  # of them as text, with one for each end of a document
  raw: bytes | None  # that text, where it is whole documents and at hand
  take: Callable[[np.ndarray], list[np.ndarray]]  # of row numbers: tokens [R, L], segment [R, L], scored bool [R, L]


def rows(c: DataConfig, text: Tokenizer) -> HeldOut | None:
  """The held-out parts of all corpora, in order; None where data.held_out is 0."""
  if not c.held_out:
    return None
  found = [_held_out(name, c, text) for name in c.corpora]
  counts, tokens, sizes, raws, takes = zip(*found, strict=True)
  ends = np.cumsum(counts)

  def take(keep: np.ndarray) -> list[np.ndarray]:
    corpus_R = np.searchsorted(ends, keep, side="right")
    parts = [takes[i](keep[corpus_R == i] - int(ends[i]) + counts[i]) for i in np.unique(corpus_R)]
    return [np.concatenate(column) for column in zip(*parts, strict=True)]

  raw = None if None in raws else b"".join(raws)
  return HeldOut(sum(counts), sum(tokens), sum(sizes), raw, take)


def _held_out(name: str, c: DataConfig, text: Tokenizer) -> HeldOut:
  if is_records(name):
    source = Records(name, c, "validation")
    tokens = source.num_tokens
  elif c.format == "text":
    items = corpus_items(name, c)[1]
    raw = "".join(x + "\n" for x in items).encode()
    tokens_RL, segment_RL = held_out_rows(stream_T := token_stream(name, 1, c, text), c, text.eos_id)
    columns = [tokens_RL, segment_RL, segment_RL > 0]
    return HeldOut(len(tokens_RL), len(stream_T), len(raw), raw, lambda keep: [x[keep] for x in columns])
  else:
    alone = dataclasses.replace(c, packing=False, eos_padding="none")
    source = Dialogues(corpus_items(name, c)[1], text, alone, seed=0, every_turn=True)
    tokens = source.num_tokens

  def take(keep: np.ndarray) -> list[np.ndarray]:
    columns = zip(*(source.row(int(row), 0, 0) for row in keep), strict=True)
    tokens_RL, segment_RL, weight_RL = map(np.stack, columns)
    return [tokens_RL, segment_RL, weight_RL > 0]

  return HeldOut(len(source), tokens, source.num_bytes, None, take)


def held_out_rows(stream_T: np.ndarray, c: DataConfig, eos_id: int) -> tuple[np.ndarray, np.ndarray]:
  """The held-out stream as rows in order, each token once: (tokens, segment) [rows, L]; segment 0 = padding."""
  starts = np.arange(0, len(stream_T), c.length)
  tokens_RL, segment_RL = windows.cut(stream_T, starts, c, eos_id)
  kept = starts[:, None] + np.arange(c.length)[None, :] < len(stream_T)
  return np.where(kept, tokens_RL, eos_id), np.where(kept, segment_RL, 0)
