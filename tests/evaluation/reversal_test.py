import json
import lzma
import pathlib
import shutil
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lladax import autoregressive, diffusion
from lladax.data import facts, tokenizer
from lladax.data.tokenizer import TokenizerConfig
from lladax.evaluation import evaluate, reversal
from lladax.inference.llada import LLaDA

ROOT = pathlib.Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("quick_compiles")


def test_the_facts():
  found = facts.facts()
  assert len(found) == len({fact.a for fact in found}) == len({fact.b for fact in found}) == 246
  assert 0.25 < sum(fact.taught for fact in found) / len(found) < 0.45
  told = facts.documents()
  assert len(told) == len(set(told)) == 246 + sum(fact.taught for fact in found)
  for fact in found:
    assert fact.forward in told and (fact.backward in told) == fact.taught
    assert fact.forward.index(fact.a) < fact.forward.rindex(fact.b)


def test_a_question_is_a_sentence_with_a_gap():
  told = {fact.forward: fact for fact in facts.facts()}
  questions = reversal.of_facts()
  for q in questions:
    sentence = q.before + q.answer + q.after
    if q.direction == "backward, other sentence":
      assert sentence not in facts.documents()
      continue
    assert not told[sentence].taught
    assert q.answer.strip() == (told[sentence].b if q.direction == "forward" else told[sentence].a)
    assert q.answer.strip() not in q.prompt
  directions = [q.direction for q in questions]
  assert len({directions.count(x) for x in set(directions)}) == 1


def test_couplets(tmp_path):
  path = tmp_path / "poems.json.xz"
  path.write_bytes(lzma.compress(json.dumps([{"first": "白日依山尽", "second": "黄河入海流"}]).encode()))
  forward, backward = reversal.of_couplets(path)
  for q in (forward, backward):
    assert q.before + q.answer + q.after == "白日依山尽，黄河入海流。"
  assert (forward.answer, backward.answer) == ("黄河入海流", "白日依山尽")
  with pytest.raises(FileNotFoundError, match="evaluate.tasks: poems:.*nothing.json: no such file"):
    reversal.of_couplets(tmp_path / "nothing.json")


def test_couplets_in_a_conversation_are_asked_in_the_published_words(tmp_path):
  path = tmp_path / "poems.json"
  path.write_text(json.dumps([{"first": "白日依山尽", "second": "黄河入海流"}]))
  questions = reversal.of_couplets(path, talks=True)
  assert [(q.direction, q.prompt, q.answer) for q in questions] == [
    ("forward", "白日依山尽的下一句是什么？ 直接输出句子即可。", "黄河入海流"),
    ("backward", "黄河入海流的上一句是什么？ 直接输出句子即可。", "白日依山尽"),
  ]

  class Replying(Knowing):
    def sample(self, conversations, **options):
      assert options == {"gen_length": 28, "block_length": 28, "steps": 28, "logits_eos_inf": True}
      assert conversations == [[{"role": "user", "content": q.prompt}] for q in questions]
      return types.SimpleNamespace(text=["下一句是“黄河入海流”。", "黄河入海流"])

  metrics, told = reversal.run(Replying(False, []), questions)
  assert (metrics["forward"], metrics["backward"]) == (1.0, 0.0)  # the line stands in the reply, or it does not
  assert [x["guess"] for x in told] == ["下一句是“黄河入海流”。", "黄河入海流"]


def test_tasks_of_one_kind_are_told_apart_by_their_files():
  assert evaluate.short_names(["reversal", "poems:a/couplets.json.xz"]) == {
    "reversal": "reversal", "poems:a/couplets.json.xz": "poems"
  }  # fmt: skip
  assert list(evaluate.short_names(["poems:a/x.json", "poems:y.json"]).values()) == ["poems:x", "poems:y"]


