"""The loop: a step again and again, with its metrics, checkpoints and evaluations, to the last one or to a signal.

It knows neither what the step does nor where its batches come from: what it needs is handed to it as `Work`.

The life of a step: the batch is on the devices -> the step (compiled beforehand, the state donated) -> while it runs,
the next batch is put there and the metrics of the step before are written -> every so often a checkpoint in the
background, and an evaluation.
"""

import contextlib
import ctypes
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from lladax.config import CheckpointConfig, LogConfig
from lladax.devices import distributed
from lladax.devices.interrupts import Interrupt, Stopped
from lladax.storage import checkpoint, metrics, near


class Part(NamedTuple):
  """Steps that one program does."""

  begin: int  # so many steps come before it
  end: int  # so many are done after it
  # Jitted: (state, batch) -> (state, scalars). These are a `loss`, a `grad_norm` and, where a step may change nothing,
  # how many did so (`skipped`), and how many in a `row`.
  step: Any
  flops: float  # of a token


class Work(NamedTuple):
  """What is repeated. A state and a batch are trees of arrays; of what, is the step's own affair."""

  parts: Sequence[Part]  # of the steps start + 1 .. end at least, in order; the same `step` is compiled once
  batches: Iterator[Any]  # on the devices, of the steps start + 1 .. end
  start: int  # so many steps are done
  end: int  # the number of the last one
  tokens: int  # of a batch
  learning_rate: Callable[[int], float]  # of a step
  describe: Callable[[Any, dict[Any, Any]], None]  # is shown (state, compiled by step) before the first one
  to_tree: Callable[[Any], Any]  # what is saved of a state
  evaluate: Callable[[int, Any, Callable[[str], None]], dict[str, float]]  # (steps done, state, beat) -> metrics
  evaluate_every: int  # steps; 0: never
  patience: int = 0  # steps in a row that may be skipped; 0: all
  examples: Callable[[int], str] = "batch {}".format  # of a step, for who looks for what is wrong with them

  def part(self, step: int) -> Part:
    """The one that a step belongs to."""
    return next(x for x in self.parts if step <= x.end)


class Stuck(Exception):
  """The steps up to `step` changed nothing: `Work.patience` in a row, `skipped` in all."""

  def __init__(self, step: int, skipped: int):
    super().__init__(step, skipped)
    self.step, self.skipped = step, skipped


def run(work: Work, state: Any, workdir: Path, checkpoints: CheckpointConfig, log: LogConfig, stop: Interrupt) -> Any:
  """Repeats the step, from `state` on, to the last one or to a signal; returns the last state, which is saved.

  Raises:
    Stuck: too many steps in a row changed nothing.
    Diverged: the state is not all numbers; it is not saved.
    Unsaved: the last step could not be saved.
  """
  watchdog = distributed.Watchdog(log.hang_seconds)
  profiler = metrics.ProfilerWindow(workdir / "profile", log.profile_first, log.profile_last)
  saver = checkpoint.Checkpoints(workdir, keep=checkpoints.keep, keep_every=checkpoints.keep_every)
  nearer = near.Near(checkpoints.near, workdir) if checkpoints.near else None
  journal = _Journal(work, workdir, log)
  done = saved = work.start

  def save():
    nonlocal saved
    if saved < done:
      journal.flush()  # of a run that is stuck nothing more is saved
      watchdog.beat(f"saving step {done}")  # once the one before is saved
      saver.save(done, work.to_tree(state))
      saved = done

  def beat(doing):
    stop.point()
    watchdog.beat(doing)

  with stop.steps(), contextlib.ExitStack() as ends:  # a save that waits is a step still
    ends.callback(watchdog.close)  # in the opposite order
    ends.push(lambda _, error, __: saver.close(error))
    if nearer:
      ends.callback(nearer.wait)
    ends.callback(journal.close)
    ends.callback(profiler.stop)
    ends.callback(watchdog.beat, "finishing the last save")
    try:
      with stop.waiting():
        watchdog.beat("reading the first batch")
        batch = next(work.batches)
        programs = {}
        for step in dict.fromkeys(x.step for x in work.parts if x.end > work.start):  # all now: no phase fails later
          watchdog.beat("compiling the step")
          programs[step] = compiled(step, state, batch)
        work.describe(state, programs)
      for step in range(work.start + 1, work.end + 1):
        beat(f"step {step}")
        profiler.at(step)
        with jax.transfer_guard("disallow"):
          state, scalars = programs[work.part(step).step](state, batch)
        done = step
        try:
          if step < work.end:
            with stop.waiting():
              watchdog.beat(f"reading the batch of step {step + 1}")
              batch = next(work.batches)
        finally:
          watchdog.beat(f"step {step}")
          journal.add(step, scalars)
        if step == work.end or step % checkpoints.every == 0:
          save()
        elif nearer and step % checkpoints.near_every == 0:
          journal.flush()
          watchdog.beat(f"saving step {step} near")
          nearer.save(step, work.to_tree(state))
        if step < work.end and work.evaluate_every and step % work.evaluate_every == 0:
          journal.flush()
          journal.add_held_out(step, work.evaluate(step, state, beat))
    except Stopped:  # between two steps, or within an evaluation, which is left out then
      save()
  if nearer and done == work.end:
    nearer.drop(after=-1)
  return state


