"""The plan: does a run fit its TPUs, and how long will it take? Asked of the compiler, on a machine without any.

The life of a plan: a topology's name -> compile-only devices -> the config's mesh over them -> the real train step and
the real sampler, lowered from shapes alone and compiled ahead of time by libtpu -> its memory analysis and its
collectives -> bytes per device, and, with the FLOPs by formula and a stated utilisation, time and chip-hours.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import json
import logging
import math
import os
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from rich.console import Console
from rich.table import Table

from lladax import sampling
from lladax.config import Config
from lladax.devices import sharding
from lladax.inference import engine
from lladax.mistake import Mistake
from lladax.storage import metrics
from lladax.training import step

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


@dataclasses.dataclass(frozen=True)
class Plan:
  """One config on one topology."""

  topology: str
  slices: int
  chips: int
  devices: int
  limit: int  # bytes of a device that a program may use
  config: Config
  train: Program
  sample: Program | None
  flops_per_step: float
  tokens_per_step: int
  seconds_per_step: float  # at the utilisation
  utilisation: float

  @property
  def fits(self) -> bool:
    """Whether every program fits its devices."""
    programs = [self.train] + ([self.sample] if self.sample else [])
    return all(not x.refusal and x.total <= self.limit for x in programs)

  def to_dict(self) -> dict[str, Any]:
    """Plain values, for JSON; times in seconds, sizes in bytes."""
    c = self.config
    hours = self.seconds_per_step * c.steps / 3600
    settings = {
      "batch_size": c.data.batch_size, "length": c.data.length, "micro_batches": c.micro_batches,
      "remat": c.model.remat, "head_chunk": c.model.head_chunk, "mesh": dataclasses.asdict(c.mesh),
    }  # fmt: skip
    plain = {name: getattr(self, name) for name in ("topology", "slices", "chips", "devices", "limit", "fits")}
    return plain | {
      "parameters": c.model.num_params(), "settings": settings,
      **{name: _plain(getattr(self, name)) for name in ("train", "sample")},
      "flops_per_step": self.flops_per_step, "tokens_per_step": self.tokens_per_step, "steps": c.steps,
      "utilisation": self.utilisation, "seconds_per_step": self.seconds_per_step, "hours": hours,
      "chip_hours": hours * self.chips,
    }  # fmt: skip


def _plain(program: Program | None) -> dict[str, Any] | None:
  return program and dataclasses.asdict(program) | {"total": program.total}


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


def make(config: Config, topology: str, slices: int = 1, *, utilisation: float = 0.4, sampler: bool = True) -> Plan:
  """Compiles the config's train step and sampler for a topology.

  Args:
    config: of the run; `model.V` must be known. `mesh.slices` is taken from `slices`.
    topology: as in "v5p:4x4x4".
    slices: so many of it, over the data-centre network.
    utilisation: of the peak FLOP/s, for the times.
    sampler: whether to compile the sampler, too: `config.sample` on one row for every part of a batch.

  Raises:
    Mistake: as `devices`; a config that cannot be shared out over the mesh.
  """
  if not config.model.V:
    raise Mistake("model.V=0: a plan needs the rows of the embedding; set it, as in --config.model.V=126464")
  config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, slices=slices))
  found = devices(topology, slices)
  mesh = sharding.make_mesh(config.mesh, found)
  step.check_mesh(config, mesh)
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # constants of the traced programs are made here
    stepping = _compile(functools.partial(_lower_step, config, mesh))
    sampling_ = _compile(functools.partial(_lower_sampler, config, mesh)) if sampler else None
  flops = step.flops_per_token(config) * config.data.batch_size * config.data.length
  peak = metrics.peak_flops(found[0])
  assert peak is not None
  return Plan(
    topology, slices, chips(topology) * slices, len(found), limit(found[0]), config, stepping, sampling_, flops,
    config.data.batch_size * config.data.length, flops / (peak * len(found) * utilisation), utilisation,
  )  # fmt: skip


_DUMPED = ("after_optimizations", "memory-usage-report")


def _compile(lower: Any) -> Program:
  """Compiles; JAX cannot always read libtpu's program back, so libtpu writes it to a file."""
  began = time.monotonic()
  with tempfile.TemporaryDirectory() as folder:
    options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
    try:
      with _uncached():
        compiled = lower().compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      words = [line.strip() for line in str(error).splitlines() if line.strip()]
      return Program(time.monotonic() - began, refusal=words[0].partition("RESOURCE_EXHAUSTED: ")[2] or words[0])
    hlo, report = ("".join(path.read_text() for path in Path(folder).glob(f"*{name}.txt")) for name in _DUMPED)
  memory = compiled.memory_analysis()
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


