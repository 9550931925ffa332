"""Rows that join and leave a batch between blocks."""

import dataclasses
from typing import NamedTuple

import numpy as np

from lladax.sampling import SamplerConfig


@dataclasses.dataclass(frozen=True)
class Row:
  """What is asked for: a prompt to continue, or (`fills`) a canvas whose [MASK]s are to be filled in."""

  ids: tuple[int, ...]
  settings: SamplerConfig  # its seed is one number; the row has the noise of `sample([prompt], seed=[seed])`
  fills: bool = False
  most: int | None = None  # tokens at most, where `gen_length` is None


class Snapshot(NamedTuple):
  """A row behind one of its passes; its own positions alone, prompt and all."""

  tokens_L: np.ndarray  # int32; [MASK] where nothing is committed yet
  unmasked_at_L: np.ndarray  # int32: the row's pass that committed it, from 1; 0: given, or masked
  confidence_L: np.ndarray  # float32: probability at the commit
  edited_at_L: np.ndarray | None  # int32: the row's pass that replaced it last; 0: none. None: nobody edits
  first: int  # what was asked for begins here: behind the prompt; 0 of a canvas
  stable: int  # so many positions from the left will not change any more
  passes: int  # the row's own forward passes
  done: bool
