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
  monkeypatch.setattr(sandbox, "_namespaces", lambda: ())
  assert sandbox.run("assert True").passed
  assert sandbox.run("import os\nos.fork()").why.startswith("PermissionError")
  assert sandbox.run("while True: pass", timeout=0.5).why == "time: more than 0.5 s"
  assert not os.path.exists("/tmp/lladax-escaped")


@pytest.mark.parametrize("limits", [{"timeout": 0.0}, {"memory": 0}])
def test_limits_are_positive(limits):
  with pytest.raises(ValueError, match="both must be positive"):
    sandbox.run("", **limits)
