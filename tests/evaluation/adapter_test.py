import dataclasses

import numpy as np
import pytest
from layouts import GOLDEN
from vocabularies import make, prepend

from lladax.inference.llada import LLaDA
from lladax.mistake import Mistake

pytest.importorskip("lm_eval")
from questions import requests, tiny

from lladax.evaluation import adapter

pytestmark = [
  pytest.mark.usefixtures("quick_compiles"),
  pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the harness and of what it imports
]


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
  ("asked", "said"),
  [
    ({"typical_p": 0.9, "do_sample": True}, "typical_p=0.9: lladax's sampler has no typical_p; set it to 1"),
    ({"min_p": 0.1, "temperature": 1}, "min_p=0.1: lladax's sampler has no min_p; set it to 0"),
    ({"top_p": 1.5, "temperature": 1}, "top_p=1.5: must be more than 0, and at most 1"),
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


@pytest.mark.parametrize(
  "call, said",
  [
    (lambda llada: adapter.Harness(llada=llada, gen_lenght=3), "gen_lenght=3.*did you mean gen_length"),
    (lambda llada: adapter.Harness(llada=llada, steps=0), "sample.steps=0: must be at least 1"),
    (lambda llada: adapter.Harness(llada=llada, batch_size="auto"), "batch_size='auto': must be a positive number"),
    (lambda llada: adapter.Harness(llada=llada, num_samples=0), "num_samples=0: must be a positive number"),
    (lambda llada: adapter.Harness(llada=llada, mc_num=2.5), "num_samples=2.5: must be a positive number"),
    (lambda llada: adapter.Harness(llada=llada, greedy="no"), "greedy='no': must be True or False"),
    (lambda llada: adapter.Harness(), "give the model as path="),
    (lambda llada: adapter.Harness(path=str(GOLDEN)), "this model has no tokenizer"),
  ],
)
def test_a_mistake_is_one_clear_line(llada, call, said):
  with pytest.raises(ValueError, match=said) as error:
    call(llada)
  assert "\n" not in str(error.value)
