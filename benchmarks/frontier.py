"""Quality against speed: one model, one task, many ways to sample; the frontier as a table and a plot.

  python benchmarks/frontier.py --path=runs/gsm8k --task=lladax_gsm8k --data_dir=DIR --limit=64 \
    --gen_length=128 --blocks=16,32,128 --steps=128,64,32 --thresholds=0.9,0.7 --caches=none,prefix,dual

The task is one of the harness's, or of lladax/tasks, that generates text. Each setting answers the same questions: once
for two batches, which compiles its programs, and then all of them. Tokens are counted up to the end of an answer,
forward passes as `nfe`. Writes OUT/frontier.json, frontier.md, frontier.png and frontier.svg, anew after each setting;
settings that are in frontier.json already are not run again.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np

import lladax
from lladax import harness
from lladax import main as door


class Counted:
  """A LLaDA that counts what it generates."""

  def __init__(self, llada: lladax.LLaDA):
    self._llada, self.tokens, self.nfe, self.seconds = llada, 0, 0, 0.0

  def __getattr__(self, name):
    return getattr(self._llada, name)

  def sample(self, prompts, **options):
    """As `LLaDA.sample`."""
    began = time.perf_counter()
    out = self._llada.sample(prompts, **options)
    self.seconds += time.perf_counter() - began
    answers = out.tokens[:, -options["gen_length"] :]
    ended = np.isin(answers, self._llada.ends)
    self.tokens += int(np.where(ended.any(axis=1), ended.argmax(axis=1) + 1, answers.shape[1]).sum())
    self.nfe += out.nfe
    return out


def settings(a: argparse.Namespace) -> list[dict]:
  """The grid: fixed schedules of every length, and thresholds, each with every block and cache."""
  found = []
  for block in a.blocks:
    for cache in a.caches:
      ways = [{"steps": steps} for steps in a.steps] + [{"threshold": x, "steps": a.gen_length} for x in a.thresholds]
      for way in ways:
        name = f"block {block}, " + (f"threshold {way['threshold']}" if "threshold" in way else f"{way['steps']} steps")
        found.append(
          {"name": name + (f", {cache} cache" if cache else ""), "block_length": block, "cache": cache} | way
        )
  return found


def measure(llada: lladax.LLaDA, a: argparse.Namespace, setting: dict) -> dict:
  """Accuracy, tokens per second and forward passes of a setting."""
  options = {name: value for name, value in setting.items() if name != "name"} | {"gen_length": a.gen_length}
  for limit in (2 * a.batch_size, a.limit):
    counted = Counted(llada)
    found = harness.evaluate(
      counted, a.task, data_dir=a.data_dir, limit=limit, batch_size=a.batch_size, early_stop=True, **options
    )
  of = found[a.task]
  metric = a.metric or next(x for x in of if f"{x}_stderr" in of)
  speed = counted.tokens / counted.seconds
  return setting | {"accuracy": of[metric], "stderr": of[f"{metric}_stderr"], "metric": metric,
                    "tokens_per_second": speed, "nfe": counted.nfe, "tokens": counted.tokens}  # fmt: skip


def frontier(found: list[dict]) -> list[dict]:
  """The settings that no other beats in both accuracy and speed, from slow to fast."""
  best, kept = -1.0, []
  for x in sorted(found, key=lambda x: (-x["tokens_per_second"], -x["accuracy"])):
    if x["accuracy"] > best:
      best = x["accuracy"]
      kept.append(x)
  return kept[::-1]


def report(found: list[dict], a: argparse.Namespace) -> None:
  """Writes all four files."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  out, line = Path(a.out), frontier(found)
  out.mkdir(parents=True, exist_ok=True)
  (out / "frontier.json").write_text(json.dumps({"settings": vars(a), "found": found}, indent=1))
  rows = ["| setting | " + found[0]["metric"] + " | tokens/s | forward passes | |", "|---|---|---|---|---|"]
  for x in sorted(found, key=lambda x: -x["tokens_per_second"]):
    score = f"{100 * x['accuracy']:.1f} ± {100 * x['stderr']:.1f}%"
    rows.append(
      f"| {x['name']} | {score} | {x['tokens_per_second']:.1f} | {x['nfe']} | {'frontier' if x in line else ''} |"
    )
  text = f"# {a.task}: quality against speed\n\n![the frontier](frontier.png)\n\n" + "\n".join(rows) + "\n"
  (out / "frontier.md").write_text(text)
  figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
  colours = {None: "#0072b2", "prefix": "#009e73", "dual": "#d55e00"}
  for cache, colour in colours.items():
    of = [x for x in found if x["cache"] == cache]
    if of:
      speed, score, error = ([x[name] for x in of] for name in ("tokens_per_second", "accuracy", "stderr"))
      label = f"{cache} cache" if cache else "no cache"
      axes.errorbar(speed, 100 * np.array(score), 100 * np.array(error), fmt="o", color=colour, label=label, alpha=0.8)
  axes.plot(
    [x["tokens_per_second"] for x in line], [100 * x["accuracy"] for x in line], "--", color="#555555", zorder=0
  )
  for x in line:
    axes.annotate(x["name"], (x["tokens_per_second"], 100 * x["accuracy"]), fontsize=7, xytext=(4, 5),
                  textcoords="offset points")  # fmt: skip
  axes.set(xscale="log", xlabel="tokens per second", ylabel=f"{a.task} {found[0]['metric']}, %")
  axes.legend(frameon=False)
  axes.spines[["top", "right"]].set_visible(False)
  for kind in ("png", "svg"):
    figure.savefig(out / f"frontier.{kind}", dpi=150)
  pyplot.close(figure)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
  """The command line."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  many = {
    "blocks": (int, "32"),
    "steps": (int, "128,64,32"),
    "thresholds": (float, "0.9"),
    "caches": (str, "none,dual"),
  }
  for name, default in (("path", None), ("task", None), ("data_dir", ""), ("out", "runs/frontier"), ("metric", "")):
    parser.add_argument(f"--{name}", default=default, required=default is None)
  for name, default in (("limit", 64), ("batch_size", 8), ("gen_length", 128)):
    parser.add_argument(f"--{name}", type=int, default=default)
  for name, (kind, default) in many.items():
    parser.add_argument(f"--{name}", type=lambda text, kind=kind: [kind(x) for x in text.split(",")], default=default)
  a = parser.parse_args(argv)
  a.caches = [None if cache == "none" else cache for cache in a.caches]
  return a


def main() -> None:
  a = parse()
  llada = lladax.load(a.path)
  path, grid = Path(a.out) / "frontier.json", settings(a)
  found = json.loads(path.read_text())["found"] if path.is_file() else []
  for i, setting in enumerate(grid, start=1):
    if setting["name"] in [x["name"] for x in found]:
      continue
    began = time.monotonic()
    found.append(measure(llada, a, setting))
    report(found, a)
    x = found[-1]
    print(
      f"{i} of {len(grid)}: {x['name']}: {x['metric']} {x['accuracy']:.3f} ± {x['stderr']:.3f},"
      f" {x['tokens_per_second']:.1f} tokens/s, {x['nfe']} passes ({time.monotonic() - began:.0f} s)", flush=True,
    )  # fmt: skip
  print(f"{path.with_suffix('.md')}, .png, .svg, .json")


if __name__ == "__main__":
  door.keep_freed_memory()
  main()
