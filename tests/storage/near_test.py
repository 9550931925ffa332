import json
import os
import subprocess
import sys

import pytest
from runs import Crash, assert_bitwise_equal, at_batch, crash

from lladax.storage import checkpoint
from lladax.training import trainer

pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture
def near(tmp_path):
  return {"checkpoint.every": 20, "checkpoint.near": str(tmp_path / "near"), "checkpoint.near_every": 4}


def files(tmp_path):
  return sorted((tmp_path / "near").rglob("*.npz"), key=lambda x: int(x.stem))


def cut(tiny, config, workdir, monkeypatch, step=15):
  with monkeypatch.context() as patch:
    at_batch(patch, step, crash)
    with pytest.raises(Crash):
      trainer.train(tiny(config), workdir)


def test_a_run_goes_on_from_the_nearer_tier(tiny, tiny_workdir, near, tmp_path, monkeypatch, capsys):
  workdir = tmp_path / "run"
  cut(tiny, near, workdir, monkeypatch)
  assert checkpoint.steps(workdir) == [] and [x.stem for x in files(tmp_path)] == ["8", "12"]
  trainer.train(tiny(near), workdir)
  assert f"continuing from step 12 of {workdir}" in capsys.readouterr().err
  assert_bitwise_equal(workdir, tiny_workdir)


def test_what_is_damaged_near_is_not_used(tiny, tiny_workdir, near, tmp_path, monkeypatch, capsys):
  workdir = tmp_path / "run"
  cut(tiny, near, workdir, monkeypatch)
  content = bytearray(files(tmp_path)[-1].read_bytes())
  content[len(content) // 2] ^= 1
  files(tmp_path)[-1].write_bytes(content)
  trainer.train(tiny(near), workdir)
  assert f"continuing from step 8 of {workdir}" in capsys.readouterr().err
  assert_bitwise_equal(workdir, tiny_workdir)


def test_another_run_has_other_states_near(tiny, near, tmp_path, monkeypatch, capsys):
  """Also one that begins in the same workdir, after that was removed."""
  cut(tiny, near, tmp_path / "run", monkeypatch, step=6)
  (tmp_path / "run").rename(tmp_path / "away")
  cut(tiny, near, tmp_path / "run", monkeypatch, step=3)
  assert "continuing" not in capsys.readouterr().err


def test_a_disk_that_refuses_ends_nothing(tiny, near, tmp_path, caplog):
  (tmp_path / "near").write_text("a file")
  trainer.train(tiny(near), tmp_path / "run")
  assert checkpoint.steps(tmp_path / "run") == [20]
  assert len([x for x in caplog.messages if "near" in x and "cannot be written" in x]) == 1


def test_both_fields_belong_together(tiny):
  with pytest.raises(ValueError, match="checkpoint.near='', checkpoint.near_every=4"):
    tiny({"checkpoint.near_every": 4})


@pytest.mark.slow
def test_two_processes_use_what_both_hold(tiny_flags, tmp_path):
  """Each has a disk of its own; of the newest state one has lost its part."""
  flags = [*tiny_flags, "--config.mesh.fsdp=2", "--config.checkpoint.every=20", "--config.checkpoint.near_every=4"]

  def start(steps, port):
    both = []
    for number in range(2):
      own = [f"--config.checkpoint.near={tmp_path}/disk", f"--config.steps={steps}", f"--process_id={number}"]
      env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
      command = [
        sys.executable,
        "-m",
        "lladax.main",
        *flags,
        *own,
        "--num_processes=2",
        f"--coordinator=localhost:{port}",
      ]
      both.append(subprocess.Popen([*command, f"--workdir={tmp_path}/run"], env=env, stderr=subprocess.PIPE, text=True))
    errors = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    return errors[0]

  start(14, 12421)
  for path in checkpoint.folder(tmp_path / "run").iterdir():  # as if the last save had been cut off
    path.rename(tmp_path / "cut")
  found = sorted((tmp_path / "disk").rglob("*.npz"))
  assert sorted((x.parent.name, x.stem) for x in found) == [
    ("0_of_2", "12"), ("0_of_2", "8"), ("1_of_2", "12"), ("1_of_2", "8"),
  ]  # fmt: skip
  next(x for x in found if x.parent.name == "1_of_2" and x.stem == "12").unlink()
  assert "continuing from step 8 of" in start(20, 12422)
  assert json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])["step"] == 20
