"""A conversation in the terminal, in which a reply appears in the order it is unmasked.

The life of a message: a line of standard input -> the history, of which as much is sent as fits the model ->
`LLaDA.stream`, a canvas after every forward pass -> the part behind the prompt, up to the first token that ends it ->
drawn -> the finished text joins the history.
Where standard output is no terminal there is nothing to watch: it gets the replies alone, and all else goes to stderr.
"""

import contextlib
import dataclasses
import json
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.live import Live
from rich.text import Text

from lladax import sampling
from lladax.config import Config
from lladax.devices import sharding
from lladax.drawing import unmasking
from lladax.inference.llada import LLaDA, Sampled
from lladax.inference.load import asked, load
from lladax.mistake import Mistake
from lladax.sampling import SamplerConfig
from lladax.storage.writing import reason
from lladax.terminal import Console, visible

Messages = list[dict[str, str]]

HELP = """\
/reset      forget the conversation (not the system prompt)
/save FILE  write the conversation as JSON lines
/help       this
/quit       leave, as Ctrl-D does; Ctrl-C ends a reply that takes too long"""


def run(config: Config, workdir: Path, system: str = "") -> None:
  """Talks with the workdir's last checkpoint, sampled as its config says; a reply ends at EOS or EoT."""
  options = dataclasses.asdict(config.sample)
  del options["early_stop"]
  talk(load(workdir, mesh=sharding.make_mesh(config.mesh), **asked(config.model)), system, options)


def talk(llada: LLaDA, system: str = "", options: Mapping[str, Any] | None = None) -> Messages:
  """Reads messages and commands from standard input until it ends or says /quit; returns the conversation.

  Args:
    llada: the model, with a tokenizer.
    system: the system prompt; "" is none.
    options: those of `SamplerConfig`; `early_stop` is on unless told otherwise. Each reply has noise of its own, the
      same whenever the same is asked from the start.

  Raises:
    Mistake: the model has no tokenizer; and, where standard output is no terminal, whatever else cannot be done.
  """
  if llada.tokenizer is None:
    raise Mistake("this model has no tokenizer, and so no chat template: it cannot chat")
  console, notes = Console(), Console(stderr=True, soft_wrap=True)
  watched = console.is_terminal
  start: Messages = [{"role": "system", "content": system}] if system else []
  messages, asked_before, left_out = list(start), 0, 0
  options = {"early_stop": True} | dict(options or {})
  seed = options.pop("seed", SamplerConfig.seed)
  if watched:
    notes.print("/help lists the commands", style="dim")
  while True:
    try:
      line = _read("> " if watched else "")
      if line in ("/reset", "/quit", "/help"):
        if line == "/quit":
          return messages
        if line == "/reset":
          messages, left_out = list(start), 0
        notes.print(HELP if line == "/help" else "the conversation starts anew", style="dim")
      elif line.startswith("/"):
        notes.print(_save(line, messages), style="dim")
      elif line:
        asked = [*messages, {"role": "user", "content": line}]
        sent = _fitting(llada, asked, len(start), options)
        if len(asked) - len(sent) > left_out:
          left_out = len(asked) - len(sent)
          notes.print(f"the model no longer sees the oldest {left_out} messages; /reset starts anew", style="dim")
        asked_before += 1
        reply = _answer(llada, sent, options | {"seed": sampling.nth_seed(seed, asked_before - 1)}, console)
        messages = [*asked, {"role": "assistant", "content": reply}]
    except EOFError:
      if watched:
        notes.print()
      return messages
    except KeyboardInterrupt:
      if not watched:
        raise
      notes.print("\ninterrupted: the message is forgotten; /quit or Ctrl-D leave", style="dim")
    except Mistake as error:
      if not watched:
        raise
      notes.print(str(error), style="red")


def _read(prompt: str) -> str:
  """A line of standard input; where somebody types it, with a prompt and a history."""
  typed = sys.stdin.isatty()
  if typed:
    with contextlib.suppress(ImportError):  # Windows has none
      import readline  # noqa: F401  (input() uses it)
  try:
    return input(prompt if typed else "").strip()
  except UnicodeDecodeError:
    raise Mistake("standard input is not UTF-8") from None


