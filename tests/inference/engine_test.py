"""The engine on a tiny random model: one program for rows of any settings."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lladax import sampling
from lladax.inference import engine
from lladax.inference.engine import Engine
from lladax.mistake import Mistake
from lladax.model.mask_predictor import MaskPredictorConfig
from lladax.sampling import SamplerConfig

pytestmark = pytest.mark.usefixtures("quick_compiles")

MASK, EOS, EOT = 30, 29, 28
ROWS = [list(range(5)), [7, 8], list(range(10, 18))]
BASE = {"gen_length": 16, "block_length": 8, "steps": 8}
SESSION = [
  {}, {"threshold": 0.2}, {"threshold": 0.5}, {"threshold": 0.9}, {"temperature": 0.5, "seed": 3, "steps": 4},
  {"temperature": 1.0, "logits_eos_inf": True}, {"factor": 1.0, "confidence_eos_eot_inf": True},
  {"factor": 2.0, "early_stop": True, "steps": 16}, {"guidance_scale": 0.5},
  {"guidance_scale": 1.5, "temperature": 0.7, "seed": [1, 2, 3]},
]  # fmt: skip


def make(**fields):
  c = MaskPredictorConfig(
    **({"D": 12, "N": 1, "H": 2, "G": 1, "K": 6, "F": 16, "V": 32, "max_length": 64, "dtype": "float32"} | fields)
  )
  rng, shapes = np.random.default_rng(1), jax.eval_shape(c.init, jax.random.key(0))
  params = jax.tree.map(lambda x: jnp.asarray(0.6 * rng.standard_normal(x.shape), jnp.float32), shapes)
  return Engine(c, params | {"head": 3 * params["head"]}, MASK, (EOS, EOT), 31)  # sure enough for thresholds


def settings(**options):
  seed = options.pop("seed", 0)
  return SamplerConfig(**(BASE | options), seed=tuple(seed) if isinstance(seed, list) else seed)


def last(model, rows, given):
  *_, filled = model.run(model.extend(rows, given))
  return filled


def test_a_session_of_ten_settings_compiles_two_programs():
  """Unguided and guided."""
  model, before = make(F=17), engine.unmask_until._cache_size()  # which no other test compiles
  nfe = [int(last(model, ROWS, settings(**options)).canvas.nfe) for options in SESSION]
  assert engine.unmask_until._cache_size() - before == 2
  assert len(set(nfe)) >= 4, nfe  # they are heeded


def test_guidance_of_a_likelihood_is_a_number():
  model, pairs = make(F=17), [(ROWS[0], [1]), (ROWS[1], [2, 3])]
  programs = (engine._likelihood, engine._next)
  before = [program._cache_size() for program in programs]
  options = {"num_samples": 2, "seed": 0, "method": "monte_carlo"}
  found = [model.log_likelihood(pairs, guidance_scale=w, **options) for w in (0.0, 0.3, 1.0, 2.5)]
  assert [program._cache_size() - n for program, n in zip(programs, before, strict=True)] == [2, 2]
  assert np.all(np.diff(found, axis=0) != 0)


# The same prompt of every row: what differs is what they are asked for.
EACH = [
  {}, {"threshold": 0.2, "guidance_scale": 0.7}, {"temperature": 0.8, "factor": 2.0, "seed": 3},
  {"temperature": 1.5, "steps": 3, "logits_eos_inf": True, "seed": 4},
  {"temperature": 2.0, "early_stop": True, "seed": 5},
  {"temperature": 3.0, "confidence_eos_eot_inf": True, "guidance_scale": 0.4, "seed": 6},
  {"temperature": 2.5, "top_p": 0.8, "eps": 1e-3, "block_steps": 11, "seed": 7}, {"top_k": 3, "block_steps": 2},
  {"tokens_per_step": 5, "threshold": 0.3},
]  # fmt: skip


@pytest.mark.parametrize(
  "options",
  [{}, {"unguided": True, "gen_length": None, "steps": 3}, pytest.param({"cache": "dual"}, marks=pytest.mark.slow)],
  ids=str,
)
def test_rows_of_any_settings_answer_as_each_would_alone(options):
  options, model, prompt = dict(options), make(), ROWS[2]
  if options.pop("unguided", False):
    each = [{k: v for k, v in row.items() if k not in ("guidance_scale", "logits_eos_inf")} for row in EACH]
  else:
    each = EACH
  each = [settings(**(options | row)) for row in each]
  together = last(model, [prompt] * len(each), each)
  assert not (together.canvas.tokens_BL == MASK).any()
  answers = set()
  for i, c in enumerate(each):
    alone = last(model, [prompt], c)
    L = alone.canvas.tokens_BL.shape[1]  # one that ends soon grows less
    for a, b in zip(together.canvas[:3], alone.canvas[:3], strict=True):
      np.testing.assert_allclose(a[i, :L], b[0], atol=1e-5)
    answers.add((*alone.canvas.tokens_BL[0], *alone.canvas.unmasked_at_BL[0]))
  assert len(answers) == len(each)


def test_rows_of_a_causal_model_differ_in_temperature_and_in_whether_they_end():
  model, before = make(causal=True), engine._autoregressive_sample._cache_size()
  hot = {"temperature": 9.0, "steps": 16}
  each = [settings(**row) for row in ({"steps": 16}, hot | {"seed": 1}, hot | {"logits_eos_inf": True})]
  together = last(model, [ROWS[0]] * 3, each).canvas
  for i, c in enumerate(each):
    for row, same in zip(together[:3], last(model, [ROWS[0]] * 3, [c] * 3).canvas[:3], strict=True):
      np.testing.assert_allclose(row[i], same[i], atol=1e-5)
  assert engine._autoregressive_sample._cache_size() - before == 1
  assert len({tuple(row) for row in together.tokens_BL}) == 3 and EOS not in together.tokens_BL[2, 32:]


@pytest.mark.parametrize(
  ("name", "value"), [("gen_length", 8), ("block_length", 4), ("remasking", "random"), ("cache", "dual")]
)
def test_rows_of_one_batch_agree_in_what_a_program_is_compiled_for(name, value):
  with pytest.raises(Mistake, match=f"^sample.{name}: rows of one batch must agree in it.*: sample them apart$"):
    make().extend(ROWS[:2], [settings(), settings(**{name: value})])


def test_there_are_as_many_settings_as_rows():
  with pytest.raises(Mistake, match="^sample: 2 settings for 3 rows: give one, or one for each$"):
    make().extend(ROWS, [settings()] * 2)


BRANCHES = r"branch_computations=\{.*?\}|(?:true|false)_computation=\S+"


def test_noise_is_drawn_in_a_branch_that_greedy_batches_do_not_enter():
  """In what is compiled for both the words that noise is made of, some for each of B, W and V, stand in a branch."""
  model = make()
  job = model.extend(ROWS, settings())
  state = sampling.start(jnp.zeros((3, 48), jnp.int32), job.settings.steps, job.shape, mask_id=MASK, first=32)
  text = engine.unmask_until.lower(
    model.params, state, None, job.settings, 32, 9, 9, model=model.model, shape=job.shape, mask_id=MASK,
    ends=model.ends, vocab_size=31, first=32,
  ).compile().as_text()  # fmt: skip
  bodies = {found[1]: found[0] for found in re.finditer(r"^(?:ENTRY )?%([\w.-]+) .*?\{$.*?^\}", text, re.M | re.S)}

  def draws(left_out):
    """Computations with such words, of those that the program comes to."""
    reached, left = set(), [re.search(r"^ENTRY %([\w.-]+)", text, re.M)[1]]
    while left:
      reached.add(name := left.pop())
      named = re.findall(r"%([\w.-]+)", re.sub(left_out, "", bodies[name]))
      left += [other for other in named if other in bodies and other not in reached]
    return [name for name in reached if re.search(r"u32\[3,8,[\d,]*32\]", bodies[name])]

  assert draws("nothing") and not draws(BRANCHES)
