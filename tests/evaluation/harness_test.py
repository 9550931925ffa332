import io
import json
import pathlib
import shutil

import numpy as np
import pytest
from rich.console import Console

from lladax.config import parse
from lladax.configs import base
from lladax.inference.llada import LLaDA
from lladax.mistake import Mistake

pytest.importorskip("lm_eval")
from questions import tiny, write

from lladax.evaluation import adapter, evaluate, harness

pytestmark = [
  pytest.mark.usefixtures("quick_compiles"),
  pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the harness and of what it imports
]


ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "llada-tiny"


@pytest.mark.parametrize(
  "call, said",
  [
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


SMALL = {"num_samples": 2, "gen_length": 4, "batch_size": 2, "num_fewshot": 0}


@pytest.mark.slow
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


@pytest.fixture
def task(tmp_path, monkeypatch):
  """task(NAME, TEXT) makes a task beside ours."""
  folder = tmp_path / "tasks"
  shutil.copytree(harness.TASKS, folder)
  monkeypatch.setattr(harness, "TASKS", folder)
  return lambda name, text: (folder / f"{name}.yaml").write_text(f"task: {name}\n{text}")


REPEATED = """include: lladax_gsm8k.yaml
num_fewshot: 0
repeats: 16
generation_kwargs: {until: [], max_new_tokens: 6, temperature: 1.0}
filter_list: [{name: each, filter: [{function: take_first_k, k: 16}]}]
process_results: !function seen.process
metric_list: [{metric: different, aggregation: mean, higher_is_better: true}]
"""


def test_the_harness_repeats_a_question(llada, data_dir, task, tmp_path, monkeypatch):
  task("lladax_repeated", REPEATED)
  code = "def process(doc, results):\n  return {'different': len(set(results[0]))}\n"
  (harness.TASKS / "seen.py").write_text(code)
  tokens, sample = [], LLaDA.sample
  monkeypatch.setattr(LLaDA, "sample", lambda self, *a, **o: tokens.append(o["gen_length"]) or sample(self, *a, **o))
  run = {"data_dir": str(data_dir), "limit": 2, "batch_size": 4, "use_cache": tmp_path / "cache"}
  for calls in (8, 8):  # the second time there is nothing to ask
    found = harness.evaluate(llada, "lladax_repeated", **run)["lladax_repeated"]
    assert found["different"] == 16 and tokens == [6] * calls


def test_a_task_that_cannot_be_asked_ends_it_before_the_first_question(llada, data_dir, task, monkeypatch):
  monkeypatch.setattr(LLaDA, "log_likelihood", None)
  text = "include: lladax_gsm8k.yaml\ngeneration_kwargs: {max_gen_toks: %s, do_sample: true, min_p: %s}\n"
  task("lladax_nucleus", text % (8, 0.05))
  task("lladax_long", text % (97, 0))
  task("lladax_seen", "include: lladax_arc_challenge.yaml\ndoc_to_image: [question]\n")
  run = {"data_dir": str(data_dir), "limit": 1}
  with pytest.raises(Mistake, match="^lladax_nucleus: generation_kwargs: min_p=0.05: lladax's sampler has no min_p"):
    harness.check("lladax_nucleus", data_dir=str(data_dir))  # before a training run, too
  with pytest.raises(Mistake, match="^lladax_nucleus: generation_kwargs: min_p=0.05: lladax's sampler has no min_p"):
    harness.evaluate(llada, ["arc_challenge", "lladax_nucleus"], **run)
  with pytest.raises(Mistake, match="^lladax_long: 97 tokens to score or to generate leave no room"):
    harness.evaluate(llada, ["arc_challenge", "lladax_long"], **run)
  with pytest.raises(Mistake, match="^lladax_seen: its questions are not of text alone"):
    harness.evaluate(llada, ["arc_challenge", "lladax_seen"], **run)


@pytest.mark.parametrize(
  ("name", "content", "said"),
  [
    ("gsm8k_test.jsonl", b'{"question": "1?"\n', "gsm8k_test.jsonl cannot be read: "),
    ("gsm8k_test.jsonl", b"\xff\xfe", "gsm8k_test.jsonl cannot be read: "),
    ("gsm8k_test.jsonl.xz", b"not xz", "gsm8k_test.jsonl.xz cannot be read: "),
    ("gsm8k_test.json", b'{"question": "1?"}', "gsm8k_test.json: must hold questions that are objects"),
    ("gsm8k_test.jsonl", b"\n", "there are no questions in math/gsm8k_test"),
  ],
)
def test_a_broken_benchmark_is_named(tmp_path, name, content, said):
  (tmp_path / "math").mkdir()
  (tmp_path / "math" / name).write_bytes(content)
  with pytest.raises(Mistake, match=said):
    harness.check("lladax_gsm8k", data_dir=str(tmp_path))


def test_a_preset_brings_its_settings_and_its_number(llada, data_dir):
  found = harness.evaluate(
    llada, "llada_base/arc_challenge+guidance", data_dir=str(data_dir), limit=1, **SMALL | {"num_samples": 1}
  )
  (metrics,) = found.values()
  assert metrics["published"] == pytest.approx(0.479) and metrics["samples"] == 1


def test_a_couplet_is_continued_up_to_its_end(data_dir, monkeypatch):
  monkeypatch.setattr(adapter.Harness, "generate_until", lambda self, requests, **_: [
    {"ab，": reply}[request.args[0]] for request, reply in zip(requests, ("cd", "ef", "cd"), strict=True)
  ])  # fmt: skip
  found = harness.evaluate(tiny(), "lladax_poems", data_dir=str(data_dir))["lladax_poems"]
  assert found["exact_match"] == pytest.approx(2 / 3) and found["samples"] == 3


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


def test_generated_code_is_run_only_when_allowed(llada, data_dir, monkeypatch):
  names = ["humaneval", "lladax_humaneval_single_line_infilling"]
  with pytest.raises(Mistake, match="^humaneval runs generated code: allow it with allow_code=True"):
    harness.evaluate(llada, names, data_dir=str(data_dir), limit=1, **SMALL)
  for text, passed in (("  return x + 1", [1.0, 1.0]), ("  y = x + 1", [0.0, 1.0]), ("  return x", [0.0, 0.0])):
    monkeypatch.setattr(adapter.Harness, "generate_until", lambda self, asked, text=text, **_: [text] * len(asked))
    found = harness.evaluate(llada, names, data_dir=str(data_dir), limit=1, allow_code=True, **SMALL)
    assert [found[name]["pass@1"] for name in names] == passed


def test_an_interrupted_run_goes_on_where_it_stopped(llada, data_dir, tmp_path, monkeypatch):
  monkeypatch.setattr(adapter, "_CALL_TOKENS", 1)  # one request a call
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
