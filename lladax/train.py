"""Training: one frozen Config, one step, one loop.

The life of a step:

Grain thread: rows of step n -> device_put (sharded) -> train_step (compiled once, state donated) -> while it runs,
the metrics of step n - 1 are written -> every so often an asynchronous checkpoint, the bound on held-out text.
"""

import dataclasses
import functools
import json
import logging
import math
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from lladax import autoregressive, diffusion, evaluate, optimizer, sampling
from lladax.config import Config, check_saved
from lladax.data import batches, tokenizer, windows
from lladax.devices import distributed, sharding
from lladax.drawing import unmasking
from lladax.llada import LLaDA, check_vocabulary, load
from lladax.mistake import Diverged, Missing, Mistake
from lladax.model import attention
from lladax.model.mask_predictor import MaskPredictorConfig
from lladax.storage import checkpoint, metrics


class State(NamedTuple):
  """What a step updates, and what it does not. `params` and Adam's moments are float32."""

  step: jax.Array
  params: Any  # what is trained
  opt_state: Any
  frozen: Any = {}  # the other parameters, where adapters are trained; in the compute dtype


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
    segment_BL = batch["segment"] if config.masks_attention else None
    model = config.model.bind(config.model.join(params, state.frozen))
    nll = functools.partial(model.nll, segment_BL=segment_BL, right_padded=not config.data.separates)
    if config.objective == "autoregressive":
      return autoregressive.loss(nll, batch, start_id=eos_id)
    nll = functools.partial(nll, per_pair=config.noise.targets_per_pair(L))
    return diffusion.loss(nll, batch, rng, mask_id=mask_id, noise=config.noise, batch_size=B)

  letters, _ = config.model.split(config.model.letters())

  def gradient(batch):
    batch = {name: sharding.constrain(x, "BL"[: x.ndim]) for name, x in batch.items()}
    (loss, aux), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, batch)
    return jax.tree.map(sharding.constrain, grads, letters), loss, aux

  M = config.micro_batches
  if M == 1:
    grads, loss, means = gradient(batch)
  else:  # weights are normalised over the whole batch: the parts simply add up
    parts = {
      name: sharding.constrain(x.reshape(M, B // M, *x.shape[1:]), ".BL"[: x.ndim + 1]) for name, x in batch.items()
    }
    shapes = jax.eval_shape(gradient, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (grads, loss, means), _ = jax.lax.scan(
      lambda total, part: (jax.tree.map(jnp.add, total, gradient(part)), None), zeros, parts
    )

  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  scalars = {"loss": loss} | {name: total / jnp.maximum(count, 1) for name, (total, count) in means.items()}
  scalars |= {"grad_norm": optax.tree.norm(grads)}
  return State(state.step + 1, optax.apply_updates(state.params, updates), opt_state, state.frozen), scalars


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
  sources: list[windows.Source]
  base: str  # the checkpoint that the run begins from; "": random parameters


def check_mesh(config: Config, mesh: Mesh) -> None:
  """Raises Mistake if the batch or the model cannot be shared out over the mesh, or the kernel is not for it."""
  part, field = config.data.batch_size // config.micro_batches, "data.batch_size / micro_batches"
  # The two rows of an antithetic pair live on one device.
  sharding.check_batch(mesh, part, field, multiple=2 if config.noise.times == "antithetic" else 1)
  sizes = {letter: getattr(config.model, letter) for letter in "DHGFV" if getattr(config.model, letter)}
  sharding.check_divides(mesh, sizes, config.data.length)
  c, L = config.model, config.data.length
  attention.choose(
    c.attention, W=L, L=L, K=c.K, dtype=c.compute_dtype, causal=c.causal, platform=mesh.devices.flat[0].platform,
    segments="any" if config.data.separates else "right", context=mesh.shape["context"],
  )  # fmt: skip


def prepare(config: Config, workdir: Path) -> Run:
  """Checks everything there is to check, makes or loads the tokenizer, and writes the config beside it."""
  log, names = config.log, ("config.json", "metrics.jsonl", *evaluate.FILES)
  folders = ["checkpoints", "tokenizer", *["tensorboard"] * log.tensorboard, *["profile"] * (log.profile_last > 0)]
  checkpoint.check_workdir(workdir, names, folders)
  if (log.profile_first or log.profile_last) and not log.profile_first < log.profile_last:
    raise Mistake(f"log.profile_first={log.profile_first}, log.profile_last={log.profile_last}: no step lies between")
  mesh = sharding.make_mesh(config.mesh)
  check_mesh(config, mesh)
  saved_config = workdir / "config.json"
  saved = checkpoint.config(workdir) if saved_config.exists() else None
  console = _console()
  others = evaluate.check_tasks(config)
  base = _base(config, saved, workdir) if config.init_from else ""
  if base:
    begun = saved or checkpoint.config(Path(base).parent.parent)
    shape = {name: begun["model"][name] for name in _SHAPE}
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **shape))
    console.print(f"parameters, their shape and the tokenizer are those of {base}", markup=False)
  console.print(f"reading {', '.join(config.data.corpora)}", markup=False)
  if saved or base:
    text = tokenizer.load((workdir if saved else Path(base).parent.parent) / "tokenizer")
  else:
    text = batches.prepared_tokenizer(config.data)
    if text is None:
      text = tokenizer.create(config.tokenizer, batches.texts(config.data)[0])
    else:
      console.print("the tokenizer is that of the records")
  model = dataclasses.replace(config.model, V=config.model.V or text.rows)
  check_vocabulary(model, text)
  config = dataclasses.replace(config, model=model)
  check_mesh(config, mesh)
  extra = {"tokenizer_fingerprint": text.fingerprint, "base": base}
  if base:
    extra["base_fingerprint"] = (saved or {}).get("base_fingerprint") or checkpoint.fingerprint(Path(base))
  plain = json.loads(json.dumps(dataclasses.asdict(config) | extra))
  if saved:
    moved = {name: plain[name] for name in ("init_from", "base", "base_fingerprint")} if base else {}
    check_saved(saved | moved, plain, workdir)
  if config.evaluate.every and not config.data.held_out:
    raise Mistake(f"evaluate.every={config.evaluate.every}: data.held_out=0.0 leaves no text to evaluate on")
  evaluate.check(config, text, others)
  sources = batches.sources(config.data, text, config.seed)
  for name, source in zip(config.data.corpora, sources, strict=True):
    console.print(f"{name}: {source.about}", markup=False)
  digest = "".join(source.digest for source in sources)
  distributed.agree(config=json.dumps(plain), data=digest, workdir=str(workdir), jax=jax.__version__)
  if distributed.is_first():
    workdir.mkdir(parents=True, exist_ok=True)
    if not saved:
      text.save(workdir / "tokenizer")
      published = Path(base).parent.parent / "published"
      if base and published.is_dir():  # for the way back
        shutil.copytree(published, workdir / "published", dirs_exist_ok=True)
    new_config = saved_config.with_suffix(".new")
    new_config.write_text(json.dumps(plain, indent=2) + "\n")
    new_config.replace(saved_config)  # at once: a run may be killed here
  return Run(config, workdir, text, mesh, *program(config, mesh), sources, base)


_PARAMETERS = 0x1217  # folded into the seed that they are drawn from: the noise of a step has the step folded in
_SHAPE = ("D", "N", "H", "G", "K", "F", "V", "tied", "rope_theta", "norm_eps", "max_length")


def find_base(init_from: str) -> str:
  """The checkpoint that a run begins from: `init_from` itself, or the last one of that workdir.

  Raises:
    Missing: there is none.
  """
  path = Path(init_from).expanduser().absolute()
  step = path.name if path.name.isdecimal() and path.parent.name == "checkpoints" else ""
  workdir = path.parent.parent if step else path
  steps = checkpoint.steps(workdir)
  if not (workdir / "config.json").is_file() or not steps or (step and int(step) not in steps):
    there = f"there are the steps {steps}" if steps else "there is no checkpoint"
    raise Missing(f"init_from={init_from}: {there}; name a workdir that was trained, or made by --mode=import")
  if not (workdir / "tokenizer").is_dir():
    raise Missing(f"init_from={init_from}: there is no tokenizer in it to read text with")
  return str(checkpoint.folder(workdir) / (step or str(steps[-1])))


def _base(config: Config, saved: dict[str, Any] | None, workdir: Path) -> str:
  """The checkpoint that a run begins from; of a run that goes on where it was, or is now by what `init_from` says.

  Raises:
    Missing: it is needed, for adapters or since there is no checkpoint yet, and is not there.
    Mistake: `init_from` names another checkpoint than the one that the run began from.
  """
  if not saved or not saved.get("base"):
    return find_base(config.init_from)
  base, mark = Path(saved["base"]), saved.get("base_fingerprint", "")
  same = config.init_from == saved["init_from"]
  given = Path(config.init_from).expanduser().absolute()
  for path in [base] * same + [given, checkpoint.folder(given) / base.name]:
    found = checkpoint.fingerprint(path)
    if found and found == (mark or (found if same and path == base else "")):  # older runs hold no mark
      return str(path)
  if not same:
    find_base(config.init_from)
    raise Mistake(f"init_from={config.init_from}: {workdir} began from another checkpoint, {base}")
  if checkpoint.steps(workdir) and not config.model.lora_rank:
    return str(base)  # the workdir holds everything
  why = "trains adapters of" if config.model.lora_rank else "has no checkpoint yet, and begins from"
  raise Missing(f"{workdir} {why} {base}, which is not there: say as init_from where that checkpoint is now")


def program(config: Config, mesh: Mesh) -> tuple[optax.GradientTransformation, Callable[[], State], State, Any]:
  """(optimizer, how the state begins, where it lives, where the columns of a batch live)."""
  c = config.model
  letters, frozen_letters = c.split(c.letters())
  tx = optimizer.create(config.optimizer, config.steps, letters)

  def init() -> State:
    params, frozen = c.split(c.init(jax.random.fold_in(jax.random.key(config.seed), _PARAMETERS)))
    return State(jnp.int32(0), params, tx.init(params), jax.tree.map(lambda x: x.astype(c.compute_dtype), frozen))

  shapes = jax.eval_shape(init)
  everywhere = sharding.shardings(mesh, "")
  params_at = sharding.shardings(mesh, letters)
  opt_at = jax.tree.map(lambda _: everywhere, shapes.opt_state)
  opt_at = optax.tree_utils.tree_set(opt_at, mu=params_at, nu=params_at)
  columns = {"tokens": "BL", "weight": "BL", "segment": "BL", "index": "B"}
  at = State(everywhere, params_at, opt_at, sharding.shardings(mesh, frozen_letters))
  return tx, init, at, sharding.shardings(mesh, columns)


def begin(run: Run) -> State:
  """The state of step 0: random parameters, or those of `run.base`; of adapters the second factor is 0."""
  # Random draws compile slowly on a CPU, and run once: a fifth of the time without optimisation.
  quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
  if not run.base:
    return jax.jit(run.init, out_shardings=run.shardings, compiler_options=quick)()
  at, frozen = run.shardings, {}
  if run.config.model.lora_rank:
    frozen = _frozen_base(run)
    params = jax.jit(lambda: run.init().params, out_shardings=at.params, compiler_options=quick)()
  else:
    params = _cast(load(run.base, mesh=run.mesh).params, jnp.float32, at.params)
  opt_state = jax.jit(run.tx.init, out_shardings=at.opt_state)(params)
  return State(jax.device_put(jnp.int32(0), at.step), params, opt_state, frozen)


def _frozen_base(run: Run) -> Any:
  """What the adapters adapt."""
  return _cast(load(run.base, mesh=run.mesh).params, run.config.model.compute_dtype, run.shardings.frozen)


def _cast(params: Any, dtype: Any, at: Any) -> Any:
  return jax.jit(lambda x: jax.tree.map(lambda x: x.astype(dtype), x), out_shardings=at)(params)


def restore(run: Run) -> State | None:
  """The state of the last checkpoint, read to where it lives: nothing is drawn, and of a base only what is frozen read.

  None where there is no checkpoint.
  """
  shapes = jax.tree.map(
    lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), jax.eval_shape(run.init), run.shardings
  )
  found = checkpoint.restore_latest(run.workdir, to_tree(shapes, copy=False))
  if found is None:
    return None
  return from_tree(found[1], shapes)._replace(frozen=_frozen_base(run) if run.config.model.lora_rank else {})


