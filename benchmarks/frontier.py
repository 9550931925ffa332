"""Quality against speed: one model, one task, many ways to sample; the frontier as a table and a plot.

  python benchmarks/frontier.py --path=runs/gsm8k --task=lladax_gsm8k --data_dir=DIR --limit=64 \
    --gen_length=128 --blocks=16,32,128 --steps=128,64,32 --thresholds=0.9,0.7 --caches=none,prefix,dual

The task is one of the harness's, or of evaluation/tasks, that generates text (pip install -e '.[eval]'). Every setting
answers the same questions. A batch that compiled a program is timed again; tokens are counted up to the end of an
answer. Writes OUT/frontier.json, frontier.md, frontier.png and frontier.svg, anew after each setting; settings that
are in frontier.json already are not run again.
"""

import argparse
import importlib.util
import json
import math
import sys
import time
from pathlib import Path

import jax
import numpy as np

import lladax
from lladax import main as door
from lladax.drawing.report import metrics
from lladax.evaluation import harness
from lladax.mistake import Mistake

COLOURS = {None: "#0072b2", "prefix": "#009e73", "dual": "#d55e00"}  # of the caches; told apart by everybody
SAME = ("path", "task", "data_dir", "limit", "batch_size", "gen_length", "metric")  # in every run that is continued
_compiled = 0  # programs so far


def _count(event: str, *_, **__) -> None:
  global _compiled
  _compiled += event.endswith("backend_compile_duration")


class Counted:
  """A LLaDA that counts what it generates, and how long that takes."""

  def __init__(self, llada: lladax.LLaDA):
    self._llada, self.tokens, self.nfe, self.calls, self.seconds = llada, 0, 0, 0, 0.0

  def __getattr__(self, name):
    return getattr(self._llada, name)

  def sample(self, *args, **options):
    """As `LLaDA.sample`."""
    return self._counted(self._llada.sample, *args, **options)

  def unmask(self, *args, **options):
    """As `LLaDA.unmask`."""
    return self._counted(self._llada.unmask, *args, **options)

  def _counted(self, generate, *args, **options):
    before = -1
    while before != _compiled:
      before, began = _compiled, time.perf_counter()
      out = generate(*args, **options)
      seconds = time.perf_counter() - began
    made = out.unmasked_at > 0
    ends = made & np.isin(out.tokens, self._llada.ends)
    made_B = (made & (ends.cumsum(axis=1) - ends == 0)).sum(axis=1)
    if options.get("until"):  # a text may end within its last block
      made_B = np.minimum(made_B, [len(self._llada.tokenizer.encode(text, begins=False)) for text in out.text])
    self.tokens += int(made_B.sum())
    self.nfe, self.calls, self.seconds = self.nfe + out.nfe, self.calls + 1, self.seconds + seconds
    return out


def settings(a: argparse.Namespace) -> list[dict]:
  """The grid: fixed schedules of every length, and thresholds, each with every block and cache."""
  ways = [{"steps": steps} for steps in a.steps] + [{"threshold": x, "steps": a.gen_length} for x in a.thresholds]
  found = []
  for block in a.blocks:
    for cache in a.caches:
      for way in ways:
        name = f"block {block}, " + (f"threshold {way['threshold']}" if "threshold" in way else f"{way['steps']} steps")
        name += f", {cache} cache" * bool(cache)
        found.append({"name": name, "block_length": block, "cache": cache} | way)
  return found


def measure(llada: lladax.LLaDA, a: argparse.Namespace, setting: dict) -> dict:
  """Accuracy, tokens per second and forward passes (of a batch) of a setting."""
  options = {name: value for name, value in setting.items() if name != "name"} | {"gen_length": a.gen_length}
  counted = Counted(llada)
  found = harness.evaluate(
    counted, a.task, data_dir=a.data_dir, limit=a.limit, batch_size=a.batch_size, allow_code=a.allow_code,
    early_stop=True, **options
  )[a.task]  # fmt: skip
  metric = a.metric or next(iter(found))
  if metric not in metrics(found):
    raise Mistake(f"--metric={metric}: {a.task} has {', '.join(metrics(found))}")
  return setting | {
    "metric": metric, "accuracy": found[metric], "stderr": found.get(f"{metric}_stderr", math.nan),
    "tokens_per_second": counted.tokens / counted.seconds, "nfe": counted.nfe / counted.calls, "tokens": counted.tokens,
  }  # fmt: skip


def frontier(found: list[dict], by: str = "tokens_per_second") -> list[dict]:
  """The settings that no other beats in both accuracy and speed, from slow to fast; or by fewest "nfe"."""
  sign = 1 if by == "nfe" else -1
  best, kept = -1.0, []
  for x in sorted(found, key=lambda x: (sign * x[by], -x["accuracy"])):
    if x["accuracy"] > best:
      best = x["accuracy"]
      kept.append(x)
  return kept[::-1]


