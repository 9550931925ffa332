"""A whole run in one frozen tree of dataclasses, and the door through which plain values become one.

ConfigDicts and JSON stop here. Inside, a config is hashable, so it can be a static argument of `jit`, and an unknown
field or a wrong type is an error.
"""

import copy
import dataclasses
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict
from rich.table import Column, Table

from lladax import autoregressive, configs, diffusion, fields, optimizer
from lladax.data import tokenizer, windows
from lladax.devices import sharding
from lladax.mistake import Mistake
from lladax.model.mask_predictor import MaskPredictorConfig
from lladax.sampling import SamplerConfig
from lladax.storage import checkpoint


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """When the state is saved, and what is kept."""

  every: int = 1000  # steps between saves; the last step is always saved
  keep: int = 2  # the newest so many
  keep_every: int = 0  # and, for good, those whose step is a multiple of this; 0: none
  # Where the workdir is far: a folder on the disk of each machine, for states that are saved in between; "": none.
  near: str = ""
  near_every: int = 0  # steps between these; 0: none

  def __post_init__(self):
    for name, least in (("every", 1), ("keep", 1), ("keep_every", 0), ("near_every", 0)):
      if getattr(self, name) < least:
        raise Mistake(f"checkpoint.{name}={getattr(self, name)}: must be at least {least}")
    if bool(self.near) != bool(self.near_every):
      raise Mistake(
        f"checkpoint.near={self.near!r}, checkpoint.near_every={self.near_every}: a folder and a number of steps belong"
        " together"
      )


@dataclasses.dataclass(frozen=True)
class GuardConfig:
  """What becomes of a step whose loss or gradient is not a number, or whose gradient is a spike: it changes nothing."""

  # The logarithm of the gradient's norm may lie so many standard deviations above its running mean, from the 100th
  # step on; 0: however far it likes.
  spike: float = 0.0
  patience: int = 5  # so many such steps in a row: back to the last checkpoint before them, and past their examples ...
  returns: int = 3  # ... at most so often; then the run ends

  def __post_init__(self):
    for name, least in (("spike", 0), ("patience", 1), ("returns", 0)):
      if not getattr(self, name) >= least:
        raise Mistake(f"guard.{name}={getattr(self, name)}: must be at least {least}")


@dataclasses.dataclass(frozen=True)
class LogConfig:
  """What is written while training."""

  every: int = 1  # steps between lines of metrics.jsonl
  console_every: int = 50  # steps between lines on the console
  tensorboard: bool = True  # the metrics are also written for TensorBoard
  profile_first: int = 0  # profiler trace from this step ...
  profile_last: int = 0  # ... up to, not including, this one; 0: none
  # A step, its compilation, a save, or a batch (read, or evaluated) that takes longer ends the run; 0: nothing does.
  hang_seconds: float = 1800.0

  def __post_init__(self):
    for name in ("every", "console_every"):
      if getattr(self, name) < 1:
        raise Mistake(f"log.{name}={getattr(self, name)}: must be at least 1")
    if self.hang_seconds < 0:
      raise Mistake(f"log.hang_seconds={self.hang_seconds}: must be positive, or 0 for never")


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
  """What is measured at the end of a run, and every so often before."""

  every: int = 0  # steps between evaluations of the held-out bound; 0: at the end only
  num_samples: int = 16  # masks drawn per row of held-out text (exact counts, stratified)
  rows: int = 0  # held-out rows used while training; 0: all. The last evaluation always takes all
  batch_size: int = 64  # rows of a forward pass
  # "reversal" (of the facts), "poems:FILE" (couplets; "poems_chat:FILE": in a conversation), or lm-eval's:
  # "llada_base/gsm8k" (as published), "lladax_gsm8k" (with what `sample` sets besides the defaults).
  tasks: tuple[str, ...] = ()
  data_dir: str = ""  # folder of local benchmarks for lm-eval's tasks; "": it fetches its own
  limit: int = 0  # questions of each of lm-eval's tasks; 0: all
  allow_code: bool = False  # generated code may be run, in a sandbox
  # Texts with "[MASK]"s, each a document of its own, filled at the end; in chat: what the user says, answered.
  canvases: tuple[str, ...] = ()

  def __post_init__(self):
    for name, least in (("num_samples", 1), ("batch_size", 1), ("every", 0), ("rows", 0), ("limit", 0)):
      if getattr(self, name) < least:
        raise Mistake(f"evaluate.{name}={getattr(self, name)}: must be at least {least}")


def block_words(block: int) -> str:
  """What is noised together."""
  return f"blocks of {block}" if block else "the whole canvas"