def jit_step(config: Config, tx: optax.GradientTransformation, at: State, *, mask_id: int, eos_id: int) -> Any:
  """`train_step`, jitted: the state is donated, and stays where it lives."""
  step = functools.partial(train_step, config=config, tx=tx, mask_id=mask_id, eos_id=eos_id)
  return jax.jit(step, donate_argnums=0, out_shardings=(at, at.step))


def flops_per_token(config: Config) -> float:
  """Model FLOPs of a training step per token, `metrics.flops_per_token` of the config's model."""
  c = config.model
  return metrics.flops_per_token(_matmuls(config), c.N, c.H * c.K, config.data.length, _frozen(config))


def _matmuls(config: Config) -> int:
  """Parameters in matmuls: all but the embedding, where that is not the head."""
  c = config.model
  return c.num_params() - (0 if c.tied else c.V * c.D)


def _frozen(config: Config) -> int:
  """Parameters in matmuls that have no gradient."""
  c = config.model
  return _matmuls(dataclasses.replace(config, model=dataclasses.replace(c, lora_rank=0))) if c.lora_rank else 0


def train(config: Config, workdir: str | Path) -> dict[str, float]:
  """Trains up to `config.steps`, from the workdir's last checkpoint if there is one; evaluates at the end.

  Returns:
    The metrics of the last evaluation.

  Raises:
    Mistake, Missing: bad input, one line, before any long work.
    Diverged: the loss is not a number; the last checkpoint is from before.
  """
  began = time.monotonic()
  console = _console()
  run = prepare(config, Path(workdir).expanduser())
  with jax.set_mesh(run.mesh):
    return _train(run, console, began)


