import collections
import lzma
import math

import jax
import numpy as np
import pytest
from questions import Words, random_model

from lladax.data import sources, tokenizer, windows
from lladax.evaluation import held_out

pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.mark.parametrize("rows", [0, 3])
def test_uniform_predictions_cost_log2_of_the_vocabulary(tiny, rows):
  config, text = tiny({"data.length": 8}), Words()
  train, judged = sources.texts(config.data)
  metrics = held_out.bound(random_model(config, text, scale=0.0), config, rows=rows)
  tokens = sum(len(document.split()) + 1 for document in judged)
  raw = "\n".join([*judged, ""]).encode()
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
  held_out_words = [word for document in judged for word in [*document.split(), "EOS"]]
  bits = sum(-math.log2((count[word] + 1) / total) for word in held_out_words)
  assert metrics["unigram_bits_per_byte"] == pytest.approx(bits / len(raw), rel=1e-6)
  assert metrics["xz_bits_per_byte"] == 8 * len(lzma.compress(raw, preset=9)) / len(raw)


def test_the_baseline_is_exact(tiny):
  config = tiny({"objective": "autoregressive", "data.segments": True, "evaluate.batch_size": 7})
  text = tokenizer.create(config.tokenizer)
  llada = random_model(config, text)
  stream_T = windows.stream(sources.texts(config.data)[1], text)
  tokens_RL, segment_RL = windows.in_order(stream_T, config.data, text.eos_id)
  assert len(tokens_RL) % 7  # the last batch is not full
  log_p = jax.nn.log_softmax(llada.logits(tokens_RL, segment_RL))  # at i what is predicted for token i
  nats = -np.take_along_axis(np.asarray(log_p, np.float64), tokens_RL[..., None], axis=-1)[..., 0]
  nats = nats[segment_RL > 0].sum()
  metrics = held_out.bound(llada, config)
  assert metrics["nats_per_token"] == pytest.approx(nats / len(stream_T), rel=1e-5)
  assert metrics["bits_per_byte"] == pytest.approx(nats / len(stream_T) / math.log(2), rel=1e-5)  # a token is a byte


def test_without_held_out_text(tiny):
  config = tiny({"data.held_out": 0.0})
  with pytest.raises(ValueError, match="data.held_out=0.0: there is no held-out text"):
    held_out.bound(random_model(config, Words()), config)
