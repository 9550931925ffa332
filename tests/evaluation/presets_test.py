import pytest

pytest.importorskip("lm_eval")
from questions import tiny

from lladax.evaluation import adapter, presets

pytestmark = [
  pytest.mark.usefixtures("quick_compiles"),
  pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the harness and of what it imports
]


def test_presets_have_the_published_numbers():
  found = {name.removeprefix("llada_base/"): x for name, x in presets.PRESETS.items() if name.startswith("llada_base")}
  table = {
    "mmlu": (5, 1, 0.0, 65.9), "cmmlu": (5, 1, 0.0, 69.9), "ceval": (5, 1, 0.0, 70.5),
    "arc_challenge": (0, 128, 0.0, 45.9), "arc_challenge+guidance": (0, 128, 0.5, 47.9),
    "hellaswag": (0, 128, 0.0, 70.5), "hellaswag+guidance": (0, 128, 0.5, 72.5),
    "piqa": (0, 128, 0.0, 73.6), "piqa+guidance": (0, 128, 0.5, 74.4),
    "truthfulqa": (0, 128, 0.0, 46.1), "truthfulqa+guidance": (0, 128, 2.0, 46.4),
    "winogrande": (5, 128, 0.0, 74.8), "winogrande+guidance": (5, 128, 0.0, 74.8),
    "gpqa": (5, 128, 0.0, 25.2), "gpqa+guidance": (5, 128, 0.5, 26.1),
  }  # fmt: skip
  for name, (shots, samples, guidance, published) in table.items():
    x = found.pop(name)
    options = {"guidance_scale": 0.0} | dict(x.options)
    assert (x.num_fewshot, options, x.published, x.chat) == (
      shots, {"num_samples": samples, "guidance_scale": guidance}, published, False,
    )  # fmt: skip
  assert found.pop("humaneval_fim").num_fewshot == 2
  numbers = {name: (x.num_fewshot, x.published, set(x.options.values())) for name, x in found.items()}
  assert numbers == {
    "bbh": (3, 49.7, {1024}), "gsm8k": (4, 70.3, {1024}), "math": (4, 31.4, {1024}), "humaneval": (0, 35.4, {1024}),
    "mbpp": (4, 40.0, {1024}),
  }  # fmt: skip
  blocks = presets.preset("llada_instruct/gsm8k_blocks")
  assert blocks.options == {"gen_length": 256, "steps": 256, "block_length": 8} and blocks.published == 78.6
  assert presets.preset("llada_instruct/humaneval").options["logits_eos_inf"] and blocks.chat


@pytest.mark.parametrize("name", presets.PRESETS)
def test_presets_are_sampled_as_they_say(name):
  x = presets.preset(name)
  plan = adapter.Harness(llada=tiny(max_length=4096), **x.options)._plan({"max_gen_toks": 32})
  said = {key: value for key, value in x.options.items() if key not in ("num_samples",)}
  assert plan.sampler | said == plan.sampler and (plan.most, plan.seed) == (said.get("gen_length", 32), 0)
  assert x.options.get("gen_length", 32) % x.options.get("block_length", 1) == 0  # none is filled in and thrown away


@pytest.mark.parametrize(
  "call, said",
  [
    (lambda llada: presets.preset("llada_base/gsm"), "preset 'llada_base/gsm'.*did you mean llada_base/gsm8k"),
  ],
)
def test_a_mistake_is_one_clear_line(llada, call, said):
  with pytest.raises(ValueError, match=said) as error:
    call(llada)
  assert "\n" not in str(error.value)