def _train(run: Run, console: Console, began: float) -> dict[str, float]:
  config = run.config
  restored = restore(run)
  if restored:
    console.print(f"continuing from step {int(restored.step)} of {run.workdir}", markup=False)
  state = restored or begin(run)
  del restored
  start = int(state.step)
  distributed.agree(checkpoint=str(start))
  jitted = jit_step(config, run.tx, run.shardings, mask_id=run.text.mask_id, eos_id=run.text.eos_id)
  stop = _Interrupt()
  try:
    if start < config.steps:
      state = _loop(run, state, jitted, start, console, stop)
  finally:
    stop.restore()
  if stop.signal:
    console.print(f"stopped by a signal after step {int(state.step)}; the same command continues from there")
    raise SystemExit(128 + stop.signal)
  llada = _llada(run, state)
  bounds = evaluate.bound(llada, config) if config.data.held_out else {}
  results = evaluate.report(llada, config, bounds, run.workdir, console)
  console.print(f"done in {metrics.clock(time.monotonic() - began)}; everything is in {run.workdir}", markup=False)
  return results


def _loop(run: Run, state: State, jitted: Any, start: int, console: Console, stop: "_Interrupt") -> State:
  config, workdir = run.config, run.workdir
  found = batches.of_steps(
    run.sources, config.data, eos_id=run.text.eos_id, seed=config.seed, steps=config.steps, start=start,
    stop=config.steps, rows_R=sharding.local_rows(run.batch_sharding["index"], (config.data.batch_size,)),
  )  # fmt: skip
  put = functools.partial(_put, run.batch_sharding, config.data.batch_size)
  watchdog = distributed.Watchdog(config.log.hang_seconds)
  watchdog.beat("reading the first batch")
  batch = put(next(found))
  watchdog.beat("compiling the step")
  compiled = jitted.lower(state, batch).compile()
  flops = describe(run, state, compiled, console)
  peak = metrics.peak_flops(jax.devices()[0])
  rate = optimizer.schedule(config.optimizer, config.steps)
  saver = checkpoint.Checkpoints(workdir, keep=config.checkpoint.keep, keep_every=config.checkpoint.keep_every)
  writer = metrics.Writer(
    workdir, config.steps, start=start, tensorboard=config.log.tensorboard, silent=not distributed.is_first()
  )
  profiler = metrics.ProfilerWindow(workdir / "profile", config.log.profile_first, config.log.profile_last)
  tokens = config.data.batch_size * config.data.length
  waiting: tuple[int, Any] | None = None
  ticks = [time.monotonic()]

  def write(step: int, scalars: Any) -> None:
    """Waits for step `step`, and writes it."""
    values = {name: x.item() for name, x in jax.device_get(scalars).items()}
    ticks.append(time.monotonic())
    del ticks[:-20]
    if not all(map(math.isfinite, values.values())):  # the gradient can break before the loss does
      raise Diverged(
        f"loss={values['loss']}, grad_norm={values['grad_norm']} at step {step}: start again in another workdir with"
        f" a lower learning rate; the checkpoints in {workdir} are from before"
      )
    speed = tokens * (len(ticks) - 1) / (ticks[-1] - ticks[0])
    values |= {"learning_rate": float(np.asarray(rate(step - 1))), "tokens_per_second": speed}
    if peak:
      values["mfu"] = speed * flops / (peak * jax.device_count())
    if step % config.log.every == 0 or step == config.steps:
      shown = step % config.log.console_every == 0 or step in (start + 1, config.steps)
      writer.write(step, values, console=shown)
    if step == start + 1:
      writer.restart_clock(step)

  try:
    for step in range(start + 1, config.steps + 1):
      watchdog.beat(f"step {step}")
      profiler.at(step)
      with jax.transfer_guard("disallow"):
        state, scalars = compiled(state, batch)
      if step < config.steps:
        batch = put(next(found))
      if waiting:
        write(*waiting)
      waiting = (step, scalars)
      last = step == config.steps or stop.at(step)
      saves = last or step % config.checkpoint.every == 0
      evaluates = not last and config.evaluate.every and step % config.evaluate.every == 0
      if saves or evaluates:
        write(*waiting)  # a state that is not a number is never saved
        waiting = None
      if saves:
        watchdog.beat(f"saving step {step}")  # once the one before is saved
        saver.save(step, to_tree(state))
      if last:
        break
      if evaluates:
        values = evaluate.bound(_llada(run, state), config, rows=config.evaluate.rows, beat=watchdog.beat)
        writer.write(step, {f"held_out_{name}": value for name, value in values.items()})
        ticks[:] = [time.monotonic()]
  finally:
    watchdog.close()
    profiler.stop()
    saver.close()
    writer.close()
  return state


