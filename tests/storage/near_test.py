import errno
import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from runs import Crash, assert_bitwise_equal, at_batch, crash
from stores import free_port

from lladax.storage import checkpoint, metrics
from lladax.storage.near import Near
from lladax.training import trainer

pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture
def near(tmp_path):
  return {"checkpoint.every": 20, "checkpoint.near": str(tmp_path / "near"), "checkpoint.near_every": 4}


def files(tmp_path):
  """START-STEP of each, as they were written."""
  return sorted((tmp_path / "near").rglob("*.npz"), key=lambda x: [int(n) for n in x.stem.split("-")])


def cut(tiny, config, workdir, monkeypatch, step=15):
  with monkeypatch.context() as patch:
    at_batch(patch, step, crash)
    with pytest.raises(Crash):
      trainer.train(tiny(config), workdir)


def starts(workdir):
  return [json.loads(line)["step"] for line in (workdir / "runs.jsonl").read_text().splitlines()]


def test_a_run_goes_on_from_the_nearer_tier(tiny, tiny_workdir, near, tmp_path, monkeypatch, capsys):
  """Twice; and when it is done, nothing is left there."""
  workdir = tmp_path / "run"
  cut(tiny, near, workdir, monkeypatch)
  assert checkpoint.steps(workdir) == [] and [x.stem for x in files(tmp_path)] == ["1-8", "1-12"]
  cut(tiny, near, workdir, monkeypatch, step=19)
  assert [x.stem for x in files(tmp_path)] == ["1-12", "2-16"]
  trainer.train(tiny(near), workdir)
  said = capsys.readouterr().err
  assert f"continuing from step 12 of {workdir}" in said and f"continuing from step 16 of {workdir}" in said
  assert starts(workdir) == [0, 12, 16]
  assert_bitwise_equal(workdir, tiny_workdir)
  assert not list((tmp_path / "near").iterdir())


def test_what_is_damaged_near_is_not_used(tiny, tiny_workdir, near, tmp_path, monkeypatch, capsys):
  """Nor what a kill has left of one."""
  workdir = tmp_path / "run"
  cut(tiny, near, workdir, monkeypatch)
  content = bytearray(files(tmp_path)[-1].read_bytes())
  files(tmp_path)[-1].with_name("new").write_bytes(content[: len(content) // 2])
  content[len(content) // 2] ^= 1
  files(tmp_path)[-1].write_bytes(content)
  trainer.train(tiny(near), workdir)
  assert f"continuing from step 8 of {workdir}" in capsys.readouterr().err
  assert_bitwise_equal(workdir, tiny_workdir)


def test_on_another_mesh_the_workdirs_checkpoint_counts(tiny, near, tmp_path, monkeypatch, capsys):
  workdir, config = tmp_path / "run", near | {"checkpoint.every": 10}
  cut(tiny, config, workdir, monkeypatch)
  assert [x.stem for x in files(tmp_path)] == ["1-8", "1-12"]
  cut(tiny, config | {"mesh.fsdp": 2}, workdir, monkeypatch, step=11)
  assert f"continuing from step 10 of {workdir}" in capsys.readouterr().err


def tree(step, mesh, axis):
  at = NamedSharding(mesh, PartitionSpec(axis))
  return {"step": jnp.int32(0), "params": {"w": jax.device_put(jnp.full((8, 3), step, jnp.bfloat16), at)}}


def abstract(of):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), of)


def test_what_a_later_start_did_not_know_is_of_another_way(tmp_path):
  """A run that went on elsewhere, from the workdir's step 5, and has come back."""
  mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])

  def start(step):
    metrics.append(tmp_path / "runs.jsonl", {"step": step})
    return Near(str(tmp_path / "near"), tmp_path)

  here = start(0)
  for step in (4, 8):
    here.save(step, tree(step, mesh, "x"))
  here.wait()
  known = abstract(tree(0, mesh, "x"))
  step, found = start(8).restore(known, after=5) or (0, {})
  assert step == 8 and bool((found["params"]["w"] == 8).all()) and found["params"]["w"].dtype == jnp.bfloat16
  assert Near(str(tmp_path / "near"), tmp_path).newest(after=5) == 8
  assert start(8).restore(abstract(tree(0, mesh, None)), after=5) is None  # sliced otherwise
  assert start(8).restore(known, after=8) is None
  later = start(5)
  assert (later.restore(known, after=0) or [0])[0] == 4 and later.newest(after=5) == 5
  for step in (6, 7):
    later.save(step, tree(step, mesh, "x"))
  later.wait()
  assert (start(7).restore(known, after=5) or [0])[0] == 7
  assert [x.stem for x in files(tmp_path)] == ["5-6", "5-7"]


