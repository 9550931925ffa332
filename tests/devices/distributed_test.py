"""Two processes of four devices each, on this machine; and what ends a job that goes wrong."""

import importlib.util
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import conftest
import numpy as np
import pytest

from lladax.devices import distributed
from lladax.training import trainer

pytestmark = pytest.mark.usefixtures("quick_compiles")


def start(flags, workdir, *, more=({}, {}), limited=None):
  """Two processes that train together; `more`: flags of each, name -> value; `limited` cannot write large files."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  env = os.environ | {"XLA_FLAGS": f"{conftest.XLA_FLAGS} --xla_force_host_platform_device_count=4"}
  command = [sys.executable, "-m", "lladax.main", *flags, f"--workdir={workdir}"]
  command += [f"--coordinator=localhost:{port}", "--num_processes=2"]
  return [
    subprocess.Popen(
      [
        *(["bash", "-c", 'ulimit -f 40; exec "$@"', "-"] if i == limited else []),
        *command, f"--process_id={i}", *(f"--{name}={value}" for name, value in more[i].items()),
      ],
      env=env, stderr=subprocess.PIPE, text=True,
    )
    for i in range(2)
  ]  # fmt: skip


def finish(processes):
  """[(exit code, stderr), ...]."""
  try:
    errors = [process.communicate(timeout=300)[1] for process in processes]
  finally:
    for process in processes:
      process.kill()
  return list(zip([process.returncode for process in processes], errors, strict=True))


def wait_for_steps(processes, workdir):
  """Until three steps are written, or a process has ended."""
  path = workdir / "metrics.jsonl"
  while all(process.poll() is None for process in processes):
    if path.exists() and path.read_text().count("\n") > 2:
      break
    time.sleep(0.05)


def losses(workdir):
  return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"data": -1}, {"data": 1, "tensor": 2, "context": 4}], ids=str)
def test_two_processes_get_the_losses_of_one(tiny_flags, tiny_workdir, tmp_path, mesh):
  flags = [*tiny_flags, *(f"--config.mesh.{axis}={size}" for axis, size in mesh.items())]
  flags.append("--config.evaluate.canvases=('red [MASK][MASK]',)")
  (first, console), (second, quiet) = finish(start(flags, tmp_path))
  assert (first, second) == (0, 0), console + quiet
  np.testing.assert_allclose(losses(tmp_path), losses(tiny_workdir), rtol=1e-6)
  assert (tmp_path / "samples.html").is_file()  # both have filled it
  assert "step 20/20" in console and "step" not in quiet  # one of them speaks
  bound, expected = (
    json.loads((path / "evaluations.jsonl").read_text())["bits_per_byte"] for path in (tmp_path, tiny_workdir)
  )
  assert abs(bound - expected) < 1e-4


EXPERTS = {
  "N": 2, "H": 4, "G": 4, "E": 8, "J": 2, "X": 8, "S": 8, "dense": 1, "router": "sigmoid", "router_bias": True,
  "router_groups": 4, "router_topk_groups": 2, "router_renormalise": True, "balance": 0.01, "balance_rate": 1e-3,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"fsdp": 4, "tensor": 2}, {"tensor": 2, "context": 4}], ids=str)
def test_two_processes_with_experts_get_the_losses_of_one(tiny, tiny_flags, tmp_path, mesh):
  """Along fsdp or tensor experts lie in both processes, and are gathered, or asked, from one to the other."""
  fields = {f"model.{name}": x for name, x in EXPERTS.items()} | {"steps": 6, "evaluate.every": 0}
  trainer.train(tiny(fields), tmp_path / "one")
  axes = {f"mesh.{axis}": size for axis, size in ({"data": 1} | mesh).items()}
  flags = [*tiny_flags, *(f"--config.{name}={x}" for name, x in (fields | axes).items())]
  (first, console), (second, quiet) = finish(start(flags, tmp_path / "two"))
  assert (first, second) == (0, 0), console + quiet
  np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("process", "number"), [(1, signal.SIGTERM), (1, signal.SIGINT), (0, signal.SIGINT)])
def test_a_signal_to_one_ends_both_and_one_process_goes_on(tiny, tiny_flags, tiny_workdir, tmp_path, process, number):
  processes = start([*tiny_flags, "--config.steps=100000", "--config.checkpoint.every=100000"], tmp_path)
  wait_for_steps(processes, tmp_path)
  processes[process].send_signal(number)
  ends = finish(processes)
  assert [code for code, _ in ends] == [128 + number] * 2, ends
  (saved,) = (int(folder.name) for folder in (tmp_path / "checkpoints").iterdir())
  assert saved == len(losses(tmp_path))
  trainer.train(tiny({"steps": saved + 3, "checkpoint.every": 100000}), tmp_path)  # 1 process, 8 devices
  found = losses(tmp_path)
  assert len(found) == saved + 3
  n = min(20, len(found))  # the unbroken run's losses, as far as it went
  np.testing.assert_allclose(found[:n], losses(tiny_workdir)[:n], rtol=1e-6)


@pytest.mark.slow
def test_a_signal_to_one_before_the_first_step_ends_both(tiny_flags, tmp_path):
  processes = start(tiny_flags, tmp_path)
  while not (tmp_path / "config.json").exists() and processes[0].poll() is None:
    time.sleep(0.02)
  processes[1].send_signal(signal.SIGTERM)
  ends = finish(processes)
  assert [code for code, _ in ends] == [128 + signal.SIGTERM] * 2, ends
  assert ends[0][1].endswith("lladax: stopped by SIGTERM; the same command goes on from what is saved\n")


EARLY = """
import os, signal, sys, time
from lladax.devices import distributed, interrupts
from jax.experimental import multihost_utils
import numpy as np