def compiled(step: Any, state: Any, batch: Any) -> Any:
  """A jitted step, compiled; what the compiler needed goes back to the system, though glibc is told to keep it.

  On a CPU, where arrays live there too, that is a fifth of the memory of a small run.
  """
  program = step.lower(state, batch).compile()
  with contextlib.suppress(AttributeError, OSError):  # another libc
    ctypes.CDLL(None).malloc_trim(0)
  return program


class _Journal:
  """Writes the metrics of the steps, each while the next one runs."""

  def __init__(self, work: Work, workdir: Path, log: LogConfig):
    self._work, self._workdir, self._log = work, workdir, log
    self._peak = metrics.peak_flops(jax.devices()[0])
    self._ticks = [time.monotonic()]  # when the last steps were done
    self._waiting: tuple[int, Any] | None = None
    self._writer = metrics.Writer(
      workdir, work.end, start=work.start, tensorboard=log.tensorboard, silent=not distributed.is_first()
    )

  def add(self, step: int, scalars: Any) -> None:
    """Takes what a step returns, which may not be there yet, and writes the one before."""
    self.flush()
    self._waiting = step, scalars

  def flush(self) -> None:
    """Waits for the step that was added, and writes it."""
    if self._waiting is None:
      return
    (step, scalars), self._waiting = self._waiting, None
    work, log, ticks = self._work, self._log, self._ticks
    part = work.part(step)
    values = {name: x.item() for name, x in jax.device_get(scalars).items()}
    ticks.append(time.monotonic())
    del ticks[: -min(20, step - part.begin + 1)]  # of the same program
    skipped, row = values.pop("skipped", 0), values.pop("row", 0)
    if row:
      found = ", ".join(f"{name}={values[name]:.4g}" for name in ("loss", "grad_norm"))
      logging.warning("step %d changes nothing (%s; %d so far): %s", step, found, skipped, work.examples(step))
      values = {name: x for name, x in values.items() if math.isfinite(x)} | {"skipped": skipped}
    speed = work.tokens * (len(ticks) - 1) / (ticks[-1] - ticks[0])
    values |= {"learning_rate": work.learning_rate(step), "tokens_per_second": speed}
    if self._peak:
      values["mfu"] = speed * part.flops / (self._peak * jax.device_count())
    if step % log.every == 0 or step == work.end or row:
      shown = step % log.console_every == 0 or step in (work.start + 1, work.end)
      self._writer.write(step, values, console=shown)
    if step == work.start + 1:
      self._writer.restart_clock(step)
    if work.patience and row >= work.patience:
      raise Stuck(step, skipped)

  def add_held_out(self, step: int, values: dict[str, float]) -> None:
    """Writes an evaluation; the time it took is not the next step's."""
    self._writer.write(step, {f"held_out_{name}": value for name, value in values.items()})
    self._ticks[:] = [time.monotonic()]

  def close(self) -> None:
    self._writer.close()
