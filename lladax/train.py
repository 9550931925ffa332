"""Training: one frozen Config, one step, one loop.

The life of a step:

Grain thread: rows of step n -> device_put (sharded) -> train_step (compiled once, state donated) -> while it runs,
the metrics of step n - 1 are written -> every so often an asynchronous checkpoint, the bound on held-out text.
"""

import dataclasses
import difflib
import functools
import json
import logging
import math
import signal
import sys
import time
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from lladax import (
  autoregressive,
  checkpoint,
  data,
  diffusion,
  evaluate,
  metrics,
  optimizer,
  sharding,
  tokenizer,
  visualize,
)
from lladax.llada import LLaDA, check_vocabulary, load
from lladax.mask_predictor import MaskPredictorConfig
from lladax.sampling import SamplerConfig


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """When the state is saved, and what is kept."""

  every: int = 1000  # steps; the last step is always saved
  keep: int = 2  # the newest so many
  keep_every: int = 0  # and every so-manieth step for good; 0: none

  def __post_init__(self):
    if self.every < 1:
      raise ValueError(f"checkpoint.every={self.every}: must be at least 1")


@dataclasses.dataclass(frozen=True)
class LogConfig:
  """What is written while training."""

  every: int = 1  # steps between lines of metrics.jsonl
  console_every: int = 50  # steps between lines on the console
  tensorboard: bool = True
  profile_first: int = 0  # profiler trace from this step ...
  profile_last: int = 0  # ... up to, not including, this one; 0: none

  def __post_init__(self):
    for name in ("every", "console_every"):
      if getattr(self, name) < 1:
        raise ValueError(f"log.{name}={getattr(self, name)}: must be at least 1")


@dataclasses.dataclass(frozen=True)
class Config:
  """A whole run. configs/base.py says what each field means."""

  seed: int
  objective: str
  steps: int
  micro_batches: int
  model: MaskPredictorConfig
  tokenizer: tokenizer.TokenizerConfig
  data: data.DataConfig
  noise: diffusion.NoiseConfig
  optimizer: optimizer.OptimizerConfig
  mesh: sharding.MeshConfig
  checkpoint: CheckpointConfig
  log: LogConfig
  evaluate: evaluate.EvaluateConfig
  sample: SamplerConfig

  def __post_init__(self):
    if self.objective not in ("diffusion", "autoregressive"):
      raise ValueError(f"objective={self.objective!r}: use diffusion or autoregressive")
    if self.model.causal != (self.objective == "autoregressive"):
      raise ValueError(f"model.causal={self.model.causal} does not go with objective={self.objective!r}")
    B = self.data.batch_size
    if self.steps < 1 or self.micro_batches < 1:
      raise ValueError(f"steps={self.steps}, micro_batches={self.micro_batches}: must be at least 1")
    if B % self.micro_batches:
      raise ValueError(f"data.batch_size={B} is not a multiple of micro_batches={self.micro_batches}")
    if self.noise.times == "antithetic" and B // self.micro_batches % 2:
      raise ValueError(
        f"noise.times='antithetic' pairs neighbouring rows: data.batch_size / micro_batches ="
        f" {B // self.micro_batches} must be even"
      )
    if self.data.length > self.model.max_length:
      raise ValueError(f"data.length={self.data.length} is longer than model.max_length={self.model.max_length}")
    optimizer.schedule(self.optimizer, self.steps)

  @property
  def masks_attention(self) -> bool:
    """Whether rows hold padding or separate documents, so that attention needs the segments."""
    return self.data.segments or self.data.random_lengths > 0


def parse(values: dict[str, Any], cls: Any = Config, path: str = "config") -> Any:
  """A dataclass from nested plain values: the door through which configs come in.

  Raises:
    ValueError: an unknown field (with the nearest name), a missing field, a wrong type.
  """
  if not isinstance(values, dict):
    raise ValueError(f"{path}={values!r}: expected a group of fields")
  hints = typing.get_type_hints(cls)
  for name in values:
    if name not in hints:
      near = difflib.get_close_matches(name, hints, 1, 0.0)
      raise ValueError(f"{path}.{name}: there is no such field; did you mean {path}.{near[0]}?")
  fields = {}
  for field in dataclasses.fields(cls):
    where, kind = f"{path}.{field.name}", hints[field.name]
    if field.name not in values:
      if field.default is dataclasses.MISSING:
        raise ValueError(f"{where} is missing")
    elif dataclasses.is_dataclass(kind):
      fields[field.name] = parse(values[field.name], kind, where)
    else:
      fields[field.name] = _typed(values[field.name], kind, where)
  return cls(**fields)