process, port, target, number, late = map(int, sys.argv[1:])
interrupts.own()
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background of a script ignores

def command(argv):
  distributed.initialize(f"localhost:{port}", 2, process)
  if process == target:
    time.sleep(0 if late else 2)
    os.kill(os.getpid(), number)
  time.sleep(2 * late)
  with interrupts.Interrupt():
    multihost_utils.process_allgather(np.zeros(1))
    time.sleep(60)

sys.exit(distributed.guard(command, []))
"""


@pytest.mark.slow
@pytest.mark.parametrize("target", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("late", [0, 1])
def test_a_signal_before_anybody_listens_ends_both(target, number, late):
  """A process has found the other one, and is not ready for signals yet; the other is, or comes late."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  arguments = [str(int(x)) for x in (port, target, number, late)]
  processes = [
    subprocess.Popen([sys.executable, "-c", EARLY, str(i), *arguments], stderr=subprocess.PIPE, text=True)
    for i in range(2)
  ]
  began = time.monotonic()
  ends = finish(processes)
  assert [code for code, _ in ends] == [128 + number] * 2, ends
  assert all("Traceback" not in error for _, error in ends), ends
  assert time.monotonic() - began < 45  # in less than it takes to give up


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_process_ends_the_other(tiny_flags, tmp_path, lost):
  processes = start([*tiny_flags, "--config.steps=100000"], tmp_path)
  wait_for_steps(processes, tmp_path)
  processes[lost].kill()
  began = time.monotonic()
  ends = finish(processes)
  assert ends[lost][0] == -signal.SIGKILL and ends[1 - lost][0] not in (0, 1, 130), ends  # scripts restart it
  assert time.monotonic() - began < 150  # JAX's heartbeat takes 100, where nothing is quicker


@pytest.mark.slow
def test_a_process_that_hangs_ends_the_job(tiny_flags, tmp_path):
  flags = [*tiny_flags, "--config.steps=100000", "--config.checkpoint.every=100000", "--config.log.hang_seconds=30"]
  processes = start(flags, tmp_path)
  wait_for_steps(processes, tmp_path)
  processes[1].send_signal(signal.SIGSTOP)
  error = processes[0].communicate(timeout=120)[1]
  assert processes[0].returncode == distributed.HUNG
  assert "process 0 of 2: step " in error and "took more than 30 seconds" in error
  assert "loop.py" in error and "in run" in error  # the stack
  processes[1].kill()
  processes[1].communicate(timeout=60)


