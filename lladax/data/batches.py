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

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from lladax import optimizer
from lladax.data import corpus, reading, records
from lladax.data.dialogues import Dialogues
from lladax.data.records import Records
from lladax.data.tokenizer import Tokenizer
from lladax.data.windows import Batch, DataConfig, Source, Windows, is_records, stable_hash, stream
from lladax.mistake import Mistake

_MIX = 1000  # a mixture is exact over so many rows


def texts(c: DataConfig) -> tuple[list[str], list[str]]:
  """(training, held-out) documents of the corpora that are no records; of conversations, what is said in them."""
  both: tuple[list[str], list[str]] = ([], [])
  for name in c.corpora:
    if not is_records(name):
      for found, items in zip(both, corpus_items(name, c)[:2], strict=True):
        found += [x if isinstance(x, str) else corpus.said(x) for x in items]
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


def sources(c: DataConfig, text: Tokenizer, seed: int) -> list[Source]:
  """The sources of training rows, one for each corpus.

  Raises:
    Mistake, Missing: a corpus is empty, or cannot be read, or was prepared with another tokenizer.
  """
  return [_source(name, c, text, seed) for name in c.corpora]


def _source(name: str, c: DataConfig, text: Tokenizer, seed: int) -> Source:
  if is_records(name):
    found = Records(name, c)
    if found.tokenizer.fingerprint != text.fingerprint:
      raise Mistake(f"data.corpus={name!r} was prepared with another tokenizer than this run's: prepare it again")
    return found
  items, held_out, tally = corpus_items(name, c)
  if c.format == "chat":
    found = Dialogues(items, text, c, seed=seed)
  else:
    stream_T = token_stream(name, 0, c, text)
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


def corpus_items(name: str, c: DataConfig) -> tuple[list[Any], list[Any], reading.Tally]:
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


def token_stream(name: str, part: int, c: DataConfig, text: Tokenizer) -> np.ndarray:
  """`stream` of the training (0) or held-out (1) documents of a corpus."""
  return _tokenised(corpus.stamp(name, c.exclude), name, part, c, text)


@functools.lru_cache(maxsize=8)
def _tokenised(_: Any, name: str, part: int, c: DataConfig, text: Tokenizer) -> np.ndarray:
  items: Any = corpus_items(name, c)
  return stream(items[part], text)


def train_stream(c: DataConfig, text: Tokenizer) -> np.ndarray:
  """The training documents of the corpora that are files, tokenised, one corpus after the other."""
  return np.concatenate([token_stream(name, 0, c, text) for name in c.corpora])


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


def of_steps(
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
    grain.MapDataset.range(len(source)).seed(stable_hash(seed, 3, s) if s else seed).shuffle().repeat()
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
