"""What others wrote is shown by a terminal, not obeyed."""

import io
import logging
import pathlib
import re
import unicodedata

import numpy as np
import pytest
from rich.table import Table

from lladax.devices import distributed
from lladax.drawing import unmasking
from lladax.mistake import Missing, Mistake
from lladax.terminal import Console, visible

HOSTILE = [
  "\x1b[2J", "\x1b]0;title\x07", "\x1b]8;;http://x\x1b\\y", "\x9b31m", "\x9d0;x\x9c", "\x90x", "a\bb", "a\rb", "\x7f",
  "\u202eabc\u202c", "\u2066x\u2069", "\u061c", "\u200f", "\u2028", "\x00", "\x0b\x0c", "\x1bc", "\x05", "\ud800",
]  # fmt: skip


def obeyed(text):
  """The characters of a text that a terminal obeys, or that turn text around."""
  bidi = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
  return [
    x
    for x in text
    if x not in "\n\t" and (unicodedata.category(x) in ("Cc", "Cs", "Zl", "Zp") or unicodedata.bidirectional(x) in bidi)
  ]


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_is_left_that_a_terminal_obeys(text):
  assert obeyed(text) or text in ("\u061c", "\u200f")
  assert not obeyed(visible(text)) and visible(text) != text and visible(visible(text)) == visible(text)
  visible(text).encode()


def test_all_other_text_stays_as_it_is():
  text = "".join(map(chr, [9, 10, *range(32, 127), *range(0xA0, 0x61C), *range(0x3000, 0xD800)])) + "😀👩‍👩‍👧"
  assert visible(text) == text


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("terminal", [True, False])
def test_a_console_and_a_table_show_it(text, terminal):
  told = io.StringIO()
  console = Console(file=told, force_terminal=terminal, color_system=None, width=80)
  console.print(f"a {text} b [bold]c[/] :smile:")
  table = Table("x", title=text)
  table.add_row(f"{text}[/nothing]")
  console.print(table)
  console.print(unmasking.terminal(unmasking.Unmasking((text, "b"), np.array([0, 1]), np.ones(2), text)))
  assert not obeyed(told.getvalue()) and "[bold]c[/] :smile:" in told.getvalue()


@pytest.mark.parametrize("text", HOSTILE)
def test_messages_show_it(text, capsys, monkeypatch):
  monkeypatch.setattr(distributed, "leave", lambda code: None)

  def mistaken(argv):
    logging.warning("left out: %s", text)
    raise Missing(f"data.corpus={text}\n: there is no such file")

  def crashing(argv):
    raise KeyError(text, RuntimeError(text))

  assert distributed.guard(mistaken, []) == 1
  told = capsys.readouterr().err
  assert told.count("\n") == 2 and not obeyed(told) and visible(text) in told
  assert distributed.guard(crashing, []) == 70
  assert not obeyed(capsys.readouterr().err)


def test_a_long_line_keeps_its_ends():
  said = str(Mistake(f"config.{'x' * 10**6}: there is no such field"))
  assert len(said) < 3000 and said.startswith("config.x") and said.endswith("x: there is no such field")


def test_pages_escape_what_a_model_wrote():
  wrote = "<script>alert(1)</script>\"'>&\x1b[2J\u202e"
  page = str(unmasking.html([unmasking.Unmasking((wrote,), np.array([1]), np.ones(1), wrote)], wrote))
  assert "<script>alert" not in page and "\x1b" not in page and "\u202e" not in page.replace(visible(wrote), "")


def test_every_console_is_ours():
  """Rich's own would let control sequences through, and take what stands in brackets for styles."""
  package = pathlib.Path(__file__).parent.parent / "lladax"
  for path in package.rglob("*.py"):
    source = path.read_text("utf-8")
    if path.name != "terminal.py":
      assert not re.search(r"rich\.console|rich import (console|print)|markup=|traceback\.print", source), path
