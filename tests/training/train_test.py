import functools
import gc
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import lladax
from lladax import config as configs
from lladax.data import batches
from lladax.devices import distributed, sharding
from lladax.evaluation import evaluate
from lladax.inference import convert
from lladax.mistake import Mistake
from lladax.storage import checkpoint, metrics
from lladax.training import loop, setup, trainer

pytestmark = pytest.mark.usefixtures("quick_compiles")


def curve(workdir):
  """What must be the same in two runs that are the same, of every step."""
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return [(line["step"], line["loss"], line["grad_norm"], line["learning_rate"]) for line in lines]


def losses(workdir):
  return np.array([loss for _, loss, *_ in curve(workdir)])


def parameters(workdir):
  return {name: np.asarray(x) for name, x in checkpoint.flat(lladax.load(workdir).params)}


def assert_bitwise_equal(workdir, unbroken):
  assert curve(workdir) == curve(unbroken)
  a, b = parameters(workdir), parameters(unbroken)
  assert a.keys() == b.keys()
  for name in a:
    assert a[name].tobytes() == b[name].tobytes(), name


def masked_nll(workdir):
  """The mean over masked tokens, of every step of a mask predictor."""
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return np.array([line["masked_nll"] for line in lines if "masked_nll" in line])


def assert_close(workdir, other):
  """The losses of 20 steps to 1e-6; the parameters to 1e-5, after Adam has made the most of rounding."""
  np.testing.assert_allclose(losses(workdir), losses(other), rtol=1e-6)
  np.testing.assert_allclose(masked_nll(workdir), masked_nll(other), rtol=1e-6)
  a, b = parameters(workdir), parameters(other)
  for name in a:
    np.testing.assert_allclose(a[name], b[name], rtol=0, atol=1e-5 * np.abs(b[name]).max(), err_msg=name)


def at_batch(monkeypatch, step, act):
  """Calls `act(batch)` on the batch of this step (None: of every step) as it comes out of the data."""
  real = batches.of_steps

  def of_steps(*args, **options):
    for n, batch in enumerate(real(*args, **options), start=options["start"] + 1):
      if step in (n, None):
        act(batch)
      yield batch

  monkeypatch.setattr(batches, "of_steps", of_steps)


class Crash(Exception):
  pass


def crash(batch):
  raise Crash


def terminate(batch):
  os.kill(os.getpid(), signal.SIGTERM)


def test_the_loss_goes_down(tiny_workdir):
  found = losses(tiny_workdir)
  assert len(found) == 20 and np.isfinite(found).all()
  assert found[-5:].mean() < 0.75 * found[:2].mean()
  (line,) = (tiny_workdir / "evaluations.jsonl").read_text().splitlines()
  results = json.loads(line)
  assert results["step"] == 20
  # A mean over tokens, at first that of a guess among 384, whatever the weights of their times.
  assert masked_nll(tiny_workdir)[0] == pytest.approx(math.log(384), rel=0.15)
  assert results["bits_per_byte"] < 0.75 * math.log2(384)
  report = json.loads((tiny_workdir / "evaluation.json").read_text())
  assert report["bound"]["bits_per_byte"] == results["bits_per_byte"]
  assert [loss for _, loss in report["losses"]] == found.tolist()
  assert f"{results['bits_per_byte']:.3f} ± " in (tiny_workdir / "evaluation.html").read_text()


def test_the_baseline_trains_on_the_same_batches(tiny, tmp_path, monkeypatch):
  seen = {"diffusion": [], "autoregressive": []}
  for objective, rows in seen.items():
    with monkeypatch.context() as patch:
      at_batch(patch, 12, crash)
      at_batch(patch, None, rows.append)
      with pytest.raises(Crash):
        trainer.train(tiny({"objective": objective}), tmp_path / objective)
  assert len(seen["diffusion"]) >= 11
  for a, b in zip(*seen.values(), strict=True):
    assert a.keys() == b.keys()
    for name in a:
      np.testing.assert_array_equal(a[name], b[name])
  found = losses(tmp_path / "autoregressive")
  assert found[-1] < 0.75 * found[0]


def test_micro_batches_change_nothing(tiny, tiny_workdir, tmp_path, monkeypatch):
  monkeypatch.setattr(evaluate, "bound", lambda *_: {})
  trainer.train(tiny({"micro_batches": 4}), tmp_path)
  assert_close(tmp_path, tiny_workdir)


def on(monkeypatch, devices):
  make_mesh = functools.partial(sharding.make_mesh, devices=jax.devices()[:devices])
  monkeypatch.setattr(sharding, "make_mesh", make_mesh)
  monkeypatch.setattr(evaluate, "bound", lambda *_: {})


