import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import Crash, assert_bitwise_equal, at_batch, crash, curve, parameters, terminate

from lladax import config
from lladax.devices import distributed
from lladax.devices.interrupts import Interrupt
from lladax.evaluation import held_out
from lladax.storage import checkpoint, metrics
from lladax.training import loop, trainer

pytestmark = pytest.mark.usefixtures("quick_compiles")


def test_any_step_over_any_batches(tmp_path):
  """A least-squares fit in place of a language model: nothing of a corpus, a model or a Config."""

  @jax.jit
  def step(w, batch_BD):
    loss, grad = jax.value_and_grad(lambda w: jnp.mean((batch_BD @ w - 3.0) ** 2))(w)
    return w - 0.1 * grad, {"loss": loss, "grad_norm": jnp.linalg.norm(grad)}

  seen, here = [], jax.local_devices()[0]
  batches = (jax.device_put(np.eye(2, dtype=np.float32), here) for _ in range(10))
  work = loop.Work(
    parts=[loop.Part(0, 10, step, flops=1.0)], batches=batches, start=0, end=10, tokens=2,
    learning_rate=lambda n: 0.1, describe=lambda w, programs: seen.append(programs[step].memory_analysis()),
    to_tree=lambda w: {"w": w}, evaluate=lambda n, w, beat: {"error": float(jnp.abs(w - 3.0).max())}, evaluate_every=4,
  )  # fmt: skip
  log, often = config.LogConfig(tensorboard=False), config.CheckpointConfig(every=5)
  with Interrupt() as stop:
    w = loop.run(work, jax.device_put(np.zeros(2, np.float32), here), tmp_path, often, log, stop)
  np.testing.assert_allclose(w, 3.0 * (1 - 0.9**10), rtol=1e-5)
  rows = metrics.read(tmp_path / "metrics.jsonl")
  assert [row["loss"] for row in rows if "loss" in row] == pytest.approx([9.0 * 0.81**n for n in range(10)], rel=1e-4)
  errors = [row["held_out_error"] for row in rows if "loss" not in row]
  assert errors == pytest.approx([3 * 0.9**4, 3 * 0.9**8], rel=1e-4)
  assert checkpoint.steps(tmp_path) == [5, 10] and len(seen) == 1
  saved = checkpoint.restore(tmp_path, 10, {"w": jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=w.sharding)})
  assert saved["w"].tobytes() == np.asarray(w).tobytes()


