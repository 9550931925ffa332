import dataclasses
import itertools

import numpy as np
import pytest
from rows import EOS, SMALL, assert_same, draw, made, numbered

from lladax.data import batches, windows
from lladax.data.windows import DataConfig


def epoch(stream_T, number, c=SMALL):
  """Rows of one epoch, in order."""
  count = -(-len(stream_T) // c.length)
  found = made(stream_T, c, stop=-(-(number + 1) * count // c.batch_size))
  rows = np.concatenate([batch["tokens"] for batch in found])
  return rows[number * count : (number + 1) * count]


@pytest.mark.parametrize("random_lengths", [0.0, 0.5, 1.0])
def test_columns(random_lengths):
  c = DataConfig(length=8, batch_size=4, random_lengths=random_lengths)
  for step, batch in enumerate(made(numbered(100), c)):
    described = {name: (x.dtype.name, x.shape) for name, x in batch.items()}
    row = (4, 8)
    assert described == {
      "tokens": ("int32", row), "weight": ("float32", row), "segment": ("int32", row), "index": ("int32", (4,)),
    }  # fmt: skip
    assert batch["weight"].sum() == pytest.approx(1.0)
    np.testing.assert_allclose(batch["weight"].sum(axis=1), 1 / 4, rtol=1e-6)  # rows count the same
    np.testing.assert_array_equal(batch["weight"] > 0, batch["segment"] > 0)
    np.testing.assert_array_equal(batch["index"], step * 4 + np.arange(4))


def test_random_lengths_cut_the_right_end():
  whole = DataConfig(length=8, batch_size=64)
  cut = dataclasses.replace(whole, random_lengths=0.5)
  for a, b in zip(made(numbered(999), whole), made(numbered(999), cut), strict=True):
    kept = b["segment"] > 0
    assert (np.diff(kept.astype(int), axis=1) <= 0).all() and kept[:, 0].all()
    np.testing.assert_array_equal(b["tokens"], np.where(kept, a["tokens"], EOS))
    assert 0.2 < (kept.sum(axis=1) < 8).mean() < 0.7  # 7/16 expected


@pytest.mark.parametrize("total", [40, 37])
def test_an_epoch_is_the_whole_stream(total):
  for number in range(3):
    seen = np.bincount(epoch(numbered(total), number).ravel(), minlength=total + 1)[1:]
    assert seen.min() == 1 and seen.max() <= 2
    assert (seen == 2).sum() == -total % SMALL.length  # the last window goes round


def test_windows_are_contiguous_and_circular():
  rows = epoch(numbered(37), 1) - 1
  np.testing.assert_array_equal(rows, (rows[:, :1] + np.arange(4)) % 37)


def test_every_epoch_has_another_order_and_another_cut():
  epochs = [epoch(numbered(400), number) for number in range(3)]
  starts = [rows[:, 0] for rows in epochs]
  for a, b in itertools.combinations(starts, 2):
    assert (a // 4 != b // 4).mean() > 0.9
  assert len({int(start[0]) % 4 for start in starts}) > 1
  other_seed = np.concatenate([batch["tokens"] for batch in made(numbered(400), seed=1)])
  assert (other_seed != epochs[0][: len(other_seed)]).mean() > 0.9


def test_the_batch_of_a_step_does_not_depend_on_the_start():
  c = dataclasses.replace(SMALL, random_lengths=0.5, segments=True)
  unbroken = made(numbered(37), c)
  for start in (1, 5, 7):
    for a, b in zip(unbroken[start:], made(numbered(37), c, start=start), strict=True):
      assert_same(a, b)


def test_the_rows_of_the_processes_are_the_batch():
  c = DataConfig(length=4, batch_size=6, random_lengths=0.5)
  whole = made(numbered(37), c)
  parts = [np.array([0, 3, 4]), np.array([1, 2, 5])]
  for rows in parts:
    for a, b in zip(whole, made(numbered(37), c, rows=rows), strict=True):
      assert_same({name: x[rows] for name, x in a.items()}, b)


MIXED = DataConfig(length=4, batch_size=10, mixture=(("a", 0.5), ("b", 0.3), ("c", 0.2)))


def mixed(c=MIXED, **options):
  """Batches of a mixture of streams whose tokens tell the source and the place."""
  streams = [numbered(400) + 1000 * i for i in range(3)]
  sources = [windows.Windows(stream_T, c, eos_id=EOS, seed=0) for stream_T in streams]
  return draw(sources, c, **options)


def sources_of(found):
  return np.concatenate([batch["tokens"][:, 0] for batch in found]) // 1000


def test_a_mixture_is_exact_and_in_no_pattern():
  found = sources_of(mixed(stop=300))
  np.testing.assert_array_equal(np.bincount(found[:1000]), [500, 300, 200])
  np.testing.assert_array_equal(np.bincount(found[1000:2000]), [500, 300, 200])
  assert (found[:1000] != found[1000:2000]).mean() > 0.5
  correlation = [np.corrcoef(found[:-lag] == 0, found[lag:] == 0)[0, 1] for lag in range(1, 50)]
  assert np.abs(correlation).max() < 0.1


def test_every_source_of_a_mixture_goes_through_its_epochs():
  rows = np.concatenate([batch["tokens"] for batch in mixed(stop=100)])
  for source, count in enumerate([500, 300, 200]):
    taken = rows[rows[:, 0] // 1000 == source] - 1000 * source
    assert len(taken) == count
    for first in range(0, count, 100):  # 400 tokens in rows of 4
      np.testing.assert_array_equal(np.sort(taken[first : first + 100].ravel()), numbered(400))


def test_stages_change_the_weights_and_lose_no_row():
  c = dataclasses.replace(MIXED, stages=((30, (1.0, 0.0, 1.0)), (0.25, (0.0, 1.0, 0.0)), (-1, (1.0, 2.0, 1.0))))
  found = mixed(c, stop=200, steps=200)
  source_R = sources_of(found)
  assert abs((source_R[:300] == 0).sum() - 150) < 40 and (source_R[:300] == 1).sum() == 0
  assert (source_R[300:800] == 1).all()
  np.testing.assert_array_equal(np.bincount(source_R[800:1800]), [250, 500, 250])
  rows = np.concatenate([batch["tokens"] for batch in found])
  first = rows[rows[:, 0] // 1000 == 0]
  np.testing.assert_array_equal(np.sort(first[:100].ravel()), numbered(400))  # an epoch, over the stages
  for a, b in zip(found[150:], mixed(c, start=150, stop=200, steps=200), strict=True):
    assert_same(a, b)


def test_a_weight_too_small_to_be_kept_is_refused():
  with pytest.raises(ValueError, match="data.mixture: the weight 0.0001 of 'b' is less than 1 in 1000 rows"):
    batches.Mixture(DataConfig(mixture=(("a", 1.0), ("b", 0.0001))), seed=0, steps=10)


def test_the_millionth_step_reads_its_own_rows_alone():
  class Counted(windows.Windows):
    read = 0

    def row(self, *args):
      Counted.read += 1
      return super().row(*args)

  source = Counted(numbered(40_000), SMALL, eos_id=EOS, seed=0)
  batch = draw([source], SMALL, start=1_000_000, stop=1_000_001, steps=2_000_000)[0]
  assert Counted.read == SMALL.batch_size
  np.testing.assert_array_equal(batch["index"], 3_000_000 + np.arange(3))
