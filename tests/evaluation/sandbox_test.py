import importlib
import os
import pathlib
import threading

import pytest

from lladax.evaluation import sandbox


@pytest.mark.parametrize(
  "code, why",
  [
    ("def f(x):\n  return x + 1\nassert f(1) == 2", ""),
    ("import math, re, collections, typing, hashlib\nprint('much' * 10**6)\nassert math.sqrt(4) == 2", ""),
    ("open('here', 'w').write('x')\nassert open('here').read() == 'x'", ""),
    ("assert 1 + 1 == 3", "AssertionError"),
    ("def f(:", "SyntaxError"),
    ("x = [0] * 10**10", "memory"),
    ("open('big', 'w').write('x' * 10**8)", "OSError: [Errno 27] File too large"),
    ("open('/tmp/lladax-escaped', 'w')", "PermissionError: open outside the working directory"),
    ("import os\nos.remove('/etc/hostname')", "PermissionError: os.remove outside the working directory"),
    ("import os\nwhile True: os.fork()", "PermissionError: os.fork is not allowed here"),
    ("import subprocess\nsubprocess.run(['true'])", "PermissionError: subprocess.Popen is not allowed here"),
    ("import os\nos.system('true')", "PermissionError: os.system is not allowed here"),
    ("import socket\nsocket.create_connection(('127.0.0.1', 9))", "PermissionError: socket."),
    ("import sys\nsys.exit(0)\nassert False", "SystemExit"),
    ("import os\nos._exit(0)\nassert False", "ended early"),
    ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "PermissionError: os.kill"),
    ("import os\nassert 'PATH' not in os.environ and 'HOME' not in os.environ\nassert os.listdir() == []", ""),
  ],
)
def test_programs(code, why):
  result = sandbox.run(code)
  assert result.passed == (why == "")
  assert result.why.startswith(why) and "\n" not in result.why


def test_a_program_that_grows_is_stopped():
  result = sandbox.run("x = []\nwhile True: x.append('a' * 10**6)", timeout=60, memory=128)
  assert result == sandbox.Result(False, "memory")


@pytest.fixture
def running(tmp_path, monkeypatch):
  """running() -> the processes that live in a sandbox of this test."""
  monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))

  def find():
    found = []
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
      try:
        where = os.readlink(folder / "cwd")
      except OSError:  # it has ended, or is somebody else's
        continue
      found += [folder.name] * where.startswith(f"{tmp_path}/lladax-sandbox-")
    return found

  return find


@pytest.mark.parametrize(
  "code, late",
  [
    ("while True: pass", True),
    ("import time\ntime.sleep(3600)", True),
    ("import threading, time\nthreading.Thread(target=time.sleep, args=(3600,)).start()", False),
  ],
)
def test_nothing_of_a_program_outlives_it(running, code, late):
  results = []
  thread = threading.Thread(target=lambda: results.append(sandbox.run(code, timeout=0.5)))
  thread.start()
  seen = []
  while thread.is_alive():
    seen += running()
  assert seen, "the program was never seen: this test sees nothing"
  assert results[0].passed != late and (results[0].why == "time: more than 0.5 s" or not late)
  assert not running()


def test_without_namespaces_the_other_fences_hold(monkeypatch):
  monkeypatch.setattr(sandbox, "_namespaces", lambda: False)
  assert sandbox.run("assert True").passed
  assert sandbox.run("import os\nos.fork()").why.startswith("PermissionError")
  assert sandbox.run("while True: pass", timeout=0.5).why == "time: more than 0.5 s"
  assert not os.path.exists("/tmp/lladax-escaped")


@pytest.mark.parametrize("limits", [{"timeout": 0.0}, {"memory": 0}])
def test_limits_are_positive(limits):
  with pytest.raises(ValueError, match="both must be positive"):
    sandbox.run("", **limits)


