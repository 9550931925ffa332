import functools

import jax
import pytest
from runs import (
  assert_close,
)

from lladax.devices import sharding
from lladax.evaluation import held_out
from lladax.training import trainer

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
