"""Programs compiled ahead of time for TPUs that are not here: compile-only devices, and what libtpu says of them."""

import contextlib
import dataclasses
import functools
import importlib.util
import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache

from lladax.mistake import Mistake

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Program:
  """What the compiler says of a program, for one device; sizes in bytes, those of collectives of the whole arrays."""

  seconds: float  # that it took to compile
  arguments: int = 0
  temporaries: int = 0
  reported: int = 0  # by libtpu's own memory report, which knows of more than JAX's
  collectives: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)  # kind -> (how many, bytes)
  refusal: str = ""  # the compiler's words where it does not fit

  @property
  def total(self) -> int:
    """The larger of arguments and temporaries (what is donated is counted once), and of libtpu's own sum."""
    return max(self.arguments + self.temporaries, self.reported)


def devices(topology: str, slices: int = 1) -> list[jax.Device]:
  """Compile-only devices of a TPU topology, as in "v5p:4x4x4".

  Raises:
    Mistake: libtpu is not installed, or knows no such topology.
  """
  if not re.fullmatch(r"\w+:\d+(x\d+)+", topology) or slices < 1:
    raise Mistake(f"--topology={topology} --slices={slices}: name them as in --topology=v5p:4x4x4 --slices=2")
  if importlib.util.find_spec("libtpu") is None:
    raise Mistake("--mode=plan compiles with libtpu, and needs no TPU: pip install 'lladax[plan]'")
  # A libtpu that shall only compile asks nobody who it is, and runs beside others.
  known = {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost",
           "TPU_WORKER_ID": "0", "TPU_ACCELERATOR_TYPE": "v5litepod-1"}  # fmt: skip
  for name, value in known.items():
    os.environ.setdefault(name, value)
  options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
  if topology.startswith("v4:"):
    options["chip_config_name"] = "megacore"  # one device a chip, as v4 runs; libtpu's default here is two
  if chips(topology) == 1:
    options["chips_per_host_bounds"] = (1, 1, 1)
  try:
    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices)
  except Exception as error:  # the runtime has its own kinds; all mean the same here
    raise Mistake(f"--topology={topology} --slices={slices}: {str(error).splitlines()[0][:300]}") from error


def chips(topology: str) -> int:
  """Chips of a slice."""
  return math.prod(map(int, topology.partition(":")[2].split("x")))


def limit(device: jax.Device) -> int:
  """Bytes of a device that a program may use: the compiler says so when it is asked for far too much."""
  huge = jax.ShapeDtypeStruct((2**42,), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(device))
  try:
    jax.jit(lambda x: x + 1).lower(huge).compile()
  except jax.errors.JaxRuntimeError as error:
    found = re.search(r"available HBM \(([\d.]+)([KMGT])", str(error))
    if found:
      return int(float(found[1]) * 2 ** (10 * ("KMGT".index(found[2]) + 1)))
  raise RuntimeError("the compiler did not say how much memory a device has")


_DUMPED = ("after_optimizations", "memory-usage-report")


def compiled(lower: Callable[[], Any]) -> Program:
  """Compiles what `lower` returns; JAX cannot always read libtpu's program back, so libtpu writes it to a file."""
  began = time.monotonic()
  with tempfile.TemporaryDirectory() as folder:
    options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
    try:
      with _uncached():
        program = lower().compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      words = [line.strip() for line in str(error).splitlines() if line.strip()]
      return Program(time.monotonic() - began, refusal=words[0].partition("RESOURCE_EXHAUSTED: ")[2] or words[0])
    hlo, report = ("".join(path.read_text() for path in Path(folder).glob(f"*{name}.txt")) for name in _DUMPED)
  memory = program.memory_analysis()
  reported = re.search(r"color=0\)\s*Total bytes: (\d+)", report)
  return Program(
    time.monotonic() - began, memory.argument_size_in_bytes, memory.temp_size_in_bytes,
    int(reported[1]) if reported else 0, collectives(hlo),
  )  # fmt: skip


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
  """Programs for devices that are not here can be written to JAX's cache, but not read back."""
  before = getattr(jax.config, "jax_enable_compilation_cache")  # noqa: B009  (type checkers do not see it)
  jax.config.update("jax_enable_compilation_cache", False)
  compilation_cache.reset_cache()  # it would remember that it was used
  try:
    yield
  finally:
    jax.config.update("jax_enable_compilation_cache", before)
    compilation_cache.reset_cache()


def collectives(hlo: str) -> dict[str, tuple[int, int]]:
  """How often a device takes part in each kind of collective, and the bytes of their results; loops are multiplied.

  A loop's count is the constant that its condition compares with; one without is counted once.
  """
  computations: dict[str, list[str]] = {}
  entry, lines = "", []
  for line in hlo.splitlines():
    if header := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
      lines = computations.setdefault(header[2], [])
      entry = header[2] if header[1] else entry
    else:
      lines.append(line)

  def trips(condition: str) -> int:
    found = [
      int(n) for line in computations.get(condition, []) for n in re.findall(r"s32\[\]\S* constant\((\d+)\)", line)
    ]
    return max(found, default=1)

  @functools.cache
  def count(name: str) -> dict[tuple[str, str], tuple[int, int]]:
    """(kind, channel) -> (how many, bytes); the fusions that start, carry and end one collective share its channel."""
    total: dict[tuple[str, str], tuple[int, int]] = {}
    for line in computations.get(name, []):
      for kind in COLLECTIVES:
        if found := re.search(rf"= (.*?) {kind}(?:-start)?\(", line):
          # libtpu writes a reduce-scatter as a fusion of this name around an all-reduce.
          kind = "reduce-scatter" if name.startswith("all-reduce-scatter") else kind
          channel = re.search(r"channel_id=(\d+)", line)
          total[kind, channel[1] if channel else line] = (1, _bytes(found[1], started="-start(" in line))
      loop = re.search(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)", line)
      inside = [(loop[2], trips(loop[1]))] if loop else []
      inside += [(called, 1) for called in re.findall(r"(?:calls|to_apply|branch_computations)=\{?%?([\w.\-]+)", line)]
      for called, times in inside:
        total |= {key: (times * n, times * size) for key, (n, size) in count(called).items()}
    return total

  result: dict[str, tuple[int, int]] = {}
  for (kind, _), (n, size) in count(entry).items() if entry else ():
    before = result.get(kind, (0, 0))
    result[kind] = (before[0] + n, before[1] + size)
  return result


def _bytes(shapes: str, *, started: bool) -> int:
  """Of "(bf16[8,128]{1,0}, ...)"; an asynchronous start lists its operands before its results."""
  width = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "f32": 4, "s32": 4, "u32": 4}
  sizes = [
    width.get(kind, 8) * math.prod(map(int, filter(None, dims.split(","))))
    for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes)
  ]
  return max(sizes) if started and sizes else sum(sizes)
