"""The first command: names of the Unicode characters, from nothing to invented ones in under five minutes.

  python -m lladax.main --config=configs/quickstart.py --workdir=runs/quickstart

Python's `unicodedata` names about 32,600 characters (those named by rule, such as the CJK ideographs, left out); one in
twenty is held out. On 2 x86-64 cores: 3 min 45 s at commit 08053f9. Expect 1.14 bits per byte (bound, ± 0.03), beside
1.905 of a unigram model over the same tokens and 1.876 of `xz -9`. The numbers are of Python 3.11 (Unicode 14); another
Python has a few more names.
"""

from lladax.configs import base


def get_config():
  config = base.get_config()
  config.steps = 800
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
