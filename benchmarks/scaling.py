"""The scaling study: held-out loss against training FLOPs, of masked diffusion and of the autoregressive baseline.

  python benchmarks/scaling.py --config=configs/stdlib.py --workdir=runs/scaling \
    --sizes=64x2,96x3,128x4,192x5 --budgets=1e12,3e12,1e13 [--config.FIELD=VALUE ...]

Both families are trained on every (size, budget): the same tokenizer, batches, order and number of tokens. After
SMDM (arXiv 2410.18514), where diffusion needs about 16 times the compute, and LLaDA (arXiv 2502.09992, Fig. 3).

- A size is DxN: width and layers. F = 3 D; heads of width 32, from D=512 on of 64, from D=2048 on of 128.
- A budget is in training FLOPs by `train.flops_per_token`, 6 N + 12 L d T a token, where N counts the head and not the
  embedding, and attention counts in full in both families. So FLOPs are the same where tokens are; that a causal
  kernel, or a head on the masked half alone, computes less is not counted. Steps = budget / FLOPs of a batch.
- The learning rates of the config's schedule are multiplied by sqrt(config.model.D / D), for both families: halfway
  between none and the 1 / D of muP (arXiv 2203.03466), because the embedding shares the rate. Pieces are fractions.
- Fit: a budget's optimum is the minimum of a parabola, loss over log N, through the best size and its two neighbours
  (IsoFLOP, arXiv 2203.15556; a parabola holds near the minimum only); where the best is at an end, that size. Then
  L = a C^-b through the optima, by least squares in log-log. Standard errors are those of the linear regression, and
  need three budgets.

Each run has a workdir of its own under --workdir, and is one of `lladax.main`: interrupt the study, and the same
command goes on; give it more sizes or budgets, and it trains those alone. Results: scaling.png, .svg, .json, .md.
"""

import dataclasses
import importlib.util
import json
import math
import re
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import app, flags

from lladax import config as configs
from lladax import main as door
from lladax.data import sources, tokenizer
from lladax.devices import distributed, sharding
from lladax.mistake import Missing, Mistake
from lladax.storage import metrics
from lladax.training import step, trainer

flags.DEFINE_list("sizes", None, "Sizes, width x layers each: 64x2,96x3,128x4.")
flags.DEFINE_list("budgets", None, "Training FLOPs of a run: 1e12,3e12,1e13.")
flags.DEFINE_integer("min_steps", 30, "Runs of fewer steps are left out.")
# Up to about four passes over a text are nearly as good as new text (arXiv 2305.16264).
flags.DEFINE_float("max_epochs", 4.0, "Runs that would see the text more often are left out.")
flags.DEFINE_bool("report_only", False, "Train nothing: draw the finished runs of --workdir again.")

FAMILIES = {"diffusion": "diffusion (bound)", "autoregressive": "autoregressive (exact)"}
LOOKS = {"diffusion": ("#0072B2", "o", "-"), "autoregressive": ("#D55E00", "s", "--")}  # Okabe and Ito's blue and red


class Planned(NamedTuple):
  """A run to be trained."""

  name: str  # of its folder
  config: configs.Config
  flops: float


def parse_size(text: str) -> tuple[int, int]:
  """Width and layers: 64x2 -> (64, 2)."""
  width, x, layers = text.strip().partition("x")
  if not (x and width.isdecimal() and layers.isdecimal() and int(width) and int(layers)):
    raise Mistake(f"--sizes: {text!r} is no size: write width x layers, as in 64x2")
  if int(width) % head_width(int(width)):
    raise Mistake(f"--sizes: {text!r}: the width must be a multiple of {head_width(int(width))}, its head width")
  return int(width), int(layers)


def head_width(width: int) -> int:
  """K of a model width D."""
  return 32 if width < 512 else 64 if width < 2048 else 128


def parse_budget(text: str) -> float:
  """FLOPs, to six digits."""
  try:
    budget = float(text)
  except ValueError:
    budget = math.nan
  if not 0 < budget < math.inf:
    raise Mistake(f"--budgets: {text!r} is no number of FLOPs: write it as in 3e12")
  return float(f"{budget:g}")  # as the name of the folder has it


