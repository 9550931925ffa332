"""A published folder's own chat template: messages to text, as Hugging Face renders it, in Jinja's sandbox.

What a message says is never markup. Where it spells a control token, a seam is put into the name before the template
sees it; the template may trim, split and quote as it likes, and the tokenizer cuts the rendered text at the seams.
"""

import dataclasses
import datetime
import functools
import itertools
import json
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lladax import fields
from lladax.mistake import Mistake

# What a template may do, which comes from anywhere: rounds of its loops and macros, a number or a text in a product or
# an argument, a text that it adds up.
_ROUNDS, _LARGE, _LONG, _STEP = 10**6, 10**5, 10**7, "lladax_step"
SEAM, _EDGE = "\ufdd0", "\ufdd1"  # no characters: Unicode keeps them for a program's own use


@dataclasses.dataclass(frozen=True)
class Template:
  """A template and the special tokens that it may name (bos_token, eos_token, ...)."""

  source: str
  variables: Mapping[str, Any]

  def render(self, messages: Sequence[Mapping[str, Any]], ask: bool, control: Sequence[str]) -> str:
    """The text of a conversation; `ask` opens the assistant's next reply.

    Args:
      messages: with any roles and fields that the template knows.
      ask: whether the next reply is opened.
      control: the names that mean a token where the template writes them, and text where a message does; there a
        SEAM lies within.

    Raises:
      Mistake: a message has no role, or the template fails, or refuses (`raise_exception`).
    """
    for message in messages:
      role = message.get("role") if isinstance(message, Mapping) else None
      if not isinstance(role, str) or not re.fullmatch(r"[\w-]+", role):  # templates write it beside control tokens
        raise Mistake(f"a message of role {role!r}: a role is one word")
    said = [
      {key: value if key == "role" else apart(value, tuple(control)) for key, value in message.items()}
      for message in messages
    ]
    variables = {"tools": None, "documents": None, **self.variables, _STEP: functools.partial(_step, itertools.count())}
    try:
      text = _compiled(self.source).render(messages=said, add_generation_prompt=ask, **variables)
    except Exception as error:  # of Jinja, of the template's own operations, of what it raises: all are the template's
      why = " ".join(str(error).split()) or type(error).__name__
      raise Mistake(f"the model's chat template fails on these {len(said)} messages: {why}") from error
    if _EDGE not in text:
      return text
    found, joined = _names(tuple(control))[0], text.replace(_EDGE, "")
    return joined if len(found.findall(joined)) == len(found.findall(text)) else text.replace(_EDGE, SEAM)


def find(folder: pathlib.Path) -> Template | None:
  """The template of a published folder, and its special tokens; None without one.

  Raises:
    Mistake: a file of these is no JSON object, or the template is no text.
  """
  config = read(folder / "tokenizer_config.json")
  source, where = config.get("chat_template"), "tokenizer_config.json"
  if (folder / "chat_template.jinja").is_file():
    source, where = (folder / "chat_template.jinja").read_text("utf-8", "replace"), "chat_template.jinja"
  elif source is None:
    source, where = read(folder / "chat_template.json").get("chat_template"), "chat_template.json"
  if isinstance(source, list):  # several, by name; the others are for tools and documents
    named = {x.get("name"): x.get("template") for x in source if isinstance(x, dict)}
    why = f"{where} has templates for {', '.join(map(str, named))}, and no 'default'"  # said to those who talk
    source = named.get("default", f"{{{{ raise_exception({json.dumps(why)}) }}}}")
  if source is None:
    return None
  if not isinstance(source, str):
    raise Mistake(f"{folder / where}: chat_template is no text but {type(source).__name__}")
  tokens = read(folder / "special_tokens_map.json") | config
  return Template(source, {key: name for key, x in tokens.items() if key.endswith("_token") and (name := spelled(x))})


def read(path: pathlib.Path) -> dict[str, Any]:
  """What a file of JSON holds; nothing where there is none."""
  found = fields.read_json(path) if path.is_file() else {}
  if not isinstance(found, dict):
    raise Mistake(f"{path} is no JSON object but {type(found).__name__}")
  return found