def describe(run: Run, state: State, compiled: Any, console: Console) -> float:
  """Prints what is sliced how, the compiled step's memory and the FLOPs formula; returns FLOPs per token."""
  config, c = run.config, run.config.model
  axes = " x ".join(f"{name} {size}" for name, size in run.mesh.shape.items() if size > 1)
  title = f"{c.num_params():,} parameters" + (f" on a mesh of {axes}" if axes else "")
  if frozen := sum(x.size for x in jax.tree.leaves(state.frozen)):
    title += f"; {frozen:,} are frozen ({next(iter(jax.tree.leaves(state.frozen))).dtype}), and these are trained"
  table = Table("parameter", "letters", "shape", "size", "on a device", title=title, title_justify="left")
  letters = dict(checkpoint.flat(c.letters()))
  for name, x in checkpoint.flat(state.params):
    here = x.sharding.shard_shape(x.shape)
    table.add_row(name, letters[name], "x".join(map(str, x.shape)), f"{x.size:,}", "x".join(map(str, here)))
  console.print(table)
  whole = sharding.replicated(to_tree(state, copy=False), at_least=64 * 2**20)
  if whole and distributed.is_first():
    largest = max(whole, key=lambda x: x[1])
    logging.warning(
      "every device holds %d large arrays in full, %.1f GiB in all, the largest %s: mesh.fsdp slices them",
      len(whole), sum(size for _, size in whole) / 2**30, largest[0],
    )  # fmt: skip
  memory = compiled.memory_analysis()
  if memory:
    parts = {"state and batch": memory.argument_size_in_bytes, "temporaries": memory.temp_size_in_bytes}
    console.print("memory per device: " + ", ".join(f"{name} {size / 2**20:,.1f} MiB" for name, size in parts.items()))
  flops = flops_per_token(config)
  peak = metrics.peak_flops(jax.devices()[0])
  kind = jax.devices()[0].device_kind
  formula = "6 N + 12 L d T" + (f" - 2 x {n:,} frozen" if (n := _frozen(config)) else "")
  console.print(
    f"{flops / 1e6:,.2f} MFLOP per token = {formula} with N={_matmuls(config):,}, L={c.N}, d={c.H * c.K},"
    f" T={config.data.length}; {jax.device_count()} x {kind}, "
    + (f"peak {peak / 1e12:,.0f} TFLOP/s each" if peak else "unknown peak")
  )
  return flops


