"""The plan: does a run fit its devices, and how long will it take? Asked of the compiler, on a machine without any.

The life of a plan: a topology's name -> compile-only devices -> the config's mesh over them -> the real train step and
the real sampler, lowered from shapes alone and compiled ahead of time by libtpu or XLA's GPU compiler -> its memory
analysis and its collectives -> bytes per device, and, with the FLOPs by formula and a stated utilisation, time and
device-hours.
"""

import dataclasses
import functools
import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.table import Table

from lladax import sampling
from lladax.config import Config, block_words
from lladax.devices import ahead, gpus, sharding
from lladax.devices.ahead import Program, chips, compiled, devices
from lladax.inference import engine
from lladax.mistake import Mistake
from lladax.model import quantized
from lladax.storage import metrics
from lladax.terminal import Console
from lladax.training import explanation, roofline, step


@dataclasses.dataclass(frozen=True)
class Plan:
  """One config on one topology."""

  topology: str
  slices: int
  chips: int
  devices: int
  limit: int  # bytes of a device that a program may use
  because: str  # how it comes about, where it is no word of the compiler
  config: Config
  train: Program | None  # None: the model is one to sample from, in bits without adapters
  block: int  # of the train step: of those of `noise.blocks` the one that needs most
  sample: Program | None
  flops_per_step: float  # in the mean over the run
  tokens_per_step: int
  seconds_per_step: float  # at the utilisation
  utilisation: float

  @property
  def fits(self) -> bool:
    """Whether every program fits its devices."""
    return all(not x.refusal and x.total <= self.limit for _, x in self.programs)

  @property
  def programs(self) -> list[tuple[str, Program]]:
    """Those that were compiled, by name."""
    said = f", {block_words(self.block)}" if len(self.config.phases) > 1 else ""
    return [(name, x) for name, x in ((f"train step{said}", self.train), ("sampler", self.sample)) if x]

  def to_dict(self) -> dict[str, Any]:
    """Plain values, for JSON; times in seconds, sizes in bytes."""
    c = self.config
    hours = self.seconds_per_step * c.steps / 3600
    settings = {
      "batch_size": c.data.batch_size, "length": c.data.length, "micro_batches": c.micro_batches,
      "remat": c.model.remat, "head_chunk": c.model.head_chunk, "mesh": dataclasses.asdict(c.mesh),
    }  # fmt: skip
    own = ("topology", "slices", "chips", "devices", "limit", "because", "fits")
    return {name: getattr(self, name) for name in own} | {
      "parameters": c.model.num_params(), "settings": settings,
      **{name: _plain(getattr(self, name)) for name in ("train", "sample")}, "block": self.block,
      "flops_per_step": self.flops_per_step, "tokens_per_step": self.tokens_per_step, "steps": c.steps,
      "utilisation": self.utilisation, "seconds_per_step": self.seconds_per_step, "hours": hours,
      "chip_hours": hours * self.chips,
    }  # fmt: skip


def _plain(program: Program | None) -> dict[str, Any] | None:
  if program is None:
    return None
  plain = dataclasses.asdict(program) | {"total": program.total, "attention": program.attention}
  del plain["hlo"]
  return plain


def make(config: Config, topology: str, slices: int = 1, *, utilisation: float = 0.4, sampler: bool = True) -> Plan:
  """Compiles the config's train step and sampler for a topology.

  Args:
    config: of the run; `model.V` must be known. `mesh.slices` is taken from `slices`: of TPUs always, of GPUs where it
      is -1.
    topology: as in "v5p:4x4x4", or "h100:8".
    slices: so many of it, over the data-centre network.
    utilisation: of the peak FLOP/s, for the times.
    sampler: whether to compile the sampler, too: `config.sample` on one row for every part of a batch.

  Raises:
    Mistake: as `devices`; a config that cannot be shared out over the mesh.
  """
  if not config.model.V:
    raise Mistake("model.V=0: a plan needs the rows of the embedding; set it, as in --config.model.V=126464")
  found = devices(topology, slices)
  # GPUs that are not here do not say in which node they are, and any axis of theirs may cross from one to another.
  if found[0].platform == "tpu" or config.mesh.slices == -1:
    config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, slices=slices))
  mesh = sharding.make_mesh(config.mesh, found)
  trains = _trains(config)
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # constants of the traced programs are made here
    step.check_mesh(config, mesh)
    stepping, block, sampling_ = None, config.model.block, None
    if trains:
      step.check_trains(config.model)
      sizes = map(config.of_block, {x.block for x in config.phases})
      steps = [(compiled(functools.partial(_lower_step, c, mesh), found[0]), c.model.block) for c in sizes]
      stepping, block = max(steps, key=lambda x: (bool(x[0].refusal), x[0].total, x[1]))
    if sampler or not trains:
      sampling_ = compiled(functools.partial(_lower_sampler, config, mesh), found[0])
  tokens = config.data.batch_size * config.data.length
  flops = sum((x.end - x.begin) * step.flops_per_token(config.of_block(x.block)) for x in config.phases)
  flops = flops / config.steps * tokens
  peak = metrics.peak_flops(found[0])
  assert peak is not None
  return Plan(
    topology, slices, chips(topology) * slices, len(found), *ahead.limit(found[0], len(found)), config, stepping,
    block, sampling_, flops, tokens, flops / (peak * len(found) * utilisation), utilisation,
  )  # fmt: skip


