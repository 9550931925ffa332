"""stdlib."""

from configs import base


def get_config():
  config = base.get_config()
  config.steps = 1000
  config.model.update(D=192, N=4, H=4, G=4, K=48, F=512, tied=True)
  config.tokenizer.vocab_size = 2048
  config.data.update(corpus="stdlib", length=256, batch_size=16)
  config.noise.update(masking="exact", times="antithetic")
  config.optimizer.update(schedule=((0.05, 3e-3), (-1, 0.0)))
  config.checkpoint.every = 100
  config.evaluate.update(every=250, rows=64, num_samples=4)
  config.evaluate.canvases = (
    "def read_text(path, encoding=None):\n" + "[MASK]" * 24 + "\n  return text\n",
    "class " + "[MASK]" * 6 + "(ValueError):\n" + "[MASK]" * 16,
    "  for i in range(" + "[MASK]" * 4 + "):\n" + "[MASK]" * 12 + "\n    break\n",
  )
  config.sample.temperature = 0.5
  return config
