"""The corpora of a run, read once: sources of rows to train on, and the held-out parts as rows to judge a model on."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from lladax.data import contamination, corpus, reading, records, windows
from lladax.data.dialogues import Dialogues
from lladax.data.records import Records
from lladax.data.tokenizer import Tokenizer
from lladax.data.windows import DataConfig, Source, is_records
from lladax.mistake import Mistake


def texts(c: DataConfig) -> tuple[list[str], list[str]]:
  """(training, held-out) documents of the corpora that are no records; of conversations, what is said in them."""
  both: tuple[list[str], list[str]] = ([], [])
  for name in c.corpora:
    if not is_records(name):
      for found, part in zip(both, items(name, c)[:2], strict=True):
        found += [x if isinstance(x, str) else corpus.said(x) for x in part]
  return both


def prepared_tokenizer(c: DataConfig) -> Tokenizer | None:
  """The tokenizer of the records among the corpora, which must be one; None without records."""
  found = {x: records.open_folder(x.removeprefix("records:")).tokenizer for x in c.corpora if is_records(x)}
  for name, text in found.items():
    first, of_first = next(iter(found.items()))
    if text.fingerprint != of_first.fingerprint:
      raise Mistake(
        f"data.mixture: {name} was prepared with another tokenizer than {first}: prepare them with one,"
        " by tokenizer.path"
      )
  return next(iter(found.values()), None)


def training(c: DataConfig, text: Tokenizer, seed: int) -> list[Source]:
  """The sources of training rows, one for each corpus.

  Raises:
    Mistake, Missing: a corpus is empty, or cannot be read, or was prepared with another tokenizer.
  """
  return [_training(name, c, text, seed) for name in c.corpora]


def _training(name: str, c: DataConfig, text: Tokenizer, seed: int) -> Source:
  if is_records(name):
    folder = records.open_folder(name.removeprefix("records:"))
    folder.check_holds(name, c.format)
    if folder.tokenizer.fingerprint != text.fingerprint:
      also = ", or chat template," if c.format == "chat" else ""
      raise Mistake(f"data.corpus={name!r} was prepared with another tokenizer{also} than this run's: prepare it again")
    return Records(name, c) if c.format == "text" else Dialogues(records.Conversations(name), text, c, seed=seed)
  learnt, judged, tally = items(name, c)
  if c.format == "chat":
    found = Dialogues(learnt, text, c, seed=seed)
  else:
    stream_T = tokens(name, "training", c, text)
    size = sum(len(x.encode()) for x in learnt)
    about = f"{len(learnt):,} documents ({size:,} bytes, {len(stream_T):,} tokens)"
    alone = dataclasses.replace(c, corpus=name, mixture=(), stages=())
    found = windows.Windows(stream_T, alone, eos_id=text.eos_id, seed=seed, about=about)
  counted = {"held out": len(judged), "empty": tally.empty, "bad lines left out": tally.bad}
  counted |= {f"left out: they hold a text of {test}": n for test, n in sorted(tally.excluded.items())}
  found.about += "".join(f"; {n:,} {what}" for what, n in counted.items() if n)
  if tally.files.total() > 1:
    found.about += f"; files: {', '.join(f'{n:,} {kind}' for kind, n in sorted(tally.files.items()))}"
  if c.exclude:
    found.about += f"; looked for: {contamination.excluded(c.exclude).about}"
  return found


class Items(NamedTuple):
  """A corpus that was read: documents, or conversations."""

  training: list[Any]
  held_out: list[Any]
  tally: reading.Tally  # what reading it met


def items(name: str, c: DataConfig) -> Items:
  """The items of a corpus; kept until its files change."""
  fields = c.format, c.text_field, c.prompt_field, c.response_field, c.bad_lines, c.longest_line, c.exclude, c.held_out
  return _read(corpus.stamp(name, c.exclude), name, *fields)


@functools.lru_cache(maxsize=8)
def _read(_, name, format, text_field, prompt_field, response_field, bad_lines, longest, exclude, held_out):
  tally = reading.Tally(bad_lines, exclude, longest)
  if format == "chat":
    found = corpus.conversations(name, prompt_field, response_field, tally)
  else:
    found = corpus.documents(name, text_field, tally)
  return Items(*corpus.split(found, held_out), tally)


def tokens(name: str, part: str, c: DataConfig, text: Tokenizer) -> np.ndarray:
  """`windows.stream` of the documents of a corpus; `part`: training, or held_out."""
  return _tokenised(corpus.stamp(name, c.exclude), name, part, c, text)


@functools.lru_cache(maxsize=8)
def _tokenised(_: Any, name: str, part: str, c: DataConfig, text: Tokenizer) -> np.ndarray:
  return windows.stream(getattr(items(name, c), part), text)


def train_stream(c: DataConfig, text: Tokenizer) -> np.ndarray:
  """The training documents of the corpora that are files, tokenised, one corpus after the other."""
  return np.concatenate([tokens(name, "training", c, text) for name in c.corpora])


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
  counts, nums, sizes, raws, takes = zip(*found, strict=True)
  ends = np.cumsum(counts)

  def take(keep: np.ndarray) -> list[np.ndarray]:
    corpus_R = np.searchsorted(ends, keep, side="right")
    parts = [takes[i](keep[corpus_R == i] - int(ends[i]) + counts[i]) for i in np.unique(corpus_R)]
    return [np.concatenate(column) for column in zip(*parts, strict=True)]

  raw = None if None in raws else b"".join(raws)
  return HeldOut(sum(counts), sum(nums), sum(sizes), raw, take)


def _held_out(name: str, c: DataConfig, text: Tokenizer) -> HeldOut:
  if is_records(name) and c.format == "text":
    source = Records(name, c, "validation")
  elif c.format == "text":
    raw = "".join(x + "\n" for x in items(name, c).held_out).encode()
    tokens_RL, segment_RL = windows.in_order(stream_T := tokens(name, "held_out", c, text), c, text.eos_id)
    columns = [tokens_RL, segment_RL, segment_RL > 0]
    return HeldOut(len(tokens_RL), len(stream_T), len(raw), raw, lambda keep: [x[keep] for x in columns])
  else:
    padding = "block" if c.eos_padding == "block" else "none"  # a model of blocks fills them
    alone = dataclasses.replace(c, packing=False, eos_padding=padding, replies="one")
    talks = records.Conversations(name, "validation") if is_records(name) else items(name, c).held_out
    source = Dialogues(talks, text, alone, seed=0, every_turn=True)

  def take(keep: np.ndarray) -> list[np.ndarray]:
    columns = zip(*(source.row(int(row), 0, 0) for row in keep), strict=True)
    tokens_RL, segment_RL, weight_RL = map(np.stack, columns)
    return [tokens_RL, segment_RL, weight_RL > 0]

  return HeldOut(len(source), source.num_tokens, source.num_bytes, None, take)