def to_tree(state: State, *, copy: bool = True) -> dict[str, Any]:
  """The state as the plain dict that is saved."""
  mu, nu = (optax.tree_utils.tree_get(state.opt_state, name) for name in ("mu", "nu"))
  tree = {"step": state.step, "params": state.params, "mu": mu, "nu": nu}
  # On a CPU an array on the host is the array on the device: the next step would overwrite it under the writer.
  return jax.tree.map(jnp.copy, tree) if copy and jax.default_backend() == "cpu" else tree


def from_tree(tree: dict[str, Any], like: State) -> State:
  """The state that was saved, of arrays or shapes `like` it; what is frozen is never saved."""
  opt_state = optax.tree_utils.tree_set(like.opt_state, mu=tree["mu"], nu=tree["nu"], count=tree["step"])
  # The optimizer's counters and the step must be arrays of their own: the whole state is donated.
  opt_state = jax.tree.map(lambda x: jnp.copy(x) if x is tree["step"] else x, opt_state)
  return State(tree["step"], tree["params"], opt_state, like.frozen)


def _console() -> Console:
  """Progress and tables of the first process go to stderr; stdout is for text that was asked for."""
  return Console(stderr=True, highlight=False, soft_wrap=True, emoji=False, quiet=not distributed.is_first())


