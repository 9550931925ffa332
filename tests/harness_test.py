import io
import json
import lzma
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import lladax
from configs import base
from lladax import tokenizer
from lladax.config import parse
from lladax.llada import LLaDA
from lladax.mask_predictor import MaskPredictorConfig

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance  # noqa: E402

from lladax import evaluate, harness  # noqa: E402

pytestmark = [
  pytest.mark.usefixtures("quick_compiles"),
  pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the harness and of what it imports
]

ROOT = pathlib.Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden" / "llada-tiny"


def tiny(**fields):
  """A tiny random LLaDA over bytes."""
  text = tokenizer.create(tokenizer.TokenizerConfig(kind="bytes"))
  shape = {"D": 12, "N": 1, "H": 2, "G": 1, "K": 6, "F": 16, "V": text.rows, "max_length": 96, "dtype": "float32"}
  c = MaskPredictorConfig(**(shape | fields))
  rng, shapes = np.random.default_rng(0), jax.eval_shape(c.init, jax.random.key(0))
  params = jax.tree.map(lambda x: jnp.asarray(0.5 * rng.standard_normal(x.shape), jnp.float32), shapes)
  return LLaDA(c, params, text, text.mask_id, text.eos_id, text.vocab_size, text.eot_id)


@pytest.fixture(scope="module")
def llada():
  return tiny()


def requests(kind, *arguments):
  return [Instance(request_type=kind, doc={}, arguments=x, idx=i) for i, x in enumerate(arguments)]


def test_rows_of_a_file_that_was_edited_are_read_anew(tmp_path):
  from lladax.tasks import utils

  for answer in "ab":  # as long as before
    (tmp_path / "x.jsonl").write_text(json.dumps({"answer": answer}) + "\n")
    assert utils.rows("x", tmp_path) == [{"answer": answer}]
  (tmp_path / "y.json").write_text('[{"answer": "c"}]')
  assert utils.rows("y", tmp_path) == [{"answer": "c"}]


PAIRS = [("Question: one\nAnswer:", " two"), ("", "ab"), ("Question:", " x"), ("a", " three or four"), ("b ", "c")]


def test_likelihoods_are_the_models_own(llada):
  lm = harness.Harness(llada=llada, mc_num=5, seed=3)
  found = lm.loglikelihood(requests("loglikelihood", *PAIRS))
  prompts, answers = [*(p for p, _ in PAIRS[:-1]), "b"], [*(a for _, a in PAIRS[:-1]), " c"]
  nats = llada.log_likelihood(prompts, answers, num_samples=5, seed=3)
  assert found == [(value, False) for value in nats]
  backwards = lm.loglikelihood(requests("loglikelihood", *PAIRS[::-1]))
  np.testing.assert_allclose([x for x, _ in backwards[::-1]], nats, rtol=1e-5)


def test_likelihoods_with_guidance_heed_it(llada):
  pairs = requests("loglikelihood", *PAIRS[:1])
  ((guided, _),) = harness.Harness(llada=llada, num_samples=4, cfg=1.5).loglikelihood(pairs)
  assert guided == llada.log_likelihood(*PAIRS[0], num_samples=4, guidance_scale=1.5)
  assert guided != llada.log_likelihood(*PAIRS[0], num_samples=4)


@pytest.mark.parametrize("causal", [False, True])
def test_greedy_answers_are_told_from_others(causal):
  llada = tiny(causal=True) if causal else tiny()
  lm = harness.Harness(llada=llada, num_samples=1, greedy=True, batch_size=2)
  prompt = list(b"abc")
  if causal:
    greedy = llada.sample([prompt], gen_length=3).tokens[0, -3:].tolist()
  else:
    greedy = llada.unmask([[*prompt, *[llada.mask_id] * 3]], steps=3).tokens[0, -3:].tolist()
  assert lm._are_greedy([prompt] * 3, [greedy, greedy[:2] + [(greedy[2] + 1) % 256], [1, 2]])[:2] == [True, False]
  found = lm.loglikelihood(requests("loglikelihood", ("abc", "zz")))
  assert found[0][1] is False


