"""The one door: `python -m lladax.main --config=quickstart --workdir=runs/quickstart [--mode=...]`."""

import ast
import contextlib
import ctypes
import dataclasses
import difflib
import importlib.util
import logging
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from absl import app, flags
from ml_collections import ConfigDict
from ml_collections.config_flags import tuple_parser

from lladax import configs, distributed
from lladax.mistake import Missing, Mistake

# `parse` puts the config itself, with the fields that the command line sets, in the place of its name.
_CONFIG = flags.DEFINE_string(
  "config", None, "A recipe's name or a file, and :ARGUMENT for its get_config; --config.steps=200 sets a field."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: config, tokenizer, checkpoints, metrics.")
_MODE = flags.DEFINE_enum(
  "mode", "train", ["train", "prepare", "evaluate", "sample", "chat", "import", "export", "plan"], "What to do."
)
_PROMPT = flags.DEFINE_multi_string(
  "prompt", [], "mode=sample: text to continue, or text with [MASK]s to fill in; repeat for several (default: stdin)."
)
_SOURCE = flags.DEFINE_string("source", None, "mode=import: folder in the published layout, or its hub name.")
_TARGET = flags.DEFINE_string(
  "target", None, "mode=export: new folder for the published layout. mode=prepare: folder for the records."
)
_SHARDS = flags.DEFINE_integer("shards", 16, "mode=prepare: files of each split; each must fit a worker's memory.")
_DTYPE = flags.DEFINE_enum(
  "dtype", None, ["float32", "bfloat16", "float16"], "mode=export: of the tensors (default: as in the checkpoint)."
)
_HTML = flags.DEFINE_string("html", None, "mode=sample: also write the unmasking to this page.")
_COORDINATOR = flags.DEFINE_string(
  "coordinator", "", "HOST:PORT of process 0, where neither a TPU pod nor Slurm says it; with the next two."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", 0, "Processes of the job.")
_PROCESS_ID = flags.DEFINE_integer("process_id", -1, "Number of this one, from 0.")
_TOPOLOGY = flags.DEFINE_string("topology", "v5p:4x4x4", "mode=plan: the TPUs to plan for.")
_SLICES = flags.DEFINE_integer("slices", 1, "mode=plan: so many of that topology, over the data-centre network.")
_UTILISATION = flags.DEFINE_float("utilisation", 0.4, "mode=plan: of the peak FLOP/s, for the times.")
_JSON = flags.DEFINE_bool("json", False, "mode=plan: print JSON.")
_SYSTEM = flags.DEFINE_string("system", "", "mode=chat: the system prompt.")


def main(argv: list[str]) -> int:
  """Checks what can be checked at once, and calls the mode; returns the exit code."""
  mode, given = _MODE.value, flags.FLAGS.config
  if argv[1:] and mode != "prepare":
    raise Mistake(f"unexpected argument {argv[1]!r}: what follows -- is for Beam, of --mode=prepare")
  if mode in ("train", "prepare", "plan") and given is None:
    raise Mistake("--config is missing: name a recipe or a file, as in --config=quickstart")
  if mode == "plan":
    return _plan(given)
  target = Path(os.path.expanduser(_TARGET.value or ""))
  for name, flag, modes in (("source", _SOURCE, ("import",)), ("target", _TARGET, ("export", "prepare"))):
    if mode in modes and not flag.value:
      raise Mistake(f"--{name} is missing: --mode={mode} needs it")
  if mode in ("export", "prepare") and "://" not in str(_TARGET.value):
    _check_writable(f"--target={target}", target)
  if mode == "prepare":
    return _prepare(given, argv[1:])
  if not _WORKDIR.value:
    raise Mistake("--workdir is missing: name a folder for the run, as in --workdir=runs/quickstart")
  workdir = Path(os.path.expanduser(_WORKDIR.value))
  if mode in ("train", "import", "evaluate"):
    _check_writable(f"--workdir={workdir}", workdir)
  if mode not in ("train", "import"):
    _check_run(workdir)
  page = Path(os.path.expanduser(_HTML.value)) if _HTML.value else None
  if mode == "sample" and page:
    _check_writable(f"--html={page}", page.parent)
    if page.is_dir():
      raise Mistake(f"--html={page} is a folder: name the file of the page")

  from lladax import chat, config, convert, train  # the slow imports come after the quick checks
  from lladax.sharding import MeshConfig

  distributed.initialize(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
  if mode == "export":
    convert.to_published(workdir, target, _DTYPE.value)
    return 0
  if mode == "import":
    values = (given or configs.load("base")).to_dict()
    config.parse(values)
    convert.from_published(_SOURCE.value or "", workdir, values)
    return 0
  if given is not None:
    c = config.parse(given.to_dict())
  else:
    c = dataclasses.replace(config.load(workdir), mesh=MeshConfig())  # of the devices here, not there
  if mode == "train":
    train.train(c, workdir)
  elif mode == "evaluate":
    train.evaluate_last(c, workdir)
  elif mode == "chat":
    chat.run(c, workdir, _SYSTEM.value)
  else:
    if page:
      page.parent.mkdir(parents=True, exist_ok=True)
    train.show_samples(c, workdir, _PROMPT.value, page and str(page))
  return 0


def _prepare(given: ConfigDict, beam_options: list[str]) -> int:
  from lladax import config, prepare

  c = config.parse(given.to_dict())
  prepare.run(c.data, c.tokenizer, str(_TARGET.value), _SHARDS.value, beam_options)
  return 0


def _plan(given: ConfigDict) -> int:
  import jax

  jax.config.update("jax_platforms", "cpu")  # the devices of a plan are not here, and those that are stay free
  from lladax import config, plan

  c = config.parse(given.to_dict())
  return plan.run(c, _TOPOLOGY.value, _SLICES.value, utilisation=_UTILISATION.value, as_json=_JSON.value)


def _check_run(workdir: Path) -> None:
  if workdir.exists() and not workdir.is_dir():
    raise Mistake(f"--workdir={workdir}: it is a file, where a folder is needed")
  if not (workdir / "config.json").is_file():
    raise Missing(f"--workdir={workdir}: there is no run in it; train one first with --mode=train")


def _check_writable(option: str, folder: Path) -> None:
  """Refuses a folder that nobody could make, or write to; makes none."""
  here = None
  try:
    here = next(path for path in (folder, *folder.parents, Path()) if os.path.lexists(path))
    if not here.is_dir():
      what = "is a link to nowhere" if here.is_symlink() else "is a file"
      raise Mistake(f"{option}: {here} {what}, where a folder is needed")
    with tempfile.TemporaryFile(dir=here):
      pass
  except OSError as error:
    raise Mistake(f"{option}: {here or folder} cannot be written to: {error.strerror}") from error


def parse(argv: list[str]) -> list[str]:
  """Reads the command line; returns the program and what follows `--`. Ends the program as `guard` does.

  Options are --name=value, --name value, or the same with one dash; of one that is given twice the last counts.
  Afterwards `flags.FLAGS.config` is the config with the fields that are set, or None where none is named: that of
  the workdir then, where a field is set.
  """
  rest = argv[:1]
  if code := guard(lambda argv: rest.extend(_parse(argv)), argv):
    raise SystemExit(code)
  return rest


def _parse(argv: list[str]) -> list[str]:
  kinds = dict(_fields(configs.load("base")))
  try:
    options, texts, rest = _split(flags.FLAGS.read_flags_from_files(argv[1:]), kinds)
    flags.FLAGS([argv[0], *options])
  except flags.Error as error:
    raise Mistake(" ".join(str(error).split())) from error
  values = {name: _value(name, text, *kinds[name]) for name, text in texts.items()}
  mode, config = _MODE.value, None
  if _CONFIG.value is not None:
    config = configs.load(_CONFIG.value)
  elif values and mode == "import":
    config = configs.load("base")
  elif values and mode in ("evaluate", "sample", "chat") and _WORKDIR.value:
    config = _of_run(Path(os.path.expanduser(_WORKDIR.value)))
  elif values and mode == "export":
    raise Mistake(f"--config.{next(iter(values))}: --mode=export writes the run as it is, and takes no config")
  if config is not None:
    with config.unlocked(), config.ignore_type():
      config.update_from_flattened_dict(values)
  flags.FLAGS.config = config
  return rest


def _fields(config: ConfigDict, group: str = "") -> Iterator[tuple[str, tuple[type, bool]]]:
  """(name, (type, whether it may be None)) of each field."""
  for name, value in config.items():
    if isinstance(value, ConfigDict):
      yield from _fields(value, f"{group}{name}.")
    else:
      kind = config.get_type(name)
      yield group + name, (kind, value is None or kind is object)


def _split(words: list[str], kinds: dict[str, tuple[type, bool]]) -> tuple[list[str], dict[str, str], list[str]]:
  """Options as --name=value; the fields that are set, with their texts; what follows `--`."""
  switch = {name: flags.FLAGS[name].boolean for name in flags.FLAGS}
  switch |= {f"config.{name}": kind is bool for name, (kind, _) in kinds.items()}
  option = re.compile("--?[A-Za-z]")
  options, texts, words = [], {}, list(words)
  while words and (word := words.pop(0)) != "--":
    if not option.match(word):
      raise Mistake(f"unexpected argument {word!r}: options are written --name=value")
    name, equals, text = word.lstrip("-").partition("=")
    if name not in switch and not equals and switch.get(name.removeprefix("no")):
      name, equals, text = name.removeprefix("no"), "=", "false"
    if name not in switch:
      raise Mistake(_unknown(name, list(switch)))
    if not equals and switch[name]:
      text = "true"
    elif not equals:
      if not words or option.match(words[0]):
        raise Mistake(f"--{name} has no value: write --{name}=VALUE")
      text = words.pop(0)
    if name.startswith("config."):
      texts[name.removeprefix("config.")] = text
    else:
      options.append(f"--{name}={text}")
  return options, texts, words


def _unknown(name: str, known: list[str]) -> str:
  if name.startswith("config."):
    near = difflib.get_close_matches(name, [x for x in known if x.startswith("config.")], 1, 0.0)
    return f"{name}: there is no such field; did you mean {near[0]}?"
  near = difflib.get_close_matches(name, [x for x in known if not x.startswith("config.")], 1)
  return f"--{name}: there is no such option" + "".join(f"; did you mean --{x}?" for x in near)


def _value(name: str, text: str, kind: type, optional: bool) -> Any:
  """A field's value from its text."""
  if optional and text in ("None", "none"):
    return None
  try:
    return _READ[kind](text)
  except (ValueError, TypeError) as error:
    raise Mistake(f"--config.{name}={text}: expected {kind.__name__}") from error


def _literal(text: str) -> Any:
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text


_READ = {
  bool: flags.BooleanParser().parse, int: flags.IntegerParser().parse, float: flags.FloatParser().parse, str: str,
  tuple: tuple_parser.TupleParser().parse, object: _literal,
}  # fmt: skip


def _of_run(workdir: Path) -> ConfigDict:
  """The config that a workdir was trained with; its mesh was of the devices there."""
  from lladax import config

  _check_run(workdir)
  return ConfigDict(dataclasses.asdict(config.load(workdir)) | {"mesh": {}})


def _complain(message: str, name: str = "lladax") -> int:
  print(f"{name}: {message}", file=sys.stderr)
  return 1


def guard(command: Callable[[list[str]], int | None], argv: list[str], name: str = "lladax") -> int:
  """Runs a command: one line and 1 for a `Mistake`; a traceback and 70 for everything else."""
  logging.basicConfig(format=f"{name}: %(message)s", level=logging.WARNING, force=True)
  logging.getLogger("lladax").setLevel(logging.INFO)  # which attention kernel runs
  logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax narrates every save
  logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # and its abandoned reads report themselves, one by one
  try:
    return command(argv) or 0
  except Mistake as error:
    code = _complain(str(error), name)
  except Exception:
    traceback.print_exc()
    code = 70  # EX_SOFTWARE: a launcher may start it again
  distributed.leave(code)
  return code


def keep_freed_memory() -> None:
  """Has glibc keep what XLA's CPU backend frees; call it before JAX starts its threads.

  The backend allocates its temporaries anew at every step. Out of the box each thread has a heap of its own that gives
  large blocks back to the system at once, and a training step on a CPU spends a quarter of its time in page faults.
  Hosts of accelerators, where XLA does not live in malloc, are left as they are, and so is another libc.
  """
  gpus = ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin")
  if os.environ.get("JAX_PLATFORMS") != "cpu" and (distributed.has_tpu() or any(map(importlib.util.find_spec, gpus))):
    return
  with contextlib.suppress(AttributeError, OSError):  # no mallopt
    mallopt = ctypes.CDLL(None).mallopt
    for parameter, value in ((-8, 1), (-4, 0), (-1, -1)):  # M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD
      mallopt(parameter, value)


def run() -> None:
  """The console script `lladax`: the same as `python -m lladax.main`."""
  keep_freed_memory()
  app.run(lambda argv: guard(main, argv), flags_parser=parse)


if __name__ == "__main__":
  run()
