"""Bodies to rows, snapshots to texts: what is said on the way never has to be taken back."""

import dataclasses
import json
import math
import types

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from questions import tiny
from served import OPTIONS, snapshots

from lladax import sampling
from lladax.inference.slots import Snapshot
from lladax.serving import protocol, replies
from lladax.serving.protocol import Protocol, Refused, decode

pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture(scope="module")
def llada():
  return tiny(max_length=128)


@pytest.fixture(scope="module")
def asks(llada):
  return Protocol(llada, "tiny", OPTIONS, 64)


def chat(**fields):
  return {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]} | fields


def text(**fields):
  return {"model": "tiny", "prompt": "hi"} | fields


def refusal(ask, body):
  with pytest.raises(Refused) as error:
    ask(body)
  message = error.value.body["message"]
  assert "\n" not in message and "sample." not in message
  return error.value.status, error.value.body["param"], message


def test_a_row_is_what_sample_would_be_asked_for(asks, llada):
  (row,) = asks.completions(text(seed=7, steps=4, max_tokens=24, temperature=0.5)).rows
  assert row.ids == (104, 105) and not row.fills and row.most is None
  c = llada.settings({**OPTIONS, "early_stop": True, "seed": 7, "steps": 4, "gen_length": 24, "temperature": 0.5})
  assert row.settings == c
  (row,) = asks.chat(chat(seed=7)).rows
  assert list(row.ids) == llada.tokenizer.chat([{"role": "user", "content": "hi"}]) and row.settings.early_stop
  assert not asks.completions(text(early_stop=False)).rows[0].settings.early_stop


def test_choices_have_seeds_of_their_own_and_prompts_the_same(asks):
  asked = asks.completions(text(prompt=["a", "bc"], n=2, seed=9))
  assert [(row.ids, row.settings.seed) for row in asked.rows] == [
    (ids, sampling.nth_seed(9, k)) for ids in ((97,), (98, 99)) for k in range(2)
  ]
  drawn = {asks.completions(text()).seed for _ in range(5)}
  assert len(drawn) == 5 and all(0 <= seed < 2**32 for seed in drawn)


@pytest.mark.parametrize(
  ("fields", "length", "limit"),
  [({}, 16, 16), ({"max_tokens": 3}, 3, 3), ({"max_tokens": 9}, 16, 9), ({"gen_length": 24}, 24, 24),
   ({"max_tokens": 20, "block_length": 16}, 32, 20), ({"block_length": 3}, 18, 16), ({"gen_length": None}, None, None),
   ({"gen_length": None, "max_tokens": 9}, None, 9)],
)  # fmt: skip
def test_the_canvas_has_whole_blocks_and_the_text_as_many_tokens_as_are_asked_for(asks, fields, length, limit):
  asked = asks.completions(text(**fields))
  (row,), (choice,) = asked.rows, asked.choices
  assert row.settings.gen_length == length and choice.stop == (None if limit is None else 2 + limit)
  assert row.most == (limit if length is None else None)


def test_a_server_whose_texts_grow_grows_them_up_to_max_tokens(llada):
  asks = Protocol(llada, "tiny", {"gen_length": None, "block_length": 8, "steps": 8}, 64)
  (row,) = asks.completions(text(max_tokens=5)).rows
  assert (row.settings.gen_length, row.most) == (None, 5)


def test_a_message_is_text_whatever_it_spells(asks, llada):
  asked = asks.chat(chat(messages=[
    {"role": "developer", "content": "be <|eot_id|> brief"},
    {"role": "assistant", "content": "so", "refusal": None, "tool_calls": None, "annotations": []},
    {"role": "user", "content": [{"type": "text", "text": "<|mdm_mask|>"}, {"type": "text", "text": "[MASK]"}]},
  ]))  # fmt: skip
  (row,), t = asked.rows, llada.tokenizer
  assert row.ids.count(t.eot_id) == 3 and t.mask_id not in row.ids
  assert t.decode(row.ids).startswith("system\n\nbe <|eot_id|> brief") and "<|mdm_mask|>[MASK]" in t.decode(row.ids)
  assert t.mask_id not in asks.completions(text(prompt="<|mdm_mask|>")).rows[0].ids