@pytest.mark.slow
def test_both_families_side_by_side(tiny_flags, tmp_path):
  couplets = tmp_path / "couplets.json"
  couplets.write_text(json.dumps([{"first": "red and", "second": "red 1"}, {"first": "blue", "second": "blue 2"}]))
  tasks = f"('reversal', 'poems:{couplets}', 'poems:{shutil.copy(couplets, tmp_path / 'again.json')}')"
  command = [sys.executable, "benchmarks/reversal.py", *tiny_flags, f"--workdir={tmp_path}", "--config.steps=6"]
  bad = subprocess.run([*command, "--config.steps=2"], cwd=ROOT, capture_output=True, text=True)
  assert bad.returncode == 1 and bad.stderr.startswith("reversal: optimizer.schedule: its pieces take 5 steps")
  done = subprocess.run(
    [*command, f"--config.evaluate.tasks={tasks}"], cwd=ROOT,
    capture_output=True, text=True, check=True,
  )  # fmt: skip
  found = json.loads((tmp_path / "reversal.json").read_text())["metrics"]
  asked = [f"{direction}, reversal" for direction in ("forward", "backward", "backward, other sentence")]
  asked += [f"{direction}, poems:{file}" for file in ("couplets", "again") for direction in ("forward", "backward")]
  for family in ("diffusion", "autoregressive"):
    assert list(found[family]) == [x + error for x in asked for error in ("", "_stderr")]
    assert (tmp_path / family / "evaluation.html").exists()
  assert [line.split("|")[1].strip() for line in done.stdout.splitlines()[-len(asked) :]] == asked
  assert {f"reversal.{kind}" for kind in ("md", "png", "svg", "json")} <= {x.name for x in tmp_path.iterdir()}


def test_unknown_tasks(tiny):
  for name in ("reversals", "poems", "poems:"):
    with pytest.raises(ValueError, match=f"evaluate.tasks: '{name}' is no reversal test: use reversal"):
      evaluate.task(None, tiny(), name)


class Knowing:
  """A model that knows some sentences by heart: `sample` continues and `unmask` fills in as they go."""

  mask_id, eos_id = 257, 256

  def __init__(self, causal, sentences):
    self.text = tokenizer.create(TokenizerConfig(kind="bytes"))
    self.tokenizer, self.mask_id, self.eos_id = self.text, self.text.mask_id, self.text.eos_id
    self.model = type("model", (), {"objective": autoregressive.Causal() if causal else diffusion.Masked(), "block": 0})
    self.known = [[*self.text.encode(x), self.eos_id] for x in sentences]

  def unmask(self, rows, steps):
    width = max(map(len, rows))
    tokens, padding = np.zeros((len(rows), width), int), np.array([width - len(row) for row in rows])
    for i, row in enumerate(rows):
      fits = [x for x in self.known if len(x) == len(row) and all(a in (b, self.mask_id) for a, b in zip(row, x))]  # noqa: B905
      tokens[i, padding[i] :] = fits[0] if fits else row
    return type("out", (), {"tokens": tokens, "padding": padding})

  def sample(self, prompts, gen_length, block_length, steps):
    tokens = np.zeros((len(prompts), 300), int)
    for i, prompt in enumerate(prompts):
      fits = [x[len(prompt) :] for x in self.known if x[: len(prompt)] == prompt]
      answer = (fits[0] if fits else [])[:gen_length]
      tokens[i, 300 - gen_length : 300 - gen_length + len(answer)] = answer
    return type("out", (), {"tokens": tokens})


@pytest.mark.parametrize("causal", [False, True])
def test_who_knows_the_sentences_by_heart(causal):
  told = Knowing(causal, facts.documents())
  metrics, answers = reversal.run(told, reversal.of_facts(), batch_size=50)
  assert metrics["forward"] == 1.0 and metrics["forward_stderr"] == 0.0
  assert metrics["backward"] == (0.0 if causal else 1.0)
  assert metrics["backward, other sentence"] == 0.0  # these sentences were not told
  everything = Knowing(causal, [*facts.documents(), *(fact.backward for fact in facts.facts())])
  metrics, answers = reversal.run(everything, reversal.of_facts(), batch_size=50)
  assert metrics["backward"] == metrics["backward, other sentence"] == 1.0
  assert all(x["hit"] and x["guess"] == x["answer"] for x in answers)


@pytest.mark.parametrize("objective", ["diffusion", "autoregressive"])
def test_a_random_model_is_asked(tiny, objective):
  config = tiny({"objective": objective, "evaluate.tasks": ("reversal",), "evaluate.batch_size": 16})
  text = tokenizer.create(config.tokenizer)
  c = config.model.__class__(**(vars(config.model) | {"V": text.rows}))
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32), jax.eval_shape(c.init, jax.random.key(0))
  )
  llada = LLaDA(c, params, text, text.mask_id, text.eos_id, text.vocab_size)
  questions = reversal.of_facts()[:48]
  metrics, told = reversal.run(llada, questions, 16)
  assert len(told) == 48 and all(0 <= value <= 1 for value in metrics.values())
  assert [x["answer"] for x in told] == [q.answer.strip() for q in questions]
  assert sum(x["hit"] for x in told) < 5