@pytest.mark.parametrize(
  ("devices", "mesh"),
  [
    (1, {}),
    pytest.param(8, {"data": 1, "fsdp": 8}, marks=pytest.mark.slow),
    pytest.param(8, {"data": 1, "fsdp": 4, "tensor": 2}, marks=pytest.mark.slow),
    pytest.param(8, {"data": 1, "fsdp": 2, "tensor": 2, "context": 2}, marks=pytest.mark.slow),
    pytest.param(8, {"slices": 2, "data": 1, "fsdp": 2, "context": 2}, marks=pytest.mark.slow),
  ],
  ids=str,
)
def test_every_mesh_is_the_same(tiny, tiny_workdir, tmp_path, monkeypatch, devices, mesh):
  on(monkeypatch, devices)
  trainer.train(tiny({f"mesh.{axis}": size for axis, size in mesh.items()}), tmp_path)
  assert_close(tmp_path, tiny_workdir)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["diffusion", "autoregressive"])
def test_every_mesh_is_the_same_with_segments_chunks_pairs_and_micro_batches(tiny, tmp_path, monkeypatch, objective):
  changes = {
    "objective": objective, "data.segments": True, "data.random_lengths": 0.3, "noise.masking": "exact",
    "noise.times": "antithetic", "model.head_chunk": 3, "model.G": 1, "model.remat": "attention", "steps": 5,
  }  # fmt: skip
  parts = {"micro_batches": 2, "mesh.data": 2, "mesh.fsdp": 2, "mesh.context": 2, "model.remat": "none"}
  for name, devices, more in (("one", 1, {}), ("eight", 8, parts)):
    with monkeypatch.context() as patch:
      on(patch, devices)
      trainer.train(tiny(changes | more), tmp_path / name)
  assert_close(tmp_path / "eight", tmp_path / "one")


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh(tiny, tiny_workdir, tmp_path, monkeypatch):
  """8 devices, then 4, then 1: the same examples, noise and losses."""
  for steps, devices, mesh in (
    (7, 8, {"data": 2, "fsdp": 4}),
    (13, 4, {"data": 1, "fsdp": 2, "tensor": 2}),
    (20, 1, {}),
  ):
    with monkeypatch.context() as patch:
      on(patch, devices)
      changes = {f"mesh.{axis}": size for axis, size in mesh.items()}
      trainer.train(tiny(changes | {"steps": steps}), tmp_path)
  assert_close(tmp_path, tiny_workdir)


