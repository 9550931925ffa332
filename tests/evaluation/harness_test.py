import contextlib
import dataclasses
import io
import json
import lzma
import os
import pathlib
import pickle
import shutil
import sqlite3
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from rich.console import Console
from text_in_place_test import make, prepend

import lladax
from lladax.config import parse
from lladax.configs import base
from lladax.data import tokenizer
from lladax.inference.llada import LLaDA
from lladax.mistake import Mistake
from lladax.model.mask_predictor import MaskPredictorConfig

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.model import CachingLM  # noqa: E402

from lladax import config as configs  # noqa: E402
from lladax import harness as door  # noqa: E402
from lladax.devices import distributed  # noqa: E402
from lladax.evaluation import adapter, evaluate, harness, presets
from lladax.storage import metrics

pytestmark = [
  pytest.mark.usefixtures("quick_compiles"),
  pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the harness and of what it imports
]

ROOT = pathlib.Path(__file__).parents[2]
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
  where = [("task", 10 + i, 1) for i in range(len(arguments))]
  rows = zip(where, arguments, strict=True)
  return [Instance(request_type=kind, doc={}, arguments=x, idx=0, metadata=metadata) for metadata, x in rows]


def test_rows_of_a_file_that_was_edited_are_read_anew(tmp_path):
  from lladax.evaluation.tasks import local

  for answer in "ab":  # as long as before
    (tmp_path / "x.jsonl").write_text(json.dumps({"answer": answer}) + "\n")
    assert local.rows("x", tmp_path) == [{"answer": answer}]
  (tmp_path / "y.json").write_text('[{"answer": "c"}]')
  assert local.rows("y", tmp_path) == [{"answer": "c"}]


PAIRS = [("Question: one\nAnswer:", " two"), ("", "ab"), ("Question:", " x"), ("a", " three or four"), ("b ", "c")]


def test_likelihoods_are_the_models_own(llada):
  lm = adapter.Harness(llada=llada, mc_num=5, seed=3)
  found = lm.loglikelihood(requests("loglikelihood", *PAIRS))
  prompts, answers = [*(p for p, _ in PAIRS[:-1]), "b"], [*(a for _, a in PAIRS[:-1]), " c"]
  nats = llada.log_likelihood(prompts, answers, num_samples=5, seed=3)
  assert found == [(value, False) for value in nats]
  backwards = lm.loglikelihood(requests("loglikelihood", *PAIRS[::-1]))
  np.testing.assert_allclose([x for x, _ in backwards[::-1]], nats, rtol=1e-5)


def test_likelihoods_with_guidance_heed_it(llada):
  pairs = requests("loglikelihood", *PAIRS[:1])
  ((guided, _),) = adapter.Harness(llada=llada, num_samples=4, cfg=1.5).loglikelihood(pairs)
  assert guided == llada.log_likelihood(*PAIRS[0], num_samples=4, guidance_scale=1.5)
  assert guided != llada.log_likelihood(*PAIRS[0], num_samples=4)


@pytest.mark.parametrize("causal", [False, True])
def test_greedy_answers_are_told_from_others(causal):
  llada = tiny(causal=True) if causal else tiny()
  lm = adapter.Harness(llada=llada, num_samples=1, greedy=True, batch_size=2)
  prompt = list(b"abc")
  if causal:
    greedy = llada.sample([prompt], gen_length=3).tokens[0, -3:].tolist()
  else:
    greedy = llada.unmask([[*prompt, *[llada.mask_id] * 3]], steps=3).tokens[0, -3:].tolist()
  other = greedy[:2] + [(greedy[2] + 1) % 256]
  assert lm._are_greedy([prompt] * 3, [greedy, other, greedy]) == [True, False, True]
  # The same through text: contexts whose greedy answer of one token is a letter, and another letter.
  contexts = list("abcdefghijklmnopqrstuvwxyz")
  tokens = llada.sample(contexts, gen_length=1, block_length=1, steps=1).tokens[:, -1].tolist()
  letters = [(context, token) for context, token in zip(contexts, tokens, strict=True) if 32 < token < 127][:3]
  pairs = [(c, chr(x)) for c, token in letters for x in (token, token ^ 1)]
  assert pairs and [hit for _, hit in lm.loglikelihood(requests("loglikelihood", *pairs))] == [True, False] * len(
    letters
  )


