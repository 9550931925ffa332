import dataclasses
import html.parser
import json

import pytest

from lladax.drawing import report
from lladax.drawing.report import Report

ANSWERS = [{"question": f"{i} < {i + 1}?", "answer": "yes", "guess": ["yes", "<b>no"][i % 2], "hit": i % 2 == 0}
           for i in range(4)]  # fmt: skip
FULL = Report(
  "a run & more",
  {"model": "2 parameters", "step": "20"},
  {
    "llada_base/gsm8k": {"exact_match": 0.25, "exact_match_stderr": 0.125, "samples": 1319, "published": 0.703},
    "lambada": {"perplexity": 12.5, "perplexity_stderr": 0.5, "acc": 0.5, "acc_stderr": 0.1},
    "no error": {"acc": 1.0},
  },
  {"llada_base/gsm8k": ANSWERS, "nothing told": []},
  {
    "bits_per_byte": 1.5,
    "bits_per_byte_stderr": 0.25,
    "perplexity": 20.1,
    "perplexity_stderr": 1.5,
    "xz_bits_per_byte": 2,
  },
  losses=[(step, 8.0 / step) for step in range(1, 101)],
)


class Reader(html.parser.HTMLParser):
  """The cells of all tables, and (class, attributes) of what is drawn."""

  def __init__(self, text):
    super().__init__()
    self.rows, self.drawn, self._cell = [], [], False
    self.feed(text)

  def handle_starttag(self, tag, attributes):
    if tag == "tr":
      self.rows.append([])
    if tag in ("td", "th"):
      self.rows[-1].append("")
    self._cell = tag in ("td", "th")
    if tag in ("rect", "line", "path"):
      self.drawn.append((tag, dict(attributes)))

  def handle_endtag(self, tag):
    self._cell = False

  def handle_data(self, data):
    if self._cell:
      self.rows[-1][-1] += data


def test_numbers_stand_in_the_tables_with_their_errors():
  rows = Reader(report.page(FULL)).rows
  assert ["lladax", "1.500 ± 0.250", ""] in rows and ["xz -9", "2.000", ""] in rows
  assert "perplexity of a token: 20.10 ± 1.50" in report.page(FULL)
  assert ["llada_base/gsm8k", "exact_match", "25.0 ± 12.5%", "", "1,319"] in rows
  assert ["lambada", "perplexity", "12.50 ± 0.50", "", ""] in rows
  assert ["", "acc", "50.0 ± 10.0%", "", ""] in rows and ["no error", "acc", "100.0%", "", ""] in rows
  assert ["✗", "1 < 2?", "yes", "<b>no"] in rows


def test_a_large_number_is_short():
  values = {"perplexity": 23370719.05, "perplexity_stderr": 1e6, "acc": 0.5}
  assert report.number("perplexity", 23370719.05, values) == "2.34e+07 ± 1e+06"
  assert report.number("perplexity", 1234.5, {}) == "1,234.50" and report.number("acc", 0.5, values) == "50.0%"


def test_bars_are_as_long_as_their_numbers():
  drawn = Reader(report.page(dataclasses.replace(FULL, bound={}, losses=()))).drawn
  widths = [float(x["width"]) for tag, x in drawn if tag == "rect"]
  assert widths == [50.0, 100.0, 200.0]  # of 200
  (whisker, _) = [x for tag, x in drawn if tag == "line"]
  assert (whisker["x1"], whisker["x2"]) == ("25.0", "75.0")
  (published,) = [x["d"] for tag, x in drawn if x.get("class") == "pub"]
  assert published.startswith("M140.6 ")


def test_the_curve_goes_through_the_losses():
  (raw,) = [x["d"] for tag, x in Reader(report.page(FULL)).drawn if x.get("class") == "raw"]
  points = [tuple(map(float, point.split())) for point in raw.removeprefix("M").split("L")]
  assert len(points) == 100 and points[0][0] == 40 and points[-1][0] == 680
  heights = [210 - y for _, y in points]
  assert heights[9] / heights[99] == pytest.approx(10, rel=0.05) and heights == sorted(heights, reverse=True)
  many = dataclasses.replace(FULL, losses=[(step, 1.0) for step in range(10**5)])
  assert len(report.page(many)) < 200_000


@pytest.mark.parametrize("lines", [100, 110, 2000])
def test_the_mean_falls_where_the_losses_fall(lines):
  """A cliff in the middle: half of its height is where the cliff is, and not half a window later."""
  cliff = [(step, 8.0 if 2 * step <= lines else 4.0) for step in range(1, lines + 1)]
  (mean,) = [
    x["d"] for tag, x in Reader(report.page(Report("cliff", {}, losses=cliff))).drawn if x.get("class") == "mean"
  ]
  xs, ys = zip(*(map(float, point.split()) for point in mean.removeprefix("M").split("L")), strict=True)
  middle = [x for x, y in zip(xs, ys, strict=True) if y < (min(ys) + max(ys)) / 2][-1]
  assert middle == pytest.approx(360, abs=640 / lines + 0.1) and len(xs) > 0.89 * lines


def test_what_is_not_there_is_left_out():
  page = report.page(Report("empty", {}))
  assert "<table" not in page and "<svg" not in page and "empty" in page


def test_long_texts_are_cut_and_nothing_is_markup():
  told = {"x": [{"question": "a" * 1000 + "?", "answer": "b" * 1000, "guess": "<script>", "hit": False}]}
  page = report.page(Report("<i>", {"<i>": "<i>"}, told=told))
  assert "a?" in page and "a" * 401 not in page and "b" * 401 not in page
  assert "<script>" not in page and "<i>" not in page


@pytest.mark.parametrize("name", ["evaluation", "evaluation.json", "v1.2"])
def test_both_files_are_written(tmp_path, name):
  report.write(FULL, tmp_path / "new" / name)
  stem = tmp_path / "new" / name.removesuffix(".json")
  record = json.loads((stem.parent / f"{stem.name}.json").read_text())
  assert record["results"] == FULL.results and record["bound"]["bits_per_byte"] == 1.5
  assert (stem.parent / f"{stem.name}.html").read_text() == report.page(FULL)
