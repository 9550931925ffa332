"""The reversal test in miniature: 246 facts, asked in the order in which they were told, and in the other.

  python -m lladax.main --config=configs/reversal.py --workdir=runs/reversal
  python -m lladax.main --config=configs/reversal.py --workdir=runs/reversal_ar --config.objective=autoregressive

Countries and their capitals, chemical elements and their symbols: a third is told in both directions, so that both
sentences are known, the others forward only. Both models see the same batches. Minutes on 2 CPU cores.
`python benchmarks/reversal.py` trains both, and draws the comparison.
"""

from lladax.configs import base


def get_config():
  config = base.get_config()
  config.steps = 1500
  config.model.update(D=128, N=4, H=4, G=4, K=32, F=384, tied=True)
  config.data.update(corpus="facts", length=32, batch_size=64, held_out=0.0, segments=True)
  config.tokenizer.vocab_size = 768
  config.optimizer.update(schedule=((0.05, 3e-3), (-1, 0.0)), weight_decay=0.0)
  config.log.update(console_every=250)
  config.evaluate.tasks = ("reversal",)
  return config