def test_a_causal_model_is_exact():
  llada = tiny(causal=True)
  found = adapter.Harness(llada=llada).loglikelihood(requests("loglikelihood", ("ab", "cde")))
  assert found == [(llada.log_likelihood("ab", "cde"), False)]
  lm = adapter.Harness(llada=llada, gen_length=4)
  (text,) = lm.generate_until(requests("generate_until", ("ab", {"until": []})))
  assert text == llada.sample("ab", gen_length=4).text[0]


def test_rolling_cuts_long_texts_into_windows(llada):
  lm, text = adapter.Harness(llada=llada, num_samples=2), "0123456789" * 20
  found = lm.loglikelihood_rolling(requests("loglikelihood_rolling", (text,), ("ab",), ("",)))
  windows = [list(text[i : i + 96].encode()) for i in (0, 96, 192)]
  nats = llada.log_likelihood([[]] * 4, [*windows, list(b"ab")], num_samples=2)
  np.testing.assert_allclose(found, [sum(nats[:3]), nats[3], 0.0], rtol=1e-5)


def test_prompts_too_long_lose_their_start(llada, caplog):
  lm = adapter.Harness(llada=llada, num_samples=1)
  (found,) = lm.loglikelihood(requests("loglikelihood", ("x" * 100 + "y" * 94, "ab")))
  assert found[0] == llada.log_likelihood("y" * 94, "ab", num_samples=1)
  assert "such prompts lose their start" in caplog.text
  with pytest.raises(ValueError, match="no room in model.max_length=96"):
    lm.generate_until(requests("generate_until", ("a", {"max_gen_toks": 96})))


PROMPTS = ["ab", "Question: a longer one\nAnswer:", "", "c" * 40, "de"]


def test_generation_ends_at_stop_strings_and_max_gen_toks(llada):
  ask = {"until": [], "max_gen_toks": 12, "do_sample": False, "temperature": 0.0}
  lm = adapter.Harness(llada=llada, batch_size=2, steps=3)
  texts = lm.generate_until(requests("generate_until", *((p, ask) for p in PROMPTS)))
  for prompt, text in zip(PROMPTS, texts, strict=True):
    assert text == llada.sample(prompt, gen_length=12, block_length=12, steps=3).text[0]
  one_by_one = adapter.Harness(llada=llada, batch_size=1, steps=3)
  backwards = one_by_one.generate_until(requests("generate_until", *((p, ask) for p in PROMPTS[::-1])))
  assert backwards[::-1] == texts
  at = next(i for i, text in enumerate(texts) if len(text) > 2)
  stop = texts[at][1:2]
  (cut,) = lm.generate_until(requests("generate_until", (PROMPTS[at], ask | {"until": ["never", stop]})))
  assert cut == texts[at][: texts[at].index(stop)]


def test_repeats_are_draws_of_their_own_whatever_the_batch(llada):
  ask = {"until": [], "max_gen_toks": 8, "do_sample": True}
  asked = requests("generate_until", ("ab", ask)) * 16 + requests("generate_until", ("a longer prompt", ask)) * 3
  lm = adapter.Harness(llada=llada, batch_size=16, steps=4)
  first, again = lm.generate_until(asked), lm.generate_until(asked)
  assert len({*first, *again}) == 2 * len(asked)
  for batch_size in (1, 4, 16):
    assert adapter.Harness(llada=llada, batch_size=batch_size, steps=4).generate_until(asked) == first
  other = adapter.Harness(llada=llada, batch_size=16, steps=4, seed=1).generate_until(asked)
  assert not {*other} & {*first, *again}


