"""What the end of a run is judged by, beside the bound of held_out.py, and how all of it is told.

samples  the config's canvases, filled
task     the reversal test, on facts or on couplets
tasks    what else `evaluate.tasks` names goes to the lm-evaluation-harness
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from rich.table import Column, Table
from rich.text import Text

from lladax import address
from lladax.config import Config
from lladax.data import sources
from lladax.data.tokenizer import Tokenizer
from lladax.devices import distributed, sharding
from lladax.drawing import report as reports
from lladax.drawing import unmasking
from lladax.evaluation import held_out, reversal
from lladax.inference import load, show
from lladax.inference.llada import LLaDA, Sampled
from lladax.mistake import Mistake
from lladax.storage import checkpoint, metrics
from lladax.storage.writing import leniently
from lladax.terminal import Console


def samples(llada: LLaDA, config: Config) -> Sampled | None:
  """The config's canvases filled, each between two EOS, as documents stand in the training text; None without any.

  The canvases are filled with the sampler's settings, in one block. A causal model continues what stands before the
  first [MASK]. After training on conversations (data.format=chat) the canvases are what the user says.
  """
  canvases = config.evaluate.canvases
  if not canvases or llada.tokenizer is None:
    return None
  options = dataclasses.asdict(config.sample)
  if config.data.format == "chat":
    options["early_stop"] = True
    return llada.sample([[_says(text)] for text in canvases], **options)
  if not llada.model.objective.fills:
    return llada.sample([_before_masks(text) for text in canvases], **options)
  del options["block_length"], options["gen_length"]  # a canvas has a length of its own
  rows = [[llada.eos_id, *llada.tokenizer.encode_canvas(text), llada.eos_id] for text in canvases]
  return llada.unmask(rows, **options)


def _says(text: str) -> dict[str, str]:
  return {"role": "user", "content": text}


def _before_masks(text: str) -> str:
  return text.partition("[MASK]")[0]


def task(llada: LLaDA, config: Config, name: str) -> tuple[dict[str, float], list[dict[str, Any]]]:
  """(metrics, what was asked and answered) of a reversal test.

  On facts, "reversal"; on couplets, "poems:FILE"; on couplets in a conversation, "poems_chat:FILE".

  Raises:
    Mistake, Missing: there is no such task, or its file is not there.
  """
  questions = _questions(name)
  if questions is None:
    raise Mistake(f"evaluate.tasks: {name!r} is no reversal test: use reversal, poems:FILE, or poems_chat:FILE")
  return reversal.run(llada, questions, config.evaluate.batch_size)


def short_names(names: Sequence[str]) -> dict[str, str]:
  """Tasks without their files, unless two would be the same: poems:data/couplets.json -> poems (or poems:couplets)."""
  parts = [name.partition(":") for name in names]
  kinds = [kind for kind, _, _ in parts]
  return {
    "".join(part): f"{part[0]}:{Path(part[2]).name.partition('.')[0]}" if kinds.count(part[0]) > 1 else part[0]
    for part in parts
  }


def check_tasks(config: Config) -> dict[str, Any]:
  """lm-eval's among `evaluate.tasks`, read; Mistake or Missing if one of all cannot be asked, before long work."""
  others = [name for name in config.evaluate.tasks if _questions(name) is None]
  if not others:
    return {}
  from lladax.evaluation import harness  # an extra, and slow to import

  return harness.check(others, data_dir=config.evaluate.data_dir, allow_code=config.evaluate.allow_code)


# What an evaluation writes into a workdir.
FILES = ("evaluations.jsonl", "evaluation.json", "evaluation.html", "samples.html")


def check(config: Config, text: Tokenizer, others: Mapping[str, Any]) -> None:
  """Tries what only the end of a run would read, before its first step; the corpora, if they are not yet read.

  Args:
    config: of the run, with the model as it will be.
    text: its tokenizer.
    others: what `check_tasks` returned.

  Raises:
    Mistake: canvases or questions of `evaluate.tasks` that do not fit the model, or contradict the sampler's settings;
      nothing in the held-out part that fits a row.
  """
  talks, fills = config.data.format == "chat", config.data.format != "chat" and config.aim.fills
  lengths = {}
  for i, x in enumerate(config.evaluate.canvases):
    ids = text.chat([_says(x)]) if talks else text.encode_canvas(x) if fills else text.encode(_before_masks(x))
    lengths[f"evaluate.canvases[{i}]"] = len(ids) + 2 * fills  # an EOS at each end
  show.check_room(lengths, config.sample, config.model, fills=fills)
  for name in config.evaluate.tasks:
    if questions := _questions(name):
      reversal.check(name, questions, text, config.model)
  if others:
    from lladax.evaluation import harness

    llada = LLaDA(config.model, {}, text, text.mask_id, text.eos_id, text.vocab_size, text.eot_id)  # asked nothing yet
    for part, options in _with_options(list(others), config):
      harness.models(llada, {name: others[name] for name in part}, options)
  if config.data.held_out:
    sources.held_out(config.data, text)


