import json

import pytest
from questions import random_model

from lladax.data import tokenizer
from lladax.evaluation import evaluate
from lladax.inference import load as load_module
from lladax.inference import show
from lladax.mistake import Mistake
from lladax.training import setup

pytestmark = pytest.mark.usefixtures("quick_compiles")


def test_canvases_are_filled_between_two_eos(tiny):
  config = tiny({"evaluate.canvases": ("red and [MASK][MASK] 3", "[MASK]")})
  text = tokenizer.create(config.tokenizer)
  llada = random_model(config, text)
  filled = evaluate.samples(llada, config)
  assert filled.text[0].startswith("red and ") and filled.text[0].endswith(" 3")
  for row, padding, length in zip(filled.tokens, filled.padding, (14, 3), strict=True):
    row = row[padding:]
    assert len(row) == length and row[0] == row[-1] == text.eos_id
    assert text.mask_id not in row
  assert evaluate.samples(llada, tiny()) is None


def test_the_baseline_continues_what_stands_before_the_first_mask(tiny):
  changes = {"objective": "autoregressive", "sample.gen_length": 4}
  config = tiny(changes | {"evaluate.canvases": ("red and [MASK][MASK] 3",)})
  text = tokenizer.create(config.tokenizer)
  filled = evaluate.samples(random_model(config, text), config)
  row = filled.tokens[0, filled.padding[0] :]
  assert text.decode(row[:-4]) == "red and " and len(row) == 12


CHAT = {"data.format": "chat", "data.length": 40, "evaluate.canvases": ("red?",)}
CAUSAL = {"objective": "autoregressive", "evaluate.canvases": ("red [MASK]",)}
LATE = [
  ({"evaluate.canvases": ("[MASK]", "[MASK]" * 99)}, r"canvases\[1\]: its 101 tokens are more than .*=64"),
  (CHAT | {"sample.gen_length": 100}, "sample.gen_length=100 is not a multiple of sample.block_length=32"),
  (CHAT, r"canvases\[0\]: its \d+ tokens and sample.gen_length=64 are more than .*=64"),
  (CHAT | {"model.max_length": 50, "sample.gen_length": None}, "tokens and sample.block_length=32 are more"),
  (CHAT | {"held_out": "g" * 60, "model.max_length": 99}, r"data.length=40: no reply of \d+ conversations fits a row"),
  (CAUSAL | {"sample.gen_length": 60, "model.max_length": 63}, r"canvases\[0\]: its 4 tokens .*gen_length=60 are more"),
  (CAUSAL | {"sample.gen_length": None}, "sample.gen_length=None: a causal model stops at EOS by itself"),
  (CAUSAL | {"sample.guidance_scale": 1.5}, "sample.guidance_scale=1.5: a causal model has no use"),
  (CAUSAL | {"sample.threshold": 0.9}, "sample.threshold=0.9: a causal model has no use"),
  (CAUSAL | {"sample.factor": 0.9}, "sample.factor=0.9: a causal model has no use"),
  (CAUSAL | {"sample.cache": "dual"}, "sample.cache='dual': a causal model has no use"),
  ({"couplets": [{"first": "红" * 30, "second": "绿"}]}, r"poems:.*: a question and its answer take \d+ tokens, more"),
  ({"couplets": [{"first": "红"}]}, "is no JSON list of .* .KeyError: 'second'"),
  ({"couplets": []}, "is no JSON list of .* .ValueError: it is empty"),
  ({"couplets": [{"first": "红", "second": ""}]}, "is no JSON list of .* .ValueError: a line is empty"),
  ({"couplets": {"first": "红", "second": "绿"}}, "is no JSON list of .* .TypeError"),
  ({"evaluate.every": 5, "data.held_out": 0.0}, "evaluate.every=5: data.held_out=0.0 leaves no text"),
  ({"log.profile_first": 5}, "log.profile_first=5, log.profile_last=0: no step lies between"),
  ({"there": "samples.html"}, "samples.html cannot be written: it is a folder"),
  ({"there": "evaluations.jsonl"}, "evaluations.jsonl cannot be written: it is a folder"),
]


def chats(path, reply):
  """A file of conversations, of which some with this reply are held out, and one with another is not."""
  told = [("red?", "r")] * 3 + [(f"{i}?", reply) for i in range(50)]
  path.write_text("".join(json.dumps({"prompt": a, "response": b}) + "\n" for a, b in told))


