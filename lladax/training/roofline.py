"""A roofline of a compiled program: where its time goes, estimated from FLOPs and bytes of its text.

Every kernel takes as long as its matmuls at the device's peak, or its bytes at the memory's bandwidth, whichever is
longer; collectives run beside the kernels that stand between their start and their end, and what is left over is
exposed. Nothing is measured: launches, tiles that do not fill the device, caches, clocks that drop and kernels that
reach half of the peak are all left out. So the time is a lower bound, and the utilisation that follows an upper one.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from lladax.devices import gpus, hlo
from lladax.devices.hlo import Instruction
from lladax.storage import metrics

KINDS = ("matmul", "attention", "head: matmul", "head: softmax", "element-wise", "optimizer", "copies")
HIDDEN, EXPOSED = "collectives, hidden", "collectives, exposed"


class Device(NamedTuple):
  """What a device can do."""

  flops: float  # bfloat16 matmuls, a second
  bandwidth: float  # bytes a second of its memory
  link: float  # bytes a second that it sends to its neighbours: NVLink, ICI
  network: float  # and to other nodes or slices
  neighbours: int  # devices of a node or slice
  align: int = 1  # a matmul whose sizes are no multiples of it gets a slow kernel


# Bytes a second of a device, the first key that is part of `device_kind`: one way to its neighbours, over all lanes of
# NVLink, ICI or PCIe, and one way to another node. From the makers' data sheets; the network is what machines are sold
# with: 200 Gbit/s a GPU with A100, 400 with H100 and newer, 200 a host of four TPUs. And the memory of TPUs.
LINKS = {
  "TPU v4": (300e9, 6e9), "TPU v5 lite": (200e9, 6e9), "TPU v5": (600e9, 6e9), "TPU v6 lite": (400e9, 6e9),
  "TPU7x": (300e9, 6e9), "T4": (16e9, 6e9), "L4": (32e9, 6e9), "4090": (32e9, 6e9), "A100": (300e9, 25e9),
  "H100": (450e9, 50e9), "H200": (450e9, 50e9), "B200": (900e9, 50e9),
}  # fmt: skip
MEMORY = {"TPU v4": 1228e9, "TPU v5 lite": 819e9, "TPU v5": 2765e9, "TPU v6 lite": 1640e9, "TPU7x": 3690e9}


def device(of_jax: jax.Device, neighbours: int) -> Device:
  """What a device of JAX can do, `neighbours` of which (itself among them) are a node or slice."""
  kind, peak, gpu = of_jax.device_kind, metrics.peak_flops(of_jax), gpus.named(of_jax.device_kind)
  assert peak is not None
  bandwidth = gpu.bandwidth if gpu else next(x for name, x in MEMORY.items() if name in kind)
  link, network = next(x for name, x in LINKS.items() if name in kind)
  return Device(peak, bandwidth, link, network, neighbours, 8 if gpu else 1)


# Matmuls of these types run at so many times the bfloat16 peak: float32 as TF32 (on TPUs it is cut to bfloat16).
_SPEEDUP = {"f32": 0.5, "f64": 0.06, "s8": 2.0, "u8": 2.0, "s4": 2.0, "u4": 2.0}


class Kernel(NamedTuple):
  """One line of a program that takes time; of each run, in FLOPs, bytes and seconds."""

  name: str
  kind: str
  times: int
  flops: float
  nbytes: float
  seconds: float
  origin: str  # pass, operation, line of the source
  doubt: str = ""  # why it will take longer than that

  @property
  def total(self) -> float:
    """Seconds of all its runs."""
    return self.times * self.seconds


@dataclasses.dataclass(frozen=True)
class Roofline:
  """The estimate of a step, for one device."""

  kernels: tuple[Kernel, ...]
  seconds: dict[str, float]  # kind -> time; that of the hidden collectives is not part of the sum
  device: Device
  model_flops: float  # of a device; 0: not known

  @property
  def total(self) -> float:
    """Seconds."""
    return sum(x for kind, x in self.seconds.items() if kind != HIDDEN)

  @property
  def utilisation(self) -> float:
    """At most so much of the peak is spent on the model's FLOPs."""
    return self.model_flops / (self.device.flops * self.total) if self.total else 0.0

  def to_dict(self) -> dict[str, Any]:
    """Plain values, for JSON."""
    return {
      "estimated_seconds": self.total, "utilisation_at_most": self.utilisation, "seconds": self.seconds,
      "exposed": self.seconds[EXPOSED] / self.total if self.total else 0.0, "flops": self.flops, "bytes": self.nbytes,
      "largest": [x._asdict() | {"total": x.total} for x in self.largest()],
    }  # fmt: skip

  def largest(self, count: int = 10) -> list[Kernel]:
    """The kernels that take longest, of those that the others wait for."""
    return sorted((x for x in self.kernels if x.kind in KINDS), key=lambda x: -x.total)[:count]

  @property
  def flops(self) -> dict[str, float]:
    """Kind -> FLOPs."""
    return self._sum(lambda x: x.times * x.flops)

  @property
  def nbytes(self) -> dict[str, float]:
    """Kind -> bytes of the device's memory; of collectives, of whole arrays."""
    return self._sum(lambda x: x.times * x.nbytes)

  def _sum(self, value) -> dict[str, float]:
    found = collections.defaultdict[str, float](float)
    for x in self.kernels:
      found[x.kind] += value(x)
    return dict(found)


