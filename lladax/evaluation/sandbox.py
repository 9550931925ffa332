"""Runs one piece of generated Python in a process of its own, with limits, and says whether it passed.

The fences, each for what the others let through (`fences.py` puts most of them up, in the process itself):
  limits       of processor time, memory, size of a file, files open
  namespaces   no network, no other process in sight, and all ends with the first one (`unshare`)
  folder       in these namespaces the empty folder it runs in is a small file system in memory
  landlock     no file but Python's own can be read, none outside the folder written; no TCP, no signals
  seccomp      no processes, sockets, signals, devices, shared memory; threads may be
  audit hook   the same in words, where it is Python that asks
  clock        outside
Which of them a system gives is asked once, and what is missing is said. That stops the accidents of a language model,
and what it might try. It is no wall against somebody who has a hole in the kernel: for that, use a virtual machine. And
tests that run in the process of what they test believe it: a class whose objects equal everything passes them all.
"""

import dataclasses
import functools
import json
import logging
import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from lladax.mistake import Mistake

_FENCES = Path(__file__).with_name("fences.py")
_NAMESPACES = ("unshare", "--user", "--map-root-user", "--net", "--pid", "--ipc", "--mount", "--fork", "--kill-child")
_WITHOUT = {
  "namespaces": "a program could see other processes",
  "folder": "a program could fill the disk with files of 1 MiB",
  "landlock": "only Python itself keeps a program from files",
  "seccomp": "only Python itself keeps a program from processes and sockets",
}


@dataclasses.dataclass(frozen=True)
class Result:
  """`why` is "" where the program ran to its end, else one line: time, memory, or the exception."""

  passed: bool
  why: str = ""


def run(code: str, timeout: float = 3.0, memory: int = 1024) -> Result:
  """Whether a program runs to its end without an exception.

  Args:
    code: Python source, its tests included.
    timeout: seconds of processor time; the clock on the wall gives two more, in which Python starts.
    memory: MiB of address space.

  Raises:
    Mistake: a limit that is not positive.
  """
  if timeout <= 0 or memory <= 0:
    raise Mistake(f"sandbox: timeout={timeout}, memory={memory}: both must be positive")
  limits = {
    "RLIMIT_CPU": math.ceil(timeout), "RLIMIT_AS": memory << 20, "RLIMIT_FSIZE": 1 << 20, "RLIMIT_NPROC": 0,
    "RLIMIT_NOFILE": 64, "RLIMIT_CORE": 0,
  }  # fmt: skip
  program = _Program(code, limits, f"time: more than {timeout:g} s", timeout + 2)
  said = program.run(_namespaces())
  return Result(not said, said)


@dataclasses.dataclass
class _Program:
  """What is run, and under which limits."""

  code: str
  limits: dict[str, int]
  late: str
  patience: float  # seconds
  held: tuple[str, ...] = ()  # the fences that held

  def run(self, namespaces: bool, kernel: bool = True) -> str:
    """Why it did not pass; "" where it did. `kernel`: landlock and seccomp are asked for."""
    secret, command = secrets.token_hex(16), _NAMESPACES if namespaces else ()
    job = {"code": self.code, "secret": secret, "limits": self.limits, "late": self.late}
    job |= {"namespaces": namespaces, "kernel": kernel}
    new = tempfile.TemporaryDirectory(prefix="lladax-sandbox-", ignore_cleanup_errors=True)
    with new as folder, tempfile.TemporaryFile() as report:  # a file is limited in size, a pipe is not
      process = subprocess.Popen(
        [*command, sys.executable, "-I", "-B", str(_FENCES)], cwd=folder, start_new_session=True,
        env={"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        stdin=subprocess.PIPE, stdout=report, stderr=subprocess.DEVNULL,
      )  # fmt: skip
      try:
        process.communicate(json.dumps(job).encode(), timeout=self.patience)
      except subprocess.TimeoutExpired:
        return self.late
      finally:
        try:
          os.killpg(process.pid, signal.SIGKILL)  # and whatever it has left running
        except ProcessLookupError:
          pass
        process.wait()
      report.seek(0)
      held, _, said = report.read(1000).decode(errors="replace").partition("\n")
    self.held = tuple(held.split())
    return "" if said == secret else " ".join(said.split())[:200] or "ended early, or was killed"


@functools.cache
def _namespaces() -> bool:
  """Whether this system gives namespaces; which fences it does not give is said, once."""
  probe = _Program("", {"RLIMIT_NPROC": 0}, "", 20)
  try:
    given = not probe.run(True)
  except FileNotFoundError:  # no unshare
    given = False
  if not given:
    probe.run(False)
  if missing := [name for name in _WITHOUT if name not in probe.held]:
    why = "; ".join(f"no {name}: {_WITHOUT[name]}" for name in missing)
    logging.warning("the sandbox of generated code has less fences here (%s): use a container of its own", why)
  return given
