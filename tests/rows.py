"""Streams whose tokens are their own places, letters as tokens, and batches of rows of these."""

import itertools

import numpy as np

from lladax.data import batches, windows
from lladax.data.windows import DataConfig

EOS = 0
SMALL = DataConfig(length=4, batch_size=3)


def numbered(total):
  """A stream in which every token is its own position."""
  return np.arange(1, total + 1, dtype=np.int32)


def draw(sources, c, *, start=0, stop=8, seed=0, rows=None, steps=1000):
  return list(batches.of_steps(sources, c, eos_id=EOS, seed=seed, steps=steps, start=start, stop=stop, rows_R=rows))


def made(stream_T, c=SMALL, *, seed=0, **options):
  return draw([windows.Windows(stream_T, c, eos_id=EOS, seed=seed)], c, seed=seed, **options)


def assert_same(a, b):
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], strict=True)


class Letters:
  """A tokenizer of characters, with LLaDA's template in short: [role] text <EoT>."""

  eos_id, eot_id, bos_id, template = EOS, 1, 2, None
  role = {"system": 3, "user": 4, "assistant": 5}

  def encode(self, text):
    return [ord(letter) for letter in text]

  def reply(self, text):
    return [*self.encode(text), self.eot_id]

  def message(self, message):
    return [self.role[message["role"]], *self.reply(message["content"])]

  def chat(self, messages, ask=True):
    return [self.bos_id, *itertools.chain.from_iterable(map(self.message, messages)), *([5] if ask else [])]


def talk(*texts):
  return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