@pytest.mark.parametrize("causal", [False, True])
def test_other_ways_to_generate_draw_for_themselves_too(causal):
  llada, ask = tiny(causal=causal), {"max_gen_toks": 4, "temperature": 1.0}
  asked = requests("generate_until", ("ab<here>cd", ask | {"infill": "<here>"} if not causal else ask)) * 5
  found = [adapter.Harness(llada=llada, batch_size=size).generate_until(asked) for size in (1, 4)]
  assert len({*found[0]}) == 5 and found[0] == found[1]


def test_what_draws_nothing_has_one_answer_and_what_waits_at_random_has_many(llada, monkeypatch):
  seeds, sample = [], LLaDA.sample
  monkeypatch.setattr(LLaDA, "sample", lambda self, *a, **o: seeds.extend(o["seed"]) or sample(self, *a, **o))
  for asked, several in (({"temperature": 0.0}, False), ({"remasking": "random"}, True)):
    seeds.clear()
    lm = adapter.Harness(llada=llada, batch_size=4, steps=2)
    lm.generate_until(requests("generate_until", ("ab", {"max_gen_toks": 4} | asked)) * 4)
    assert len({*seeds}) == (4 if several else 1) and all(0 <= seed < 2**31 for seed in seeds)


def test_the_length_is_the_tasks_where_no_option_gives_it():
  llada = tiny(max_length=512)
  plan = adapter.Harness(llada=llada, block_length=8)._plan({"max_gen_toks": 20, "until": "x"})
  assert plan.sampler["gen_length"] == plan.sampler["steps"] == 24 and plan.most == 20 and plan.until == ["x"]
  plan = adapter.Harness(llada=llada, gen_length=64, block_length=32, steps=16)._plan({"max_gen_toks": 20})
  assert (plan.sampler["gen_length"], plan.most, plan.sampler["steps"]) == (64, 64, 16)
  plan = adapter.Harness(llada=llada)._plan({})
  lengths = {"gen_length": 256, "block_length": 256, "steps": 256}
  assert plan.sampler == {"temperature": 0.0, "remasking": "low_confidence"} | lengths
  plan = adapter.Harness(llada=llada, temperature=0.5, seed=3)._plan({"temperature": 0.7, "seed": 2})
  assert (plan.sampler["temperature"], plan.seed) == (0.5, 3)


@pytest.mark.parametrize(
  ("asked", "understood"),
  [
    ({"max_new_tokens": 7}, {"max_gen_toks": 7}),
    ({"max_tokens": 7}, {"max_gen_toks": 7}),
    ({"max_completion_tokens": 7, "until": None}, {"max_gen_toks": 7}),
    ({"until": ["a", ""]}, {"until": ["a"]}),
    ({"temperature": 0.7}, {"temperature": 0.7}),
    ({"do_sample": True}, {"temperature": 1.0}),
    ({"do_sample": True, "temperature": 0.2, "top_p": 1.0, "num_beams": 1}, {"temperature": 0.2}),
    ({"do_sample": False, "temperature": 0.0, "top_p": 0.95, "top_k": 50}, {}),  # nothing is drawn
    ({"infill": "<here>", "steps": 3}, {"infill": "<here>", "steps": 3}),
  ],
)
def test_a_request_is_understood_as_the_harness_understands_it(asked, understood):
  assert adapter.understood(asked) == {"until": [], "max_gen_toks": 256, "temperature": 0.0} | understood


