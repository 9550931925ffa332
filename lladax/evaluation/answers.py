"""Answers of a model in a file, so that an evaluation that was interrupted goes on where it stopped."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lladax.mistake import Mistake
from lladax.storage.writing import leniently

_LONGEST = 2**24  # bytes of a line


class Answers:
  """JSON lines [kind, key, answer], where a kind is a method of `harness.Harness`. Nothing that stands in one can run.

  A line that is none, of a damaged file or of another kind, is not read, and said. Answers are appended, a call in one
  write: two evaluations may share a file, and one that is killed while it writes costs no other line.
  """

  def __init__(self, path: str | Path):
    """Reads the file at `path`, if there is one; Mistake where it cannot be read or written."""
    self.path, self.known = Path(path).expanduser(), {}
    strange, line = 0, b"\n"
    try:
      self.path.parent.mkdir(parents=True, exist_ok=True)
      with self.path.open("a+b") as file:
        file.seek(0)
        for line in filter(bytes.strip, iter(lambda: file.readline(_LONGEST), b"")):  # a longer one is none
          try:
            kind, key, answer = json.loads(line)
            self.known[kind, key] = _checked(kind, answer)
          except (ValueError, TypeError, RecursionError):
            strange += 1
        if not line.endswith(b"\n"):
          file.write(b"\n")
    except OSError as error:
      raise Mistake(f"use_cache={self.path}: {error.strerror}; name a file that can be written") from None
    if strange:
      logging.warning("%s: what is no answer of lladax is not read (lines: %d); it goes on below", self.path, strange)

  def add(self, kind: str, found: Mapping[str, Any]) -> None:
    """Keeps the answers to keys."""
    lines = "".join(json.dumps([kind, key, answer]) + "\n" for key, answer in found.items())
    with leniently(self.path), self.path.open("ab", buffering=0) as file:
      file.write(lines.encode("ascii"))
    self.known |= {(kind, key): answer for key, answer in found.items()}


def _checked(kind: str, answer: Any) -> Any:
  """An answer as `Harness` gives it; ValueError for what is none."""
  match kind, answer:
    case ("generate_until", str()) | ("loglikelihood_rolling", float()):
      return answer
    case "loglikelihood", [float(), bool()]:
      return tuple(answer)
  raise ValueError
