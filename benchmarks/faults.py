"""Faults injected into short runs, and what became of them: kills, corrupted files, stalls, NaNs, full disks.

python benchmarks/faults.py                             # some ten minutes on two cores
python benchmarks/faults.py --kills=10 --corruptions=20 --seed=1 --only=kills,corruptions

Every run is a process of its own, forked from this one, which has imported everything (that takes longer than the run),
and goes through the door of the command line; of two processes the second finds the first by --coordinator. A run is
killed at moments that the seed draws, some anywhere, some aimed at a save, the compilation or an evaluation; the same
command is given again until it is done; then its parameters, Adam's moments and its losses are compared, bit for bit,
with those of a run that nobody disturbed. The table goes to stdout, the progress to stderr.
"""

import argparse
import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

STEPS, EVERY, EVALUATE = 16, 4, 8
PATIENCE = 120  # seconds for what should end by itself
HUNG = 75
FIELDS = {
  "steps": STEPS, "model.D": 32, "model.N": 2, "model.H": 2, "model.G": 2, "model.K": 16, "model.F": 64,
  "tokenizer.kind": "bytes", "data.length": 16, "data.batch_size": 16, "data.held_out": 0.1,
  "optimizer.schedule": ((4, 0.01), (-1, 0.01)), "checkpoint.every": EVERY, "evaluate.num_samples": 2,
  "evaluate.every": EVALUATE, "evaluate.batch_size": 4, "log.tensorboard": False,
}  # fmt: skip


class Job:
  """A run of one process or more, each a fork of this one."""

  def __init__(self, workdir: Path, corpus: Path, processes: int, *, before: Callable[[], Any] | None = None, **fields):
    self.workdir, self.log = workdir, workdir.with_suffix(".log")
    values = FIELDS | {"data.corpus": f"files:{corpus}"} | {name.replace("__", "."): x for name, x in fields.items()}
    flags = ["--config=base", f"--workdir={workdir}", *(f"--config.{name}={x}" for name, x in values.items())]
    if processes > 1:
      with socket.socket() as free:
        free.bind(("localhost", 0))
        flags += [f"--coordinator=localhost:{free.getsockname()[1]}", f"--num_processes={processes}"]
    self.log.write_bytes(b"")
    self.began = time.monotonic()
    self.pids = [
      fork(lambda i=i: train([*flags, *[f"--process_id={i}"] * (processes > 1)], before), self.log)
      for i in range(processes)
    ]
    self.codes: dict[int, int] = {}

  def ended(self) -> bool:
    """Whether all have."""
    for pid in self.pids:
      if pid not in self.codes:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
          self.codes[pid] = os.waitstatus_to_exitcode(status)
    return len(self.codes) == len(self.pids)

  def finish(self, patience: float = PATIENCE) -> list[int | None]:
    """The exit codes; None of one that had to be killed."""
    end = time.monotonic() + patience
    while not self.ended() and time.monotonic() < end:
      time.sleep(0.005)
    left = [pid for pid in self.pids if pid not in self.codes]
    for pid in left:
      os.kill(pid, signal.SIGKILL)
      os.waitpid(pid, 0)
    return [self.codes.get(pid) for pid in self.pids]

  def said(self) -> str:
    """Its output."""
    return self.log.read_text("utf-8", "replace")


def fork(act: Callable[[], Any], log: Path) -> int:
  """Calls `act` in a child, with its output in a file; returns its pid."""
  sys.stdout.flush()
  if pid := os.fork():
    return pid
  code = 70
  try:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background of a script ignores it
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    code = act() or 0
  except SystemExit as error:
    code = error.code if isinstance(error.code, int) else 1
  except KeyboardInterrupt:
    code = 128 + signal.SIGINT
  except BaseException:
    traceback.print_exc()
  finally:
    sys.stdout.flush()
    sys.stderr.flush()
    if "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized():
      sys.modules["jax"].distributed.shutdown()  # as the interpreter does on its way out: the coordinator goes last
    os._exit(int(code))


def train(flags: list[str], before: Callable[[], Any] | None) -> None:
  """What the console script does."""
  from lladax import main

  sys.argv = ["lladax", *flags]
  if before:
    before()
  main.run()