def _typed(value: Any, kind: Any, where: str) -> Any:
  options = typing.get_args(kind)
  if type(None) in options:
    return None if value is None else _typed(value, next(k for k in options if k is not type(None)), where)
  origin = typing.get_origin(kind) or kind
  if origin is tuple and isinstance(value, list | tuple):
    return tuple(tuple(x) if isinstance(x, list) else x for x in value)
  if origin is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if not isinstance(value, origin) or (isinstance(value, bool) and origin is not bool):
    raise ValueError(f"{where}={value!r}: expected {origin.__name__}, not {type(value).__name__}")
  return value


class State(NamedTuple):
  """What a step updates. `params` and Adam's moments are float32."""

  step: jax.Array
  params: Any
  opt_state: Any


def train_step(
  state: State,
  batch: dict[str, jax.Array],
  *,
  config: Config,
  tx: optax.GradientTransformation,
  mask_id: int,
  eos_id: int,
) -> tuple[State, dict[str, jax.Array]]:
  """One update. Noise is drawn here, on the device, from (seed, step, example index)."""
  rng = jax.random.fold_in(jax.random.key(config.seed), state.step)
  B, L = config.data.batch_size, config.data.length

  def loss_fn(params, batch):
    segment_BL = batch["segment"] if config.masks_attention or config.model.causal else None
    nll = functools.partial(config.model.bind(params).nll, segment_BL=segment_BL)
    if config.objective == "autoregressive":
      return autoregressive.loss(nll, batch, start_id=eos_id)
    nll = functools.partial(nll, per_pair=config.noise.targets_per_pair(L))
    return diffusion.loss(nll, batch, rng, mask_id=mask_id, noise=config.noise, batch_size=B)

  def gradient(batch):
    (loss, aux), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, batch)
    return grads, {"loss": loss} | aux

  M = config.micro_batches
  if M == 1:
    grads, scalars = gradient(batch)
  else:  # weights are normalised over the whole batch: the parts simply add up
    parts = jax.tree.map(lambda x: x.reshape(M, B // M, *x.shape[1:]), batch)
    shapes = jax.eval_shape(gradient, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    add = lambda total, part: (jax.tree.map(jnp.add, total, gradient(part)), None)
    (grads, scalars), _ = jax.lax.scan(add, zeros, parts)

  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  scalars |= {"grad_norm": optax.global_norm(grads)}
  return State(state.step + 1, optax.apply_updates(state.params, updates), opt_state), scalars


class Run(NamedTuple):
  """Everything that the loop needs, checked and at hand before any long work."""

  config: Config
  workdir: Path
  text: tokenizer.Tokenizer
  mesh: Mesh
  tx: optax.GradientTransformation
  init: Callable[[], State]
  shardings: State
  batch_sharding: dict[str, Any]
  stream_T: Any


# What may differ between the first start of a run and its continuation.
_SAFE = (
  "steps",
  "micro_batches",
  "evaluate.",
  "log.",
  "checkpoint.",
  "sample.",
  "mesh.",
  "model.remat",
  "model.head_chunk",
)


def prepare(config: Config, workdir: Path) -> Run:
  """Checks everything there is to check, makes or loads the tokenizer, and writes the config beside it."""
  mesh = sharding.make_mesh(config.mesh)
  sharding.check_batch(mesh, config.data.batch_size // config.micro_batches, "data.batch_size / micro_batches")
  saved_config = workdir / "config.json"
  saved = json.loads(saved_config.read_text()) if saved_config.exists() else None
  train_texts, _ = data.texts(config.data)
  if saved:
    text = tokenizer.load(workdir / "tokenizer")
  else:
    text = tokenizer.create(config.tokenizer, train_texts)
  model = dataclasses.replace(config.model, V=config.model.V or text.rows)
  check_vocabulary(model, text)
  config = dataclasses.replace(config, model=model)
  plain = json.loads(json.dumps(dataclasses.asdict(config) | {"tokenizer_fingerprint": text.fingerprint}))
  if saved:
    _check_saved(saved, plain, workdir)
  stream_T = data.stream(train_texts, text)
  next(data.batches(stream_T, config.data, eos_id=text.eos_id, seed=config.seed, start=0, stop=1))  # too short?
  workdir.mkdir(parents=True, exist_ok=True)
  if not saved:
    text.save(workdir / "tokenizer")
  saved_config.write_text(json.dumps(plain, indent=2) + "\n")

  letters = model.letters()
  tx = optimizer.create(config.optimizer, config.steps, letters)

  def init() -> State:
    params = model.init(jax.random.fold_in(jax.random.key(config.seed), 0x1217))
    return State(jnp.int32(0), params, tx.init(params))

  shapes = jax.eval_shape(init)
  everywhere = sharding.shardings(mesh, "")
  params_at = sharding.shardings(mesh, letters)
  opt_at = jax.tree.map(lambda _: everywhere, shapes.opt_state)
  opt_at = optax.tree_utils.tree_set(opt_at, mu=params_at, nu=params_at)
  columns = {"tokens": "BL", "weight": "BL", "segment": "BL", "index": "B"}
  return Run(
    config,
    workdir,
    text,
    mesh,
    tx,
    init,
    State(everywhere, params_at, opt_at),
    sharding.shardings(mesh, columns),
    stream_T,
  )


def train(config: Config, workdir: str | Path) -> dict[str, float]:
  """Trains up to `config.steps`, from the workdir's last checkpoint if there is one; evaluates at the end.

  Returns:
    The metrics of the last evaluation.

  Raises:
    ValueError, FileNotFoundError: bad input, one line, before any long work.
    FloatingPointError: the loss is not a number; the last checkpoint is from before.
  """
  began = time.monotonic()
  run = prepare(config, Path(workdir).expanduser())
  config, console = run.config, Console(stderr=True, highlight=False, soft_wrap=True)
  state = jax.jit(run.init, out_shardings=run.shardings)()
  restored = checkpoint.restore_latest(run.workdir, _abstract(to_tree(state)))
  if restored:
    state = from_tree(restored[1], state)
    console.print(f"continuing from step {restored[0]} of {run.workdir}")
  start = int(state.step)

  step_fn = functools.partial(train_step, config=config, tx=run.tx, mask_id=run.text.mask_id, eos_id=run.text.eos_id)
  jitted = jax.jit(step_fn, donate_argnums=0, out_shardings=(run.shardings, None))
  stop = _Interrupt()
  if start < config.steps:
    state = _loop(run, state, jitted, start, console, stop)
  if stop.signal:
    console.print(f"stopped by a signal after step {int(state.step)}; the same command continues from there")
    raise SystemExit(128 + stop.signal)
  llada = _llada(run, state)
  results = evaluate.bound(llada, config) if config.data.held_out else {}
  report(llada, config, results, run.workdir, console)
  console.print(f"done in {metrics.clock(time.monotonic() - began)}; everything is in {run.workdir}")
  return results


def _loop(run: Run, state: State, jitted: Any, start: int, console: Console, stop: "_Interrupt") -> State:
  config, workdir = run.config, run.workdir
  batches = data.batches(
    run.stream_T, config.data, eos_id=run.text.eos_id, seed=config.seed, start=start, stop=config.steps,
    part=(jax.process_index(), jax.process_count()),
  )  # fmt: skip
  put = functools.partial(_put, run.batch_sharding, config.data.batch_size)
  batch = put(next(batches))
  compiled = jitted.lower(state, batch).compile()
  flops = describe(run, state, compiled, console)
  peak = metrics.peak_flops(jax.devices()[0])
  rate = optimizer.schedule(config.optimizer, config.steps)
  saver = checkpoint.Checkpoints(workdir, keep=config.checkpoint.keep, keep_every=config.checkpoint.keep_every)
  writer = metrics.Writer(workdir, config.steps, start=start, tensorboard=config.log.tensorboard)
  profiler = metrics.ProfilerWindow(workdir / "profile", config.log.profile_first, config.log.profile_last)
  tokens = config.data.batch_size * config.data.length
  waiting: tuple[int, Any] | None = None
  ticks = [time.monotonic()]

  def write(step: int, scalars: Any) -> None:
    """Waits for step `step`, and writes it."""
    values = {name: float(x) for name, x in jax.device_get(scalars).items()}
    ticks.append(time.monotonic())
    del ticks[:-20]
    if not math.isfinite(values["loss"]):
      raise FloatingPointError(
        f"loss={values['loss']} at step {step}: lower the learning rate and run the same command in a workdir that"
        f" holds a checkpoint from before (there are: {checkpoint.steps(workdir) or 'none'})"
      )
    speed = tokens * (len(ticks) - 1) / (ticks[-1] - ticks[0])
    values |= {"learning_rate": float(rate(step - 1)), "tokens_per_second": speed}
    if peak:
      values["mfu"] = speed * flops / (peak * jax.device_count())
    if step % config.log.every == 0 or step == config.steps:
      shown = step % config.log.console_every == 0 or step in (start + 1, config.steps)
      writer.write(step, values, console=shown)
    if step == start + 1:
      writer.restart_clock(step)

  try:
    for step in range(start + 1, config.steps + 1):
      profiler.at(step)
      with jax.transfer_guard("disallow"):
        state, scalars = compiled(state, batch)
      if step < config.steps:
        batch = put(next(batches))
      if waiting:
        write(*waiting)
      waiting = (step, scalars)
      last = step == config.steps or stop.signal
      if last or step % config.checkpoint.every == 0:
        write(*waiting)  # a state that is not a number is never saved
        waiting = None
        saver.save(step, to_tree(state))
      if stop.signal:
        break
      if config.evaluate.every and step % config.evaluate.every == 0 and not last:
        values = evaluate.bound(_llada(run, state), config, rows=config.evaluate.rows)
        writer.write(step, {f"held_out_{name}": value for name, value in values.items()})
        ticks[:] = [time.monotonic()]
  finally:
    profiler.stop()
    saver.close()
    writer.close()
  return state


def describe(run: Run, state: State, compiled: Any, console: Console) -> float:
  """Prints the parameter table, the compiled step's memory and the FLOPs formula; returns FLOPs per token."""
  config, c = run.config, run.config.model
  table = Table("parameter", "letters", "shape", "size", title=f"{c.num_params():,} parameters", title_justify="left")
  letters = dict(checkpoint.flat(c.letters()))
  for name, x in checkpoint.flat(state.params):
    table.add_row(name, letters[name], "x".join(map(str, x.shape)), f"{x.size:,}")
  console.print(table)
  memory = compiled.memory_analysis()
  if memory:
    parts = {"state and batch": memory.argument_size_in_bytes, "temporaries": memory.temp_size_in_bytes}
    console.print("memory per device: " + ", ".join(f"{name} {size / 2**20:,.1f} MiB" for name, size in parts.items()))
  head = c.V * c.D
  matmuls = c.num_params() - (0 if c.tied else head)
  flops = metrics.flops_per_token(matmuls, c.N, c.H * c.K, config.data.length)
  peak = metrics.peak_flops(jax.devices()[0])
  kind = jax.devices()[0].device_kind
  console.print(
    f"{flops / 1e6:,.2f} MFLOP per token = 6 N + 12 L d T with N={matmuls:,}, L={c.N}, d={c.H * c.K},"
    f" T={config.data.length}; {jax.device_count()} x {kind}, "
    + (f"peak {peak / 1e12:,.0f} TFLOP/s each" if peak else "unknown peak")
  )
  return flops


def report(llada: LLaDA, config: Config, results: dict[str, float], workdir: Path, console: Console) -> None:
  """Shows the bound beside its yardsticks, and the filled canvases; WORKDIR/samples.html, evaluations.jsonl."""
  step = (checkpoint.steps(workdir) or [0])[-1]
  if results:
    table = Table("held-out text", "bits per byte")
    name = "exact" if llada.model.causal else "bound"
    table.add_row(
      f"lladax ({name})", f"[bold]{results['bits_per_byte']:.3f}[/] ± {results['bits_per_byte_stderr']:.3f}"
    )
    table.add_row("unigram over the same tokens", f"{results['unigram_bits_per_byte']:.3f}")
    table.add_row("xz -9", f"{results['xz_bits_per_byte']:.3f}")
    console.print(table)
    with (workdir / "evaluations.jsonl").open("a") as file:
      file.write(json.dumps({"step": step} | results) + "\n")
  filled = evaluate.samples(llada, config)
  if filled:
    for unmasking in filled.unmaskings():
      console.print(visualize.terminal(unmasking, frames=4))
    (workdir / "samples.html").write_text(filled.html(f"{workdir.name}, step {step}"))
    console.print(f"the same as a page: {workdir / 'samples.html'}")


def to_tree(state: State) -> dict[str, Any]:
  """The state as the plain dict that is saved."""
  mu, nu = (optax.tree_utils.tree_get(state.opt_state, name) for name in ("mu", "nu"))
  tree = {"step": state.step, "params": state.params, "mu": mu, "nu": nu}
  # On a CPU an array on the host is the array on the device: the next step would overwrite it under the writer.
  return jax.tree.map(jnp.copy, tree) if jax.default_backend() == "cpu" else tree


def from_tree(tree: dict[str, Any], like: State) -> State:
  """The state that was saved."""
  opt_state = optax.tree_utils.tree_set(like.opt_state, mu=tree["mu"], nu=tree["nu"], count=tree["step"])
  # The optimizer's counters and the step must be arrays of their own: the whole state is donated.
  opt_state = jax.tree.map(lambda x: jnp.copy(x) if x is tree["step"] else x, opt_state)
  return State(tree["step"], tree["params"], opt_state)


def _abstract(tree: Any) -> Any:
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def _llada(run: Run, state: State) -> LLaDA:
  return LLaDA(run.config.model, state.params, run.text, run.text.mask_id, run.text.eos_id, run.text.vocab_size)


def _put(at: dict[str, Any], batch_size: int, batch: data.Batch) -> dict[str, jax.Array]:
  """This process's rows -> global arrays."""
  return {
    name: jax.make_array_from_process_local_data(at[name], x, (batch_size, *x.shape[1:])) for name, x in batch.items()
  }


def _check_saved(saved: dict[str, Any], given: dict[str, Any], workdir: Path) -> None:
  """The run may go on with other steps, logging and evaluation; with nothing else."""
  old, new = _flatten(saved), _flatten(given)
  differ = [name for name in sorted(old | new) if old.get(name) != new.get(name)]
  unsafe = [name for name in differ if not name.startswith(_SAFE)]
  if unsafe:
    listed = "; ".join(f"{name}: {old.get(name)!r} there, {new.get(name)!r} here" for name in unsafe)
    raise ValueError(f"{workdir} holds a run with another config ({listed}): use another workdir, or the same values")
  for name in differ:
    logging.warning("%s was %r, and is %r from now on", name, old.get(name), new.get(name))


def _flatten(tree: dict[str, Any], path: str = "") -> dict[str, Any]:
  flat = {}
  for name, value in tree.items():
    flat |= _flatten(value, f"{path}{name}.") if isinstance(value, dict) else {path + name: value}
  return flat


class _Interrupt:
  """Ctrl-C and SIGTERM (preemption) end the run after the current step, with a checkpoint; a second one ends it."""

  def __init__(self):
    self.signal = 0
    for number in (signal.SIGINT, signal.SIGTERM):
      try:
        self._old = signal.signal(number, self._note)
      except ValueError:  # not the main thread (a notebook kernel may run us elsewhere)
        return

  def _note(self, number: int, frame: Any) -> None:
    self.signal = number
    signal.signal(number, signal.SIG_DFL)


def load_config(workdir: Path) -> Config:
  """The config that a workdir was trained with."""
  values = json.loads((workdir / "config.json").read_text())
  del values["tokenizer_fingerprint"]
  return parse(values)


def evaluate_last(config: Config, workdir: Path) -> dict[str, float]:
  """Evaluates the workdir's last checkpoint as at the end of training, and adds a line to evaluations.jsonl."""
  llada = load(workdir)
  config = dataclasses.replace(config, model=llada.model)
  results = evaluate.bound(llada, config)
  report(llada, config, results, workdir, Console(stderr=True, highlight=False, soft_wrap=True))
  return results


def show_samples(config: Config, workdir: Path, prompts: list[str], html: str | None) -> None:
  """Continues each prompt, or fills its [MASK]s; prints text to stdout, and draws it where that is a terminal."""
  llada = load(workdir)
  prompts = prompts or [line.rstrip("\n") for line in sys.stdin]
  options = {field.name: getattr(config.sample, field.name) for field in dataclasses.fields(config.sample)}
  if not prompts:
    raise ValueError("--prompt is missing, and nothing came from standard input")
  pages = []
  for prompt in prompts:
    if "[MASK]" in prompt:
      options_here = {name: value for name, value in options.items() if name != "block_length"}
      out = llada.infill(prompt, **options_here)
    else:
      out = llada.sample(prompt, **options)
    if sys.stdout.isatty():
      Console(highlight=False, soft_wrap=True).print(visualize.terminal(out.unmaskings()[0]))
    else:
      print(out.text[0])
    pages += out.unmaskings()
  if html:
    Path(html).write_text(visualize.html(pages, f"{workdir.name}"))
