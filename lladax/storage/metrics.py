"""Numbers out: console, metrics.jsonl, TensorBoard; throughput and model FLOPs utilisation; the profiler window."""

import contextlib
import io
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import jax
from rich.text import Text
from tensorboardX import event_file_writer, summary
from tensorboardX.proto import event_pb2 as _generated

from lladax.storage.writing import leniently
from lladax.terminal import Console

# Dense bfloat16 peak in FLOP/s per device (of a T4, which has none, float16), summed up in float32, from the makers'
# data sheets; the first key that is part of `device_kind`.
# A v5p calls itself "TPU v5"; a TPU7x has two devices a chip.
PEAK_FLOPS = {
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5": 459e12,
  "TPU v6 lite": 918e12,
  "TPU7x": 2307e12 / 2,
  "A100": 312e12,
  "H100": 989e12,
  "H200": 989e12,
  "B200": 2250e12,
  "Tesla T4": 65e12,
  "NVIDIA L40S": 362e12,  # before the L4
  "NVIDIA L40": 181e12,
  "NVIDIA L4": 121e12,
  "RTX 4090": 165.2e12,
}

event_pb2: Any = _generated  # its classes are made when it is loaded


def peak_flops(device: jax.Device) -> float | None:
  """Peak dense bfloat16 FLOP/s of a device, None if unknown (a CPU)."""
  return next((peak for kind, peak in PEAK_FLOPS.items() if kind in device.device_kind), None)


def flops_per_token(num_params: int, layers: int, width: int, length: int, frozen: int = 0) -> float:
  """Model FLOPs of a training step per token: 6 N + 12 L d T, less 2 for each frozen parameter, which has no gradient.

  6 for each of the N parameters in a matmul (head included, embedding look-up not), and 12 x layers x attention
  width x length for attention, which is bidirectional and counted in full. Recomputation is not counted.
  """
  return 6.0 * num_params - 2.0 * frozen + 12.0 * layers * width * length


class Writer:
  """Writes one object a line to WORKDIR/metrics.jsonl, scalars to TensorBoard, and a line to the console.

  What cannot be written is said once; a run never ends by it.
  """

  def __init__(
    self, workdir: Path, total_steps: int, *, start: int = 0, tensorboard: bool = True, silent: bool = False
  ):
    """Continues after step `start`: later lines, from a run that was cut off, are dropped. `silent`: does nothing."""
    self._silent = silent
    if silent:
      return
    self._path, self._file = workdir / "metrics.jsonl", None
    self._board_path, self._board = workdir / "tensorboard", None
    with leniently(self._path):
      workdir.mkdir(parents=True, exist_ok=True)
      kept = [row for row in read(self._path) if row["step"] <= start]
      shorter = self._path.with_suffix(".new")
      shorter.write_text("".join(json.dumps(row) + "\n" for row in kept))
      shorter.replace(self._path)  # at once: a run may be killed here
    with leniently(self._path):
      self._file = self._path.open("a")
    if tensorboard:
      with leniently(self._board_path):
        self._board_path.mkdir(exist_ok=True)
        self._board = _Board(self._board_path, start)
    self._console = Console(file=sys.stderr, soft_wrap=True)
    self._total, self._first, self._began = total_steps, start, time.monotonic()

  def write(self, step: int, scalars: dict[str, Any], *, console: bool = True) -> None:
    """Records `scalars` (floats, or strings for the file and the console alone) at `step`."""
    if self._silent:
      return
    if self._file:
      with leniently(self._path):  # what a full disk does not take waits for room
        self._file.write(json.dumps({"step": step} | scalars) + "\n")
        self._file.flush()
    if self._board:
      with leniently(self._board_path):
        self._board.write(step, {name: x for name, x in scalars.items() if isinstance(x, int | float)})
    if console:
      with leniently(Path("the console")):
        progress = (f"step {step}/{self._total}", "bold"), f"  {_line(scalars)}  ", (self._left(step), "dim")
        self._console.print(Text.assemble(*progress))

  def _left(self, step: int) -> str:
    """Time left, from the pace since the first step was written."""
    if step <= self._first or step >= self._total:
      return ""
    pace = (time.monotonic() - self._began) / (step - self._first)
    return f"{clock(pace * (self._total - step))} left"

  def restart_clock(self, step: int) -> None:
    """Time before now (compilation) does not count towards the pace."""
    self._first, self._began = step, time.monotonic()

  def close(self) -> None:
    """Flushes and closes all files."""
    if self._silent:
      return
    for path, file in ((self._path, self._file), (self._board_path, self._board)):
      if file:
        with leniently(path):
          file.close()