def test_a_causal_model_is_exact():
  llada = tiny(causal=True)
  found = harness.Harness(llada=llada).loglikelihood(requests("loglikelihood", ("ab", "cde")))
  assert found == [(llada.log_likelihood("ab", "cde"), False)]
  lm = harness.Harness(llada=llada, gen_length=4)
  (text,) = lm.generate_until(requests("generate_until", ("ab", {"until": []})))
  assert text == llada.sample("ab", gen_length=4).text[0]


def test_rolling_cuts_long_texts_into_windows(llada):
  lm, text = harness.Harness(llada=llada, num_samples=2), "0123456789" * 20
  found = lm.loglikelihood_rolling(requests("loglikelihood_rolling", (text,), ("ab",), ("",)))
  windows = [list(text[i : i + 96].encode()) for i in (0, 96, 192)]
  nats = llada.log_likelihood([[]] * 4, [*windows, list(b"ab")], num_samples=2)
  np.testing.assert_allclose(found, [sum(nats[:3]), nats[3], 0.0], rtol=1e-5)


def test_prompts_too_long_lose_their_start(llada, caplog):
  lm = harness.Harness(llada=llada, num_samples=1)
  (found,) = lm.loglikelihood(requests("loglikelihood", ("x" * 100 + "y" * 94, "ab")))
  assert found[0] == llada.log_likelihood("y" * 94, "ab", num_samples=1)
  assert "such prompts lose their start" in caplog.text
  with pytest.raises(ValueError, match="no room in model.max_length=96"):
    lm.generate_until(requests("generate_until", ("a", {"max_gen_toks": 96})))


PROMPTS = ["ab", "Question: a longer one\nAnswer:", "", "c" * 40, "de"]


def test_generation_ends_at_stop_strings_and_max_gen_toks(llada):
  ask = {"until": [], "max_gen_toks": 12, "do_sample": False, "temperature": 0.0}
  lm = harness.Harness(llada=llada, batch_size=2, steps=3)
  texts = lm.generate_until(requests("generate_until", *((p, ask) for p in PROMPTS)))
  for prompt, text in zip(PROMPTS, texts, strict=True):
    assert text == llada.sample(prompt, gen_length=12, block_length=12, steps=3).text[0]
  one_by_one = harness.Harness(llada=llada, batch_size=1, steps=3)
  backwards = one_by_one.generate_until(requests("generate_until", *((p, ask) for p in PROMPTS[::-1])))
  assert backwards[::-1] == texts
  at = next(i for i, text in enumerate(texts) if len(text) > 2)
  stop = texts[at][1:2]
  (cut,) = lm.generate_until(requests("generate_until", (PROMPTS[at], ask | {"until": ["never", stop]})))
  assert cut == texts[at][: texts[at].index(stop)]


def test_the_length_is_the_tasks_where_no_option_gives_it(llada):
  plan = harness.Harness(llada=llada, block_length=8)._plan({"max_gen_toks": 20, "until": "x"})
  assert plan.sampler["gen_length"] == plan.sampler["steps"] == 24 and plan.most == 20 and plan.until == ["x"]
  plan = harness.Harness(llada=llada, gen_length=64, block_length=32, steps=16)._plan({"max_gen_toks": 20})
  assert (plan.sampler["gen_length"], plan.most, plan.sampler["steps"]) == (64, 64, 16)
  plan = harness.Harness(llada=llada)._plan({"do_sample": True, "temperature": 0.7, "top_p": 0.9})
  assert plan.sampler == {"temperature": 0.7, "gen_length": 256, "block_length": 256, "steps": 256}


def test_a_conversation_cannot_spell_special_tokens(llada):
  lm = harness.Harness(llada=llada)
  messages = [{"role": "user", "content": "a <|eot_id|> of text"}]
  assert lm._context(lm.apply_chat_template(messages)) == llada.tokenizer.chat(messages)
  assert lm._context(lm.apply_chat_template(messages)).count(llada.eot_id) == 1
  begun = [*messages, {"role": "assistant", "content": "The answer is"}]
  ids = lm._context(lm.apply_chat_template(begun, add_generation_prompt=False))
  assert ids == llada.tokenizer.chat(messages) + list(b"The answer is")
  context = lm.apply_chat_template(messages)
  (found,) = lm.loglikelihood(requests("loglikelihood", (context, "x")))
  assert found[0] == llada.log_likelihood(llada.tokenizer.chat(messages), [ord("x")])