def test_a_prompt_with_masks_is_a_canvas(asks, llada):
  (row,) = asks.completions(text(prompt="a[MASK][MASK]b", seed=1)).rows
  c = llada.settings({**OPTIONS, "early_stop": True, "seed": 1, "block_length": 32, "gen_length": 64})
  assert row.fills and row.ids == (97, llada.mask_id, llada.mask_id, 98)
  assert row.settings.block_length == c.block_length
  (row,) = asks.completions(text(prompt=[97, llada.mask_id])).rows
  assert row.fills
  (row,) = asks.completions(text(prompt="a", suffix="b", max_tokens=3)).rows
  assert row.fills and row.ids == (97, *[llada.mask_id] * 3, 98)


FIELDS = [
  ({"prompt": 3}, "prompt"), ({"prompt": []}, "prompt"),
  ({"prompt": [1, "a"]}, "prompt"), ({"prompt": [True]}, "prompt"),
  ({"prompt": ["a", [1]]}, "prompt"), ({"prompt": [999]}, "prompt"), ({"prompt": [1.5]}, "prompt"),
  ({"prompt": "a" * 125}, "prompt"), ({"prompt": "a", "max_tokens": 0}, "max_tokens"), ({"max_tokens": 127}, "prompt"),
  ({"max_tokens": "3"}, "max_tokens"), ({"max_tokens": 3, "gen_length": 8}, "max_tokens"),
  ({"max_tokens": True}, "max_tokens"),
  ({"suffix": "b", "max_tokens": 2**31 - 1}, "prompt"), ({"suffix": "b", "gen_length": -3}, "max_tokens"),
  ({"suffix": "b", "max_tokens": 3, "gen_length": 4}, "max_tokens"),
  ({"gen_length": 12, "block_length": 8}, "gen_length"), ({"temperature": -1}, "temperature"),
  ({"temperature": "hot"}, "temperature"), ({"temperature": math.inf}, "temperature"),
  ({"temperature": 1e308}, "temperature"), ({"guidance_scale": 1e308}, "guidance_scale"), ({"top_p": 0}, "top_p"),
  ({"threshold": 0.5, "factor": 1.0}, "threshold"), ({"steps": None}, "steps"), ({"remasking": "no"}, "remasking"),
  ({"seed": -1}, "seed"), ({"seed": 2**32}, "seed"), ({"seed": 1.5}, "seed"), ({"seed": [1, 2]}, "seed"),
  ({"n": 0}, "n"), ({"n": 33}, "n"), ({"n": 32, "prompt": ["a", "b", "c"]}, "prompt"), ({"best_of": 2}, "best_of"),
  ({"stop": [""]}, "stop"), ({"stop": ["a"] * 17}, "stop"), ({"stop": 3}, "stop"), ({"stop": [None]}, "stop"),
  ({"stop": "a" * 1001}, "stop"), ({"prompt": ["a"] * 10**6}, "prompt"),
  ({"stream": "yes"}, "stream"), ({"stream_options": {}}, "stream_options"),
  ({"stream": True, "stream_options": {"more": True}}, "stream_options"),
  ({"stream": True, "stream_options": {"canvas": 1}}, "stream_options"), ({"timeout": 0}, "timeout"),
  ({"timeout": math.inf}, "timeout"), ({"logprobs": -1}, "logprobs"), ({"logprobs": True}, "logprobs"),
  ({"echo": 1}, "echo"), ({"echo": True, "suffix": "b"}, "echo"), ({"prompt": "[MASK]", "echo": True}, "echo"),
  ({"prompt": "[MASK]", "max_tokens": 3}, "max_tokens"), ({"prompt": "[MASK]", "stop": "a"}, "stop"),
  ({"prompt": "[MASK]", "suffix": "a"}, "suffix"), ({"prompt": "", "echo": True, "logprobs": 1}, "prompt"),
  ({"presence_penalty": 0.5}, "presence_penalty"), ({"user": 3}, "user"), ({"store": True}, "store"),
  ({"tools": [{}]}, "tools"), ({"response_format": {"type": "json_object"}}, "response_format"),
  ({"tresh": 1}, "tresh"), ({"logit_bias": []}, "logit_bias"), ({"logit_bias": {"a": 1}}, "logit_bias"),
  ({"model": 3}, "model"), ({"model": None}, "model"), ({"prompt": None}, "prompt"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param"), FIELDS, ids=lambda x: str(x)[:50])
def test_what_cannot_be_is_told_by_field(asks, fields, param):
  status, named, message = refusal(asks.completions, text(**fields))
  assert (status, named) == (400, param) and param in message


VALUES = st.one_of(
  st.none(), st.booleans(), st.integers(-3, 40), st.sampled_from([2**31, -(2**63), 2**64, 0.5, -0.0, math.inf, 1e-9]),
  st.sampled_from(["", "a", "[MASK]", "prefix", "random", "system"]), st.lists(st.integers(-1, 300), max_size=3),
  st.lists(st.sampled_from(["", "a"]), max_size=2), st.just({}), st.just([{}]), st.just({"a": [None]}),
)  # fmt: skip
NAMES = sorted({*protocol._SAMPLER, *protocol._BOTH, *protocol._CHAT, *protocol._TEXT, *protocol._NEUTRAL} - {"model"})


@hypothesis.settings(max_examples=400, deadline=None, derandomize=True, database=None)
@hypothesis.given(st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=4), st.booleans())
def test_whatever_is_asked_becomes_rows_or_one_line(asks, fields, chats):
  body = chat(**fields) if chats else text(**fields)
  try:
    rows = (asks.chat if chats else asks.completions)(body).rows
  except Refused as error:
    assert "\n" not in str(error) and error.body["param"] in {*NAMES, *body}
  else:
    assert all(len(row.ids) + (0 if row.fills else row.settings.gen_length or 8) <= 128 for row in rows)


@pytest.mark.parametrize("messages", [
  [], "hi", [3], [{"role": "user"}], [{"content": "a"}], [{"role": "tool", "content": "a"}],
  [{"role": "user", "content": None}], [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
  [{"role": "user", "content": ["a"]}], [{"role": "user", "content": "a", "name": "b"}],
])  # fmt: skip
def test_what_is_no_conversation_is_told(asks, messages):
  assert refusal(asks.chat, chat(messages=messages))[:2] == (400, "messages")


def test_another_model_and_too_long_a_prompt_have_codes(asks):
  for body, code, status in (
    (text(model="gpt"), "model_not_found", 404), (text(prompt="a" * 120), "context_length_exceeded", 400)
  ):  # fmt: skip
    with pytest.raises(Refused) as error:
      asks.completions(body)
    assert (error.value.body["code"], error.value.status) == (code, status)
  assert refusal(asks.chat, chat(top_logprobs=2))[1] == "top_logprobs"
  assert refusal(asks.chat, chat(max_tokens=2, max_completion_tokens=3))[1] == "max_tokens"


def test_fields_that_mean_nothing_here_are_taken_at_the_values_that_ask_for_nothing(asks):
  neutral = {"user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "parallel_tool_calls": True,
             "presence_penalty": 0, "frequency_penalty": 0.0, "response_format": {"type": "text"}, "tools": [],
             "tool_choice": "none", "functions": None, "logit_bias": {}}  # fmt: skip
  openai = {"temperature": None, "top_p": None, "n": None, "seed": None, "stop": None, "stream": None,
            "stream_options": None, "max_tokens": None}  # fmt: skip
  (row,) = asks.chat(chat(**neutral, **openai)).rows
  assert dataclasses.replace(row.settings, seed=0) == asks.defaults


@pytest.mark.parametrize("content", [
  b"", b"{", b"[]", b"3", b'"a"', b'{"a": NaN}', b'{"a": -Infinity}', b"\xff{}", b'{"a": "\\ud800"}', b'{"\\udfff": 1}',
  b"[" * 100_000, b'{"a":' * 50_000, b'{"a": 1, "a": 2}', b'{"b": {"a": 1, "a": 1}}', b'{"a": ' + b"1" * 5000 + b"}",
  b'{"a": 1} {}', b"{'a': 1}", b"{" + b",".join(b'"%d": 1' % (i % 10**5) for i in range(10**5 + 1)) + b"}",
], ids=lambda x: x[:20].decode("latin-1"))  # fmt: skip
def test_what_is_no_json_is_one_line(content):
  with pytest.raises(Refused) as error:
    decode(content)
  assert error.value.status == 400 and "\n" not in str(error.value) and len(str(error.value)) < 300


def replay(asked, llada, answer):
  """(deltas, chunks) of a stream in which the ids of `answer` come one by one."""
  ids = answer if isinstance(answer, list) else llada.tokenizer.encode(answer)
  chunks = [x for s in snapshots(llada, asked.rows[0], ids) if (x := asked.see(0, s))]
  return [x["choices"][0]["text"] for x in chunks], chunks


@pytest.mark.parametrize(("stop", "said", "finish"), [
  (None, "one two three", "length"), ("two", "one ", "stop"), (["three", "e t"], "on", "stop"),
  (["threes"], "one two three", "length"), (["three"], "one two ", "stop"), ("o", "", "stop"),
])  # fmt: skip
def test_a_text_ends_before_a_stop_string_and_no_part_of_one_is_told(asks, llada, stop, said, finish):
  asked = asks.completions(text(stop=stop, stream=True))
  deltas, chunks = replay(asked, llada, "one two three")
  assert "".join(deltas) == said == asked.choices[0].text
  assert chunks[-1]["choices"][0]["finish_reason"] == asked.answer()["choices"][0]["finish_reason"] == finish
  assert all(x["choices"][0]["finish_reason"] is None for x in chunks[:-1])
  if stop == ["threes"]:
    assert [x for x in deltas if x] == ["o", "n", "e", " ", "tw", "o", " ", "three"]


def test_half_a_character_is_not_told(asks, llada):
  deltas, _ = replay(asks.completions(text(stream=True)), llada, "aé秦🙂b")
  assert deltas == ["a", "é", "秦", "🙂", "b"]
  broken = [0xE7, 0xA7, 65, 0xFF]
  deltas, _ = replay(asks.completions(text(stream=True)), llada, broken)
  assert "".join(deltas) == llada.tokenizer.decode(broken)


def test_eos_ends_a_text_and_max_tokens_cuts_it(asks, llada):
  asked = asks.completions(text(stream=True))
  deltas, chunks = replay(asked, llada, [97, 98, llada.eot_id, 99])
  assert "".join(deltas) == "ab" and chunks[-1]["choices"][0]["finish_reason"] == "stop"
  assert asked.used() == {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4, "passes": 3}
  asked = asks.completions(text(max_tokens=9, stream=True))
  deltas, chunks = replay(asked, llada, "abcdefghijklmnop")
  assert "".join(deltas) == "abcdefghi" and chunks[-1]["choices"][0]["finish_reason"] == "length"
  assert asked.used()["completion_tokens"] == asked.used()["passes"] == 9


def test_logprobs_come_with_their_tokens_and_add_up_to_those_of_the_whole(asks, llada):
  asked = asks.completions(text(stream=True, logprobs=1, echo=True, stop="z"))
  asked.scores = False
  _, chunks = replay(asked, llada, "aé秦bz")
  parts = [x["choices"][0]["logprobs"] for x in chunks if x["choices"][0]["logprobs"]]
  whole = asked.answer()["choices"][0]
  assert whole["text"] == "hiaé秦b"
  assert [t for x in parts for t in x["tokens"]] == whole["logprobs"]["tokens"]
  assert whole["logprobs"]["tokens"] == ["a", "⟨C3⟩", "⟨A9⟩", "⟨E7⟩", "⟨A7⟩", "⟨A6⟩", "b"]
  assert whole["logprobs"]["text_offset"] == [2, 3, 3, 4, 4, 4, 5]
  np.testing.assert_allclose(whole["logprobs"]["token_logprobs"], math.log(0.5))
  assert whole["logprobs"]["top_logprobs"][0] == {"a": math.log(0.5)}


def test_chat_logprobs_hold_bytes(asks, llada):
  asked = asks.chat(chat(logprobs=True, top_logprobs=3))
  for s in snapshots(llada, asked.rows[0], llada.tokenizer.encode("aé")):
    assert asked.see(0, s) is None
  first, second, _ = asked.answer()["choices"][0]["logprobs"]["content"]
  assert first["top_logprobs"] == [{"token": "a", "logprob": math.log(0.5), "bytes": [97]}] and second["bytes"] == [
    0xC3
  ]


def test_a_canvas_shows_masks_edits_and_what_was_given(asks, llada):
  asked = asks.completions(text(prompt="a[MASK]é[MASK]", stream=True, stream_options={"canvas": True}))
  (row,), m = asked.rows, llada.mask_id
  tokens, at = np.array([97, 0xFF, 0xC3, 0xA9, m], np.int32), np.array([0, 3, 0, 0, 0], np.int32)
  confidence = np.array([1, 0.123456, 1, 1, 1], np.float32)
  chunk = asked.see(0, Snapshot(tokens, at, confidence, np.array([0, 5, 0, 0, 0]), 0, 4, 5, False))
  assert chunk["canvas"] == {
    "index": 0, "pass": 5, "block": row.settings.block_length, "given": 3,
    "pieces": ["a", "⟨FF⟩", "⟨C3⟩", "⟨A9⟩", None], "unmasked_at": [0, 3, 0, 0, 0], "edited_at": [0, 5, 0, 0, 0],
    "confidence": [1.0, 0.1235, 1.0, 1.0, 0.0], "done": False,
  }  # fmt: skip
  json.dumps(chunk)
  tokens = np.array([97, 0xFF, 0xC3, 0xA9, llada.eos_id], np.int32)
  chunk = asked.see(0, Snapshot(tokens, at, confidence, None, 0, 5, 6, True))
  assert chunk["canvas"]["pieces"][-1] == "⏎" and chunk["canvas"]["done"]
  assert asked.choices[0].text == "a\ufffdé"


def test_what_is_filled_in_before_a_suffix_is_told_alone(asks, llada):
  asked = asks.completions(text(prompt="ab", suffix="yz", max_tokens=2, stream=True))
  tokens = np.array([97, 98, 99, 100, 121, 122], np.int32)
  at = np.array([0, 0, 2, 1, 0, 0], np.int32)
  chunk = asked.see(0, Snapshot(tokens, at, np.ones(6, np.float32), None, 0, 6, 2, True))
  assert chunk["choices"][0]["text"] == "cd" and asked.used()["completion_tokens"] == 2
  assert asked.used()["prompt_tokens"] == 4
  asked = asks.completions(text(prompt="", suffix="yz", max_tokens=3, stop="d"))
  tokens, at = np.array([99, 100, 101, 121, 122], np.int32), np.array([2, 1, 3, 0, 0], np.int32)
  asked.see(0, Snapshot(tokens, at, np.ones(5, np.float32), None, 0, 5, 3, True))
  (choice,) = asked.answer()["choices"]
  assert (choice["text"], choice["finish_reason"]) == ("c", "stop")


def test_scores_of_a_prompt_are_as_the_harness_reads_them(asks, llada):
  asked = asks.completions(text(prompt=["abc", "d"], echo=True, logprobs=1, max_tokens=0))
  assert asked.scores and not asked.rows
  top = np.array([0, 98, 120]), np.array([0.0, -1.0, -0.5])
  one = np.array([0.0]), np.array([0]), np.array([0.0])
  asked.score([(np.array([0.0, -1.0, -math.inf]), *top), one], llada)
  first, second = asked.answer()["choices"]
  assert first["text"] == "abc" and second["logprobs"]["token_logprobs"] == [None]
  assert first["logprobs"] == {
    "tokens": ["a", "b", "c"], "token_logprobs": [None, -1.0, -9999.0], "text_offset": [0, 1, 2],
    "top_logprobs": [None, {"b": -1.0}, {"c": -9999.0, "x": -0.5}],
  }  # fmt: skip
  assert asked.answer()["usage"]["completion_tokens"] == 0


def test_the_models_list_says_what_can_be_asked(asks, llada):
  (model,) = asks.models()["data"]
  assert model["id"] == "tiny" and model["lladax"]["chats"] and model["lladax"]["max_length"] == 128
  assert model["lladax"]["sampler"]["gen_length"] == 16 and model["lladax"]["block"] == 0
  json.dumps(model, allow_nan=False)


def test_tokens_stand_where_their_text_does_for_every_vocabulary(llada):
  ids = llada.tokenizer.encode("é, 秦川 and so on " * 4)
  found = replies.tokens(llada, [*ids[:7], *ids], 7, [0.0] * len(ids))
  whole = llada.tokenizer.decode(ids, behind=ids[:7])
  for i, t in enumerate(found):
    assert t.offset == len(llada.tokenizer.decode(ids[:i], behind=ids[:7]).rstrip("\ufffd")), i
  assert found[-1].offset == len(whole) - 1


@pytest.mark.parametrize(("stop", "said", "count"), [
  (["ne two", "t"], "o", 7), (["e twx", "tw"], "one ", 6), (["one two t", "e", "two"], "", 9),
  (["two x", "o t"], "one tw", 9),
])  # fmt: skip
@pytest.mark.parametrize("every", [1, 3, 13])
@pytest.mark.parametrize("stream", [False, True])
def test_a_text_is_the_same_however_often_it_is_looked_at(asks, llada, stop, said, count, every, stream):
  """The first of the stop strings ends it, though another one, within it, is there before."""
  asked = asks.completions(text(stop=stop, stream=stream))
  passes = enumerate(snapshots(llada, asked.rows[0], llada.tokenizer.encode("one two three")), 1)
  chunks = [x for k, s in passes if (k % every == 0 or s.done) and (x := asked.see(0, s))]
  answer = asked.answer()
  assert (answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == (said, "stop")
  assert answer["usage"]["completion_tokens"] == count
  assert not stream or "".join(x["choices"][0]["text"] for x in chunks) == said


def test_biases_are_not_so_many_that_it_takes_long(asks):
  bias = {str(300 + i): 1 for i in range(20000)}
  status, param, message = refusal(asks.completions, text(logit_bias=bias))
  assert (status, param) == (400, "logit_bias") and "300" in message


def test_tokens_stand_behind_what_is_no_character(llada):
  ids = [0xFF, 10, 0xE7, 0xA7, 0x41, 0xC3, 0xC3, 0xA9, 98]  # "\ufffd\n\ufffdA\ufffd\u00e9b"
  found = replies.tokens(llada, ids, 0, [0.0] * len(ids))
  assert [t.offset for t in found] == [0, 1, 2, 2, 3, 4, 5, 5, 6]


def test_a_row_of_the_embedding_that_is_no_token_may_score_best(asks, llada):
  asked = asks.completions(text(prompt="ab", echo=True, logprobs=1, max_tokens=0))
  asked.score([(np.array([0.0, -1.0]), np.array([0, llada.vocab_size]), np.array([0.0, -0.5]))], llada)
  (choice,) = asked.answer()["choices"]
  assert choice["logprobs"]["top_logprobs"][1] == {"b": -1.0, "⟨261⟩": -0.5}


def test_bytes_of_a_character_stand_together_where_each_alone_is_spelt_as_one(llada, monkeypatch):
  def decode(ids, behind=()):
    try:
      return bytes(ids).decode()
    except UnicodeDecodeError:
      return "\ufffd" * len(ids)

  monkeypatch.setattr(type(llada), "reader", lambda self: types.SimpleNamespace(decode=decode))
  found = replies.tokens(llada, [*"\u202e".encode()], 0, [0.0] * 3)
  assert [(t.offset, t.end) for t in found] == [(0, 1), (0, 2), (0, 1)]
