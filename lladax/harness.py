"""The lm-evaluation-harness's own command line, with lladax known to it: `python -m lladax.harness --tasks ...`.

lm-eval 0.4.13 looks for no plugins, so its own `lm_eval` finds neither the model nor the tasks of evaluation/tasks.
"""

import argparse
import contextlib
import difflib
import glob
import inspect
import io
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from lladax.devices import distributed
from lladax.evaluation import harness
from lladax.evaluation.adapter import Harness
from lladax.evaluation.kwargs import split_options, understood
from lladax.mistake import Missing, Mistake
from lladax.storage.writing import check_writable

_HELP = """lladax adds to the command line of lm-eval below:
  --model lladax  the default; --model_args path=WORKDIR and the options of evaluation/adapter.py (mc_num, cfg,
                  gen_length, block_length, steps, ...; tensor, fsdp, ... for a mesh), with commas between them
  --data_dir DIR  the folder of local benchmarks, for the tasks lladax_...
  --allow_code    generated code may be run, in a sandbox
"""


def main(argv: list[str]) -> None:
  """The harness's command line with `--model lladax` as the default, and `--data_dir DIR` and `--allow_code`."""
  from lm_eval import tasks
  from lm_eval._cli import HarnessCLI
  from lm_eval.api import model
  from lm_eval.utils import setup_logging

  if {"-h", "--help"} & set(argv):
    print(_HELP)
  ours = argparse.ArgumentParser(prog="lladax.harness", add_help=False, allow_abbrev=False)
  ours.add_argument("--data_dir")
  ours.add_argument("--allow_code", action="store_true")
  own, given = ours.parse_known_args(argv[1:])
  if own.data_dir is not None:
    if not Path(own.data_dir).expanduser().is_dir():
      raise Missing(f"--data_dir {own.data_dir}: there is no such folder; give that of the local benchmarks")
  if given and given[0] not in ("run", "ls", "validate"):
    given.insert(0, "run")
  given += ["--confirm_run_unsafe_code"] * own.allow_code
  environment = {} if own.data_dir is None else {harness.DATA: own.data_dir}
  with contextlib.ExitStack() as for_this_run:  # the harness is afterwards as it was
    put = for_this_run.enter_context
    put(mock.patch.object(sys, "argv", [argv[0], *given]))
    put(mock.patch.dict(os.environ, environment))
    put(harness.quiet())
    setup_logging()
    args = HarnessCLI().parse_args()
    if given:
      args.include_path = args.include_path or str(harness.TASKS)
    if args.command == "run":
      manager = _check_run(args)
      put(mock.patch.object(tasks, "TaskManager", lambda **_: manager))
      put(mock.patch.object(model, "CachingLM", _kept))
    args.func(args)


def _check_run(args: argparse.Namespace) -> Any:
  """Says what is wrong with a run before there is a model.

  Returns:
    The task manager for the run: what it gives are the tasks that have been loaded here, read once.
  """
  import lm_eval.models  # noqa: F401  fills the registry
  from lm_eval import tasks
  from lm_eval.api.registry import MODEL_REGISTRY
  from lm_eval.config.evaluate_config import EvaluatorConfig

  try:  # these look at the command line and its file, and at nothing else
    said = EvaluatorConfig.load_yaml_config(args.config) if args.config else {}
    args.model = args.model or said.get("model", "lladax")
    with contextlib.redirect_stdout(io.StringIO()):  # the run itself will show it
      c = EvaluatorConfig.from_cli(args)
  except (ValueError, TypeError, OSError) as error:
    raise Mistake(" ".join(str(error).split())) from None
  if c.model not in MODEL_REGISTRY:
    near = difflib.get_close_matches(c.model, list(MODEL_REGISTRY), 1, 0.0)[0]
    raise Mistake(f"--model {c.model}: there is no such model; did you mean {near}?")
  if c.model == "lladax":
    split_options({name: x for name, x in c.model_args.items() if name not in inspect.signature(Harness).parameters})
  elif c.use_cache:
    raise Mistake(
      f"--use_cache {c.use_cache}: answers of other models than lladax would be kept as pickles; leave it out"
    )
  if c.output_path:
    path = Path(c.output_path)
    folder = (path.parent if path.suffix == ".json" else path).expanduser()
    check_writable(folder, "--output_path", is_folder=True, parents=True)
  if not Path(c.include_path or harness.TASKS).is_dir():
    raise Missing(f"--include_path {c.include_path}: there is no such folder")

  names = c.tasks.split(",") if isinstance(c.tasks, str) else [x for task in c.tasks for x in task.split(",")]
  if not names:
    raise Mistake("--tasks is missing: name some, as in --tasks lladax_gsm8k,lladax_mmlu")
  for name in names:
    if name.endswith(".yaml") and not glob.glob(name):
      raise Missing(f"--tasks {name}: there is no such file")
  paths = dict.fromkeys([str(harness.TASKS), c.include_path or str(harness.TASKS)])
  options = {"include_path": list(paths), "metadata": c.metadata}
  manager = tasks.TaskManager(include_defaults=False, **options)
  if any(name not in manager.all_tasks and not name.startswith("lladax_") for name in names):
    manager = tasks.TaskManager(**options)
  for name in names:
    if not (name.endswith(".yaml") or manager.match_tasks([name]) or Path(name).is_dir()):
      raise harness.unknown_task(manager, name)
  if not c.confirm_run_unsafe_code:
    harness.check_code(manager, {name: name for name in manager.match_tasks(names)})
  with mock.patch.object(tasks, "TaskManager", lambda **_: manager):  # its thousands of files are read once
    c.process_tasks(c.metadata)  # reads task files that are named by their paths
  loaded = harness.load_questions(manager, "--tasks", list(c.tasks))
  harness.check_parts("", loaded, understood, c.gen_kwargs)
  manager.load = lambda task_list: loaded
  return manager


def _kept(lm: Any, path: str) -> Any:
  """In the place of the harness's own cache of answers, a pickle named PATH_rank0.db."""
  lm.keep(Path(path).with_suffix(".jsonl"))
  return lm


if __name__ == "__main__":
  sys.exit(distributed.guard(main, sys.argv, "lladax.harness"))