def analyse(text: str, device: Device, model_flops: float = 0.0) -> Roofline:
  """Estimates a compiled program.

  Args:
    text: of it, optimised and scheduled (`hlo`).
    device: that it was compiled for.
    model_flops: of a run, for one device.
  """
  program = hlo.parse(text)
  found = _Walk(program, device).run(program.entry)
  seconds = dict.fromkeys(KINDS, 0.0)
  for x in found.kernels:
    if x.kind in seconds:
      seconds[x.kind] += x.total
  return Roofline(found.kernels, seconds | {HIDDEN: found.hidden, EXPOSED: found.exposed}, device, model_flops)


class _Part(NamedTuple):
  """A run of a part of a program."""

  seconds: float = 0.0
  hidden: float = 0.0  # of the seconds that its collectives take
  exposed: float = 0.0
  kernels: tuple[Kernel, ...] = ()

  def again(self, times: int) -> "_Part":
    """So many runs, one behind the other."""
    kernels = tuple(x._replace(times=times * x.times) for x in self.kernels)
    return _Part(times * self.seconds, times * self.hidden, times * self.exposed, kernels)

  def then(self, other: "_Part") -> "_Part":
    """One behind the other."""
    kernels = self.kernels + other.kernels
    return _Part(self.seconds + other.seconds, self.hidden + other.hidden, self.exposed + other.exposed, kernels)


