"""Training: one frozen Config, one step, one loop.

The life of a step:

Grain thread: rows of step n -> device_put (sharded) -> train_step (compiled once, state donated) -> while it runs,
the metrics of step n - 1 are written -> every so often an asynchronous checkpoint, the bound on held-out text.
"""

import functools
import logging
import math
import signal
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from rich.console import Console
from rich.table import Table

from lladax import optimizer
from lladax.config import Config
from lladax.data import batches, windows
from lladax.devices import distributed, sharding
from lladax.evaluation import evaluate
from lladax.inference.llada import LLaDA
from lladax.mistake import Diverged
from lladax.storage import checkpoint, metrics
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
  began = time.monotonic()
  console = distributed.console()
  run = prepare(config, Path(workdir).expanduser())
  with jax.set_mesh(run.mesh):
    return _train(run, console, began)


def _train(run: Run, console: Console, began: float) -> dict[str, float]:
  config = run.config
  restored = restore(run)
  if restored:
    console.print(f"continuing from step {int(restored.step)} of {run.workdir}", markup=False)
  state = restored or begin(run)
  del restored
  start = int(state.step)
  distributed.agree(checkpoint=str(start))
  jitted = jit_step(config, run.tx, run.shardings, mask_id=run.text.mask_id, eos_id=run.text.eos_id)
  stop = _Interrupt()
  try:
    if start < config.steps:
      state = _loop(run, state, jitted, start, console, stop)
  finally:
    stop.restore()
  if stop.signal:
    console.print(f"stopped by a signal after step {int(state.step)}; the same command continues from there")
    raise SystemExit(128 + stop.signal)
  llada = _llada(run, state)
  bounds = evaluate.bound(llada, config) if config.data.held_out else {}
  results = evaluate.report(llada, config, bounds, run.workdir, console)
  console.print(f"done in {metrics.clock(time.monotonic() - began)}; everything is in {run.workdir}", markup=False)
  return results


def _loop(run: Run, state: State, jitted: Any, start: int, console: Console, stop: "_Interrupt") -> State:
  config, workdir = run.config, run.workdir
  found = batches.of_steps(
    run.sources, config.data, eos_id=run.text.eos_id, seed=config.seed, steps=config.steps, start=start,
    stop=config.steps, rows_R=sharding.local_rows(run.batch_sharding["index"], (config.data.batch_size,)),
  )  # fmt: skip
  put = functools.partial(_put, run.batch_sharding, config.data.batch_size)
  watchdog = distributed.Watchdog(config.log.hang_seconds)
  watchdog.beat("reading the first batch")
  batch = put(next(found))
  watchdog.beat("compiling the step")
  compiled = jitted.lower(state, batch).compile()
  flops = describe(run, state, compiled, console)
  peak = metrics.peak_flops(jax.devices()[0])
  rate = optimizer.schedule(config.optimizer, config.steps)
  saver = checkpoint.Checkpoints(workdir, keep=config.checkpoint.keep, keep_every=config.checkpoint.keep_every)
  writer = metrics.Writer(
    workdir, config.steps, start=start, tensorboard=config.log.tensorboard, silent=not distributed.is_first()
  )
  profiler = metrics.ProfilerWindow(workdir / "profile", config.log.profile_first, config.log.profile_last)
  tokens = config.data.batch_size * config.data.length
  waiting: tuple[int, Any] | None = None
  ticks = [time.monotonic()]

  def write(step: int, scalars: Any) -> None:
    """Waits for step `step`, and writes it."""
    values = {name: x.item() for name, x in jax.device_get(scalars).items()}
    ticks.append(time.monotonic())
    del ticks[:-20]
    if not all(map(math.isfinite, values.values())):  # the gradient can break before the loss does
      raise Diverged(
        f"loss={values['loss']}, grad_norm={values['grad_norm']} at step {step}: start again in another workdir with"
        f" a lower learning rate; the checkpoints in {workdir} are from before"
      )
    speed = tokens * (len(ticks) - 1) / (ticks[-1] - ticks[0])
    values |= {"learning_rate": float(np.asarray(rate(step - 1))), "tokens_per_second": speed}
    if peak:
      values["mfu"] = speed * flops / (peak * jax.device_count())
    if step % config.log.every == 0 or step == config.steps:
      shown = step % config.log.console_every == 0 or step in (start + 1, config.steps)
      writer.write(step, values, console=shown)
    if step == start + 1:
      writer.restart_clock(step)

  try:
    for step in range(start + 1, config.steps + 1):
      watchdog.beat(f"step {step}")
      profiler.at(step)
      with jax.transfer_guard("disallow"):
        state, scalars = compiled(state, batch)
      if step < config.steps:
        batch = put(next(found))
      if waiting:
        write(*waiting)
      waiting = (step, scalars)
      last = step == config.steps or stop.at(step)
      saves = last or step % config.checkpoint.every == 0
      evaluates = not last and config.evaluate.every and step % config.evaluate.every == 0
      if saves or evaluates:
        write(*waiting)  # a state that is not a number is never saved
        waiting = None
      if saves:
        watchdog.beat(f"saving step {step}")  # once the one before is saved
        saver.save(step, to_tree(state))
      if last:
        break
      if evaluates:
        values = evaluate.bound(_llada(run, state), config, rows=config.evaluate.rows, beat=watchdog.beat)
        writer.write(step, {f"held_out_{name}": value for name, value in values.items()})
        ticks[:] = [time.monotonic()]
  finally:
    watchdog.close()
    profiler.stop()
    saver.close()
    writer.close()
  return state


