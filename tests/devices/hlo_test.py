"""The text of compiled programs: written by hand as XLA and libtpu write it."""

from lladax.devices import hlo

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
  assert hlo.collectives(hlo.parse(HLO)) == {
    "all-gather": (12, 12 * 8 * 8 * 2),
    "reduce-scatter": (12, 12 * 8 * 8 * 4),
    "all-reduce": (1, 4 + 16 * 4),
    "collective-permute": (1, 2 * 3 * 2),
  }
  assert hlo.collectives(hlo.parse("")) == {}
