"""Values from outside, held against the types that fields declare: one rule for configs, options and arguments."""

import ast
import collections
import dataclasses
import difflib
import inspect
import itertools
import json
import types
import typing
from pathlib import Path
from typing import Any

from lladax.mistake import Mistake, Unknown

_LARGEST = 2**28  # bytes


def parse(values: dict[str, Any], cls: Any, path: str) -> Any:
  """A dataclass from nested plain values.

  Raises:
    Unknown: a field that does not exist (with the nearest name).
    Mistake: a missing field, a wrong type.
  """
  if not isinstance(values, dict):
    raise Mistake(f"{path}={_shown(values)}: expected a group of fields")
  hints = typing.get_type_hints(cls)
  for name in values:
    if name not in hints:
      near = difflib.get_close_matches(name, hints, 1, 0.0)
      raise Unknown(f"{path}.{name}: there is no such field; did you mean {path}.{near[0]}?")
  whole = any(map(dataclasses.is_dataclass, hints.values()))  # a run has to be; a group may leave out
  fields = {}
  for field in dataclasses.fields(cls):
    where, kind = f"{path}.{field.name}", hints[field.name]
    if field.name not in values:
      if whole:
        raise Mistake(f"{where} is missing")
    elif dataclasses.is_dataclass(kind):
      fields[field.name] = parse(values[field.name], kind, where)
    else:
      fields[field.name] = typed(values[field.name], kind, where)
  return cls(**fields)


def json_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """`json.loads`'s `object_pairs_hook`; ValueError for a name that stands twice, of which others keep the last."""
  found = dict(pairs)
  if len(found) < len(pairs):
    twice = next(name for name, n in collections.Counter(name for name, _ in pairs).items() if n > 1)
    raise ValueError(f"the field {twice!r:.80} stands twice in one object")
  return found


def check(group: Any, path: str) -> None:
  """Types the fields of a frozen dataclass, from its `__post_init__`: for those that are made in Python, too."""
  for name, kind in typing.get_type_hints(type(group)).items():
    object.__setattr__(group, name, typed(getattr(group, name), kind, f"{path}.{name}"))


def comments(cls: type) -> dict[str, str]:
  """What the source of a dataclass says of each of its fields: on the lines before it, and behind it."""
  lines = inspect.getsource(cls).splitlines()
  found = {}
  for field in next(x for x in ast.walk(ast.parse("\n".join(lines))) if isinstance(x, ast.ClassDef)).body:
    if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
      before = itertools.takewhile(lambda line: line.startswith("#"), map(str.strip, lines[field.lineno - 2 :: -1]))
      behind = lines[(field.end_lineno or 0) - 1].encode()[field.end_col_offset :].decode()
      found[field.target.id] = " ".join(line.strip(" #") for line in (*reversed(list(before)), behind)).strip()
  return found


def typed(value: Any, kind: Any, where: str) -> Any:
  """The value, if it is of the type: a class, tuple[int, ...], or a union with None or with a tuple.

  Lists and arrays are tuples, NumPy's scalars are numbers, and a whole number is a float; a bool is no number.

  Raises:
    Mistake: it is not; `where` is what it is called.
  """
  if hasattr(value, "tolist"):
    value = value.tolist()
  options = typing.get_args(kind)
  if isinstance(kind, types.UnionType):
    if value is None and type(None) in options:
      return None
    several = isinstance(value, list | tuple)
    options = sorted(options, key=lambda k: (k is type(None), (typing.get_origin(k) is tuple) != several))
    return typed(value, options[0], where)
  origin = typing.get_origin(kind) or kind
  if origin is tuple and isinstance(value, list | tuple):
    kinds = options[:1] * len(value) if options[1:] == (...,) else options
    if len(kinds) == len(value):
      return tuple(typed(x, k, f"{where}[{i}]") for i, (x, k) in enumerate(zip(value, kinds, strict=True)))
  if origin is float and isinstance(value, int) and not isinstance(value, bool):
    try:
      return float(value)
    except OverflowError:
      raise Mistake(f"{where}={_shown(value)}: a number of this size is none") from None
  if not isinstance(value, origin) or (isinstance(value, bool) and origin is not bool):
    raise Mistake(f"{where}={_shown(value)}: expected {origin.__name__}, not {type(value).__name__}")
  return value


def check_seed(seed: int, where: str) -> None:
  """Raises Mistake for a seed of more than 32 bits: `jax.random.key` would take the lower ones alone."""
  if not 0 <= seed < 2**32:
    raise Mistake(f"{where}={seed}: must be from 0 to 2^32 - 1")


def read_bytes(path: Path) -> bytes:
  """What a file of settings or of a vocabulary holds; Mistake for one so large that it is neither."""
  if (size := path.stat().st_size) > _LARGEST:
    raise Mistake(f"{path} has {size:,} bytes, more than {_LARGEST:,}: it is not what its name says")
  return path.read_bytes()


def read_json(path: Path) -> Any:
  """What a file holds; raises Mistake if that is no JSON."""
  content = read_bytes(path)
  try:
    text = content.decode("utf-8")
    found = json.loads(text)
    if "\\ud" in text.lower():  # perhaps half of a pair, which is no character
      json.dumps(found, ensure_ascii=False).encode()
    return found
  except RecursionError:
    raise Mistake(f"{path} is no JSON that can be read: its lists and objects are too deep") from None
  except ValueError as error:
    raise Mistake(f"{path} is no JSON: {error}") from None


def _shown(value: Any) -> str:
  shown = repr(value)
  return shown if len(shown) <= 200 else f"{shown[:200]}..."
