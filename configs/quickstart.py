"""Quickstart."""

from configs import base


def get_config():
  config = base.get_config()
  config.steps = 450
  config.model.update(D=128, N=4, H=4, G=4, K=32, F=384, tied=True)
  config.data.update(corpus="unicode", length=64, batch_size=32)
  config.tokenizer.vocab_size = 4096
  config.noise.update(masking="exact", times="antithetic")
  config.optimizer.update(schedule=((0.05, 3e-3), (-1, 0.0)))
  # One piece a mask: from the front, from the back, from the middle, and from nothing.
  config.evaluate.canvases = (
    "GREEK SMALL LETTER" + "[MASK]" * 3,
    "[MASK]" * 3 + " WITH DOT ABOVE",
    "[MASK]" + " SMALL LETTER" + "[MASK]" * 3,
    "[MASK]" * 8,
  )
  config.sample.update(temperature=0.7, remasking="random")
  return config
