"""The one door: `python -m lladax.main --config=configs/quickstart.py --workdir=runs/quickstart [--mode=...]`."""

import contextlib
import ctypes
import dataclasses
import difflib
import importlib.util
import os
import sys
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

from lladax import distributed
from lladax.distributed import guard
from lladax.mistake import Missing, Mistake

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/; --config.steps=200 overrides a field.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: config, tokenizer, checkpoints, metrics.")
_MODE = flags.DEFINE_enum(
  "mode", "train", ["train", "prepare", "evaluate", "sample", "chat", "import", "export", "plan"], "What to do."
)
_PROMPT = flags.DEFINE_multi_string(
  "prompt", [], "mode=sample: text to continue, or text with [MASK]s to fill in; repeat for several (default: stdin)."
)
_SOURCE = flags.DEFINE_string(
  "source", None, "mode=import: folder in the published layout, or hf://OWNER/NAME[@REVISION]."
)
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
  """Reads the config, and calls the mode; returns the exit code."""
  if len(argv) > 1 and _MODE.value != "prepare":  # what follows -- there is for Beam
    raise Mistake(f"unexpected argument {argv[1]!r}: options are written --name=value")
  if _MODE.value in ("train", "prepare", "plan") and _CONFIG.value is None:
    raise Mistake("--config is missing: name a config, as in --config=configs/quickstart.py")
  if _MODE.value == "plan":
    return _plan()
  if _MODE.value == "prepare":
    return _prepare(argv[1:])
  if not _WORKDIR.value:
    raise Mistake("--workdir is missing: name a folder for the run, as in --workdir=runs/quickstart")
  workdir = Path(_WORKDIR.value).expanduser()
  source, target = _SOURCE.value or "", _TARGET.value or ""
  for mode, name, value in (("import", "source", source), ("export", "target", target)):
    if _MODE.value == mode and not value:
      raise Mistake(f"--{name} is missing: --mode={mode} needs it")
  if _MODE.value not in ("train", "import") and not (workdir / "config.json").is_file():
    raise Missing(f"--workdir={workdir}: there is no run in it; train one first with --mode=train")

  from lladax import chat, convert, train  # the slow imports come after the quick checks
  from lladax import config as configs
  from lladax.sharding import MeshConfig

  distributed.initialize(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
  if _MODE.value == "export":
    convert.to_published(workdir, Path(target).expanduser(), _DTYPE.value)
    return 0
  if _MODE.value == "import":
    from configs import base

    values = (_CONFIG.value or base.get_config()).to_dict()
    configs.parse(values)
    convert.from_published(source, workdir, values)
    return 0
  if _CONFIG.value is not None:
    config = configs.parse(_CONFIG.value.to_dict())
  else:
    config = dataclasses.replace(configs.load(workdir), mesh=MeshConfig())  # of the devices here, not there
  if _MODE.value == "train":
    train.train(config, workdir)
  elif _MODE.value == "evaluate":
    train.evaluate_last(config, workdir)
  elif _MODE.value == "chat":
    chat.run(config, workdir, _SYSTEM.value)
  else:
    train.show_samples(config, workdir, _PROMPT.value, _HTML.value)
  return 0


def _prepare(beam_options: list[str]) -> int:
  if not _TARGET.value:
    raise Mistake("--target is missing: name a folder for the records, as in --target=records/novels")
  from lladax import config as configs
  from lladax import prepare

  config = configs.parse(_CONFIG.value.to_dict())
  prepare.run(config.data, config.tokenizer, _TARGET.value, _SHARDS.value, beam_options)
  return 0


def _plan() -> int:
  import jax

  jax.config.update("jax_platforms", "cpu")  # the devices of a plan are not here, and those that are stay free
  from lladax import config as configs
  from lladax import plan

  config = configs.parse(_CONFIG.value.to_dict())
  return plan.run(config, _TOPOLOGY.value, _SLICES.value, utilisation=_UTILISATION.value, as_json=_JSON.value)


def parse(argv: list[str]) -> list[str]:
  """Flags; an unknown config field becomes one clear line. Without --config fields are those of the workdir."""
  if any(a.startswith("--config.") for a in argv) and not any(a.startswith("--config=") for a in argv):
    workdir = next((a.removeprefix("--workdir=") for a in argv if a.startswith("--workdir=")), "")
    if workdir and {"--mode=evaluate", "--mode=sample", "--mode=chat"} & set(argv):
      argv = [argv[0], f"--config=configs/workdir.py:{workdir}", *argv[1:]]
  try:
    rest = flags.FLAGS(argv)
    getattr(_CONFIG.value, "to_dict", None)  # a config file that is not there complains when it is asked
    return rest
  except flags.Error as error:  # of an error that a config file raises, the last line of its traceback
    raise SystemExit(_complain(str(error).strip().splitlines()[-1].removeprefix("ValueError: "))) from None
  except (AttributeError, KeyError) as error:
    unknown = [a.split("=")[0].removeprefix("--config.") for a in argv if a.startswith("--config.")]
    raise SystemExit(_complain(_nearest(unknown) or str(error))) from None
  except OSError as error:
    raise SystemExit(_complain(f"--config: {str(error).splitlines()[-1].strip()}")) from None


def _nearest(names: list[str]) -> str | None:
  """What to say of the first name that is no field of configs/base.py."""
  from configs import base

  known = []

  def collect(group, path):
    for name, value in group.items():
      collect(value, f"{path}{name}.") if hasattr(value, "items") else known.append(path + name)

  collect(base.get_config(), "")
  for name in names:
    if name not in known:
      near = difflib.get_close_matches(name, known, 1, 0.0)[0]
      return f"config.{name}: there is no such field; did you mean config.{near}?"
  return None


def _complain(message: str) -> int:
  print(f"lladax: {message}", file=sys.stderr)
  return 1


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
  if not distributed.has_tpu():
    distributed.hush_libtpu()
  keep_freed_memory()
  sys.path.insert(0, os.getcwd())  # configs import each other as `configs.NAME`, as they can under `python -m`
  app.run(lambda argv: guard(main, argv), flags_parser=parse)


if __name__ == "__main__":
  run()
