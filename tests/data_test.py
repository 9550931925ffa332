import dataclasses
import itertools

import numpy as np
import pytest

from lladax import data
from lladax.data import DataConfig

EOS = 0
SMALL = DataConfig(length=4, batch_size=3)


def numbered(total):
  """A stream in which every token is its own position."""
  return np.arange(1, total + 1, dtype=np.int32)


def draw(sources, c, *, start=0, stop=8, seed=0, rows=None, steps=1000):
  return list(data.batches(sources, c, eos_id=EOS, seed=seed, steps=steps, start=start, stop=stop, rows_R=rows))


def batches(stream_T, c=SMALL, *, seed=0, **options):
  return draw([data.Windows(stream_T, c, eos_id=EOS, seed=seed)], c, seed=seed, **options)


def epoch(stream_T, number, c=SMALL):
  """Rows of one epoch, in order."""
  count = -(-len(stream_T) // c.length)
  found = batches(stream_T, c, stop=-(-(number + 1) * count // c.batch_size))
  rows = np.concatenate([batch["tokens"] for batch in found])
  return rows[number * count : (number + 1) * count]


def assert_same(a, b):
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], strict=True)


@pytest.mark.parametrize("random_lengths", [0.0, 0.5, 1.0])
def test_columns(random_lengths):
  c = DataConfig(length=8, batch_size=4, random_lengths=random_lengths)
  for step, batch in enumerate(batches(numbered(100), c)):
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
  for a, b in zip(batches(numbered(999), whole), batches(numbered(999), cut), strict=True):
    kept = b["segment"] > 0
    assert (np.diff(kept.astype(int), axis=1) <= 0).all() and kept[:, 0].all()
    np.testing.assert_array_equal(b["tokens"], np.where(kept, a["tokens"], EOS))
    assert 0.2 < (kept.sum(axis=1) < 8).mean() < 0.7  # 7/16 expected


def test_segments_number_the_documents_of_a_row():
  stream_T = np.array([5, 6, EOS, 7, EOS, 8, 9, 9], np.int32)
  starts = np.array([0, 6])
  _, together_RL = data.windows(stream_T, starts, DataConfig(length=8), EOS)
  assert (together_RL == 1).all()
  tokens_RL, apart_RL = data.windows(stream_T, starts, DataConfig(length=8, segments=True), EOS)
  np.testing.assert_array_equal(tokens_RL, [[5, 6, EOS, 7, EOS, 8, 9, 9], [9, 9, 5, 6, EOS, 7, EOS, 8]])
  np.testing.assert_array_equal(apart_RL, [[1, 1, 1, 2, 2, 3, 3, 3], [1, 1, 1, 1, 1, 2, 2, 3]])


def test_a_document_ends_with_eos():
  class Letters:
    eos_id = EOS

    def encode(self, text):
      return [ord(letter) for letter in text]

  np.testing.assert_array_equal(data.stream(["ab", "c"], Letters()), [97, 98, EOS, 99, EOS])


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
  other_seed = np.concatenate([batch["tokens"] for batch in batches(numbered(400), seed=1)])
  assert (other_seed != epochs[0][: len(other_seed)]).mean() > 0.9


def test_the_batch_of_a_step_does_not_depend_on_the_start():
  c = dataclasses.replace(SMALL, random_lengths=0.5, segments=True)
  unbroken = batches(numbered(37), c)
  for start in (1, 5, 7):
    for a, b in zip(unbroken[start:], batches(numbered(37), c, start=start), strict=True):
      assert_same(a, b)


def test_the_rows_of_the_processes_are_the_batch():
  c = DataConfig(length=4, batch_size=6, random_lengths=0.5)
  whole = batches(numbered(37), c)
  parts = [np.array([0, 3, 4]), np.array([1, 2, 5])]
  for rows in parts:
    for a, b in zip(whole, batches(numbered(37), c, rows=rows), strict=True):
      assert_same({name: x[rows] for name, x in a.items()}, b)


def test_a_corpus_shorter_than_a_row():
  with pytest.raises(ValueError, match="data.length=4 is longer than the corpus: .* has 3 tokens"):
    batches(numbered(3))
  assert batches(numbered(4))  # a stream of one row is enough


@pytest.mark.parametrize("total", [8, 9, 3])
def test_held_out_rows_are_the_stream_once_and_in_order(total):
  tokens_RL, segment_RL = data.held_out_rows(numbered(total), SMALL, EOS)
  np.testing.assert_array_equal(tokens_RL[segment_RL > 0], numbered(total))
  assert tokens_RL.shape == segment_RL.shape == (-(-total // 4), 4)
  assert (tokens_RL[segment_RL == 0] == EOS).all()


@pytest.mark.parametrize("field", ["length", "batch_size", "random_lengths"])
def test_bad_fields_are_named(field):
  with pytest.raises(ValueError, match=f"data.{field}=-1: must"):
    DataConfig(**{field: -1})
