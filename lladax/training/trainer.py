"""A whole training run: everything checked, the step repeated over the corpus, the model judged at the end."""

import functools
import logging
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.table import Table

from lladax import optimizer
from lladax.config import Config
from lladax.data import batches
from lladax.devices import distributed, sharding
from lladax.evaluation import evaluate, held_out
from lladax.inference.llada import LLaDA
from lladax.storage import checkpoint, metrics
from lladax.terminal import Console
from lladax.training import loop
from lladax.training.setup import Run, begin, prepare, restore
from lladax.training.step import State, flops_per_token, frozen_matmuls, jit_step, matmuls, to_tree


def train(config: Config, workdir: str | Path) -> dict[str, float]:
  """Trains up to `config.steps`, from the workdir's last checkpoint if there is one; evaluates at the end.

  Returns:
    The metrics of the last evaluation.

  Raises:
    Mistake, Missing: bad input, one line, before any long work.
    Diverged: the loss is not a number; the last checkpoint is from before.
  """
  began, console = time.monotonic(), distributed.console()
  run = prepare(config, Path(workdir).expanduser())
  config = run.config
  with jax.set_mesh(run.mesh):
    llada = _llada(run, _last_state(run, console))
    bounds = held_out.bound(llada, config) if config.data.held_out else {}
    results = evaluate.report(llada, config, bounds, run.workdir, console)
  console.print(f"done in {metrics.clock(time.monotonic() - began)}; everything is in {run.workdir}")
  return results


def _last_state(run: Run, console: Console) -> State:
  """The state after the last step; of a run that a signal stops there is none: the process ends."""
  config = run.config
  state = restore(run)
  if state:
    console.print(f"continuing from step {int(state.step)} of {run.workdir}")
  else:
    state = begin(run)
  start = int(state.step)
  distributed.agree(checkpoint=str(start))
  if start >= config.steps:
    return state
  with loop.Interrupt() as interrupt:
    state = loop.run(_work(run, start, console), state, run.workdir, config.checkpoint, config.log, interrupt)
  if interrupt.signal:
    console.print(f"stopped by a signal after step {int(state.step)}; the same command continues from there")
    raise SystemExit(128 + interrupt.signal)
  return state


def _work(run: Run, start: int, console: Console) -> loop.Work:
  """The steps that are left of a run, for the loop."""
  config, c = run.config, run.config.data
  rate = jax.jit(optimizer.schedule(config.optimizer, config.steps))
  rows_R = sharding.local_rows(run.batch_sharding["index"], (c.batch_size,))
  read = batches.of_steps(
    run.sources, c, eos_id=run.text.eos_id, seed=config.seed, steps=config.steps, start=start, stop=config.steps,
    rows_R=rows_R,
  )  # fmt: skip

  def bound(state, beat):
    return held_out.bound(_llada(run, state), config, rows=config.evaluate.rows, beat=beat)

  return loop.Work(
    step=jit_step(config, run.tx, run.shardings, mask_id=run.text.mask_id, eos_id=run.text.eos_id),
    batches=map(functools.partial(_put, run.batch_sharding, rows_R, c.batch_size), read),
    start=start, end=config.steps, tokens=c.batch_size * c.length, flops=flops_per_token(config),
    learning_rate=lambda step: float(np.asarray(rate(step - 1))), describe=functools.partial(describe, run, console),
    to_tree=to_tree, evaluate=bound, evaluate_every=config.evaluate.every,
  )  # fmt: skip


def describe(run: Run, console: Console, state: State, compiled: Any) -> None:
  """Prints what is sliced how, the compiled step's memory and the FLOPs formula."""
  config, c = run.config, run.config.model
  axes = " x ".join(f"{name} {size}" for name, size in run.mesh.shape.items() if size > 1)
  title = f"{c.num_params():,} parameters" + (f" on a mesh of {axes}" if axes else "")
  if frozen := c.num_params() - sum(x.size for x in jax.tree.leaves(state.params)):
    kept = f"{c.compute_dtype}" if c.weights == "full" else f"matrices in {c.weights}"
    title += f"; {frozen:,} are frozen ({kept}), and these are trained"
  table = Table("parameter", "letters", "shape", "size", "on a device", title=title, title_justify="left")
  letters = dict(checkpoint.flat(c.letters()))
  for name, x in checkpoint.flat(state.params):
    here = x.sharding.shard_shape(x.shape)
    table.add_row(name, letters[name], "x".join(map(str, x.shape)), f"{x.size:,}", "x".join(map(str, here)))
  console.print(table)
  whole = sharding.replicated(to_tree(state, copy=False), at_least=64 * 2**20)
  if whole and distributed.is_first():
    largest = max(whole, key=lambda x: x[1])
    logging.warning(
      "every device holds %d large arrays in full, %.1f GiB in all, the largest %s: mesh.fsdp slices them",
      len(whole), sum(size for _, size in whole) / 2**30, largest[0],
    )  # fmt: skip
  memory = compiled.memory_analysis()
  if memory:
    parts = {"state and batch": memory.argument_size_in_bytes, "temporaries": memory.temp_size_in_bytes}
    console.print("memory per device: " + ", ".join(f"{name} {size / 2**20:,.1f} MiB" for name, size in parts.items()))
  flops = flops_per_token(config)
  peak = metrics.peak_flops(jax.devices()[0])
  kind = jax.devices()[0].device_kind
  formula = "6 N + 12 L d T" + (f" - 2 x {n:,} frozen" if (n := frozen_matmuls(config)) else "")
  console.print(
    f"{flops / 1e6:,.2f} MFLOP per token = {formula} with N={matmuls(config):,}, L={c.N}, d={c.H * c.K},"
    f" T={config.data.length}; {jax.device_count()} x {kind}, "
    + (f"peak {peak / 1e12:,.0f} TFLOP/s each" if peak else "unknown peak")
  )


def _llada(run: Run, state: State) -> LLaDA:
  c, text = run.config.model, run.text
  params = c.join(state.params, state.frozen)
  return LLaDA(c, params, text, text.mask_id, text.eos_id, text.vocab_size, text.eot_id, text.ends)


def _put(at: dict[str, Any], rows_R: np.ndarray, batch_size: int, batch: batches.Batch) -> dict[str, jax.Array]:
  """This process's rows -> global arrays."""

  def place(where, x):
    def part(index):  # of the batch; its rows are neighbours here, too
      first, end = np.searchsorted(rows_R, index[0].indices(batch_size)[:2])
      return x[(slice(first, end), *index[1:])]

    return jax.make_array_from_callback((batch_size, *x.shape[1:]), where, part)

  return {name: place(at[name], x) for name, x in batch.items()}
