"""The process in which generated code runs; see `sandbox.py`, which starts it and knows what it says.

Reads a job from standard input, gives away what the kernel lets it give away, runs the program on a thread of its own,
and reports on standard output: a line with the fences that hold, and then the job's secret, if the program ran to its
end, or else what stopped it. Imports nothing but Python itself.

The thread runs no Python below the program: there is no frame that leads to the secret, which stands on the main
thread alone, and the objects that would lead to it (other threads' frames, the collector's lists, tracers) are refused.
"""

import _queue
import _thread
import ctypes
import functools
import json
import operator
import os
import platform
import resource
import signal
import struct
import sys
import sysconfig
import weakref

FILES, FOLDER_BYTES = 200, 16 << 20  # in the folder of a program

_MAIN = {"gc.get_objects", "gc.get_referrers", "gc.get_referents", "sys._current_frames", "sys._current_exceptions",
         "sys.settrace", "sys.setprofile", "sys.addaudithook", "sys.monitoring.register_callback"}  # fmt: skip
_CHANGES = {"os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod",
            "os.chown", "os.utime", "os.setxattr", "os.removexattr", "os.chflags"}  # fmt: skip
_FOLDER_LAST = {"os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod", "os.chown",
                "os.utime"}  # last: the folder of a relative name  # fmt: skip
_REFUSED = ("subprocess.", "socket.", "ctypes.", "pty.", "os.fork", "os.exec", "os.system", "os.spawn", "os.posix_",
            "os.kill", "signal.", "syslog.", "shutil.", "_posixsubprocess", "sqlite3.", "fcntl.", "resource.",
            "code.__new__", "os.memfd", "os.unshare", "os.setns")  # fmt: skip
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

# System calls by their numbers, (x86-64, arm64): processes, sockets, signals, other processes' memory, devices and
# pipes, shared memory, owners, modes, times and attributes of files (Landlock does not know these), mounts, limits, and
# what is for administrators. They fail with EPERM.
_CALLS = {
  "x86_64": (0xC000003E, 56, [29, 41, 53, 57, 58, 59, 62, 64, 68, 90, 91, 92, 93, 94, 101, 129, 132, 133, 155, 159, 160,
    161, 163, 164, 165, 166, 167, 168, 169, 170, 171, 175, 179, 188, 189, 190, 197, 198, 199, 200, 227, 234, 235, 240,
    246, 248, 249, 250, 259, 260, 261, 268, 272, 280, 297, 298, 302, 304, 305, 308, 310, 311, 313, 319, 321, 322, 323,
    424, 425, 428, 429, 430, 434, 438, 442, 452, 463, 466]),
  "aarch64": (0xC00000B7, 220, [5, 6, 7, 14, 15, 16, 33, 39, 40, 41, 51, 52, 53, 54, 55, 60, 88, 89, 97, 104, 105, 112,
    117, 129, 130, 131, 138, 142, 161, 162, 164, 170, 171, 180, 186, 190, 194, 198, 199, 217, 218, 219, 221, 224, 225,
    240, 241, 261, 266, 268, 270, 271, 273, 279, 280, 281, 282, 424, 425, 428, 429, 430, 434, 438, 442, 452, 463, 466]),
}  # fmt: skip
_CLONE3, _CLONE_THREAD = 435, 0x10000


def readable() -> list[str]:
  """What Python itself needs: its library, what is installed for it, shared libraries, time zones."""
  paths = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
  paths += ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache", "/usr/share/zoneinfo"]
  paths += ["/dev/null", "/dev/urandom", "/dev/random", "/dev/zero"]
  return sorted({os.path.realpath(path) for path in paths if path and os.path.exists(path)})


def mount_folder(libc: ctypes.CDLL) -> bool:
  """Puts a small file system of its own, in memory, over the working directory; needs the namespaces."""
  here, flags = os.getcwd(), 2 | 4 | 8  # no set-user-ID, no devices, no programs
  options = f"size={FOLDER_BYTES},nr_inodes={FILES},mode=700".encode()
  mounted = libc.mount(b"tmpfs", os.fsencode(here), b"tmpfs", flags, options) == 0
  os.chdir(here)
  return mounted


