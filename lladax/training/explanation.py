"""A roofline, shown: tables in a terminal, a page, a picture of several beside each other."""

import collections
import sys
from collections.abc import Mapping
from typing import Any

from rich.table import Table

from lladax.drawing import pages
from lladax.terminal import Console
from lladax.training.roofline import EXPOSED, HIDDEN, Roofline

_COLOURS = {
  "matmul": "#3a65d6", "attention": "#8755d6", "head: matmul": "#c149ac", "head: softmax": "#e04f65",
  "element-wise": "#dd6e36", "optimizer": "#cd851a", "copies": "#8d9099", EXPOSED: "#0b7a3e", HIDDEN: "#7fc79d",
}  # fmt: skip
_HEADER = ("ms", "runs", "GFLOPs a run", "MiB a run", "kind", "where it comes from")


def picture(rows: Mapping[str, Roofline]) -> str:
  """Bars of the time by kind, one for each title, as SVG; the mark is where the model's FLOPs alone would end."""
  return pages.fill("roofline.svg", **_drawn(rows))


def _drawn(rows: Mapping[str, Roofline]) -> dict[str, Any]:
  longest, bars = max(x.total for x in rows.values()), []
  for title, x in rows.items():
    parts, left = [], 0.0
    for kind, seconds in x.seconds.items():
      if kind != HIDDEN and seconds:
        width = round(700 * seconds / longest, 1)
        parts.append({"kind": kind, "x": round(left, 1), "width": width, "time": clock(seconds)})
        left += width
    bars.append({
      "title": title, "parts": parts, "hidden": round(700 * x.seconds[HIDDEN] / longest, 1),
      "words": f"at least {clock(x.total)}, at most {x.utilisation:.1%} of the peak",
      "peak": round(700 * x.utilisation * x.total / longest, 1),
    })  # fmt: skip
  used = {part["kind"] for bar in bars for part in bar["parts"]} | {HIDDEN for bar in bars if bar["hidden"]}
  return {"bars": bars, "colours": {kind: colour for kind, colour in _COLOURS.items() if kind in used}}


def clock(seconds: float) -> str:
  """0.5623 -> "562 ms"; 0.00012 -> "0.12 ms"; 50.854 -> "50.9 s"."""
  places = 0 if seconds >= 0.02 else 1 if seconds >= 0.002 else 2
  return f"{seconds:,.1f} s" if seconds >= 2 else f"{1e3 * seconds:,.{places}f} ms"


def page(found: Roofline, title: str) -> str:
  """Picture, largest kernels and doubts as a page; the title says what was compiled."""
  return pages.fill(
    "roofline.html", title=title, words=_words(found), header=_HEADER, **_drawn({"": found}),
    rows=_largest(found), doubts=_doubts(found),
  )  # fmt: skip


def show(found: Roofline) -> None:
  """Tables on stdout: the time by kind, and the ten longest kernels."""
  console = Console(width=None if sys.stdout.isatty() else 180)
  flops, size = found.flops, found.nbytes
  table = Table("kind of kernel", "ms", "of the step", "TFLOPs", "GiB", title="roofline of the train step, an estimate")
  for kind, seconds in found.seconds.items():
    share = "beside the others" if kind == HIDDEN else f"{seconds / found.total:.1%}"
    table.add_row(kind, f"{1e3 * seconds:,.1f}", share, *(f"{x.get(kind, 0) / n:,.1f}" if x.get(kind) else ""
                  for x, n in ((flops, 1e12), (size, 2**30))))  # fmt: skip
  console.print(table)
  table = Table(*_HEADER, title="the longest kernels")
  for row in _largest(found):
    table.add_row(*row)
  console.print(table)
  for line in (*_doubts(found), _words(found)):
    console.print(line)


def _largest(found: Roofline) -> list[tuple[str, ...]]:
  return [
    (f"{1e3 * x.total:,.1f}", f"{x.times:,}", f"{x.flops / 1e9:,.1f}", f"{x.nbytes / 2**20:,.0f}", x.kind,
     f"{x.origin} ({x.name})")
    for x in found.largest()
  ]  # fmt: skip


def _doubts(found: Roofline) -> list[str]:
  doubts = collections.defaultdict[str, float](float)
  for x in found.kernels:
    doubts[x.doubt] += x.total
  return [f"{clock(seconds)} of it take longer: {doubt}" for doubt, seconds in doubts.items() if doubt]


def _words(found: Roofline) -> str:
  return (
    f"an estimate, nothing was run: no less than {clock(found.total)} a step, at most {found.utilisation:.1%} of the"
    f" peak ({found.device.flops / 1e12:,.0f} TFLOP/s) for the model's FLOPs"
  )
