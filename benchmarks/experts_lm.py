"""A small mixture of experts beside the dense model that computes as much for a token: bound, and load of the experts.

  python benchmarks/experts_lm.py [--workdir=runs/experts_lm] [--E=8] [--J=2] [--config.steps=...]

Trains the config's dense model, and models with J of E experts of width F / J in the place of its feed-forward (scored
by sigmoids, renormalised), on the same batches with the same noise: without balancing, with the auxiliary loss
(`model.balance`), and with a choosing bias that is moved (`model.balance_rate`).

The load is that of the busiest expert of all layers in units of the mean, a step's (`expert_load` in metrics.jsonl): 1
is balanced, E / J is all that there can be.

Writes WORKDIR/experts_lm.json, .md and .svg; the runs are in WORKDIR/dense, none, loss and bias_RATE, and go on where
they were stopped.
"""

import importlib.util
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from absl import app, flags

from lladax import config
from lladax import main as door
from lladax.mistake import Mistake
from lladax.storage import metrics
from lladax.training import trainer

flags.DEFINE_integer("E", 8, "Experts.", lower_bound=2)
flags.DEFINE_integer("J", 2, "So many of them a token is given to.", lower_bound=1)
flags.DEFINE_float("balance", 0.01, "Weight of the auxiliary loss.", lower_bound=0.0)
flags.DEFINE_list("balance_rates", ["0.001", "0.01"], "Steps of the choosing bias: a model for each.")

COLOURS = ("#d55e00", "#009e73", "#56b4e9", "#0072b2", "#cc79a7")  # Okabe and Ito's


def main(argv: list[str]) -> None:
  if argv[1:]:
    raise Mistake(f"unexpected argument {argv[1]!r}: options are written --name=value")
  if not importlib.util.find_spec("matplotlib"):  # not after training
    raise Mistake("the figure needs matplotlib: pip install matplotlib")
  workdir, values = Path(flags.FLAGS.workdir or "runs/experts_lm"), flags.FLAGS.config.to_dict()
  E, J, F = flags.FLAGS.E, flags.FLAGS.J, values["model"]["F"]
  if F % J:
    raise Mistake(f"--J={J} does not divide model.F={F}: experts have a width of F / J")
  experts = {"E": E, "J": J, "X": F // J, "router": "sigmoid", "router_renormalise": True}
  arms: dict[str, dict[str, Any]] = {
    "dense": {},
    "none": experts,
    "loss": experts | {"balance": flags.FLAGS.balance},
  }
  for rate in flags.FLAGS.balance_rates:
    arms[f"bias_{rate}"] = experts | {"router_bias": True, "balance_rate": number(rate)}
  found = {}
  for name, changes in arms.items():
    bounds = trainer.train(config.parse(values | {"model": values["model"] | changes}), workdir / name)
    model = config.load(workdir / name).model
    found[name] = {"name": said(name)} | {x: bounds[x] for x in ("bits_per_byte", "bits_per_byte_stderr")}
    found[name] |= {"parameters": model.num_params(), "active": model.num_params(active=True)}
    rows = metrics.read(workdir / name / "metrics.jsonl")
    found[name]["load"] = [(row["step"], row["expert_load"]) for row in rows if "expert_load" in row]
  rows = table(found)
  (workdir / "experts_lm.json").write_text(json.dumps(found, indent=1))
  (workdir / "experts_lm.md").write_text("\n".join(rows) + "\n", encoding="utf-8")
  draw(found, workdir / "experts_lm.svg")
  print("\n".join(rows))
  print(f"{workdir / 'experts_lm.md'}, .svg, .json", file=sys.stderr)


def number(rate: str) -> float:
  try:
    return float(rate)
  except ValueError:
    raise Mistake(f"--balance_rates: {rate!r} is no number: write it as in 0.001") from None


def said(name: str) -> str:
  """What a model is called."""
  names = {"dense": "dense", "none": "no balancing", "loss": f"auxiliary loss, {flags.FLAGS.balance:g}"}
  return names.get(name) or f"choosing bias, {name.removeprefix('bias_')} a step"


def table(found: dict[str, Any]) -> list[str]:
  """Markdown: a line for each model."""
  rows = [
    "| model | parameters | of a token | held-out bits per byte | load of the busiest: first tenth of the steps"
    " | last tenth | largest of all |",
    "|---|---|---|---|---|---|---|",
  ]
  for x in found.values():
    load = [value for _, value in x["load"]]
    tenth = max(len(load) // 10, 1)
    parts = [statistics.mean(load[:tenth]), statistics.mean(load[-tenth:]), max(load)] if load else []
    cells = [f"{value:.2f}" for value in parts] or [""] * 3
    rows.append(
      f"| {x['name']} | {x['parameters']:,} | {x['active']:,} | {x['bits_per_byte']:.3f} ±"
      f" {x['bits_per_byte_stderr']:.3f} | " + " | ".join(cells) + " |"
    )
  return rows


def draw(found: dict[str, Any], path: Path) -> None:
  """Load against steps: every step faint, and the mean of the 20 around it."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(figsize=(8, 3.2), layout="constrained")
  for i, x in enumerate(x for x in found.values() if x["load"]):
    steps, load = zip(*x["load"], strict=True)
    near = [statistics.mean(load[max(at - 10, 0) : at + 10]) for at in range(len(load))]
    axes.plot(steps, load, color=COLOURS[i % len(COLOURS)], alpha=0.2, linewidth=0.6)
    axes.plot(steps, near, color=COLOURS[i % len(COLOURS)], label=x["name"])
  axes.axhline(1, color="#808080", linestyle="--", linewidth=0.8, label="balanced")
  axes.set_xlabel("steps")
  axes.set_ylabel("load of the busiest expert / mean")
  axes.set_xlim(left=0)
  axes.spines[["top", "right"]].set_visible(False)
  figure.legend(loc="outside right upper", frameon=False)
  figure.savefig(path, metadata={"Date": None})
  pyplot.close(figure)


if __name__ == "__main__":
  door.keep_freed_memory()
  flags.FLAGS.set_default("config", "blocks:4")
  app.run(lambda argv: door.guard(main, argv, "experts_lm"), flags_parser=door.parse)
