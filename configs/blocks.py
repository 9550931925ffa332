"""The family of blocks, and the causal baseline: the same text, model and steps, with blocks of 1, 4, 16, and whole.

  python -m lladax.main --config=configs/blocks.py:16 --workdir=runs/family/16

The variants are 1, 4, 16, whole and causal. `python benchmarks/blocks.py` trains all of them, and draws held-out bound
and speed of sampling against the block; docs/results.md has its table, the hardware and the time.
"""

from lladax.configs import base
from lladax.mistake import Mistake

VARIANTS = {"1": 1, "4": 4, "16": 16, "whole": 0, "causal": 0}


def get_config(variant: str = "16"):
  if variant not in VARIANTS:
    raise Mistake(f"--config=blocks:{variant}: the variants are {', '.join(VARIANTS)}")
  config = base.get_config()
  config.objective = "autoregressive" if variant == "causal" else "diffusion"
  config.noise.block = VARIANTS[variant]
  config.steps = 600
  config.model.update(D=96, N=3, H=3, G=3, K=32, F=256, tied=True)
  config.data.update(corpus="stdlib", length=128, batch_size=16, held_out=0.01)
  config.tokenizer.vocab_size = 1024
  config.noise.update(masking="exact", times="antithetic")  # at block 1 nothing of it is left to chance
  config.optimizer.update(schedule=((0.05, 4e-3), (-1, 0.0)))
  config.checkpoint.every = 200
  config.evaluate.num_samples = 4
  return config
