"""The source of Python's own standard library, and code infilling.

  python -m lladax.main --config=configs/stdlib.py --workdir=runs/stdlib

The corpus is the .py files of the Python that runs this (3.11: 731 files, 12.1 MB; tests and site-packages left out),
held out by file: 703 to train on (3.63M tokens of 4,096 pieces), 28 held out. On 2 x86-64 cores busy with other work it
took 48 minutes at commit f9107e3; left alone they make 5,000 tokens/s. Expect a bound of 1.80 ± 0.02 bits per byte,
beside 2.79 of a unigram model over the same tokens and 1.56 of `xz -9`, which so small a model does not reach so soon.
"""

from lladax.configs import base


def get_config():
  config = base.get_config()
  config.steps = 2000
  config.model.update(D=192, N=4, H=4, G=4, K=48, F=512, tied=True)
  config.tokenizer.vocab_size = 4096
  config.data.update(corpus="stdlib", length=256, batch_size=16)
  config.noise.update(masking="exact", times="antithetic")
  config.optimizer.update(schedule=((0.05, 3e-3), (-1, 0.0)))
  config.checkpoint.every = 200
  config.evaluate.update(every=500, rows=32, num_samples=4)
  config.evaluate.canvases = (
    "def read_text(path, encoding=None):\n" + "[MASK]" * 24 + "\n  return text\n",
    "class " + "[MASK]" * 6 + "(ValueError):\n" + "[MASK]" * 16,
    "  for i in range(" + "[MASK]" * 4 + "):\n" + "[MASK]" * 12 + "\n    break\n",
  )
  config.sample.temperature = 0.5
  return config
