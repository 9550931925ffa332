"""What two runs are compared by, and how one is stopped."""

import json
import os
import signal

import numpy as np

import lladax
from lladax.data import batches
from lladax.storage import checkpoint


def curve(workdir):
  """What must be the same in two runs that are the same, of every step."""
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return [(line["step"], line["loss"], line["grad_norm"], line["learning_rate"]) for line in lines if "loss" in line]


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