def test_what_goes_back_leaves_nothing_newer(tmp_path):
  mesh = jax.make_mesh((1,), ("x",), devices=jax.devices()[:1])
  metrics.append(tmp_path / "runs.jsonl", {"step": 0})
  here = Near(str(tmp_path / "near"), tmp_path)
  for step in (4, 8):
    here.save(step, tree(step, mesh, "x"))
  here.wait()
  here.save(12, tree(np.nan, mesh, "x"))
  assert here.newest(after=0) == 8
  here.drop(after=4)
  assert here.newest(after=0) == 4


def test_another_run_has_other_states_near(tmp_path):
  """Also one that begins in the same workdir, after that was removed."""
  mesh, runs = jax.make_mesh((1,), ("x",), devices=jax.devices()[:1]), tmp_path / "runs.jsonl"
  for seconds, newest in ((1, 0), (2, 0), (1, 4)):
    runs.write_text(json.dumps({"step": 0, "time": seconds}) + "\n")
    here = Near(str(tmp_path / "near"), tmp_path)
    assert here.newest(after=0) == newest
    here.save(4, tree(4, mesh, "x"))
    here.wait()


def test_a_disk_that_refuses_ends_nothing(tmp_path, caplog):
  """It is said once."""
  mesh = jax.make_mesh((1,), ("x",), devices=jax.devices()[:1])
  (tmp_path / "near").write_text("a file")
  here = Near(str(tmp_path / "near"), tmp_path)
  for step in (4, 8):
    here.save(step, tree(step, mesh, "x"))
  here.drop(after=0)
  assert here.newest(after=3) == 3
  assert len([x for x in caplog.messages if "near" in x and "cannot be written" in x]) == 1


def test_a_disk_that_is_full_keeps_what_it_has(tmp_path, monkeypatch, caplog):
  mesh = jax.make_mesh((1,), ("x",), devices=jax.devices()[:1])
  metrics.append(tmp_path / "runs.jsonl", {"step": 0})
  here = Near(str(tmp_path / "near"), tmp_path)
  here.save(4, tree(4, mesh, "x"))
  here.wait()
  real = np.savez

  def full(file, **parts):
    real(file, **parts)
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(np, "savez", full)
  here.save(8, tree(8, mesh, "x"))
  here.wait()
  assert here.newest(after=0) == 4
  assert [x.name for x in files(tmp_path)[0].parent.iterdir()] == ["1-4.npz"]
  assert "No space left on device; the run goes on without" in caplog.text


def test_both_fields_belong_together(tiny):
  with pytest.raises(ValueError, match="checkpoint.near='', checkpoint.near_every=4"):
    tiny({"checkpoint.near_every": 4})


KILLED = """
import os, pathlib, signal, sys, time
from lladax import main
from lladax.data import batches
real, near = batches.of_steps, pathlib.Path(sys.argv.pop(1))
def of_steps(*args, **options):
  for n, batch in enumerate(real(*args, **options), start=options["start"] + 1):
    while n == 15:
      if len(list(near.rglob("*-12.npz"))) >= 2 and not list(near.rglob("*-4.npz")):  # they are written in a thread
        os.kill(os.getpid(), signal.SIGKILL)
      time.sleep(0.1)
    yield batch
batches.of_steps = of_steps
main.run()
"""


@pytest.mark.slow
def test_two_processes_use_what_both_hold(tiny_flags, tmp_path):
  """Each has a disk of its own. They are killed; then of the newest state one has lost its part; then one all of it."""
  flags = [*tiny_flags, "--config.mesh.fsdp=2", "--config.checkpoint.every=20", "--config.checkpoint.near_every=4"]

  def start(port, *, killed):
    both, env = [], os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    for number in range(2):
      own = [f"--config.checkpoint.near={tmp_path}/disk", f"--process_id={number}", f"--workdir={tmp_path}/run"]
      words = [*flags, *own, "--num_processes=2", f"--coordinator=localhost:{port}"]
      how = ["-c", KILLED, f"{tmp_path}/disk"] if killed else ["-m", "lladax.main"]
      command = [sys.executable, *how, *words]
      both.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
    errors = [process.communicate()[1] for process in both]
    assert [process.returncode != 0 for process in both] == [killed] * 2, errors
    return errors[0]

  def held():
    return sorted((x.parent.name, x.stem) for x in (tmp_path / "disk").rglob("*.npz"))

  start(free_port(), killed=True)
  assert held() == [("0_of_2", "1-12"), ("0_of_2", "1-8"), ("1_of_2", "1-12"), ("1_of_2", "1-8")]
  next((tmp_path / "disk").rglob("1_of_2/1-12.npz")).unlink()
  assert "continuing from step 8 of" in start(free_port(), killed=True)
  shutil.rmtree(next((tmp_path / "disk").rglob("1_of_2")))
  assert "continuing" not in start(free_port(), killed=False)
  assert json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])["step"] == 20
  assert starts(tmp_path / "run") == [0, 8, 0] and not held()
