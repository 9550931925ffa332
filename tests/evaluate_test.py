import collections
import dataclasses
import lzma
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lladax import data, evaluate, tokenizer
from lladax.llada import LLaDA

pytestmark = pytest.mark.usefixtures("quick_compiles")


class Words:
  """A tokenizer whose tokens are words, so that tokens and bytes differ."""

  eos_id, mask_id, vocab_size, rows = 0, 1, 40, 128
  words: list[str] = []

  def encode(self, text):
    self.words += [word for word in dict.fromkeys(text.split()) if word not in self.words]
    return [2 + self.words.index(word) for word in text.split()]


def random_model(config, text, scale=0.3):
  """A model with random parameters, drawn without compiling anything."""
  model = dataclasses.replace(config.model, V=text.rows)
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  params = jax.tree.map(lambda x: jnp.asarray(scale * rng.normal(size=x.shape), jnp.float32), shapes)
  return LLaDA(model, params, text, text.mask_id, text.eos_id, text.vocab_size)


@pytest.mark.parametrize("rows", [0, 3])
def test_uniform_predictions_cost_log2_of_the_vocabulary(tiny, rows):
  config, text = tiny({"data.length": 8}), Words()
  train, held_out = data.texts(config.data)
  metrics = evaluate.bound(random_model(config, text, scale=0.0), config, rows=rows)
  tokens = sum(len(document.split()) + 1 for document in held_out)
  raw = "\n".join([*held_out, ""]).encode()
  assert metrics["nats_per_token"] == pytest.approx(math.log(128), rel=1e-5)
  assert metrics["perplexity"] == pytest.approx(128, rel=1e-4)
  relative = metrics["bits_per_byte_stderr"] / metrics["bits_per_byte"]  # by the rule of the logarithm's derivative
  assert metrics["perplexity_stderr"] == pytest.approx(128 * math.log(128) * relative, rel=1e-3)
  assert metrics["bits_per_byte"] == pytest.approx(7 * tokens / len(raw), rel=1e-5)
  if rows:
    assert metrics.keys() == {
      "bits_per_byte",
      "bits_per_byte_stderr",
      "perplexity",
      "perplexity_stderr",
      "nats_per_token",
    }
    return
  count = collections.Counter(word for document in train for word in [*document.split(), "EOS"])
  total = count.total() + Words.vocab_size
  held_out_words = [word for document in held_out for word in [*document.split(), "EOS"]]
  bits = sum(-math.log2((count[word] + 1) / total) for word in held_out_words)
  assert metrics["unigram_bits_per_byte"] == pytest.approx(bits / len(raw), rel=1e-6)
  assert metrics["xz_bits_per_byte"] == 8 * len(lzma.compress(raw, preset=9)) / len(raw)


def test_the_baseline_is_exact(tiny):
  config = tiny({"objective": "autoregressive", "data.segments": True, "evaluate.batch_size": 7})
  text = tokenizer.create(config.tokenizer)
  llada = random_model(config, text)
  stream_T = data.stream(data.texts(config.data)[1], text)
  tokens_RL, segment_RL = data.held_out_rows(stream_T, config.data, text.eos_id)
  assert len(tokens_RL) % 7  # the last batch is not full
  starts = np.diff(segment_RL, axis=1, prepend=-1) != 0
  input_RL = np.where(starts, text.eos_id, np.roll(tokens_RL, 1, axis=1))
  log_p = jax.nn.log_softmax(llada.logits(input_RL, segment_RL))
  nats = -np.take_along_axis(np.asarray(log_p, np.float64), tokens_RL[..., None], axis=-1)[..., 0]
  nats = nats[segment_RL > 0].sum()
  metrics = evaluate.bound(llada, config)
  assert metrics["nats_per_token"] == pytest.approx(nats / len(stream_T), rel=1e-5)
  assert metrics["bits_per_byte"] == pytest.approx(nats / len(stream_T) / math.log(2), rel=1e-5)  # a token is a byte


def test_without_held_out_text(tiny):
  config = tiny({"data.held_out": 0.0})
  with pytest.raises(ValueError, match="data.held_out=0.0: there is no held-out text"):
    evaluate.bound(random_model(config, Words()), config)


def test_canvases_are_filled_between_two_eos(tiny):
  config = tiny({"evaluate.canvases": ("red and [MASK][MASK] 3", "[MASK]")})
  text = tokenizer.create(config.tokenizer)
  llada = random_model(config, text)
  filled = evaluate.samples(llada, config)
  assert filled.text[0].startswith("red and ") and filled.text[0].endswith(" 3")
  for row, padding, length in zip(filled.tokens, filled.padding, (14, 3), strict=True):
    row = row[padding:]
    assert len(row) == length and row[0] == row[-1] == text.eos_id
    assert text.mask_id not in row
  assert evaluate.samples(llada, tiny()) is None


def test_the_baseline_continues_what_stands_before_the_first_mask(tiny):
  changes = {"objective": "autoregressive", "sample.gen_length": 4}
  config = tiny(changes | {"evaluate.canvases": ("red and [MASK][MASK] 3",)})
  text = tokenizer.create(config.tokenizer)
  filled = evaluate.samples(random_model(config, text), config)
  row = filled.tokens[0, filled.padding[0] :]
  assert text.decode(row[:-4]) == "red and " and len(row) == 12
