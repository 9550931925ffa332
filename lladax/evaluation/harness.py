"""Presets and tasks of EleutherAI's lm-evaluation-harness, asked one after the other, and their table."""

import contextlib
import difflib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lladax.data import corpus
from lladax.devices import distributed
from lladax.drawing import report
from lladax.evaluation.adapter import CHAT, Harness, fingerprint
from lladax.evaluation.kwargs import understood
from lladax.evaluation.presets import Preset, preset
from lladax.inference.llada import LLaDA
from lladax.mistake import Mistake
from lladax.storage.writing import check_writable, leniently

TASKS = Path(__file__).parent / "tasks"
DATA = "LLADAX_EVAL_DATA"  # the environment variable that names the folder of local benchmarks


def evaluate(
  llada: LLaDA, names: str | Sequence[str], *, data_dir: str = "", limit: int | None = None, batch_size: int = 8,
  allow_code: bool = False, use_cache: str | Path | None = None, output: str | Path | None = None,
  num_fewshot: int | None = None, chat: bool | None = None, **options,
) -> dict[str, dict[str, float]]:  # fmt: skip
  """Runs presets and tasks, one after the other.

  Args:
    llada: the model, with its tokenizer.
    names: of presets (`PRESETS`), of the tasks in evaluation/tasks, or of the harness's own.
    data_dir: the folder of the local benchmarks; "": what LLADAX_EVAL_DATA says. With one, lladax_TASK is run for
      TASK where it exists; without one the harness fetches its own data.
    limit: only so many questions of each task, for a trial.
    batch_size: prompts of a generation batch, at most.
    allow_code: generated code may be run (in `lladax.sandbox`); without it tasks that do are refused.
    use_cache: a folder for the answers; a run that stopped goes on at the batch where it did. Every model and setting
      has a file of its own there (see `Answers`).
    output: a name for the report of the results, some answers with them: a .json and a .html file, written anew after
      each name.
    num_fewshot: instead of the preset's or the task's.
    chat: prompts are conversations; None: what the preset says.
    **options: those of `Harness`, before the preset's.

  Returns:
    name (or name/TASK, for the parts of a group) -> {metric: value, metric_stderr: its standard error, "samples":
    questions, "published": a preset's number as a fraction, of the published weights}.

  Raises:
    Mistake: an unknown name or option, a missing data folder, a task that runs code without `allow_code`, or one that
      asks for what this model or sampler has not.
  """
  from lm_eval.evaluator import evaluate as run

  os.environ.setdefault("DISABLE_MULTIPROC", "1")  # of its standard errors: a process with JAX in it must not fork
  checked = check(names, data_dir=data_dir, allow_code=allow_code)
  if use_cache and jax.process_count() > 1:
    raise Mistake(f"use_cache={str(use_cache)!r}: processes of one job would read different caches; leave it out")
  if output:
    check_writable(Path(output).parent.expanduser(), "output", is_folder=True, parents=True)
  asked = models(llada, checked, options, batch_size)  # what one of them cannot is said before the first question
  results: dict[str, dict[str, float]] = {}
  told: dict[str, list[dict[str, Any]]] = {}
  for name, (plan, group, loaded) in checked.items():
    talks, lm = plan.chat if chat is None else chat, asked[name]
    with quiet():
      for task in loaded["tasks"].values():
        shots = plan.num_fewshot if num_fewshot is None else num_fewshot
        if task.get_config("num_fewshot") is None or (shots is not None and task.get_config("num_fewshot") != 0):
          task.set_config(key="num_fewshot", value=shots or 0)
        task.set_fewshot_seed(seed=1234)  # the harness's default
      if use_cache:
        lm.keep(Path(use_cache) / f"{fingerprint(lm)}.jsonl")
      found: Any = run(
        lm=lm, task_dict=loaded, limit=limit, log_samples=True, apply_chat_template=talks, fewshot_as_multiturn=talks,
        confirm_run_unsafe_code=allow_code, bootstrap_iters=1000,
      )  # fmt: skip
    assert found is not None
    results |= _numbers(name, group, found)
    if plan.published is not None and name in results:
      results[name]["published"] = plan.published / 100
    if output and distributed.is_first():
      settings = {"limit": limit, "batch_size": batch_size, "num_fewshot": num_fewshot, "chat": chat} | options
      told |= _told(name, group, found["samples"])
      about = {key: value for key, value in settings.items() if value is not None}
      with leniently(Path(output)):
        report.write(report.Report("lm-evaluation-harness", about, results, told), Path(output))
  return results


