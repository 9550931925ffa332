"""lladax: train, sample and judge masked-diffusion language models in JAX.

>>> lladax.train("quickstart", "runs/quickstart")
>>> llada = lladax.load("runs/quickstart")
>>> llada.sample(["GREEK SMALL LETTER"]).text
"""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lladax import configs
from lladax.devices import distributed
from lladax.inference.llada import LLaDA
from lladax.inference.load import load
from lladax.mistake import Mistake
from lladax.sampling import SamplerConfig

if TYPE_CHECKING:
  from ml_collections import ConfigDict

  from lladax.config import Config

__all__ = ["configs", "LLaDA", "Mistake", "SamplerConfig", "load", "train"]

distributed.hush_libtpu()


def train(
  config: "str | os.PathLike | ConfigDict | Config", workdir: str | os.PathLike, allow: Sequence[str] = ()
) -> dict[str, float]:
  """Trains a model up to `config.steps`, or goes on from the workdir's last checkpoint, and evaluates it.

  Args:
    config: a recipe's name ("quickstart", "llada_8b_sft:lora") or the path of a file of your own; a ConfigDict, such
      as `configs.load` returns, with the fields that you have set; or a whole `lladax.config.Config`. With the
      config.json of another run it is done again.
    workdir: folder of the run, for `load`: config.json, tokenizer/, checkpoints/STEP/, metrics.jsonl, evaluation.html.
    allow: fields, as "optimizer.schedule", that may be other than they were so far in the run of the workdir.

  Returns:
    The metrics of the last evaluation, over all held-out text: `bits_per_byte`, `perplexity` (of a token) and their
    standard errors, `nats_per_token`, two yardsticks, and "TASK METRIC" of each of `evaluate.tasks`.

  Raises:
    Mistake: bad input, in one line, before any long work; a loss that is not a number (a FloatingPointError, too).
    SystemExit: Ctrl-C or SIGTERM, after the step under way is saved; the same call goes on from there.
  """
  from lladax import config as whole  # Grain and its kin are slow to import, and of use to those who train
  from lladax.training import trainer

  return trainer.train(whole.given(config), workdir, allow)
