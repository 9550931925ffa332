"""A whole training run: everything checked, the step repeated over the corpus, the model judged at the end."""

import functools
import logging
import os
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from rich.table import Table

from lladax import address, optimizer
from lladax.config import Config, block_words
from lladax.data import batches
from lladax.devices import distributed, sharding
from lladax.devices.interrupts import Interrupt
from lladax.evaluation import evaluate, held_out
from lladax.inference.llada import LLaDA
from lladax.mistake import Diverged, Unsaved
from lladax.storage import checkpoint, metrics, near
from lladax.terminal import Console
from lladax.training import loop
from lladax.training.setup import Run, begin, prepare, restore
from lladax.training.step import State, flops_per_token, frozen_matmuls, jit_step, matmuls, to_tree


def train(config: Config, workdir: str | os.PathLike, allow: Sequence[str] = ()) -> dict[str, float]:
  """Trains up to `config.steps`, from the workdir's last checkpoint if there is one; evaluates at the end.

  The fields of `allow` may be other than the run in the workdir has had.

  Returns:
    The metrics of the last evaluation.

  Raises:
    Mistake, Missing: bad input, one line, before any long work.
    Diverged: the loss is not a number, again and again; the last checkpoint is from before.
    Unsaved: the last step could not be saved.
  """
  began = time.monotonic()
  with Interrupt() as stop:
    console = distributed.console()  # the first to ask JAX, which waits for the other processes
    run = prepare(config, address.mirror(workdir), allow)
    config = run.config
    with jax.set_mesh(run.mesh):
      llada = _llada(run, _last_state(run, stop, console), config.steps)
      bounds = held_out.bound(llada, config) if config.data.held_out else {}
      try:
        results = evaluate.report(llada, config, bounds, run.workdir, console)
      finally:
        if distributed.is_first():
          address.push(run.workdir, must=False)
  console.print(f"done in {metrics.clock(time.monotonic() - began)}; everything is in {address.of(run.workdir)}")
  return results


def _last_state(run: Run, stop: Interrupt, console: Console) -> State:
  """The state after the last step; of a run that a signal stops there is none: the process ends."""
  config = run.config
  state = _first_state(run, console)
  while (start := int(state.step)) < config.steps:
    guard = {name: int(x) for name, x in state.guard.items() if name in ("returns", "ahead")}
    try:
      work = _work(run, start, guard["ahead"], console)
      state = loop.run(work, state, run.workdir, config.checkpoint, config.log, stop)
      break
    except loop.Stuck as stuck:
      del state  # the arrays are the step's, and gone
      state = _go_back(run, stuck, **guard, console=console)
    except Unsaved as error:
      if not stop.signal:
        raise
      logging.warning("%s", error)  # somewhere else it may go on from the checkpoint before
      raise SystemExit(128 + stop.signal) from None
  if stop.signal:
    console.print(f"stopped by a signal after step {int(state.step)}; the same command continues from there")
    raise SystemExit(128 + stop.signal)
  return state


def _first_state(run: Run, console: Console) -> State:
  """The state of the last checkpoint, or of step 0."""
  state = restore(run)
  if state:
    console.print(f"continuing from step {int(state.step)} of {address.of(run.workdir)}")
  else:
    state = begin(run)
  distributed.agree(checkpoint=str(int(state.step)))
  return state


def _go_back(run: Run, stuck: loop.Stuck, *, returns: int, ahead: int, console: Console) -> State:
  """The state of the last checkpoint before the steps that changed nothing, which goes on behind their examples.

  Raises:
    Diverged: it has been so `guard.returns` times.
  """
  c, first = run.config.guard, stuck.step - run.config.guard.patience + 1
  where = f"the steps {first} to {stuck.step} had a loss or a gradient that is not a number, or is a spike"
  if returns >= c.returns:
    raise Diverged(
      f"{where}, and the run went back {returns} times (guard.returns): start again in another workdir with a lower"
      f" learning rate; the checkpoints in {run.workdir} are from before"
    )
  steps, usual = checkpoint.steps(run.workdir), run.config.checkpoint.every
  # Rather not one that a signal left: the same steps, interrupted or not. What others rest on stays.
  target = max((s for s in steps if s < first), key=lambda s: (s % usual == 0, s), default=0)
  target = max([target, *(s for s in steps if checkpoint.needed(run.workdir, s))])
  checkpoint.drop(run.workdir, after=target)
  if folder := run.config.checkpoint.near:
    near.Near(folder, run.workdir).drop(after=target)
  console.print(f"{where}: back to step {target}, and past their examples")
  state = _first_state(run, console)
  known = {"returns": returns + 1, "ahead": ahead + stuck.step - int(state.step), "skipped": stuck.skipped, "row": 0}
  put = {name: jax.device_put(np.int32(x), run.shardings.guard[name]) for name, x in known.items()}
  return state._replace(guard=state.guard | put)