@pytest.mark.parametrize(
  ("asked", "said"),
  [
    ({"top_p": 0.9, "do_sample": True}, "top_p=0.9: lladax's sampler has no top_p; set it to 1"),
    ({"top_k": 50, "temperature": 1}, "top_k=50: lladax's sampler has no top_k; set it to 0"),
    ({"num_beams": 4}, "num_beams=4: lladax's sampler has no num_beams; set it to 1"),
    ({"repetition_penalty": 1.2}, "repetition_penalty=1.2: lladax's sampler has no"),
    ({"max_gen_tok": 4}, "max_gen_tok=4: there is no such field; did you mean max_gen_toks"),
    ({"stop": ["a"]}, "stop=.'a'.: there is no such field; did you mean until"),
    ({"max_length": 99}, "max_length=99: there is no such field; did you mean max_gen_toks"),
    ({"max_new_tokens": 0}, "max_new_tokens=0: must be a positive number"),
    ({"max_gen_toks": "many"}, "max_gen_toks='many': must be a positive number"),
    ({"temperature": "hot"}, "temperature='hot': must be a number from 0"),
    ({"do_sample": "yes"}, "do_sample='yes': must be true or false"),
    ({"until": 3}, "until=3: must be a list of strings"),
    ({"remasking": "lowest"}, "remasking='lowest': use one of"),
    ({"max_gen_toks": 97}, "97 tokens to score or to generate leave no room in model.max_length=96"),
  ],
)
def test_what_is_not_understood_is_refused_before_the_first_pass(llada, monkeypatch, asked, said):
  monkeypatch.setattr(LLaDA, "sample", None)
  lm = adapter.Harness(llada=llada, steps=4)
  good = ("ab", {"max_gen_toks": 4})
  with pytest.raises(Mistake, match=f"task task, question 11: .*{said}") as error:
    lm.generate_until(requests("generate_until", good, ("ab", {"max_gen_toks": 8} | asked)))
  assert "\n" not in str(error.value)


def test_what_a_request_says_twice_is_said_once(caplog):
  logger = "lm_eval.models.utils"
  with caplog.at_level("WARNING", logger):
    for _ in range(3):
      assert adapter.understood({"do_sample": False, "temperature": 0.625})["temperature"] == 0.0
      assert adapter.understood({"max_tokens": 5, "max_gen_toks": 6})["max_gen_toks"] == 6
  said = [record.getMessage() for record in caplog.records if record.name == logger]
  assert len(said) == 2 and "0.625" in said[0] and "max_tokens" in said[1]


def test_every_task_of_the_harness_is_understood_or_refused_by_name():
  """A new version of the harness, with a field that no task had before, fails here."""
  import lm_eval.tasks

  class Loader(yaml.CSafeLoader if hasattr(yaml, "CSafeLoader") else yaml.SafeLoader):
    pass

  Loader.add_multi_constructor("!", lambda loader, suffix, node: None)
  known, refused = 0, []
  for path in pathlib.Path(lm_eval.tasks.__file__).parent.rglob("*"):
    if path.suffix not in ("", ".yaml", ".yml") or not path.is_file() or "generation_kwargs" not in path.read_text():
      continue
    try:
      adapter.understood(yaml.load(path.read_text(), Loader).get("generation_kwargs") or {})
      known += 1
    except Mistake as error:
      refused.append(str(error))
  assert known > 400 and {said.partition(";")[0] for said in refused} == {
    "generation_kwargs: top_p=0.95: lladax's sampler has no top_p",
    "generation_kwargs: num_beams=10: lladax's sampler has no num_beams",
  }


def test_text_stands_where_it_stands(llada):
  """With Llama-2's dummy prefix: an answer behind its prompt, a suffix behind its mask, a text behind its context."""
  text = make(prepend)
  model = dataclasses.replace(llada.model, V=text.rows)
  lm = adapter.Harness(llada=dataclasses.replace(llada, model=model, tokenizer=text))
  spelled = lambda ids: [text.piece(i) for i in ids]  # noqa: E731
  prompt, answer = lm._pair("The capital of France is ", "Paris.")
  assert prompt == text.encode("The capital of France is") and spelled(answer) == [" Paris", "."]
  context = lm.apply_chat_template([{"role": "user", "content": "a"}])
  assert spelled(lm._pair(context, "Paris")[1]) == list("Paris")
  begun = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "The"}]
  assert spelled(lm._context(lm.apply_chat_template(begun, add_generation_prompt=False)))[-3:] == list("The")
  _, _, behind = lm._split("The <gap> of France", lm._plan({"infill": "<gap>", "max_gen_toks": 2}))
  assert spelled(behind) == [" of", " France"]
  lm._fill = lambda rows, plan, seeds: [text.encode(" Paris", begins=False)] * len(rows)
  assert lm.generate_until(requests("generate_until", ("The capital of France is", {"max_gen_toks": 2}))) == [" Paris"]


