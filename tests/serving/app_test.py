"""The server on a port of this machine, asked by clients as they are: OpenAI's, the harness's, and rude ones."""

import concurrent.futures
import contextlib
import inspect
import json
import logging
import socket

import numpy as np
import pytest
from questions import requests, tiny
from served import OPTIONS, Book, serving, until

from lladax import sampling
from lladax.mistake import Mistake
from lladax.sampling import SamplerConfig
from lladax.serving import replies
from lladax.serving.scheduler import Draining, Expired, Failed, Full, Scheduler
from lladax.serving.settings import ServeConfig

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytest.importorskip("httpx")
import httpx  # noqa: E402

pytestmark = [
  pytest.mark.usefixtures("quick_compiles"),
  pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the clients, and of what they import
]
MESSAGES = [{"role": "user", "content": "é <|eot_id|>"}]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def llada():
  return tiny(max_length=256)


@pytest.fixture(scope="module")
def url(llada):
  with serving(llada, Scheduler(llada)) as (address, _):
    yield address


@pytest.fixture(scope="module")
def client(url):
  openai = pytest.importorskip("openai")
  with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as found:
    yield found


@pytest.fixture
def served(llada, caplog):
  """served(**settings) -> (a client of a server that answers by the book, the book, its gate)."""
  caplog.set_level(logging.INFO, "lladax.serving.gate")
  with contextlib.ExitStack() as stack:

    def start(book=None, **settings):
      book = book or Book(llada)
      address, gate = stack.enter_context(serving(llada, book, **settings))
      return stack.enter_context(httpx.Client(base_url=address, timeout=30)), book, gate

    yield start


def chat(**fields):
  return {"model": "tiny", "messages": MESSAGES} | fields


def text(**fields):
  return {"model": "tiny", "prompt": "ab"} | fields


def told(answer, status, *, param=None, code=None):
  """The message of an error that is as OpenAI's."""
  error = answer.json()["error"]
  assert (answer.status_code, error["param"], error["code"]) == (status, param, code), answer.text
  assert "\n" not in error["message"] and error["type"]
  return error["message"]


def events(lines):
  """The objects of a stream, which ends as it should."""
  data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
  assert data[-1] == "[DONE]"
  return [json.loads(x) for x in data[:-1]]


def test_a_chat_is_what_the_model_says_by_itself(client, llada):
  said = client.chat.completions.create(model="tiny", messages=MESSAGES, seed=3, n=2, temperature=1.0)
  seeds = [sampling.nth_seed(3, k) for k in range(2)]
  want = llada.sample([MESSAGES] * 2, **{**OPTIONS, "temperature": 1.0}, early_stop=True, seed=seeds)
  assert [x.message.content for x in said.choices] == want.text and want.text[0] != want.text[1]
  assert said.choices[0].message.content == llada.chat(MESSAGES, **{**OPTIONS, "temperature": 1.0}, seed=[3]).text[0]
  assert said.seed == 3 and [x.index for x in said.choices] == [0, 1]
  prompt = len(llada.tokenizer.chat(MESSAGES))
  assert said.usage.prompt_tokens == prompt and said.usage.total_tokens == prompt + said.usage.completion_tokens
  assert 0 < said.usage.passes <= 32


def test_a_stream_adds_up_to_the_answer_and_its_canvas_is_the_last_one(client, llada):
  asked = {"model": "tiny", "messages": MESSAGES, "seed": 5, "temperature": 1.0, "logprobs": True, "n": 2}
  whole = client.chat.completions.create(**asked)
  options = {"include_usage": True, "canvas": True}
  chunks = list(client.chat.completions.create(**asked, stream=True, stream_options=options))
  assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
  assert chunks[0].choices[0].delta.role == "assistant" and all(x.usage is None for x in chunks[:-1])
  for i, choice in enumerate(whole.choices):
    mine = [x for x in chunks if x.choices and x.choices[0].index == i]
    assert "".join(x.choices[0].delta.content or "" for x in mine) == choice.message.content
    tokens = [t for x in mine if x.choices[0].logprobs for t in x.choices[0].logprobs.content]
    assert tokens == choice.logprobs.content and len(tokens) <= 16
    assert [x.choices[0].finish_reason for x in mine] == [None] * (len(mine) - 1) + [choice.finish_reason]
    canvases = [x.canvas for x in mine if getattr(x, "canvas", None)]
    assert [x["pass"] for x in canvases] == sorted({x["pass"] for x in canvases}) and canvases[-1]["done"]
    assert canvases[0]["pieces"].count(None) > canvases[-1]["pieces"].count(None)
    for before, after in zip(canvases, canvases[1:], strict=False):
      assert all(a == b for a, b in zip(before["pieces"], after["pieces"], strict=True) if a is not None)