def spelled(token: Any) -> str:
  """A special token's name, however its file writes it; "": there is none."""
  name = token.get("content") if isinstance(token, dict) else token
  return name if isinstance(name, str) else ""


@functools.lru_cache(maxsize=8)
def _names(control: tuple[str, ...]) -> tuple[re.Pattern, tuple[str, ...], tuple[str, ...]]:
  """(where a name begins, beginnings of names, endings of names)."""
  pattern = "|".join(map(re.escape, sorted(control, key=len, reverse=True)))
  cuts = [(name[:i], name[i:]) for name in control for i in range(1, len(name))]
  heads, tails = ({cut[side] for cut in cuts} for side in (0, 1))
  return re.compile(f"(?={pattern})." if control else "(?!)", re.DOTALL), tuple(heads), tuple(tails)


def apart(value: Any, control: tuple[str, ...]) -> Any:
  """What a message holds, with a seam in every control token's name, and at ends that could be a part of one."""
  if isinstance(value, Mapping):
    return {apart(key, control): apart(x, control) for key, x in value.items()}
  if isinstance(value, list | tuple):
    return [apart(x, control) for x in value]
  if not isinstance(value, str):
    return value
  begins, heads, tails = _names(control)
  text = begins.sub(lambda found: found[0] + SEAM, value.replace(SEAM, "\ufffd").replace(_EDGE, "\ufffd"))
  bare = text.strip()  # as a template may, too
  edged = _EDGE * bare.startswith(tails) + bare + _EDGE * bare.endswith(heads)
  return text if edged == bare else text.replace(bare, edged, 1)


def _step(rounds: Iterator[int]) -> None:
  if next(rounds) >= _ROUNDS:
    raise ValueError(f"it goes round more than {_ROUNDS:,} times")


def _small(value: Any) -> Any:
  """The value, if it is no number and no text to fill the memory with."""
  size = abs(value) / _LARGE if isinstance(value, int) else len(value) / _LONG if isinstance(value, str) else 0
  if size > 1:
    raise ValueError("it makes something very large")
  return value


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> Any:
  """The template in the environment that published templates are written for."""
  from jinja2 import TemplateError, ext, nodes, sandbox  # of no use to those who never meet a foreign template

  class Generation(ext.Extension):
    """`{% generation %}` marks what training learns: here it is what it encloses."""

    tags = {"generation"}

    def parse(self, parser):
      next(parser.stream)
      return parser.parse_statements(("name:endgeneration",), drop_needle=True)

  class Bounded(sandbox.ImmutableSandboxedEnvironment):
    """The sandbox, with an end to time and memory."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def _parse(self, source, name, filename):
      tree = super()._parse(source, name, filename)
      for node in list(tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock))):
        step = nodes.Call(nodes.Name(_STEP, "load"), [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(step).set_lineno(node.lineno))
      return tree

    def call_binop(self, context, operator, left, right):
      sizes = [abs(x) if isinstance(x, int) else len(x) if hasattr(x, "__len__") else 1 for x in (left, right)]
      wide = operator == "%" and isinstance(left, str) and re.search(r"[*]|[0-9]{5}", left)
      if wide or (operator == "*" and sizes[0] * sizes[1] > _LARGE) or (operator == "**" and sum(sizes) > 64):
        raise ValueError("it makes something very large")
      return _small(super().call_binop(context, operator, left, right))

    def call(self, *args, **options):
      for x in (*args[2:], *options.values()):
        _small(x)
      return super().call(*args, **options)

  def raise_exception(message):
    raise TemplateError(message)

  def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

  extensions = [Generation, ext.loopcontrols]
  environment = Bounded(finalize=_small, trim_blocks=True, lstrip_blocks=True, extensions=extensions)
  environment.filters["tojson"] = tojson
  environment.globals["raise_exception"] = raise_exception
  environment.globals["strftime_now"] = lambda format: datetime.datetime.now().strftime(format)
  return environment.from_string(source)