def test_a_conversation_cannot_spell_special_tokens(llada):
  lm = adapter.Harness(llada=llada)
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
  lm = adapter.Harness(llada=llada, batch_size=2)
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
    (lambda llada: adapter.Harness(llada=llada, gen_lenght=3), "gen_lenght=3.*did you mean gen_length"),
    (lambda llada: adapter.Harness(llada=llada, steps=0), "sample.steps=0: must be at least 1"),
    (lambda llada: adapter.Harness(llada=llada, batch_size="auto"), "batch_size='auto': must be a positive number"),
    (lambda llada: adapter.Harness(llada=llada, num_samples=0), "num_samples=0: must be a positive number"),
    (lambda llada: adapter.Harness(llada=llada, mc_num=2.5), "num_samples=2.5: must be a positive number"),
    (lambda llada: adapter.Harness(llada=llada, greedy="no"), "greedy='no': must be True or False"),
    (lambda llada: adapter.Harness(), "give the model as path="),
    (lambda llada: adapter.Harness(path=str(GOLDEN)), "this model has no tokenizer"),
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


def test_an_empty_answer_is_scored_and_said(llada, caplog):
  pairs = requests("loglikelihood", ("ab", "c"), ("ab", ""), ("", "de"), ("f", ""))
  found = adapter.Harness(llada=llada, num_samples=3).loglikelihood(pairs)
  nats = llada.log_likelihood(["ab", ""], ["c", "de"], num_samples=3)
  assert found == [(nats[0], False), (0.0, False), (nats[1], False), (0.0, False)]
  said = "task task, question 11, choice 0: the answer '' is empty, and 1 more like it: log p of nothing is 0"
  assert [record.getMessage() for record in caplog.records] == [said]
  greedy = adapter.Harness(llada=llada, num_samples=3, greedy=True).loglikelihood(pairs[1:2])
  assert greedy == [(0.0, True)]


def test_a_mistake_in_a_request_names_its_task_and_question(llada, monkeypatch):
  monkeypatch.setattr(LLaDA, "log_likelihood", None)
  lm = adapter.Harness(llada=llada)
  said = "task task, question 11, choice 0: 97 tokens to score or to generate leave no room"
  with pytest.raises(Mistake, match=said):
    lm.loglikelihood(requests("loglikelihood", ("a", "b"), ("a", "x" * 97)))
  with pytest.raises(Mistake, match="task task, question 10: infill='<here>': the context does not hold this mark"):
    lm.generate_until(requests("generate_until", ("no mark", {"infill": "<here>", "max_gen_toks": 4})))


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
  text = "include: lladax_gsm8k.yaml\ngeneration_kwargs: {max_gen_toks: %s, do_sample: true, top_p: %s}\n"
  task("lladax_nucleus", text % (8, 0.95))
  task("lladax_long", text % (97, 1.0))
  task("lladax_seen", "include: lladax_arc_challenge.yaml\ndoc_to_image: [question]\n")
  run = {"data_dir": str(data_dir), "limit": 1}
  with pytest.raises(Mistake, match="^lladax_nucleus: generation_kwargs: top_p=0.95: lladax's sampler has no top_p"):
    harness.check("lladax_nucleus", data_dir=str(data_dir))  # before a training run, too
  with pytest.raises(Mistake, match="^lladax_nucleus: generation_kwargs: top_p=0.95: lladax's sampler has no top_p"):
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


def test_long_prompts_come_in_smaller_batches(llada, monkeypatch):
  seen, sample = [], LLaDA.sample
  monkeypatch.setattr(LLaDA, "sample", lambda self, p, **o: seen.append(list(map(len, p))) or sample(self, p, **o))
  monkeypatch.setattr(adapter, "_BATCH_TOKENS", 128)
  lm = adapter.Harness(llada=llada, batch_size=16, gen_length=4, steps=1)
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