def _work(run: Run, start: int, ahead: int, console: Console) -> loop.Work:
  """The steps that are left of a run, for the loop; its batches are `ahead` of it."""
  config, c = run.config, run.config.data
  rate = jax.jit(optimizer.schedule(config.optimizer, config.steps))
  rows_R = sharding.local_rows(run.batch_sharding["index"], (c.batch_size,))
  read = batches.of_steps(
    run.sources, c, eos_id=run.text.eos_id, seed=config.seed, steps=config.steps, start=start + ahead,
    stop=config.steps + ahead, rows_R=rows_R,
  )  # fmt: skip

  def bound(step, state, beat):
    return held_out.bound(_llada(run, state, step), config, rows=config.evaluate.rows, beat=beat)

  def examples(step):
    first = (step - 1 + ahead) * c.batch_size
    return f"the examples {first} to {first + c.batch_size - 1} of the data's order"

  ids = {"mask_id": run.text.mask_id, "eos_id": run.text.eos_id, "vocab_size": run.text.vocab_size}
  of_block = {block: config.of_block(block) for block in dict.fromkeys(x.block for x in config.phases if x.end > start)}
  steps = {block: jit_step(c, run.tx, run.shardings, **ids) for block, c in of_block.items()}

  def show(state, programs):
    describe(run, console, state, {block: programs[step] for block, step in steps.items()})

  return loop.Work(
    parts=[
      loop.Part(x.begin, x.end, steps[x.block], flops_per_token(of_block[x.block]))
      for x in config.phases if x.end > start
    ],
    batches=map(functools.partial(_put, run.batch_sharding, rows_R, c.batch_size), read),
    start=start, end=config.steps, tokens=c.batch_size * c.length,
    learning_rate=lambda step: float(np.asarray(rate(step - 1))), describe=show,
    to_tree=to_tree, evaluate=bound, evaluate_every=config.evaluate.every, patience=config.guard.patience,
    examples=examples,
  )  # fmt: skip


def describe(run: Run, console: Console, state: State, programs: dict[int, Any]) -> None:
  """Prints what is sliced how, and of the compiled steps, by their block, the memory and the FLOPs formula."""
  config, c = run.config, run.config.model
  axes = " x ".join(f"{name} {size}" for name, size in run.mesh.shape.items() if size > 1)
  title = f"{c.num_params():,} parameters" + (f" on a mesh of {axes}" if axes else "")
  if frozen := c.num_params() - sum(x.size for x in jax.tree.leaves(state.params)) if c.lora_rank else 0:
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
  if config.noise.blocks and not c.causal:
    begins = ", ".join(f"{block_words(x.block)} from step {x.begin + 1} on" for x in config.phases)
    console.print(f"{begins}: {len(programs)} programs of the steps that are left, all compiled")
  for block, compiled in programs.items():
    said = f" with {block_words(block)}" * (len(config.phases) > 1)
    memory = compiled.memory_analysis()
    if memory:
      parts = {"state and batch": memory.argument_size_in_bytes, "temporaries": memory.temp_size_in_bytes}
      sizes = ", ".join(f"{name} {size / 2**20:,.1f} MiB" for name, size in parts.items())
      console.print(f"memory per device{said}: {sizes}")
    flops = flops_per_token(config.of_block(block))
    console.print(f"{flops / 1e6:,.2f} MFLOP per token{said} = {_formula(config, block)}")
  peak, kind = metrics.peak_flops(jax.devices()[0]), jax.devices()[0].device_kind
  head = f", h={c.V * c.D:,}" * any(programs)
  console.print(
    f"N={matmuls(config):,}{head}, L={c.N}, d={c.H * c.K}, T={config.data.length}; {jax.device_count()} x {kind}, "
    + (f"peak {peak / 1e12:,.0f} TFLOP/s each" if peak else "unknown peak")
  )


def _formula(config: Config, block: int) -> str:
  """`flops_per_token` in words; h are the head's parameters."""
  n, twice = frozen_matmuls(config), config.noise.complements and not config.model.causal
  formula = f"6 (2 N - h) + 12 L d (T + {block})" if block else "6 N + 12 L d T"
  if n:
    formula += f" - 2 x {2 * n - config.model.V * config.model.D if block else n:,} frozen"
  return f"2 ({formula})" if twice else formula


def _llada(run: Run, state: State, step: int) -> LLaDA:
  """The model of a state, with the block of its phase."""
  c, text = run.config.at(step).model, run.text
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