def test_parts_of_a_run_have_programs_and_a_speed_of_their_own(tmp_path, monkeypatch):
  """Each is compiled once, beforehand; neither tokens a second nor the utilisation are of another one's steps."""
  one, other = (jax.jit(lambda w, batch, by=by: (w + by, {"loss": w, "grad_norm": w})) for by in (1.0, 10.0))
  parts = [loop.Part(0, 3, one, flops=2.0), loop.Part(3, 5, other, flops=8.0), loop.Part(5, 9, one, flops=2.0)]
  clock = iter(np.cumsum([0, *[1] * 3, *[10] * 2, *[1] * 4]).tolist())
  monkeypatch.setattr(loop, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
  monkeypatch.setattr(metrics, "peak_flops", lambda device: 10.0)
  monkeypatch.setattr(loop, "compiled", lambda step, *args: compiled.append(step) or step.lower(*args).compile())
  compiled, here = [], jax.local_devices()[0]
  work = loop.Work(
    parts=parts, batches=(jax.device_put(np.float32(0), here) for _ in range(9)), start=0, end=9, tokens=20,
    learning_rate=lambda n: 0.1, describe=lambda w, programs: compiled.append(len(programs)),
    to_tree=lambda w: {"w": w}, evaluate=lambda n, w, beat: {}, evaluate_every=0,
  )  # fmt: skip
  log = config.LogConfig(tensorboard=False)
  with Interrupt() as stop:
    w = loop.run(work, jax.device_put(np.float32(0), here), tmp_path, config.CheckpointConfig(), log, stop)
  assert w == 3 + 20 + 4 and compiled == [one, other, 2]
  rows = metrics.read(tmp_path / "metrics.jsonl")
  assert [row["tokens_per_second"] for row in rows] == [20.0] * 3 + [2.0] * 2 + [20.0] * 4
  utilisation = np.array([row["mfu"] for row in rows]) * jax.device_count()
  np.testing.assert_allclose(utilisation, [4.0] * 3 + [1.6] * 2 + [4.0] * 4)


@pytest.mark.parametrize(
  ("step", "saved", "act"),
  [
    pytest.param(17, [10, 15], crash, marks=pytest.mark.slow),
    (14, [10, 13], terminate),
    pytest.param(3, [], crash, marks=pytest.mark.slow),
    pytest.param(2, [1], terminate, marks=pytest.mark.slow),
  ],
)
def test_a_run_that_was_stopped_goes_on_bitwise(tiny, tiny_workdir, tmp_path, monkeypatch, step, saved, act):
  handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
  with monkeypatch.context() as patch:
    at_batch(patch, step, act)
    with pytest.raises((Crash, SystemExit)) as stopped:
      trainer.train(tiny(), tmp_path)
  if act is terminate:
    assert stopped.value.code == 128 + signal.SIGTERM
  assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
  assert checkpoint.steps(tmp_path) == saved
  trainer.train(tiny(), tmp_path)
  assert_bitwise_equal(tmp_path, tiny_workdir)


def poison(weight):
  def act(batch):
    batch["weight"] = batch["weight"] * np.float32(weight)

  return act


@pytest.mark.parametrize(
  ("weight", "said"), [(np.nan, "loss=nan"), pytest.param(1e30, "grad_norm=inf", marks=pytest.mark.slow)]
)
def test_a_step_that_is_not_a_number_changes_nothing(tiny, tmp_path, monkeypatch, caplog, weight, said):
  """It is counted, and said with its examples; and the run goes on bitwise, interrupted or not."""
  seen, saved = [], checkpoint.Checkpoints.save

  def save(self, step, tree):
    seen.append((step, jax.device_get(tree)))
    saved(self, step, tree)

  monkeypatch.setattr(checkpoint.Checkpoints, "save", save)
  config = {"steps": 14, "checkpoint.every": 1}
  with monkeypatch.context() as patch:
    at_batch(patch, 10, poison(weight))
    trainer.train(tiny(config), tmp_path / "whole")
    B = tiny().data.batch_size
    line = rf"step 10 changes nothing \(.*{said}.*; 1 so far\): the examples {9 * B} to {10 * B - 1} of"
    assert [x for x in caplog.messages if re.search(line, x)]
    trees = dict(seen)
    for name in ("params", "mu", "nu"):
      jax.tree.map(np.testing.assert_array_equal, trees[10][name], trees[9][name])
      assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (trees[11][name], trees[10][name])), strict=True))
    assert trees[14]["guard"] | {"mean": 0, "variance": 0} == {
      "seen": 13, "mean": 0, "variance": 0, "skipped": 1, "row": 0, "returns": 0, "ahead": 0,
    }  # fmt: skip
    rows = {row["step"]: row for row in metrics.read(tmp_path / "whole/metrics.jsonl")}
    assert rows[10]["skipped"] == 1 and not [row for row in rows.values() if "skipped" in row and row["step"] != 10]
    assert (
      all(np.isfinite(x) for x in rows[10].values()) and "NaN" not in (tmp_path / "whole/metrics.jsonl").read_text()
    )
  with monkeypatch.context() as patch:
    at_batch(patch, 11, terminate)
    at_batch(patch, 10, poison(weight))
    with pytest.raises(SystemExit):
      trainer.train(tiny(config), tmp_path / "cut")
  trainer.train(tiny(config), tmp_path / "cut")
  a, b = parameters(tmp_path / "whole"), parameters(tmp_path / "cut")
  assert all(a[name].tobytes() == b[name].tobytes() for name in a)


def test_after_too_many_in_a_row_the_run_goes_past_their_examples(tiny, tmp_path, monkeypatch, caplog):
  """The examples are bad, wherever they come: the run is that of another order of the data, from the checkpoint on."""
  config = {"steps": 14, "checkpoint.every": 5, "guard.patience": 3}
  first, last = (8 - 1) * tiny().data.batch_size, 10 * tiny().data.batch_size - 1

  def bad(batch):
    if (batch["index"] >= first).all() and (batch["index"] <= last).all():
      batch["weight"] = batch["weight"] * np.float32(np.nan)

  read = []
  at_batch(monkeypatch, None, lambda batch: read.append(int(batch["index"][0])) or bad(batch))
  trainer.train(tiny(config), tmp_path / "whole")
  B = tiny().data.batch_size
  assert checkpoint.steps(tmp_path / "whole") == [10, 14]
  assert len([x for x in caplog.messages if "changes nothing" in x]) == 3
  steps = [step for step, *_ in curve(tmp_path / "whole")]
  assert steps == list(range(1, 15))
  rows = metrics.read(tmp_path / "whole/metrics.jsonl")
  assert not [row for row in rows if "skipped" in row]  # they are lines of steps that are not the run's any more
  again = read[read.index(10 * B, read.index(10 * B) + 1) :]  # steps 6 .. 14 over the batches 11 ..
  assert again[:9] == [n * B for n in range(10, 19)]