def test_generated_code_is_run_only_when_allowed(llada, data_dir, monkeypatch):
  names = ["humaneval", "lladax_humaneval_single_line_infilling"]
  with pytest.raises(Mistake, match="^humaneval runs generated code: allow it with allow_code=True"):
    harness.evaluate(llada, names, data_dir=str(data_dir), limit=1, **SMALL)
  for text, passed in (("  return x + 1", [1.0, 1.0]), ("  y = x + 1", [0.0, 1.0]), ("  return x", [0.0, 0.0])):
    monkeypatch.setattr(adapter.Harness, "generate_until", lambda self, asked, text=text, **_: [text] * len(asked))
    found = harness.evaluate(llada, names, data_dir=str(data_dir), limit=1, allow_code=True, **SMALL)
    assert [found[name]["pass@1"] for name in names] == passed


def test_the_right_programs_pass(data_dir):
  from lladax.evaluation.tasks import local

  (row,) = local.rows("eval/humaneval", data_dir)
  assert local.humaneval(row, [row["canonical_solution"]]) == {"pass@1": 1.0}
  assert local.humaneval_instruct(row, ["  return x + 1\n```\nno code"]) == {"pass@1": 1.0}
  assert local.humaneval(row, ["  return x\n"]) == {"pass@1": 0.0}
  line = local.rows("eval/humaneval_infill_single_line", data_dir)[0]
  assert local.infill_line(line, ["  y = x + 1"]) == local.infill_span(line, ["  y = x + 1\n"]) == {"pass@1": 1.0}
  shots = local.OtherProblems(local.rows("eval/humaneval_infill_single_line", data_dir)).sample(2, eval_doc=line)
  assert [row["entry_point"] for row in shots] == ["g", "h"]
  task = {"test_list": ["assert y == 2"] * 3, "test_setup_code": "y = f(1)"}
  assert local.mbpp(task, ["def f(x):\r\n  return x + 1"]) == {"pass@1": 1.0}
  assert local.mbpp_instruct(task, ["def f(x):\n  return x + 1\n```\nDone."]) == {"pass@1": 1.0}
  assert local.mc2({"labels": [1, 0]}, [(-1000.0, False), (-1000.0, False)]) == {"acc": 0.5}


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


def test_importing_it_loads_no_torch():
  code = "import sys, lladax.harness; assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
  subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.fixture
def command(monkeypatch, capsys):
  """command(FLAGS) -> (exit code, what it wrote to standard error), in this process."""
  import lm_eval.tasks
  import lm_eval.utils
  from lm_eval.api import model

  def state():
    return lm_eval.tasks.TaskManager, model.CachingLM, sys.argv, dict(os.environ)

  monkeypatch.setattr(lm_eval.utils, "setup_logging", lambda: None)
  monkeypatch.setattr(distributed.logging, "basicConfig", lambda **_: None)
  monkeypatch.setattr(distributed.logging, "raiseExceptions", False)  # of handlers that other tests have left behind
  monkeypatch.setenv(harness.DATA, "")

  def run(flags):
    capsys.readouterr()
    before = state()
    code = distributed.guard(door.main, ["lladax.harness", *flags.split()], "lladax.harness")
    assert state() == before, "what one command asked another task of this process would get"
    return code, capsys.readouterr().err

  return run