@pytest.mark.parametrize(("changes", "message"), LATE, ids=range(len(LATE)))
def test_the_end_of_a_run_is_tried_before_its_first_step(tiny, tmp_path, changes, message):
  changes = {"model.max_length": 64} | changes
  if (couplets := changes.pop("couplets", None)) is not None:
    (tmp_path / "couplets.json").write_text(json.dumps(couplets))
    changes["evaluate.tasks"] = (f"poems:{tmp_path / 'couplets.json'}",)
  if folder := changes.pop("there", None):
    (tmp_path / "run" / folder).mkdir(parents=True)
  if changes.get("data.format") == "chat":
    chats(tmp_path / "chats.jsonl", changes.pop("held_out", "g"))
    changes["data.corpus"] = f"files:{tmp_path / 'chats.jsonl'}"
  with pytest.raises(Mistake, match=message) as error:
    setup.prepare(tiny(changes), tmp_path / "run")
  assert "\n" not in str(error.value)
  assert not (tmp_path / "run/config.json").exists()


@pytest.mark.parametrize("name", ["every", "rows", "limit"])
def test_numbers_of_an_evaluation_are_not_negative(tiny, name):
  with pytest.raises(Mistake, match=f"evaluate.{name}=-1: must be at least 0"):
    tiny({f"evaluate.{name}": -1})


def test_a_canvas_has_a_length_of_its_own(tiny):
  config = tiny({"evaluate.canvases": ("red [MASK]",), "sample.gen_length": None})
  text = tokenizer.create(config.tokenizer)
  evaluate.check(config, text, {})
  assert text.mask_id not in evaluate.samples(random_model(config, text), config).tokens


def test_evaluating_and_sampling_are_tried_before_the_parameters_are_read(tiny, tiny_workdir, tmp_path, monkeypatch):
  monkeypatch.setattr(load_module, "load", None)
  with pytest.raises(Mistake, match=r"canvases\[0\]: its 5001 tokens are more than model.max_length=4096"):
    evaluate.evaluate_last(tiny({"evaluate.canvases": ("[MASK]" * 4999,)}), tiny_workdir)
  (tmp_path / "page.html").mkdir()
  for config, prompt, html, message in (
    ({}, "a" * 5000, None, "--prompt='a{30}': its 5000 tokens and sample.gen_length=64 are more than"),
    ({}, "[MASK]" * 5000, None, "its 5000 tokens are more than model.max_length=4096"),
    ({"sample.gen_length": 33}, "red", None, "gen_length=33 is not a multiple of sample.block_length=32"),
    ({}, "red", tmp_path / "page.html", "--html: .*page.html cannot be written: it is a folder"),
    ({}, "red", tmp_path / "nowhere/page.html", "--html: .*page.html cannot be written: there is no folder"),
  ):
    with pytest.raises(Mistake, match=message):
      show.show_samples(tiny(config), tiny_workdir, [prompt], html and str(html))


def test_nothing_to_evaluate_is_said(tiny, tiny_workdir):
  with pytest.raises(ValueError, match="^there is nothing to evaluate: data.held_out=0.0, evaluate.tasks"):
    evaluate.evaluate_last(tiny({"data.held_out": 0.0}), tiny_workdir)


@pytest.mark.parametrize(
  "mode", [evaluate.evaluate_last, lambda c, workdir: show.show_samples(c, workdir, ["a"], None)]
)
def test_the_objective_is_that_of_the_model(tiny, tiny_workdir, mode):
  with pytest.raises(ValueError, match="^objective=autoregressive: .* was trained with diffusion: set that, or leave"):
    mode(tiny(CAUSAL), tiny_workdir)


def test_a_task_that_does_not_fit_the_model_is_said_before_the_first_step(tiny, tmp_path):
  pytest.importorskip("lm_eval")
  for split in ("test", "train"):
    (tmp_path / "math").mkdir(exist_ok=True)
    row = json.dumps({"question": "1 + 1?", "answer": "so\n#### 2"}) + "\n"
    (tmp_path / "math" / f"gsm8k_{split}.jsonl").write_text(row * 6)
  fields = {"evaluate.tasks": ("lladax_gsm8k",), "evaluate.data_dir": str(tmp_path), "model.max_length": 96}
  with pytest.raises(ValueError, match="^lladax_gsm8k: 256 tokens to score or to generate leave no room in model.max"):
    setup.prepare(tiny(fields), tmp_path / "run")
  assert not (tmp_path / "run" / "config.json").exists()
