"""The text of compiled programs: written by hand as XLA and libtpu write it."""

import pytest

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


GPU_HLO = """\
%body.1 (p: (s32[], bf16[8])) -> (s32[], bf16[8]) {
  %a = ((bf16[4]{0}, bf16[4,8]{1,0}), (bf16[8]{0}, bf16[8,8]{1,0})) all-gather-start(%x, %y), channel_id=3
  %a.done = (bf16[8]{0}, bf16[8,8]{1,0}) all-gather-done(%a)
  %b = ((f32[8]{0}, f32[8,8]{1,0}), (f32[4]{0}, f32[4,8]{1,0})) reduce-scatter-start(%u, %v), channel_id=4
  %w = f32[16,8]{1,0} fusion(%v), kind=kLoop, calls=%fused
  %c = f32[8,8]{1,0} reduce-scatter(%w), channel_id=5, to_apply=%add
}

ENTRY %main (p: bf16[8]) -> bf16[8] {
  %loop = (s32[]) while(%init), condition=%condition.1, body=%body.1, backend_config={"known_trip_count":{"n":"22"}}
  %sum = (f32[2]{0}, f32[3]{0}) all-reduce-start(%d, %e), channel_id=1, to_apply=%add
  %sum.done = (f32[2]{0}, f32[3]{0}) all-reduce-done(%sum)
}
"""


def test_collectives_of_a_program_for_gpus():
  assert hlo.collectives(hlo.parse(GPU_HLO)) == {
    "all-gather": (22, 22 * (8 + 8 * 8) * 2),
    "reduce-scatter": (44, 22 * (8 + 8 * 8 + 16 * 8) * 4),  # of what goes in
    "all-reduce": (1, (2 + 3) * 4),
  }


def test_a_line_of_a_program():
  text = """\
HloModule m

FileNames
1 "/src/model.py"

FunctionNames
1 "run"
2 "Block.__call__"

FileLocations
1 {file_name_id=1 function_name_id=1 line=3 end_line=3 column=1 end_column=2}
2 {file_name_id=1 function_name_id=2 line=17 end_line=18 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}

ENTRY %main (p: f32[8]) -> (f32[8], bf16[2,3]) {
  %p.0 = f32[8]{0} parameter(0)
  %kernel = (s8[16]{0}, /*index=1*/bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}) custom-call(%p.0, %p.0), words="{
"more":"%not.an.operand"}", metadata={op_name="jit(f)/dot" stack_frame_id=2}
  ROOT %t = (f32[8]{0}, bf16[2,3]{1,0}) tuple(%p.0, %q)
}
"""
  program = hlo.parse(text)
  parameter, kernel, root = program.computations["main"]
  assert (parameter.op, parameter.literal, parameter.nbytes) == ("parameter", "0", 32)
  assert (kernel.op, kernel.operands) == ("custom-call", ("p.0", "p.0")) and root.root and not kernel.root
  assert [(x.dtype, x.dims, x.near) for x in kernel.results] == [
    ("s8", (16,), False), ("bf16", (2, 3), True), ("u32", (), True)
  ]  # fmt: skip
  assert kernel.attribute('op_name="([^"]*)"') == "jit(f)/dot"
  assert [(x.function, x.line) for x in program.stack(kernel)] == [("Block.__call__", 17), ("run", 3)]
  assert program.stack(root) == []


@pytest.mark.parametrize(("dtype", "size"), [("pred", 10), ("s4", 5), ("f8e4m3fn", 10), ("bf16", 20), ("c64", 80)])
def test_bytes_of_ten(dtype, size):
  assert hlo.Array(dtype, (2, 5)).nbytes == size


LOOP = """\
%condition (p: (u32[], f32[8])) -> pred[] {
  %p = (u32[], f32[8]) parameter(0)
  %i = u32[] get-tuple-element(%p), index=0
  %limit = u32[]{:T(128)} constant(9)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%body (q: (u32[], f32[8])) -> (u32[], f32[8]) {
  %q = (u32[], f32[8]) parameter(0)
  %j = u32[] get-tuple-element(%q), index=0
  %x = f32[8] get-tuple-element(%q), index=1
  %step = u32[] constant(STEP)
  %next = u32[] add(%j, %step)
  ROOT %r = (u32[], f32[8]) tuple(%next, %x)
}

ENTRY %main (p: (u32[], f32[8])) -> (u32[], f32[8]) {
  %p = (u32[], f32[8]) parameter(0)
  ROOT %loop = (u32[], f32[8]) while(%p), condition=%condition, body=%bodyKNOWN
}
"""


@pytest.mark.parametrize(
  ("step", "known", "trips"),
  [
    ("1", "", 9),
    ("2", "", 5),
    ("1", ', backend_config={"known_trip_count":{"n":"22"},"x":"1"}', 22),
    ("1", f', metadata={{op_name="jit(f)/transpose(jvp({hlo.rounds(7)}))/while"}}', 7),
  ],
)
def test_how_often_a_loop_runs(step, known, trips):
  program = hlo.parse(LOOP.replace("STEP", step).replace("KNOWN", known))
  assert program.trips(program.named["main"]["loop"]) == trips
  assert program.trips(hlo.Instruction("loop", "while", (), (), "condition=%gone, body=%gone")) == 1


@pytest.mark.parametrize(
  ("attributes", "group"),
  [
    ("replica_groups={{0,2},{1,3}}, dimensions={0}", [0, 2]),
    ("replica_groups=[2,4]<=[8]", [0, 1, 2, 3]),
    ("replica_groups=[4,2]<=[2,4]T(1,0)", [0, 4]),
    ("replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}", [0, 1, 2, 3]),
    ("replica_groups=mesh['a'=2,'b'=4] {'a'}", [0, 4]),
    ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", [0, 1, 2, 3, 4, 5, 6, 7]),
    ("source_target_pairs={{0,1},{1,0}}", [0, 1]),
    ("replica_groups={}", []),
  ],
)
def test_who_takes_part(attributes, group):
  assert hlo.members(hlo.Instruction("x", "all-gather", (), (), attributes)) == group


def test_the_whole_arrays_of_a_collective():
  """An asynchronous start lists operands before results; combined ones are tuples, whose parts add up."""
  text = """\
ENTRY %main (p: f32[4], q: f32[8]) -> f32[8] {
  %p = f32[4] parameter(0)
  %q = f32[8] parameter(1)
  %one = (f32[4], f32[32]) all-gather-start(%p), dimensions={0}
  %two = ((f32[4], f32[8]), (f32[32], f32[64])) all-gather-start(%p, %q), dimensions={0}
  %three = ((f32[8]), f32[1]) reduce-scatter-start(%q), dimensions={0}
  %four = f32[1] reduce-scatter(%q), dimensions={0}
  %five = (f32[4], f32[8]) all-reduce-start(%p, %q), to_apply=%add
}
"""
  lines = hlo.parse(text).named["main"]
  assert [hlo.whole(lines[name], lines) for name in ("one", "two", "three", "four", "five")] == [128, 384, 32, 32, 48]