def short(budget: float) -> str:
  """3e12, not 3e+12."""
  return re.sub(r"e\+0*", "e", f"{budget:g}")


def sized(base: configs.Config, size: tuple[int, int]) -> configs.Config:
  """The config of a run of this size."""
  (D, N), K = size, head_width(size[0])
  scale = math.sqrt(base.model.D / D)
  schedule = tuple((length, rate * scale) for length, rate in base.optimizer.schedule)
  return dataclasses.replace(
    base, model=dataclasses.replace(base.model, D=D, N=N, H=D // K, G=D // K, K=K, F=3 * D),
    optimizer=dataclasses.replace(base.optimizer, schedule=schedule),
    evaluate=dataclasses.replace(base.evaluate, every=0, canvases=()),  # only the end counts
  )  # fmt: skip


def plan(
  base: configs.Config, sizes: list[str], budgets: list[str], corpus_tokens: int, *, min_steps: int, max_epochs: float
) -> tuple[list[Planned], list[str]]:
  """(runs, the cheapest first; which combinations are left out).

  Raises:
    Mistake: a malformed size or budget, or nothing is left of a budget.
  """
  runs, left_out = [], []
  grid = sorted({parse_size(x) for x in sizes})
  for budget in sorted({parse_budget(x) for x in budgets}):
    before, unfit = len(runs), []
    for size in grid:
      c = sized(base, size)
      tokens = c.data.batch_size * c.data.length  # of a step
      steps = round(budget / (step.flops_per_token(c) * tokens))
      name = f"{size[0]}x{size[1]}_{short(budget)}"
      if steps < min_steps or steps * tokens > max_epochs * corpus_tokens:
        unfit.append(f"{name}: {steps:,} steps, {steps * tokens / corpus_tokens:.2g} times the text")
        continue
      for objective in FAMILIES:
        own = dataclasses.replace(c, objective=objective, steps=steps)
        runs.append(Planned(f"{objective}_{name}", own, step.flops_per_token(own) * tokens * steps))
    if len(runs) == before:
      raise Mistake(
        f"--budgets: no size suits {short(budget)} FLOPs, with --min_steps={min_steps} and --max_epochs={max_epochs:g}"
        f" ({'; '.join(unfit)})"
      )
    left_out += unfit
  return runs, left_out


def begin(base: configs.Config, workdir: Path) -> tuple[configs.Config, int]:
  """(the config with the tokenizer that all runs share, tokens of the training text); WORKDIR/study.json."""
  if not base.data.held_out:
    raise Mistake("data.held_out=0.0: there is no held-out text to measure the loss on")
  if base.init_from:
    raise Mistake(f"init_from={base.init_from!r}: the runs of a scaling study begin from nothing")
  if any(length != -1 and not 0 <= length < 1 for length, _ in base.optimizer.schedule):
    raise Mistake(f"optimizer.schedule={base.optimizer.schedule}: runs differ in length, give fractions of all steps")
  path, folder = workdir / "study.json", workdir / "tokenizer"
  saved = json.loads(path.read_text()) if path.exists() else None
  distributed.agree(study=json.dumps(saved))  # and nobody looks while the first process writes
  plain = json.loads(json.dumps(dataclasses.asdict(base)))
  if saved:
    configs.check_saved(saved["config"], plain, workdir)
  text = tokenizer.load(folder) if saved else sources.prepared_tokenizer(base.data)
  text = text or tokenizer.create(base.tokenizer, sources.texts(base.data)[0])
  tokens = saved["corpus_tokens"] if saved else sum(map(len, sources.training(base.data, text, 0))) * base.data.length
  if distributed.is_first() and not saved:
    text.save(folder)
    path.write_text(json.dumps({"corpus_tokens": tokens, "config": plain}, indent=2) + "\n")
  distributed.agree(tokenizer=text.fingerprint)
  c = dataclasses.replace(base, model=dataclasses.replace(base.model, V=base.model.V or text.rows))
  if c.tokenizer.kind == "sentencepiece" and not c.tokenizer.path and not sources.prepared_tokenizer(c.data):
    model = dataclasses.replace(
      c.tokenizer, path=str(folder.absolute() / "sp.model")
    )  # trained once, and not in every run
    c = dataclasses.replace(c, tokenizer=model)
  return c, tokens


def finished(folder: Path) -> dict[str, float] | None:
  """The last evaluation of a run that has made all its steps."""
  if not (folder / "config.json").exists() or not (folder / "evaluations.jsonl").exists():
    return None
  last = (metrics.read(folder / "evaluations.jsonl") or [{"step": -1}])[-1]
  return last if last["step"] == json.loads((folder / "config.json").read_text())["steps"] else None


def study(
  base: configs.Config, workdir: Path, sizes: list[str], budgets: list[str], *, min_steps: int = 30,
  max_epochs: float = 4.0,
) -> None:  # fmt: skip
  """Trains what is not finished yet.

  Raises:
    Mistake, Missing: bad input, before any training.
  """
  for read_one, texts in ((parse_size, sizes), (parse_budget, budgets)):  # before any reading of text
    for x in texts:
      read_one(x)
  workdir.mkdir(parents=True, exist_ok=True)
  base, corpus_tokens = begin(base, workdir)
  runs, left_out = plan(base, sizes, budgets, corpus_tokens, min_steps=min_steps, max_epochs=max_epochs)
  for name, c, _ in runs:
    step.check_mesh(c, sharding.make_mesh(c.mesh))
    path = workdir / name / "config.json"
    if path.exists() and (steps := json.loads(path.read_text())["steps"]) != c.steps:
      raise Mistake(f"{path.parent} holds a run of {steps} steps, not {c.steps}: use another workdir")
  todo = [run for run in runs if not finished(workdir / run.name)]
  distributed.agree(todo=str([run.name for run in todo]))
  say(f"{len(runs)} runs, {len(runs) - len(todo)} of them finished, {sum(x.flops for x in todo):.2g} FLOPs to go")
  for line in left_out:
    say(f"left out: {line}")
  seen: list[tuple[float, float]] = []
  for i, (name, c, flops) in enumerate(todo):
    left = f"; about {metrics.clock(time_left(seen, [x.flops for x in todo[i:]]))} left" if seen else ""
    tokens = c.steps * c.data.batch_size * c.data.length
    often = f"{tokens / corpus_tokens:.2f} times the text"
    say(f"run {len(runs) - len(todo) + i + 1} of {len(runs)}: {name}, {c.steps:,} steps, {often}{left}")
    began = time.monotonic()
    trainer.train(c, workdir / name)
    jax.clear_caches()  # the programs of one size are of no use to the next
    seen.append((flops, time.monotonic() - began))


def time_left(seen: list[tuple[float, float]], rest: list[float]) -> float:
  """Seconds for runs of `rest` FLOPs, from (FLOPs, seconds) of others: so much a run, and so much a FLOP."""
  from scipy.optimize import nnls  # comes with JAX

  per_run, per_teraflop = nnls(np.array([[1.0, flops / 1e12] for flops, _ in seen]), np.array([s for _, s in seen]))[0]
  return per_run * len(rest) + per_teraflop * sum(rest) / 1e12


def say(line: str) -> None:
  """To stderr, as the progress of training."""
  if distributed.is_first():
    print(f"scaling: {line}", file=sys.stderr, flush=True)


def read(workdir: Path) -> list[dict[str, Any]]:
  """What the finished runs of a study came to, the cheapest first."""
  corpus_tokens = json.loads((workdir / "study.json").read_text())["corpus_tokens"]
  rows = []
  for folder in sorted(workdir.glob("*_*x*_*/")):
    if results := finished(folder):
      objective, size, budget = folder.name.split("_")
      c = configs.load(folder)
      per_bit = results["nats_per_token"] / results["bits_per_byte"]
      tokens = c.steps * c.data.batch_size * c.data.length
      rows.append({
        "family": objective, "size": size, "budget": float(budget), "steps": c.steps, "tokens": tokens,
        "params": c.model.num_params(embedding=False) + c.model.V * c.model.D,  # N of the formula
        "flops": step.flops_per_token(c) * tokens, "epochs": tokens / corpus_tokens,
        "loss": results["nats_per_token"], "loss_stderr": results["bits_per_byte_stderr"] * per_bit,
        "bits_per_byte": results["bits_per_byte"], "bits_per_byte_stderr": results["bits_per_byte_stderr"],
      })  # fmt: skip
  return sorted(rows, key=lambda row: (row["budget"], row["params"], row["family"]))


def optimum(rows: list[dict[str, Any]]) -> dict[str, Any]:
  """The compute-optimal loss of one family's runs of one budget, and where it lies."""
  rows = sorted(rows, key=lambda row: row["params"])
  x, y = np.log([row["params"] for row in rows]), np.array([row["loss"] for row in rows])
  best = int(y.argmin())
  found = {"budget": rows[0]["budget"], "loss": float(y[best]), "params": float(np.exp(x[best])), "parabola": None}
  if not 0 < best < len(rows) - 1:
    return found | {"how": f"best of {len(rows)}" if len(rows) < 3 else "best size; no minimum inside"}
  near = slice(best - 1, best + 2)
  curve = np.polyfit(x[near] - x[best], y[near], 2)
  at = x[best] - curve[1] / (2 * curve[0])
  least = float(np.polyval(curve, at - x[best]))
  drawn = {"curve": curve.tolist(), "middle": float(x[best]), "params": np.exp(x[near][[0, -1]]).tolist()}
  return found | {"loss": least, "params": math.exp(at), "parabola": drawn, "how": "parabola"}


class PowerLaw(NamedTuple):
  """L = a C^-b, as log L = log_L0 - b (log C - log_C0) with C0 in the middle, where the two errors are independent."""

  log_C0: float
  log_L0: float
  b: float
  log_L0_stderr: float | None  # None: two budgets say nothing of it
  b_stderr: float | None

  def loss(self, C: Any) -> Any:
    """Of compute C."""
    return np.exp(self.log_L0 - self.b * (np.log(C) - self.log_C0))

  def log_compute(self, loss: float) -> tuple[float, float]:
    """(log of the FLOPs that reach the loss, its variance to first order)."""
    from_C0 = (self.log_L0 - math.log(loss)) / self.b
    errors = (self.log_L0_stderr or 0.0) / self.b, (self.b_stderr or 0.0) * from_C0 / self.b
    return self.log_C0 + from_C0, errors[0] ** 2 + errors[1] ** 2

  def __str__(self):
    a = math.exp(self.log_L0 + self.b * self.log_C0)
    return f"{a:.4g} C^-({self.b:.4f}{'' if self.b_stderr is None else f' ± {self.b_stderr:.4f}'})"


def power_law(C: list[float], L: list[float]) -> PowerLaw:
  """Linear regression of log L on log C."""
  x, y = np.log(C), np.log(L)
  if len(x) == 2:
    (slope, level), errors = np.polyfit(x - x.mean(), y, 1), (None, None)
  else:
    (slope, level), covariance = np.polyfit(x - x.mean(), y, 1, cov=True)
    errors = np.sqrt(np.diag(covariance)).tolist()
  return PowerLaw(float(x.mean()), float(level), -float(slope), errors[1], errors[0])


def ratios(fits: dict[str, PowerLaw], optima: dict[str, list[dict[str, Any]]]) -> dict[str, Any] | None:
  """How many times the baseline's FLOPs diffusion needs for the same loss; None if a loss does not fall with compute.

  Over the losses that the optima of both have reached: the highest, the middle, the lowest. Where no loss is reached by
  both, between the two ranges, which is an extrapolation of both curves.
  """
  reached = [[x["loss"] for x in optima[family]] for family in FAMILIES]
  low, high = max(map(min, reached)), min(map(max, reached))
  ours, theirs = (fits[family] for family in FAMILIES)
  if min(ours.b, theirs.b) <= 0:
    return None
  found = []
  for loss in [high, math.sqrt(low * high), low] if low < high else [math.sqrt(low * high)]:
    (a, of_a), (b, of_b) = ours.log_compute(loss), theirs.log_compute(loss)
    error = None if ours.b_stderr is None or theirs.b_stderr is None else math.sqrt(of_a + of_b)
    found.append({"loss": loss, "ratio": math.exp(a - b), "log_stderr": error, "flops": [math.exp(a), math.exp(b)]})
  return {"extrapolated": low >= high, "at": found}


def analyse(rows: list[dict[str, Any]]) -> dict[str, Any]:
  """All that is fitted to the runs: optima, and fits and ratio where there are two budgets."""
  optima = {}
  for family in FAMILIES:
    own = [row for row in rows if row["family"] == family]
    budgets = dict.fromkeys(row["budget"] for row in own)
    optima[family] = [optimum([row for row in own if row["budget"] == budget]) for budget in budgets]
  fits = {
    family: power_law([x["budget"] for x in found], [x["loss"] for x in found])
    for family, found in optima.items()
    if len(found) > 1
  }
  return {"optima": optima, "fits": fits, "ratio": ratios(fits, optima) if len(fits) == 2 else None}


def page(rows: list[dict[str, Any]], found: dict[str, Any]) -> str:
  """The study in Markdown."""
  out = [
    "# Loss against training FLOPs", "", "![Loss against FLOPs](scaling.png)", "",
    "N: parameters in matmuls, the head included. FLOPs: 6 N + 12 L d T a token, attention in full in both families."
    " Loss: nats per token of the held-out text, for diffusion an upper bound. Standard errors of a loss are over rows"
    " of that text, which are the same in all runs: differences between runs are less uncertain than that.", "",
    "| family | size | N | budget | steps | tokens | epochs | nats per token | bits per byte |", "|" + "---|" * 9,
  ]  # fmt: skip
  for x in rows:
    out.append(
      f"| {x['family']} | {x['size']} | {x['params']:,} | {short(x['budget'])} | {x['steps']:,} | {x['tokens']:,} |"
      f" {x['epochs']:.2f} | {x['loss']:.4f} ± {x['loss_stderr']:.4f} |"
      f" {x['bits_per_byte']:.4f} ± {x['bits_per_byte_stderr']:.4f} |"
    )
  out += ["", "| family | budget | best N | nats per token | from |", "|" + "---|" * 5]
  for family, optima in found["optima"].items():
    for x in optima:
      out.append(f"| {family} | {short(x['budget'])} | {x['params']:,.0f} | {x['loss']:.4f} | {x['how']} |")
  out += ["", *(f"- {FAMILIES[family]}: L = {fit}" for family, fit in found["fits"].items())]
  ratio = found["ratio"]
  if not ratio:
    out.append("- No compute ratio: it takes two budgets in both families, and a loss that falls with compute.")
    return "\n".join(out) + "\n"
  for x in ratio["at"]:
    error = "" if x["log_stderr"] is None else f", within a factor of {math.exp(min(x['log_stderr'], 99)):.3g} (1 s.e.)"
    out.append(
      f"- For {x['loss']:.4f} nats per token diffusion needs {x['ratio']:.3g} times the baseline's FLOPs{error}:"
      f" {x['flops'][0]:.2g} and {x['flops'][1]:.2g}"
    )
  no, yes = "Both families reached these losses.", "**EXTRAPOLATION** of both curves: no loss was reached by both."
  return "\n".join([*out, f"- {yes if ratio['extrapolated'] else no}"]) + "\n"


def draw(rows: list[dict[str, Any]], found: dict[str, Any], workdir: Path) -> None:
  """scaling.png and scaling.svg: loss against FLOPs, and against parameters at equal FLOPs."""
  from matplotlib.figure import Figure
  from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter

  figure = Figure(figsize=(11, 4.8), layout="constrained", facecolor="white")
  left, right = figure.subplots(1, 2, sharey=True)
  sizes = {row["size"]: row["params"] for row in rows}
  small = {"textcoords": "offset points", "fontsize": 7}
  for family, (colour, marker, dashes) in LOOKS.items():
    own, optima = [row for row in rows if row["family"] == family], found["optima"][family]
    light = {"color": colour, "marker": marker, "markersize": 3.5, "linewidth": 1, "alpha": 0.4}
    for size in sizes:
      if line := [(row["flops"], row["loss"]) for row in own if row["size"] == size]:
        left.plot(*zip(*line, strict=True), **light)
    x = [o["budget"] for o in optima]
    left.plot(x, [o["loss"] for o in optima], marker, color=colour, label=f"{FAMILIES[family]}: best of a budget")
    if fit := found["fits"].get(family):
      along = np.geomspace(x[0], x[-1], 50)
      left.plot(along, fit.loss(along), dashes, color=colour, linewidth=2.5, label=f"L = {fit}")
    for o in optima:
      line = [(row["params"], row["loss"]) for row in own if row["budget"] == o["budget"]]
      right.plot(*zip(*line, strict=True), **light)
      right.annotate(short(o["budget"]), line[-1], (5, 0), color=colour, va="center", **small)
      if o["parabola"]:
        along = np.geomspace(*o["parabola"]["params"], 50)
        height = np.polyval(o["parabola"]["curve"], np.log(along) - o["parabola"]["middle"])
        right.plot(along, height, dashes, color=colour)
        right.plot(o["params"], o["loss"], marker, color=colour)
  if ratio := found["ratio"]:
    x = ratio["at"][len(ratio["at"]) // 2]
    left.plot(x["flops"], [x["loss"]] * 2, ":", color="0.3")
    note = f"{x['ratio']:.3g} times the FLOPs" + (" (extrapolated)" if ratio["extrapolated"] else "")
    left.annotate(note, (min(x["flops"]), x["loss"]), (4, 4), color="0.3", **small)
  left.set(xscale="log", yscale="log", xlabel="training FLOPs (6 N + 12 L d T a token); a light line is a size")
  left.set_ylabel("held-out loss, nats per token")
  budgets = sorted({row["budget"] for row in rows})
  left.set_xticks(budgets, [short(budget) for budget in budgets])
  left.xaxis.set(minor_locator=NullLocator())
  left.yaxis.set(major_locator=MaxNLocator(8), major_formatter=ScalarFormatter(), minor_locator=NullLocator())
  right.set(xscale="log", xlabel="N, parameters in matmuls; a curve is a budget")
  right.set_xticks(list(sizes.values()), [f"{size}\n{n:,}" for size, n in sizes.items()], fontsize=7)
  right.xaxis.set(minor_locator=NullLocator())
  for axes in (left, right):
    axes.grid(True, which="both", alpha=0.15)
    axes.spines[["top", "right"]].set_visible(False)
  left.legend(frameon=False, fontsize=8)
  for ending in ("png", "svg"):
    figure.savefig(workdir / f"scaling.{ending}", dpi=160)


def report(workdir: Path) -> str:
  """Draws and writes the finished runs of a study; returns the page.

  Raises:
    Missing: there are none.
  """
  rows = read(workdir) if (workdir / "study.json").is_file() else []
  if not rows:
    raise Missing(f"--workdir={workdir}: there is no finished run of a scaling study in it")
  found = analyse(rows)
  draw(rows, found, workdir)
  numbers = {"runs": rows} | found | {"fits": {family: fit._asdict() for family, fit in found["fits"].items()}}
  (workdir / "scaling.json").write_text(json.dumps(numbers, indent=2) + "\n")
  (workdir / "scaling.md").write_text(text := page(rows, found))
  return text


def main(argv: list[str]) -> None:
  """Trains, then reports."""
  given = flags.FLAGS
  needed = ["workdir"] if given.report_only else ["workdir", "config", "sizes", "budgets"]
  if missing := [f"--{name}" for name in needed if not given[name].value]:
    raise Mistake(f"{', '.join(missing)} missing")
  if argv[1:]:
    raise Mistake(f"unexpected argument {argv[1]!r}: options are written --name=value")
  if not importlib.util.find_spec("matplotlib"):  # not after hours of training
    raise Mistake("the figure needs matplotlib: pip install matplotlib")
  workdir = Path(given.workdir).expanduser()
  distributed.initialize(given.coordinator, given.num_processes, given.process_id)
  if not given.report_only:
    limits = {"min_steps": given.min_steps, "max_epochs": given.max_epochs}
    study(configs.parse(given.config.to_dict()), workdir, given.sizes, given.budgets, **limits)
  if distributed.is_first():
    print(report(workdir), end="")


if __name__ == "__main__":
  door.keep_freed_memory()
  app.run(lambda argv: door.guard(main, argv, "scaling"), flags_parser=door.parse)
