import re

import pytest

from lladax.devices import ahead, gpus, sharding


class Device:
  def __init__(self, name):
    self.platform, self.device_kind, self.compute_capability = "gpu", gpus.GPUS[name].name, gpus.GPUS[name].capability


def test_jax_asks_for_cudnn_where_a_plan_answers(monkeypatch):
  from jax._src.cudnn import fused_attention_stablehlo as private

  before = private.check_cudnn_version
  with ahead._cudnn_of(Device("a100")):
    assert private.check_cudnn_version() >= 9000
    assert private.check_compute_capability("8.0") and not private.check_compute_capability("9.0")
    assert private.is_cuda_compute_capability_equal("8.0") and not private.is_cuda_compute_capability_equal("10.3")
  assert private.check_cudnn_version is before
  monkeypatch.delattr(private, "check_cudnn_version")
  with pytest.raises(ValueError, match="cannot plan for GPUs .*check_cudnn_version.*: use jax") as error:
    with ahead._cudnn_of(Device("a100")):
      pass
  assert "\n" not in str(error.value)


def test_what_a_gpu_leaves_to_a_program(monkeypatch):
  monkeypatch.delenv(ahead.FRACTION, raising=False)
  memory = gpus.GPUS["h100"].memory
  assert ahead.limit(Device("h100"))[0] == int(0.75 * memory) - 2**30
  monkeypatch.setenv(ahead.FRACTION, "0.9")
  limit, because = ahead.limit(Device("h100"), 8)
  assert limit == int(0.9 * memory) - 2**31
  assert because.startswith("XLA_PYTHON_CLIENT_MEM_FRACTION=0.9 of 79.11 GiB, less a reserve of 2 GiB for NCCL, ")
  for wrong in ("90%", "0", "1.5"):
    monkeypatch.setenv(ahead.FRACTION, wrong)
    with pytest.raises(ValueError, match=re.escape(f"XLA_PYTHON_CLIENT_MEM_FRACTION={wrong}: it is the part")):
      ahead.limit(Device("h100"))


def test_gpus_that_do_not_exist_and_a_compiler_that_is_not_there(monkeypatch):
  with pytest.raises(ValueError, match="--topology=h900:8: there is no GPU 'h900' here; known are t4, .* b200$"):
    ahead.devices("h900:8")
  with pytest.raises(ValueError, match="--topology=h100 --slices=1: .* nodes of GPUs as in --topology=h100:8"):
    ahead.devices("h100")
  monkeypatch.setattr(ahead, "has_gpu_compiler", lambda: False)
  with pytest.raises(ValueError, match=r"^--topology=h100:8 .*: pip install 'lladax\[plan-gpu\]'$"):
    ahead.devices("h100:8")


@pytest.mark.usefixtures("gpu_compiler")
@pytest.mark.parametrize("name", gpus.GPUS)
def test_gpus_that_are_not_here(name):
  devices = ahead.devices(f"{name}:4", 2)
  assert len(devices) == 8 and devices[0].platform == "gpu" and devices[0].device_kind == gpus.GPUS[name].name
  assert sharding.make_mesh(sharding.MeshConfig(slices=2), devices).devices.size == 8
  assert ".".join(map(str, sharding.capability(devices[0]))) == gpus.GPUS[name].capability


@pytest.mark.usefixtures("libtpu")
@pytest.mark.parametrize(
  ("topology", "slices", "message"),
  [
    ("v5p", 1, "--topology=v5p --slices=1: name slices of TPUs as in"),
    ("v5p:4x4x4", 0, "--slices=0: name slices of TPUs as in"),
    ("v99:2x2", 1, "--topology=v99:2x2 --slices=1: "),
  ],
)
def test_a_topology_that_does_not_exist(topology, slices, message):
  with pytest.raises(ValueError, match=message) as error:
    ahead.devices(topology, slices)
  assert "\n" not in str(error.value)


@pytest.mark.usefixtures("libtpu")
@pytest.mark.parametrize(
  ("topology", "slices", "count", "gib"),
  [("v4:2x2x2", 1, 8, 30.75), ("v5e:4x4", 1, 16, 15.75), ("v5p:1x1x1", 1, 1, 95.74), ("v5p:4x4x4", 2, 128, 95.74),
   ("v6e:16x16", 1, 256, 31.25), ("tpu7x:2x2x1", 1, 8, 94.75)],
)  # fmt: skip
def test_devices_and_what_they_hold(topology, slices, count, gib):
  devices = ahead.devices(topology, slices)
  assert len(devices) == count and devices[0].platform == "tpu"
  assert sharding.make_mesh(sharding.MeshConfig(slices=slices), devices).devices.size == count
  assert ahead.limit(devices[0])[0] == pytest.approx(gib * 2**30, rel=1e-3)
