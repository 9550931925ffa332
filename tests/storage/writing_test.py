import errno
import os
import pathlib
import subprocess
import sys

import pytest

from lladax.devices import distributed
from lladax.mistake import refusal
from lladax.storage import writing


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO, errno.EDQUOT, errno.ENOTDIR])
def test_what_a_disk_refuses_is_one_line_that_launchers_do_not_restart(number, capsys, monkeypatch):
  monkeypatch.setattr(distributed, "leave", lambda code: None)

  def command(argv):
    try:
      raise OSError(number, os.strerror(number), "/disk/config.json")
    except OSError as error:
      raise RuntimeError("a library's") from error

  assert distributed.guard(command, []) == 1
  assert capsys.readouterr().err == f"lladax: /disk/config.json: {os.strerror(number)}\n"


def test_other_errors_stay_crashes(capsys, monkeypatch):
  monkeypatch.setattr(distributed, "leave", lambda code: None)

  def command(argv):
    try:
      pathlib.Path("/dev/null/x").read_text()
    except OSError:
      raise RuntimeError("a bug, met on the way") from None

  assert distributed.guard(command, []) == 70 and "Traceback" in capsys.readouterr().err
  assert refusal(FileNotFoundError(errno.ENOENT, "no such file")) == ""
  text = "RESOURCE_EXHAUSTED: Error writing \"x\" [os_error_code='28'] [source locations='...']"
  assert writing.reason(ValueError(text)) == "No space left on device"
  assert writing.reason(ValueError("one\ntwo")) == "ValueError: one"


@pytest.fixture
def small(tmp_path):
  """A disk of 12 MB, and what it is filled with."""
  disk = tmp_path / "disk"
  disk.mkdir()
  try:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", disk], check=True, capture_output=True)
  except (OSError, subprocess.CalledProcessError) as error:
    pytest.skip(f"nothing can be mounted here: {error}")
  yield disk
  subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.slow
def test_a_run_on_a_disk_that_fills_goes_on_and_ends_with_one_line(small, tiny_flags):
  workdir = small / "run"
  command = [sys.executable, "-m", "lladax.main", *tiny_flags, f"--workdir={workdir}", "--config.log.tensorboard=True"]
  env = os.environ | {"JAX_PLATFORMS": "cpu"}

  def run():
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stderr

  with (small / "others").open("wb") as file:
    file.write(bytes(12 * 2**20 - 100_000))
  code, said = run()
  assert code == 1
  assert "is NOT saved" in said and "No space left on device" in said.splitlines()[-1]
  (small / "others").unlink()
  subprocess.run(["mount", "-o", "remount,ro", small], check=True)
  code, said = run()
  assert (code, len(said.splitlines())) == (1, 1) and "cannot be written: Read-only file system" in said
  subprocess.run(["mount", "-o", "remount,rw", small], check=True)
  code, said = run()
  assert code == 0, said
