"""The order of unmasking, drawn: frames in a terminal, a page or a notebook cell in HTML.

Committed tokens never change, so one number per position, the forward pass that committed it,
replays the whole reverse process. This module knows nothing of tokenizers, models or jax: it is
handed the pieces of text and two arrays (`Unmasking`), and hands back a drawing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from lladax.mistake import Mistake

if TYPE_CHECKING:
  from rich.text import Text

MASKED = "░"

# Early to late: lightness rises and hue turns one way (OKLCH .54/265 to .675/70), and every colour
# keeps a contrast of 3:1 on black and on white, so one ramp serves both kinds of terminal.
_RAMP = ("#3a65d6", "#8755d6", "#c149ac", "#e04f65", "#dd6e36", "#cd851a")
_RAMP_RGB = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in _RAMP], float)

# A sample may hold escape sequences: shown as pictures (␛), they cannot drive the terminal.
CONTROLS = {c: 0x2400 + c for c in range(32) if chr(c) not in "\n\t"} | {127: 0x2421}
CONTROLS |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


@dataclasses.dataclass(frozen=True, eq=False)
class Unmasking:
  """One finished canvas of L tokens and when each was unmasked; padding is left out.

  Attributes:
    pieces: the final text of each position; may hold spaces and newlines, or be empty.
    unmasked_at: [L] int, the forward pass (from 1) that committed the position; 0 = given.
    confidence: [L] float, the probability of the token at its commit; 1 where given.
    title: one line above the drawing.

  Raises:
    Mistake: lengths disagree, or `unmasked_at` is not non-negative integers.
  """

  pieces: tuple[str, ...]
  unmasked_at: np.ndarray
  confidence: np.ndarray
  title: str = ""

  def __post_init__(self):
    L = len(self.pieces)
    for name in ("unmasked_at", "confidence"):
      array = np.asarray(getattr(self, name))
      if array.shape != (L,):
        raise Mistake(f"{name} must have shape ({L},), one per piece; got {array.shape}")
      object.__setattr__(self, name, array)
    integers = np.issubdtype(self.unmasked_at.dtype, np.integer)
    if L and not (integers and self.unmasked_at.min() >= 0):
      raise Mistake("unmasked_at must hold integers >= 0 (0 = given)")

  @property
  def steps(self) -> int:
    """The last forward pass that committed a token; 0 if all was given."""
    return int(self.unmasked_at.max(initial=0))

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
  """The canvas after forward pass `step` of `steps` (None: its last): given bold, unmasked coloured, masked ░."""
  from rich.text import Text

  colours = ["bold", *step_colours(unmasking.steps if steps is None else max(steps, step))[1:]]
  parts = []  # neighbours of one style are one part: rich pays for each
  for piece, s in zip(unmasking.pieces, unmasking.unmasked_at.tolist(), strict=True):
    text, style = (piece.translate(CONTROLS), colours[s]) if s <= step else (MASKED, "dim")
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
    out.append(unmasking.title.translate(CONTROLS) + "\n", "bold underline")
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
  return _page("".join(map(_sample, unmaskings)), title)


def _page(sections: str, title: str) -> Html:
  heading = f"<h2>{escape(title)}</h2>" if title else ""
  return Html(f"""<!doctype html><meta charset=utf-8><meta name=viewport content="width=device-width">
