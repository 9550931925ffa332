"""The order of unmasking, drawn: what is visible when, what is coloured, what is escaped."""

import html.parser
import re

import numpy as np
import pytest
from rich.console import Console

from lladax.drawing import unmasking
from lladax.inference import llada

PIECES = ("Q:", " two\n", "plus", " <script>", "", "\n", " four", " &", " end")
UNMASKED_AT = np.array([0, 0, 3, 1, 5, 2, 5, 0, 4])


def _unmasking(pieces=PIECES, unmasked_at=UNMASKED_AT, title="a <b> title"):
  return unmasking.Unmasking(pieces, unmasked_at, np.full(len(pieces), 0.5), title)


class _Tokens(html.parser.HTMLParser):
  """Collects (tag, attributes, text) of the tokens, as a browser would read them."""

  def __init__(self, page):
    super().__init__()
    self.tags, self.tokens, self._in_text = [], [], False
    self.feed(page)

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    self._in_text |= dict(attrs).get("class") == "text"
    if self._in_text and tag in "bi":
      self.tokens.append([tag, dict(attrs), ""])

  def handle_endtag(self, tag):
    self._in_text &= tag != "div"

  def handle_data(self, data):
    if self._in_text:
      self.tokens[-1][2] += data


def _styles(text):
  """The style of each character of a rich text."""
  styles = [""] * len(text)
  for start, end, style in text.spans:
    styles[start:end] = [str(style)] * (end - start)
  return styles


@pytest.mark.parametrize("step", range(6))
def test_frame_shows_exactly_what_is_unmasked(step):
  expected = [p if s <= step else "░" for p, s in zip(PIECES, UNMASKED_AT, strict=True)]
  assert unmasking.frame(_unmasking(), step).plain == "".join(expected)


@pytest.mark.parametrize("step", range(6))
def test_frame_colours_unmasked_tokens_and_nothing_else(step):
  text = unmasking.frame(_unmasking(), step)
  styles, colours, at = _styles(text), set(), 0
  for piece, s in zip(PIECES, UNMASKED_AT, strict=True):
    drawn = piece if s <= step else "░"
    (style,) = set(styles[at : at + len(drawn)]) or {None}
    at += len(drawn)
    if s > step:
      assert style == "dim"
    elif s == 0:
      assert style == "bold"
    elif style is not None:  # the empty piece has no character to colour
      assert re.fullmatch("#[0-9a-f]{6}", style)
      colours.add((s, style))
  assert len({c for _, c in colours}) == len({s for s, _ in colours})


def test_ramp_is_ordered_and_readable_on_black_and_on_white():
  colours = unmasking.step_colours(64)[1:]
  srgb = np.array([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in colours])
  linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
  luminance = linear @ [0.2126, 0.7152, 0.0722]
  assert (np.diff(luminance[::8]) > 0).all()  # later is lighter
  assert ((luminance + 0.05) / 0.05 > 3).all()  # WCAG's contrast for large text and graphics
  assert (1.05 / (luminance + 0.05) > 3).all()


@pytest.mark.parametrize("frames", [1, 3, 4, 50])
def test_terminal_ends_with_the_text_and_spreads_its_frames(frames):
  plain = unmasking.terminal(_unmasking(), frames=frames).plain
  assert plain.endswith("\n" + "".join(PIECES))
  steps = [int(k) for k in re.findall(r"── step (\d+) of 5", plain)]
  assert len(steps) == min(frames, 5) and steps[-1] == 5
  assert np.ptp(np.diff([0, *steps])) <= 1


def test_terminal_without_colour_is_plain_text():
  console = Console(width=80, color_system=None)
  with console.capture() as capture:
    console.print(unmasking.terminal(_unmasking(("a", " b", "\n", "c"), np.array([0, 2, 1, 4]))))
  printed = capture.get()
  assert "\x1b" not in printed
  assert [printed.count(f"\n{f}\n") for f in ("a░\n░", "a b\n░", "a b\nc")] == [1, 2, 1]


