"""The family of blocks, measured: bound, speed and samples of blocks of 1, 4, 16, the whole canvas, and the baseline.

  python benchmarks/blocks.py [--config=blocks] [--workdir=runs/family] [--config.steps=...]

Trains what is not trained yet, one model after another, on the same text. Then each continues the beginnings
of held-out rows, one at a time for the speed and all at once for the quality:

- one token a pass, in random order within a block at temperature 1, which draws from the model; and up to four a pass,
  the most confident ones (models so small are sure of nothing: a threshold would commit one a pass);
- bits per byte of what was said under the causal baseline, beside those of the held-out text itself (more: it is worse
  text; much less: it repeats itself), and how many of its runs of 4 tokens are distinct.

Writes WORKDIR/blocks.json, blocks.md and blocks.svg; the runs are in WORKDIR/1, 4, 16, whole and causal, and go on
where they were stopped.
"""

import importlib.util
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

import lladax
from lladax import config, configs
from lladax import main as door
from lladax.data import sources
from lladax.mistake import Mistake
from lladax.training import trainer

FAMILY = ("1", "4", "16", "whole", "causal")
NAMES = {"whole": "the whole canvas", "causal": "causal baseline"}
WAYS = {
  "one": {"temperature": 1.0, "remasking": "random"},
  "four": {"temperature": 1.0},
}
ROWS, TIMED = 64, 8  # samples, and so many of them one at a time


def main(argv: list[str]) -> None:
  if argv[1:]:
    raise Mistake(f"unexpected argument {argv[1]!r}: options are written --name=value")
  if not importlib.util.find_spec("matplotlib"):  # not after training
    raise Mistake("the figure needs matplotlib: pip install matplotlib")
  workdir, values = Path(flags.FLAGS.workdir or "runs/family"), flags.FLAGS.config.to_dict()
  found = {}
  for name in FAMILY:
    own = configs.load(f"blocks:{name}").to_dict()
    values |= {"objective": own["objective"], "noise": values["noise"] | {"block": own["noise"]["block"]}}
    c = config.parse(values)
    bounds = trainer.train(c, workdir / name)
    found[name] = {x: bounds[x] for x in ("bits_per_byte", "bits_per_byte_stderr")}
  baseline = lladax.load(workdir / "causal")
  given, said = beginnings(c, baseline)
  text = judged(baseline, given, said)
  for name in FAMILY:
    llada = lladax.load(workdir / name)
    for way, options in WAYS.items():
      if way == "four" and not llada.model.objective.fills:
        continue  # one after another
      found[name][way] = sampled(llada, baseline, given, len(said[0]), 4 if way == "four" else 1, options)
      print(f"{name}, {way}: {found[name][way]}", file=sys.stderr, flush=True)
  rows = table(found, text)
  (workdir / "blocks.json").write_text(json.dumps({"found": found, "held_out_text": text}, indent=1))
  (workdir / "blocks.md").write_text("\n".join(rows) + "\n", encoding="utf-8")
  draw(found, workdir / "blocks.svg", c.data.length)
  print("\n".join(rows))
  print(f"{workdir / 'blocks.md'}, .svg, .json", file=sys.stderr)


def beginnings(c: config.Config, llada: lladax.LLaDA) -> tuple[list[list[int]], list[list[int]]]:
  """(the first quarters of held-out rows, how they go on), evenly spread, of rows in which no document ends."""
  assert llada.tokenizer is not None
  rows = sources.held_out(c.data, llada.tokenizer)
  if rows is None:
    raise Mistake("data.held_out=0.0: there is no held-out text to measure")
  tokens_RL, _, scored_RL = rows.take(np.arange(rows.num_rows))
  whole_RL = tokens_RL[scored_RL.all(axis=1) & (tokens_RL != llada.eos_id).all(axis=1)]
  if len(whole_RL) < 2:
    raise Mistake(f"data.held_out={c.data.held_out}: not two rows of it are whole: use a larger fraction")
  kept_RL = whole_RL[np.linspace(0, len(whole_RL) - 1, min(ROWS, len(whole_RL))).astype(int)]
  first = c.data.length // 4
  return kept_RL[:, :first].tolist(), kept_RL[:, first:].tolist()