@pytest.mark.parametrize(
  ("flags", "said"),
  [
    ("--limit 1", "--tasks is missing: name some"),
    ("--tasks lladax_arc_chalenge", "task 'lladax_arc_chalenge': there is no such task; did you mean lladax_arc_chall"),
    ("--tasks lladax_arc_challenge --model_args path=x,num_samples=0", "num_samples=0: must be a positive number"),
    ("--tasks lladax_arc_challenge --data_dir /nowhere", "--data_dir /nowhere: there is no such folder"),
    ("--tasks lladax_arc_challenge", "data_dir='': there is no eval/arc_challenge_test.jsonl"),
    ("--tasks lladax_arc_challenge --include_path /nowhere", "--include_path /nowhere: there is no such folder"),
    ("--tasks /nowhere/a.yaml", "--tasks /nowhere/a.yaml: there is no such file"),
    ("--tasks lladax_arc_challenge --model lladex", "--model lladex: there is no such model; did you mean lladax"),
    ("--tasks lladax_gsm8k --model dummy --use_cache c", "--use_cache c: answers of other models than lladax would be"),
    ("--tasks lladax_mbpp", "lladax_mbpp runs generated code: allow it with"),
    ("--tasks lladax_gsm8k --log_samples", "Specify --output_path if providing --log_samples"),
    ("--tasks lladax_gsm8k --output_path /dev/null/x", "--output_path=/dev/null/x: Not a directory; name a folder"),
    ("--config /nowhere.yaml", "Config file not found: /nowhere.yaml"),
    (
      "--tasks lladax_gsm8k --data_dir={data} --gen_kwargs do_sample=True,temperature=1,top_p=0.5",
      "lladax_gsm8k: generation_kwargs: top_p=0.5: lladax's sampler has no top_p",
    ),
    ("--tasks lladax_gsm8k --data_dir={data} --model_args path=/nowhere", "/nowhere"),
  ],
)
def test_the_command_line_says_a_mistake_in_one_line(command, data_dir, monkeypatch, flags, said):
  if "path=/nowhere" not in flags:
    monkeypatch.setattr(adapter.load, "load", None)  # before there is a model
  code, told = command(flags.format(data=data_dir))
  assert code == 1 and "Traceback" not in told
  last = told.strip().splitlines()[-1]
  assert last.startswith("lladax.harness: ") and said in last


@pytest.mark.parametrize("error", [ValueError("a shape"), OSError("a file")])
def test_a_crash_of_the_command_line_is_a_crash(command, data_dir, monkeypatch, error):
  def load(*_, **__):
    raise error

  monkeypatch.setattr(adapter.load, "load", load)
  code, told = command(f"--tasks lladax_gsm8k --data_dir {data_dir} --model_args path=x")
  assert code == 70 and "Traceback" in told


def test_the_module_is_the_command():
  flags = "--tasks lladax_arc_challenge --model_args path=x,mcnum=3"
  done = subprocess.run(
    [sys.executable, "-m", "lladax.harness", *flags.split()], cwd=ROOT, capture_output=True, text=True
  )
  assert done.returncode == 1 and "Traceback" not in done.stderr
  said = "lladax.harness: mcnum=3: there is no such option; did you mean mc_num?"
  assert done.stderr.strip().splitlines()[-1] == said


def bombs(marker):
  """Contents that make the folder `marker` if something that reads them runs what they hold."""

  class Bomb:
    def __reduce__(self):
      return os.mkdir, (str(marker),)

  call = f"__import__('os').mkdir({str(marker)!r})"
  return pickle.dumps(Bomb(), 2), call.encode(), f"!!python/object/apply:os.mkdir [{str(marker)!r}]".encode()


