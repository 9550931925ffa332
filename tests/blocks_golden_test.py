"""What a published scheduler commits and edits on given logits (tests/golden/README.md), and what the sampler does."""

import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lladax import sampling
from lladax.sampling import SamplerConfig

SETS = pathlib.Path(os.environ.get("LLADAX_GOLDEN", pathlib.Path(__file__).parent / "golden"))
CASES = [
  pytest.param(folder, golden, case, id=f"{folder.name}-{case['name']}")
  for folder in sorted(SETS.glob("block-refinement*"))
  for golden in [json.loads((folder / "golden.json").read_text())]
  for case in golden["cases"]
]


@pytest.mark.parametrize(("folder", "golden", "case"), CASES)
def test_commits_and_edits_are_those_of_the_golden_set(folder, golden, case):
  kinds = ("logits", "sample", "next_sample", "transfer", "edit", "probs")
  with np.load(folder / "golden.npz") as file:
    arrays = {kind: file[f"{case['name']}_{kind}"] for kind in kinds}
  rows, W, V = arrays["logits"].shape[1:]
  c = SamplerConfig(
    steps=case["num_inference_steps"], threshold=case["threshold"], edit_threshold=case["editing_threshold"] or None
  )
  _, settings = sampling.split(c, rows)
  noise_BW = jax.random.split(jax.random.key(0), (rows, W))  # asked for, and not used
  commits, edits = [], []
  for t, number in enumerate(case["step_index"]):
    held_BW = arrays["sample"][t]
    masked_BW = held_BW == golden["mask_id"]
    token_BW, probability_BW, score_BW = sampling.candidates(
      arrays["logits"][t], lambda: noise_BW, settings, remasking="low_confidence",
      allowed_V=jnp.arange(V) != golden["mask_id"], ends=(golden["eos_id"],), alike_B=jnp.zeros(rows, bool),
    )  # fmt: skip
    quota_B = sampling.scheduled(W, settings.steps, number)
    commit_BW = sampling.commit(masked_BW, score_BW, probability_BW, quota_B, settings, always=True)
    own_BW = ~masked_BW & (np.arange(W)[None] >= golden["prompt_positions_in_block"])
    edit_BW = sampling.edit(own_BW, held_BW, token_BW, probability_BW, settings)
    np.testing.assert_array_equal(commit_BW, arrays["transfer"][t])
    np.testing.assert_array_equal(edit_BW, arrays["edit"][t])
    np.testing.assert_array_equal(np.where(commit_BW | edit_BW, token_BW, held_BW), arrays["next_sample"][t])
    np.testing.assert_allclose(probability_BW, arrays["probs"][t], atol=1e-5)
    commits.append(int(commit_BW.sum()))
    edits.append(int(edit_BW.sum()))
  assert commits == case["commits"] and edits == case["edits"]