def _save(line: str, messages: Messages) -> str:
  """Obeys "/save FILE"; returns what was written."""
  command, _, name = line.partition(" ")
  if command != "/save":
    raise Mistake(f"{command}: there is no such command; /help lists them")
  if not name.strip():
    raise Mistake("/save: name a file, as in /save talk.jsonl")
  path = Path(name.strip()).expanduser()
  try:
    path.write_text("".join(json.dumps(m, ensure_ascii=False) + "\n" for m in messages), encoding="utf-8")
  except OSError as error:
    raise Mistake(f"/save: {path} cannot be written: {reason(error)}") from None
  return f"{len(messages)} messages written to {path}"


def _fitting(llada: LLaDA, messages: Messages, system: int, options: Mapping[str, Any]) -> Messages:
  """The messages without the oldest turns, so that they and a reply fit the model; the first `system` always stay.

  The last one stays, too: where it is too long by itself, the sampler says so.
  """
  assert llada.tokenizer is not None
  c, kept = SamplerConfig(**options), list(messages)
  room = llada.model.max_length - (c.gen_length or llada.model.block or c.block_length)
  while len(kept) > system + 1 and len(llada.tokenizer.chat(kept)) > room:
    del kept[system : system + 2]  # what was asked, and its reply
  return kept


def _answer(llada: LLaDA, messages: Messages, options: dict[str, Any], console: Console) -> str:
  """The reply to a conversation, after it has been shown."""
  if not (console.is_terminal and llada.model.objective.fills):
    reply = llada.chat(messages, **options).text[0].strip()
    print(visible(reply) if console.is_terminal else reply, flush=True)
    return reply
  began, text, out, first = time.monotonic(), Text(), None, ""
  with Live(console=console, auto_refresh=False, transient=True) as live:
    for out in llada.stream(messages, every="step", **options):
      if not first and llada.model.block and _has_begun(llada, out):
        first = f" (the first block after {time.monotonic() - began:.2f} s)"
      text = unmasking.frame(_reply(llada, out), out.nfe, options.get("steps"))
      live.update(_window(text, console), refresh=True)
  assert out is not None
  console.print(text)
  tokens = len(_reply(llada, out).pieces)
  console.print(f"{out.nfe} forward passes for {tokens} tokens, {time.monotonic() - began:.1f} s{first}", style="dim")
  return out.text[0].strip()


def _has_begun(llada: LLaDA, out: Sampled) -> bool:
  """Whether the block that the reply begins in, of a model of blocks, is all there."""
  tokens, there = out.tokens[0, out.padding[0] :], out.unmasked_at[0, out.padding[0] :] > 0
  first = int(np.argmax(there | (tokens == llada.mask_id)))  # a prompt has no [MASK]
  return bool(there[first : (first // llada.model.block + 1) * llada.model.block].all())


def _reply(llada: LLaDA, out: Sampled) -> unmasking.Unmasking:
  """What the canvas holds behind the prompt, up to the first token that ends a reply."""
  whole, tokens = out.unmaskings()[0], out.tokens[0, out.padding[0] :]
  first = int(np.argmax(whole.unmasked_at > 0))
  ends = np.flatnonzero(np.isin(tokens, llada.ends))
  last = min([int(i) for i in ends if i >= first], default=len(tokens))
  drawn: list[tuple[str, int]] = []
  for piece in zip(whole.pieces[first:last], whole.unmasked_at[first:last].tolist(), strict=True):
    drawn.append(piece)
    for n in (2, 3, 4):  # tokens that are bytes of one character, such as ⟨C3⟩⟨A9⟩, become it with the last of them
      run = "".join(text for text, _ in drawn[-n:])
      if re.fullmatch("(⟨[0-9A-F]{2}⟩)+", run):
        with contextlib.suppress(UnicodeDecodeError):
          drawn[-n:] = [(bytes.fromhex(re.sub("[⟨⟩]", "", run)).decode(), max(step for _, step in drawn[-n:]))]
  return unmasking.Unmasking(
    tuple(text for text, _ in drawn), np.array([step for _, step in drawn], int), np.ones(len(drawn))
  )


def _window(text: Text, console: Console) -> Text:
  """The lines that fit the terminal: the last ones in which something has been unmasked."""
  lines, height = text.wrap(console, console.width), console.height - 2
  if len(lines) <= height:
    return text
  unmasked = [i for i, line in enumerate(lines) if set(line.plain) - {unmasking.MASKED}]
  end = max(height, unmasked[-1] + 1 if unmasked else 0)
  return Text("\n").join(lines[end - height : end])
