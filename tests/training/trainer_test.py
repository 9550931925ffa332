import gc
import json
import math
import shutil

import jax
import numpy as np
import pytest
from runs import Crash, assert_bitwise_equal, at_batch, crash, curve, losses, masked_nll

from lladax.evaluation import evaluate, held_out
from lladax.storage import checkpoint, metrics
from lladax.training import loop, trainer

pytestmark = pytest.mark.usefixtures("quick_compiles")


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


@pytest.mark.slow
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
  monkeypatch.setattr(held_out, "bound", lambda *_: {})
  trainer.train(tiny({"steps": 21}), workdir)
  reading, going, state = seen
  assert state > 200_000 and reading < 0.1 * state and going < 1.1 * state


def test_a_finished_run_is_only_evaluated_again(tiny, tiny_workdir, tmp_path):
  workdir = shutil.copytree(tiny_workdir, tmp_path / "run")
  trainer.train(tiny(), workdir)
  assert_bitwise_equal(workdir, tiny_workdir)
  first, again = (json.loads(line) for line in (workdir / "evaluations.jsonl").read_text().splitlines())
  assert first == again


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