def _llada(run: Run, state: State) -> LLaDA:
  c, text = run.config.model, run.text
  params = c.join(state.params, state.frozen)
  return LLaDA(c, params, text, text.mask_id, text.eos_id, text.vocab_size, text.eot_id, text.ends)


def _put(at: dict[str, Any], batch_size: int, batch: windows.Batch) -> dict[str, jax.Array]:
  """This process's rows -> global arrays."""
  rows = sharding.local_rows(at["index"], (batch_size,))

  def place(where, x):
    def part(index):  # of the batch; its rows are neighbours here, too
      first, end = np.searchsorted(rows, index[0].indices(batch_size)[:2])
      return x[(slice(first, end), *index[1:])]

    return jax.make_array_from_callback((batch_size, *x.shape[1:]), where, part)

  return {name: place(at[name], x) for name, x in batch.items()}


class _Interrupt:
  """Ctrl-C and SIGTERM (preemption) end the run after the current step, with a checkpoint; a second one ends it.

  Of several processes one may be told alone: JAX's runtime listens for SIGTERM then, and names a step to all.
  """

  def __init__(self):
    self.signal = 0
    self._old: dict[int, Any] = {}
    if jax.process_count() > 1:
      return
    for number in (signal.SIGINT, signal.SIGTERM):
      try:
        self._old[number] = signal.signal(number, self._note)
      except ValueError:  # not the main thread (a notebook kernel may run us elsewhere)
        return

  def at(self, step: int) -> bool:
    """Whether this step is the last."""
    if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
      self.signal = signal.SIGTERM
    return bool(self.signal)

  def _note(self, number: int, frame: Any) -> None:
    self.signal = number
    signal.signal(number, self._old[number])

  def restore(self) -> None:
    """Signals mean again what they meant before the run."""
    for number, handler in self._old.items():
      signal.signal(number, handler)