def _questions(name: str) -> list[reversal.Question] | None:
  """What a task asks; None: the harness knows."""
  kind, _, path = name.partition(":")
  if kind in ("poems", "poems_chat") and path:
    return reversal.of_couplets(path, talks=kind == "poems_chat")
  return reversal.of_facts() if name == "reversal" else None


def _by_harness(
  llada: LLaDA, config: Config, names: list[str], workdir: Path
) -> tuple[dict[str, dict[str, float]], dict[str, list[dict[str, Any]]]]:
  """(metrics, some answers) of lm-eval's tasks. The report holds them from the first task on.

  Presets are as published; other tasks take the fields of `config.sample` that are not the defaults.
  """
  from lladax.evaluation import harness

  c, alone = config.evaluate, jax.process_count() == 1  # several processes would not agree on what is in the cache
  path = workdir / "evaluation"
  found, told = {}, {}
  for part, options in _with_options(names, config):
    found |= harness.evaluate(
      llada, part, data_dir=c.data_dir, limit=c.limit or None, batch_size=c.batch_size, allow_code=c.allow_code,
      use_cache=workdir / "harness" if alone else None, output=path, **options,
    )  # fmt: skip
    if distributed.is_first():
      with leniently(path):
        told |= json.loads(Path(f"{path}.json").read_text(encoding="utf-8"))["told"]
  return found, told


def _with_options(names: Sequence[str], config: Config) -> Iterator[tuple[list[str], dict[str, Any]]]:
  """Presets, and the other tasks, each with how the sampler is set for them."""
  from lladax.evaluation.presets import PRESETS

  presets, others = ([name for name in names if (name in PRESETS) == known] for known in (True, False))
  for part, options in ((presets, {}), (others, _chosen(config))):
    if part:
      yield part, options


def _chosen(config: Config) -> dict[str, Any]:
  """The fields of the sampler that are not the defaults."""
  fields = dataclasses.fields(config.sample)
  return {x.name: value for x in fields if (value := getattr(config.sample, x.name)) != x.default}


def report(llada: LLaDA, config: Config, bounds: dict[str, float], workdir: Path, console: Console) -> dict[str, float]:
  """Runs the tasks and fills the canvases; shows everything, and writes it.

  Args:
    llada: the model.
    config: of the run.
    bounds: what `held_out.bound` found, or {}.
    workdir: gets a line in evaluations.jsonl, evaluation.json, evaluation.html and samples.html.
    console: for the tables.

  Returns:
    `bounds`, and "TASK METRIC" -> value of all tasks.
  """
  own = [name for name in config.evaluate.tasks if _questions(name) is not None]
  others = [name for name in config.evaluate.tasks if name not in own]
  found, told = {}, {}
  if others:
    found, told = _by_harness(llada, config, others, workdir)
  for name in own:
    found[name], told[name] = task(llada, config, name)
  short = short_names(list(found))
  results = bounds | {f"{short[name]} {x}": value for name, values in found.items() for x, value in values.items()}
  if not distributed.is_first():
    samples(llada, config)
    return results
  _show(llada, config, bounds, found, told, console)
  step = (checkpoint.steps(workdir) or [0])[-1]
  if results:
    with leniently(workdir / "evaluations.jsonl"):
      metrics.append(workdir / "evaluations.jsonl", {"step": step} | results)
    shown = {name: _some(answers) for name, answers in told.items()}
    about = {"model": f"{llada.model.num_params():,} parameters, {config.objective}", "step": f"{step:,}",
             "data": ", ".join(config.data.corpora), "device": jax.devices()[0].device_kind,
             "versions": f"lladax {_version()}, jax {jax.__version__}"}  # fmt: skip
    if others:
      limit = f"{config.evaluate.limit} questions of each" if config.evaluate.limit else "all questions"
      about |= {
        "tasks": limit,
        "sampler": ", ".join(f"{x}={value}" for x, value in _chosen(config).items()) or "default",
      }
    title, judged = f"{workdir.name}, step {step:,}", "replies" if config.data.format == "chat" else "text"
    losses = metrics.losses(workdir)
    with leniently(workdir / "evaluation.html"):
      reports.write(reports.Report(title, about, found, shown, bounds, judged, losses), workdir / "evaluation")
      console.print(f"the same as a page, with the loss: {address.of(workdir / 'evaluation.html')}")
  if filled := samples(llada, config):
    for row in filled.unmaskings():
      console.print(unmasking.terminal(row, frames=4))
    page = filled.html(f"{workdir.name}, step {step}")
    with leniently(workdir / "samples.html"):
      (workdir / "samples.html").write_text(page, encoding="utf-8", errors="backslashreplace")
      console.print(f"the same as a page: {address.of(workdir / 'samples.html')}")
  return results