def test_completions_of_many_prompts_as_text_and_as_ids(client, llada):
  options = {**OPTIONS, "temperature": 1.0, "early_stop": True}
  for prompts in (["ab", "c"], [[97, 98], [99]]):
    said = client.completions.create(model="tiny", prompt=prompts, n=2, seed=4, temperature=1.0)
    seeds = [sampling.nth_seed(4, k) for k in (0, 1, 0, 1)]
    want = llada.sample(["ab", "ab", "c", "c"], **options, seed=seeds).text
    assert [(x.index, x.text) for x in said.choices] == list(enumerate(want))
  said = client.completions.create(model="tiny", prompt=[97, 98], seed=4, temperature=1.0)
  assert [x.text for x in said.choices] == want[:1]
  said = client.completions.create(model="tiny", prompt="ab", seed=4, echo=True, max_tokens=5)
  assert said.choices[0].text.startswith("ab") and said.usage.completion_tokens <= 5


def test_an_echo_is_streamed_with_the_scores_of_its_tokens(served):
  ask, _, _ = served()
  body = text(prompt=["abc", "d"], echo=True, logprobs=1)
  whole = ask.post(TEXT, json=body).json()["choices"]
  with ask.stream("POST", TEXT, json=body | {"stream": True}) as answer:
    chunks = [x["choices"][0] for x in events(list(answer.iter_lines()))]
  for i, choice in enumerate(whole):
    assert choice["text"] == "".join(x["text"] for x in chunks if x["index"] == i) == ["abc", "d"][i] + "so be it"
    mine = [x["logprobs"] for x in chunks if x["index"] == i and x["logprobs"]]
    assert choice["logprobs"] == {name: sum((x[name] for x in mine), []) for name in choice["logprobs"]}
    assert choice["logprobs"]["text_offset"] == list(range(len(choice["text"])))
  body = text(prompt="abc", echo=True, max_tokens=0, stream=True)
  with ask.stream("POST", TEXT, json=body) as answer:
    chunks = [x["choices"][0] for x in events(list(answer.iter_lines()))]
  assert [(x["text"], x["finish_reason"]) for x in chunks] == [("abc", None), ("", "length")]


@pytest.mark.parametrize("fields", [{}, {"max_tokens": 5}, {"gen_length": 12}, {"gen_length": None, "max_tokens": 9}])
def test_a_model_of_blocks_answers_as_it_does_by_itself(fields):
  blocks = tiny(block=4, max_length=64)
  options = {"gen_length": None, "steps": 4, "temperature": 1.0}
  with serving(blocks, Scheduler(blocks), options) as (url, _):
    said = httpx.post(url + TEXT, json=text(seed=3, **fields), timeout=60).json()
    (model,) = httpx.get(f"{url}/v1/models").json()["data"]
  assert model["lladax"]["block"] == 4
  asked = {**options, "gen_length": fields.get("gen_length")}
  want = blocks.sample("ab", **asked, seed=[3], early_stop=True)
  most = fields.get("max_tokens", fields.get("gen_length") or 62)
  ids = want.tokens[0, -(want.tokens.shape[1] - want.padding[0] - 2) :][:most].tolist()
  end = next((i for i, x in enumerate(ids) if x in blocks.ends), len(ids))
  assert said["choices"][0]["text"] == blocks.tokenizer.decode(ids[:end], behind=b"ab")
  assert said["choices"][0]["finish_reason"] == ("stop" if end < len(ids) else "length")


