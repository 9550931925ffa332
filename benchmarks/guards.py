"""What trust costs: a step with its guard and without, a save and a restore with digests and without, taking turns.

  python benchmarks/guards.py                                        # a model of 107M parameters, on a CPU
  python benchmarks/guards.py --B 1 --L 64 --V 1024 --D 192 --N 6 --H 6 --F 512 --folder=/tmp   # a small one

Without its guard a step makes its update whatever the loss is, as if `judge` always said yes: XLA takes the choice out
of the program. Without digests, arrays are neither summed nor looked through for what is not a number. All of it runs
in one process, in turn; quoted are medians, and the median of the ratios of a round. A save is timed until it is on the
disk (`fsync` is the system's affair), and until training would go on.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import cpu
import jax

from lladax.storage import checkpoint, digest
from lladax.training import step

Times = list[tuple[float, float]]


def seconds(call: Callable[[], Any]) -> float:
  """How long a call takes, its result included."""
  began = time.perf_counter()
  jax.block_until_ready(call())
  return time.perf_counter() - began


def steps(a: dict[str, Any], rounds: int) -> tuple[Times, step.State]:
  """(seconds of a step with and without its guard, round by round; the state after them)."""
  jitted, state, batch = cpu._lladax_step(a, exact=False)
  guarded = jitted.lower(state, batch).compile()
  with mock.patch.object(step, "judge", lambda guard, *_: (True, guard)):
    bare = cpu._lladax_step(a, exact=False)[0].lower(state, batch).compile()
  found = []

  def update(program):
    nonlocal state
    state, scalars = program(state, batch)
    return state, scalars

  for _ in range(rounds + 1):
    found.append((seconds(lambda: update(guarded)), seconds(lambda: update(bare))))
  return found[1:], state


def saves(tree: checkpoint.Tree, folder: str, rounds: int) -> dict[str, Times]:
  """(seconds with and without digests), round by round, of what a checkpoint does."""
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
  found: dict[str, list[list[float]]] = {name: [] for name in ("a save", "until training goes on", "a restore")}
  for _ in range(rounds + 1):
    pairs: dict[str, list[float]] = {name: [] for name in found}
    for digests in (digest.of, lambda arrays: ({}, [])):
      with tempfile.TemporaryDirectory(dir=folder) as name, mock.patch.object(digest, "of", digests):
        workdir, began = Path(name), time.perf_counter()
        (workdir / "config.json").touch()
        saver = checkpoint.Checkpoints(workdir)
        saver.save(1, tree)
        pairs["until training goes on"].append(time.perf_counter() - began)
        saver.close()
        pairs["a save"].append(time.perf_counter() - began)
        pairs["a restore"].append(seconds(lambda workdir=workdir: checkpoint.restore(workdir, 1, abstract)))
    for what, pair in pairs.items():
      found[what].append(pair)
  return {what: [(x, y) for x, y in pairs[1:]] for what, pairs in found.items()}


def main() -> None:
  """Prints one table."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--rounds", type=int, default=9)
  parser.add_argument("--folder", default=".", help="where checkpoints are written")
  sizes = {"V": 32768, "D": 768, "N": 8, "H": 12, "K": 64, "F": 2048, "B": 4, "L": 256}
  for name, default in sizes.items():
    parser.add_argument(f"--{name}", type=int, default=default)
  a = vars(parser.parse_args())
  found, state = steps(a, a["rounds"])
  tree = step.to_tree(state, copy=False)
  size = sum(x.nbytes for x in jax.tree.leaves(tree)) / 2**30
  times = {"a step": found, **saves(tree, a["folder"], a["rounds"])}
  print(f"\n{a['rounds']} rounds; the state is {size:.2f} GiB on {jax.devices()[0].device_kind}\n")
  print("| | with, s | without, s | ratio |\n|---|---|---|---|")
  for name, pairs in times.items():
    ratio = statistics.median(x / y for x, y in pairs)
    print("| {} | {:.3f} | {:.3f} | {:.3f} |".format(name, *map(statistics.median, zip(*pairs, strict=True)), ratio))


if __name__ == "__main__":
  main()
