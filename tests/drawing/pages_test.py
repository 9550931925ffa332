"""The files of the pages: what is in them is in the page, whole, and what fills them is text."""

import html.parser
import pathlib
import re
import subprocess
import sys

import jinja2
import numpy as np
import pytest

from lladax.drawing import pages, report, unmasking
from lladax.terminal import visible
from lladax.training import explanation, roofline

FOLDER = pathlib.Path(pages.__file__).parent
HOSTILE = """</style></script><script>x</script><i title='"'>{{ 7 * 7 }}{% raw %}{# $x & \ud800"""
CANVAS = unmasking.Unmasking((HOSTILE, HOSTILE), np.array([0, 1]), np.ones(2), HOSTILE)
TOLD = {HOSTILE: [{"question": HOSTILE, "answer": HOSTILE, "guess": HOSTILE, "hit": True}]}
DEVICE = roofline.Device(1.0, 1.0, 1.0, 1.0, 1)
KERNEL = roofline.Kernel(HOSTILE, "matmul", 1, 1.0, 1.0, 1.0, HOSTILE, HOSTILE)
ESTIMATE = roofline.Roofline((KERNEL,), {"matmul": 1.0, roofline.HIDDEN: 1.0, roofline.EXPOSED: 1.0}, DEVICE, 1.0)
PAGES = {
  "roofline": lambda: explanation.page(ESTIMATE, HOSTILE),
  "unmasking": lambda: unmasking.html([CANVAS], HOSTILE),
  "heat_map": lambda: unmasking.heat_map([CANVAS], HOSTILE),
  "report": lambda: report.page(report.Report(HOSTILE, {HOSTILE: HOSTILE}, {HOSTILE: {HOSTILE: 0.5}}, TOLD)),
}


class Read(html.parser.HTMLParser):
  """How often each element stands in a page, and what a browser shows, or runs, of it."""

  def __init__(self, page):
    super().__init__()
    self.elements, self.texts = {}, []
    self.feed(page)

  def handle_starttag(self, tag, attributes):
    self.elements[tag] = self.elements.get(tag, 0) + 1

  def handle_data(self, data):
    self.texts.append(data)


def test_every_template_has_a_page_here():
  assert {path.stem for path in FOLDER.glob("*.html")} == PAGES.keys()


@pytest.mark.parametrize("name", PAGES)
def test_a_page_holds_its_style_and_script_whole_and_once(name):
  read = Read(PAGES[name]())
  stem = "report" if name in ("report", "roofline") else "unmasking"
  style = (FOLDER / f"{stem}.css").read_text("utf-8")
  script = [] if stem == "report" else [(FOLDER / f"{stem}.js").read_text("utf-8")]
  assert read.texts.count(style) == 1 and read.elements["style"] == 1  # so neither holds the tag that ends it
  assert [text for text in read.texts if text in script] == script and read.elements.get("script", 0) == len(script)


@pytest.mark.parametrize("name", PAGES)
def test_what_fills_a_page_is_text(name):
  page = PAGES[name]()
  shown = Read(page).texts
  assert visible(HOSTILE) in shown and "49" not in shown
  assert page.count(HOSTILE[:8]) == 1  # </style>


def test_a_template_says_what_it_was_not_given():
  with pytest.raises(jinja2.UndefinedError, match="'title' is undefined"):
    pages.fill("unmasking.html", samples=[])


def test_jinja_is_read_by_those_who_draw_a_page():
  code = "import sys; from lladax.drawing import report, unmasking; print('jinja2' in sys.modules)"
  done = subprocess.run([sys.executable, "-c", code], cwd=FOLDER.parent.parent, capture_output=True, text=True)
  assert done.stdout == "False\n", done.stderr


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.[cjh][st]*")), ids=lambda path: path.name)
def test_a_file_fetches_nothing(path):
  assert not re.search(r"https?:|//\w|@import|url\(|\b(src|href|import|fetch)\b", path.read_text("utf-8"))
