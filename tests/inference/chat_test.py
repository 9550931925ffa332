"""A conversation through a pipe and on a terminal: what is asked, what is shown, what is said of bad input."""

import dataclasses
import io
import json
import pathlib
import re
import subprocess
import sys
import types

import numpy as np
import pytest
from rich.console import Console
from rich.text import Text

import lladax
from lladax import config, diffusion
from lladax.inference import chat
from lladax.inference.llada import Sampled
from lladax.mistake import Mistake
from lladax.sampling import SamplerConfig

ROOT = pathlib.Path(__file__).parents[2]
PROMPT, EOS, EOT, MASK, WIDTH = 5, 256, 257, 258, 24  # the fake's ids are bytes


class Model:
  objective, max_length, block = diffusion.Masked(), 200, 0


class Template:
  def chat(self, messages):
    return [token for m in messages for token in m["content"].encode()]


class Fake:
  """Replies by the book: "yes", or the last message backwards; unmasks from the right, two tokens a step."""

  model, tokenizer, mask_id, eos_id, eot_id, ends = Model(), Template(), MASK, EOS, EOT, (EOS, EOT)

  def __init__(self, reply=None):
    self.reply, self.asked, self.options = reply, [], []

  def stream(self, messages, every="block", **options):
    SamplerConfig(**options)  # an unknown option is a TypeError
    if len(messages[-1]["content"]) > 100:
      raise Mistake("a canvas of 101 tokens is longer than model.max_length=100")
    self.asked.append(messages)
    self.options.append(options)
    text = messages[-1]["content"][::-1] if self.reply is None else self.reply
    tokens = np.array([[EOS] * 3 + [65] * PROMPT + [*text.encode(), EOT] + [EOS] * (WIDTH - len(text.encode()))])
    at = np.zeros_like(tokens)
    at[0, 3 + PROMPT :] = np.arange(tokens.shape[1] - 3 - PROMPT)[::-1] // 2 + 1
    for k in range(1, at.max() + 1) if every == "step" else [at.max()]:
      now = np.where(at > k, MASK, tokens)
      done = text if k == at.max() else ""
      yield Sampled(
        text=[f"\n{done} "], tokens=now, unmasked_at=np.where(at > k, 0, at), confidence=np.ones(at.shape), nfe=k,
        padding=np.array([3]), mask_id=MASK, piece=piece,
      )  # fmt: skip

  def chat(self, messages, **options):
    *_, last = self.stream(messages, **options)
    return last


def piece(i):
  return {MASK: "░", EOS: "⏎", EOT: "<|eot_id|>"}.get(i) or (chr(i) if i < 128 else f"⟨{i:02X}⟩")


@pytest.fixture
def talk(monkeypatch, capsys):
  """talk(fake, lines, terminal=False, **arguments) -> (conversation, stdout, stderr)."""

  def run(fake, *lines, terminal=False, **arguments):
    colour = {"FORCE_COLOR": "1", "TERM": "xterm-256color", "COLORTERM": "truecolor"} if terminal else {}
    for name in ("NO_COLOR", "FORCE_COLOR", "TERM", "COLORTERM"):
      monkeypatch.delenv(name, raising=False)
    for name, value in {"COLUMNS": "60", "LINES": "12", **colour}.items():
      monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
    messages = chat.talk(fake, **arguments)
    return messages, *capsys.readouterr()

  return run


def test_only_the_replies_go_to_a_pipe_and_the_history_is_sent(talk):
  fake = Fake()
  messages, out, err = talk(fake, "ab", "", "  cd ", options={"steps": 8})
  assert (out, err) == ("ba\ndc\n", "")
  assert [(m["role"], m["content"]) for m in messages] == [
    ("user", "ab"), ("assistant", "ba"), ("user", "cd"), ("assistant", "dc")
  ]  # fmt: skip
  assert fake.asked == [messages[:1], messages[:3]]
  assert [x.pop("seed") for x in fake.options][0] == 0
  assert fake.options == [{"steps": 8, "early_stop": True}] * 2
  talk(fake, "ab", options={"early_stop": False})
  assert fake.options[-1] == {"early_stop": False, "seed": 0}