def _lower_step(config: Config, mesh: jax.sharding.Mesh) -> Any:
  """The train step that `train.train` runs, lowered from shapes."""
  tx, init, at, batch_at = step.program(config, mesh)
  state = jax.tree.map(_abstract, jax.eval_shape(init), at)
  B, L = config.data.batch_size, config.data.length
  columns = {"tokens": ((B, L), jnp.int32), "weight": ((B, L), jnp.float32), "segment": ((B, L), jnp.int32),
             "index": ((B,), jnp.int32)}  # fmt: skip
  batch = {name: jax.ShapeDtypeStruct(*of, sharding=batch_at[name]) for name, of in columns.items()}
  return step.jit_step(config, tx, at, mask_id=0, eos_id=1).lower(state, batch)


def _lower_sampler(config: Config, mesh: jax.sharding.Mesh) -> Any:
  """The program of `LLaDA.sample`, lowered from shapes: a prompt of 256 tokens for every part of a batch."""
  c, prompt = dataclasses.replace(config.sample, seed=0), 256
  rows = math.prod(mesh.shape[axis] for axis in sharding.AXES["B"])
  length = prompt + (c.gen_length or 4 * c.block_length)
  at = sharding.shardings(mesh, config.model.letters())
  params = jax.eval_shape(config.model.init, jax.random.key(0))
  params = jax.tree.map(
    lambda x, at: jax.ShapeDtypeStruct(x.shape, config.model.compute_dtype, sharding=at), params, at
  )
  cache = None
  if c.cache:
    cache = jax.eval_shape(lambda: config.model.new_cache(rows * (2 if c.guidance_scale else 1), length))
  shape, settings = sampling.split(c, rows)
  state = jax.eval_shape(
    lambda: sampling.start(jnp.zeros((rows, length), jnp.int32), settings.steps, shape, mask_id=0, first=prompt)
  )
  whole = sharding.shardings(mesh, "")
  state = jax.tree.map(lambda x: _abstract(x, whole), state)
  if cache:
    where = jax.sharding.NamedSharding(mesh, sharding.fit(".B.GK", cache["k"].shape))
    state = state._replace(cache=jax.tree.map(lambda x: _abstract(x, where), cache))
  return engine.lower_sampler(config.model, params, state, c, first=prompt, mask_id=0, ends=(1,))


def _abstract(x: Any, at: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at)


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


def nearest(plan: Plan) -> Iterator[tuple[str, Plan]]:
  """Changes to a plan that does not fit, the nearest first: each is compiled when it is asked for."""
  c, make_again = plan.config, functools.partial(make, utilisation=plan.utilisation, sampler=plan.sample is not None)
  said = []
  if c.model.remat != "full":
    c = dataclasses.replace(c, model=dataclasses.replace(c.model, remat="full"))
    said.append("model.remat=full")
    yield ", ".join(said), make_again(c, plan.topology, plan.slices)
  while True:
    try:
      c = dataclasses.replace(c, micro_batches=2 * c.micro_batches)
      again = make_again(c, plan.topology, plan.slices)
    except Mistake:  # no more parts
      break
    yield ", ".join([*said, f"micro_batches={c.micro_batches}"]), again
  kind, _, dims = plan.topology.partition(":")
  sizes = [int(n) for n in dims.split("x")]
  for _ in range(3):
    smallest = sizes.index(min(sizes))
    sizes[smallest] *= 2
    topology = f"{kind}:{'x'.join(map(str, sizes))}"
    try:
      yield f"--topology={topology}", make_again(plan.config, topology, plan.slices)
    except Mistake as error:
      logging.warning("--topology=%s: %s", topology, error)