def ask(act: Callable[[], Any], folder: Path) -> Any:
  """What `act` returns in a child: JAX's backend is never started here, or no child could start its own."""
  answer = folder / "answer.json"
  answer.unlink(missing_ok=True)
  pid = fork(lambda: answer.write_text(json.dumps(act())) and 0, folder / "answer.log")
  os.waitpid(pid, 0)
  if not answer.exists():
    sys.exit((folder / "answer.log").read_text())
  return json.loads(answer.read_text())


def abstract(workdir: Path, step: int) -> Any:
  """The tree of a checkpoint as `restore` wants it, on the first device."""
  import jax

  from lladax.storage import checkpoint

  here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), checkpoint.metadata(workdir, step)
  )


def bits(tree: Any) -> str:
  """A digest of all arrays, by a function that is not the package's own."""
  import numpy as np

  from lladax.storage import checkpoint

  found = hashlib.sha256()
  for name, x in sorted(checkpoint.flat(tree)):
    found.update(name.encode() + np.asarray(x).tobytes())
  return found.hexdigest()


def outcome(workdir: Path) -> dict[str, Any]:
  """Of a run that is done: the bits of its last checkpoint, and its losses."""
  from lladax.storage import checkpoint

  last = checkpoint.steps(workdir)[-1]
  step, tree = checkpoint.restore_latest(workdir, abstract(workdir, last), set_aside=False) or (0, {})
  return {"step": step, "bits": bits(tree), "losses": losses(workdir)}


def lines(workdir: Path) -> list[dict[str, Any]]:
  path = workdir / "metrics.jsonl"
  if not path.exists():
    return []
  return [json.loads(x) for x in path.read_text().splitlines(keepends=True) if x.endswith("\n")]


def losses(workdir: Path) -> list[list[Any]]:
  return [[x["step"], x["loss"], x.get("grad_norm")] for x in lines(workdir) if "loss" in x]


def saved(workdir: Path) -> int:
  """The step of the last whole checkpoint."""
  folder = workdir / "checkpoints"
  return max((int(x.name) for x in folder.iterdir() if x.name.isdecimal()), default=0) if folder.is_dir() else 0


def unfinished(workdir: Path) -> list[str]:
  """Checkpoints that were being written when the run ended."""
  folder = workdir / "checkpoints"
  return [x.name for x in folder.iterdir() if "orbax-checkpoint-tmp" in x.name] if folder.is_dir() else []


# The moments: each waits for a state of the workdir, or for the end of the run.


def _at_a_save(job: Job, draw: random.Random) -> float:
  number, folder = draw.randint(1, 3), job.workdir / "checkpoints"
  seen: set[str] = set()
  while len(seen) < number and not job.ended():
    with contextlib.suppress(OSError):
      seen |= {x for x in os.listdir(folder) if "tmp" in x}
    time.sleep(0.0002)
  return draw.choice([0.0, draw.uniform(0, 0.005), draw.uniform(0, 0.05)])


def _at_the_compilation(job: Job, draw: random.Random) -> float:
  while not (job.workdir / "config.json").exists() and not job.ended():
    time.sleep(0.001)
  return draw.uniform(0, 1.0)


def _at_an_evaluation(job: Job, draw: random.Random) -> float:
  step = draw.choice(range(EVALUATE, STEPS + 1, EVALUATE))  # of the last step: the one at the end
  while not job.ended():
    found = lines(job.workdir)
    if any(x["step"] >= step and "loss" in x for x in found):
      break
    time.sleep(0.001)
  return draw.uniform(0, 0.1)


def _anywhere(job: Job, draw: random.Random) -> float:
  return draw.uniform(0, 1.1 * SECONDS[len(job.pids)])


SECONDS: dict[int, float] = {}  # of an undisturbed run, by its number of processes
MOMENTS = {
  "anywhere": _anywhere, "save": _at_a_save, "compilation": _at_the_compilation, "evaluation": _at_an_evaluation
}  # fmt: skip


@dataclasses.dataclass
class Row:
  """A line of the table."""

  times: int = 0
  moments: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  told: collections.Counter = dataclasses.field(default_factory=collections.Counter)  # what happened: how often
  lost: int = 0  # steps that a signal lost (SIGTERM, SIGINT: none may be)
  again: int = 0  # steps that were made again, after what cannot be answered (SIGKILL)
  wrong: int = 0  # runs that ended with other parameters, moments or losses
  unreadable: int = 0  # workdirs with which the same command, or a reader, could not go on
  silent: int = 0  # values that were read, and are not what was written


