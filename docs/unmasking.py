"""Draws the picture of an unmasking that README shows, an SVG that moves without any script.

  python docs/unmasking.py runs/quickstart docs/unmasking.svg

The workdir is the one that the quickstart trains. Where nothing moves (paper, or a reader who asked for that), the
picture is the finished text, and the colours tell the order.
"""

import sys
from html import escape

import lladax
from lladax.drawing.unmasking import step_colours

CANVASES = (
  "LATIN SMALL LETTER" + "[MASK]" * 4,
  "[MASK]" * 3 + " WITH DOT ABOVE",
  "[MASK]" + " CAPITAL LETTER" + "[MASK]" * 3,
  "[MASK]" * 6,
)
W, H, LEFT, SECONDS = 9, 34, 14, 9  # of a character, of a line, of the margin; of one round


def draw(llada: lladax.LLaDA, **options) -> str:
  """The canvases one below the other, each token at the time of the step that unmasks it."""
  ids = [[llada.eos_id, *llada.tokenizer.encode_canvas(text), llada.eos_id] for text in CANVASES]  # whole documents
  rows = llada.unmask(ids, **options).unmaskings()
  last = max(row.steps for row in rows)
  colours, shapes, widest = step_colours(last), [], 0
  for y, row in enumerate(rows):
    x = LEFT
    for piece, step in zip(row.pieces, row.unmasked_at.tolist(), strict=True):
      text = piece.strip().replace("⏎", "")  # of an EOS
      width = W * len(text)
      x += W * (len(piece) - len(piece.lstrip()))
      box = f'x="{x - 2}" y="{y * H + 12}" width="{width + 4}" height="24" rx="3"'
      place = f'x="{x}" y="{y * H + 29}" textLength="{width}" lengthAdjust="spacingAndGlyphs"'
      if step and text:
        shapes.append(f'<rect {box} fill="#e3e4e8"/><g class="s{step}"><rect {box} fill="#fff"/>')
        shapes.append(f'<rect {box} fill="{colours[step]}" opacity=".3"/><text {place}>{escape(text)}</text></g>')
      elif text:
        shapes.append(f'<text {place} font-weight="bold">{escape(text)}</text>')
      x, widest = x + width, max(widest, x + width)
  shown = [(s, 8 + 60 * s / last) for s in range(1, last + 1)]  # percent of a round; the rest of it is for reading
  moves = "".join(f"@keyframes k{s}{{0%,{at:.0f}%{{opacity:0}}{at + 2:.0f}%,to{{opacity:1}}}}" for s, at in shown)
  moves += "".join(f".s{s}{{animation:k{s} {SECONDS}s infinite}}" for s, _ in shown)
  width, height = widest + LEFT, len(rows) * H + 14
  return (
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    f' font-family="ui-monospace,Menlo,Consolas,DejaVu Sans Mono,monospace" font-size="15" fill="#1c1d21">\n'
    f"<style>@media(prefers-reduced-motion:no-preference){{{moves}}}</style>\n"
    f'<rect width="{width}" height="{height}" rx="6" fill="#fff"/>\n' + "\n".join(shapes) + "\n</svg>\n"
  )


if __name__ == "__main__":
  workdir, path = sys.argv[1:]
  picture = draw(lladax.load(workdir), steps=8, temperature=0.5, remasking="random", seed=7)
  with open(path, "w", encoding="utf-8") as file:
    file.write(picture)