def test_a_run_that_diverges_ends_in_one_line(tiny, tmp_path, monkeypatch):
  at_batch(monkeypatch, None, lambda batch: batch["index"][0] >= 6 * tiny().data.batch_size and poison(np.nan)(batch))
  config = {"checkpoint.every": 5, "guard.patience": 2, "guard.returns": 2}
  with pytest.raises(FloatingPointError, match=r"went back 2 times \(guard.returns\): start again") as error:
    trainer.train(tiny(config), tmp_path)
  assert "\n" not in str(error.value)
  assert all(np.isfinite(x).all() for x in parameters(tmp_path).values())


def test_a_signal_while_the_data_stalls(tiny, tiny_workdir, tmp_path, monkeypatch):
  def stall(batch):
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    time.sleep(100)

  with monkeypatch.context() as patch:
    at_batch(patch, 8, stall)
    began = time.monotonic()
    with pytest.raises(SystemExit) as stopped:
      trainer.train(tiny(), tmp_path)
  assert stopped.value.code == 128 + signal.SIGINT and time.monotonic() - began < 90
  assert checkpoint.steps(tmp_path) == [5, 7]
  trainer.train(tiny(), tmp_path)
  assert_bitwise_equal(tmp_path, tiny_workdir)


def test_a_signal_ends_an_evaluation_at_its_next_batch(tiny, tiny_workdir, tmp_path, monkeypatch):
  scored, real = [], held_out._score

  def score(*args, **options):
    scored.append(1)
    if len(scored) == 3:
      os.kill(os.getpid(), signal.SIGTERM)
    return real(*args, **options)

  changes = {"evaluate.every": 7, "evaluate.batch_size": 2}
  with monkeypatch.context() as patch:
    patch.setattr(held_out, "_score", score)
    with pytest.raises(SystemExit) as stopped:
      trainer.train(tiny(changes), tmp_path)
  assert stopped.value.code == 128 + signal.SIGTERM
  assert len(scored) <= 2 * tiny().evaluate.num_samples  # of many
  assert checkpoint.steps(tmp_path) == [5, 7]
  assert not [row for row in metrics.read(tmp_path / "metrics.jsonl") if "loss" not in row]
  trainer.train(tiny(), tmp_path)
  assert_bitwise_equal(tmp_path, tiny_workdir)


@pytest.mark.slow
def test_sigkill_at_random_steps(tiny_flags, tmp_path):
  flags = [*tiny_flags, "--config.steps=200", "--config.checkpoint.every=7"]
  seed = random.SystemRandom().randrange(2**32)
  print(f"random.Random({seed})")
  kills = sorted(random.Random(seed).sample(range(1, 200), 3))

  def start(name):
    command = [sys.executable, "-m", "lladax.main", *flags, f"--workdir={tmp_path / name}"]
    env = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "JAX_ENABLE_COMPILATION_CACHE": "0"}  # as a user's run
    return subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL)

  def last_step(name):
    path = tmp_path / name / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)

  assert start("unbroken").wait() == 0
  for step in kills:
    process = start("killed")
    while process.poll() is None and last_step("killed") < step:
      time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
  assert start("killed").wait() == 0
  assert_bitwise_equal(tmp_path / "killed", tmp_path / "unbroken")


def test_the_watchdog_waits_for_what_moves(tiny, tmp_path, monkeypatch):
  """On a clock of its own: whatever takes long alone is waited for, and an evaluation as long as its batches go on."""
  clock, beats = [0.0], []

  class Watchdog:
    def __init__(self, seconds):
      self._seconds, self._last = seconds, clock[0]

    def beat(self, doing):
      assert clock[0] - self._last < self._seconds, beats[-1]
      self._last = clock[0]
      beats.append(doing)

    def close(self):
      self.beat("closing")

  def slow(module, name, seconds):
    real = getattr(module, name)

    def wait(*args, **options):
      clock[0] += seconds
      return real(*args, **options)

    monkeypatch.setattr(module, name, wait)

  monkeypatch.setattr(distributed, "Watchdog", Watchdog)
  slow(trainer, "_put", 6.0)  # of every step
  slow(checkpoint.Checkpoints, "save", 9.0)
  slow(held_out, "_score", 3.0)  # of every draw, of which there are two to a batch
  slow(trainer, "describe", 3.0)  # behind the compilation
  config = {"steps": 6, "checkpoint.every": 3, "evaluate.every": 3, "evaluate.batch_size": 2, "log.hang_seconds": 10.0}
  trainer.train(tiny(config), tmp_path / "[/red] a[1]")  # no markup of the console's
  scored = [x for x in beats if x.startswith("scoring held-out row ")]
  assert len(scored) > 3
  assert beats[:5] == [
    "reading the first batch",
    "compiling the step",
    "step 1",
    "reading the batch of step 2",
    "step 1",
  ]
  at = beats.index("saving step 3")
  assert beats[at - 2 : at + 2] == ["reading the batch of step 4", "step 3", "saving step 3", scored[0]]
  assert beats[-4:] == ["step 6", "saving step 6", "finishing the last save", "closing"]
