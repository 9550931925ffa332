"""An evaluation as a page: figures with their standard errors as bars, some answers, the loss on its way.

The same record is written as JSON, for programs.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

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
  about = "".join(f"<dt>{escape(str(k))}</dt><dd>{escape(str(v))}</dd>" for k, v in report.about.items())
  sections = [f"<h1>{escape(report.title)}</h1><dl>{about}</dl>"]
  if report.bound:
    sections.append(f"<h2>Held-out {report.bound_of}, bits per byte</h2>{_bound(report.bound)}")
  if report.results:
    sections.append(_results(report.results))
  if len(report.losses) > 1:
    sections.append("<h2>Loss</h2>" + _curve(report.losses))
  for name, told in report.told.items():
    if told:
      sections.append(_told(name, told))
  return f"""<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">
<title>{escape(report.title)}</title><style>{_CSS}</style><body>{"".join(f"<section>{x}</section>" for x in sections)}
"""


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


def _bound(bound: Mapping[str, float]) -> str:
  """Bits per byte, beside what the yardsticks need."""
  names = {"bits_per_byte": "lladax"} | YARDSTICKS
  found = {label: (bound[name], bound.get(f"{name}_stderr", 0.0)) for name, label in names.items() if name in bound}
  full = max(value + error for value, error in found.values()) or 1.0
  rows = "".join(
    f"<tr><td>{escape(label)}<td class=n>{value:.3f}{f' ± {error:.3f}' if error else ''}<td>"
    + _bar(value / full, error / full)
    for label, (value, error) in found.items()
  )
  said = f"perplexity of a token: {bound['perplexity']:.2f} ± {bound['perplexity_stderr']:.2f}"
  return f"<table>{rows}</table><p>{said}"


def _results(results: Mapping[str, Mapping[str, float]]) -> str:
  rows, marked = [], False
  for name, values in results.items():
    shown = name
    for metric, value in metrics(values).items():
      error = values.get(f"{metric}_stderr", math.nan)
      published = values.get("published") if shown else None  # belongs to the first metric
      marked |= published is not None
      bar = _bar(value, error if math.isfinite(error) else 0.0, published) if _is_share(metric) else ""
      asked = f"{values['samples']:,.0f}" if "samples" in values and shown else ""
      told = f"<td>{escape(metric)}<td class=n>{number(metric, value, values)}<td>{bar}<td class=n>{asked}"
      rows.append(f"<tr><td>{escape(shown)}{told}")
      shown = ""
  key = "<p><i class=key></i> the published number, of the published weights" if marked else ""
  head = "<tr><th>task<th>metric<th class=n>value<th>0 to 100%<th class=n>questions"
  return f"<h2>Tasks</h2><table>{head}{''.join(rows)}</table>{key}"


def _bar(share: float, error: float, published: float | None = None) -> str:
  """A bar of a share of 1 with a whisker of one standard error to each side."""
  y, end = "y1=7 y2=7", 200 * min(max(share, 0.0), 1.0)
  low, high = 200 * max(share - error, 0.0), 200 * min(share + error, 1.0)
  whisker = f"<line class=err x1={low:.1f} x2={high:.1f} {y} />" if error else ""
  mark = f"<path class=pub d='M{200 * published:.1f} 0v14'/>" if published is not None else ""
  return f"<svg class=bar viewBox='0 0 200 14' aria-hidden=true><rect width={end:.1f} height=14 />{whisker}{mark}</svg>"


def _curve(losses: Sequence[tuple[int, float]]) -> str:
  """Loss against step: every line of the log, and the mean of a tenth of them, each around its step."""
  step, loss = np.array(losses[:: -(-len(losses) // 2000)], float).T
  n = max(1, len(loss) // 10) | 1  # odd: as many before the step as behind it
  mean = np.convolve(loss, np.ones(n) / n, "valid")
  low, high = 0.0, float(np.quantile(loss, 0.98)) * 1.05 or 1.0
  x, y = 40 + 640 * (step - step[0]) / (step[-1] - step[0] or 1), 210 - 200 * (np.clip(loss, low, high)) / high

  def path(xs, ys):
    return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in zip(xs, ys, strict=True))

  ticks = "".join(
    f"<text x=34 y={214 - 200 * i / 4:.0f} text-anchor=end>{high * i / 4:.2g}</text>"
    f"<path class=grid d='M40 {210 - 50 * i}h640'/>"
    for i in range(5)
  )
  ends = f"<text x=40 y=228>step {step[0]:.0f}</text><text x=680 y=228 text-anchor=end>{step[-1]:,.0f}</text>"
  smooth = path(x[n // 2 :][: len(mean)], 210 - 200 * np.clip(mean, low, high) / high)
  return f"""<svg class=curve viewBox="0 0 690 234" role=img aria-label="Loss against step">{ticks}{ends}
<path class=raw d="{path(x, y)}"/><path class=mean d="{smooth}"/></svg>"""


def _told(name: str, told: Sequence[Mapping[str, Any]]) -> str:
  rows = "".join(
    f"<tr><td>{'✓' if x['hit'] else '✗'}<td class=t>{_short(x['question'], True)}<td class=t>{_short(x['answer'])}"
    f"<td class=t>{_short(x['guess'])}"
    for x in told
  )
  return f"<h2>{escape(name)}, for instance</h2><table><tr><th><th>asked<th>answer<th>guess{rows}</table>"


def _short(text: Any, end: bool = False, most: int = 400) -> str:
  """Of a long text its beginning, or its end."""
  text = str(text)
  if len(text) > most:
    text = "…" + text[-most:] if end else text[:most] + "…"
  return escape(text)


_CSS = """
body{font:14px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#1c1d21;background:#fff;
  --bar:#7fb2d9;--line:#e3e4e8;--soft:#70737c;--mark:#d55e00}
@media(prefers-color-scheme:dark){body{color:#e6e7ea;background:#16171a;--bar:#2f6690;--line:#33353c;--soft:#8d9099}}
h1{font-size:22px}h2{font-size:16px;margin-top:2.5rem}
dl{display:grid;grid-template-columns:max-content 1fr;gap:0 1rem}dt,th,p{color:var(--soft)}dd{margin:0}
table{border-collapse:collapse;width:100%}td,th{text-align:left;padding:.25rem .8rem .25rem 0;vertical-align:top;
  border-bottom:1px solid var(--line);font-weight:400}
.n{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
.t{font:12px/1.5 ui-monospace,Menlo,Consolas,monospace;white-space:pre-wrap;overflow-wrap:anywhere}
.bar{width:200px;height:14px;display:block;overflow:visible;background:var(--line)}.bar rect{fill:var(--bar)}
.err{stroke:currentColor;stroke-width:1.5}.pub{stroke:var(--mark);stroke-width:3}
.key{display:inline-block;width:3px;height:1em;background:var(--mark);vertical-align:middle}
.curve{width:100%;font-size:11px;fill:var(--soft)}.curve path{fill:none}.grid{stroke:var(--line)}
.raw{stroke:var(--bar);opacity:.5}.mean{stroke:var(--bar);stroke-width:2}
"""