class _Walk:
  """One pass over a program in the order of its schedule."""

  def __init__(self, program: hlo.Program, device: Device):
    self.program, self.device = program, device

  def run(self, name: str) -> _Part:
    """What a computation does."""
    lines, named = self.program.computations.get(name, ()), self.program.named.get(name, {})
    on_the_way = [self._on_the_way(x, named) for x in lines]
    last = {key: i for i, started in enumerate(on_the_way) for key in started}
    free, ends = {HIDDEN: 0.0, "copies": 0.0}, {}  # when the links are, and the copy engine; what is on them
    part = _Part()
    for i, (x, started) in enumerate(zip(lines, on_the_way, strict=True)):
      for key, kernel in started.items():
        if key not in ends:
          free[kernel.kind] = ends[key] = max(part.seconds, free[kernel.kind]) + kernel.seconds
      part = part.then(self._instruction(x, named))
      for key in [key for key in ends if last[key] == i]:
        waited, kernel = max(0.0, ends.pop(key) - part.seconds), started[key]
        if kernel.kind == HIDDEN:
          part = part.then(_Part(waited, kernel.seconds - waited, waited, (kernel,)))
        else:
          part = part.then(_Part(waited, kernels=(kernel._replace(seconds=waited),)))
    return part

  def _instruction(self, x: Instruction, named: Mapping[str, Instruction]) -> _Part:
    """What a line does that the next one waits for."""
    if x.op == "while":
      return self.run(x.attribute(r"body=%?([\w.\-]+)")).again(self.program.trips(x))
    if x.op == "call":
      return functools.reduce(_Part.then, map(self.run, x.called()), _Part())
    if x.op == "conditional":  # the longest of its branches
      return max(map(self.run, x.called()), key=lambda part: part.seconds, default=_Part())
    if x.op in _FREE or x.op.endswith(("-start", "-done", "-update")) or x.collective:
      return _Part()
    kernel = self._kernel(x, named)
    return _Part(kernel.seconds, kernels=(kernel,)) if kernel.seconds else _Part()

  def _on_the_way(self, x: Instruction, named: Mapping[str, Instruction]) -> dict[str, Kernel]:
    """What a line starts, carries on or ends beside the kernels: a name -> the collective, or the copy.

    Fusions of libtpu's may compute while a collective runs: all that do share its channel.
    """
    if x.op.endswith(("-done", "-update")) and x.operands:
      start = named.get(x.operands[0])
      return self._on_the_way(start, named) if start else {}
    if x.collective:
      return {x.name: self._collective(x, x, named)}
    if x.op in ("copy-start", "async-start"):
      inside = [(where, y) for called in x.called() for where, y in self.program.inside(called) if y.collective]
      if inside:
        return {x.name: self._collective(x, inside[0][1], self.program.named[inside[0][0]])}
      target, source = x.results[0:2] if x.op == "copy-start" else (x.results[-2], x.results[0])
      far = target.nbytes * ((not target.near) + (not source.near))
      seconds = far / self.device.bandwidth
      return {x.name: Kernel(x.name, "copies", 1, 0.0, far, seconds, self._origin(x))}
    found = {}
    if x.op == "fusion":
      for called in x.called():
        for where, y in self.program.inside(called):
          if y.collective:
            channel = y.attribute(r"(channel_id=\d+)") or y.name
            found[channel] = self._collective(x, y, self.program.named[where], scatters="reduce-scatter" in where)
    return found

  def _collective(
    self, x: Instruction, y: Instruction, named: Mapping[str, Instruction], scatters: bool = False
  ) -> Kernel:
    """Seconds of a ring among the members `y` names, both within a node and between nodes, whichever takes longer."""
    size, group = hlo.whole(y, named), hlo.members(y)
    n = len(group) or self.device.neighbours
    nodes = len({member // self.device.neighbours for member in group}) or 1
    kind = "reduce-scatter" if scatters else y.collective
    rounds = {"all-reduce": 2.0}.get(kind, 1.0)
    if kind == "collective-permute":
      seconds = size / (self.device.network if nodes > 1 else self.device.link)
    else:
      within = rounds * size * (n - 1) / n / self.device.link
      between = rounds * size * (nodes - 1) / nodes / (self.device.network * n / nodes)
      seconds = max(within, between)
    return Kernel(x.name, HIDDEN, 1, 0.0, size, seconds, f"{kind}: {self._origin(x) or self._origin(y)}")

  def _kernel(self, x: Instruction, named: Mapping[str, Instruction]) -> Kernel:
    """An instruction that computes."""
    dots = list(self._dots(x, named))
    flops = sum(n for n, _ in dots)
    size = self._fusion_bytes(x, named) if x.op == "fusion" else _plain_bytes(x, named)
    seconds = max(sum(n / _speedup(dtype) for n, dtype in dots) / self.device.flops, size / self.device.bandwidth)
    return Kernel(x.name, self._kind(x, bool(dots)), 1, flops, size, seconds, self._origin(x), self._doubt(x, named))

  def _doubt(self, x: Instruction, named: Mapping[str, Instruction]) -> str:
    """What the roofline of a kernel leaves out, where it is known to be much."""
    inside: list[tuple[Mapping[str, Instruction], Instruction]] = [(named, x)]
    inside += [(self.program.named[where], y) for called in x.called() for where, y in self.program.inside(called)]
    found = []
    for where, y in inside:
      if y.op == "scatter":
        found.append("adds up one by one where indices repeat")
      if y.op == "dot":
        widths = [z.results[0].dims[-1] for z in (y, *(where[name] for name in y.operands if name in where))]
        found += [f"{n} is no multiple of {self.device.align}" for n in widths if n > 1 and n % self.device.align]
    if any(y.op == "dot" for _, y in inside) and any(y.op == "exponential" for _, y in inside):
      found.append("exponentials in every tile of a matmul")
    return ", ".join(dict.fromkeys(found))

  def _dots(self, x: Instruction, named: Mapping[str, Instruction]) -> Iterator[tuple[float, str]]:
    """(FLOPs, type of the factors) of every matmul of an instruction."""
    if x.op in ("dot", "convolution", "custom-call"):
      factors = [named[name].results[0] for name in x.operands if name in named]
      if flops := _flops(x, factors):
        yield flops, max((a.dtype for a in factors[:2]), key=lambda dtype: hlo.Array(dtype, (8,)).nbytes)
    elif x.op == "fusion":
      for called in x.called():
        for y in self.program.computations.get(called, ()):
          yield from self._dots(y, self.program.named[called])

  def _fusion_bytes(self, x: Instruction, named: Mapping[str, Instruction]) -> float:
    """Bytes of the device's memory that a fusion reads and writes: of what it slices or updates in place the part."""
    called = x.called()[0]
    lines = self.program.computations[called]
    given = {int(y.literal): y for y in lines if y.op == "parameter"}
    total = 0.0
    for i, name in enumerate(x.operands):
      if i in given and not (name in named and named[name].results[0].near):
        total += self._read(given[i], lines)
    root = next(y for y in lines if y.root)
    inner = self.program.named[called]
    written = [inner[name] for name in root.operands] if root.op == "tuple" else [root]
    sizes = [self._written(y, inner) for y in written]
    if len(sizes) == len(x.results):
      sizes = [size for size, result in zip(sizes, x.results, strict=True) if not result.near]
    return total + sum(sizes)

  def _read(self, x: Instruction, lines: tuple[Instruction, ...]) -> float:
    """Bytes that a computation reads of one of its values."""
    total = 0.0
    for y in lines:
      if x.name not in y.operands:
        continue
      if y.op in ("bitcast", "reshape"):
        total += self._read(y, lines)
      elif y.op in ("dynamic-slice", "slice", "gather") and y.operands[0] == x.name:
        total += y.nbytes
      elif y.op == "dynamic-update-slice" and y.operands[0] == x.name:
        pass
      elif y.op == "scatter" and y.operands[0] == x.name:
        total += next((z.nbytes for z in lines if z.name == y.operands[-1]), 0)
      elif y.op == "fusion":
        inner = self.program.computations[y.called()[0]]
        at = [i for i, name in enumerate(y.operands) if name == x.name]
        total += sum(self._read(z, inner) for z in inner if z.op == "parameter" and int(z.literal) in at)
      else:
        return x.nbytes
    return min(total, x.nbytes)

  def _written(self, x: Instruction, named: Mapping[str, Instruction]) -> float:
    """Bytes that a computation writes for one of its results."""
    if x.op == "bitcast" and x.operands[0] in named:
      return self._written(named[x.operands[0]], named)
    if x.op in ("dynamic-update-slice", "scatter"):
      return named[x.operands[1 if x.op == "dynamic-update-slice" else -1]].nbytes
    if x.op == "fusion":
      inner = self.program.named[x.called()[0]]
      root = next(y for y in inner.values() if y.root)
      return self._written(root, inner) if root.op != "tuple" else x.nbytes
    return x.nbytes

  def _stack(self, x: Instruction) -> list[hlo.Frame]:
    """Of a fusion that has lost its own, that of something in it."""
    stack = self.program.stack(x)
    if not stack and x.op == "fusion":
      stack = next(filter(None, (self.program.stack(y) for y in self.program.computations[x.called()[0]])), [])
    return stack

  def _kind(self, x: Instruction, multiplies: bool) -> str:
    """By who asked for it: the innermost function of the source that says so, else by what it does."""
    if "fmha" in x.rest or "splash" in x.name:
      return "attention"
    for frame in self._stack(x):
      if "optax" in frame.file:
        return "optimizer"
      if frame.function.startswith("attend"):
        return "attention"
      if re.search("cross_entropy|logits|head_DV|nll", frame.function):
        return "head: matmul" if multiplies else "head: softmax"
      if re.search(r"Block|hidden", frame.function):
        break
    return "matmul" if multiplies else "element-wise"

  def _origin(self, x: Instruction) -> str:
    """Which pass, which operation, and the innermost line of our own source."""
    name = x.attribute(r'op_name="([^"]*)"')
    passes = {"rematted_computation": "again", "transpose(": "backward", "jvp(": "forward"}
    which = next((word for part, word in passes.items() if part in name), "")
    own = [f for f in self._stack(x) if "lladax" in f.file and not re.search("einsum|<lambda>$", f.function)][:2]
    lines = [f"{f.file.rpartition('/')[2]}:{f.line} {f.function.rpartition('.')[2]}" for f in own]
    return " ".join(filter(None, (which, name.rpartition("/")[2], " < ".join(lines))))


# What costs nothing: names for what is there already.
_FREE = {
  "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
  "add-dependency", "opt-barrier", "domain",
}  # fmt: skip


def _speedup(dtype: str) -> float:
  return 2.0 if dtype.startswith("f8") else _SPEEDUP.get(dtype, 1.0)


def _flops(x: Instruction, factors: list[hlo.Array]) -> float:
  """Of one matmul, convolution, or call of a library's attention or matmul; 0 of any other."""
  if x.op == "convolution":
    return _convolution_flops(x, *factors)
  if x.op == "dot":
    over = [int(n) for n in x.attribute(r"lhs_contracting_dims=\{([\d,]*)\}").split(",") if n]
    return 2.0 * x.results[0].size * math.prod(factors[0].dims[n] for n in over)
  target = x.attribute(r'custom_call_target="([^"]*)"')
  if target.startswith("__cublas"):
    over = re.findall(r"\d+", x.attribute(r'"lhs_contracting_dimensions":\[([^\]]*)\]'))
    return 2.0 * x.results[0].size * math.prod(factors[0].dims[int(n)] for n in over)
  if "fmha" in target:  # two matmuls forward, five backward
    scores = re.findall(r"\d+", x.attribute(r'"intermediate_tensor_shape": ?\{.*?"dimensions": ?\[([^\]]*)\]'))
    causal = 0.5 if '"mask_type": "CAUSAL"' in x.rest else 1.0
    return causal * (10 if "Backward" in target else 4) * math.prod(map(int, scores)) * factors[0].dims[-1]
  if "splash" in x.name:  # dk and dv, and dq, each compute the scores again
    q, k = [a for a in factors if len(a.dims) == 4][:2]
    matmuls = 4 if "dkv" in x.name else 3 if "_dq" in x.name else 2
    return matmuls * 2.0 * q.size * k.dims[2]
  return 0.0


def _convolution_flops(x: Instruction, left: hlo.Array, right: hlo.Array) -> float:
  """Libtpu writes every matmul as a convolution: what falls on padding, or between dilated rows, is not computed."""
  labels = x.attribute(r"dim_labels=(\S+?)(?:,|$)")
  lhs, rhs, out = re.split("_|->", labels)
  window = {
    name: value.split("x") for name, value in re.findall(r"(\w+)=([\d_x\-]+)", x.attribute(r"window=\{([^}]*)\}"))
  }
  flops = 2.0 * math.prod(n for n, label in zip(x.results[0].dims, out, strict=True) if not label.isdigit())
  flops *= right.dims[rhs.index("i")]
  for i, size in enumerate(window.get("size", [])):

    def of(name, default, i=i):
      return window[name][i] if name in window else default

    low = int(of("pad", "0_0").split("_")[0])
    stride, dilate, spread = (int(of(name, "1")) for name in ("stride", "rhs_dilate", "lhs_dilate"))
    label = str(i)
    at = np.arange(x.results[0].dims[out.index(label)])[:, None] * stride + np.arange(int(size)) * dilate - low
    extent = (left.dims[lhs.index(label)] - 1) * spread + 1
    flops *= int(((at >= 0) & (at < extent) & (at % spread == 0)).sum())
  return flops


def _plain_bytes(x: Instruction, named: Mapping[str, Instruction]) -> float:
  """Bytes of the device's memory that an instruction outside of fusions reads and writes."""
  if x.op == "custom-call" and re.search("AllocateBuffer|ConcatBitcast|AssumeGather", x.rest):
    return 0.0
  given = [named[name] for name in x.operands if name in named]
  results = sum(a.nbytes for a in x.results if not a.near)
  if x.op in ("dynamic-slice", "slice", "gather"):
    return 2.0 * results
  if x.op in ("dynamic-update-slice", "scatter"):
    return 2.0 * given[1 if x.op == "dynamic-update-slice" else -1].nbytes
  return results + sum(a.nbytes for y in given for a in y.results if not a.near)