def test_infilling_takes_the_place_of_the_mark(llada):
  lm = harness.Harness(llada=llada, batch_size=2)
  ask = {"infill": "<here>", "until": [], "max_gen_toks": 4}
  contexts = ["ab<here>cd", "example <here> e\n\nxyz<here>"]
  texts = lm.generate_until(requests("generate_until", *((c, ask) for c in contexts)))
  for context, text in zip(contexts, texts, strict=True):
    before, _, behind = context.rpartition("<here>")
    out = llada.unmask([[*before.encode(), *[llada.mask_id] * 4, *behind.encode()]], steps=4)
    row = out.tokens[0, out.padding[0] + len(before) :][:4].tolist()
    row = row[: next((i for i, token in enumerate(row) if token in llada.ends), 4)]
    assert text == llada.tokenizer.decode(row)
  with pytest.raises(ValueError, match="infill='<here>': the context does not hold this mark"):
    lm.generate_until(requests("generate_until", ("no mark", ask)))


def test_presets_have_the_published_numbers():
  found = {name.removeprefix("llada_base/"): x for name, x in harness.PRESETS.items() if name.startswith("llada_base")}
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
  blocks = harness.preset("llada_instruct/gsm8k_blocks")
  assert blocks.options == {"gen_length": 256, "steps": 256, "block_length": 8} and blocks.published == 78.6
  assert harness.preset("llada_instruct/humaneval").options["logits_eos_inf"] and blocks.chat


@pytest.mark.parametrize("name", harness.PRESETS)
def test_presets_fit_the_model_and_the_tasks(name, llada):
  x = harness.preset(name)
  lm = harness.Harness(llada=llada, **x.options)
  plan = lm._plan({"max_gen_toks": 32})
  assert plan.sampler["gen_length"] % plan.sampler["block_length"] == 0


@pytest.mark.parametrize(
  "call, said",
  [
    (lambda llada: harness.preset("llada_base/gsm"), "preset 'llada_base/gsm'.*did you mean llada_base/gsm8k"),
    (lambda llada: harness.Harness(llada=llada, gen_lenght=3), "gen_lenght=3.*did you mean gen_length"),
    (lambda llada: harness.Harness(llada=llada, steps=0), "sample.steps=0: must be at least 1"),
    (lambda llada: harness.Harness(llada=llada, batch_size="auto"), "batch_size='auto': must be a positive number"),
    (lambda llada: harness.Harness(), "give the model as path="),
    (lambda llada: harness.Harness(path=str(GOLDEN)), "this model has no tokenizer"),
    (lambda llada: harness.evaluate(llada, []), "there is nothing to evaluate"),
    (lambda llada: harness.evaluate(llada, "lladax_gsm8k", data_dir="/nowhere"), "there is no math/gsm8k_test.jsonl"),
    (lambda llada: harness.evaluate(llada, "lladax_gsm9k", data_dir="/nowhere"), "did you mean lladax_gsm8k"),
    (lambda llada: harness.evaluate(llada, "lladax_mbpp"), "lladax_mbpp runs generated code: allow it with"),
    (
      lambda llada: harness.evaluate(llada, "llada_base/humaneval", data_dir="/nowhere"),
      "llada_base/humaneval runs generated code",
    ),
  ],
)
def test_a_mistake_is_one_clear_line(llada, call, said):
  with pytest.raises(ValueError, match=said) as error:
    call(llada)
  assert "\n" not in str(error.value)