def check(
  names: str | Sequence[str], *, data_dir: str = "", allow_code: bool = False
) -> dict[str, tuple[Preset, str, Any]]:
  """Name -> (preset, task, the task with its questions); raises what `evaluate` raises of names and data."""
  names = [names] if isinstance(names, str) else list(names)
  plans = {name: preset(name) if "/" in name else Preset(name) for name in names}
  if not plans:
    raise Mistake("there is nothing to evaluate: the list of names is empty")
  manager, tasks = _find({name: plan.task for name, plan in plans.items()}, data_dir or os.environ.get(DATA, ""))
  if not allow_code:
    check_code(manager, tasks)
  found = {name: (plans[name], task, load_questions(manager, name, [task])) for name, task in tasks.items()}
  for name, (_, _, loaded) in found.items():
    check_parts(name, loaded)
  return found


def models(
  llada: LLaDA, checked: Mapping[str, tuple[Preset, str, Any]], options: Mapping[str, Any], batch_size: int = 1
) -> dict[str, Any]:
  """Name -> the model as the task asks it, of what `check` returned; raises what `evaluate` raises of model and task.

  The model needs no parameters yet.
  """
  found = {}
  for name, (plan, _, loaded) in checked.items():
    parts = loaded["tasks"].values()
    # A likelihood that is no choice between answers is asked for with "is it the greedy one?".
    defaults: dict[str, Any] = {"greedy": True} if any(task.OUTPUT_TYPE == "loglikelihood" for task in parts) else {}
    found[name] = Harness(llada=llada, batch_size=batch_size, **(defaults | dict(plan.options) | dict(options)))
    check_parts(name, loaded, found[name]._plan)
  return found


def check_code(manager: Any, tasks: Mapping[str, str]) -> None:
  """Raises Mistake if one of the tasks (by any names) runs generated code."""
  for name, task in tasks.items():
    if _runs_code(manager, task):
      how = "--config.evaluate.allow_code=True of a run, --allow_code of the other commands"
      raise Mistake(f"{name} runs generated code: allow it with allow_code=True ({how})")


def load_questions(manager: Any, name: str, tasks: list[Any]) -> Any:
  """The tasks with their questions."""
  try:
    with quiet():
      return manager.load(tasks)
  except Mistake:
    raise
  except OSError as error:  # of the hub, and of files
    why = (str(error) or type(error).__name__).splitlines()[0]
    which = ", ".join(map(str, tasks))
    raise Mistake(f"{name}: the questions of {which} could not be read ({why}); is there a network?") from None


def check_parts(name: str, loaded: Any, plan: Callable = understood, more: Mapping[str, Any] = {}) -> None:  # noqa: B006
  """Raises Mistake if a task asks for what cannot be done; `more` is added to its generation_kwargs."""
  for part, task in loaded["tasks"].items():
    where = part if name in ("", part) else f"{name}: {part}"
    if getattr(task, "MULTIMODAL", False):
      raise Mistake(f"{where}: its questions are not of text alone, which a LLaDA does not read")
    if task.OUTPUT_TYPE == "generate_until":
      try:
        plan({**(task.get_config("generation_kwargs") or {}), **more})
      except Mistake as error:
        raise Mistake(f"{where}: {error}") from None


