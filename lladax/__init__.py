"""lladax: train, sample and judge masked-diffusion language models in JAX.

>>> llada = lladax.load("runs/quickstart")
>>> llada.sample(["GREEK SMALL LETTER"]).text
"""

from lladax import configs
from lladax.devices import distributed
from lladax.inference.llada import LLaDA
from lladax.inference.load import load
from lladax.mistake import Mistake
from lladax.sampling import SamplerConfig

__all__ = ["configs", "LLaDA", "Mistake", "SamplerConfig", "load"]

distributed.hush_libtpu()
