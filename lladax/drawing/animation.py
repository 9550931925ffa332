"""The order of unmasking as an animated GIF, for pages that run no JavaScript. Colours are those of `visualize`."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lladax.drawing import unmasking
from lladax.mistake import Mistake
from lladax.terminal import visible


def gif(
  unmaskings: Sequence[unmasking.Unmasking], path: str | Path, columns: int = 80, font: str = "DejaVu Sans Mono"
) -> None:
  """Draws the canvases one above the other, in lines of `columns` characters, up to 100 moments of their unmasking.

  Args:
    unmaskings: what to draw; all keep the same time.
    path: of the file to write.
    columns: of characters.
    font: a family of equally wide characters that matplotlib finds: name one that has the script of the text.

  Raises:
    Mistake: matplotlib, which brings Pillow and a font, is not installed.
  """
  try:
    from matplotlib import font_manager
    from PIL import Image, ImageDraw, ImageFont
  except ImportError:
    raise Mistake("a GIF is drawn by Pillow in a font of matplotlib: pip install 'lladax[figures]'") from None
  from rich.cells import cell_len

  # Where the final text stands: (step, column, row, cells, character), later steps first.
  placed, row, steps = [], 0, max((u.steps for u in unmaskings), default=0)
  for u in unmaskings:
    row, column = row + 1, 1
    for piece, s in zip(u.pieces, u.final_at.tolist(), strict=True):
      for character in visible(piece).expandtabs(2):
        cells = max(1, cell_len(character))
        if column + cells > columns + 1:
          row, column = row + 1, 1
        placed.append((s, column, row, cells, character))
        row, column = (row + 1, 1) if character == "\n" else (row, column + cells)
    row += 1
  placed.sort(key=lambda x: x[0], reverse=True)
  face = ImageFont.truetype(font_manager.findfont(font), 16)
  W, H, end = round(face.getlength("0")), 24, max([30, *(x + cells for _, x, _, cells, _ in placed)]) + 1
  image = Image.new("RGB", (end * W, (row + 2) * H), "#ffffff")
  draw, colours, frames = ImageDraw.Draw(image, "RGBA"), unmasking.step_colours(steps), []

  def box(x: int, y: float, cells: int, colour: str, top: int = 0) -> None:
    draw.rectangle((x * W, y * H + top, (x + cells) * W - 1, y * H + 20), colour)

  for s, x, y, cells, _ in [*placed, (1, 1, row + 0.5, 1, "")]:
    box(x, y, cells, "#e3e4e8" if s else "#ffffff")
  draw.text((3 * W, (row + 0.5) * H), "masked", "#70737c", face)
  shown = np.linspace(0, steps, min(steps, 100) + 1).round().astype(int)
  for k in shown.tolist():
    while placed and placed[-1][0] <= k:
      s, x, y, cells, character = placed.pop()
      for top, colour in ((0, "#ffffff"), (0, f"{colours[s]}38"), (19, colours[s])) if s else ():
        box(x, y, cells, colour, top)
      draw.text((x * W, y * H), "↵" if character == "\n" else character, "#1c1d21", face)
    box(11, row + 0.5, end, "#ffffff")
    draw.text((11 * W, (row + 0.5) * H), f"step {k} of {steps}", "#70737c", face)
    frames.append(image.copy())
  palette = frames[-1].quantize()  # one for all, so that a frame stores only what it changes
  first, *others = (frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames)
  pace = np.diff(shown) * min(150, 8000 / max(1, steps))  # 8 s at the most, and then time to read
  pauses = [*np.maximum(20, pace).astype(int).tolist(), 2500]
  first.save(path, format="GIF", save_all=True, append_images=others, duration=pauses, loop=0)
