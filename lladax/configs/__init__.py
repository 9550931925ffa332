"""The recipes, found by name wherever lladax is installed, and configs in files of the user's own.

A recipe is a file of `configs/` at the top of the checkout; in a wheel it lies in this folder. Either way it is the
module `lladax.configs.NAME`, so a config that builds on one says `from lladax.configs import base`.
"""

import contextlib
import difflib
import inspect
import os
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from lladax import address, fields
from lladax.mistake import Missing, Mistake

_HERE = Path(__file__).parent
FOLDER = _HERE if (_HERE / "base.py").is_file() else _HERE.parent.parent / "configs"
__path__ = [str(FOLDER)]


# What WORKDIR/config.json holds besides the fields: of init_from, the checkpoint that the run began from.
NOT_FIELDS = ("tokenizer_fingerprint", "base", "base_fingerprint", "data_digests", "draws", "said", "merged")


def names() -> list[str]:
  """Of the recipes."""
  return sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")


def load(spec: str) -> ConfigDict:
  """The config that `spec` stands for: a recipe's name, or the path of a file with a function `get_config`.

  Or that of a run, WORKDIR/config.json: what is younger than it has its default, and `init_from` is the very checkpoint
  that the run began from.

  What follows a colon is the argument of `get_config`, as in "llada_8b:v5p_4x4x4" and "my/own.py:small". A file may
  import what lies in the working directory, as a program that was started there could.

  Raises:
    Missing: there is neither such a recipe nor such a file.
    Mistake: the file cannot be read as Python, or has no `get_config` that takes the argument and returns a config; of
      JSON, it is none of a run.
      What goes wrong within the file is its own crash.
  """
  far = address.is_address(spec)
  name, colon, argument = (spec, "", "") if far or Path(spec).is_file() else spec.partition(":")
  if not name:
    raise Mistake(f"--config={spec} is empty: name a recipe or a file; the recipes are {', '.join(names())}")
  path = FOLDER / f"{name}.py" if name in names() else Path(os.path.expanduser(name))
  if far:
    folder, _, name = spec.rpartition("/")
    path = address.mirror(folder) / name
  if not path.exists():
    raise Missing(f"--config={spec}: {_missing(name, path)}")
  if path.suffix == ".json":
    return _of_run(spec, path)
  with _working_directory_on_path():
    get_config = _run(spec, path).get("get_config")
    if not callable(get_config):
      raise Mistake(f"--config={spec}: {path} has no function get_config")
    arguments = [argument] if colon else []
    try:
      inspect.signature(get_config).bind(*arguments)
    except TypeError as error:
      given = f"{argument!r} behind a colon" if colon else "nothing behind a colon"
      raise Mistake(f"--config={spec}: its get_config cannot be called with {given}: {error}") from error
    config = get_config(*arguments)
  if not isinstance(config, ConfigDict | dict):
    raise Mistake(f"--config={spec}: its get_config returns {type(config).__name__}, not a ConfigDict")
  return ConfigDict(config) if isinstance(config, dict) else config


def _of_run(spec: str, path: Path) -> ConfigDict:
  """The config of the run whose config.json this is."""
  values = fields.read_json(path)
  if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
    raise Mistake(f"--config={spec}: it is not the config.json of a run")
  own = {name: value for name, value in values.items() if name not in NOT_FIELDS}
  own |= {"init_from": values["base"]} if values.get("base") else {}
  config = load("base")  # its fields know what may be None
  with config.ignore_type():
    config.update(_tuples(own))
  return config


def _tuples(value: Any) -> Any:
  """JSON knows lists alone, and a config tuples."""
  if isinstance(value, dict):
    return {name: _tuples(x) for name, x in value.items()}
  return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _run(spec: str, path: Path) -> dict[str, Any]:
  """The names that a file defines."""
  try:
    try:
      compile(path.read_bytes(), str(path), "exec")
    except OSError as error:
      raise Mistake(f"--config={spec}: {path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # of null bytes; SyntaxError is no ValueError
      raise Mistake(f"--config={spec}: {path} is not Python: {error}") from error
    return runpy.run_path(str(path), run_name="config")
  except SyntaxError as error:  # of the file, or of one that it imports
    raise Mistake(f"--config={spec}: {error.filename}, line {error.lineno}: {error.msg}") from error


def _missing(name: str, path: Path) -> str:
  if path.stem in names():
    return f"there is no file {name}; the recipe of that name is --config={path.stem}"
  near = difflib.get_close_matches(path.stem, names(), 1)
  meant = f"; did you mean {near[0]}?" if near else "."
  return f"there is no such recipe or file{meant} The recipes are {', '.join(names())}"


@contextlib.contextmanager
def _working_directory_on_path() -> Iterator[None]:
  sys.path.insert(0, os.getcwd())
  try:
    yield
  finally:
    with contextlib.suppress(ValueError):
      sys.path.remove(os.getcwd())