def _trains(config: Config) -> bool:
  return config.model.weights == "full" or config.model.lora_rank > 0


def _lower_step(config: Config, mesh: jax.sharding.Mesh) -> Any:
  """The train step that `train.train` runs, lowered from shapes."""
  tx, init, at, batch_at = step.program(config, mesh)
  state = jax.tree.map(_abstract, jax.eval_shape(init), at)
  B, L = config.data.batch_size, config.data.length
  columns = {"tokens": ((B, L), jnp.int32), "weight": ((B, L), jnp.float32), "segment": ((B, L), jnp.int32),
             "index": ((B,), jnp.int32), "clean": ((B, L), jnp.int32)}  # fmt: skip
  batch = {name: jax.ShapeDtypeStruct(*columns[name], sharding=place) for name, place in batch_at.items()}
  return step.jit_step(config, tx, at, mask_id=0, eos_id=1).lower(state, batch)


def _lower_sampler(config: Config, mesh: jax.sharding.Mesh) -> Any:
  """The program of `LLaDA.sample`, lowered from shapes: a prompt of 256 tokens for every part of a batch."""
  c, prompt = dataclasses.replace(config.sample, seed=0), 256
  rows = math.prod(mesh.shape[axis] for axis in sharding.AXES["B"])
  shape, settings = engine.compiled_for(config.model, *sampling.split(c, rows))
  length = prompt + (c.gen_length or 4 * shape.block_length)
  at = sharding.shardings(mesh, config.model.letters())
  params = jax.eval_shape(lambda: config.model.freeze(config.model.init(jax.random.key(0))))
  params = jax.tree.map(_abstract, params, at)
  cache = None
  if shape.cache or shape.of_blocks:
    cache = jax.eval_shape(lambda: config.model.new_cache(rows * (2 if c.guidance_scale else 1), length))
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


LARGEST = 0.9  # fraction of a GPU's memory that is proposed for XLA's pool


def nearest(plan: Plan) -> Iterator[tuple[str, Plan]]:
  """Changes to a plan that does not fit, the nearest first: each is compiled when it is asked for."""
  c, make_again = plan.config, functools.partial(make, utilisation=plan.utilisation)

  def with_step_of(c: Config) -> Plan:  # the sampler stays what it is
    again = make_again(c, plan.topology, plan.slices, sampler=False)
    return dataclasses.replace(again, sample=plan.sample)

  kind, _, dims = plan.topology.partition(":")
  if kind in gpus.GPUS and ahead.fraction() < LARGEST:
    limit, because = ahead.gpu_limit(gpus.GPUS[kind], plan.devices, LARGEST)
    yield f"{ahead.FRACTION}={LARGEST}", dataclasses.replace(plan, limit=limit, because=because)
  said = []
  if plan.train is None:
    for weights in quantized.KINDS[quantized.KINDS.index(c.model.weights) + 1 :]:
      c = dataclasses.replace(c, model=dataclasses.replace(c.model, weights=weights))
      yield f"model.weights={weights}", make_again(c, plan.topology, plan.slices)
  elif c.model.remat != "full":
    c = dataclasses.replace(c, model=dataclasses.replace(c.model, remat="full"))
    said.append("model.remat=full")
    yield ", ".join(said), with_step_of(c)
  while plan.train:
    try:
      c = dataclasses.replace(c, micro_batches=2 * c.micro_batches)
      again = with_step_of(c)
    except Mistake:  # no more parts
      break
    yield ", ".join([*said, f"micro_batches={c.micro_batches}"]), again
  sizes, slices = [int(n) for n in dims.split("x")], plan.slices
  for _ in range(3):
    if kind in gpus.GPUS and sizes[0] >= 8:  # as many as most nodes have
      slices *= 2
    else:
      smallest = sizes.index(min(sizes))
      sizes[smallest] *= 2
    topology = f"{kind}:{'x'.join(map(str, sizes))}"
    change = f"--topology={topology}" + f" --slices={slices}" * (slices != plan.slices)
    try:
      yield change, make_again(plan.config, topology, slices, sampler=plan.sample is not None)
    except Mistake as error:
      logging.warning("%s: %s", change, error)


