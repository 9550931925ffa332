"""The animation: what is masked when, and what is said where it cannot be drawn."""

import dataclasses
import sys

import numpy as np
import pytest

from lladax.drawing import animation
from lladax.drawing.unmasking import Unmasking

CANVAS = Unmasking(
  ("Q:", " two\n", "plus", " <script>", "", "\n", " four", " &", " end"),
  np.array([0, 0, 3, 1, 5, 2, 5, 0, 4]),
  np.ones(9),
)


def test_unmasks_step_by_step(tmp_path):
  image = pytest.importorskip("PIL.Image")
  animation.gif([CANVAS, Unmasking(("wide 中文\x1b",), np.array([1]), np.ones(1))], tmp_path / "out.gif", columns=12)
  with image.open(tmp_path / "out.gif") as drawn:
    assert drawn.n_frames == 6 and drawn.info["loop"] == 0
    grey = []
    for k in range(6):
      drawn.seek(k)
      pixels = np.asarray(drawn.convert("RGB")).reshape(-1, 3).astype(int)
      grey.append((abs(pixels - [227, 228, 232]).max(-1) < 3).sum())
  assert (np.diff(grey) <= 0).all() and grey[0] > 2 * grey[-1]  # fewer and fewer masked, then the key alone


def test_of_given_text_is_one_frame(tmp_path):
  image = pytest.importorskip("PIL.Image")
  animation.gif([dataclasses.replace(CANVAS, unmasked_at=0 * CANVAS.unmasked_at)], tmp_path / "out.gif")
  with image.open(tmp_path / "out.gif") as drawn:
    assert drawn.n_frames == 1


def test_without_matplotlib_says_what_to_install(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "matplotlib", None)
  with pytest.raises(ValueError, match=r"^a GIF .*: pip install 'lladax\[figures\]'$"):
    animation.gif([CANVAS], tmp_path / "out.gif")
  assert not list(tmp_path.iterdir())