def sampled(
  llada: lladax.LLaDA,
  baseline: lladax.LLaDA,
  given: list[list[int]],
  length: int,
  at_once: int,
  options: dict[str, Any],
) -> dict[str, float]:
  """Speed of one row at a time (the median), and what becomes of all of them."""
  block = llada.model.block or length
  steps = length // block * math.ceil(block / at_once)
  options = {**options, "gen_length": length, "steps": steps, "block_length": block}
  llada.sample([given[0]], **options)  # compiles
  passes, tokens, speeds = 0, 0, []
  for i, row in enumerate(given[:TIMED]):
    began = time.perf_counter()
    out = llada.sample([row], **options, seed=i)
    new = length if llada.model.objective.fills else len(upto(out.tokens[0, -length:], llada))
    speeds.append(new / (time.perf_counter() - began))
    passes, tokens = passes + out.nfe, tokens + new
  out = llada.sample(given, **options)
  said = [upto(row[-length:], baseline) for row in out.tokens]
  return judged(baseline, given, said) | {
    "tokens_per_second": statistics.median(speeds), "passes_per_token": passes / tokens, "tokens": sum(map(len, said)),
  }  # fmt: skip


def upto(row: np.ndarray, llada: lladax.LLaDA) -> list[int]:
  """The ids of a row up to its first EOS, with it."""
  return row[: int(np.argmax(np.append(row == llada.eos_id, True))) + 1].tolist()


def judged(baseline: lladax.LLaDA, given: list[list[int]], said: list[list[int]]) -> dict[str, float]:
  """Bits per byte of what was said under the baseline, and the share of its runs of 4 tokens that are distinct."""
  assert baseline.tokenizer is not None
  nats = -sum(baseline.log_likelihood(given, said))
  texts = (baseline.tokenizer.decode(b, behind=a) for a, b in zip(given, said, strict=True))
  size = sum(len(text.encode()) + 1 for text in texts)  # an EOS counts as a byte
  runs = [tuple(row[i : i + 4]) for row in said for i in range(len(row) - 3)]
  return {"sample_bits_per_byte": nats / math.log(2) / size, "distinct": len(set(runs)) / max(len(runs), 1)}


def table(found: dict[str, Any], text: dict[str, float]) -> list[str]:
  """Markdown: a line for each model, and one for the text itself."""
  rows = [
    "| blocks of | held-out bits per byte | tokens/s, one a pass | bits per byte of it | distinct | passes a token,"
    " up to four a pass | tokens/s | bits per byte of it | distinct |",
    "|---|---|---|---|---|---|---|---|---|",
  ]
  for name, x in found.items():
    bound = f"{x['bits_per_byte']:.3f} ± {x['bits_per_byte_stderr']:.3f}"
    one, more = x["one"], x.get("four")
    cells = [f"{one['tokens_per_second']:,.0f}", f"{one['sample_bits_per_byte']:.2f}", f"{one['distinct']:.0%}"]
    cells += ["", "", "", ""] if more is None else [
      f"{more['passes_per_token']:.2f}", f"{more['tokens_per_second']:,.0f}", f"{more['sample_bits_per_byte']:.2f}",
      f"{more['distinct']:.0%}",
    ]  # fmt: skip
    rows.append(f"| {NAMES.get(name, name)} | {bound} | " + " | ".join(cells) + " |")
  rows.append(f"| the text itself | | | {text['sample_bits_per_byte']:.2f} | {text['distinct']:.0%} | | | | |")
  return rows


def draw(found: dict[str, Any], path: Path, length: int) -> None:
  """Bound against block, and tokens/s against block; the baseline is a line across."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  kinds = {"one": ("one token a pass", "#0072b2", "o"), "four": ("up to four", "#009e73", "s")}
  names = [name for name in found if name != "causal"]
  at = [length if name == "whole" else int(name) for name in names]
  figure, (left, right) = pyplot.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
  error = [found[name]["bits_per_byte_stderr"] for name in names]
  left.errorbar(
    at, [found[name]["bits_per_byte"] for name in names], yerr=error, color="#0072b2", marker="o", capsize=3,
    label="models of blocks",
  )  # fmt: skip
  left.axhline(found["causal"]["bits_per_byte"], color="#d55e00", linestyle="--", label="causal baseline")
  for way, (label, colour, marker) in kinds.items():
    right.plot(at, [found[name][way]["tokens_per_second"] for name in names], marker, ls="-", color=colour, label=label)
  right.axhline(found["causal"]["one"]["tokens_per_second"], color="#d55e00", linestyle="--", label="causal baseline")
  right.set_ylim(bottom=0)
  left.set_ylabel("held-out bits per byte, a bound")
  right.set_ylabel("tokens/s, one row")
  for axes in (left, right):
    axes.set_xscale("log", base=2)
    axes.set_xticks(at, [f"whole\n({x})" if name == "whole" else name for x, name in zip(at, names, strict=True)])
    axes.minorticks_off()
    axes.set_xlabel("tokens of a block")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
  figure.savefig(path, metadata={"Date": None})
  pyplot.close(figure)


if __name__ == "__main__":
  door.keep_freed_memory()
  flags.FLAGS.set_default("config", "blocks")
  app.run(lambda argv: door.guard(main, argv, "blocks"), flags_parser=door.parse)