<title>{escape(title or "Order of unmasking")}</title><style>{_CSS}</style>
<div class=lladax>{heading}{sections}</div><script>{_JS}</script>
""")


def _sample(unmasking: Unmasking) -> str:
  """The text, the controls and the strip of one sample."""
  steps, colours = unmasking.steps, step_colours(unmasking.steps)
  unmasked_at, confidence = unmasking.unmasked_at.tolist(), unmasking.confidence.tolist()
  tokens = []
  for piece, s, p in zip(unmasking.pieces, unmasked_at, confidence, strict=True):
    newline = " class=n" if "\n" in piece else ""  # drawn as ↵: a token without width is not seen
    hover = f'data-s={s} style="--c:{colours[s]}" title="step {s} · probability {p:.3f}"'
    tag, attributes = ("i", hover) if s else ("b", "title=given")
    tokens.append(f"<{tag}{newline} {attributes}>{escape(piece.translate(CONTROLS))}</{tag}>")
  heading = f"<h3>{escape(unmasking.title)}</h3>" if unmasking.title else ""
  text = f"<div class=text>{''.join(tokens)}</div>"
  if not steps:
    return f"<section>{heading}{text}</section>"
  ramp = f'<span class=ramp style="background:linear-gradient(90deg,{",".join(_RAMP)})"></span>'
  return f"""<section>{heading}{text}
<div class=bar><span class=play hidden><button type=button aria-label="Replay">▶</button>
<input type=range min=0 max={steps} value={steps} aria-label="Step"></span>
<output></output>
<span class=key><b>given</b><span>step 1</span>{ramp}<span>{steps}</span></span></div>
{_strip(unmasking, colours)}</section>"""


def _strip(unmasking: Unmasking, colours: list[str]) -> str:
  """Order against position: one dot per token, time upwards; the given text is the grey floor."""
  steps, L = unmasking.steps, len(unmasking.pieces)
  dots: list[list[str]] = [[] for _ in colours]
  for x, s in enumerate(unmasking.unmasked_at.tolist()):
    # Dots are lines of almost no length with round caps: they stay round however wide the plot.
    dots[s].append(f"M{x} {steps + 0.5}h1" if s == 0 else f"M{x}.5 {steps - s + 0.5}h.01")
  floor, *later = ("".join(d) for d in dots)
  paths = "".join(f'<path data-s={s} style="--c:{colours[s]}" d="{d}"/>' for s, d in enumerate(later, 1) if d)
  dot = np.clip(600 / L, 2.5, 6)
  return f"""<div class=strip><span>step {steps}</span><span>1</span>
<svg viewBox="0 0 {L} {steps + 1}" preserveAspectRatio="none" role="img" stroke-width="{dot:.1f}"
aria-label="Step of unmasking against position"><path class=floor d="{floor}"/>{paths}
<path class=at d=""/></svg><div><span>position 1</span><span>{L}</span></div></div>"""


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
    when, how_sure = "given", ""
    look = f'class=given y={1.02 * Y:.2f} height={0.04 * Y:.2f} opacity="{share[0, x]:.2f}"'
    if y:
      look = f'y={Y - y} height=1 style="--p:{100 * share[y, x] / peak:.0f}%"'
      when, how_sure = _span("step", y - 1, h, steps), f" · mean probability {confidence[y, x] / count[y, x]:.3f}"
    told = f"{_span('position', x, w, L)} · {when} · {count[y, x]:.0f} of {size_X[x]} tokens ({share[y, x]:.1%})"
    cells.append(f"<rect x={x} width=1 {look}><title>{told}{how_sure}</title></rect>")
  ticks = [f"<text x={60 + 640 * (t - 0.5) / (X * w):.1f} y=350 text-anchor=middle>{t}</text>" for t in _ticks(L)]
  ticks += [f"<text x=52 y={314 - 300 * (t - 0.5) / (Y * h):.1f} text-anchor=end>{t}</text>" for t in _ticks(steps)]
  ramp = "".join(f'<span style="--p:{p}%"></span>' for p in range(0, 101, 5))
  of = f"{len(unmaskings)} canvas{'es' if len(unmaskings) > 1 else ''}"
  section = f"""<section><div class=bar><span class=key><span class="ramp cells floor"></span>given