def describe(run: Run, state: State, compiled: Any, console: Console) -> float:
  """Prints what is sliced how, the compiled step's memory and the FLOPs formula; returns FLOPs per token."""
  config, c = run.config, run.config.model
  axes = " x ".join(f"{name} {size}" for name, size in run.mesh.shape.items() if size > 1)
  title = f"{c.num_params():,} parameters" + (f" on a mesh of {axes}" if axes else "")
  if frozen := sum(x.size for x in jax.tree.leaves(state.frozen)):
    title += f"; {frozen:,} are frozen ({next(iter(jax.tree.leaves(state.frozen))).dtype}), and these are trained"
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
  return flops


def _llada(run: Run, state: State) -> LLaDA:
  c, text = run.config.model, run.text
  params = c.join(state.params, state.frozen)
  return LLaDA(c, params, text, text.mask_id, text.eos_id, text.vocab_size, text.eot_id, text.ends)


def _put(at: dict[str, Any], batch_size: int, batch: windows.Batch) -> dict[str, jax.Array]:
  """This process's rows -> global arrays."""
  rows = sharding.local_rows(at["index"], (batch_size,))

  def place(where, x):
    def part(index):  # of the batch; its rows are neighbours here, too
      first, end = np.searchsorted(rows, index[0].indices(batch_size)[:2])
      return x[(slice(first, end), *index[1:])]

    return jax.make_array_from_callback((batch_size, *x.shape[1:]), where, part)

  return {name: place(at[name], x) for name, x in batch.items()}


class _Interrupt:
  """Ctrl-C and SIGTERM (preemption) end the run after the current step, with a checkpoint; a second one ends it.

  Of several processes one may be told alone: JAX's runtime listens for SIGTERM then, and names a step to all.
  """

  def __init__(self):
    self.signal = 0
    self._old: dict[int, Any] = {}
    if jax.process_count() > 1:
      return
    for number in (signal.SIGINT, signal.SIGTERM):
      try:
        self._old[number] = signal.signal(number, self._note)
      except ValueError:  # not the main thread (a notebook kernel may run us elsewhere)
        return

  def at(self, step: int) -> bool:
    """Whether this step is the last."""
    if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
      self.signal = signal.SIGTERM
    return bool(self.signal)

  def _note(self, number: int, frame: Any) -> None:
    self.signal = number
    signal.signal(number, self._old[number])

  def restore(self) -> None:
    """Signals mean again what they meant before the run."""
    for number, handler in self._old.items():
      signal.signal(number, handler)
