"""Rows to batches.

The rows of a source are numbered 0 .. len - 1. The mixture says which source example number `index` is taken from, and
how many were taken before; Grain's index permutation says which row that is (another order in every epoch). Examples
step * B .. step * B + B - 1 are the batch of a step, so the position in the data is the step alone.

Every batch has the same columns, whatever the objective:
  tokens  int32   [B, L]  x_0
  weight  float32 [B, L]  loss weight, 0 = given or padding; every response sums to the same, and all to 1
  segment int32   [B, L]  document within the row, 0 = padding; 1 everywhere if documents may see each other
  index   int32   [B]     global example index, from which the noise is drawn
and, with data.replies="all",
  clean   int32   [B, L]  what later blocks, or tokens, see in the place of `tokens`: the dialogue, which goes on where
                          a reply is filled up with EOS
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from lladax import optimizer
from lladax.data.windows import DataConfig, Source, stable_hash
from lladax.mistake import Mistake

Batch = dict[str, np.ndarray]
_MIX = 1000  # a mixture is exact over so many rows


class _Stage(NamedTuple):
  """A part of a run in which the weights of the sources stay."""

  begin: int  # its first index
  counts: np.ndarray  # rows of each source in 1,000
  before: np.ndarray  # rows of each source that came before


class Mixture:
  """index -> (source, rows taken of it before): exact over every 1,000 rows of a stage, in random order."""

  def __init__(self, c: DataConfig, *, seed: int, steps: int):
    stages = c.stages or ((-1, tuple(weight for _, weight in c.mixture) or (1.0,)),)
    lengths = optimizer.lengths([n for n, _ in stages], steps, "data.stages")
    self._stages: list[_Stage] = []
    begin, before = 0, np.zeros(len(stages[0][1]), int)

    def shuffled(block: int, stage: int) -> tuple[np.ndarray, np.ndarray]:
      """Of a block of 1,000 rows: the source of each, and how many rows of that source precede it."""
      counts = self._stages[stage].counts
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
      self._stages.append(_Stage(begin, counts, before))
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
      responses, end = float(responses.sum()), int(ends.max())
    picked = [source.row(row, epoch, end) for source, row, epoch in map(place, (first + local_R).tolist())]
    tokens, segment, weight, *clean = (np.stack(column) for column in zip(*picked, strict=True))
    index = first + local_R
    if c.random_lengths:
      cut = [np.random.default_rng((seed, 1, int(i))) for i in index]
      length = np.array([g.integers(1, L + 1) if g.random() < c.random_lengths else L for g in cut])
      kept = (np.arange(L)[None, :] < length[:, None]) & (segment > 0)
      tokens, segment = np.where(kept, tokens, eos_id), np.where(kept, segment, 0)
      weight = kept / kept.sum(axis=1, keepdims=True)
    found = {
      "tokens": tokens.astype(np.int32),
      "weight": (weight / responses).astype(np.float32),
      "segment": segment.astype(np.int32),
      "index": index.astype(np.int32),
    }
    return found | ({"clean": clean[0].astype(np.int32)} if clean else {})

  numbers = grain.MapDataset.range(start, stop).map(batch)
  return iter(numbers.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))