def test_every_reply_has_noise_of_its_own_and_the_same_when_all_is_asked_again(talk):
  fake = Fake()
  for _ in range(2):
    talk(fake, "ab", "ab", "/reset", "ab", options={"seed": 7})
  seeds = [x["seed"] for x in fake.options]
  assert seeds[:3] == seeds[3:] and len(set(seeds)) == 3 and seeds[0] == 7


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize(
  ("options", "room"), [({"gen_length": 150}, 50), ({"gen_length": None, "block_length": 160}, 40)]
)
def test_a_conversation_that_outgrows_the_model_loses_its_oldest_turns(talk, tmp_path, terminal, options, room):
  fake, path, lines = Fake(), tmp_path / "talk.jsonl", [f"{i} and so on" for i in range(6)]  # 11 tokens each
  messages, _, err = talk(fake, *lines, f"/save {path}", terminal=terminal, system="Be brief.", options=options)
  assert [json.loads(line) for line in path.read_text("utf-8").splitlines()] == messages  # which is all of it
  assert [m["content"] for m in messages[1::2]] == lines
  for i, asked in enumerate(fake.asked):
    begins = 1
    while len(Template().chat([messages[0], *messages[begins : 2 * i + 2]])) > room:
      begins += 2
    assert asked == [messages[0], *messages[begins : 2 * i + 2]]
    said = f"the model no longer sees the oldest {begins - 1} messages; /reset starts anew"
    assert err.count(said) == (begins > 1)
  assert begins > 5
  _, _, err = talk(fake, *lines[:3], "/reset", *lines[:3], options={"gen_length": 160})
  assert err.count("the oldest 2 messages") == 2 and fake.asked[-1][0]["content"] == lines[1]


def test_reset_keeps_the_system_prompt_and_quit_leaves(talk):
  fake = Fake("yes")
  messages, out, err = talk(fake, "one", "/reset", "two", "/quit", "three", system="Be brief.")
  assert out == "yes\nyes\n" and err == "the conversation starts anew\n"
  assert [m["content"] for m in messages] == ["Be brief.", "two", "yes"]
  assert [m["content"] for m in fake.asked[1]] == ["Be brief.", "two"] and fake.asked[1][0]["role"] == "system"


def test_save_writes_json_lines_and_says_so(talk, tmp_path):
  path = tmp_path / "a talk.jsonl"
  messages, _, err = talk(Fake("né\n2"), "hé", f"/save {path}", "more")
  assert err == f"2 messages written to {path}\n"
  assert [json.loads(line) for line in path.read_text("utf-8").splitlines()] == messages[:2]
  assert "né" in path.read_text("utf-8")


def test_help_names_every_command(talk):
  _, out, err = talk(Fake(), "/help")
  assert not out and all(command in err for command in ("/reset", "/save FILE", "/help", "/quit", "Ctrl-D"))


BAD = [
  ("/save", "/save: name a file"),
  ("/save /nowhere/x/y.jsonl", "/save: /nowhere/x/y.jsonl cannot be written: No such file"),
  ("/svae x", "/svae: there is no such command; /help lists them"),
  ("long " * 30, "a canvas of 101 tokens is longer than"),
]


@pytest.mark.parametrize(("line", "message"), BAD)
def test_bad_input_ends_a_pipe(talk, line, message):
  with pytest.raises(ValueError, match="^" + re.escape(message)) as error:
    talk(Fake(), line)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(("line", "message"), BAD)
def test_bad_input_is_a_line_on_a_terminal_and_leaves_the_history_alone(talk, line, message):
  messages, _, err = talk(Fake(), "ab", line, "cd", terminal=True)
  assert message in err and "Traceback" not in err
  assert [m["content"] for m in messages] == ["ab", "ba", "cd", "dc"]


def test_a_model_without_tokenizer_is_refused(talk):
  fake = Fake()
  fake.tokenizer = None
  with pytest.raises(ValueError, match="no tokenizer"):
    talk(fake, "ab")


def test_input_that_is_not_utf8_is_one_line(monkeypatch):
  monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="utf-8"))
  with pytest.raises(ValueError, match="^standard input is not UTF-8$"):
    chat.talk(Fake())


def test_a_terminal_shows_the_order_of_unmasking_in_colour(talk):
  messages, out, _ = talk(Fake("abcd"), "x", terminal=True, options={"steps": 13})
  assert messages[-1]["content"] == "abcd"
  plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out)
  frames = re.findall(r"[abcd░]{4,}", plain)
  seen = [f for f in ("░░░d", "░bcd", "abcd") if f in frames]  # from the right, two a step
  assert len(seen) == 3 and sorted(seen, key=frames.index) == seen
  assert {len(f) for f in frames if "d" in f} == {4}  # nothing is shown behind the end of the reply
  colours = dict(re.findall(r"\x1b\[([\d;]+)m(a|bc|d)\x1b", out[out.rindex("░") :]))
  assert sorted(colours.values()) == ["a", "bc", "d"]  # in the finished text a colour for each step
  assert re.search(r"13 forward passes for 4 tokens, \d+\.\d s\n", plain)