def test_processes_that_disagree_do_not_start(tiny_flags, tmp_path):
  ends = finish(start(tiny_flags, tmp_path, more=({}, {"config.seed": 1})))
  for code, error in ends:
    assert code == 1
    assert "process 1 has another config than process 0" in error
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (("localhost:1", 2, 2), "--process_id=2: give all three"),
    (("", 2, 0), "--coordinator= --num_processes=2 --process_id=0: give all three"),
    (("localhost", 2, 0), "--coordinator=localhost has no port"),
  ],
)
def test_flags_that_do_not_belong_together(arguments, message):
  with pytest.raises(ValueError, match=message):
    distributed.initialize(*arguments)


def test_the_watchdog_ends_a_process_that_hangs():
  code = (
    "import time; from lladax.devices.distributed import Watchdog; w = Watchdog(0.5)\n"
    "for i in range(5): w.beat(f'step {i}'); time.sleep(0.2)\n"
    "def stuck(): time.sleep(60)\n"
    "stuck()"
  )
  result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
  assert result.returncode == distributed.HUNG
  assert "process 0 of 1: step 4 took more than 0.5 seconds (log.hang_seconds)" in result.stderr
  assert "in stuck" in result.stderr


def test_the_watchdog_lets_a_process_end():
  watchdog = distributed.Watchdog(0.2)
  watchdog.close()
  time.sleep(0.5)  # still here


def test_python_is_not_told_that_libtpu_has_no_tpu():
  """As a notebook starts: nothing chooses the platform."""
  pytest.importorskip("libtpu")
  golden = pathlib.Path(__file__).parents[1] / "golden/llada-tiny"
  code = f"import lladax; print(lladax.load({str(golden)!r}).mask_id)"
  env = {name: x for name, x in os.environ.items() if not name.startswith(("TPU_", "JAX_PLATFORMS", "JAX_PLATFORM_"))}
  done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
  assert (done.stdout, done.stderr) == ("503\n", "")


@pytest.mark.parametrize(
  ("set_", "tpus", "installed", "told"),
  [
    ({}, False, True, {"TPU_ACCELERATOR_TYPE": "v5litepod-1", "TPU_WORKER_HOSTNAMES": "localhost"}),
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, False, True, {"TPU_ACCELERATOR_TYPE": "v5litepod-1"}),
    ({"JAX_PLATFORMS": "tpu,cpu"}, True, True, {}),
    ({}, True, True, {}),
    ({}, False, False, {}),
    ({"JAX_PLATFORMS": "cpu"}, False, True, {}),
    ({"JAX_PLATFORMS": "cuda,cpu"}, False, True, {}),
  ],
)
def test_libtpu_is_told_only_where_it_would_complain(set_, tpus, installed, told, monkeypatch):
  monkeypatch.setattr(distributed, "has_tpu", lambda: tpus)
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: installed or None)
  monkeypatch.setattr(os, "environ", dict(set_))
  distributed.hush_libtpu()
  assert os.environ == set_ | told


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_a_save_that_one_process_cannot_write_is_given_up_by_all(failing, tiny_flags, tmp_path):
  """Orbax alone would let the others wait for twenty minutes. The run goes on; the last save ends it, in one line."""
  larger = [*tiny_flags, "--config.model.D=64", "--config.model.F=128", "--config.mesh.fsdp=8"]
  processes = start(larger, tmp_path / "run", limited=failing)
  for i, (code, said) in enumerate(finish(processes)):
    assert code == 1 and "Traceback" not in said, said
    why = "File too large" if i == failing else "another process could not write its part"
    assert f"step 5 is NOT saved: {tmp_path / 'run/checkpoints'} cannot be written: {why}" in said
    assert f"step 20, the last one, could not be saved: {tmp_path / 'run/checkpoints'} cannot be written: {why}" in said
