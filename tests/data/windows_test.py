import numpy as np
import pytest
from rows import EOS, SMALL, made, numbered

from lladax.data import windows
from lladax.data.windows import DataConfig


def test_segments_number_the_documents_of_a_row():
  stream_T = np.array([5, 6, EOS, 7, EOS, 8, 9, 9], np.int32)
  starts = np.array([0, 6])
  _, together_RL = windows.at(starts, stream_T, DataConfig(length=8), EOS)
  assert (together_RL == 1).all()
  tokens_RL, apart_RL = windows.at(starts, stream_T, DataConfig(length=8, segments=True), EOS)
  np.testing.assert_array_equal(tokens_RL, [[5, 6, EOS, 7, EOS, 8, 9, 9], [9, 9, 5, 6, EOS, 7, EOS, 8]])
  np.testing.assert_array_equal(apart_RL, [[1, 1, 1, 2, 2, 3, 3, 3], [1, 1, 1, 1, 1, 2, 2, 3]])


def test_a_document_ends_with_eos():
  class Letters:
    eos_id = EOS

    def encode(self, text):
      return [ord(letter) for letter in text]

  np.testing.assert_array_equal(windows.stream(["ab", "c"], Letters()), [97, 98, EOS, 99, EOS])


def test_a_corpus_shorter_than_a_row():
  with pytest.raises(ValueError, match="data.length=4 is longer than the corpus: .* has 3 tokens"):
    made(numbered(3))
  assert made(numbered(4))  # a stream of one row is enough


@pytest.mark.parametrize("total", [8, 9, 3])
def test_held_out_rows_are_the_stream_once_and_in_order(total):
  tokens_RL, segment_RL = windows.in_order(numbered(total), SMALL, EOS)
  np.testing.assert_array_equal(tokens_RL[segment_RL > 0], numbered(total))
  assert tokens_RL.shape == segment_RL.shape == (-(-total // 4), 4)
  assert (tokens_RL[segment_RL == 0] == EOS).all()


@pytest.mark.parametrize("field", ["length", "batch_size", "random_lengths"])
def test_bad_fields_are_named(field):
  with pytest.raises(ValueError, match=f"data.{field}=-1: must"):
    DataConfig(**{field: -1})


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"format": "poem"}, "data.format='poem': use text, chat"),
    ({"corpus": "records:x", "exclude": "y.json"}, "data.exclude='y.json': records hold what was prepared"),
    ({"bad_lines": "hide"}, "data.bad_lines='hide': use stop, skip"),
    ({"format": "chat", "segments": True}, "data.segments=True is for data.format=text"),
    ({"format": "chat", "random_lengths": 0.1}, "data.random_lengths=0.1 is for data.format=text"),
    ({"format": "chat", "packing": True}, "data.eos_padding='batch' must be none"),
    ({"packing": True}, "data.packing=True is for data.format=chat"),
    ({"prompt_field": "question"}, "data.prompt_field='question', response_field='': name both"),
    ({"stages": ((-1, (1.0,)),)}, "data.stages is for a mixture"),
    ({"mixture": (("unicode", 1.0),), "stages": ((-1, (1.0, 1.0)),)}, "data.stages: the weights .* must be 1"),
    ({"mixture": (("unicode", 1.0), ("stdlib", -1.0))}, "data.mixture: the weights .* none negative"),
  ],
)
def test_fields_that_do_not_go_together(fields, message):
  with pytest.raises(ValueError, match=message):
    DataConfig(**fields)
