"""The roofline: programs written by hand, whose times are known, and a real one, whose matmuls are counted."""

import dataclasses
import json
import runpy
import sys
from pathlib import Path
from xml.etree import ElementTree

import jax
import pytest

from lladax.devices import sharding
from lladax.training import explanation, plan, roofline, step
from lladax.training.roofline import EXPOSED, HIDDEN, Device

# A matmul of 2^30 FLOPs takes 1 s, a MiB of memory 1 s, a MiB to a neighbour 1 s, to another node 8 s.
DEVICE = Device(float(2**30), float(2**20), float(2**20), float(2**17), neighbours=4, align=8)


def seconds(text, device=DEVICE):
  found = roofline.analyse(text, device)
  return {kind: x for kind, x in found.seconds.items() if x}


def entry(*lines, before=""):
  return before + "ENTRY %main (p: f32[1]) -> f32[1] {\n" + "".join(f"  {line}\n" for line in lines) + "}\n"


def test_a_kernel_takes_as_long_as_its_flops_or_its_bytes():
  a, b = "%a = bf16[1024,512]{1,0} parameter(0)", "%b = bf16[512,1024]{1,0} parameter(1)"
  dot = "%c = bf16[1024,1024]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
  assert seconds(entry(a, b, dot)) == {"matmul": 4.0}  # 1 s at the peak, and 4 MiB
  assert seconds(entry(a, b, dot), DEVICE._replace(bandwidth=2.0**30)) == {"matmul": 1.0}
  single = entry(a, b, dot).replace("bf16[", "f32[")  # TF32 at half of the peak
  assert seconds(single, DEVICE._replace(bandwidth=2.0**30)) == {"matmul": 2.0}
  assert seconds(entry(a, "%x = bf16[1024,512]{1,0} negate(%a)")) == {"element-wise": 2.0}


FUSIONS = """\
%slice (p0: f32[8,1024,256], p1: s32[]) -> bf16[1024,256] {
  %p0 = f32[8,1024,256] parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %part = f32[1,1024,256] dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,1024,256}
  %flat = f32[1024,256] bitcast(%part)
  ROOT %out = bf16[1024,256] convert(%flat)
}

%update (p0: f32[8,1024,256], p1: bf16[1024,256], p2: s32[]) -> f32[8,1024,256] {
  %p0 = f32[8,1024,256] parameter(0)
  %p1 = bf16[1024,256] parameter(1)
  %p2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  %part = f32[1,1024,256] convert(%p1)
  ROOT %out = f32[8,1024,256] dynamic-update-slice(%p0, %part, %p2, %zero, %zero)
}

%twice (p0: bf16[1024,256]) -> (bf16[1024,256], f32[1024]) {
  %p0 = bf16[1024,256] parameter(0)
  %x = bf16[1024,256] exponential(%p0)
  %sum = f32[1024] reduce(%x), dimensions={1}, to_apply=%add
  ROOT %both = (bf16[1024,256], f32[1024]) tuple(%x, %sum)
}

%scatter (p0: f32[4096,64], p1: s32[1024], p2: f32[1024,64]) -> f32[4096,64] {
  %p0 = f32[4096,64] parameter(0)
  %p1 = s32[1024] parameter(1)
  %p2 = f32[1024,64] parameter(2)
  ROOT %out = f32[4096,64] scatter(%p0, %p1, %p2), to_apply=%add
}

"""
MIB = 2**20


@pytest.mark.parametrize(
  ("line", "size"),
  [
    ("fusion(%stack, %i), kind=kLoop, calls=%slice", MIB + MIB / 2),  # one slice is read
    ("fusion(%stack, %layer, %i), kind=kLoop, calls=%update", MIB / 2 + MIB),  # and one written, in place
    ("fusion(%layer), kind=kInput, calls=%twice", MIB / 2 + MIB / 2 + 4096),  # twice used, once read
    ("fusion(%table, %ids, %rows), kind=kInput, calls=%scatter", 3 * MIB / 4 + 4096),  # rows: read, changed, written
  ],
)
def test_bytes_of_a_fusion(line, size):
  name = line.rpartition("%")[2]
  result = {"slice": "bf16[1024,256]", "update": "f32[8,1024,256]", "twice": "(bf16[1024,256], f32[1024])",
            "scatter": "f32[4096,64]"}[name]  # fmt: skip
  text = entry(
    "%stack = f32[8,1024,256] parameter(0)", "%i = s32[] parameter(1)", "%layer = bf16[1024,256] parameter(2)",
    "%table = f32[4096,64] parameter(3)", "%ids = s32[1024] parameter(4)", "%rows = f32[1024,64] parameter(5)",
    f"%x = {result} {line}", before=FUSIONS,
  )  # fmt: skip
  (kernel,) = roofline.analyse(text, DEVICE).kernels
  assert kernel.nbytes == pytest.approx(size, abs=8)
  assert bool(kernel.doubt) == (name == "scatter")


