"""An evaluation as a page: figures with their standard errors as bars, some answers, the loss on its way.

The same record is written as JSON, for programs.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lladax.drawing import pages

SHOWN = 12  # answers of a task
YARDSTICKS = {"unigram_bits_per_byte": "unigram over the same tokens", "xz_bits_per_byte": "xz -9"}


@dataclasses.dataclass(frozen=True)
class Report:
  """What an evaluation found."""

  title: str
  about: Mapping[str, Any]  # of the run: field -> value
  # name -> {metric: value}, metric + "_stderr" its standard error, "samples" how many were asked, "published" a paper's
  results: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
  # name -> {"question", "answer", "guess", "hit"} of some
  told: Mapping[str, Sequence[Mapping[str, Any]]] = dataclasses.field(default_factory=dict)
  bound: Mapping[str, float] = dataclasses.field(default_factory=dict)  # of `evaluate.bound`
  bound_of: str = "text"  # | "replies"
  losses: Sequence[tuple[int, float]] = ()  # (step, loss)


def write(report: Report, path: Path) -> None:
  """Writes the report under the name `path` with the endings .json and .html; one of them may be given."""
  path.parent.mkdir(parents=True, exist_ok=True)
  stem = path.with_suffix("") if path.suffix in (".json", ".html") else path
  record = json.dumps(dataclasses.asdict(report), indent=1, ensure_ascii=False, default=str)
  for ending, content in ((".json", record + "\n"), (".html", page(report))):
    Path(f"{stem}{ending}").write_text(content, encoding="utf-8", errors="backslashreplace")  # a file's name may be odd


def page(report: Report) -> str:
  """The report as one self-contained page; no script, no network."""
  curve = _curve(report.losses) if len(report.losses) > 1 else None
  given = {"bound": _bound(report.bound), "results": _results(report.results), "curve": curve}
  return pages.fill("report.html", report=report, short=_short, **given)


def metrics(values: Mapping[str, float]) -> dict[str, float]:
  """Of what is known of a task the metrics alone."""
  return {x: value for x, value in values.items() if not x.endswith("_stderr") and x not in ("samples", "published")}


def number(metric: str, value: float, values: Mapping[str, float]) -> str:
  """A metric with its standard error, in percent where it is a share."""
  error = values.get(f"{metric}_stderr", math.nan)
  scale, places, unit = (100.0, 1, "%") if _is_share(metric) else (1.0, 2, "")
  form = f",.{places}f" if abs(value) < 1e5 else ".3g"
  spread = f" ± {scale * error:{form}}" if math.isfinite(error) else ""
  return f"{scale * value:{form}}{spread}{unit}"


def _is_share(metric: str) -> bool:
  return not any(x in metric for x in ("perplexity", "bits", "nats"))


def _bound(bound: Mapping[str, float]) -> list[tuple[Any, ...]]:
  """(label, bits per byte, bar) of the model, and of what the yardsticks need."""
  names = {"bits_per_byte": "lladax"} | YARDSTICKS
  found = {label: (bound[name], bound.get(f"{name}_stderr", 0.0)) for name, label in names.items() if name in bound}
  full = max((value + error for value, error in found.values()), default=0.0) or 1.0
  return [
    (label, f"{value:.3f}" + (f" ± {error:.3f}" if error else ""), _bar(value / full, error / full))
    for label, (value, error) in found.items()
  ]


def _results(results: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
  """A row for every metric; what belongs to the task stands in its first."""
  rows = []
  for name, values in results.items():
    first = {"task": name, "asked": f"{values['samples']:,.0f}" if "samples" in values else ""}
    published = values.get("published")
    for metric, value in metrics(values).items():
      error = values.get(f"{metric}_stderr", math.nan)
      bar = _bar(value, error if math.isfinite(error) else 0.0, published) if _is_share(metric) else None
      rows.append(first | {"metric": metric, "number": number(metric, value, values), "bar": bar})
      first, published = {"task": "", "asked": ""}, None
  return rows


def _bar(share: float, error: float, published: float | None = None) -> dict[str, str]:
  """A bar of a share of 1 with a whisker of one standard error to each side, in units of 1/200."""
  sizes = {"end": min(max(share, 0.0), 1.0)}
  if error:
    sizes |= {"low": max(share - error, 0.0), "high": min(share + error, 1.0)}
  if published is not None:
    sizes["published"] = published
  return {name: f"{200 * x:.1f}" for name, x in sizes.items()}


def _curve(losses: Sequence[tuple[int, float]]) -> dict[str, Any]:
  """Loss against step: every line of the log, and the mean of a tenth of them, each around its step."""
  step, loss = np.array(losses[:: -(-len(losses) // 2000)], float).T
  n = max(1, len(loss) // 10) | 1  # odd: as many before the step as behind it
  mean = np.convolve(loss, np.ones(n) / n, "valid")
  low, high = 0.0, float(np.quantile(loss, 0.98)) * 1.05 or 1.0
  x, y = 40 + 640 * (step - step[0]) / (step[-1] - step[0] or 1), 210 - 200 * (np.clip(loss, low, high)) / high

  def path(xs, ys):
    return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in zip(xs, ys, strict=True))

  smooth = path(x[n // 2 :][: len(mean)], 210 - 200 * np.clip(mean, low, high) / high)
  ticks = [f"{high * i / 4:.2g}" for i in range(5)]
  return {"ticks": ticks, "first": f"{step[0]:.0f}", "last": f"{step[-1]:,.0f}", "raw": path(x, y), "mean": smooth}


def _short(text: Any, end: bool = False, most: int = 400) -> str:
  """Of a long text its beginning, or its end."""
  text = str(text)
  if len(text) > most:
    text = "…" + text[-most:] if end else text[:most] + "…"
  return text