class Phase(NamedTuple):
  """Steps of a run with blocks of one size."""

  begin: int  # so many steps come before it
  end: int  # so many are done after it
  block: int  # tokens; 0: the whole canvas


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """A whole run."""

  seed: int = 0  # of the parameters, the data order and the noise
  objective: str = "diffusion"  # "diffusion" | "autoregressive": the causal baseline on the same batches
  # Another run, whose parameters, their shape, and tokenizer this one begins with: WORKDIR (its last checkpoint) or
  # WORKDIR/checkpoints/STEP; "": none.
  init_from: str = ""
  steps: int = 1000  # updates
  micro_batches: int = 1  # parts of a batch whose gradients are added up before the update
  model: MaskPredictorConfig
  tokenizer: tokenizer.TokenizerConfig
  data: windows.DataConfig
  noise: diffusion.NoiseConfig
  optimizer: optimizer.OptimizerConfig
  guard: GuardConfig
  mesh: sharding.MeshConfig
  checkpoint: CheckpointConfig
  log: LogConfig
  evaluate: EvaluateConfig
  sample: SamplerConfig

  def __post_init__(self):

    if self.objective not in ("diffusion", "autoregressive"):
      raise Mistake(f"objective={self.objective!r}: use diffusion or autoregressive")
    # The objective decides; configs do not say it twice.
    causal = self.objective == "autoregressive"
    block = self.noise.blocks[-1][1] if self.noise.blocks else self.noise.block
    object.__setattr__(self, "model", dataclasses.replace(self.model, causal=causal, block=0 if causal else block))
    align, field = 1 if causal else self.noise.align, "noise.blocks" if self.noise.blocks else "noise.block"
    if self.data.length % align:
      raise Mistake(
        f"data.length={self.data.length} is not a multiple of {field}={align}: rows hold whole blocks; 0 makes one of"
        " each row"
      )
    object.__setattr__(self, "data", dataclasses.replace(self.data, align=align))
    if not causal and not all(phase.block for phase in self.phases):
      for name, value, instead in (("replies", "all", "one"), ("eos_padding", "block", "row")):
        if getattr(self.data, name) == value:
          raise Mistake(
            f"data.{name}={value!r} is for models of blocks, and a canvas that is one block sees what follows a reply:"
            f" set noise.block, or data.{name}={instead}"
          )
    for name in ("complements", "replace"):
      if causal and getattr(self.noise, name):
        raise Mistake(
          f"noise.{name}={getattr(self.noise, name)}: a causal model knows no noise: leave it out, or set"
          " objective=diffusion"
        )
    fields.check_seed(self.seed, "seed")
    if isinstance(self.sample.seed, tuple):
      raise Mistake(f"sample.seed={self.sample.seed}: a config has one seed, of which every row makes its own")
    self.aim.check_sampler(self.sample)
    B = self.data.batch_size
    if self.steps < 1 or self.micro_batches < 1:
      raise Mistake(f"steps={self.steps}, micro_batches={self.micro_batches}: must be at least 1")
    if B % self.micro_batches:
      raise Mistake(f"data.batch_size={B} is not a multiple of micro_batches={self.micro_batches}")
    if self.noise.times == "antithetic" and B // self.micro_batches % 2:
      raise Mistake(
        f"noise.times='antithetic' pairs neighbouring rows: data.batch_size / micro_batches ="
        f" {B // self.micro_batches} must be even"
      )
    if self.data.length > self.model.max_length:
      raise Mistake(f"data.length={self.data.length} is longer than model.max_length={self.model.max_length}")
    if self.steps * B >= 2**31:
      raise Mistake(f"steps={self.steps} of data.batch_size={B} rows: an example's index must be less than 2^31")
    if self.model.lora_rank and not self.init_from:
      raise Mistake(f"model.lora_rank={self.model.lora_rank}: adapters need a model to adapt; name it as init_from")
    optimizer.schedule(self.optimizer, self.steps)
    for phase, given in zip(self.phases, self.noise.blocks, strict=False):  # a phase, too, of no schedule
      if not phase.begin < phase.end:
        raise Mistake(f"noise.blocks: of steps={self.steps} {given} gets none: leave it out, or give it another length")
    from lladax.data import batches  # Grain is slow to import, and --help and mistyped fields do without

    batches.Mixture(self.data, seed=self.seed, steps=self.steps)

  @property
  def aim(self) -> diffusion.Masked | diffusion.Blocks | autoregressive.Causal:
    """The objective as a value: how losses and likelihoods are made, and what they ask of model and sampler."""
    if self.objective == "autoregressive":
      return autoregressive.Causal()
    noise = dataclasses.replace(self.noise, block=self.model.block, blocks=())
    return diffusion.Blocks(noise) if noise.block else diffusion.Masked(noise)

  @property
  def phases(self) -> list[Phase]:
    """Of the whole run: one, or those of `noise.blocks`; the last one takes the steps that are left."""
    if self.model.causal or not self.noise.blocks:
      return [Phase(0, self.steps, self.model.block)]
    lengths = optimizer.lengths([n for n, _ in self.noise.blocks], self.steps, "noise.blocks")
    begins = [min(sum(lengths[:i]), self.steps) for i in range(len(lengths))]
    blocks = [block for _, block in self.noise.blocks]
    return [Phase(*x) for x in zip(begins, [*begins[1:], self.steps], blocks, strict=True)]

  def of_block(self, block: int) -> "Config":
    """As it is in a phase with such blocks: model and objective are that phase's, all else is the whole run's."""
    if block == self.model.block:
      return self
    config = copy.copy(self)  # nothing is decided anew: the rows are the same, and who samples does so after the run
    object.__setattr__(config, "model", dataclasses.replace(self.model, block=block))
    return config

  def at(self, steps: int) -> "Config":
    """As it is in the phase that ends with, or holds, step number `steps`."""
    return self.of_block(next(x.block for x in self.phases if max(steps, 1) <= x.end))

  @property
  def masks_attention(self) -> bool:
    """Whether rows hold padding or separate documents, so that attention needs the segments."""
    return self.data.separates or self.data.pads