def landlock(libc: ctypes.CDLL, paths: list[str]) -> bool:
  """Takes away all files but those below the working directory, and below `paths` to read; TCP, too, and signals."""
  version = libc.syscall(444, None, 0, 1)
  if version < 1:
    return False
  every = (1 << (13, 14, 15, 15, 16)[min(version, 5) - 1]) - 1
  given = struct.pack("<QQQ", every, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
  rules = libc.syscall(444, given, 8 if version < 4 else 16 if version < 6 else 24, 0)
  if rules < 0:
    return False
  special = 1 | 1 << 6 | 1 << 9 | 1 << 10 | 1 << 11  # programs to start, devices, sockets, pipes
  for path, allowed in [(".", every & ~special), ("/dev/null", 2 | 4), *((path, 4 | 8) for path in paths)]:
    try:
      at = os.open(path, os.O_PATH)
    except OSError:
      continue
    allowed = allowed if os.path.isdir(path) else allowed & 6
    libc.syscall(445, rules, 1, struct.pack("<Qi", allowed & every, at), 0)
    os.close(at)
  held = libc.syscall(446, rules, 0) == 0
  os.close(rules)
  return held


def seccomp(libc: ctypes.CDLL) -> bool:
  """Takes the system calls of `_CALLS` away from all threads, and new processes, but not new threads."""
  if platform.machine() not in _CALLS:
    return False
  arch, clone, calls = _CALLS[platform.machine()]

  def code(operation: int, value: int, yes: int = 0, no: int = 0) -> bytes:
    return struct.pack("<HBBI", operation, yes, no, value)

  load, equal, least, has, answer = 0x20, 0x15, 0x35, 0x45, 0x06
  allow, refuse, unknown = 0x7FFF0000, 0x00050001, 0x00050026  # EPERM, ENOSYS
  program = [code(load, 4), code(equal, arch, 1), code(answer, refuse), code(load, 0)]
  program += [code(least, 0x40000000, 0, 1), code(answer, refuse)]  # the numbers of another ABI
  program += [code(equal, _CLONE3, 0, 1), code(answer, unknown)]  # its flags cannot be read: clone takes its place
  program += [code(equal, clone, 0, 4), code(load, 16), code(has, _CLONE_THREAD, 1), code(answer, refuse)]
  program += [code(answer, allow)]
  for call in calls:
    program += [code(equal, call, 0, 1), code(answer, refuse)]
  program += [code(answer, allow)]
  content = ctypes.create_string_buffer(b"".join(program))
  given = struct.pack("@HP", len(program), ctypes.addressof(content))
  return libc.syscall({"x86_64": 317, "aarch64": 277}[platform.machine()], 1, 1, given) == 0


def guard(here: str, paths: list[str]):
  """An audit hook: what is refused is said in words, and where the kernel has no fences it is one."""
  roots, realpath, counted = tuple(path + os.sep for path in paths), os.path.realpath, [0]

  def inside(path, roots):
    return isinstance(path, int) or (realpath(os.fsdecode(path)) + os.sep).startswith(roots)

  def hook(event, args):
    if event.startswith(_REFUSED) or event in _MAIN:
      raise PermissionError(f"{event} is not allowed here")
    writes = event == "open" and (args[2] or 0) & _WRITES
    if writes or event in _CHANGES:
      counted[0] += 1
      if counted[0] > 10 * FILES:
        raise PermissionError("too many files")
      two = event in ("os.rename", "os.link", "os.symlink")
      far = event in _FOLDER_LAST and args[-1] != -1 or two and args[2] != -1
      if far or not all(inside(name, here) for name in args[: 1 + two]) and args[0] != os.devnull:
        raise PermissionError(f"{event} outside the working directory")
    elif event in ("open", "os.listdir", "os.scandir") and args[0] is not None:
      if not inside(args[0], (here, *roots)):
        raise PermissionError(f"{event} outside the working directory")

  return hook


def main() -> None:
  """One job."""
  job = json.loads(sys.stdin.buffer.read())
  report, write, leave = os.dup(1), os.write, os._exit
  null = os.open(os.devnull, os.O_RDWR)
  for fd in (0, 1, 2):
    os.dup2(null, fd)
  os.close(null)
  secret, late, program = job["secret"].encode(), job["late"].encode(), job["code"]
  limits, namespaces, kernel = job["limits"], job["namespaces"], job["kernel"]
  del job

  def end(why):
    write(report, " ".join(why.split())[:200].encode(errors="backslashreplace") or b"ended early")
    leave(0)

  def told(unraisable):
    if unraisable.exc_type is MemoryError:
      end("memory")
    end(f"{unraisable.exc_type.__name__}: {unraisable.exc_value}")

  try:
    program = compile(program, "program", "exec")
  except BaseException as error:
    write(report, b"\n")
    end(f"{type(error).__name__}: {error}")
  held, paths = [], readable()
  try:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mallopt(-8, 1)  # one arena: each would reserve 64 MiB of the address space
    if namespaces:
      held += ["namespaces", "folder"] if mount_folder(libc) else ["namespaces"]
    still = kernel and libc.prctl(38, 1, 0, 0, 0) == 0  # no new privileges
    held += ["landlock"] if still and landlock(libc, paths) else []
  except (OSError, AttributeError):  # another system
    libc, still = None, False
  alone = limits.pop("RLIMIT_NPROC")
  for name, limit in limits.items():
    hard = resource.getrlimit(getattr(resource, name))[1]
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(getattr(resource, name), (limit, limit if name != "RLIMIT_CPU" else hard))
  signal.signal(signal.SIGXCPU, lambda *_: (write(report, late), leave(0)))
  sys.unraisablehook = told
  # The thread: a list is extended by what two calls return, the second of which runs the program. It holds True and
  # None if both came to an end, and a queue hears when the thread lets go of what it ran.
  gate, found, ended = _thread.allocate_lock(), [], _queue.SimpleQueue()
  gate.acquire()
  run = functools.partial(exec, program, {"__name__": "__main__", "__builtins__": __builtins__})
  run = functools.partial(found.extend, map(operator.methodcaller("__call__"), [gate.acquire, run]))
  gone = weakref.ref(run, ended.put)
  _thread.stack_size(16 << 20)
  signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGXCPU])  # of the processor time hears the main thread
  _thread.start_new_thread(run, ())
  signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGXCPU])
  resource.setrlimit(resource.RLIMIT_NPROC, (alone, alone))
  held += ["seccomp"] if still and libc and seccomp(libc) else []
  write(report, " ".join(held).encode() + b"\n")
  sys.addaudithook(guard(os.path.realpath(os.getcwd()) + os.sep, paths))
  del run, program, libc
  for name in ("main", "guard"):
    del globals()[name]
  gate.release()
  ended.get()
  if len(found) == 2:
    write(report, secret)
    leave(0)
  del secret, gone
  end("SystemExit")  # the only one that a thread does not report


if __name__ == "__main__":
  main()