def test_of_a_model_of_blocks_a_terminal_says_when_the_first_was_there(talk, monkeypatch):
  """The prompt's five tokens are in it: three are left."""
  monkeypatch.setattr(Model, "block", 8)
  clock = iter(range(100))
  monkeypatch.setattr(chat, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
  _, out, _ = talk(Fake("abcd"), "x", terminal=True)
  plain = " ".join(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out).split())
  assert "13 forward passes for 4 tokens, 2.0 s (the first block after 1.00 s)" in plain


def test_a_character_of_several_tokens_appears_whole(talk):
  _, out, _ = talk(Fake("a日é!"), "x", terminal=True)
  plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out)
  assert "a日é!" in plain and "⟨" not in plain[plain.rindex("a日é!") :]


@pytest.mark.parametrize(
  ("text", "shown"),
  [
    ("a\nb░\nc", "a\nb░\nc"),  # it fits
    ("0\n1\n2\n3\n░\n░\n", "1\n2\n3"),  # the last lines that hold something
    ("░" * 35, "░" * 10 + "\n" + "░" * 10 + "\n" + "░" * 10),
  ],
)
def test_of_a_long_reply_the_lines_at_work_are_shown(text, shown):
  assert chat._window(Text(text), Console(width=10, height=5)).plain.rstrip("\n") == shown


def test_interrupting_a_reply_forgets_the_message(talk):
  class Slow(Fake):
    def stream(self, messages, every="block", **options):
      if messages[-1]["content"] == "slow":
        raise KeyboardInterrupt
      return super().stream(messages, every, **options)

  messages, _, err = talk(Slow(), "slow", "ab", terminal=True)
  assert [m["content"] for m in messages] == ["ab", "ba"] and "interrupted" in err
  with pytest.raises(KeyboardInterrupt):
    talk(Slow(), "slow")


@pytest.mark.usefixtures("quick_compiles")
@pytest.mark.slow
def test_with_a_model_through_the_door(tiny_workdir, tmp_path):
  """The replies are those of `LLaDA.chat`, each to the whole conversation before it."""
  path = tmp_path / "talk.jsonl"
  flags = ["--mode=chat", f"--workdir={tiny_workdir}", "--system=Be brief."]
  lines = f"red\ngreen\n/save {path}\n"
  done = subprocess.run(
    [sys.executable, "-m", "lladax.main", *flags], cwd=ROOT, input=lines, capture_output=True, text=True,
    timeout=300,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert f"5 messages written to {path}" in done.stderr
  messages = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
  assert [m["role"] for m in messages] == ["system", "user", "assistant", "user", "assistant"]
  assert done.stdout == f"{messages[2]['content']}\n{messages[4]['content']}\n"
  options = dataclasses.asdict(config.load(tiny_workdir).sample) | {"early_stop": True}
  llada = lladax.load(tiny_workdir)
  for n in (2, 4):
    assert llada.chat(messages[:n], **options).text[0].strip() == messages[n]["content"]


@pytest.mark.usefixtures("quick_compiles")
def test_a_terminal_and_a_pipe_get_the_same_reply(tiny_workdir, talk):
  llada = lladax.load(tiny_workdir)
  options = dataclasses.asdict(config.load(tiny_workdir).sample) | {"early_stop": True}
  piped, _, _ = talk(llada, "red", options=options)
  watched, out, _ = talk(llada, "red", terminal=True, options=options)
  assert piped == watched and "forward passes" in out


@pytest.mark.usefixtures("quick_compiles")
def test_a_long_conversation_through_a_pipe_with_a_model(tiny_workdir, talk):
  llada = lladax.load(tiny_workdir)
  short = dataclasses.replace(llada, model=dataclasses.replace(llada.model, max_length=96))
  messages, out, err = talk(short, *["red and"] * 4, options={"gen_length": 16, "block_length": 16, "steps": 2})
  assert len(messages) == 8 and out.count("\n") >= 4 and "the oldest 2 messages" in err
  with pytest.raises(Mistake, match="is longer than model.max_length=96"):
    talk(short, "red " * 30, options={"gen_length": 16, "block_length": 16})
