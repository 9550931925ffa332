"""The reversal test, both families side by side: trains what is not trained yet, prints the table, draws the figure.

  python benchmarks/reversal.py [--config=reversal] [--workdir=runs/reversal] [--config.steps=...]

Writes WORKDIR/reversal.json, reversal.md, reversal.png and reversal.svg; the two runs are in WORKDIR/diffusion and
WORKDIR/autoregressive, and go on where they were stopped.
"""

import importlib.util
import json
import sys
from pathlib import Path

from absl import app, flags

import lladax
from lladax import config as configs
from lladax import main as door
from lladax.evaluation import evaluate
from lladax.mistake import Mistake
from lladax.training import trainer

FAMILIES = {"diffusion": "mask predictor", "autoregressive": "causal baseline"}
COLOURS = {"diffusion": "#0072b2", "autoregressive": "#d55e00"}  # told apart by everybody


def main(argv: list[str]) -> None:
  if argv[1:]:
    raise Mistake(f"unexpected argument {argv[1]!r}: options are written --name=value")
  if not importlib.util.find_spec("matplotlib"):  # not after training
    raise Mistake("the figure needs matplotlib: pip install matplotlib")
  workdir = Path(flags.FLAGS.workdir or "runs/reversal")
  found, told = {}, {}
  for family in FAMILIES:
    config = configs.parse(flags.FLAGS.config.to_dict() | {"objective": family})
    trainer.train(config, workdir / family)
    llada = lladax.load(workdir / family)
    found[family], told[family] = {}, []
    for task, name in evaluate.short_names(config.evaluate.tasks).items():
      name = f", {name}" if len(config.evaluate.tasks) > 1 else ""
      metrics, answers = evaluate.task(llada, config, task)
      for direction in dict.fromkeys(x["direction"] for x in answers):
        found[family][direction + name] = metrics[direction]
        found[family][f"{direction}{name}_stderr"] = metrics[f"{direction}_stderr"]
      told[family] += [x | {"direction": x["direction"] + name} for x in answers]
  directions = [name for name in found["diffusion"] if not name.endswith("_stderr")]
  rows = ["| asked | " + " | ".join(FAMILIES.values()) + " |", "|---|---|---|"]
  for direction in directions:
    cells = [f"{100 * found[x][direction]:.1f} ± {100 * found[x][direction + '_stderr']:.1f}%" for x in FAMILIES]
    rows.append(f"| {direction} | " + " | ".join(cells) + " |")
  page = ["# The reversal test", "", *rows, "", "![hits of both](reversal.png)", "", "## For instance", ""]
  for family, name in FAMILIES.items():
    page += ["", f"### {name}", "", "| asked | answer | guess |", "|---|---|---|"]
    for direction in directions:
      of = [x for x in told[family] if x["direction"] == direction]
      page += [f"| {x['question']} | {x['answer']} | {x['guess']} |" for x in of[:5]]
  (workdir / "reversal.md").write_text("\n".join(page) + "\n", encoding="utf-8")
  (workdir / "reversal.json").write_text(json.dumps({"metrics": found, "told": told}, ensure_ascii=False, indent=1))
  draw(found, directions, workdir)
  print("\n".join(rows))
  print(f"{workdir / 'reversal.md'}, .png, .svg, .json", file=sys.stderr)


def draw(found: dict, directions: list[str], workdir: Path) -> None:
  """Bars of the hits, with standard errors."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(figsize=(7, 3.2), layout="constrained")
  for i, (family, name) in enumerate(FAMILIES.items()):
    at = [x + 0.36 * (i - 0.5) for x in range(len(directions))]
    height = [100 * found[family][x] for x in directions]
    error = [100 * found[family][f"{x}_stderr"] for x in directions]
    bars = axes.bar(at, height, 0.34, yerr=error, color=COLOURS[family], label=name, ecolor="#444444", capsize=3)
    axes.bar_label(bars, [f"{x:.0f}" for x in height], padding=2)
  axes.set_xticks(range(len(directions)), [x.replace(", ", ",\n") for x in directions])
  axes.set(ylim=(0, 112), ylabel="whole answers, %")
  axes.spines[["top", "right"]].set_visible(False)
  axes.legend(frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, 1.17))
  for kind in ("png", "svg"):
    figure.savefig(workdir / f"reversal.{kind}", dpi=150)
  pyplot.close(figure)


if __name__ == "__main__":
  door.keep_freed_memory()
  flags.FLAGS.set_default("config", "reversal")
  app.run(lambda argv: door.guard(main, argv, "reversal"), flags_parser=door.parse)
