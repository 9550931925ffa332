"""The order of unmasking, drawn: frames in a terminal, a page or a notebook cell in HTML.

Without edits committed tokens never change, so one number per position, the forward pass that
committed it, replays the whole reverse process; of a token that was edited a second one says when
it came to stand there. This module knows nothing of tokenizers, models or jax: it is handed the
pieces of text and these arrays (`Unmasking`), and hands back a drawing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lladax.drawing import pages
from lladax.mistake import Mistake
from lladax.terminal import visible

if TYPE_CHECKING:
  from rich.text import Text

MASKED = "░"
EDITED = "▒"  # committed, and another one later

# Early to late: lightness rises and hue turns one way (OKLCH .54/265 to .675/70), and every colour
# keeps a contrast of 3:1 on black and on white, so one ramp serves both kinds of terminal.
_RAMP = ("#3a65d6", "#8755d6", "#c149ac", "#e04f65", "#dd6e36", "#cd851a")
_RAMP_RGB = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in _RAMP], float)


@dataclasses.dataclass(frozen=True, eq=False)
class Unmasking:
  """One finished canvas of L tokens and when each was unmasked; padding is left out.

  Attributes:
    pieces: the final text of each position; may hold spaces and newlines, or be empty.
    unmasked_at: [L] int, the forward pass (from 1) that committed the position; 0 = given.
    confidence: [L] float, the probability of the token at its commit; 1 where given.
    title: one line above the drawing.
    edited_at: [L] int, the forward pass that replaced the position last; 0 = none. None: nothing was.

  Raises:
    Mistake: lengths disagree, or `unmasked_at` is not non-negative integers.
  """

  pieces: tuple[str, ...]
  unmasked_at: np.ndarray
  confidence: np.ndarray
  title: str = ""
  edited_at: np.ndarray | None = None

  def __post_init__(self):
    L = len(self.pieces)
    for name in ("unmasked_at", "confidence") + (("edited_at",) if self.edited_at is not None else ()):
      array = np.asarray(getattr(self, name))
      if array.shape != (L,):
        raise Mistake(f"{name} must have shape ({L},), one per piece; got {array.shape}")
      object.__setattr__(self, name, array)
    integers = np.issubdtype(self.unmasked_at.dtype, np.integer)
    if L and not (integers and self.unmasked_at.min() >= 0):
      raise Mistake("unmasked_at must hold integers >= 0 (0 = given)")

  @property
  def final_at(self) -> np.ndarray:
    """[L] int, the forward pass that put the final token there."""
    return self.unmasked_at if self.edited_at is None else np.maximum(self.unmasked_at, self.edited_at)

  @property
  def steps(self) -> int:
    """The last forward pass that changed a token; 0 if all was given."""
    return int(self.final_at.max(initial=0))

  def _repr_html_(self) -> str:
    return html([self])


class Html(str):
  """A page as text, which a notebook cell draws."""

  def _repr_html_(self) -> str:
    return str(self)


def step_colours(steps: int) -> list[str]:
  """The colour of each step, of 64: rich caches few styles. Index 0, the given text, has none."""
  at = np.linspace(0, 63, steps).round() * (len(_RAMP) - 1) / 63
  rgb = np.stack([np.interp(at, range(len(_RAMP)), c) for c in _RAMP_RGB.T], -1).round()
  return ["", *(f"#{r:02x}{g:02x}{b:02x}" for r, g, b in rgb.astype(int).tolist())]


def frame(unmasking: Unmasking, step: int, steps: int | None = None) -> Text:
  """The canvas after forward pass `step` of `steps` (None: its last): given bold, unmasked coloured, masked ░.

  Where a token stood that was edited later it is ▒.
  """
  from rich.text import Text

  colours = ["bold", *step_colours(unmasking.steps if steps is None else max(steps, step))[1:]]
  parts = []  # neighbours of one style are one part: rich pays for each
  for piece, s, end in zip(unmasking.pieces, unmasking.unmasked_at.tolist(), unmasking.final_at.tolist(), strict=True):
    text, style = (visible(piece) if end <= step else EDITED, colours[s]) if s <= step else (MASKED, "dim")
    if parts and parts[-1][1] == style:
      parts[-1][0].append(text)
    else:
      parts.append(([text], style))
  return Text.assemble(*(("".join(texts), style) for texts, style in parts), overflow="fold")


def terminal(unmasking: Unmasking, *, frames: int = 4) -> Text:
  """The canvas at `frames` moments, evenly spaced; the last is the finished text.

  Where the terminal has no colour rich leaves plain text, and the frames still tell the order.

  Raises:
    Mistake: `frames` is less than 1.
  """
  from rich.text import Text

  if frames < 1:
    raise Mistake(f"frames must be at least 1, got {frames}")
  steps, unmasked_at = unmasking.steps, unmasking.unmasked_at
  out = Text(overflow="fold")
  if unmasking.title:
    out.append(visible(unmasking.title) + "\n", "bold underline")
  out.append("given", "bold")
  out.append(f" · {MASKED} masked · unmasked at step {min(1, steps)} ", "dim")
  for colour in step_colours(16)[1:]:
    out.append("■", colour)
  out.append(f" {steps}", "dim")
  for k in sorted({-(-steps * i // frames) for i in range(1, frames + 1)}):
    masked = int((unmasked_at > k).sum())
    out.append(f"\n\n── step {k} of {steps} · {masked} masked ──\n", "dim")
    out.append_text(frame(unmasking, k))
  return out


def html(unmaskings: Sequence[Unmasking], title: str = "") -> Html:
  """One self-contained page that replays the samples; also a fragment for a notebook cell.

  There are no ids and no network: any number of these may stand on one page. Without
  JavaScript it is the finished text, coloured by step.
  """
  return Html(pages.fill("unmasking.html", title=title, ramp=",".join(_RAMP), samples=map(_sample, unmaskings)))


def _sample(unmasking: Unmasking) -> dict[str, Any]:
  """What the page says of one sample: its tokens, and order against position, one dot per token, time upwards."""
  steps, L, colours = unmasking.steps, len(unmasking.pieces), step_colours(unmasking.steps)
  unmasked_at, confidence = unmasking.unmasked_at.tolist(), unmasking.confidence.tolist()
  dots: list[list[str]] = [[] for _ in colours]
  for x, s in enumerate(unmasked_at):
    # Dots are lines of almost no length with round caps: they stay round however wide the plot.
    dots[s].append(f"M{x} {steps + 0.5}h1" if s == 0 else f"M{x}.5 {steps - s + 0.5}h.01")
  tokens = [
    (visible(piece), end, colours[end], f"step {s}{f', edited at step {end}' * (end > s)} · probability {p:.3f}")
    for piece, s, end, p in zip(unmasking.pieces, unmasked_at, unmasking.final_at.tolist(), confidence, strict=True)
  ]
  floor, *later = map("".join, dots)  # the given text is the floor
  return {
    "title": unmasking.title, "tokens": tokens, "steps": steps, "L": L, "floor": floor,
    "dots": [(s, colours[s], d) for s, d in enumerate(later, 1) if d], "dot": f"{np.clip(600 / (L or 1), 2.5, 6):.1f}",
  }  # fmt: skip


def heat_map(unmaskings: Sequence[Unmasking], title: str = "") -> Html:
  """Order against position as a density: the share of the canvases that unmasked a position at a step.

  Canvases of different lengths line up at their right ends, as they do while they are sampled. A cell may hold several
  positions and steps, and tells its numbers under the pointer. It is a page, and a fragment, as `html` is.

  Raises:
    Mistake: there is no canvas with a token in it.
  """
  L, steps = max((len(u.pieces) for u in unmaskings), default=0), max((u.steps for u in unmaskings), default=0)
  if not L:
    raise Mistake("heat_map: there is no canvas with a token in it")
  w, h = -(-L // 96), max(1, -(-steps // 64))  # positions and steps of a cell
  X, Y = -(-L // w), max(1, -(-steps // h))
  count, confidence = np.zeros((2, Y + 1, X))  # row 0: given
  for u in unmaskings:
    cell = -(-u.unmasked_at // h), np.arange(L - len(u.pieces), L) // w
    np.add.at(count, cell, 1)
    np.add.at(confidence, cell, u.confidence)
  size_X = len(unmaskings) * np.minimum(w, L - w * np.arange(X))
  share = count / size_X
  peak = share[1:].max() or 1.0
  cells = []
  for y, x in np.argwhere(count).tolist():
    when, how_sure, look = "given", "", f"{share[0, x]:.2f}"
    if y:
      look = f"{100 * share[y, x] / peak:.0f}%"
      when, how_sure = _span("step", y - 1, h, steps), f" · mean probability {confidence[y, x] / count[y, x]:.3f}"
    told = f"{_span('position', x, w, L)} · {when} · {count[y, x]:.0f} of {size_X[x]} tokens ({share[y, x]:.1%})"
    cells.append((x, y, look, told + how_sure))
  positions = [(f"{60 + 640 * (t - 0.5) / (X * w):.1f}", t) for t in _ticks(L)]
  times = [(f"{314 - 300 * (t - 0.5) / (Y * h):.1f}", t) for t in _ticks(steps)]
  values = {"X": X, "Y": Y, "cells": cells, "positions": positions, "times": times, "peak": f"{peak:.0%}"}
  return Html(pages.fill("heat_map.html", title=title, canvases=len(unmaskings), **values))


def _span(word: str, i: int, width: int, last: int) -> str:
  """What the i-th cell of so many positions or steps covers."""
  first, end = i * width + 1, min((i + 1) * width, last)
  return f"{word} {first}" if first == end else f"{word}s {first}–{end}"


def _ticks(n: int) -> list[int]:
  """1, and about six round numbers up to n."""
  every = next(m * 10**k for k in range(9) for m in (1, 2, 5) if n <= 7 * m * 10**k)
  return sorted({min(1, n), *range(every, n + 1, every)})