def test_a_stop_string_ends_a_text_there(client, llada):
  whole = llada.sample("ab", **OPTIONS, early_stop=True).text[0]
  stop = next(x for i, x in enumerate(whole) if i and x != "\ufffd")
  said = client.completions.create(model="tiny", prompt="ab", stop=stop, seed=0)
  assert said.choices[0].text == llada.sample("ab", until=[stop], **OPTIONS, early_stop=True).text[0]
  assert said.choices[0].finish_reason == "stop"
  chunks = client.completions.create(model="tiny", prompt="ab", stop=[stop, "never"], seed=0, stream=True)
  assert "".join(x.choices[0].text for x in chunks) == said.choices[0].text


def test_masks_are_filled_in_and_what_stands_before_a_suffix(client, llada):
  said = client.completions.create(model="tiny", prompt="a[MASK][MASK]b", seed=2, temperature=1.0)
  assert said.choices[0].text == llada.infill("a[MASK][MASK]b", temperature=1.0, seed=[2]).text[0]
  said = client.completions.create(model="tiny", prompt="a", suffix="b", max_tokens=2, seed=2, temperature=1.0)
  assert f"a{said.choices[0].text}b" == llada.infill("a[MASK][MASK]b", temperature=1.0, seed=[2]).text[0]


@pytest.mark.skipif("logit_bias" not in SamplerConfig.__dataclass_fields__, reason="the sampler has none yet")
def test_logit_bias_is_a_field_as_openai_has_it(client):
  said = client.completions.create(model="tiny", prompt="ab", logit_bias={"97": 100}, max_tokens=8)
  assert said.choices[0].text == "a" * 8
  openai = pytest.importorskip("openai")
  for bias in ({"a": 1}, {"97": 101}, {"999": 1}):
    with pytest.raises(openai.BadRequestError, match="logit_bias") as error:
      client.completions.create(model="tiny", prompt="ab", logit_bias=bias)
    assert error.value.param == "logit_bias"