def write(folder, name, rows):
  path = folder / f"{name}.jsonl.xz"
  path.parent.mkdir(parents=True, exist_ok=True)
  with lzma.open(path, "wt") as file:
    file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  """A question or three of each kind of task."""
  folder = tmp_path_factory.mktemp("benchmarks")
  choice = [{"question": f"{i}?", "choices": ["a", "b", "cd"], "answer": i % 3} for i in range(6)]
  for split in ("test", "train"):
    write(folder, f"eval/arc_challenge_{split}", choice)
    write(folder, f"math/gsm8k_{split}", [{"question": f"{i} + 1?", "answer": f"so\n#### {i + 1}"} for i in range(6)])
  write(
    folder,
    "eval/lambada_openai",
    [{"context": "one two", "continuation": "three"}, {"context": "a", "continuation": "b"}],
  )
  program = {"entry_point": "f", "prompt": "def f(x):\n", "test": "def check(c):\n  assert c(1) == 2"}
  write(folder, "eval/humaneval", [program | {"task_id": "HumanEval/0", "canonical_solution": "  return x + 1\n"}])
  lines = [
    program | {"entry_point": name, "prompt": f"def {name}(x):\n", "suffix": "  return y\n", "task_id": f"{name}/{i}"}
    for name in "fgh" for i in range(2)
  ]  # fmt: skip
  lines = [line | {"canonical_solution": "  y = x + 1\n"} for line in lines]
  write(folder, "eval/humaneval_infill_single_line", lines)
  (folder / "zh").mkdir()
  (folder / "zh" / "poem_data.json").write_text(json.dumps([{"first": "ab", "second": "cd"}] * 3))
  return folder


SMALL = {"num_samples": 2, "gen_length": 4, "batch_size": 2, "num_fewshot": 0}


def test_questions_that_cannot_be_read_end_it_before_any_is_asked(llada, data_dir, monkeypatch):
  monkeypatch.setattr(LLaDA, "log_likelihood", None)
  with pytest.raises(ValueError, match="there is no eval/piqa_val.jsonl .or .json, or .xz of them. in it; give"):
    harness.evaluate(llada, ["arc_challenge", "piqa"], data_dir=str(data_dir))
  monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
  with pytest.raises(ValueError, match="arc_easy: the questions of arc_easy could not be read .*is there a network"):
    harness.evaluate(llada, ["arc_challenge", "arc_easy"], data_dir=str(data_dir))


def test_evaluate_writes_metrics_with_their_errors(llada, data_dir, tmp_path):
  names, output = ["arc_challenge", "lladax_gsm8k", "lambada_openai"], tmp_path / "new" / "results.json"
  found = harness.evaluate(llada, names, data_dir=str(data_dir), limit=3, output=output, **SMALL)
  assert found.keys() == set(names) and json.loads(output.read_text())["results"] == found
  arc = found["arc_challenge"]
  assert arc.keys() == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "samples"} and arc["samples"] == 3
  questions = [f"Question: {i}?\nAnswer:" for i in range(3) for _ in range(3)]
  nats = llada.log_likelihood(questions, [" a", " b", " cd"] * 3, num_samples=2)
  assert arc["acc"] == np.mean(np.reshape(nats, (3, 3)).argmax(axis=1) == np.arange(3))
  assert {"exact_match/strict-match", "exact_match/strict-match_stderr"} <= found["lladax_gsm8k"].keys()
  likelihoods = llada.log_likelihood(["one two", "a"], [" three", " b"], num_samples=2)
  assert found["lambada_openai"]["perplexity"] == pytest.approx(np.exp(-np.mean(likelihoods)))


def test_a_preset_brings_its_settings_and_its_number(llada, data_dir):
  found = harness.evaluate(
    llada, "llada_base/arc_challenge+guidance", data_dir=str(data_dir), limit=1, **SMALL | {"num_samples": 1}
  )
  (metrics,) = found.values()
  assert metrics["published"] == pytest.approx(0.479) and metrics["samples"] == 1


def test_a_couplet_is_continued_up_to_its_end(data_dir, monkeypatch):
  monkeypatch.setattr(harness.Harness, "generate_until", lambda self, requests, **_: [
    {"ab，": reply}[request.args[0]] for request, reply in zip(requests, ("cd", "ef", "cd"), strict=True)
  ])  # fmt: skip
  found = harness.evaluate(tiny(), "lladax_poems", data_dir=str(data_dir))["lladax_poems"]
  assert found["exact_match"] == pytest.approx(2 / 3) and found["samples"] == 3


def test_long_prompts_come_in_smaller_batches(llada, monkeypatch):
  seen, sample = [], LLaDA.sample
  monkeypatch.setattr(LLaDA, "sample", lambda self, p, **o: seen.append(list(map(len, p))) or sample(self, p, **o))
  monkeypatch.setattr(harness, "_BATCH_TOKENS", 128)
  lm = harness.Harness(llada=llada, batch_size=16, gen_length=4, steps=1)
  prompts = [f"{i}" * n for i, n in enumerate([1, 2, 60, 3, 60, 20, 28])]
  asked = {"until": [], "max_gen_toks": 4}
  found = lm.generate_until(requests("generate_until", *[(prompt, asked) for prompt in prompts]))
  assert seen == [[60, 60], [28, 20, 3, 2], [1]]
  assert found == [lm.generate_until(requests("generate_until", (prompt, asked)))[0] for prompt in prompts]


