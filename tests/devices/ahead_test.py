import pytest

from lladax.devices import ahead, sharding


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
  assert ahead.limit(devices[0]) == pytest.approx(gib * 2**30, rel=1e-3)
