"""An hour of training, and of sampling from what it saves, side by side: does memory stay where it is?

  pip install -e '.[figures]' && python benchmarks/soak.py --out=runs/soak
  python benchmarks/soak.py --out=/tmp/soak --minutes=2 -- --config.data.batch_size=8

Two processes. One trains the quickstart's model without end, with a checkpoint and an evaluation every 200 steps. The
other samples, streams, infills and scores, in batches of changing size and length, and loads the newest checkpoint
again after every 25 rounds. Their resident memory is read from outside every five seconds, into OUT/soak.jsonl, and
drawn in OUT/soak.svg. Printed are the memory in the middle of the time and at its end (medians of a tenth of it), and
how many steps and rounds there were. What stands behind `--` goes to the training.
"""

import argparse
import json
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

EVERY = 5.0  # seconds


def memory(process: subprocess.Popen) -> float:
  """Resident MiB; of one that has ended, 0."""
  status = Path(f"/proc/{process.pid}/status").read_text()
  return int(next((line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")), 0)) / 1024


def sample(workdir: Path) -> None:
  """Works with the newest checkpoint until it is told to stop; says in a line how often it did."""
  import lladax

  llada: Any = None
  rounds, told = 0, []
  signal.signal(signal.SIGTERM, lambda *_: told.append(True))
  while not told:
    # Not every time: TensorStore 0.1.86 keeps 0.5 MiB of JSON for good whenever a checkpoint of this size is opened.
    llada = llada if rounds % 25 else lladax.load(workdir)
    for n in range(4):
      prompts = ["LATIN SMALL LETTER ", "SIGN OF ", "GREEK "][: n % 3 + 1]
      llada.sample(prompts, gen_length=32, block_length=16, steps=16, seed=rounds + n)
      llada.log_likelihood(prompts, ["A"] * len(prompts), num_samples=8)
    llada.infill("LATIN [MASK][MASK][MASK][MASK] LETTER", steps=4)
    for _ in llada.stream(prompts[0], gen_length=16, block_length=16, steps=8):
      pass
    rounds += 1
  print(rounds, flush=True)


def draw(rows: list[dict[str, float]], path: Path) -> None:
  """Both memories over the time."""
  figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
  for name in ("training", "sampling"):
    axes.plot([row["minutes"] for row in rows], [row[name] for row in rows], label=name)
  axes.set(xlabel="minutes", ylabel="resident memory, MiB", ylim=(0, None))
  axes.spines[["top", "right"]].set_visible(False)
  axes.legend(frameon=False)
  figure.savefig(path, metadata={"Date": None})


def main() -> None:
  """Starts both, looks at them, and stops them."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--out", type=Path, required=True)
  parser.add_argument("--minutes", type=float, default=60.0)
  parser.add_argument("flags", nargs="*", help="of the training, behind --")
  a = parser.parse_args()
  workdir = (a.out / "run").absolute()
  flags = ["--config.steps=1000000", "--config.checkpoint.every=200", "--config.evaluate.every=200"]
  a.out.mkdir(parents=True, exist_ok=True)
  train = [sys.executable, "-m", "lladax.main", "--config=quickstart", f"--workdir={workdir}", *flags, *a.flags]
  rows, processes = [], {}
  with (a.out / "training.log").open("w") as log, (a.out / "soak.jsonl").open("w") as file:
    processes["training"] = subprocess.Popen(train, stderr=log, stdout=log)
    while not [x for x in (workdir / "checkpoints").glob("*") if x.name.isdecimal()]:
      if processes["training"].poll() is not None:
        raise SystemExit(f"the training ended: see {log.name}")
      time.sleep(1)
    code = f"import pathlib, soak; soak.sample(pathlib.Path({str(workdir)!r}))"
    processes["sampling"] = subprocess.Popen(
      [sys.executable, "-c", code], cwd=Path(__file__).parent, stdout=subprocess.PIPE, stderr=log, text=True
    )
    began, said = time.monotonic(), 0.0
    while (minutes := (time.monotonic() - began) / 60) < a.minutes and all(
      x.poll() is None for x in processes.values()
    ):
      rows.append({"minutes": round(minutes, 2)} | {name: round(memory(x), 1) for name, x in processes.items()})
      file.write(json.dumps(rows[-1]) + "\n")
      file.flush()
      if minutes >= said:
        print("  ".join(f"{name} {value:.1f}" for name, value in rows[-1].items()), file=sys.stderr, flush=True)
        said += 5
      time.sleep(EVERY)
  ended = [name for name, x in processes.items() if x.poll() is not None]
  for process in processes.values():
    process.send_signal(signal.SIGTERM)
  rounds = processes["sampling"].communicate()[0].strip()
  processes["training"].wait()
  if ended:
    raise SystemExit(f"{ended[0]} ended by itself: see {a.out / 'training.log'}")
  draw(rows, a.out / "soak.svg")
  steps = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])["step"]
  print(f"{a.minutes:g} minutes: {steps:,} steps, {rounds} rounds of sampling\n")
  print("| | MiB in the middle | at the end |\n|---|---|---|")
  n = max(len(rows) // 10, 1)
  for name in processes:
    middle, end = (statistics.median(row[name] for row in part) for part in (rows[len(rows) // 2 :][:n], rows[-n:]))
    print(f"| {name} | {middle:,.0f} | {end:,.0f} |")


if __name__ == "__main__":
  main()
