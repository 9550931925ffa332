"""Text that others wrote, in a terminal: shown, never obeyed.

What a model, a user or a file says may hold control sequences, which clear a screen, rename a window or answer in the
user's name, and marks that turn the order of the text around. `visible` writes them as escapes. It is what `Mistake`,
the log, every drawing and every `Console` of the package put text through.
"""

import contextlib
import logging
import re
from collections.abc import Iterable
from typing import Any, TextIO

from rich import console
from rich.segment import Segment

# C0 and C1 controls; marks that turn text around; ends of lines that are no \n; lone surrogates, which are no text.
_OBEYED = re.compile(
  r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def visible(text: str) -> str:
  """The text, with escapes for what a terminal would obey: of C0 pictures (␛), of others numbers; tab, newline stay."""
  return _OBEYED.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
  code = ord(match[0])
  if code < 0x20:
    return chr(0x2400 + code)
  return "␡" if code == 0x7F else f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


class Console(console.Console):
  """Rich's, whose text is text: no control sequence of it gets through, and no [markup], emoji or highlighting."""

  def __init__(self, **options: Any):
    plain: dict[str, Any] = dict.fromkeys(("markup", "emoji", "highlight"), False)
    super().__init__(**plain | options)

  def render(self, renderable: Any, options: console.ConsoleOptions | None = None) -> Iterable[Segment]:
    """As Rich asks; its own control sequences are segments of their own."""
    for segment in super().render(renderable, options):
      yield segment if segment.control else segment._replace(text=visible(segment.text))


class Lossy:
  """A stream that loses what a full disk or a closed terminal does not take: no run ends for its log."""

  def __init__(self, stream: TextIO):
    self._stream = stream

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stream, name)

  def write(self, text: str) -> int:
    """As of a stream."""
    with contextlib.suppress(OSError):
      self._stream.write(text)
    return len(text)

  def flush(self) -> None:
    """As of a stream."""
    with contextlib.suppress(OSError):
      self._stream.flush()


class Formatter(logging.Formatter):
  """Of log lines."""

  def format(self, record: logging.LogRecord) -> str:
    """As logging asks."""
    return visible(super().format(record))
