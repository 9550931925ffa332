"""The one door: `python -m lladax.main --config=quickstart --workdir=runs/quickstart [--mode=...]`."""

import contextlib
import ctypes
import dataclasses
import difflib
import importlib.util
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from lladax import address, configs
from lladax.devices import distributed, interrupts
from lladax.devices.distributed import guard
from lladax.mistake import Missing, Mistake
from lladax.storage.writing import check_writable
from lladax.terminal import Console, visible

if TYPE_CHECKING:
  from lladax.serving.settings import ServeConfig

# `parse` puts the config itself, with the fields that the command line sets, in the place of its name.
_CONFIG = flags.DEFINE_string(
  "config", None,
  "A recipe's name or a file, and :ARGUMENT for its get_config, or a run's config.json; --config.steps=2 sets a field.",
)  # fmt: skip
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of the run, here or at gs:// or s3://: config, checkpoints, metrics."
)
_MODE = flags.DEFINE_enum(
  "mode", "train",
  ["train", "prepare", "evaluate", "sample", "chat", "serve", "import", "export", "plan", "show", "verify"],
  "What to do.",
)  # fmt: skip
_PROMPT = flags.DEFINE_multi_string(
  "prompt", [], "mode=sample: text to continue, or text with [MASK]s to fill in; repeat for several (default: stdin)."
)
_SOURCE = flags.DEFINE_string(
  "source", None, "mode=import: folder in the published layout, or hf://OWNER/NAME[@REVISION]."
)
_SAID = [
  flags.DEFINE_integer(name, None, f"mode=import: {what}, where the source does not say.")
  for name, what in (("mask_id", "id of [MASK]"), ("eos_id", "id of EOS"), ("block", "tokens of a block"))
]
_TARGET = flags.DEFINE_string(
  "target", None, "mode=export: new folder for the published layout. mode=prepare: folder for the records."
)
_SHARDS = flags.DEFINE_integer("shards", 16, "mode=prepare: files of each split; each must fit a worker's memory.")
_DTYPE = flags.DEFINE_enum(
  "dtype", None, ["float32", "bfloat16", "float16"], "mode=export: of the tensors (default: as in the checkpoint)."
)
_HTML = flags.DEFINE_string(
  "html", None, "mode=sample: also write the unmasking to this page. mode=plan: draw what --explain finds."
)
_COORDINATOR = flags.DEFINE_string(
  "coordinator", "", "HOST:PORT of process 0, where neither a TPU pod nor Slurm says it; with the next two."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", 0, "Processes of the job.")
_PROCESS_ID = flags.DEFINE_integer("process_id", -1, "Number of this one, from 0.")
_TOPOLOGY = flags.DEFINE_string("topology", "v5p:4x4x4", "mode=plan: what to plan for: TPUs, or GPUs as in h100:8.")
_SLICES = flags.DEFINE_integer(
  "slices", 1, "mode=plan: so many of that topology (slices, nodes), over the data-centre network."
)
_UTILISATION = flags.DEFINE_float("utilisation", 0.4, "mode=plan: of the peak FLOP/s, for the times.")
_EXPLAIN = flags.DEFINE_bool("explain", False, "mode=plan: estimate where the time of the step goes, too.")
_JSON = flags.DEFINE_bool("json", False, "mode=plan: print JSON.")
_ALLOW = flags.DEFINE_list(
  "allow", [], "mode=train: fields that may be other than the run in the workdir has had, as in optimizer.schedule."
)
_SYSTEM = flags.DEFINE_string("system", "", "mode=chat: the system prompt.")
_SERVE = [
  define(name, None, f"mode=serve: {what}.")
  for define, name, what in (
    (flags.DEFINE_integer, "port", "where it listens (default: 8000; 0: any that is free)"),
    (flags.DEFINE_string, "host", "the address that it listens at (default: 127.0.0.1, for this machine alone)"),
    (flags.DEFINE_string, "api_key_file", "file of the keys that requests need, one a line"),
    (flags.DEFINE_string, "cors", "origin of other pages that may ask, as http://localhost:3000"),
    (flags.DEFINE_integer, "rows", "texts that are generated at once (default: 8)"),
    (flags.DEFINE_integer, "queue", "texts that may wait (default: 64)"),
    (flags.DEFINE_float, "timeout", "seconds that an answer may take (default: 600)"),
    (flags.DEFINE_float, "drain_seconds", "seconds that answers may still take when it is to end (default: 30)"),
    (flags.DEFINE_integer, "max_body", "bytes of a request (default: 4 MiB)"),
    (flags.DEFINE_integer, "connections", "that may be open at once (default: 1024)"),
    (flags.DEFINE_bool, "warmup", "compile before the first request"),
    (flags.DEFINE_bool, "log_text", "write what is asked and answered into the log"),
  )
]


def main(argv: list[str]) -> int:
  """Checks what can be checked at once, and calls the mode; returns the exit code."""
  mode, given = _MODE.value, flags.FLAGS.config
  if argv[1:] and mode != "prepare":
    raise Mistake(f"unexpected argument {argv[1]!r}: what follows -- is for Beam, of --mode=prepare")
  if mode in ("train", "prepare", "plan") and given is None:
    raise Mistake("--config is missing: name a recipe or a file, as in --config=quickstart")
  if mode == "plan":
    return _plan(given)
  if mode == "show":
    return _show(given)
  target = address.mirror(_TARGET.value or "")
  of_import = ("import",)
  for flag in _SAID:
    if flag.value is not None and mode != "import":
      raise Mistake(f"--{flag.name}={flag.value}: only --mode=import is told so; leave it out")
  if mode != "serve" and (flag := next((x for x in _SERVE if x.value is not None), None)) is not None:
    raise Mistake(f"--{flag.name}={flag.value}: only --mode=serve has it; leave it out")
  if mode == "serve":
    _settings()
  for name, flag, modes in (("source", _SOURCE, of_import), ("target", _TARGET, ("export", "prepare"))):
    if mode in modes and not flag.value:
      raise Mistake(f"--{name} is missing: --mode={mode} needs it")
  if mode in ("export", "prepare") and "://" not in str(_TARGET.value):
    check_writable(target, "--target", is_folder=True, parents=True)
  if mode == "prepare":
    return _prepare(given, argv[1:])
  workdir = _workdir()
  if mode in ("train", "import", "evaluate"):
    check_writable(workdir, "--workdir", is_folder=True, parents=True)
  if mode not in ("train", "import"):
    _check_run(workdir)
  page = _page() if mode == "sample" else None

  distributed.initialize(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
  # Training knows what is to be saved, a conversation takes Ctrl-C for the end of a reply, and a server finishes first.
  with contextlib.nullcontext() if mode in ("train", "chat", "serve") else interrupts.Interrupt():
    _act(mode, given, workdir, target, page)
  return 0


def _act(mode: str, given: ConfigDict | None, workdir: Path, target: Path, page: Path | None) -> None:
  """Calls a mode that has a workdir."""
  from lladax import config  # the slow imports come after the quick checks
  from lladax.devices.sharding import MeshConfig
  from lladax.evaluation import evaluate
  from lladax.inference import chat, convert, show, verify
  from lladax.serving import serve
  from lladax.storage import published
  from lladax.training import trainer

  if mode == "verify":
    return verify.run(workdir, distributed.console())
  if mode == "export":
    convert.to_published(workdir, target, _DTYPE.value)
    return print(visible(f"lladax: {address.of(workdir)} is written to {address.of(target)}"), file=sys.stderr)
  if mode == "import":
    values = (given or configs.load("base")).to_dict()
    config.parse(values)
    convert.from_published(_SOURCE.value or "", workdir, values, published.Said(*(flag.value for flag in _SAID)))
    return print(visible(f"lladax: {_SOURCE.value} is read into {address.of(workdir)}"), file=sys.stderr)
  if given is not None:
    c = config.parse(given.to_dict())
  else:
    c = dataclasses.replace(config.load(workdir), mesh=MeshConfig())  # of the devices here, not there
  if mode == "train":
    trainer.train(c, workdir, _ALLOW.value)
  elif mode == "evaluate":
    evaluate.evaluate_last(c, workdir)
  elif mode == "chat":
    chat.run(c, workdir, _SYSTEM.value)
  elif mode == "serve":
    serve.run(c, workdir, _settings())
  else:
    if page:
      page.parent.mkdir(parents=True, exist_ok=True)
    show.show_samples(c, workdir, _PROMPT.value, page and str(page))


def _settings() -> "ServeConfig":
  from lladax.serving.settings import ServeConfig

  said: dict[str, Any] = {flag.name: flag.value for flag in _SERVE if flag.value is not None}
  return ServeConfig(**said)


def _prepare(given: ConfigDict, beam_options: list[str]) -> int:
  from lladax import config
  from lladax.data import prepare
  from lladax.training import setup

  c = config.parse(given.to_dict())
  with interrupts.Interrupt():
    text = setup.base_tokenizer(c) if c.init_from else c.tokenizer
    prepare.run(c.data, text, str(_TARGET.value), _SHARDS.value, beam_options)
  return 0


def _plan(given: ConfigDict) -> int:
  page = _page()
  if page and not _EXPLAIN.value:
    raise Mistake(f"--html={page}: in a plan it draws what --explain finds; add that")
  os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before a plugin without its driver complains
  import jax

  jax.config.update("jax_platforms", "cpu")  # the devices of a plan are not here, and those that are stay free
  from lladax import config
  from lladax.training import plan

  c = config.parse(given.to_dict())
  return plan.run(
    c, _TOPOLOGY.value, _SLICES.value, utilisation=_UTILISATION.value, as_json=_JSON.value, explain=_EXPLAIN.value,
    page=page,
  )  # fmt: skip


def _show(given: ConfigDict) -> int:
  from lladax import config

  console = Console(width=None if sys.stdout.isatty() else 120)
  console.print(config.table(config.parse(given.to_dict()), _setters))
  return 0


def _page() -> Path | None:
  """The file of --html, in a folder that can be written to."""
  if not _HTML.value:
    return None
  if address.is_address(_HTML.value):
    raise Mistake(f"--html={_HTML.value}: the page is written here: name a file")
  page = Path(os.path.expanduser(_HTML.value))
  check_writable(page, "--html", parents=True)
  return page


def _check_run(workdir: Path) -> None:
  if workdir.exists() and not workdir.is_dir():
    raise Mistake(f"--workdir={workdir}: it is a file, where a folder is needed")
  if not (workdir / "config.json").is_file():
    raise Missing(f"--workdir={workdir}: there is no run in it; train one first with --mode=train")


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


_setters: dict[str, str] = {}  # of the last `parse`: field -> "command line"; "" -> "recipe" or "workdir"
_LONGEST_NAME = 200  # characters; where absl looks for names like a wrong one it needs as many calls
_FIELD = re.compile(r"--?(?:no)?config\.([\w.]+)")


def _parse(argv: list[str]) -> list[str]:
  if {"-h", "-help", "--help"} & set(argv):
    ours = flags.FLAGS.module_help(flags.FLAGS.find_module_defining_flag("config")).partition(":\n")[2]
    print(f"{__doc__}\n\n{ours}\nEvery field, with its value and its meaning: lladax --config=quickstart --mode=show")
    raise SystemExit(0)
  at = argv.index("--") if "--" in argv else len(argv)
  if long := next((x for x in argv[:at] if x.startswith("-") and len(x.partition("=")[0]) > _LONGEST_NAME), ""):
    raise Mistake(f"{long[:40]}…: there is no option with a name of more than {_LONGEST_NAME} characters")
  flags.FLAGS.set_gnu_getopt(True)  # a value may stand behind a space
  overrides = flags.FlagValues()
  try:
    words = flags.FLAGS(argv[:at], known_only=True)  # the fields of the config are left
    fields = [x[1] for x in map(_FIELD.match, words) if x]
    _setters.clear()
    _setters.update(dict.fromkeys(fields, "command line") | {"": "workdir" if _CONFIG.value is None else "recipe"})
    config = _config(fields)
    if config is not None:
      known = dict(_fields(config))
      for name in fields:
        if name not in known:
          raise Mistake(f"config.{name}: there is no such field; did you mean config.{_nearest(name, known, 0.0)}?")
      last: dict[str, int] = {}
      for i, word in enumerate(words):  # the library takes a field of any type for a switch
        if (x := _FIELD.fullmatch(word)) and known[x[1]] in (object, tuple) and words[i + 1 :]:
          words[i : i + 2] = [f"{word}={words[i + 1]}"]
        if (x := _FIELD.match(word)) and known[x[1]] is tuple:
          last[x[1]] = i
      # ... and adds up the tuples of a field that is given twice.
      words = [word for i, word in enumerate(words) if not (x := _FIELD.match(word)) or last.get(x[1], i) == i]
      try:
        config_flags.DEFINE_config_dict("config", config, flag_values=overrides, sys_argv=words)
      except (ValueError, LookupError, TypeError) as error:  # of ml_collections: --config.steps]=7, --config.steps[]=7
        raise Mistake(" ".join(str(error.args[0]).split())) from error
    overrides.set_gnu_getopt(True)
    try:
      words = overrides(words)
    except ValueError as error:  # of ml_collections: a tuple that is not written as one
      raise Mistake(" ".join(str(error).split())) from error
  except flags.UnrecognizedFlagError as error:
    near = _nearest(error.flagname, flags.FLAGS, 0.6)
    raise Mistake(f"--{error.flagname}: there is no such option" + f"; did you mean --{near}?" * bool(near)) from error
  except flags.Error as error:
    raise Mistake(" ".join(str(error).split())) from error
  if words[1:]:
    raise Mistake(f"unexpected argument {words[1]!r}: options are written --name=value")
  flags.FLAGS.config = config
  return argv[at + 1 :]


def _config(fields: list[str]) -> ConfigDict | None:
  """The config that is named; where fields alone are, the one that they are fields of."""
  mode = _MODE.value
  if _CONFIG.value is not None:
    return configs.load(_CONFIG.value)
  if not fields and mode != "show":
    return None
  if mode in ("export", "verify"):
    raise Mistake(f"--config.{fields[0]}: --mode={mode} takes the run as it is, and no config")
  if mode == "import":
    return configs.load("base")
  if mode not in ("evaluate", "sample", "chat", "serve") and not (mode == "show" and _WORKDIR.value):
    raise Mistake("--config is missing: name a recipe or a file, as in --config=quickstart")
  workdir = _workdir()
  _check_run(workdir)
  from lladax import config

  values = dataclasses.asdict(config.load(workdir))
  if mode != "show":
    del values["mesh"]  # of the devices there, not here
  base = configs.load("base")  # its fields know what may be None
  with base.ignore_type():
    base.update(values)
  return base


def _workdir() -> Path:
  if not _WORKDIR.value:
    raise Mistake("--workdir is missing: name a folder for the run, as in --workdir=runs/quickstart")
  return address.mirror(_WORKDIR.value)


def _fields(config: ConfigDict, group: str = "") -> Iterator[tuple[str, type]]:
  """(name, type) of each."""
  for name, value in config.items():
    if isinstance(value, ConfigDict):
      yield from _fields(value, f"{group}{name}.")
    else:
      yield group + name, config.get_type(name)


def _nearest(name: str, known: Iterable[str], cutoff: float) -> str:
  return next(iter(difflib.get_close_matches(name, known, 1, cutoff)), "")


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
  interrupts.own()
  keep_freed_memory()
  app.run(lambda argv: guard(main, argv), flags_parser=parse)


if __name__ == "__main__":
  run()