def test_the_options_of_the_sampler_are_fields(client, llada):
  options = {"threshold": 0.01, "block_length": 4, "remasking": "random"}
  said = client.completions.create(model="tiny", prompt="ab", seed=1, extra_body=options)
  want = llada.sample("ab", **{**OPTIONS, **options}, early_stop=True, seed=[1])
  assert said.choices[0].text == want.text[0] and said.usage.passes == want.nfe
  import openai

  with pytest.raises(openai.BadRequestError, match="threshold='a': expected float") as error:
    client.completions.create(model="tiny", prompt="ab", extra_body={"threshold": "a"})
  assert error.value.param == "threshold"
  with pytest.raises(openai.NotFoundError, match="there is no such model"):
    client.completions.create(model="other", prompt="ab")
  assert [x.id for x in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").id == "tiny"
  with pytest.raises(openai.NotFoundError):
    client.models.retrieve("other")


@pytest.mark.parametrize(("content", "headers", "status"), [
  (b"{", {}, 400), (b"\xff", {}, 400), (b"[" * 100_000, {}, 400), (b'{"a": NaN}', {}, 400), (b"", {}, 400),
  (b'{"model": "tiny", "prompt": "\\ud800"}', {}, 400), (b"{}", {"content-type": "text/plain"}, 415),
  (b'{"a": "' + b"a" * 5 * 2**20 + b'"}', {}, 413), (b"{}", {"host": "evil.example"}, 421),
  (b"{}", {"origin": "http://evil.example"}, 403), (b"{}", {"origin": "null"}, 403),
], ids=lambda x: str(x)[:30])  # fmt: skip
def test_what_is_no_request_is_refused_in_one_line(url, content, headers, status):
  answer = httpx.post(url + TEXT, content=content, headers={"content-type": "application/json"} | headers)
  told(answer, status)
  assert httpx.post(url + TEXT, json=text(max_tokens=1)).status_code == 200


def test_paths_methods_and_headers(url):
  told(httpx.get(f"{url}/v2"), 404)
  told(httpx.get(f"{url}/v1/models/"), 404)
  answer = httpx.get(url + TEXT)
  told(answer, 405)
  assert answer.headers["allow"] == "POST"
  answer = httpx.get(f"{url}/healthz", headers={"origin": url})
  assert answer.json() == {"status": "ready"} and answer.status_code == 200
  assert answer.headers["x-content-type-options"] == "nosniff" and answer.headers["cache-control"] == "no-store"
  assert "default-src 'none'" in answer.headers["content-security-policy"]
  assert not [x for x in answer.headers if x.startswith("access-control")]


def test_a_body_without_a_length_is_read_up_to_the_limit(served):
  ask, book, _ = served(max_body=1000)
  parts = [json.dumps(text()).encode()[:10], json.dumps(text()).encode()[10:]]
  assert ask.post(TEXT, content=iter(parts)).json()["choices"][0]["text"] == "so be it"
  told(ask.post(TEXT, content=(b" " * 100 for _ in range(11))), 413)
  assert len(book.jobs) == 1


def test_keys_are_needed_where_there_are_any(served, tmp_path):
  file = tmp_path / "keys"
  file.write_text("# ours\n\nfirst\n  second  \n")
  ask, _, _ = served(api_key_file=str(file))
  for headers in ({}, {"authorization": "Bearer"}, {"authorization": "Bearer # ours"}, {"authorization": "Basic first"},
                  {"authorization": "Bearer firs\xe9".encode("latin-1")}):  # fmt: skip
    for path in ("/v1/models", "/metrics", "/v1/nothing"):
      answer = ask.get(path, headers=headers)
      told(answer, 401, code="invalid_api_key")
      assert answer.headers["www-authenticate"] == "Bearer"
  for key in ("first", "second"):
    assert ask.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 200
  assert ask.get("/healthz").status_code == 200 and ask.get("/").status_code in (200, 404)
  file.write_text("# none\n")
  with pytest.raises(Mistake, match="there is no key in it"):
    _ = ServeConfig(api_key_file=str(file)).keys
  with pytest.raises(Mistake, match="cannot be read"):
    _ = ServeConfig(api_key_file=str(tmp_path)).keys


def test_pages_of_one_other_origin_may_ask_if_that_is_said(served):
  ask, _, _ = served(cors="http://page.example:3000")
  headers = {"origin": "http://page.example:3000"}
  answer = ask.options(CHAT, headers=headers | {"access-control-request-method": "POST"})
  assert answer.status_code == 204 and "Authorization" in answer.headers["access-control-allow-headers"]
  answer = ask.post(CHAT, json=chat(), headers=headers)
  assert answer.headers["access-control-allow-origin"] == "http://page.example:3000" and answer.status_code == 200
  told(ask.post(CHAT, json=chat(), headers={"origin": "http://page.example"}), 403)


@pytest.mark.parametrize("fields", [{"host": ""}, {"port": 70000}, {"rows": 0}, {"timeout": 0.0}, {"cors": "*"},
                                    {"drain_seconds": -1.0}, {"queue": 0}, {"max_body": 0},
                                    {"connections": 0}])  # fmt: skip
def test_settings_that_cannot_be(fields):
  (name,) = fields
  with pytest.raises(Mistake, match=f"--{name}"):
    ServeConfig(**fields)


@pytest.mark.parametrize(("error", "status", "code"), [
  (Full(7), 429, "rate_limit_exceeded"), (Draining(), 503, "ready"), (Mistake("sample.steps=3: no"), 400, None),
  (ZeroDivisionError("a secret"), 500, None),
], ids=lambda x: type(x).__name__)  # fmt: skip
def test_what_the_scheduler_refuses(served, llada, error, status, code):
  ask, _, _ = served(Book(llada, refuse=error))
  answer = ask.post(CHAT, json=chat(stream=True))
  message = told(answer, status, code=code, param="steps" if status == 400 else None)
  assert answer.headers.get("retry-after") == {429: "7", 503: "5"}.get(status)
  assert "secret" not in message


@pytest.mark.parametrize(("error", "status"), [(Expired(), 504), (Failed(), 500), (Draining(), 503), (KeyError(), 500)],
                         ids=lambda x: type(x).__name__)  # fmt: skip
def test_what_goes_wrong_on_the_way_is_told_in_a_stream_too(served, llada, error, status):
  ask, _, _ = served(Book(llada, error=error))
  message = told(ask.post(CHAT, json=chat()), status, code={504: "timeout", 503: "ready"}.get(status))
  answer = ask.post(CHAT, json=chat(stream=True))
  last = answer.text.strip().splitlines()[-1]
  assert answer.status_code == 200 and json.loads(last.removeprefix("data: "))["error"]["message"] == message


def test_it_says_that_it_is_loading_until_it_is_not(served, llada):
  with serving(None, None) as (address, gate):
    assert httpx.get(f"{address}/healthz").json() == {"status": "loading"}
    answer = httpx.post(address + CHAT, json=chat())
    assert "loading" in told(answer, 503, code="loading") and answer.headers["retry-after"]
    gate.serving.open(Book(llada), llada, OPTIONS)
    assert httpx.get(f"{address}/healthz").status_code == 200
    assert httpx.post(address + CHAT, json=chat()).json()["choices"][0]["message"]["content"] == "so be it"
    gate.serving.scheduler.drain(0)
    assert httpx.get(f"{address}/healthz").json() == {"status": "draining"}
    told(httpx.post(address + CHAT, json=chat()), 503, code="draining")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_lets_its_rows_go(served, stream):
  ask, book, gate = served()
  book.gate.clear()
  address = ask.base_url
  body = json.dumps(chat(stream=stream, n=2)).encode()
  head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
  with socket.create_connection((address.host, address.port)) as leaving:
    leaving.sendall(head + body)
    until(lambda: book.jobs)
    if stream:
      assert leaving.recv(100).startswith(b"HTTP/1.1 200")
    assert not any(book.jobs[0].cancelled)
  until(lambda: all(book.jobs[0].cancelled))
  until(lambda: "lladax_disconnects_total 1.0" in ask.get("/metrics").text)
  book.gate.set()
  assert ask.post(CHAT, json=chat()).status_code == 200


def raw(ask, content, wait=True):
  """What the server answers to bytes."""
  with socket.create_connection((ask.base_url.host, ask.base_url.port)) as connection:
    connection.sendall(content)
    connection.settimeout(20)
    return connection.recv(1000) if wait else b""


def test_bytes_that_are_no_request_and_bodies_that_do_not_come(served, monkeypatch, caplog):
  from lladax.serving import app

  monkeypatch.setattr(app, "PATIENCE", 0.1)
  ask, book, _ = served()
  head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n".encode()
  assert raw(ask, b"\x16\x03\x01\x02\x00\x01\r\n\r\n").startswith(b"HTTP/1.1 400")
  assert raw(ask, head + b"X: " + b"x" * 2**17 + b"\r\n\r\n").startswith(b"HTTP/1.1 4")
  assert raw(ask, head + b'\r\n{"model"').startswith(b"HTTP/1.1 408")
  monkeypatch.setattr(app, "PATIENCE", 60.0)
  raw(ask, head + b"\r\n{", wait=False)
  until(lambda: "the client left" in caplog.text)
  assert ask.post(CHAT, json=chat()).status_code == 200 and len(book.jobs) == 1
  assert "Traceback" not in caplog.text


def test_a_client_that_does_not_read_lets_its_rows_go_when_it_leaves(served, llada):
  ask, book, _ = served(Book(llada, "x" * 4000))
  body = json.dumps(chat(stream=True, stream_options={"canvas": True})).encode()
  head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
  with socket.create_connection((ask.base_url.host, ask.base_url.port)) as leaving:
    leaving.sendall(head + body)
    until(lambda: book.jobs)
  until(lambda: all(book.jobs[0].cancelled))


def test_more_connections_than_there_may_be_are_refused(served):
  ask, _, _ = served(connections=2)
  first = [socket.create_connection((ask.base_url.host, ask.base_url.port)) for _ in range(2)]
  until(lambda: ask.get("/healthz").status_code == 503)
  for connection in first:
    connection.close()
  until(lambda: ask.get("/healthz").status_code == 200)


def test_a_silent_stream_is_kept_alive(served, monkeypatch):
  from lladax.serving import app

  monkeypatch.setattr(app, "KEEP_ALIVE", 0.05)
  ask, book, _ = served()
  book.gate.clear()
  with ask.stream("POST", CHAT, json=chat(stream=True)) as answer:
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = []
    for line in answer.iter_lines():
      lines.append(line)
      if lines.count(": keep-alive") == 2:
        book.gate.set()
  assert "".join(x["choices"][0]["delta"]["content"] for x in events(lines)) == "so be it"


def test_requests_have_a_time_of_their_own_within_the_servers(served):
  ask, book, _ = served(timeout=5.0)
  for fields in ({}, {"timeout": 2}, {"timeout": 50}):
    ask.post(CHAT, json=chat(**fields))
  assert [job.timeout for job in book.jobs] == [5.0, 2.0, 5.0]


def test_rows_are_let_go_when_their_texts_are_whole(served):
  ask, book, _ = served()
  said = ask.post(TEXT, json=text(stop=" be", n=2)).json()
  assert [x["text"] for x in said["choices"]] == ["so", "so"] and book.jobs[0].cancelled == [True, True]
  assert said["usage"]["passes"] == 10  # of 16
  said = ask.post(TEXT, json=text(max_tokens=4)).json()
  assert said["choices"][0]["text"] == "so b" and said["usage"]["passes"] == 4


def test_texts_are_in_no_log_even_of_a_crash(served, llada, caplog):
  ask, _, _ = served(Book(llada, error=KeyError("no")))
  ask.post(TEXT, json=text(prompt="my secret"))
  assert "an answer has crashed" in caplog.text and "my secret" not in caplog.text


def test_counters_and_the_log_tell_no_text_unless_they_are_asked_to(served, caplog):
  ask, _, _ = served()
  ask.post(TEXT, json=text(prompt="secret"))
  ask.get("/v1/nothing%1b%0aforged")
  metrics = ask.get("/metrics").text
  assert 'lladax_requests_total{endpoint="/v1/completions",status="200"} 1.0' in metrics
  assert 'lladax_requests_total{endpoint="other",status="404"} 1.0' in metrics
  assert "lladax_first_text_seconds_count 1.0" in metrics and "lladax_rows_running 0.0" in metrics
  until(lambda: "nothing" in caplog.text)
  assert "POST /v1/completions 200 prompt_tokens=6 completion_tokens=8 passes=8" in caplog.text
  assert "secret" not in caplog.text and "so be it" not in caplog.text
  assert "\x1b" not in caplog.text and "\nforged" not in caplog.text
  ask, _, _ = served(log_text=True)
  ask.post(TEXT, json=text(prompt="secret\x1b[2J"))
  until(lambda: "so be it" in caplog.text)
  assert "secret" in caplog.text and "\x1b" not in caplog.text


def test_many_clients_at_once_get_what_each_asked_for(url, llada):
  def ask(i):
    return httpx.post(url + TEXT, json=text(prompt=f"{i}", seed=i, temperature=1.0), timeout=60).json()

  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    said = [x["choices"][0]["text"] for x in pool.map(ask, range(8))]
  options = {**OPTIONS, "temperature": 1.0, "early_stop": True, "seed": list(range(8))}
  assert said == llada.sample([str(i) for i in range(8)], **options).text


@pytest.fixture
def harness():
  pytest.importorskip("lm_eval")
  for library in ("tenacity", "aiohttp", "requests"):
    pytest.importorskip(library)
  from lm_eval.models import openai_completions

  return openai_completions


def test_the_harness_asks_for_texts(harness, url, llada):
  arguments = [(f"{i}", {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": False}) for i in range(2)]
  lm = harness.LocalCompletionsAPI(base_url=url + TEXT, model="tiny", tokenizer_backend=None, max_retries=1)
  found = lm.generate_until(requests("generate_until", *arguments))
  options = {**OPTIONS, "gen_length": 8, "early_stop": True, "seed": [1234] * 2}
  assert found == llada.sample(["0", "1"], until=["\n\n"], **options).text
  lm = harness.LocalChatCompletion(base_url=url + CHAT, model="tiny", max_retries=1)
  prompts = [lm.apply_chat_template([{"role": "user", "content": f"{i}"}]) for i in range(2)]
  found = lm.generate_until(requests("generate_until", *((p, a) for p, (_, a) in zip(prompts, arguments, strict=True))))
  want = [[{"role": "user", "content": f"{i}"}] for i in range(2)]
  assert found == llada.sample(want, until=["\n\n"], **options).text


@pytest.mark.parametrize("book", [True, False])
def test_the_harness_asks_for_likelihoods(harness, llada, url, book, monkeypatch, served):
  if not book and "NotImplementedError" in inspect.getsource(Scheduler.score):
    pytest.skip("the scheduler does not score yet")
  ask, _, _ = served() if book else (None, None, None)
  address = str(ask.base_url) if book else url
  lm = harness.LocalCompletionsAPI(
    base_url=address.rstrip("/") + TEXT, model="tiny", tokenizer_backend=None, max_retries=1, batch_size=2
  )
  monkeypatch.setattr(lm, "tokenizer", llada.tokenizer)
  monkeypatch.setattr(lm, "tokenized_requests", True)
  monkeypatch.setattr(lm, "tok_encode", lambda string, **_: llada.tokenizer.encode(string))
  pairs = [("ab", " cd"), ("q", "é"), ("long and longer", " x")]
  found = lm.loglikelihood(requests("loglikelihood", *pairs))
  prompts, answers = zip(*pairs, strict=True)
  want = llada.log_likelihood(list(prompts), list(answers), method="chain_rule")
  np.testing.assert_allclose([x for x, _ in found], want, rtol=1e-4)
  greedy = llada.sample("ab", gen_length=1, block_length=1, steps=1).tokens[0, -1:].tolist()
  if greedy[0] < 256:
    body = text(prompt=[97, 98, *greedy], echo=True, logprobs=1, max_tokens=1)
    logprobs = httpx.post(address.rstrip("/") + TEXT, json=body).json()["choices"][0]["logprobs"]
    assert logprobs["token_logprobs"][2] == max(logprobs["top_logprobs"][2].values())
    assert len(logprobs["tokens"]) == 4


@pytest.mark.parametrize("host", ["[", "x/page.js?", "a:b", "\xff"])
def test_no_host_makes_another_path_of_one(served, host):
  ask, _, _ = served(host="0.0.0.0")
  for path, said in (("/page.css", b"200"), ("/nothing", b"404")):
    answer = raw(ask, f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode("latin-1"))
    assert answer.startswith(b"HTTP/1.1 " + said), answer


def test_a_connection_on_which_no_request_comes_is_closed(served, monkeypatch):
  from lladax.serving import gate

  monkeypatch.setattr(gate, "PATIENCE", 0.2)
  ask, _, _ = served()
  whole = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
  for said in (b"", whole[:20], whole, whole + whole[:20]):
    with socket.create_connection((ask.base_url.host, ask.base_url.port)) as slow:
      slow.sendall(said)
      slow.settimeout(10)
      heard = b"".join(iter(lambda slow=slow: slow.recv(1000), b""))  # until it is closed
    assert heard.count(b"HTTP/1.1 200") == said.count(whole)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_nobody_reads_is_given_up(served, llada, monkeypatch, stream):
  from lladax.serving import gate

  monkeypatch.setattr(gate, "PATIENCE", 0.2)
  ask, book, _ = served(Book(llada, "x" * 200), connections=2)
  monkeypatch.setattr(replies.Asked, "answer", lambda self: {"a": "x" * 2**24})
  body = json.dumps(
    text(max_tokens=200, n=32, stream=stream, **({"stream_options": {"canvas": True}} if stream else {}))
  )
  head = f"POST {TEXT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
  with socket.create_connection((ask.base_url.host, ask.base_url.port)) as idle:
    idle.sendall((head + body).encode())
    until(lambda: book.jobs)
    until(lambda: all(book.jobs[0].cancelled), 60)
    until(lambda: ask.get("/healthz").status_code == 200)