def parse(values: dict[str, Any]) -> Config:
  """A config from nested plain values: the door through which configs come in.

  Raises:
    Mistake: an unknown field (with the nearest name), a missing field, a wrong type.
  """
  return fields.parse(values, Config, "config")


def given(config: Any) -> Config:
  """The Config that a recipe's name, the path of a file, a ConfigDict, or a Config itself stands for."""
  if isinstance(config, str | os.PathLike):
    config = configs.load(os.fspath(config))
  if not isinstance(config, Config | ConfigDict):
    raise Mistake(f"config={config!r:.80}: give a recipe's name, the path of a file, a ConfigDict or a Config")
  return config if isinstance(config, Config) else parse(config.to_dict())


def load(workdir: Path) -> Config:
  """The config that a workdir was trained with."""
  values = checkpoint.config(workdir)
  for name in configs.NOT_FIELDS:
    values.pop(name, None)
  return parse({"init_from": ""} | values)


# Fields of the dataclasses that a config does not set: the objective decides.
DECIDED = ("model.causal", "model.block", "data.align")


def table(c: Config, setters: Mapping[str, str]) -> Table:
  """Every field of a config: its value, who set that, and what it means.

  `setters` says who: of single fields, as of "data.length", and as "" of all others that are not at their default.
  """
  columns = [Column(title, overflow="fold", max_width=30) for title in ("field", "value", "set by")]
  rows = Table(*columns, Column("meaning", overflow="fold"), box=None, pad_edge=False)  # nothing of it is cut off
  for path, group in (("", c), *((f"{name}.", x) for name, x in vars(c).items() if dataclasses.is_dataclass(x))):
    comments = fields.comments(type(group))
    if path:
      rows.add_row()
      rows.add_row(path[:-1], "", "", str(group.__doc__).partition("\n")[0], style="bold")
    for field in dataclasses.fields(group):
      name, value = path + field.name, getattr(group, field.name)
      if name not in DECIDED and not dataclasses.is_dataclass(value):
        setter = setters.get(name) or ("default" if value == field.default else setters[""])
        rows.add_row(name, repr(value), setter, comments[field.name])
  return rows


# What may differ between the first start of a run and its continuation.
_SAFE = (
  "steps", "micro_batches", "evaluate.", "log.", "checkpoint.", "sample.", "mesh.", "model.remat", "model.attention",
  "model.head_chunk", "data.longest_line",
)  # fmt: skip


# What may differ where the user says so: the state means the same with any value of it.
_DELIBERATE = ("optimizer.", "noise.", "guard.")


def check_saved(
  saved: dict[str, Any], given: dict[str, Any], workdir: Path, allow: Sequence[str] = ()
) -> dict[str, tuple[Any, Any]]:
  """The run may go on with other steps, logging and evaluation, and what is allowed; with nothing else.

  Returns:
    What differs: field -> (what it was, what it is).

  Raises:
    Mistake: something else differs; a field cannot be allowed.
  """
  # A field that is younger than the run had its default there.
  default = json.loads(json.dumps(configs.load("base").to_dict()))
  old, new = (_flatten(default) | _flatten(x) for x in (saved, given))
  for name in allow:
    if name not in new or not name.startswith(_DELIBERATE + _SAFE):
      groups = ", ".join(x.rstrip(".") for x in _DELIBERATE)
      raise Mistake(f"--allow={name}: name fields of {groups}, as in --allow=optimizer.schedule; no other may change")
  # The block that a model samples with follows from the noise, and no parameter from it.
  differ = [name for name in sorted(old | new) if old.get(name) != new.get(name) and name != "model.block"]
  unsafe = [name for name in differ if not name.startswith(_SAFE) and name not in allow]
  if unsafe:
    listed = "; ".join(f"{name}: {old.get(name)!r} there, {new.get(name)!r} here" for name in unsafe)
    so = f", or say --allow={','.join(unsafe)}" if all(name.startswith(_DELIBERATE) for name in unsafe) else ""
    so += "; where documents begin follows from the largest block" * ("data.align" in unsafe)
    raise Mistake(f"{workdir} holds a run with another config ({listed}): use another workdir, or the same values{so}")
  for name in differ:
    logging.warning("%s was %r, and is %r from now on", name, old.get(name), new.get(name))
  return {name: (old.get(name), new.get(name)) for name in differ}


def _flatten(tree: dict[str, Any], path: str = "") -> dict[str, Any]:
  flat = {}
  for name, value in tree.items():
    flat |= _flatten(value, f"{path}{name}.") if isinstance(value, dict) else {path + name: value}
  return flat