class Campaign:
  """All that is injected, and what became of it."""

  def __init__(self, folder: Path, seed: int):
    self.folder, self.draw, self.began = folder, random.Random(seed), time.monotonic()
    self.rows: dict[str, Row] = collections.defaultdict(Row)
    self.corpus, self.numbers = folder / "colours.jsonl", iter(range(10**6))
    colours = random.Random(0).choices(["red", "green", "blue", "yellow"], k=200)
    text = "".join(json.dumps({"text": f"{x} and {x} {i % 10}"}) + "\n" for i, x in enumerate(colours))
    self.corpus.write_text(text)
    self.right: dict[int, dict[str, Any]] = {}
    self.enough = False
    self.problems: list[str] = []
    self.done: list[tuple[Row, str, Path, int]] = []

  def say(self, text: str) -> None:
    """Progress."""
    print(f"{time.monotonic() - self.began:6.0f} s  {text}", file=sys.stderr, flush=True)

  def start(self, workdir: Path, processes: int = 1, **options) -> Job:
    """The run, from wherever its workdir is."""
    return Job(workdir, self.corpus, processes, **options)

  def new(self) -> Path:
    """A workdir that is not there yet."""
    return self.folder / f"run{next(self.numbers)}"

  def undisturbed(self, processes: int) -> None:
    """What all others are compared with; of one process twice, as the first one compiles."""
    for _ in range(3 - processes):
      workdir = self.new()
      job = self.start(workdir, processes)
      if any(job.finish(600)):
        sys.exit(job.said())
      SECONDS[processes] = time.monotonic() - job.began
    self.right[processes] = ask(lambda: outcome(workdir), self.folder) | {"workdir": str(workdir)}
    self.say(f"undisturbed, {processes} process(es): {SECONDS[processes]:.1f} s, {STEPS} steps")

  def problem(self, what: str, job: Job) -> None:
    """What should not have been."""
    self.problems.append(what)
    self.say(f"PROBLEM: {what}\n{job.said()[-3000:]}")

  def check_end(self, row: Row, name: str, workdir: Path, processes: int) -> None:
    """The same command until it is done; the bits are compared later, those of many runs at once."""
    cut_off = unfinished(workdir)
    job = self.start(workdir, processes)
    codes = job.finish()
    SECONDS[processes] = min(SECONDS[processes], time.monotonic() - job.began)  # on a machine that others use
    if any(codes):
      row.unreadable += 1
      self.problem(f"{name}: the same command ended with {list(job.codes.values())}", job)
    elif cut_off and "it is skipped" not in job.said():
      self.problem(f"{name}: {cut_off} was skipped without a word", job)
    else:
      self.done.append((row, name, workdir, processes))

  def compare(self) -> None:
    """All runs that are done with the undisturbed ones."""
    found = ask(lambda: [outcome(workdir) for _, _, workdir, _ in self.done], self.folder)
    for (row, name, workdir, processes), values in zip(self.done, found, strict=True):
      if any(values[x] != self.right[processes][x] for x in values):
        row.wrong += 1
        self.problems.append(f"{name}: {workdir} holds other values than the undisturbed run")

  def kills(self, count: int) -> None:
    """Chains of two to five kills, of two processes an eighth, each with the same command behind it."""
    done, of_two = 0, 0
    while done < count and not self.enough:
      two = 2 in self.right and (of_two < done // 8 or 1 not in self.right)
      processes, workdir = 1 + two, self.new()
      chain, names = self.draw.randint(2, 5), []
      for _ in range(min(chain, count - done)):
        name = self.kill(workdir, processes)
        names += [name] if name else []
        done += bool(name)
        of_two += bool(name) and processes == 2
      row = self.rows[names[-1]] if names else Row()
      self.check_end(row, f"{', '.join(names)} ({processes})", workdir, processes)
      self.say(f"kills: {done} of {count}, problems: {len(self.problems)}")

  def kill(self, workdir: Path, processes: int) -> str:
    """One; its row, or "" where the run was done before."""
    draw = self.draw
    number = draw.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
    moment = draw.choice(list(MOMENTS))
    before = losses(workdir)
    job = self.start(workdir, processes)
    delay = MOMENTS[moment](job, draw)
    end = time.monotonic() + delay
    while not job.ended() and time.monotonic() < end:
      time.sleep(0.0005)
    target = draw.choice(job.pids)
    if job.ended() or target in job.codes:
      job.finish()
      SECONDS[processes] = min(SECONDS[processes], time.monotonic() - job.began)
      return ""
    os.kill(target, number)
    codes = job.finish() if losses(workdir) else job.finish(30)
    name = f"{number.name}, {'one process' if processes == 1 else 'one of two'}"
    row = self.rows[name]
    row.times += 1
    row.moments[moment] += 1
    after = losses(workdir)  # none, where what was made behind the last checkpoint has been dropped, and no more
    made = 0 if after == before else max((int(step) for step, *_ in after), default=0)  # by this run
    kept = saved(workdir)
    if None in codes and not made:  # one was lost before they met: JAX waits five minutes for it, a launcher seconds
      row.told["one was lost before the first step, the other ended as launchers do"] += 1
      return name
    if None in codes:
      row.told["hung"] += 1
      row.unreadable += 1
      self.problem(f"{name}: {codes} after {PATIENCE} s", job)
      return name
    if number == signal.SIGKILL:
      row.again += max(0, made - kept)
      row.told["killed inside a save" if unfinished(workdir) else "killed elsewhere"] += 1
    else:
      polite = [128 + number] * processes
      early = [-number, *polite]
      if codes == polite:
        row.told["stopped"] += 1
      elif not any(codes):
        row.told["done before it heard"] += 1
      elif all(code in early for code in codes) and not made:
        row.told["ended before the first step"] += 1
      else:
        row.told[f"codes {codes}"] += 1
        self.problem(f"{name}: exit codes {codes}", job)
      row.lost += max(0, made - kept)
      if made > kept:
        self.problem(f"{name}: {made} steps were made, {kept} are saved", job)
    return name

  def corruptions(self, count: int) -> None:
    """Of every file of a checkpoint; read as a run that goes on does."""
    here = Path(self.right[1]["workdir"])
    seed = self.draw.randrange(2**32)
    found = ask(lambda: corrupt(here, self.folder / "corrupt", count, seed, self.began), self.folder)
    for kind, results in found.items():
      row = self.rows[f"corruption: {kind}"]
      for what, times in results.items():
        row.times += times
        row.told[what] += times
        row.silent += times * (what == "SILENT")
        row.unreadable += times * (what in ("CRASH", "nothing could be read"))
        if what in ("SILENT", "CRASH", "nothing could be read"):
          self.problems.append(f"corruption: {kind}: {what}")
    self.say(f"corruptions: {count}")

  def stalls(self) -> None:
    """What hangs is ended by the watchdog, which says what it was."""
    moments = {
      "reading the batch of step 7": _stall_data, "saving step 8": _stall_save, "reading the first": _stall_first
    }  # fmt: skip
    for what, before in moments.items() if 1 in self.right else ():
      self.one(f"stall: {what}", before, HUNG, says=what, log__hang_seconds=3.0)
    if 2 not in self.right:
      return
    name, workdir = "stall: one of two is stopped (SIGSTOP)", self.new()
    job, row = self.start(workdir, 2, log__hang_seconds=60.0), self.rows["stall: one of two is stopped (SIGSTOP)"]
    while len(lines(workdir)) < 5 and not job.ended():
      time.sleep(0.002)
    with contextlib.suppress(ProcessLookupError):  # a machine so busy that compiling took 60 s
      os.kill(job.pids[1], signal.SIGSTOP)
    began = time.monotonic()
    while job.pids[0] not in job.codes and time.monotonic() < began + PATIENCE:
      job.ended()
      time.sleep(0.01)
    code = job.codes.get(job.pids[0])
    with contextlib.suppress(ProcessLookupError):
      os.kill(job.pids[1], signal.SIGKILL)
    job.finish()
    row.times += 1
    row.told[f"the other: exit code {code} after {time.monotonic() - began:.0f} s"] += 1
    if code != HUNG:
      self.problem(f"{name}: {code}", job)
    self.check_end(row, name, workdir, 2)

  def numbers_that_are_none(self) -> None:
    """A batch with NaNs, and one that makes the gradient overflow; what is saved is finite."""
    for what, weight in (("NaN", float("nan")), ("1e30", 1e30)):
      name, workdir = f"batch with weights of {what}", self.new()
      job = self.start(workdir, before=lambda weight=weight: _poison(weight))
      code, row = job.finish()[0], self.rows[name]
      row.times += 1
      row.told[f"exit code {code}"] += 1
      wrong = ask(lambda workdir=workdir: not_finite(workdir), self.folder)
      row.silent += len(wrong)
      if wrong:
        self.problem(f"{name}: {wrong}", job)
      if code:  # nothing of it is in the workdir: the same command, with good data, is as if nothing had been
        self.check_end(row, name, workdir, 1)

  def disks(self) -> None:
    """Files of a checkpoint that cannot grow, as on a full disk; then there is room again."""
    for size in (512, 4096, 20_000):
      self.one(f"no file beyond {size} bytes (RLIMIT_FSIZE)", lambda size=size: _limit(size), None)

  def one(self, name: str, before: Callable[[], Any], code: int | None, says: str = "", **fields) -> None:
    """A run of one process with a fault, and the same command without."""
    workdir = self.new()
    job = self.start(workdir, before=before, **fields)
    (found,), row = job.finish(), self.rows[name]
    row.times += 1
    row.told[f"exit code {found}"] += 1
    if (code is not None and found != code) or found in (0, None) or says not in job.said():
      self.problem(f"{name}: exit code {found}", job)
    self.check_end(row, name, workdir, 1)
    self.say(f"{name}: exit code {found}")

  def table(self) -> str:
    """Of all faults."""
    head = ["fault", "times", "what happened", "steps lost", "made again", "wrong values", "unreadable", "silent"]
    found = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    total = Row()
    for name, row in sorted(self.rows.items()):
      told = ", ".join(f"{what}: {n}" if n > 1 or row.times > 1 else what for what, n in sorted(row.told.items()))
      numbers = [row.lost, row.again, row.wrong, row.unreadable, row.silent]
      if row.moments:
        name += f": {', '.join(f'{moment} {n}' for moment, n in sorted(row.moments.items()))}"
      found.append(f"| {name} | {row.times} | {told} | {' | '.join(map(str, numbers))} |")
      for field in ("times", "lost", "again", "wrong", "unreadable", "silent"):
        setattr(total, field, getattr(total, field) + getattr(row, field))
    numbers = [total.lost, total.again, total.wrong, total.unreadable, total.silent]
    found.append(f"| **all** | {total.times} | | {' | '.join(f'**{x}**' for x in numbers)} |")
    return "\n".join(found)


# In a child, in place of what it stands beside.


def _at_step(act: Callable[[int, Any], Any]) -> None:
  """Calls `act(step, batch)` on every batch as it comes out of the data."""
  from lladax.data import batches

  real = batches.of_steps

  def of_steps(*args: Any, **options: Any) -> Iterator[Any]:
    for step, batch in enumerate(real(*args, **options), start=options["start"] + 1):
      act(step, batch)
      yield batch

  batches.of_steps = of_steps


def _stall_data() -> None:
  _at_step(lambda step, _: time.sleep(3600 * (step == 7)))


def _stall_first() -> None:
  _at_step(lambda step, _: time.sleep(3600 * (step == 1)))


def _stall_save() -> None:
  from lladax.storage import checkpoint

  real = checkpoint.Checkpoints.save

  def save(self: Any, step: int, tree: Any) -> None:
    time.sleep(3600 * (step == 8))
    real(self, step, tree)

  checkpoint.Checkpoints.save = save


def _poison(weight: float) -> None:
  import numpy as np

  def act(step: int, batch: Any) -> None:
    if step == 11:
      batch["weight"] = batch["weight"] * np.float32(weight)

  _at_step(act)


def _limit(size: int) -> None:
  """From the first batch on: what is written before is small, and not what this is about."""
  _at_step(lambda step, _: step == 3 and resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))