@pytest.mark.parametrize(
  ("step", "saved", "act"),
  [
    (17, [10, 15], crash),
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


def test_a_run_that_goes_on_holds_its_state_once(tiny, tiny_workdir, tmp_path, monkeypatch):
  workdir = shutil.copytree(tiny_workdir, tmp_path / "run")

  def held():
    gc.collect()
    return sum(x.nbytes for x in jax.live_arrays())

  before, seen, read, real = held(), [], checkpoint.restore, loop.run

  def restore(*args):
    seen.append(held() - before)
    return read(*args)

  def go_on(work, state, *args):
    seen.extend([held() - before, sum(x.nbytes for x in jax.tree.leaves(state))])
    return real(work, state, *args)

  monkeypatch.setattr(checkpoint, "restore", restore)
  monkeypatch.setattr(loop, "run", go_on)
  monkeypatch.setattr(evaluate, "bound", lambda *_: {})
  trainer.train(tiny({"steps": 21}), workdir)
  reading, going, state = seen
  assert state > 200_000 and reading < 0.1 * state and going < 1.1 * state


def test_a_finished_run_is_only_evaluated_again(tiny, tiny_workdir, tmp_path):
  workdir = shutil.copytree(tiny_workdir, tmp_path / "run")
  trainer.train(tiny(), workdir)
  assert_bitwise_equal(workdir, tiny_workdir)
  first, again = (json.loads(line) for line in (workdir / "evaluations.jsonl").read_text().splitlines())
  assert first == again


@pytest.mark.parametrize(("weight", "message"), [(np.nan, "loss=nan"), (1e30, "grad_norm=inf")])
def test_what_is_not_a_number_stops_the_run_and_is_not_saved(tiny, tmp_path, monkeypatch, weight, message):
  def poison(batch):
    batch["weight"] = batch["weight"] * np.float32(weight)

  at_batch(monkeypatch, 10, poison)
  with pytest.raises(FloatingPointError, match=f"{message}.* at step 10: start again") as error:
    trainer.train(tiny(), tmp_path)
  assert "\n" not in str(error.value)
  assert checkpoint.steps(tmp_path) == [5]
  assert [step for step, *_ in curve(tmp_path)] == list(range(1, 10))
  assert all(np.isfinite(x).all() for x in parameters(tmp_path).values())


def test_a_run_goes_on_with_another_config_where_that_is_safe(tiny, tiny_workdir, tmp_path, caplog):
  workdir = shutil.copytree(tiny_workdir, tmp_path / "run")
  changes = {"steps": 30, "log.every": 5, "evaluate.rows": 3, "checkpoint.keep": 1, "sample.steps": 8}
  setup.prepare(tiny(changes), workdir)
  messages = [record.getMessage() for record in caplog.records]
  for message in ("steps was 20, and is 30", "log.every was 1, and is 5", "checkpoint.keep was 2, and is 1"):
    assert any(message in x for x in messages), message
  assert json.loads((workdir / "config.json").read_text())["steps"] == 30
  caplog.clear()
  setup.prepare(tiny(changes), workdir)
  assert not caplog.records


@pytest.mark.parametrize(
  ("field", "value", "there"),
  [
    ("seed", 1, "0"), ("data.length", 8, "16"), ("data.batch_size", 16, "32"), ("data.held_out", 0.2, "0.1"),
    ("model.D", 32, "16"), ("model.V", 512, "384"), ("optimizer.b2", 0.9, "0.95"),
    ("noise.masking", "exact", "'independent'"), ("tokenizer.eos", "<end>", "'<|endoftext|>'"),
  ],
)  # fmt: skip
def test_a_run_refuses_another_config_where_it_matters(tiny, tiny_workdir, tmp_path, field, value, there):
  workdir = shutil.copytree(tiny_workdir, tmp_path / "run")
  before = (workdir / "config.json").read_text()
  with pytest.raises(ValueError) as error:
    setup.prepare(tiny({field: value, "steps": 30}), workdir)
  assert f"another config ({field}: {there} there, {value!r} here)" in str(error.value)
  assert "\n" not in str(error.value)
  assert (workdir / "config.json").read_text() == before


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


@pytest.mark.parametrize("content", [b"", b'{"seed": 0, "mod', b"[1]", b'{"model": "\xff"}', b"\x00" * 20])
def test_a_damaged_config_is_one_line(tiny, tmp_path, content):
  (tmp_path / "config.json").write_bytes(content)
  (tmp_path / "checkpoints/3").mkdir(parents=True)
  (tmp_path / "tokenizer").mkdir()
  doors = (
    lladax.load, configs.load, lambda workdir: setup.prepare(tiny(), workdir),
    lambda workdir: setup.prepare(tiny({"init_from": str(workdir)}), tmp_path / "new"),
    lambda workdir: convert.to_published(workdir, tmp_path / "published"),
  )  # fmt: skip
  said = f"^{tmp_path}/config.json (is damaged .*: put back a copy of it|is no JSON|holds .1., expected a JSON object)"
  for door in doors:
    with pytest.raises(Mistake, match=said) as error:
      door(tmp_path)
    assert "\n" not in str(error.value)


def test_torn_lines_end_neither_an_evaluation_nor_a_run(tiny, tiny_workdir, tmp_path, caplog):
  workdir = shutil.copytree(tiny_workdir, tmp_path / "run")
  for name in ("metrics.jsonl", "evaluations.jsonl"):
    path = workdir / name
    path.write_bytes(path.read_bytes() + b'{"step": 20, "loss": 1.5, "bits_per_by\xc3')
  evaluate.evaluate_last(tiny(), workdir)
  trainer.train(tiny({"steps": 21}), workdir)
  assert [x["step"] for x in metrics.read(workdir / "evaluations.jsonl")] == [20, 20, 21]
  assert curve(workdir)[:20] == curve(tiny_workdir) and len(curve(workdir)) == 21
  assert f"{workdir / 'metrics.jsonl'}: torn, and left out: line 21" in caplog.messages


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
  slow(evaluate, "_score", 3.0)  # of every draw, of which there are two to a batch
  slow(trainer, "describe", 3.0)  # behind the compilation
  config = {"steps": 6, "checkpoint.every": 3, "evaluate.every": 3, "evaluate.batch_size": 2, "log.hang_seconds": 10.0}
  trainer.train(tiny(config), tmp_path / "[/red] a[1]")  # no markup of the console's
  scored = [x for x in beats if x.startswith("scoring held-out row ")]
  assert len(scored) > 3
  assert beats[:5] == ["reading the first batch", "compiling the step", "step 1", "step 2", "step 3"]
  assert beats[5:7] == ["saving step 3", scored[0]]
  assert beats[-3:] == ["step 6", "saving step 6", "closing"]