def plant(path, bomb, keys=()):
  """The harness's own kind of cache, with a pickle as the answer to every key."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with sqlite3.connect(path) as file:
    file.execute("CREATE TABLE unnamed (key TEXT PRIMARY KEY, value BLOB)")
    file.executemany("INSERT INTO unnamed VALUES (?, ?)", [(key, bomb) for key in keys])
  file.close()


def test_a_bomb_in_the_cache_does_not_go_off(command, llada, data_dir, tmp_path, monkeypatch, caplog):
  from lm_eval.api.model import hash_args

  marker, cache, keys = tmp_path / "marker", tmp_path / "workdir" / "harness", []
  real = adapter.Harness.loglikelihood
  monkeypatch.setattr(
    adapter.Harness, "loglikelihood", lambda self, requests, **options: keys.extend(
      hash_args("loglikelihood", request.args) for request in requests
    ) or real(self, requests, **options)
  )  # fmt: skip
  run = {"data_dir": str(data_dir), "limit": 1, "num_samples": 2, "num_fewshot": 0}
  clean = harness.evaluate(llada, "arc_challenge", **run)
  name = cache / harness._fingerprint(adapter.Harness(llada=llada, num_samples=2))
  pickled, *others = bombs(marker)
  for path in (name, tmp_path / "c_rank0"):
    plant(path.with_suffix(".db"), pickled, dict.fromkeys(keys))
    path.with_suffix(".jsonl").write_bytes(b"\n".join([pickled, *others]))
  for _ in range(2):
    assert harness.evaluate(llada, "arc_challenge", use_cache=cache, **run) == clean
    assert name.with_suffix(".jsonl").read_bytes().count(b'["loglikelihood", ') == 3 and not marker.exists()
    assert "what is no answer of lladax is not read" in caplog.text
    monkeypatch.setattr(LLaDA, "log_likelihood", None)  # the second time they are there
  monkeypatch.undo()
  monkeypatch.setattr(adapter.load, "load", lambda *_, **__: llada)
  flags = f"--tasks lladax_arc_challenge --data_dir {data_dir} --limit 1 --model_args path=x,mc_num=2"
  for _ in range(2):
    code, told = command(f"{flags} --use_cache {tmp_path / 'c'}")
    assert code == 0, told
    assert (tmp_path / "c_rank0.jsonl").read_bytes().count(b'["loglikelihood", ') == 3 and not marker.exists()
  with pytest.raises(Mistake, match="the harness's own cache of answers is not read"):
    CachingLM(adapter.Harness(llada=llada), str(tmp_path / "c_rank0.db"))


def test_a_bomb_in_a_workdir_does_not_go_off(tiny_workdir, tmp_path):
  marker, workdir = tmp_path / "marker", tmp_path / "workdir"
  shutil.copytree(tiny_workdir, workdir)
  for folder in sorted((workdir / "checkpoints").iterdir())[:-1]:
    shutil.rmtree(folder)
  files = [path for path in workdir.rglob("*") if path.is_file()]
  assert {"config.json", "metrics.jsonl"} <= {path.name for path in files} and (workdir / "tokenizer").is_dir()
  pickled, *texts = bombs(marker)
  for file in files:
    content = file.read_bytes()
    for bomb in [pickled, *texts] if file.suffix in (".json", ".jsonl") else [pickled]:
      file.write_bytes(bomb)
      for read in (configs.load, metrics.losses, lladax.load):
        with contextlib.suppress(Exception):
          read(workdir)
      assert not marker.exists(), file
    file.write_bytes(content)
  lladax.load(workdir)  # nothing else was broken


@pytest.mark.slow
def test_the_command_line_and_a_mesh(tiny_workdir, data_dir, tmp_path):
  args = f"path={tiny_workdir},mc_num=2,gen_length=4,tensor=2,fsdp=2"
  command = f"-m lladax.harness --tasks lladax_arc_challenge,lladax_humaneval --limit 2 --model_args {args}"
  command += f" --data_dir {data_dir} --output_path {tmp_path} --use_cache {tmp_path / 'cache'}"
  run = {"cwd": ROOT, "env": os.environ | {"HF_HUB_OFFLINE": "1"}, "capture_output": True, "text": True}
  refused = subprocess.run([sys.executable, *command.split()], **run)
  assert refused.returncode == 1 and "runs generated code" in refused.stderr and "--allow_code" in refused.stderr
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


def test_a_conversation_has_no_gap(llada):
  lm = adapter.Harness(llada=llada)
  context = lm.apply_chat_template([{"role": "user", "content": "a <gap> b"}])
  with pytest.raises(Mistake, match="question 10: infill='<gap>': a conversation has no gap to fill in; leave out"):
    lm.generate_until(requests("generate_until", (context, {"max_gen_toks": 4, "infill": "<gap>"})))


@pytest.mark.parametrize("asked", [{"guidance_scale": 1.0}, {"cache": "dual"}, {"infill": "<gap>"}])
def test_what_a_causal_model_cannot_do_is_refused_before_the_first_pass(asked):
  lm = adapter.Harness(llada=tiny(causal=True))
  with pytest.raises(Mistake, match="task task, question 10: .*a causal model"):
    lm.generate_until(requests("generate_until", ("a <gap> b", {"max_gen_toks": 4} | asked)))