def run(
  config: Config, topology: str, slices: int, *, utilisation: float, as_json: bool, explain: bool = False,
  page: Path | None = None,
) -> int:  # fmt: skip
  """Prints the plan, to stdout, and its roofline if it shall be explained, which may be drawn on a page, too.

  Returns 0 where it fits, 1 where it does not.
  """
  console = Console(stderr=True, soft_wrap=True)
  found = devices(topology, slices)  # says what is wrong with them
  if explain and not _trains(config):
    raise Mistake(f"model.weights={config.model.weights}: --explain is of the train step, and bits are not trained")
  programs = "the train step and the sampler" if _trains(config) else "the sampler"
  console.print(f"compiling {programs} for {slices} x {topology}: minutes for a large model")
  plan = make(config, topology, slices, utilisation=utilisation)
  report, estimate = plan.to_dict(), None
  if explain and plan.train and plan.train.hlo:
    device = roofline.device(found[0], len(found) // slices)
    flops = step.flops_per_token(plan.config.of_block(plan.block)) * plan.tokens_per_step
    estimate = roofline.analyse(plan.train.hlo, device, flops / len(found))
    report["roofline"] = estimate.to_dict()
    if page:
      title = f"{config.model.num_params():,} parameters on {slices} x {topology}"
      page.parent.mkdir(parents=True, exist_ok=True)
      page.write_text(explanation.page(estimate, title), "utf-8")
  if not as_json:
    show(plan)
    if estimate:
      explanation.show(estimate)
  if not plan.fits:
    for change, other in nearest(plan):
      console.print(
        f"with {change}: "
        + ("fits" if other.fits else "does not fit")
        + f" ({', '.join(x.refusal or _size(x.total) for _, x in other.programs)})"
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
  c, console = plan.config, Console(soft_wrap=True)
  unit = "GPU" if plan.topology.partition(":")[0] in gpus.GPUS else "chip"
  mesh = " x ".join(f"{axis} {size}" for axis, size in dataclasses.asdict(c.mesh).items() if size != 1)
  console.print(
    f"{c.model.num_params():,} parameters on {plan.slices} x {plan.topology}: {plan.chips} {unit}s, {plan.devices}"
    f" devices ({mesh.replace('-1', 'the rest') or 'no axis'}), {_size(plan.limit)} each"
  )
  if plan.because:
    console.print(f"{_size(plan.limit)} are {plan.because}")
  table = Table("per device", "arguments", "temporaries", "total", "of the limit", "attention", "compiled in")
  for name, program in plan.programs:
    sizes = [_size(x) for x in (program.arguments, program.temporaries, program.total)]
    share = f"{program.total / plan.limit:.0%}"
    table.add_row(name, *(["?"] * 3 if program.refusal else sizes), "too much" if program.refusal else share,
                  program.attention, f"{program.seconds:.0f} s")  # fmt: skip
  console.print(table)
  for name, program in plan.programs:
    if program.refusal:
      console.print(f"{name}: {program.refusal}")
  if plan.train is None:
    print("it fits" if plan.fits else "it does not fit")
    return
  if plan.train.collectives:
    table = Table("collectives of a step", "how many", "arrays, in all")
    for kind, (n, size) in sorted(plan.train.collectives.items()):
      table.add_row(kind, f"{n:,}", _size(size))
    console.print(table)
  days = plan.seconds_per_step * c.steps / 86400
  console.print(
    f"{plan.tokens_per_step:,} tokens and {plan.flops_per_step:.3g} model FLOPs a step; at {plan.utilisation:.0%} of"
    f" the peak {plan.seconds_per_step:.2f} s a step; {c.steps:,} steps ({plan.tokens_per_step * c.steps:.3g} tokens):"
    f" {days:,.1f} days, {days * 24 * plan.chips:,.0f} {unit}-hours"
  )
  console.print("it fits" if plan.fits else "it does not fit")
