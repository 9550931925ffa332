"""How the pages are built: `sphinx-build -W --keep-going docs docs/_build`. Nothing is fetched; a warning is an error.

Pages are Markdown (MyST). What stands in docstrings is shown by autodoc; they are written for who reads the code, so
`as_rst` lays them out before Sphinx does: drawings and tables stay as they are drawn, and only backticks mean anything.
"""

import importlib
import pathlib
import re

from lladax.mistake import Mistake

ROOT = pathlib.Path(__file__).parent.parent

project, author = "lladax", "The lladax authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "sphinx_book_theme"
html_title = "lladax"

nitpicky = True  # a name of ours that is shown must lead somewhere; those of others would need their inventories
nitpick_ignore_regex = [(r"py:.*", r"(?!lladax\.).*|.*\._\w+")]
myst_heading_anchors = 4  # named as GitHub names them

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
napoleon_numpy_docstring = False
napoleon_use_rtype = False

SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields):$")


def as_rst(app, what, name, obj, options, lines: list[str]) -> None:
  """Lays out a docstring: sections of Google's style for napoleon, and all else paragraphs or drawings."""
  del app, what, name, obj, options
  out, section, drawing, fenced = [], False, False, False
  paragraphs = re.split(r"\n(?:[ \t]*\n)+", "\n".join(lines))
  for line in (line for paragraph in paragraphs for line in [*paragraph.split("\n"), None]):
    if not line:  # the end of a paragraph
      drawing = fenced
      out.append("")
    elif line.strip().startswith("```"):
      drawing = fenced = not fenced
      out += ["", "::", ""] if fenced else [""]
    elif not line.startswith(" ") and not fenced:
      out += [""] * drawing
      section, drawing = bool(SECTION.match(line)), False
      out.append(line if section or line.startswith(">>>") else escaped(line))
    elif section and not fenced:
      item = re.match(r" +[\w*]*: ", line)  # napoleon escapes the name itself
      out.append(item[0] + escaped(line[item.end() :]) if item else escaped(line))
    else:
      out += [] if drawing else ["", "::", ""]
      drawing = True
      out.append(f"  {line}")
  lines[:] = out


def escaped(line: str) -> str:
  """Text in which backticks alone mean something."""
  parts = re.split(r"(`+[^`]+`+)", line)
  return "".join(
    f"``{x.strip('`')}``" if i % 2 else re.sub(r"([\\*|`]|_(?!\w))", r"\\\1", x) for i, x in enumerate(parts)
  )


def skips(app, what, name: str, obj, skip: bool, options) -> bool | None:
  """The fields of a NamedTuple stand in its signature; "Alias for field number 3" says nothing more."""
  del app, what, name, skip, options
  return True if (getattr(obj, "__doc__", None) or "").startswith("Alias for field number") else None


def on_read(app, docname: str, source: list[str]) -> None:
  """Fills the page of the rooms: a heading for each module, and what autodoc finds in it.

  In the repository a link to launch/README.md leads there; here the same text is a page of its own.
  """
  del app
  source[0] = source[0].replace("(../launch/README.md", "(launch.md")
  if docname != "api_rooms":
    return
  rooms = {}
  for file in sorted((ROOT / "lladax").glob("*/*.py")):
    rooms.setdefault(file.parent.name, []).append(f"lladax.{file.parent.name}.{file.stem}")
  del rooms["configs"]  # a door, on the page of the public names
  for room, modules in rooms.items():
    source[0] += f"\n## {room}\n"
    for module in modules:
      try:
        importlib.import_module(module)
        shown = f"```{{eval-rst}}\n.. automodule:: {module}\n   :members:\n```"
      except Mistake as error:  # it needs an extra
        shown = f"Not shown here: {error}"
      source[0] += f"\n### `{module.removeprefix('lladax.')}`\n\n{shown}\n"


def setup(app) -> None:
  """Called by Sphinx."""
  app.connect("autodoc-process-docstring", as_rst, priority=100)  # before napoleon
  app.connect("autodoc-skip-member", skips)
  app.connect("source-read", on_read)