class _Board:
  """TensorBoard's file, written where it is called: tensorboardX's own thread dies of a full disk, and its queue hangs.

  Args:
    folder: for the file.
    start: what earlier files hold of later steps is forgotten.
  """

  def __init__(self, folder: Path, start: int):
    self._file = event_file_writer.EventsWriter(str(folder / "events"))
    begin = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._file.write_event(event_pb2.Event(wall_time=time.time(), step=start + 1, session_log=begin))

  def write(self, step: int, scalars: dict[str, float]) -> None:
    for name, value in scalars.items():
      event = event_pb2.Event(wall_time=time.time(), step=step, summary=summary.scalar(name, value))
      self._file.write_event(event)
    self._file.flush()

  def close(self) -> None:
    self._file.close()


class ProfilerWindow:
  """Traces the steps first .. last - 1 into WORKDIR/profile, for TensorBoard or Perfetto."""

  def __init__(self, folder: Path, first: int, last: int):
    self._folder, self._first, self._last, self._running = folder, first, last, False

  def at(self, step: int) -> None:
    """Call before each step; starts and stops the trace."""
    if not self._running and self._first <= step < self._last:
      with leniently(self._folder, RuntimeError):
        jax.profiler.start_trace(str(self._folder))
        self._running = True
    elif self._running and step >= self._last:
      self.stop()

  def stop(self) -> None:
    """Ends a trace that is still running."""
    if self._running:
      self._running = False
      with leniently(self._folder, RuntimeError):  # by XLA, what a disk refuses
        jax.profiler.stop_trace()


_LONGEST = 2**20  # bytes of a line


def read(path: Path) -> list[dict[str, Any]]:
  """The records of a file of one object a line, each with its "step"; of a file that is not there, none.

  A run that was killed, or a full disk, leaves a line torn: what cannot be read is left out, and said.
  """
  rows, torn = [], []
  with path.open("rb") if path.is_file() else contextlib.nullcontext(io.BytesIO()) as file:
    for number, line in enumerate(iter(lambda: file.readline(_LONGEST), b""), start=1):  # a longer one is torn
      row = _record(line)
      if row is not None:
        rows.append(row)
      elif line.strip():
        torn.append(number)
  if torn:
    more = f" and {len(torn) - 3} others" if len(torn) > 3 else ""
    logging.warning("%s: torn, and left out: line %s%s", path, ", ".join(map(str, torn[:3])), more)
  return rows


def _record(line: bytes) -> dict[str, Any] | None:
  try:
    row = json.loads(line)
  except (ValueError, RecursionError):  # of UTF-8, too
    return None
  return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def append(path: Path, row: dict[str, Any]) -> None:
  """Adds a record to such a file, in a line of its own even if the last one is torn."""
  with path.open("a+b") as file:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - 1, 0))
    torn = file.read(1) not in (b"", b"\n")
    file.write(b"\n" * torn + json.dumps(row).encode() + b"\n")


def losses(workdir: Path) -> list[tuple[int, float]]:
  """(step, loss) of the lines of metrics.jsonl."""
  return [(row["step"], row["loss"]) for row in read(workdir / "metrics.jsonl") if "loss" in row]


def clock(seconds: float) -> str:
  """3723 -> "1h02m"; 83 -> "1m23s"."""
  hours, minutes, rest = int(seconds) // 3600, int(seconds) // 60 % 60, int(seconds) % 60
  if hours:
    return f"{hours}h{minutes:02}m"
  return f"{minutes}m{rest:02}s" if minutes else f"{rest}s"


def _line(scalars: dict[str, Any]) -> str:
  def number(value):
    if not isinstance(value, float):
      return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"

  return "  ".join(f"{name} {number(value)}" for name, value in scalars.items())