# What a program tries: each passes where it gets what it is after. {home} is a folder of the user's with a file in it.
# ruff: noqa: E501
ATTACKS = {
  "reads a file": "print(open('{home}/secret').read())",
  "reads a file, by os": "import os\nos.read(os.open('{home}/secret', os.O_RDONLY), 9)",
  "reads /etc/passwd": "open('/etc/passwd').read()",
  "reads it, by a module of the library": "import linecache\nassert linecache.getlines('/etc/passwd')",
  "reads it, by a link": "import os\nos.symlink('{home}/secret', 'x')\nopen('x').read()",
  "reads it, by a hard link": "import os\nos.link('{home}/secret', 'x')\nopen('x').read()",
  "reads it, from a folder": "import os\nat = os.open('.', os.O_RDONLY)\nos.open('../../../../etc/passwd', 0, dir_fd=at)",
  "reads it, behind the hook's back": "import os\nos.path.realpath = lambda x: os.getcwd()\nopen('/etc/passwd').read()",
  "reads it, with other bytes of the name": "open(b'/etc/passwd').read()",
  "reads it, as a database": "import sqlite3\nsqlite3.connect('{home}/secret').execute('select 1')",
  "lists a folder": "import os\nassert os.listdir('{home}')",
  "lists the root": "import os\nos.scandir('/')",
  "reads another process": "import os\nopen(f'/proc/{os.getppid()}/environ', 'rb').read()",
  "reads its own memory": "open('/proc/self/mem', 'rb').read(1)",
  "writes a file": "open('{home}/new', 'w')",
  "writes a file, from a folder": "import os\nat = os.open('/', os.O_PATH)\nos.open('{home}/new'[1:], 65, dir_fd=at)",
  "makes a folder": "import os\nos.mkdir('{home}/new')",
  "makes a pipe": "import os\nos.mkfifo('{home}/new')",
  "makes a device": "import os, stat\nos.mknod('{home}/new', stat.S_IFREG | 0o600)",
  "makes a database": "import sqlite3\nsqlite3.connect('{home}/new').execute('create table x (y)')",
  "changes a mode": "import os\nos.chmod('{home}/secret', 0)",
  "changes a mode, from a folder": "import os\nat = os.open('/', os.O_PATH)\nos.chmod('{home}/secret'[1:], 0, dir_fd=at)",
  "changes a time": "import os\nos.utime('{home}/secret', (1, 1))",
  "moves a file": "import os\nos.rename('{home}/secret', '{home}/new')",
  "removes a file": "import os\nos.remove('{home}/secret')",
  "removes it, from a folder": "import os\nat = os.open('/', os.O_PATH)\nos.remove('{home}/secret'[1:], dir_fd=at)",
  "cuts a file": "import os\nos.truncate('{home}/secret', 0)",
  "forks": "import os\nos.fork()",
  "forks, for a terminal": "import os\nos.forkpty()",
  "forks, by its insides": "import _posixsubprocess as p\np.fork_exec(['/bin/true'], [b'/bin/true'], True, (), None, None,"
  " -1, -1, -1, -1, -1, -1, -1, -1, False, False, 0, None, None, None, -1, None, False)",
  "spawns": "import os\nos.posix_spawn('/bin/true', ['true'], dict())",
  "becomes another program": "import os\nos.execv('/bin/true', ['true'])",
  "starts a worker": "import multiprocessing as m\nm.get_context('fork').Process(target=print).start()",
  "leaves a daemon": "import os\nif not os.fork():\n  os.setsid()\n  while True: pass",
  "signals its parent": "import os\nos.kill(os.getppid(), 0)",
  "signals all": "import os\nos.kill(-1, 9)",
  "signals, by a thread": "import signal, threading\nsignal.pthread_kill(threading.main_thread().ident, 9)",
  "opens a socket": "import socket\nsocket.socket()",
  "opens a socket, by its insides": "import _socket\n_socket.socket()",
  "opens two": "import socket\nsocket.socketpair()",
  "calls C": "import ctypes\nctypes.CDLL(None).getpid()",
  "calls C, by its insides": "import _ctypes\n_ctypes.dlopen(None, 0)",
  "shares memory": "from multiprocessing import shared_memory\nshared_memory.SharedMemory(create=True, size=10)",
  "has memory of a name": "import os\nos.memfd_create('x')",
  "fills the disk": "for i in range(100): open(f'f{i}', 'wb').write(b'x' * 2**20)",
  "fills it with one file": "open('f', 'wb').truncate(10**9)",
  "makes many files": "for i in range(5000): open(f'f{i}', 'w').close()",
  "raises its limits": "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (2**30, 2**30))",
  "ends early": "import os\nos._exit(0)",
  "ends early, politely": "raise SystemExit(0)",
  "ends in a thread": "import os, threading\nthreading.Thread(target=os._exit, args=(0,)).start()\nwhile True: pass",
  "waits for the clock": "import time\ntime.sleep(100)",
  "talks without an end": "import os\nwhile True:\n  for fd in range(3, 9):\n    try: os.write(fd, b'x' * 2**20)\n"
  "    except OSError: pass",
  # It says itself that it has passed: each of these has a wrong answer.
  "writes a verdict": "import os\nfor fd in range(3, 60):\n  try: os.write(fd, b'\\n' + b'0' * 32)\n  except OSError: pass\n1 / 0",
  "writes a verdict, and ends": "import os\nfor fd in range(3, 9):\n  try: os.write(fd, b'passed')\n  except OSError: pass\n"
  "os._exit(0)",
  "looks for the secret in its frames": "import sys, os\nf, found = sys._getframe(), []\nwhile f:\n"
  "  found += [x for x in {**f.f_globals, **f.f_locals}.values() if isinstance(x, bytes) and len(x) == 32]\n"
  "  f = f.f_back\nfor x in found:\n  for fd in range(3, 9):\n    try: os.write(fd, x)\n    except OSError: pass\nos._exit(0)",
  "ends in a frame": "try: 1 / 0\nexcept Exception as e:\n  f = e.__traceback__.tb_frame\n  while f.f_back: f = f.f_back\n"
  "  f.f_globals['end'](0)",
  "looks at other threads": "import sys\nassert len(sys._current_frames()) > 1",
  "looks at all objects": "import gc\nassert gc.get_objects()",
  "looks at the main module": "import __main__\n__main__.main",
  "traces": "import sys\nsys.settrace(print)",
  "listens": "import sys\nseen = []\nsys.addaudithook(lambda *x: seen.append(x))\nopen('x', 'w')\nassert seen",
  "makes the failure a success": "import sys\nsys.unraisablehook = sys.excepthook = lambda *_: None\n1 / 0",
  "redefines the end": "import os, json, builtins\nos._exit = os.write = json.dumps = builtins.len = print\n1 / 0",
}  # fmt: skip


