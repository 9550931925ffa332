"""Pages from the files of this room: HTML that Jinja fills, with CSS and JavaScript in it. They need no network."""

import functools
from importlib import resources
from typing import Any

from lladax.terminal import visible


def fill(name: str, **values: Any) -> str:
  """The page of a template, NAME.html; the values are text, never markup."""
  return _templates().get_template(name).render(values)


def _visible(value: Any) -> Any:
  """Of a page that is printed, or copied into a terminal, nothing is obeyed either."""
  return visible(value) if type(value) is str else value


@functools.cache
def _templates() -> Any:
  import jinja2  # of no use to those who draw no page

  def read(name: str) -> str:
    return (resources.files("lladax") / "drawing" / name).read_text("utf-8")

  templates = jinja2.Environment(
    loader=jinja2.FunctionLoader(read), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
    lstrip_blocks=True, finalize=_visible,
  )  # fmt: skip
  templates.globals["file"] = read
  return templates
