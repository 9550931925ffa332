"""The input beside the step that it feeds: tokens per second of the loader alone, and of the train step alone.

  python benchmarks/loader.py --config=configs/quickstart.py [--config.data.corpus=records:FOLDER ...]

Also the time to the first batch of a run, and of one that is continued at step 1,000,000.
"""

import statistics
import tempfile
import time
from pathlib import Path

import jax
from absl import app, flags

from lladax import config as configs
from lladax import main as door
from lladax.data import batches
from lladax.mistake import Mistake
from lladax.training import setup, step

ROUNDS, LOADED, STEPS = 5, 200, 3
MILLION = 1_000_000


def main(_):
  if flags.FLAGS.config is None:
    raise Mistake("--config is missing: name a recipe or a file, as in --config=quickstart")
  config = configs.parse(flags.FLAGS.config.to_dict())
  with tempfile.TemporaryDirectory() as folder:
    run = setup.prepare(config, Path(folder) / "run")
  config = run.config
  tokens = config.data.batch_size * config.data.length

  def read(start):
    return batches.of_steps(
      run.sources, config.data, eos_id=run.text.eos_id, seed=0, steps=2 * MILLION, start=start, stop=2 * MILLION
    )

  first = {}
  for start in (0, MILLION):
    began = time.perf_counter()
    next(read(start))
    first[start] = time.perf_counter() - began

  with jax.set_mesh(run.mesh):
    state = setup.begin(run)
    batch = jax.device_put(next(read(0)), run.batch_sharding)
    compiled = step.jit_step(config, run.tx, run.shardings, mask_id=run.text.mask_id, eos_id=run.text.eos_id)
    compiled = compiled.lower(state, batch).compile()
    state, _ = jax.block_until_ready(compiled(state, batch))
    loader, trainer = [], []
    for _ in range(ROUNDS):
      found, began = read(0), time.perf_counter()
      for _ in range(LOADED):
        next(found)
      loader.append(LOADED * tokens / (time.perf_counter() - began))
      del found
      began = time.perf_counter()
      for _ in range(STEPS):
        state, _ = compiled(state, batch)
      jax.block_until_ready(state)
      trainer.append(STEPS * tokens / (time.perf_counter() - began))
  ratio = statistics.median(a / b for a, b in zip(loader, trainer, strict=True))
  print(
    f"loader {statistics.median(loader):,.0f} tokens/s, train step {statistics.median(trainer):,.0f} tokens/s:", end=""
  )
  print(f" {ratio:,.0f} times; rows of {config.data.length} tokens, {config.data.batch_size} a batch")
  print(", ".join(f"first batch of step {start:,}: {1e3 * seconds:.0f} ms" for start, seconds in first.items()))


if __name__ == "__main__":
  door.keep_freed_memory()
  app.run(lambda argv: door.guard(main, argv, "loader"), flags_parser=door.parse)
