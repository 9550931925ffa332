"""Quickstart."""

from configs import base


def get_config():
  config = base.get_config()
  config.steps = 700
  config.model.update(D=128, N=4, H=4, G=4, K=32, F=384, tied=True)
  config.data.update(corpus="unicode", length=64, batch_size=32)
  config.tokenizer.vocab_size = 4096
  config.noise.update(masking="exact", times="antithetic")
  config.optimizer.update(schedule=((0.05, 3e-3), (-1, 0.0)))
  config.evaluate.canvases = (
    "GREEK SMALL LETTER" + "[MASK]" * 8,
    "[MASK]" * 8 + " WITH DOT ABOVE",
    "LATIN" + "[MASK]" * 3 + " LETTER" + "[MASK]" * 4,
    "[MASK]" * 12,
  )
  config.sample.temperature = 0.7
  return config