def _of_model(config: Config, model: MaskPredictorConfig, workdir: Path) -> Config:
  """The config with the model that was trained; Mistake if it is one for another objective."""
  if (config.objective == "autoregressive") != model.causal:
    was = "autoregressive" if model.causal else "diffusion"
    raise Mistake(f"objective={config.objective}: {workdir} was trained with {was}: set that, or leave --config out")
  return dataclasses.replace(config, model=model)


def evaluate_last(config: Config, workdir: Path) -> dict[str, float]:
  """Evaluates the workdir's last checkpoint as at the end of training, and adds a line to evaluations.jsonl."""
  checkpoint.check_workdir(workdir, evaluate.FILES)
  if not (config.data.held_out or config.evaluate.tasks or config.evaluate.canvases):
    raise Mistake(
      "there is nothing to evaluate: data.held_out=0.0, evaluate.tasks=(), evaluate.canvases=(): give one of them, as"
      " in --config.data.held_out=0.05"
    )
  others = evaluate.check_tasks(config)
  model, text = _saved_model(workdir)
  if text is None:
    raise Mistake(f"--workdir={workdir}: this model has no tokenizer to read the held-out text and the tasks with")
  config = _of_model(config, model, workdir)
  evaluate.check(config, text, others)
  llada = load(workdir, mesh=sharding.make_mesh(config.mesh))
  config = dataclasses.replace(config, model=llada.model)  # adapters are merged
  bounds = evaluate.bound(llada, config) if config.data.held_out else {}
  return evaluate.report(llada, config, bounds, workdir, _console())


def _saved_model(workdir: Path) -> tuple[MaskPredictorConfig, tokenizer.Tokenizer | None]:
  """The model of a workdir and its tokenizer, if it has one: what can be checked before the parameters are read."""
  saved = checkpoint.config(workdir)
  text = tokenizer.load(workdir / "tokenizer") if saved.get("tokenizer_fingerprint") else None
  return MaskPredictorConfig(**saved["model"]), text


def show_samples(config: Config, workdir: Path, prompts: list[str], html: str | None) -> None:
  """Continues each prompt, or fills its [MASK]s; prints text to stdout, and draws it where that is a terminal."""
  if html:
    checkpoint.check_writable(Path(html), "--html")
  prompts = prompts or [line.rstrip("\n") for line in sys.stdin]
  if not prompts:
    raise Mistake("--prompt is missing, and nothing came from standard input")
  model, text = _saved_model(workdir)
  if text is None:
    raise Mistake(f"--workdir={workdir}: this model has no tokenizer to read a prompt with")
  config = _of_model(config, model, workdir)
  for prompt in prompts:
    fills = "[MASK]" in prompt
    ids = text.encode_canvas(prompt) if fills else text.encode(prompt)
    evaluate.check_room({f"--prompt={prompt[:30]!r}": len(ids)}, config.sample, model, fills=fills)
  llada = load(workdir, mesh=sharding.make_mesh(config.mesh))
  options, pages = dataclasses.asdict(config.sample), []
  for n, prompt in enumerate(prompts):  # each is a batch of its own, and noise must differ
    options_here: dict[str, Any] = options | {"seed": sampling.nth_seed(options["seed"], n)}
    if "[MASK]" in prompt:  # a canvas has a length of its own
      del options_here["block_length"], options_here["gen_length"]
      out = llada.infill(prompt, **options_here)
    else:
      out = llada.sample(prompt, **options_here)
    if not distributed.is_first():
      continue
    if sys.stdout.isatty():
      Console(highlight=False, soft_wrap=True).print(unmasking.terminal(out.unmaskings()[0]))
    else:
      print(out.text[0])
    pages += out.unmaskings()
  if html and distributed.is_first():
    Path(html).write_text(unmasking.html(pages, f"{workdir.name}"), encoding="utf-8", errors="backslashreplace")