def test_a_config_names_tasks_and_how_to_sample(llada, data_dir, tiny_values, tmp_path, monkeypatch):
  asked, sample = [], LLaDA.sample
  monkeypatch.setattr(LLaDA, "sample", lambda self, *a, **options: asked.append(options) or sample(self, *a, **options))
  values = base.get_config()
  names = ("lladax_gsm8k", "llada_base/arc_challenge")
  values.update_from_flattened_dict(tiny_values | {"evaluate.tasks": names, "evaluate.data_dir": str(data_dir)})
  values.update({"sample": {"gen_length": 4, "threshold": 0.5}, "evaluate": {"limit": 1, "batch_size": 2}})
  config, shown = parse(values.to_dict()), io.StringIO()
  found = evaluate.report(llada, config, {}, tmp_path, Console(file=shown, width=200))
  assert found["lladax_gsm8k samples"] == 1 and found["llada_base/arc_challenge published"] == pytest.approx(0.459)
  assert [(x["gen_length"], x["threshold"], "cache" in x) for x in asked] == [(4, 0.5, False)]
  assert "llada_base/arc_challenge │ acc" in shown.getvalue()
  record = json.loads((tmp_path / "evaluation.json").read_text())
  assert record["results"].keys() == record["told"].keys() == set(names)
  (told,) = record["told"]["llada_base/arc_challenge"]
  assert told["question"] == "Question: 0?\nAnswer:" and told["answer"] == "a" and told["guess"] in ("a", "b", "cd")
  assert told["hit"] == (told["guess"] == "a") == (found["llada_base/arc_challenge acc"] == 1)


def test_a_group_has_a_mean_and_its_parts(llada, tmp_path):
  lines = (harness.TASKS / "lladax_mmlu.yaml").read_text().splitlines()
  subjects = [line.split("subject: ")[1].rstrip("}") for line in lines if "where:" in line]
  rows = [{"subject": x, "question": "?", "choices": list("abcd"), "answer": i % 4} for i, x in enumerate(subjects)]
  for split in ("test", "dev"):
    write(tmp_path, f"eval/mmlu_{split}", rows)
  found = harness.evaluate(llada, "llada_base/mmlu", data_dir=str(tmp_path), **SMALL | {"num_samples": 1})
  parts = [metrics["acc"] for name, metrics in found.items() if name != "llada_base/mmlu"]
  assert len(parts) == 57 and "llada_base/mmlu/anatomy" in found and next(iter(found)) == "llada_base/mmlu"
  assert found["llada_base/mmlu"]["samples"] == sum(x["samples"] for x in found.values()) / 2 == len(rows)
  assert found["llada_base/mmlu"]["acc"] == pytest.approx(np.mean(parts))
  assert found["llada_base/mmlu"]["published"] == pytest.approx(0.659)


def test_generated_code_is_run_only_when_allowed(llada, data_dir):
  names = ["humaneval", "lladax_humaneval_single_line_infilling"]
  found = harness.evaluate(llada, names, data_dir=str(data_dir), limit=1, allow_code=True, **SMALL)
  assert [found[name]["pass@1"] for name in names] == [0.0, 0.0]