def not_finite(workdir: Path) -> list[str]:
  """Arrays of any checkpoint that hold what is not a number."""
  import numpy as np

  from lladax.storage import checkpoint

  return [
    f"{step}: {name}"
    for step in checkpoint.steps(workdir)
    for name, x in checkpoint.flat(checkpoint.restore(workdir, step, abstract(workdir, step)))
    if not np.isfinite(np.asarray(x)).all()
  ]


def damage(path: Path, kind: str, draw: random.Random) -> None:
  """Changes a file, if it can be changed that way."""
  content = bytearray(path.read_bytes())
  if kind == "bit flipped" and content:
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
  elif kind == "range zeroed" and content:
    at = draw.randrange(len(content))
    size = min(draw.choice([16, 512, 4096]), len(content) - at)
    content[at : at + size] = bytes(size)
  elif kind == "cut off" and content:
    del content[draw.randrange(len(content)) :]
  elif kind == "emptied":
    content.clear()
  path.write_bytes(bytes(content))
  if kind == "removed":
    path.unlink()


def corrupt(workdir: Path, copy: Path, count: int, seed: int, began: float) -> dict[str, dict[str, int]]:
  """{kind: {what happened: how often}} of faults in the newest checkpoint, file after file."""
  import logging

  from lladax.mistake import Mistake
  from lladax.storage import checkpoint

  logging.getLogger().setLevel(logging.CRITICAL)
  draw, newest = random.Random(seed), checkpoint.steps(workdir)[-1]
  wanted = abstract(workdir, newest)
  right = {step: bits(checkpoint.restore(workdir, step, wanted)) for step in checkpoint.steps(workdir)}
  files = sorted(x.relative_to(workdir) for x in (workdir / "checkpoints" / str(newest)).rglob("*") if x.is_file())
  kinds = ["bit flipped", "bit flipped", "range zeroed", "cut off", "emptied", "removed"]
  found: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
  shutil.copytree(workdir, copy)
  for i in range(count):
    file, kind = files[i % len(files)], draw.choice(kinds)
    if i < 2 * len(files):  # each at least once of either kind
      kind = kinds[i // len(files) * 4]
    damage(copy / file, kind, draw)
    name = f"{kind}, {'data' if '/d/' in f'/{file}' else 'metadata'}"
    try:
      step, tree = checkpoint.restore_latest(copy, wanted, set_aside=False) or (0, {})
      if bits(tree) != right.get(step):
        what = "SILENT"
      elif step == newest:
        what = "harmless"
      else:
        what = "detected, the checkpoint before is used"
        with contextlib.suppress(Mistake):
          checkpoint.verify(copy, newest)
          what += ", verify finds nothing"
    except Mistake:
      what = "nothing could be read"
    except Exception:
      traceback.print_exc()
      what = "CRASH"
    if what in ("SILENT", "CRASH"):
      print(f"{what}: {file}: {kind}", file=sys.stderr)
    found[name][what] += 1
    shutil.copyfile(workdir / file, copy / file)
  return {kind: dict(results) for kind, results in found.items()}


def main() -> int:
  """Everything that is asked for; 1 if anything was lost."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--kills", type=int, default=100)
  parser.add_argument("--corruptions", type=int, default=200)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--processes", default="1,2", help="1: no runs of two processes; 2: kills of those alone")
  parser.add_argument("--only", default="kills,corruptions,stalls,numbers,disks")
  given = parser.parse_args()
  only = given.only.split(",")
  with tempfile.TemporaryDirectory(prefix="faults-") as folder:
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{folder}/cache")
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")  # arrays so small are not to be shared
    from lladax.evaluation import evaluate  # noqa: F401  (what a run imports, before the forks)
    from lladax.training import trainer  # noqa: F401

    campaign = Campaign(Path(folder), given.seed)
    for processes in map(int, given.processes.split(",")):
      campaign.undisturbed(processes)
    if 1 not in campaign.right:
      only = [x for x in only if x in ("kills", "stalls")]  # the others are of one process
    signal.signal(signal.SIGINT, lambda *_: setattr(campaign, "enough", True))  # the table of what was done
    try:
      if "corruptions" in only:
        campaign.corruptions(given.corruptions)
      if "kills" in only:
        campaign.kills(given.kills)
      if "stalls" in only:
        campaign.stalls()
      if "numbers" in only:
        campaign.numbers_that_are_none()
      if "disks" in only:
        campaign.disks()
    finally:  # a fault of this file is no reason not to say what was found
      campaign.compare()
      print(campaign.table())
      campaign.say(f"{len(campaign.problems)} problems" + "".join(f"\n  {x}" for x in campaign.problems))
  return int(bool(campaign.problems))


if __name__ == "__main__":
  sys.exit(main())