def test_collectives_run_beside_the_kernels_between_start_and_end():
  """2 MiB gathered by four neighbours take 1.5 s; a second of kernels hides a second of it, in each of three rounds."""
  text = """\
%condition (p: (s32[])) -> pred[] {
  %limit = s32[] constant(3)
}

%body (p: (s32[])) -> (s32[]) {
  %w = bf16[262144] parameter(0)
  %start = (bf16[262144], bf16[1048576]) all-gather-start(%w), channel_id=1, replica_groups=[1,4]<=[4], dimensions={0}
  %work = bf16[262144] negate(%w)
  %done = bf16[1048576] all-gather-done(%start)
  ROOT %t = (s32[]) tuple(%i)
}

ENTRY %main (p: (s32[])) -> (s32[]) {
  %loop = (s32[]) while(%p), condition=%condition, body=%body
}
"""
  assert seconds(text) == {"element-wise": 3.0, HIDDEN: 3.0, EXPOSED: 1.5}
  assert roofline.analyse(text, DEVICE).total == 4.5
  at_once = text.replace("negate(%w)", "bitcast(%w)")
  assert seconds(at_once) == {EXPOSED: 4.5}
  # Eight of two nodes: each has 4 x 1/8 of the network, and half of 2 MiB to fetch.
  assert seconds(at_once.replace("[1,4]<=[4]", "[1,8]<=[8]")) == {EXPOSED: 3 * 2.0}
  # libtpu's fusions compute while the collective of their channel runs.
  carried = """\
%carrying (p: bf16[262144]) -> bf16[262144] {
  %p = bf16[262144] parameter(0)
  %all = bf16[1048576] all-gather(%p), channel_id=7, replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %x = bf16[262144] negate(%p)
}

ENTRY %main (w: bf16[262144]) -> bf16[262144] {
  %w = bf16[262144] parameter(0)
  %start = bf16[262144] fusion(%w), kind=kCustom, calls=%carrying
  %end = bf16[262144] fusion(%start), kind=kCustom, calls=%carrying
}
"""
  assert seconds(carried) == {"element-wise": 2.0, HIDDEN: 1.5}


def test_attention_of_cudnn():
  call = """\
%q = bf16[2,64,4,16]{3,2,1,0} parameter(0)
%o = (bf16[2,4,64,16]{3,1,2,0}, f32[2,4,64]{2,1,0}, u8[0]{0}) custom-call(%q, %q, %q), \
custom_call_target="__cudnn$fmhaSoftmax", \
backend_config={"cudnn_fmha_backend_config": {"fmha_scale": 1, "intermediate_tensor_shape": {"element_type": "BF16", \
"dimensions": ["2", "4", "64", "64"], "is_dynamic": []}, "mask_type": "NO_MASK"}}"""
  (kernel,) = roofline.analyse(entry(*call.split("\n")), DEVICE).kernels
  assert kernel.kind == "attention" and kernel.flops == 4 * 2 * 4 * 64 * 64 * 16
  (kernel,) = roofline.analyse(entry(*call.replace("Softmax", "SoftmaxBackward").split("\n")), DEVICE).kernels
  assert kernel.flops == 10 * 2 * 4 * 64 * 64 * 16
  (kernel,) = roofline.analyse(entry(*call.replace("NO_MASK", "CAUSAL").split("\n")), DEVICE).kernels
  assert kernel.flops == 2 * 2 * 4 * 64 * 64 * 16


@pytest.mark.parametrize(
  ("left", "right", "out", "attributes", "flops"),
  [  # as libtpu writes: x @ w; a weight's gradient; a batch of matmuls, by padding or by dilation
    ("[1,128,64]", "[64,32,1]", "[1,128,32]", "window={size=1}, dim_labels=0bf_io0->0bf", 2 * 128 * 64 * 32),
    ("[128,64]", "[64,32]", "[128,32]", "dim_labels=bf_io->bf", 2 * 128 * 64 * 32),
    ("[2,128,64,1]", "[4,16,64,1]", "[2,128,4,16]", "window={size=1x4 pad=0_0x3_3 rhs_reversal=0x1}, "
     "dim_labels=0bf1_1oi0->0b1f", 2 * 2 * 128 * 64 * 4 * 16),
    ("[8,128,64]", "[8,64,32]", "[8,128,32]", "window={size=8 stride=7 lhs_dilate=8}, dim_labels=0bf_0io->0bf",
     2 * 8 * 128 * 64 * 32),
  ],
)  # fmt: skip
def test_matmuls_that_libtpu_writes_as_convolutions(left, right, out, attributes, flops):
  text = entry(f"%a = bf16{left} parameter(0)", f"%b = bf16{right} parameter(1)",
               f"%c = bf16{out} convolution(%a, %b), {attributes}")  # fmt: skip
  (kernel,) = roofline.analyse(text, DEVICE).kernels
  assert (kernel.kind, kernel.flops) == ("matmul", flops)