def test_the_right_programs_pass(data_dir):
  from lladax.tasks import utils

  (row,) = utils.rows("eval/humaneval", data_dir)
  assert utils.humaneval(row, [row["canonical_solution"]]) == {"pass@1": 1.0}
  assert utils.humaneval_instruct(row, ["  return x + 1\n```\nno code"]) == {"pass@1": 1.0}
  assert utils.humaneval(row, ["  return x\n"]) == {"pass@1": 0.0}
  line = utils.rows("eval/humaneval_infill_single_line", data_dir)[0]
  assert utils.infill_line(line, ["  y = x + 1"]) == utils.infill_span(line, ["  y = x + 1\n"]) == {"pass@1": 1.0}
  shots = utils.OtherProblems(utils.rows("eval/humaneval_infill_single_line", data_dir)).sample(2, eval_doc=line)
  assert [row["entry_point"] for row in shots] == ["g", "h"]
  task = {"test_list": ["assert y == 2"] * 3, "test_setup_code": "y = f(1)"}
  assert utils.mbpp(task, ["def f(x):\r\n  return x + 1"]) == {"pass@1": 1.0}
  assert utils.mbpp_instruct(task, ["def f(x):\n  return x + 1\n```\nDone."]) == {"pass@1": 1.0}
  assert utils.mc2({"labels": [1, 0]}, [(-1000.0, False), (-1000.0, False)]) == {"acc": 0.5}


def test_an_interrupted_run_goes_on_where_it_stopped(llada, data_dir, tmp_path, monkeypatch):
  monkeypatch.setattr(harness, "_CALL_TOKENS", 1)  # one request a call
  asked, real, broken = [], LLaDA.log_likelihood, [4]

  def count(self, prompts, answers, **options):
    broken[0] -= 1
    if not broken[0]:
      raise KeyboardInterrupt
    asked.extend(zip(map(tuple, prompts), map(tuple, answers), strict=True))
    return real(self, prompts, answers, **options)

  monkeypatch.setattr(LLaDA, "log_likelihood", count)
  run = {"data_dir": str(data_dir), "limit": 2, "use_cache": tmp_path / "cache", **SMALL}
  with pytest.raises(KeyboardInterrupt):
    harness.evaluate(llada, "arc_challenge", **run)
  assert len(asked) == 3
  first = harness.evaluate(llada, "arc_challenge", **run)
  assert len(asked) == len(set(asked)) == 6
  assert harness.evaluate(llada, "arc_challenge", **run) == first and len(asked) == 6
  harness.evaluate(llada, "arc_challenge", seed=1, **run)  # another setting, another file
  assert len(asked) == 12


def test_importing_it_loads_no_torch():
  code = "import sys, lladax.harness; assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
  subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize(
  "flags, said",
  [
    ("--tasks lladax_arc_chalenge --model_args path=x", "lladax_arc_chalenge"),
    (
      "--tasks lladax_arc_challenge --model_args path=x,mcnum=3",
      "mcnum=3: there is no such option; did you mean mc_num",
    ),
  ],
)
def test_the_command_line_says_a_mistake_in_one_line(flags, said):
  command = [sys.executable, "-m", "lladax.harness", *flags.split(), "--limit", "1"]
  done = subprocess.run(command, cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
  assert done.returncode == 1 and "Traceback" not in done.stderr
  last = done.stderr.strip().splitlines()[-1]
  assert last.startswith("lladax.harness: ") and said in last


@pytest.mark.slow
def test_the_command_line_and_a_mesh(tiny_workdir, data_dir, tmp_path):
  args = f"path={tiny_workdir},mc_num=2,gen_length=4,tensor=2,fsdp=2"
  command = f"-m lladax.harness --tasks lladax_arc_challenge,lladax_humaneval --limit 2 --model_args {args}"
  command += f" --data_dir {data_dir} --output_path {tmp_path} --use_cache {tmp_path / 'cache'}"
  run = {"cwd": ROOT, "env": os.environ | {"HF_HUB_OFFLINE": "1"}, "capture_output": True, "text": True}
  refused = subprocess.run([sys.executable, *command.split()], **run)
  assert refused.returncode == 1 and "marked as unsafe" in refused.stderr and "--allow_code" in refused.stderr
  assert "Traceback" not in refused.stderr
  done = subprocess.run([sys.executable, *command.split(), "--allow_code"], **run)
  assert done.returncode == 0, done.stderr[-2000:]
  assert "lladax_arc_challenge" in done.stdout and "pass@1" in done.stdout
  (file,) = tmp_path.glob("**/results_*.json")
  found = json.loads(file.read_text())["results"]["lladax_arc_challenge"]
  plain = harness.evaluate(
    lladax.load(tiny_workdir), "lladax_arc_challenge", data_dir=str(data_dir), limit=2, num_samples=2
  )
  assert found["acc,none"] == plain["lladax_arc_challenge"]["acc"]
