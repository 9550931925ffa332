"""A causal model becomes a mask predictor, measured: held-out bound against steps, beside the same model from nothing.

  python benchmarks/conversion.py [--workdir=runs/conversion] [--causal_steps=300] [--config.steps=...]

Trains a causal model, and from nothing, and from it (`init_from`), a model of blocks (of `noise.block`) and one of the
whole canvas; those from it twice, with `model.shift`, where the state at a token still predicts the next one, and
without. All see the same batches with the same noise. Those from nothing go on for `causal_steps` more: as many steps
as the others have had in all.

The learning rate of mask predictors stays at its peak after warming up, so that every point of a curve is what a run of
so many steps gives; the causal model's is the config's.

Writes WORKDIR/conversion.json, .md and .svg; the runs are in WORKDIR/causal, and blocks_nothing, blocks_shifted,
blocks_unshifted and likewise whole_*, and go on where they were stopped.
"""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from absl import app, flags

from lladax import config
from lladax import main as door
from lladax.mistake import Mistake
from lladax.storage import metrics
from lladax.training import trainer

flags.DEFINE_integer("causal_steps", 300, "Steps of the causal model.", lower_bound=1)

Curve = list[tuple[int, float, float]]  # (step, held-out bits per byte, their standard error)
BEGAN = {"nothing": "from nothing", "shifted": "from the causal model", "unshifted": "from the causal model"}


