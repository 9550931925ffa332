"""The page at /, in a browser, before a server that says what a test wants, when it wants it."""

import contextlib
import dataclasses
import http.server
import json
import pathlib
import shutil
import threading

import numpy as np
import pytest
import questions
import served

import lladax
from lladax.sampling import SamplerConfig
from lladax.serving import scheduler

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")

ROOM = pathlib.Path(lladax.__file__).parent / "serving"
CSP = (
  "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none';"
  " form-action 'none'; frame-ancestors 'none'"
)
KINDS = {".html": "text/html; charset=utf-8", ".css": "text/css", ".js": "text/javascript"}

# (token, the pass that unmasked it); six passes, out of order. Pass 6 makes " four" of " five".
TOKENS = (
  ("It", 2), (" is", 1), (" <script>", 4), ("alert(1)", 3), ("</script>", 5), (" caf", 2), ("⟨C3⟩", 3), ("⟨A9⟩", 5),
  (" four", 4), ("\n", 1), (".", 5), ("⏎", 3), ("⏎", 3), ("⏎", 4),
)  # fmt: skip
EDITED = 8
TEXT = "It is <script>alert(1)</script> café four\n."
INFILLED = (("A", 0), (" b", 2), (" c", 0), (" d", 1), (".", 0))


def canvas(tokens, k, edited=None):
  """What the server says of the canvas behind pass k."""
  stands = [at <= k for _, at in tokens]
  pieces = [x if is_in else None for (x, _), is_in in zip(tokens, stands, strict=True)]
  if edited is not None and stands[edited] and k < 6:
    pieces[edited] = " five"
  return {
    "index": 0, "pass": k, "block": 32, "given": 1, "pieces": pieces,
    "unmasked_at": [at * is_in for (_, at), is_in in zip(tokens, stands, strict=True)],
    "edited_at": None if edited is None else [6 * (k == 6 and i == edited) for i in range(len(tokens))],
    "confidence": [0.75 * is_in for is_in in stands], "done": k == 6,
  }  # fmt: skip