def test_samples_cannot_drive_the_terminal():
  text = unmasking.terminal(_unmasking(("a\x1b[2J", "\x9b", "\r"), np.array([0, 1, 2]), "\x07"))
  assert not set(text.plain) & set("\x1b\x9b\r\x07")


def test_html_escapes_and_keeps_every_piece():
  page = unmasking.html([_unmasking()], title="<script>")
  parsed = _Tokens(page)
  assert [t for _, _, t in parsed.tokens] == list(PIECES)
  assert page.count("<script>") == 1  # ours
  assert "a &lt;b&gt; title" in page


def test_html_colours_and_masks_only_what_was_not_given():
  tokens = _Tokens(unmasking.html([_unmasking()])).tokens
  for (tag, attributes, _), s in zip(tokens, UNMASKED_AT, strict=True):
    if s == 0:
      assert tag == "b" and "style" not in attributes and "data-s" not in attributes
    else:
      assert tag == "i" and attributes["data-s"] == str(s) and "--c:#" in attributes["style"]
      assert attributes["title"] == f"step {s} · probability 0.500"


def test_html_without_javascript_shows_the_finished_text():
  tags = _Tokens(unmasking.html([_unmasking()])).tags
  assert not any("m" in a.get("class", "").split() for _, a in tags)
  assert any(a.get("class") == "play" and "hidden" in a for _, a in tags)


def test_fragments_share_a_page():
  page = _unmasking()._repr_html_() + unmasking.html([_unmasking(), _unmasking()]) + unmasking.heat_map([_unmasking()])
  tags = _Tokens(page).tags
  assert not any({"id", "name", "for"} & a.keys() for t, a in tags if t != "meta")
  assert not any({"src", "href"} & a.keys() for _, a in tags)
  assert not re.search(r"https?://|@import|url\(", page)
  for block in re.findall(r"<style>(.*?)</style>", page, re.S):
    rules = re.findall(r"[^{}]+(?={)", block)
    assert all(".lladax" in rule or rule.strip().startswith("@media") for rule in rules)
  (script,) = set(re.findall(r"<script>(.*?)</script>", page, re.S))
  assert not re.search(r"^(const|let|var|function)", script, re.M)  # run twice in one document


def test_a_canvas_with_nothing_to_unmask_and_an_empty_one():
  for pieces in [("all", " given"), ()]:
    canvas = _unmasking(pieces, np.zeros(len(pieces), int))
    assert canvas.steps == 0
    assert unmasking.terminal(canvas).plain.endswith("\n" + "".join(pieces))
    assert [t for _, _, t in _Tokens(unmasking.html([canvas])).tokens] == list(pieces)


def _cells(page):
  """(attributes, what it tells) of every cell of a heat map."""
  return [
    (dict(re.findall(r'(\w+)="([\w.]+)"', attributes)), told)
    for attributes, told in re.findall(r"<rect ([^>]*)><title>(.*?)</title></rect>", page)
  ]


def test_heat_map_of_one_canvas_has_a_cell_for_every_token():
  cells = _cells(unmasking.heat_map([_unmasking()]))
  assert sorted(int(a["x"]) for a, _ in cells) == list(range(len(PIECES)))
  for attributes, told in cells:
    s = UNMASKED_AT[int(attributes["x"])]
    assert (attributes.get("class") == "given") == (s == 0)
    if s:
      assert int(attributes["y"]) == 5 - s  # time goes upwards
    when = f"step {s}" if s else "given"
    sure = " · mean probability 0.500" if s else ""
    assert told == f"position {int(attributes['x']) + 1} · {when} · 1 of 1 tokens (100.0%){sure}"