def _find(wanted: Mapping[str, str], data_dir: str) -> tuple[Any, dict[str, str]]:
  """The harness's task manager, and name -> task. Its own thousands of tasks are read only where they are needed."""
  from lm_eval.tasks import TaskManager

  options = {"include_path": str(TASKS), "metadata": {"data_dir": data_dir} if data_dir else {}}
  manager = TaskManager(include_defaults=False, **options)
  local = set(manager.all_tasks)
  tasks = {name: f"lladax_{task}" if data_dir and f"lladax_{task}" in local else task for name, task in wanted.items()}
  if any(task not in local and not task.startswith("lladax_") for task in tasks.values()):
    manager = TaskManager(**options)
  for task in tasks.values():
    if task not in manager.all_tasks:
      raise unknown_task(
        manager, task, " (its local form needs data_dir)" * (f"lladax_{task}" in local and not data_dir)
      )
  return manager, tasks


def unknown_task(manager: Any, task: str, hint: str = "") -> Mistake:
  """What to say of a task that nobody knows, with the nearest that somebody does."""
  near = difflib.get_close_matches(task, manager.all_tasks, 1, 0.0)[0]
  return Mistake(f"task {task!r}: there is no such task{hint}; did you mean {near}?")


def _runs_code(manager: Any, task: str) -> bool:
  entry = manager.task_index[task]
  config = entry.cfg or {}
  parts = config.get("task")
  parts = parts if isinstance(parts, list) else [] if config else entry.tags  # of a group, of a tag
  names = [part if isinstance(part, str) else part.get("task", "") for part in parts]
  known = (name for name in names if name in manager.task_index and name != task)
  return bool(config.get("unsafe_code")) or any(_runs_code(manager, name) for name in known)


def _numbers(name: str, task: str, found: Mapping[str, Any]) -> dict[str, dict[str, float]]:
  """The harness's results without the filter's name where there is but one."""
  rows, asked = found["results"] | found.get("groups", {}), found["n-samples"]
  numbers = {}
  for row in sorted(rows, key=lambda row: row != task):  # a group's mean, then its parts
    values = rows[row]
    metrics = {key: value for key, value in values.items() if "," in key and isinstance(value, float | int)}
    several = len({key.split(",")[1] for key in metrics}) > 1
    short = {}
    for key, value in metrics.items():
      metric, filter = key.split(",")
      metric, error = metric.removesuffix("_stderr"), "_stderr" * metric.endswith("_stderr")
      short[f"{metric}/{filter}{error}" if several else metric + error] = value
    of = [asked[row]] if row in asked else asked.values() if row == task else []
    if of:
      short["samples"] = sum(x["effective"] for x in of)
    numbers[name if row == task else f"{name}/{row.rpartition('::')[2]}"] = short
  return numbers


def _told(name: str, task: str, samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
  """Of each part some questions with the answers to them, for the report."""
  told = {}
  for part, of in samples.items():
    rows = []
    for x in [x for x in of if x["filter"] == of[0]["filter"]][: report.SHOWN]:
      context, replies = x["arguments"][0][0], [reply[0] if isinstance(reply, list) else reply for reply in x["resps"]]
      answer, guess, hit = x["target"], replies[0], x[x["metrics"][0]]
      if len(replies) > 1:  # a choice: (log-likelihood, greedy) of each
        choices = [str(arguments[1]).strip() for arguments in x["arguments"]]
        guess = choices[int(np.argmax([nats for nats, _ in replies]))]
        answer = choices[answer] if isinstance(answer, int) and answer < len(choices) else answer
      elif not isinstance(guess, str):
        guess = f"{guess[0]:.2f} nats" if isinstance(guess, tuple) else guess
      if context.startswith(CHAT):
        context = corpus.said(json.loads(context.removeprefix(CHAT))[0])
      rows.append({"question": context, "answer": answer, "guess": guess, "hit": bool(hit)})
    told[name if part == task else f"{name}/{part.rpartition('::')[2]}"] = rows
  return told


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """The harness warns of every local task that it has a function for its data: once is too often."""
  logger, drop = logging.getLogger("lm_eval.api.task"), lambda x: "Custom kwargs can be passed" not in x.getMessage()
  logger.addFilter(drop)
  try:
    yield
  finally:
    logger.removeFilter(drop)