@pytest.fixture
def home(tmp_path):
  (tmp_path / "home").mkdir()
  (tmp_path / "home" / "secret").write_text("mine")
  return tmp_path / "home"


def tried(code, home, namespaces, kernel=True):
  limits = {"RLIMIT_CPU": 1, "RLIMIT_AS": 2**30, "RLIMIT_FSIZE": 2**20, "RLIMIT_NPROC": 0, "RLIMIT_NOFILE": 64}
  program = sandbox._Program(code.replace("{home}", str(home)), limits, "late", 1.5)
  found = program.run(namespaces, kernel), program.held
  assert [path.name for path in home.iterdir()] == ["secret"] and (home / "secret").read_text() == "mine"
  assert (home / "secret").stat().st_mode & 0o600 == 0o600 and (home / "secret").stat().st_mtime > 1e9
  return found


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_fails(home, name):
  said, held = tried(ATTACKS[name], home, sandbox._namespaces())
  assert said and "\n" not in said, (name, held)


NEEDS = {"fills the disk": "folder", "makes many files": "folder"}  # of the kernel; nothing else counts bytes


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ATTACKS if name not in NEEDS])
def test_it_fails_without_namespaces(home, name):
  said, held = tried(ATTACKS[name], home, False)
  assert said or "seccomp" not in held, name


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ATTACKS if name.split()[0] in ("reads", "writes", "forks", "calls")])
def test_the_hook_alone_refuses_what_python_asks(home, name):
  if name not in ("reads it, behind the hook's back", "reads it, from a folder", "writes a file, from a folder"):
    assert tried(ATTACKS[name], home, False, kernel=False)[0], name


@pytest.mark.parametrize("name", ["reads a file", "forks", "opens a socket", "signals its parent", "makes a pipe"])
def test_the_kernel_refuses_what_the_hook_does_not_see(home, name, monkeypatch, tmp_path):
  """The same with the hook put out of use."""
  source = sandbox._FENCES.read_text("utf-8")
  assert source.count("sys.addaudithook(guard(") == 1
  (tmp_path / "fences.py").write_text(source.replace("sys.addaudithook(guard(", "str(guard("))
  monkeypatch.setattr(sandbox, "_FENCES", tmp_path / "fences.py")
  _, held = tried("", home, False)
  if not {"landlock", "seccomp"} <= set(held):
    pytest.skip(f"could not find Landlock and seccomp: {held}")
  assert tried(ATTACKS[name], home, False)[0].startswith(("PermissionError", "BlockingIOError"))


def test_to_import_the_fences_puts_none_up():
  """The pages import every module; it is a program only as one."""
  assert importlib.import_module("lladax.evaluation.fences").main


def test_what_is_missing_is_said_once(monkeypatch, caplog):
  monkeypatch.setattr(sandbox, "_NAMESPACES", ("no-such-command",))
  sandbox._namespaces.cache_clear()
  assert sandbox.run("assert True").passed and sandbox.run("assert True").passed
  assert caplog.text.count("no namespaces: a program could see other processes") == 1
  sandbox._namespaces.cache_clear()