def main(argv: list[str]) -> None:
  if argv[1:]:
    raise Mistake(f"unexpected argument {argv[1]!r}: options are written --name=value")
  if not importlib.util.find_spec("matplotlib"):  # not after training
    raise Mistake("the figure needs matplotlib: pip install matplotlib")
  workdir, values = Path(flags.FLAGS.workdir or "runs/conversion"), flags.FLAGS.config.to_dict()
  steps, before, block = values["steps"], flags.FLAGS.causal_steps, values["noise"]["block"]
  if not block:
    raise Mistake(
      "noise.block=0: name the tokens of a block, as in --config=blocks:4; the whole canvas is trained, too"
    )
  every = values["evaluate"]["every"] or max(steps // 12, 1)
  causal = values | {"objective": "autoregressive", "steps": before}
  found: dict[str, Any] = {"steps": steps, "causal_steps": before, "block": block}
  found["causal"] = trained(causal | {"evaluate": values["evaluate"] | {"every": 0}}, workdir / "causal")[-1]
  peak = max(rate for _, rate in values["optimizer"]["schedule"])
  own = values | {
    "objective": "diffusion", "evaluate": values["evaluate"] | {"every": every},
    "optimizer": values["optimizer"] | {"schedule": ((max(steps // 20, 1), peak), (-1, peak))},
  }  # fmt: skip
  for way in ("blocks", "whole"):
    own["noise"] = values["noise"] | {"block": block if way == "blocks" else 0}
    found[way] = {"nothing": trained(own | {"steps": steps + before}, workdir / f"{way}_nothing")}
    for name in ("shifted", "unshifted"):
      model = values["model"] | {"shift": name == "shifted"}
      converted = own | {"model": model, "init_from": str(workdir / "causal")}
      found[way][name] = trained(converted, workdir / f"{way}_{name}")
  rows = table(found)
  (workdir / "conversion.json").write_text(json.dumps(found, indent=1))
  (workdir / "conversion.md").write_text("\n".join(rows) + "\n", encoding="utf-8")
  draw(found, workdir / "conversion.svg")
  print("\n".join(rows))
  print(f"{workdir / 'conversion.md'}, .svg, .json", file=sys.stderr)


def trained(values: dict[str, Any], workdir: Path) -> Curve:
  """Trains what is not trained yet; its held-out bounds, over all held-out rows each time."""
  values = values | {"evaluate": values["evaluate"] | {"rows": 0}}
  end = trainer.train(config.parse(values), workdir)
  names = ("bits_per_byte", "bits_per_byte_stderr")
  seen = [row for row in metrics.read(workdir / "metrics.jsonl") if "held_out_bits_per_byte" in row]
  return [(row["step"], *(row[f"held_out_{x}"] for x in names)) for row in seen] + [
    (values["steps"], *(end[x] for x in names))
  ]


def after(curve: Curve, steps: int) -> tuple[int, float, float]:
  """The point of a curve at so many steps, or the last one before."""
  return max((x for x in curve if x[0] <= steps), default=curve[0])


def needed(curve: Curve, bound: float, before: int, instead_of: int) -> str:
  """The steps, and those before, after which a curve is first at a bound, straight between its points; in words."""

  def fewer(steps, least=""):
    return f" ({least}{1 - steps / instead_of:.0%} fewer)" if steps < instead_of else ""

  (step, bits, _), *rest = curve
  if bits <= bound:
    return f"at most {before + step}{fewer(before + step, 'at least ')}"
  for later, better, _ in rest:
    if better <= bound:
      found = before + step + (later - step) * (bits - bound) / (bits - better)
      return f"{found:.0f}{fewer(found)}"
    step, bits = later, better
  return f"more than {before + step}"


def words(found: dict[str, Any], way: str, name: str) -> str:
  """What a model predicts."""
  return (f"blocks of {found['block']}" if way == "blocks" else "the whole canvas") + ", shifted" * (name == "shifted")


def table(found: dict[str, Any]) -> list[str]:
  """Markdown: a line for each model; of those from nothing also one after fewer steps."""
  steps, every = found["steps"], found["steps"] + found["causal_steps"]
  rows = [
    f"| model | begins | steps | held-out bits per byte | steps to the bound of {steps} from nothing"
    f" | to that of {every}, causal steps counted |",
    "|---|---|---|---|---|---|",
    f"| causal | from nothing | {found['causal'][0]} | {found['causal'][1]:.3f} ± {found['causal'][2]:.3f} | | |",
  ]
  for way in ("blocks", "whole"):
    targets = [after(found[way]["nothing"], x) for x in (steps, every)]
    for step, bits, error in targets:
      rows.append(f"| {words(found, way, 'nothing')} | {BEGAN['nothing']} | {step} | {bits:.3f} ± {error:.3f} | | |")
    for name in [x for x in found[way] if x != "nothing"]:
      step, bits, error = found[way][name][-1]
      cells = [
        needed(found[way][name], bound, more, at)
        for (at, bound, _), more in zip(targets, (0, found["causal_steps"]), strict=True)
      ]
      rows.append(
        f"| {words(found, way, name)} | {BEGAN[name]} | {step} | {bits:.3f} ± {error:.3f} | " + " | ".join(cells) + " |"
      )
  return rows


def draw(found: dict[str, Any], path: Path) -> None:
  """Bound against steps, of blocks and of whole canvases; the causal model is a line across."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  figure, both = pyplot.subplots(1, 2, figsize=(9, 3.2), sharey=True, layout="constrained")
  labels = BEGAN | {"shifted": "from the causal model, shift kept", "unshifted": "and dropped"}
  looks = {"nothing": ("#d55e00", "s"), "shifted": ("#0072b2", "o"), "unshifted": ("#56b4e9", "^")}
  for way, axes in zip(("blocks", "whole"), both, strict=True):
    for name, curve in found[way].items():
      (colour, marker), (steps, bits, _) = looks[name], zip(*curve, strict=True)
      axes.plot(steps, bits, marker, ls="-", markersize=3, color=colour, label=labels[name])
      if name == "shifted":
        late = [step + found["causal_steps"] for step in steps]
        axes.plot(late, bits, ls=":", color=colour, label="kept, causal steps counted")
    axes.axhline(found["causal"][1], color="#808080", linestyle="--", label="the causal model itself")
    axes.set_title(words(found, way, "nothing"), fontsize="medium")
    axes.set_xlabel("steps")
    axes.set_xlim(left=0)
    axes.spines[["top", "right"]].set_visible(False)
  both[0].set_ylabel("held-out bits per byte, a bound")
  figure.legend(*both[1].get_legend_handles_labels(), loc="outside right upper", frameon=False)
  figure.savefig(path, metadata={"Date": None})
  pyplot.close(figure)


if __name__ == "__main__":
  door.keep_freed_memory()
  flags.FLAGS.set_default("config", "blocks:4")
  app.run(lambda argv: door.guard(main, argv, "conversion"), flags_parser=door.parse)
