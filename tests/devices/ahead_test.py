import pytest

from lladax.devices import ahead, sharding

HLO = """\
HloModule jit_step, is_scheduled=true

%condition.1 (p: (s32[], f32[8])) -> pred[] {
  %constant.5 = s32[]{:T(128)} constant(12)
  ROOT %less = pred[] compare(%i, %constant.5), direction=LT
}

%fused.start (p: bf16[4,8]) -> bf16[8,8] {
  %all-gather.1 = bf16[8,8]{1,0} all-gather(%p), channel_id=7, dimensions={0}
}

%fused.done (p: bf16[4,8]) -> bf16[8,8] {
  %all-gather.2 = bf16[8,8]{1,0} all-gather(%p), channel_id=7, dimensions={0}
}

%all-reduce-scatter.1 (p: f32[8,8]) -> f32[4,8] {
  %all-reduce.3 = f32[8,8]{1,0} all-reduce(%p), channel_id=8, to_apply=%add
}

%body.1 (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %a = bf16[8,8] fusion(%x), kind=kCustom, calls=%fused.start
  %b = bf16[8,8] fusion(%x), kind=kCustom, calls=%fused.done
  %c = f32[4,8] fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %loop = (s32[], f32[8]) while(%init), condition=%condition.1, body=%body.1
  %sum = (f32[], /*index=1*/f32[16]{0}) all-reduce(%u, %v), channel_id=1, to_apply=%add
  %moved = (bf16[2,3]{1,0}, bf16[2,3]{1,0}, u32[], u32[]) collective-permute-start(%w), channel_id=2
  %end = bf16[2,3]{1,0} collective-permute-done(%moved)
}
"""


def test_collectives_of_a_program():
  assert ahead.collectives(HLO) == {
    "all-gather": (12, 12 * 8 * 8 * 2),
    "reduce-scatter": (12, 12 * 8 * 8 * 4),
    "all-reduce": (1, 4 + 16 * 4),
    "collective-permute": (1, 2 * 3 * 2),
  }
  assert ahead.collectives("") == {}


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
