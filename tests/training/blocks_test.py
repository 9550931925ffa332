"""A run whose objective is block diffusion: trained, cut off and continued, judged, sampled from."""

import numpy as np
import pytest
from runs import Crash, assert_bitwise_equal, at_batch, crash

import lladax
from lladax.mistake import Mistake
from lladax.training import step, trainer

pytestmark = pytest.mark.usefixtures("quick_compiles")

BLOCKS = {"noise.block": 4, "noise.masking": "exact", "noise.times": "antithetic", "data.segments": True, "steps": 12}


def test_a_run_of_blocks_from_end_to_end(tiny, tmp_path, monkeypatch):
  whole = trainer.train(tiny(BLOCKS), tmp_path / "whole")
  with monkeypatch.context() as patch:
    at_batch(patch, 8, crash)
    with pytest.raises(Crash):
      trainer.train(tiny(BLOCKS | {"checkpoint.every": 5}), tmp_path / "cut")
  again = trainer.train(tiny(BLOCKS | {"checkpoint.every": 5}), tmp_path / "cut")
  assert_bitwise_equal(tmp_path / "cut", tmp_path / "whole")
  assert again["bits_per_byte"] == whole["bits_per_byte"] < 8
  llada = lladax.load(tmp_path / "whole")
  assert llada.model.block == 4 and llada.model.objective.order == "blocks"
  out = llada.sample(["red", "a"], gen_length=8, steps=8, threshold=0.5, edit_threshold=0.5)
  assert len(out.text) == 2 and out.edited_at is not None
  assert np.isfinite(llada.log_likelihood("red", " is", num_samples=4))
  with pytest.raises(Mistake, match="noise.block: 4 there, 8 here"):
    trainer.train(tiny(BLOCKS | {"noise.block": 8}), tmp_path / "whole")


def test_a_length_that_blocks_do_not_fit_is_refused(tiny):
  with pytest.raises(Mistake, match="is not a multiple of noise.block=5: rows hold whole blocks"):
    tiny({"noise.block": 5})


def test_what_a_step_of_blocks_costs(tiny):
  """The layers run twice a token, and look at L + n keys in all; the head runs once."""
  full, blocks, pairs = (
    step.flops_per_token(tiny({"model.V": 32} | more))
    for more in ({}, {"noise.block": 4}, {"noise.block": 4, "noise.weights": "flat", "noise.complements": True})
  )
  c = tiny({"model.V": 32}).model
  layers = step.matmuls(tiny({"model.V": 32})) - c.V * c.D
  assert blocks - full == 6 * layers + 12 * c.N * c.H * c.K * 4
  assert pairs == 2 * blocks
  causal = {"model.V": 32, "objective": "autoregressive"}  # which knows no noise
  pair = {"noise.weights": "flat", "noise.complements": True}
  assert step.flops_per_token(tiny(causal | pair)) == step.flops_per_token(tiny(causal))
