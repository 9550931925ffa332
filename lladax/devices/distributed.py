"""Several processes: how they find each other, agree before the first step, and end instead of hanging.

Every process runs the same program on its own devices, and all arrays are global. The first process (0) writes what
is written once; checkpoints are written by all.
"""

import faulthandler
import glob
import hashlib
import importlib.util
import logging
import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from lladax import address
from lladax.devices import interrupts
from lladax.mistake import Mistake, refusal
from lladax.terminal import Console, Formatter, Lossy, visible

HUNG = 75  # the exit code of a job that the watchdog ended ("temporary failure": a launcher may start it again)


def initialize(coordinator: str = "", num_processes: int = 0, process_id: int = -1) -> None:
  """Joins the other processes, if there are any; to be called before the first array.

  A TPU pod, Slurm and MPI say themselves who is there, and JAX asks them; else the three flags do.

  Args:
    coordinator: host:port of process 0, free on that machine.
    num_processes: of the job.
    process_id: of this one, 0 .. num_processes - 1.

  Raises:
    Mistake: flags that do not belong together.
  """
  jax.config.update("jax_enable_preemption_service", False)  # signals are for interrupts.py
  if coordinator or num_processes or process_id >= 0:
    if not coordinator or num_processes < 1 or not 0 <= process_id < num_processes:
      raise Mistake(
        f"--coordinator={coordinator} --num_processes={num_processes} --process_id={process_id}: give all three, as in"
        " --coordinator=localhost:9876 --num_processes=2 --process_id=0"
      )
    if ":" not in coordinator:
      raise Mistake(f"--coordinator={coordinator} has no port: write it HOST:PORT")
    jax.distributed.initialize(coordinator, num_processes, process_id)
  elif _many():
    jax.distributed.initialize()


def _many() -> bool:
  """Whether the surroundings speak of several processes, or this is a host of TPUs (of a pod, perhaps)."""
  counts = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "MEGASCALE_NUM_SLICES")
  if any(int(os.environ.get(name) or 1) > 1 for name in counts) or "," in os.environ.get("TPU_WORKER_HOSTNAMES", ""):
    return True
  return has_tpu() and os.environ.get("JAX_PLATFORMS", "tpu").startswith("tpu")


def has_tpu() -> bool:
  """Whether JAX would find TPUs: libtpu alone, which `--mode=plan` installs, is not enough."""
  devices = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
  return bool(devices) and importlib.util.find_spec("libtpu") is not None


def hush_libtpu() -> None:
  """Tells a libtpu without TPUs (the extra `plan` brings it) who it is, or it complains of that in six lines.

  To be called before the first array, as `import lladax` does. What is set stays, and where there are TPUs, or no
  libtpu, or where JAX shall not ask it, nothing is set.
  """
  asked = os.environ.get("JAX_PLATFORMS") or "tpu"
  if "tpu" in asked.split(",") and importlib.util.find_spec("libtpu") and not has_tpu():
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


CRASH = 70  # EX_SOFTWARE: a launcher may start it again


def leave(code: int) -> None:
  """Ends this process of several at once: on its way out it would wait minutes for the others, which wait for it."""
  if interrupts.many():
    sys.stderr.flush()
    for number in interrupts.SIGNALS:  # all is done; who ends at once here aborts the others
      signal.signal(number, signal.SIG_IGN)
    interrupts.depart(interrupts.PATIENCE if code != CRASH else 2.0)  # of which the others may not know
    os._exit(code)


def guard(command: Callable[[list[str]], int | None], argv: list[str], name: str = "lladax") -> int:
  """Runs a command: one line for a `Mistake`, what a disk refuses (1), Ctrl-C (130); else a traceback and 70."""
  if not isinstance(sys.stderr, Lossy):
    sys.stderr = Lossy(sys.stderr)
  handler = logging.StreamHandler()
  handler.setFormatter(Formatter(f"{name}: %(message)s"))
  logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
  logging.getLogger("lladax").setLevel(logging.INFO)  # which attention kernel runs
  logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax narrates every save, and what it raises, a dozen times
  logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # and its abandoned reads report themselves, one by one
  for handler in logging.getLogger().handlers:
    handler.addFilter(_with_addresses)
  try:
    return command(argv) or 0
  except Mistake as error:
    print(f"{name}: {address.said(str(error))}", file=sys.stderr)
    code = 1
  except KeyboardInterrupt:
    interrupts.say(signal.SIGINT)
    interrupts.abandon(signal.SIGINT)
    code = 128 + signal.SIGINT
  except SystemExit as error:
    if error.code in [128 + number for number in interrupts.SIGNALS]:  # of which has been said what there is to say
      interrupts.abandon(int(error.code) - 128)
      leave(int(error.code))
    raise
  except Exception as error:
    unheard = isinstance(error, BrokenPipeError) and _unheard()
    if line := refusal(error):
      print(visible(f"{name}: {line}"), file=sys.stderr)
    elif not unheard:
      print(visible(traceback.format_exc()), end="", file=sys.stderr)
    code = 1 if line or unheard else CRASH
  leave(code)
  return code


def _unheard() -> bool:
  """Whether who read standard output has gone, as `head` does; what is left for it goes nowhere then."""
  pipe = select.poll()
  pipe.register(1, 0)  # of errors alone
  gone = any(event & select.POLLERR for _, event in pipe.poll(0))
  if gone:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
  return gone


def _with_addresses(record: logging.LogRecord) -> bool:
  record.msg, record.args = address.said(record.getMessage()), ()
  return True


def is_first() -> bool:
  """Whether this is the process that writes what is written once."""
  return jax.process_index() == 0


def agree(**facts: str) -> None:
  """Compares facts of this process with those of the others.

  Raises:
    Mistake: in every process, if one of them has another value than process 0.
  """
  if jax.process_count() == 1:
    return
  digests = [hashlib.blake2b(value.encode(), digest_size=8).digest() for value in facts.values()]
  every = np.asarray(multihost_utils.process_allgather(np.frombuffer(b"".join(digests), np.uint32).reshape(-1, 2)))
  for process, fact in np.argwhere((every != every[:1]).any(axis=-1)):
    name = list(facts)[fact]
    raise Mistake(f"process {process} has another {name} than process 0: start all with the same files and flags")


class Watchdog:
  """Ends this process, with a message and the stacks of all threads, when `beat` has not been called for `seconds`.

  The others of the job end with it, by the heartbeat of JAX's distributed runtime.
  """

  def __init__(self, seconds: float):
    """`seconds` 0: never."""
    self._seconds, self._doing = seconds, "starting"
    self._beat, self._closed = threading.Event(), False
    if seconds:
      threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

  def beat(self, doing: str) -> None:
    """All is well; what comes next, for the message."""
    self._doing = doing
    self._beat.set()

  def close(self) -> None:
    """Stops watching."""
    self._closed = True
    self._beat.set()

  def _watch(self) -> None:
    while self._beat.wait(self._seconds):
      self._beat.clear()
      if self._closed:
        return
    where = "process {} of {}".format(*interrupts.place())  # JAX may be what hangs
    print(f"lladax: {where}: {self._doing} took more than {self._seconds:g} seconds (log.hang_seconds); the stacks:",
          file=sys.stderr, flush=True)  # fmt: skip
    faulthandler.dump_traceback(all_threads=True)
    os._exit(HUNG)


def console() -> Console:
  """Progress and tables of the first process go to stderr; stdout is for text that was asked for."""
  return Console(stderr=True, soft_wrap=True, quiet=not is_first())