def report(found: list[dict], a: argparse.Namespace) -> None:
  """Writes all four files."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot
  from matplotlib.ticker import LogLocator, NullFormatter

  out, line = Path(a.out), frontier(found)
  out.mkdir(parents=True, exist_ok=True)
  device = jax.devices()[0].device_kind
  (out / "frontier.json").write_text(json.dumps({"settings": vars(a), "device": device, "found": found}, indent=1))
  metric = found[0]["metric"]
  rows = [f"| setting | {metric} | tokens/s | forward passes of a batch | frontier |", "|---|---|---|---|---|"]
  for x in sorted(found, key=lambda x: -x["tokens_per_second"]):
    score = f"{100 * x['accuracy']:.1f} ± {100 * x['stderr']:.1f}%"
    rows.append(f"| {x['name']} | {score} | {x['tokens_per_second']:.1f} | {x['nfe']:.0f} | {'x' * (x in line)} |")
  about = f"{a.path}, {a.limit} questions, batches of {a.batch_size}, {a.gen_length} tokens, on {device}."
  text = f"# {a.task}: quality against speed\n\n{about}\n\n![the frontier](frontier.png)\n\n" + "\n".join(rows) + "\n"
  (out / "frontier.md").write_text(text)
  figure, panels = pyplot.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
  for axes, by, label in zip(
    panels, ("tokens_per_second", "nfe"), ("tokens per second", "forward passes"), strict=True
  ):
    for cache, colour in COLOURS.items():
      of = [x for x in found if x["cache"] == cache]
      if of:
        x, y, error = (np.array([x[name] for x in of]) for name in (by, "accuracy", "stderr"))
        name = f"{cache} cache" if cache else "no cache"
        axes.errorbar(x, 100 * y, 100 * np.nan_to_num(error), fmt="o", color=colour, label=name, alpha=0.8)
    best = frontier(found, by)
    axes.plot([x[by] for x in best], [100 * x["accuracy"] for x in best], "--", color="#555555", zorder=0)
    for x in best:
      at = x[by], 100 * x["accuracy"]
      axes.annotate(x["name"], at, fontsize=7, xytext=(4, 5), textcoords="offset points")
    axes.set(xscale="log", xlabel=label)
    axes.xaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_formatter=NullFormatter())
    axes.spines[["top", "right"]].set_visible(False)
  panels[1].invert_xaxis()  # better is to the right in both
  panels[0].set(ylabel=f"{a.task} {metric}, %")
  panels[0].legend(frameon=False)
  for kind in ("png", "svg"):
    figure.savefig(out / f"frontier.{kind}", dpi=150)
  pyplot.close(figure)


def parse(argv: list[str]) -> argparse.Namespace:
  """The command line."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  texts = {
    "path": (None, "a workdir, or a published checkpoint"),
    "task": (None, "of lm-eval or evaluation/tasks, one that generates"),
    "data_dir": ("", "the folder of local benchmarks, for lladax_..."),
    "out": ("runs/frontier", "the folder of the results (runs/frontier)"),
    "metric": ("", "of the task (its first)"),
  }
  numbers = {
    "limit": (64, "questions, full batches (64)"),
    "batch_size": (8, "questions at a time (8)"),
    "gen_length": (128, "tokens of an answer (128)"),
  }
  lists = {
    "blocks": (int, "32", "block lengths (32)"),
    "steps": (int, "128,64,32", "forward passes of a fixed schedule (128,64,32)"),
    "thresholds": (float, "0.9", "of confidence, for parallel decoding (0.9)"),
    "caches": (str, "none,dual", "none, prefix, dual (none,dual)"),
  }
  for name, (default, said) in texts.items():
    parser.add_argument(f"--{name}", default=default, required=default is None, help=said)
  for name, (default, said) in numbers.items():
    parser.add_argument(f"--{name}", type=int, default=default, help=said)
  for name, (kind, default, said) in lists.items():
    parser.add_argument(
      f"--{name}", type=lambda x, kind=kind: [kind(y) for y in x.split(",") if y], default=default, help=said
    )
  parser.add_argument("--allow_code", action="store_true", help="generated code may be run, in a sandbox")
  a = parser.parse_args(argv)
  if a.limit % a.batch_size:
    raise Mistake(f"--limit={a.limit}: must be a multiple of --batch_size={a.batch_size}, or a batch is not full")
  if uneven := [x for x in a.blocks if x < 1 or a.gen_length % x]:
    raise Mistake(f"--blocks={uneven[0]}: --gen_length={a.gen_length} must be a multiple of it")
  if unknown := [x for x in a.caches if x not in ("none", "prefix", "dual")]:
    raise Mistake(f"--caches: {unknown[0]!r} is none of none, prefix, dual")
  a.caches = [None if cache == "none" else cache for cache in a.caches]
  return a


def main(argv: list[str]) -> None:
  a = parse(argv)
  path, grid, found = Path(a.out) / "frontier.json", settings(a), []
  if path.is_file():
    before = json.loads(path.read_text())
    for name in SAME:
      if before["settings"][name] != getattr(a, name):
        raise Mistake(
          f"--{name}={getattr(a, name)!r}: {path} was made with {before['settings'][name]!r}; give another --out"
        )
    found = before["found"]
  if not importlib.util.find_spec("matplotlib"):  # not after the first setting
    raise Mistake("the figure needs matplotlib: pip install matplotlib")
  _, _, loaded = harness.check(a.task, data_dir=a.data_dir, allow_code=a.allow_code)[a.task]
  if any(task.OUTPUT_TYPE != "generate_until" for task in loaded["tasks"].values()):
    raise Mistake(f"--task={a.task} generates nothing: choose one that does")
  llada = lladax.load(a.path)
  jax.monitoring.register_event_duration_secs_listener(_count)
  for i, setting in enumerate(grid, start=1):
    if setting["name"] in [x["name"] for x in found]:
      continue
    began = time.monotonic()
    found.append(measure(llada, a, setting))
    report(found, a)
    x = found[-1]
    print(
      f"{i} of {len(grid)}: {x['name']}: {x['metric']} {x['accuracy']:.3f} ± {x['stderr']:.3f},"
      f" {x['tokens_per_second']:.1f} tokens/s, {x['nfe']:.0f} passes ({time.monotonic() - began:.0f} s)", flush=True,
    )  # fmt: skip
  print(f"{path.with_suffix('.md')}, .png, .svg, .json")


if __name__ == "__main__":
  door.keep_freed_memory()
  sys.exit(door.guard(main, sys.argv[1:], "frontier"))