def _version() -> str:
  try:
    return metadata.version("lladax")
  except metadata.PackageNotFoundError:  # run from a checkout
    return "(not installed)"


def _some(told: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """As many answers as a page shows, of every direction of the reversal test."""
  directions = list(dict.fromkeys(x.get("direction") for x in told))
  each = -(-reports.SHOWN // len(directions)) if directions else 0
  return [x for d in directions for x in [y for y in told if y.get("direction") == d][:each]]


def _show(
  llada: LLaDA, config: Config, bounds: dict[str, float], found: dict[str, dict[str, float]],
  told: dict[str, list[dict[str, Any]]], console: Console,
) -> None:  # fmt: skip
  """Tables: tasks, and the bound beside its yardsticks."""
  if found:
    own = {name: {x["direction"]: x for x in reversed(told.get(name, ())) if "direction" in x} for name in found}
    titles = ["task", "metric", "value", *["for instance"] * any(own.values())]
    table = Table(*(Column(title, overflow="fold") for title in titles))
    for name, values in found.items():
      for metric, value in reports.metrics(values).items():
        x = own[name].get(metric)
        example = [f"{x['question']} → {x['guess']} ({x['answer']})"] if x else []
        table.add_row(name, metric, Text(reports.number(metric, value, values), "bold"), *example)
    console.print(table)
  if bounds:
    columns = "held-out replies" if config.data.format == "chat" else "held-out text", "bits per byte", "perplexity"
    table = Table(*columns)
    name = "exact" if llada.model.objective.exact else "bound"
    bits, perplexity = (
      Text.assemble((f"{bounds[x]:.{places}f}", "bold"), f" ± {bounds[f'{x}_stderr']:.{places}f}")
      for x, places in (("bits_per_byte", 3), ("perplexity", 2))
    )
    table.add_row(f"lladax ({name})", bits, perplexity)
    for name, label in reports.YARDSTICKS.items():
      if name in bounds:
        table.add_row(label, f"{bounds[name]:.3f}")
    console.print(table)


def evaluate_last(config: Config, workdir: Path) -> dict[str, float]:
  """Evaluates the workdir's last checkpoint as at the end of training, and adds a line to evaluations.jsonl."""
  checkpoint.check_workdir(workdir, FILES)
  if not (config.data.held_out or config.evaluate.tasks or config.evaluate.canvases):
    raise Mistake(
      "there is nothing to evaluate: data.held_out=0.0, evaluate.tasks=(), evaluate.canvases=(): give one of them, as"
      " in --config.data.held_out=0.05"
    )
  others = check_tasks(config)
  model, text = load.saved_model(workdir)
  if text is None:
    raise Mistake(f"--workdir={workdir}: this model has no tokenizer to read the held-out text and the tasks with")
  asked = load.asked(config.model)
  config = show.of_model(config, model, workdir)
  check(config, text, others)
  llada = load.load(workdir, mesh=sharding.make_mesh(config.mesh), **asked)
  config = dataclasses.replace(config, model=llada.model)  # adapters are merged
  bounds = held_out.bound(llada, config) if config.data.held_out else {}
  try:
    return report(llada, config, bounds, workdir, distributed.console())
  finally:
    if distributed.is_first():
      address.push(workdir)