<b></b>unmasked, of {of}: <span>0</span><span class="ramp cells">{ramp}</span><span>{peak:.0%}</span></span></div>
<svg class=heat viewBox="0 0 712 372" role=img aria-label="Density of the step of unmasking against position"><svg x=60
y=10 width=640 height=318 viewBox="0 0 {X} {1.06 * Y:.2f}" preserveAspectRatio=none><rect class=frame width={X}
height={Y} />{"".join(cells)}</svg>{"".join(ticks)}<text x=380 y=368 text-anchor=middle>position</text><text
transform="translate(14 160) rotate(-90)" text-anchor=middle>step</text></svg>
<output>Point at a cell: it tells its numbers.</output></section>"""
  return _page(section, title)


def _span(word: str, i: int, width: int, last: int) -> str:
  """What the i-th cell of so many positions or steps covers."""
  first, end = i * width + 1, min((i + 1) * width, last)
  return f"{word} {first}" if first == end else f"{word}s {first}–{end}"


def _ticks(n: int) -> list[int]:
  """1, and about six round numbers up to n."""
  every = next(m * 10**k for k in range(9) for m in (1, 2, 5) if n <= 7 * m * 10**k)
  return sorted({min(1, n), *range(every, n + 1, every)})


_CSS = """
body:has(>.lladax){margin:0;background:#fff}
.lladax{color-scheme:light;--ink:#1c1d21;--soft:#70737c;--line:#e3e4e8;--paper:#fff;--tint:22%;
  --cold:oklch(.95 .06 105);--hot:oklch(.36 .15 270);
  background:var(--paper);color:var(--ink);font:13px/1.5 system-ui,sans-serif;box-sizing:border-box;
  padding:1.5rem clamp(1rem,4vw,2.5rem);max-width:60rem;margin:0 auto}
@media(prefers-color-scheme:dark){body:has(>.lladax){background:#16171a}
  .lladax{color-scheme:dark;--ink:#e6e7ea;--soft:#8d9099;--line:#33353c;--paper:#16171a;--tint:38%;
  --cold:oklch(.32 .09 280);--hot:oklch(.9 .17 105)}}
.lladax h2{font-size:20px;font-weight:600;margin:0 0 1.5rem;letter-spacing:-.01em}
.lladax h3{font-size:13px;margin:0 0 .6rem}
.lladax b,.lladax h3{font-weight:600}
.lladax section:not(:last-child){margin:0 0 3rem}
.lladax .text{font:14px/1.85 ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace;
  white-space:pre-wrap;overflow-wrap:anywhere;tab-size:2}
.lladax i{font-style:normal;margin-right:1px;padding:2px 0;border-radius:3px;
  -webkit-box-decoration-break:clone;box-decoration-break:clone;box-shadow:inset 0 -2px var(--c);
  background:color-mix(in srgb,var(--c) var(--tint),transparent)}
.lladax .n::before{content:"↵";opacity:.45}
.lladax i:empty::before{content:"·"}
.lladax i.m{color:transparent;background:var(--line);box-shadow:none}
.lladax .bar{display:flex;flex-wrap:wrap;align-items:center;gap:.4rem 1rem;margin:1rem 0 .8rem}
.lladax .bar,.lladax .strip{color:var(--soft);font-variant-numeric:tabular-nums}
.lladax .play:not([hidden]){display:flex;align-items:center;gap:.6rem}
.lladax button{all:unset;cursor:pointer;width:1.9em;height:1.9em;border-radius:50%;font-size:12px;
  text-align:center;line-height:1.9;background:var(--line);color:var(--ink)}
.lladax button:focus-visible,.lladax .text .on{outline:2px solid var(--ink);outline-offset:-1px}
.lladax output{min-width:18rem}
.lladax input{width:12rem;margin:0;accent-color:var(--soft)}
.lladax .key{display:flex;align-items:center;gap:.5rem;margin-left:auto}
.lladax .key b{color:var(--ink);margin-right:.5rem}
.lladax .ramp{width:7rem;height:6px;border-radius:3px}
.lladax .strip{display:grid;grid-template:1fr auto auto/auto 1fr;gap:2px .6rem;font-size:11px}
.lladax .strip>:nth-child(2){grid-area:2/1;text-align:right}
.lladax .strip>div{grid-area:3/2;display:flex;justify-content:space-between}
.lladax svg{grid-area:1/2/3/3;width:100%;height:110px;overflow:visible}
.lladax path{vector-effect:non-scaling-stroke;stroke:var(--c);stroke-linecap:round}
.lladax path.m{stroke:var(--line)}
.lladax .floor{stroke:var(--line);stroke-width:3px;stroke-linecap:butt}
.lladax .at{stroke:var(--ink);stroke-width:1px}
.lladax .heat+output{display:block;color:var(--soft)}
.lladax .heat{height:auto;font-size:11px;fill:var(--soft)}
.lladax .heat svg{height:318px;overflow:hidden}
.lladax .heat rect,.lladax .cells span{--at:color-mix(in oklch,var(--hot) var(--p),var(--cold));fill:var(--at);
  background:var(--at);shape-rendering:crispEdges;vector-effect:non-scaling-stroke}
.lladax .heat rect:hover{stroke:var(--ink);stroke-width:2px}
.lladax .heat .given{fill:var(--soft)}
.lladax .heat .frame{fill:none;stroke:var(--line)}
.lladax .cells{display:flex;overflow:hidden}
.lladax .cells span{flex:1}
.lladax .cells.floor{width:1.5rem;background:var(--soft)}
"""

# Tokens and dots carry their step alike, so one loop replays both. `data-live` marks the fragments
# that an earlier cell's script has already woken.
_JS = """
for (const box of document.querySelectorAll(".lladax:not([data-live]) section")) {
  const $ = (css) => box.querySelector(css), slider = $("input"), button = $("button");
  const heat = $(".heat");
  if (heat) heat.onmouseover = (e) => {
    if (e.target.matches("rect:has(title)")) $("output").textContent = e.target.textContent;
  };
  if (!slider) continue;
  const text = $(".text"), plot = $("svg"), out = $("output"), steps = +slider.max;
  const timed = box.querySelectorAll("[data-s]");
  let timer = 0, on = null;
  const draw = () => {
    for (const t of timed) t.classList.toggle("m", +t.dataset.s > +slider.value);
    out.textContent = `step ${slider.value} of ${steps}`;
  };
  const stop = () => { cancelAnimationFrame(timer); timer = 0; button.textContent = "▶"; };
  const point = (i) => {  // marks a token and its dot, whichever of the two is pointed at
    on?.classList.remove("on");
    on = text.children[i];
    on?.classList.add("on");
    $(".at").setAttribute("d", on ? `M${i + .5} 0V${steps + 1}` : "");
    if (on) out.textContent = `position ${i + 1} · ${on.title}`; else draw();
  };
  button.onclick = () => {
    if (timer) return stop();
    const from = +slider.value % steps, start = performance.now();
    const pace = Math.min(150, 8000 / steps);  // milliseconds a step; 8 s at the most
    const tick = (now) => {
      slider.value = Math.min(steps, from + Math.max(0, now - start) / pace);
      draw();
      if (+slider.value < steps) timer = requestAnimationFrame(tick); else stop();
    };
    timer = requestAnimationFrame(tick);
    button.textContent = "❚❚";
  };
  slider.oninput = () => { stop(); draw(); };
  text.onmouseover = (e) => point([...text.children].indexOf(e.target));
  plot.onmousemove = (e) => {
    const r = plot.getBoundingClientRect();
    point(Math.floor((e.clientX - r.left) / r.width * text.children.length));
  };
  text.onmouseleave = plot.onmouseleave = () => point(-1);
  $(".play").hidden = false;
  draw();
}
for (const box of document.querySelectorAll(".lladax")) box.dataset.live = "";
"""