def run(config: Config, topology: str, slices: int, *, utilisation: float, as_json: bool) -> int:
  """Prints the plan, to stdout; returns 0 where it fits, 1 where it does not."""
  console = Console(stderr=True, highlight=False, soft_wrap=True)
  devices(topology, slices)  # says what is wrong with them
  console.print(f"compiling the train step and the sampler for {slices} x {topology}: minutes for a large model")
  plan = make(config, topology, slices, utilisation=utilisation)
  report = plan.to_dict()
  if not as_json:
    show(plan)
  if not plan.fits:
    for change, other in nearest(plan):
      console.print(
        f"with {change}: "
        + ("fits" if other.fits else "does not fit")
        + f" ({other.train.refusal or _size(other.train.total)})"
      )
      if other.fits:
        report["nearest"] = {"change": change} | other.to_dict()
        if not as_json:
          print(f"the nearest change that fits: {change}")
        break
    else:
      report["nearest"] = None
      if not as_json:
        print("none of the changes tried makes it fit")
  if as_json:
    print(json.dumps(report, indent=2))
  return 0 if plan.fits else 1


def _size(n: int) -> str:
  return f"{n / 2**30:.2f} GiB" if n >= 2**30 else f"{n / 2**20:.1f} MiB"


def show(plan: Plan) -> None:
  """A table of the plan on stdout."""
  c, console = plan.config, Console(highlight=False, soft_wrap=True)
  mesh = " x ".join(f"{axis} {size}" for axis, size in dataclasses.asdict(c.mesh).items() if size != 1)
  console.print(
    f"{c.model.num_params():,} parameters on {plan.slices} x {plan.topology}: {plan.chips} chips, {plan.devices}"
    f" devices ({mesh.replace('-1', 'the rest')}), {_size(plan.limit)} each"
  )
  table = Table("per device", "arguments", "temporaries", "total", "of the limit", "compiled in")
  for name, program in (("train step", plan.train), ("sampler", plan.sample)):
    if program is None:
      continue
    sizes = [_size(x) for x in (program.arguments, program.temporaries, program.total)]
    share = f"{program.total / plan.limit:.0%}"
    table.add_row(name, *(["?"] * 3 if program.refusal else sizes), "too much" if program.refusal else share,
                  f"{program.seconds:.0f} s")  # fmt: skip
  console.print(table)
  for name, program in (("train step", plan.train), ("sampler", plan.sample)):
    if program and program.refusal:
      console.print(f"{name}: {program.refusal}", markup=False)
  if plan.train.collectives:
    table = Table("collectives of a step", "how many", "arrays, in all")
    for kind, (n, size) in sorted(plan.train.collectives.items()):
      table.add_row(kind, f"{n:,}", _size(size))
    console.print(table)
  days = plan.seconds_per_step * c.steps / 86400
  console.print(
    f"{plan.tokens_per_step:,} tokens and {plan.flops_per_step:.3g} model FLOPs a step; at {plan.utilisation:.0%} of"
    f" the peak {plan.seconds_per_step:.2f} s a step; {c.steps:,} steps ({plan.tokens_per_step * c.steps:.3g} tokens):"
    f" {days:,.1f} days, {days * 24 * plan.chips:,.0f} chip-hours"
  )
  console.print("it fits" if plan.fits else "it does not fit")