def test_the_matmuls_of_the_real_step_are_those_of_the_formula(tiny):
  """Without recomputation the step's dots are 6 for each parameter of a matrix and token, and attention's 12 L d."""
  config = tiny({"model.V": 272, "model.N": 9, "data.length": 64})  # so many layers stay a loop on a CPU
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    text = plan._lower_step(config, mesh).compile().as_text()
  c, tokens = config.model, config.data.batch_size * config.data.length
  norms = c.D * (2 * c.N + 1)
  found = roofline.analyse(text, DEVICE._replace(align=1), step.flops_per_token(config) * tokens)
  assert sum(found.flops.values()) == found.model_flops - 6 * norms * tokens
  assert found.flops["head: matmul"] == 6 * c.D * c.V * tokens
  assert found.flops["attention"] == 12 * c.N * c.H * c.K * config.data.length * tokens
  assert found.seconds["optimizer"] > 0 and found.seconds[EXPOSED] == 0
  origins = " ".join(x.origin for x in found.kernels)
  assert "backward" in origins and "mask_predictor.py" in origins


def test_a_picture_of_two():
  kernel = roofline.Kernel("x", "matmul", 2, 1.0, 1.0, 1.0, "")
  times = {"matmul": 2.0, HIDDEN: 0.5, EXPOSED: 0.25}
  one = roofline.Roofline((kernel,), times, DEVICE, 2.0**30)
  half = dataclasses.replace(one, seconds=times | {"matmul": 1.0, EXPOSED: 0.0})
  assert (one.total, one.utilisation, half.utilisation) == (2.25, pytest.approx(1 / 2.25), 1.0)
  root = ElementTree.fromstring(explanation.picture({"before <b>": one, "after": half}))
  bars = [[float(x.get("width", 0)) for x in g.findall("{*}rect")] for g in root.findall("{*}g")]
  assert bars == [[622.2, 77.8, 155.6], [311.1, 155.6]]  # parts of 700, and the hidden ones below
  words = [x.text for x in root.iter("{http://www.w3.org/2000/svg}text")]
  assert {"before <b>", "after", "matmul", EXPOSED, HIDDEN, "2.0 s"} <= set(words) and "optimizer" not in words


def test_tables_of_a_roofline(capsys):
  kernel = roofline.Kernel("fusion.1", "matmul", 2, 3e9, 2.0**21, 1.0, "forward dot model.py:1 run", "5634 is odd")
  explanation.show(roofline.Roofline((kernel,), {"matmul": 2.0, HIDDEN: 0.5, EXPOSED: 0.5}, DEVICE, 2.0**30))
  text = " ".join(capsys.readouterr().out.split())
  for words in ("matmul │ 2,000.0 │ 80.0%", "collectives, exposed │ 500.0 │ 20.0%", "3.0 │ 2 │ matmul │ forward dot",
                "2.0 s of it take longer: 5634 is odd", "no less than 2.5 s a step, at most 40.0%"):  # fmt: skip
    assert words in text


def test_rooflines_beside_each_other(tmp_path, monkeypatch, capsys):
  kernel = roofline.Kernel("fusion.1", "matmul", 2, 3e9, 2.0**21, 1.0, "forward dot")
  one = roofline.Roofline((kernel,), {"matmul": 2.0, HIDDEN: 0.0, EXPOSED: 0.5}, DEVICE, 2.0**30)
  record = {"train": {"total": 3 * 2**30}, "roofline": one.to_dict()}
  (tmp_path / "one.json").write_text(json.dumps(record))
  picture = tmp_path / "both.svg"
  monkeypatch.setattr(sys, "argv", ["x", f"a, remat=full={tmp_path}/one.json", f"b={tmp_path}/one.json", str(picture)])
  runpy.run_path(str(Path(__file__).parents[2] / "launch" / "rooflines.py"), run_name="__main__")
  lines = capsys.readouterr().out.splitlines()
  assert lines[0] == "| program | GiB a device | matmul | collectives, exposed | at least | of the peak at most |"
  assert lines[2:] == [f"| {x} | 3.0 | 2.0 s | 500 ms | 2.5 s | 40.0% |" for x in ("a, remat=full", "b")]
  assert len(ElementTree.parse(picture).getroot().findall("{*}g")) == 2
