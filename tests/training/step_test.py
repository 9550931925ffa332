import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import assert_close, at_batch, parameters

from lladax.devices import sharding
from lladax.evaluation import held_out
from lladax.storage import metrics
from lladax.training import step, trainer

pytestmark = pytest.mark.usefixtures("quick_compiles")


def test_micro_batches_change_nothing(tiny, tiny_workdir, tmp_path, monkeypatch):
  monkeypatch.setattr(held_out, "bound", lambda *_: {})
  trainer.train(tiny({"micro_batches": 4}), tmp_path)
  assert_close(tmp_path, tiny_workdir)


def on(monkeypatch, devices):
  make_mesh = functools.partial(sharding.make_mesh, devices=jax.devices()[:devices])
  monkeypatch.setattr(sharding, "make_mesh", make_mesh)
  monkeypatch.setattr(held_out, "bound", lambda *_: {})


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
@pytest.mark.parametrize("objective", ["diffusion", "blocks", "autoregressive"])
def test_every_mesh_is_the_same_with_segments_chunks_pairs_and_micro_batches(tiny, tmp_path, monkeypatch, objective):
  changes = {"noise.block": 4} if objective == "blocks" else {"objective": objective}
  changes |= {
    "data.segments": True, "data.random_lengths": 0.3, "noise.masking": "exact",
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


def test_a_spike_is_told_by_the_running_statistics():
  """Of 300 norms, against NumPy's mean and deviation of the 100 (weights 1/n) and their exponential successors."""
  log_norm = np.random.default_rng(0).normal(-1.0, 0.2, 300)
  log_norm[[50, 200, 201]] = 2.0, 1.5, -9.0  # too early to tell, a spike, and the opposite of one
  judge = jax.jit(step.judge, static_argnums=3)
  known, good = step.guard(), []
  for x in log_norm:
    fine, known = judge(known, jnp.float32(1.0), jnp.float32(np.exp(x)), 6.0)
    good.append(bool(fine))
  assert [n for n, fine in enumerate(good) if not fine] == [200]
  kept = np.delete(log_norm, 200)
  mean, variance = kept[:100].mean(), kept[:100].var()
  for x in kept[100:]:
    mean, variance = mean + 0.01 * (x - mean), 0.99 * (variance + 0.01 * (x - mean) ** 2)
  np.testing.assert_allclose([known["mean"], known["variance"]], [mean, variance], rtol=1e-4)
  assert (int(known["seen"]), int(known["skipped"]), int(known["row"])) == (299, 1, 0)
  for loss, norm in ((np.nan, 1.0), (1.0, np.inf), (np.inf, 1.0), (1.0, np.nan)):
    fine, after = judge(known, jnp.float32(loss), jnp.float32(norm), 0.0)
    assert not fine and int(after["row"]) == 1 and after["mean"] == known["mean"] and after["seen"] == known["seen"]
  fine, after = judge(known, jnp.float32(1.0), jnp.float32(0.0), 6.0)  # nothing to learn from, and no harm
  assert fine and after["mean"] == known["mean"] and np.isfinite(after["variance"])


def test_a_spike_changes_nothing(tiny, tmp_path, monkeypatch):
  monkeypatch.setattr(step, "_WINDOW", 5)
  at_batch(monkeypatch, 12, lambda batch: batch.update(weight=batch["weight"] * np.float32(1e4)))
  trainer.train(tiny({"guard.spike": 8.0}), tmp_path)
  assert [row["step"] for row in metrics.read(tmp_path / "metrics.jsonl") if "skipped" in row] == [12]


@pytest.mark.slow
def test_what_changes_nothing_does_so_on_every_mesh(tiny, tmp_path, monkeypatch):
  """Bad batches, a return to a checkpoint, and more bad batches: on one device as on eight."""
  B = tiny().data.batch_size

  def poison(batch):
    batch["weight"] = np.where(np.isin(batch["index"] // B, [2, 6, 7, 8, 11])[:, None], np.nan, batch["weight"])

  changes = {"checkpoint.every": 5, "guard.patience": 3}
  for name, devices, more in (("one", 1, {}), ("eight", 8, {"mesh.data": 2, "mesh.fsdp": 4})):
    with monkeypatch.context() as patch:
      on(patch, devices)
      at_batch(patch, None, poison)
      trainer.train(tiny(changes | more), tmp_path / name)
  a, b = parameters(tmp_path / "one"), parameters(tmp_path / "eight")
  for name in a:
    np.testing.assert_allclose(a[name], b[name], rtol=0, atol=1e-5 * np.abs(b[name]).max(), err_msg=name)
