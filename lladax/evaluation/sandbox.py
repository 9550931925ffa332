"""Runs one piece of generated Python in a process of its own, with limits, and says whether it passed.

Four fences, each for what the others let through: limits of the kernel (processor time, memory, file size, processes);
an audit hook in the process itself, which refuses processes, sockets, and files outside its empty folder; namespaces
without a network, whose end takes every process along, where the kernel allows them (`unshare`); and a clock outside.
That stops the accidents of a language model. It is no wall against somebody who studies it: for that, use a container.
"""

import dataclasses
import functools
import json
import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile

from lladax.mistake import Mistake

# Reads a job from standard input, limits itself, runs it, and reports on standard output. The token is what a program
# that ends itself early cannot write. What the program prints goes nowhere: a pipe has no limit.
_BOOTSTRAP = r"""
import json, os, resource, signal, sys
job = json.loads(sys.stdin.buffer.read())
report = os.fdopen(os.dup(1), "w")
null = os.open(os.devnull, os.O_RDWR)
for fd in (0, 1, 2):
  os.dup2(null, fd)
os.set_inheritable(report.fileno(), False)
def end(why):
  report.write(json.dumps({"token": job["token"], "why": why}))
  report.flush()
  os._exit(0)
here = os.path.realpath(os.getcwd()) + os.sep
changes = {"os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod",
           "os.chown", "os.utime", "os.setxattr"}
refused = ("subprocess.", "socket.", "ctypes.", "pty.", "os.fork", "os.exec", "os.system", "os.spawn", "os.posix_spawn",
           "os.kill", "signal.pthread_kill", "syslog.", "shutil.")
def inside(path):
  return isinstance(path, int) or (os.path.realpath(os.fsdecode(path)) + os.sep).startswith(here)
def guard(event, args):
  if event.startswith(refused):
    raise PermissionError(f"{event} is not allowed here")
  writes = event == "open" and (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
  paths = args[:1] if writes else args[:2] if event in ("os.rename", "os.link", "os.symlink") else args[:1]
  if (writes or event in changes) and not all(inside(path) for path in paths):
    raise PermissionError(f"{event} outside the working directory")
for name, limit in job["limits"].items():
  hard = resource.getrlimit(getattr(resource, name))[1]
  limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
  resource.setrlimit(getattr(resource, name), (limit, limit if name != "RLIMIT_CPU" else hard))
signal.signal(signal.SIGXCPU, lambda *_: end(job["time"]))
names = {"__name__": "__main__"}
try:
  program = compile(job["code"], "program", "exec")
  sys.addaudithook(guard)
  exec(program, names)
  why = ""
except MemoryError:
  why = "memory"
except BaseException as error:
  names.clear()
  why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
end(why)
"""


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
  token, late = secrets.token_hex(16), f"time: more than {timeout:g} s"
  job = json.dumps({"code": code, "token": token, "limits": limits, "time": late}).encode()
  with tempfile.TemporaryDirectory(prefix="lladax-sandbox-", ignore_cleanup_errors=True) as folder:
    process = subprocess.Popen(
      [*_namespaces(), sys.executable, "-I", "-B", "-c", _BOOTSTRAP], cwd=folder, start_new_session=True,
      env={"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
      stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
      out, _ = process.communicate(job, timeout=timeout + 2)
    except subprocess.TimeoutExpired:
      return Result(False, late)
    finally:
      try:
        os.killpg(process.pid, signal.SIGKILL)  # and whatever it has left running
      except ProcessLookupError:
        pass
      process.communicate()
  said = json.loads(out) if token.encode() in out else {"why": "ended early, or was killed"}
  return Result(not said["why"], said["why"])


@functools.cache
def _namespaces() -> tuple[str, ...]:
  """The command that takes the network and all other processes out of sight; () where the kernel refuses it."""
  command = ("unshare", "--user", "--map-root-user", "--net", "--pid", "--fork", "--kill-child")
  try:
    allowed = subprocess.run([*command, "true"], capture_output=True, timeout=10).returncode == 0
  except (OSError, subprocess.TimeoutExpired):
    allowed = False
  return command if allowed else ()