def chunks(tokens=TOKENS, passes=6, edited=EDITED, text=TEXT, key="delta"):
  """The chunks of a streamed answer, its text in the last pass."""
  for k in range(1, passes + 1):
    said = text if k == passes else ""
    choice = {"index": 0, "delta": {"content": said}} if key == "delta" else {"index": 0, "text": said}
    yield {"choices": [choice], "canvas": canvas(tokens, k, edited), "seed": 7}
  yield {"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 12, "total_tokens": 16, "passes": passes}}


class Server(http.server.ThreadingHTTPServer):
  """Serves the page's files, and answers every question with `answer`: chunks, or (status, headers, error).

  A chunk of None breaks the answer off.
  """

  daemon_threads = True

  def __init__(self):
    super().__init__(("127.0.0.1", 0), Handler)
    self.url = f"http://127.0.0.1:{self.server_address[1]}/"
    self.chats, self.key, self.loading, self.gate, self.bodies = True, None, 0, None, []
    self.answer = chunks()
    self.sampler = dataclasses.asdict(SamplerConfig())

  def go(self, n=1):
    """Lets n more chunks through."""
    self.gate.release(n)

  def handle_error(self, request, client_address):
    """A browser that went away is no error."""


class Handler(http.server.BaseHTTPRequestHandler):
  def log_message(self, *args):
    pass

  def say(self, status, content, kind="application/json", **headers):
    self.send_response(status)
    for name, value in (headers | {"Content-Type": kind, "Content-Security-Policy": CSP}).items():
      self.send_header(name.replace("_", "-"), value)
    self.end_headers()
    self.wfile.write(content if isinstance(content, bytes) else json.dumps(content).encode())

  def refused(self):
    if self.server.key is None or self.headers["Authorization"] == f"Bearer {self.server.key}":
      return False
    self.say(401, {"error": {"message": "the API key is not known", "param": None}})
    return True

  def do_GET(self):
    name = "page.html" if self.path == "/" else self.path[1:]
    if self.path == "/v1/models":
      if self.server.loading:
        self.server.loading -= 1
        self.say(503, {"error": {"message": "the model is being loaded"}}, Retry_After="1")
      elif not self.refused():
        about = {"max_length": 128, "block": 0, "sampler": self.server.sampler, "chats": self.server.chats}
        self.say(200, {"object": "list", "data": [{"id": "tiny", "object": "model", "lladax": about}]})
    elif (ROOM / name).is_file():
      self.say(200, (ROOM / name).read_bytes(), KINDS[pathlib.Path(name).suffix])
    else:
      self.say(404, {"error": {"message": f"there is no {self.path}"}})

  def do_POST(self):
    body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
    if self.refused():
      return
    self.server.bodies.append((self.path, body))
    answer, gate = self.server.answer, self.server.gate
    if isinstance(answer, tuple):
      status, headers, error = answer
      self.say(status, {"error": error}, **headers)
      return
    self.say(200, b": hello\n\n", "text/event-stream")
    for chunk in answer:
      if chunk is None:
        return
      if gate is not None:
        gate.acquire(timeout=10)
      line = f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n".encode()
      self.wfile.write(line[:40])  # a chunk comes in pieces, which may cut a character
      self.wfile.flush()
      self.wfile.write(line[40:])
      self.wfile.flush()
    self.wfile.write(b"data: [DONE]\n\n")


@pytest.fixture(scope="module")
def browser():
  with sync_api.sync_playwright() as playwright:
    options = ["--no-sandbox", "--disable-dev-shm-usage"]
    chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
    yield chromium
    chromium.close()


@pytest.fixture
def server():
  server = Server()
  thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
  thread.start()
  yield server
  if server.gate is not None:
    server.go(1000)
  server.shutdown()
  thread.join()
  server.server_close()


@pytest.fixture
def visit(browser, server):
  """Opens the page; what goes wrong in it fails the test, but for what is excused."""
  wrong, contexts, excused = [], [], []

  def open(*excuses, width=1000, height=700, **options):
    excused.extend(excuses)
    context = browser.new_context(viewport={"width": width, "height": height}, reduced_motion="reduce", **options)
    contexts.append(context)
    page = context.new_page()
    page.set_default_timeout(5000)
    page.on("dialog", lambda dialog: (wrong.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("request", lambda request: None if elsewhere(request.url) else wrong.append(f"asked for {request.url}"))
    page.goto(server.url)
    if server.key is None:
      page.get_by_text("tiny", exact=True).wait_for()
    return page

  def elsewhere(url):
    return url.startswith((server.url, "data:"))

  yield open
  for context in contexts:
    context.close()
  assert [x for x in wrong if not any(excuse in x for excuse in excused)] == []


def ask(page, text):
  page.locator("textarea").fill(text)
  page.locator("textarea").press("Enter")


def reply(page):
  return page.locator(".log .reply").last


def finished(page):
  page.locator(".log .reply:not(.running)").last.wait_for()
  return reply(page)


def shown(page):
  """The tokens that are seen, as text."""
  return reply(page).locator(".text i:not([hidden])").all_text_contents()


def slide(page, k):
  slider = reply(page).get_by_label("Pass")
  slider.fill(str(k))


def test_a_question_is_asked_and_tokens_appear_in_the_order_they_are_unmasked(visit, server):
  server.gate = threading.Semaphore(0)
  page = visit()
  ask(page, "What is\tit?")
  assert page.locator(".asked").text_content() == "What is\tit?"
  server.go()
  reply(page).get_by_text("pass 1 of 1").wait_for()
  assert shown(page) == ["░", " is", *"░░░░░░░", "\n", *"░░░░"]
  assert page.locator(".running").count() == 1 and page.get_by_role("button", name="Stop").is_visible()
  server.go(2)
  reply(page).get_by_text("pass 3 of 3").wait_for()
  assert shown(page)[:8] == ["It", " is", "░", "alert(1)", "░", " caf", "⟨C3⟩", "░"]  # half a character
  server.go(4)
  finished(page)
  # What ends the text is one sign, whatever its length; bytes are characters; a tag is text.
  assert shown(page) == ["It", " is", " <script>", "alert(1)", "</script>", " caf", "é", " four", "\n", ".", "⏎"]
  assert reply(page).locator(".end:not([hidden])").get_attribute("data-times") == "×3"
  assert page.locator("[aria-live]").text_content() == TEXT
  facts = reply(page).locator(".facts").text_content()
  assert all(x in facts for x in ("12 tokens", "6 passes", "2.0 tokens/pass", "tokens/s", "first token", "seed 7"))
  path, body = server.bodies[0]
  assert path == "/v1/chat/completions" and body == {
    "model": "tiny", "messages": [{"role": "user", "content": "What is\tit?"}], "stream": True,
    "stream_options": {"canvas": True, "include_usage": True},
  }  # fmt: skip


def test_the_next_question_has_the_conversation_and_a_new_one_has_not(visit, server):
  page = visit()
  ask(page, "one")
  finished(page)
  server.answer = chunks()
  ask(page, "two")
  page.get_by_text("12 tokens").nth(1).wait_for()
  assert [x["content"] for x in server.bodies[1][1]["messages"]] == ["one", TEXT, "two"]
  page.get_by_role("button", name="New conversation").click()
  assert page.locator(".log .reply").count() == 0
  server.answer = chunks()
  ask(page, "three")
  finished(page)
  assert [x["content"] for x in server.bodies[2][1]["messages"]] == ["three"]


def test_the_slider_goes_back_to_every_pass_and_to_what_stood_before_an_edit(visit, server):
  page = visit()
  ask(page, "?")
  finished(page)
  last = shown(page)
  slide(page, 4)
  assert shown(page)[:4] == ["It", " is", " <script>", "alert(1)"]
  assert shown(page)[4] == "░" * len("</script>") and " five" in shown(page) and " four" not in shown(page)
  slide(page, 0)
  assert not "".join(shown(page)).strip("░ \n")
  assert "14 masked" in reply(page).locator("output").text_content()
  slide(page, 6)
  assert shown(page) == last
  assert reply(page).locator(".edited").text_content() == " four"
  reply(page).get_by_role("button", name="Replay").click()
  reply(page).get_by_text("pass 2 of 6").wait_for()
  reply(page).get_by_text("pass 6 of 6").wait_for()
  assert shown(page) == last


def test_what_an_edit_replaced_before_anybody_saw_it_is_shown_as_such(visit, server):
  server.answer = list(chunks())[5:]
  page = visit()
  ask(page, "?")
  finished(page)
  assert shown(page)[7] == " four"
  slide(page, 5)
  assert shown(page)[7] == "▒"
  slide(page, 2)
  assert shown(page)[:3] == ["It", " is", " ░░░░░░░░"]


def test_places_that_stay_masked_behind_the_end_are_one_sign(visit, server):
  server.answer = chunks((("Yes", 1), ("⏎", 2), *[("x", 9)] * 20), edited=None, text="Yes")
  page = visit()
  ask(page, "?")
  finished(page)
  assert shown(page) == ["Yes", "⏎"]


def test_colours_tell_the_passes(visit, server):
  page = visit()
  ask(page, "?")
  finished(page)
  tokens = reply(page).locator(".text i:not([hidden])")
  colours = tokens.evaluate_all("all => all.map((x) => getComputedStyle(x).boxShadow)")
  by_pass = dict(zip([2, 1, 4, 3, 5, 2, 5, 6, 1, 5], colours, strict=False))
  assert len(set(by_pass.values())) == 6 and colours[0] == colours[5]


def test_what_is_known_of_a_token_is_told_under_the_pointer_by_a_tap_and_by_keys(visit, server):
  page = visit(has_touch=True)
  ask(page, "?")
  finished(page)
  tip = reply(page).locator(".tip")
  assert not tip.is_visible()
  reply(page).locator("i", has_text="four").hover()
  assert tip.text_content() == "pass 4 · 75.0% · edited at pass 6 · 75.0% · was “five”"
  reply(page).locator("i", has_text="alert").tap()
  assert tip.text_content() == "pass 3 · 75.0%"
  page.locator("textarea").focus()
  reply(page).locator(".text").focus()
  page.keyboard.press("ArrowRight")
  page.keyboard.press("ArrowRight")
  assert tip.text_content() == "pass 1 · 75.0%"
  page.keyboard.press("Escape")
  assert not tip.is_visible()


def test_stop_ends_a_reply_and_the_conversation_goes_on(visit, server):
  server.gate = threading.Semaphore(0)
  page = visit()
  ask(page, "one")
  server.go(3)
  reply(page).get_by_text("pass 3 of 3").wait_for()
  page.get_by_role("button", name="Stop").click()
  page.get_by_text("Stopped.").wait_for()
  server.go(100)
  server.answer, server.gate = chunks(), None
  ask(page, "two")
  page.get_by_text("12 tokens").wait_for()
  assert [x["content"] for x in server.bodies[1][1]["messages"]] == ["two"]  # of one nothing was final


def test_only_settings_that_were_changed_are_sent(visit, server):
  page = visit()
  sampler = page.get_by_role("button", name="Sampler")
  sampler.click()
  assert page.get_by_label("steps", exact=True).get_attribute("placeholder") == "64"
  assert page.get_by_label("threshold").first.get_attribute("placeholder") == "none"
  page.get_by_label("temperature").fill("0.5")
  page.get_by_label("max tokens").fill("none")
  page.get_by_label("remasking").select_option("random")
  page.get_by_label("early stop").select_option("true")
  page.get_by_role("button", name="Sampler · 4 changed").click()
  ask(page, "?")
  finished(page)
  always = ("model", "messages", "stream", "stream_options")
  sent = {k: v for k, v in server.bodies[0][1].items() if k not in always}
  assert sent == {"temperature": 0.5, "gen_length": None, "remasking": "random", "early_stop": True}


def test_a_bad_value_is_told_beside_its_field_and_the_question_is_not_lost(visit, server):
  page = visit("status of 400")
  page.get_by_role("button", name="Sampler").click()
  page.get_by_label("steps", exact=True).fill("many")
  page.get_by_role("button", name="Sampler").click()
  server.answer = (400, {}, {"message": "steps='many': must be a whole number", "param": "steps"})
  ask(page, "my question")
  page.get_by_text("steps='many': must be a whole number").wait_for()
  field = page.get_by_label("steps", exact=True)
  assert field.is_visible() and field.get_attribute("aria-invalid") == "true"
  assert server.bodies[0][1]["steps"] == "many"
  assert page.locator("textarea").input_value() == "my question" and page.locator(".log .reply").count() == 0
  field.fill("8")
  assert not page.locator(".composer .error").is_visible()
  server.answer = chunks()
  page.get_by_role("button", name="Send").click()
  finished(page)
  assert server.bodies[1][1]["steps"] == 8


@pytest.mark.parametrize(
  "answer, told",
  [
    ((429, {"Retry_After": "7"}, {"message": "the queue is full"}), "the queue is full: try again in 7 s"),
    ((503, {"Retry_After": "1"}, {"message": "the server is going down"}), "the server is going down"),
    ((500, {}, None), "The server answers 500|Internal Server Error"),
    ([{"error": {"message": "the batch has crashed", "param": None}}], "the batch has crashed"),
  ],
)
def test_an_error_is_one_line_and_the_conversation_goes_on(visit, server, answer, told):
  page = visit("status of")
  server.answer = answer
  ask(page, "once")
  error = page.locator(".composer .error")
  error.wait_for()
  assert any(x in error.text_content() for x in told.split("|"))
  server.answer = chunks()
  page.locator("textarea").press("Enter")
  finished(page)
  assert not error.is_visible() and len(server.bodies) == 2


@pytest.mark.parametrize(
  "last, told",
  [({"error": {"message": "the batch has crashed"}}, "the batch has crashed"), (None, "The answer broke off.")],
)
def test_an_error_halfway_stands_below_what_was_written(visit, server, last, told):
  page = visit()
  server.answer = [*list(chunks())[:3], last]
  ask(page, "?")
  reply(page).get_by_text(told).wait_for()
  finished(page)
  assert "alert(1)" in shown(page) and page.locator("textarea").input_value() == ""


def test_a_server_that_is_gone_is_told_and_the_question_is_kept(visit, server):
  page = visit("ERR_INTERNET_DISCONNECTED")
  page.context.set_offline(True)
  ask(page, "once")
  page.get_by_text("The server cannot be reached").wait_for()
  page.context.set_offline(False)
  page.get_by_role("button", name="Send").click()
  finished(page)
  assert server.bodies[0][1]["messages"][0]["content"] == "once"


def test_the_page_waits_for_a_model_that_is_being_loaded(visit, server):
  server.loading = 1
  page = visit("status of 503")
  assert page.get_by_role("button", name="Send").is_enabled() and not page.locator(".composer .error").is_visible()


def test_what_turns_text_around_is_shown_and_not_obeyed(visit, server):
  server.answer = chunks((("\u202eab\x1b", 1), (" ok\t", 2)), edited=None)
  page = visit()
  ask(page, "\u202e?")
  finished(page)
  assert shown(page) == ["\\u202eab␛", " ok\t"] and page.locator(".asked").text_content() == "\\u202e?"


def test_a_server_that_wants_a_key_gets_it(visit, server):
  server.key = "sesame"
  page = visit("status of 401")
  page.get_by_label("API key").fill("wrong")
  page.get_by_role("button", name="Use it").click()
  page.get_by_text("the API key is not known").wait_for()
  page.get_by_label("API key").fill("sesame")
  page.get_by_role("button", name="Use it").click()
  page.get_by_text("tiny", exact=True).wait_for()
  ask(page, "?")
  finished(page)
  page.reload()  # kept as long as the tab
  page.get_by_text("tiny", exact=True).wait_for()
  assert not page.get_by_label("API key").is_visible()


def test_masks_are_filled_in_between_what_is_given(visit, server):
  server.answer = chunks(INFILLED, 2, None, "A b c d.", key="text")
  page = visit()
  page.get_by_role("tab", name="Chat").press("ArrowRight")
  assert page.get_by_role("tab", name="Infill").get_attribute("aria-selected") == "true"
  ask(page, "no masks")
  page.get_by_text("There is no [MASK]").wait_for()
  page.locator("textarea").fill("A")
  page.get_by_role("button", name="Insert [MASK]").click()
  page.keyboard.type(" c")
  page.get_by_role("button", name="Insert 4 [MASK]s").click()
  page.get_by_role("button", name="Fill in").click()
  finished(page)
  assert server.bodies[0][0] == "/v1/completions"
  assert server.bodies[0][1]["prompt"] == "A[MASK] c" + "[MASK]" * 4
  assert shown(page) == ["A", " b", " c", " d", "."]
  assert reply(page).locator(".given").all_text_contents() == ["A", " c", "."]
  slide(page, 1)
  assert shown(page) == ["A", " ░", " c", " d", "."]
  page.get_by_role("tab", name="Chat").click()  # each tab has its own
  assert page.locator("#talk .log .reply").count() == 0 and page.locator("textarea").input_value() == ""


def test_a_model_that_does_not_chat_continues_a_text(visit, server):
  server.chats, server.answer = False, chunks(INFILLED[1:4:2], 2, None, " b d", key="text")
  page = visit()
  assert page.get_by_role("tab").all_text_contents() == ["Continue", "Infill"]
  ask(page, "A text")
  finished(page)
  assert reply(page).locator("b").text_content() == "A text"
  server.answer = chunks(INFILLED[1:4:2], 2, None, "!", key="text")
  page.locator("textarea").press("Enter")  # and goes on with it
  page.get_by_text("12 tokens").nth(1).wait_for()
  assert [body["prompt"] for _, body in server.bodies] == ["A text", "A text b d"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_scrolls_in_one_direction(visit, server, scheme):
  server.answer = chunks((("word" * 60, 1), *TOKENS), text="x" * 300)
  page = visit(width=360, height=640, color_scheme=scheme)
  page.get_by_role("button", name="Sampler").click()
  page.get_by_label("threshold").first.scroll_into_view_if_needed()
  width = "document.documentElement.scrollWidth"
  assert page.evaluate(width) == 360
  page.get_by_role("button", name="Sampler").click()
  ask(page, "long" * 100)
  finished(page)
  assert page.evaluate(width) == 360
  small = """all => all.map((x) => x.getBoundingClientRect()).filter((r) => r.height && r.height < 36).length"""
  assert page.locator("button, input, select, textarea").evaluate_all(small) == 0


@pytest.fixture
def real(server):
  """real(scheduler) -> `visit` sees the page of the real server, with a tiny random model."""
  pytest.importorskip("starlette")
  pytest.importorskip("uvicorn")
  pytest.importorskip("prometheus_client")
  llada = questions.tiny(max_length=256)
  with contextlib.ExitStack() as stack:

    def start(scheduler, **more):
      options = served.OPTIONS | {"temperature": 0.7} | more
      url, _ = stack.enter_context(served.serving(llada, scheduler(llada), options))
      server.url = f"{url}/"
      return llada, options

    yield start


def test_the_real_server_fills_a_reply_out_of_order_and_a_canvas(visit, real):
  llada, options = real(scheduler.Scheduler)
  page = visit()
  page.set_default_timeout(30_000)  # it compiles
  page.get_by_role("button", name="Sampler").click()
  page.get_by_label("seed").fill("5")
  ask(page, "Hi")
  finished(page)
  facts = reply(page).locator(".facts").text_content()
  assert "seed 5" in facts and "16 passes" in facts
  messages = [{"role": "user", "content": "Hi"}]
  expected = llada.sample([messages], **options | {"early_stop": True, "seed": [5]})
  assert page.locator("[aria-live]").text_content() == expected.text[0]
  at = expected.unmasked_at[0, -16:]
  assert (np.diff(at[:8]) < 0).any()
  slide(page, 3)
  reply(page).get_by_text("pass 3 of 16").wait_for()
  assert "".join(shown(page)).count("░") >= 16 - 3
  page.get_by_role("tab", name="Infill").click()
  page.locator("textarea").fill("The [MASK][MASK] end")
  page.get_by_role("button", name="Fill in").click()
  page.locator("#fill .log .reply:not(.running)").wait_for()
  text = "".join(shown(page))
  assert text.startswith("The ") and text.endswith(" end") and "░" not in text


def test_a_tag_that_the_real_server_sends_is_text(visit, real):
  real(lambda llada: served.Book(llada, "<script>alert(1)</script><img src=x onerror=alert(2)>"), gen_length=64)
  page = visit()
  page.set_default_timeout(30_000)  # it compiles
  ask(page, "?")
  finished(page)
  assert page.locator("[aria-live]").text_content() == "<script>alert(1)</script><img src=x onerror=alert(2)>"
  assert page.locator(".log script, .log img").count() == 0