def test_heat_map_of_many_counts_every_token_once_and_lines_up_right_ends():
  rng = np.random.default_rng(0)
  lengths = rng.integers(150, 300, 20)
  unmaskings = [_unmasking(("a",) * n, rng.permutation(n) + 1) for n in lengths]
  page = unmasking.heat_map(unmaskings, "a <b>")
  cells = _cells(page)
  assert sum(int(re.search(r"(\d+) of", told)[1]) for _, told in cells) == lengths.sum()
  assert "position 3" not in page.replace("positions", "")  # a cell holds several
  last = f"positions {(lengths.max() - 1) // 4 * 4 + 1}–{lengths.max()}"
  in_last = [told for _, told in cells if told.startswith(last)]
  size = 20 * ((lengths.max() - 1) % 4 + 1)
  assert sum(int(re.search(r"(\d+) of", told)[1]) for told in in_last) == size  # all rows reach the right end
  assert all(f" of {size} tokens" in told for told in in_last)
  assert "a &lt;b&gt;" in page and page._repr_html_() == page
  assert "--p:100%" in page  # the most frequent cell has the last colour of the key


def test_heat_map_of_given_text_and_of_nothing():
  assert {a["class"] for a, _ in _cells(unmasking.heat_map([_unmasking(unmasked_at=0 * UNMASKED_AT)]))} == {"given"}
  for nothing in ([], [_unmasking((), np.zeros(0, int))]):
    with pytest.raises(ValueError, match="no canvas with a token"):
      unmasking.heat_map(nothing)


@pytest.mark.parametrize("n", [0, 1, 2, 7, 8, 64, 1024, 4096])
def test_ticks_are_few_and_within(n):
  ticks = unmasking._ticks(n)
  assert len(ticks) <= 8 and all(min(1, n) <= t <= n for t in ticks)


def test_what_was_sampled_draws_itself_in_every_way(tmp_path):
  at = np.array([[0, 0, 2, 1], [0, 1, 0, 2]])
  out = llada.Sampled(
    text=["", ""], tokens=at + 5, unmasked_at=at, confidence=np.full(at.shape, 0.25), nfe=2, padding=np.array([1, 0]),
    piece=lambda i: f" {i}", mask_id=99,
  )  # fmt: skip
  cells = [told for _, told in _cells(out.heat_map("title"))]
  assert "position 4 · step 1 · 1 of 2 tokens (50.0%) · mean probability 0.250" in cells
  assert sum("given" in told for told in cells) == 3  # padding is none of them
  assert "step 1 · probability 0.250" in out.html()
  pytest.importorskip("PIL.Image")
  out.gif(tmp_path / "out.gif", columns=20)
  assert (tmp_path / "out.gif").read_bytes().startswith(b"GIF89a")


@pytest.mark.parametrize("unmasked_at", [[0, 1], [[0], [1], [2]], [0, 1, -1], [0.0, 1.0, 2.0]])
def test_bad_unmasked_at_raises(unmasked_at):
  with pytest.raises(ValueError, match="unmasked_at"):
    unmasking.Unmasking(("a", "b", "c"), np.array(unmasked_at), np.ones(3))


def test_other_bad_input_raises():
  with pytest.raises(ValueError, match="confidence"):
    unmasking.Unmasking(("a",), np.zeros(1, int), np.ones(2))
  with pytest.raises(ValueError, match="frames"):
    unmasking.terminal(_unmasking(), frames=0)


def test_ten_thousand_tokens_are_all_drawn():
  order = np.random.default_rng(0).permutation(10_000) + 1
  canvas = _unmasking((" token",) * 10_000, order)
  assert unmasking.html([canvas]).count(" token<") == 10_000
  assert unmasking.terminal(canvas, frames=1).plain.count(" token") == 10_000
  unmasking.heat_map([canvas])


def test_an_edit_is_drawn_where_its_token_comes_to_stand():
  edited = unmasking.Unmasking(
    ("a", "b", "c"), np.array([0, 1, 2]), np.array([1.0, 0.5, 0.25]), edited_at=np.array([0, 3, 0])
  )
  assert edited.steps == 3
  frames = [unmasking.frame(edited, k).plain for k in range(4)]
  assert frames == ["a░░", "a▒░", "a▒c", "abc"]
  page = unmasking.html([edited])
  assert "step 1, edited at step 3 · probability 0.500" in page and "step 2 · probability 0.250" in page
  with pytest.raises(ValueError, match="edited_at must have shape"):
    unmasking.Unmasking(("a",), np.array([1]), np.array([1.0]), edited_at=np.array([1, 2]))
