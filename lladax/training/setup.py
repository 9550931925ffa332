"""Before the first step: everything checked, the tokenizer at hand, the state drawn or read."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from lladax import address
from lladax.config import Config, LogConfig, check_saved
from lladax.data import sources, tokenizer, windows
from lladax.devices import distributed, sharding
from lladax.evaluation import evaluate
from lladax.inference.load import check_vocabulary, load
from lladax.mistake import Missing, Mistake
from lladax.model import quantized
from lladax.model.mask_predictor import SHAPE, MaskPredictorConfig
from lladax.storage import checkpoint, near
from lladax.training import history
from lladax.training.step import State, check_balances, check_mesh, check_trains, from_tree, guard, program, to_tree


class Run(NamedTuple):
  """Everything that the loop needs, checked and at hand before any long work."""

  config: Config
  workdir: Path
  text: tokenizer.Tokenizer
  mesh: Mesh
  tx: optax.GradientTransformationExtraArgs
  init: Callable[[], State]
  shardings: State
  batch_sharding: dict[str, Any]
  sources: list[windows.Source]
  base: str  # the checkpoint that the run begins from; "": random parameters


def prepare(config: Config, workdir: Path, allow: Sequence[str] = ()) -> Run:
  """Checks everything there is to check, makes or loads the tokenizer, and writes the config beside it.

  A run that goes on may differ from what it was in the fields of `allow`, too.
  """
  _check_outputs(config.log, workdir)
  mesh = sharding.make_mesh(config.mesh)
  check_mesh(config, mesh)
  check_trains(config.model)
  if config.model.weights != "full":
    quantized.library()
  saved = checkpoint.config(workdir) if (workdir / "config.json").exists() else None
  read_before, drawn_before = ((saved or {}).pop(name, {}) for name in ("data_digests", "draws"))
  draws = history.draws()
  history.check_draws(drawn_before, draws, workdir)
  console = distributed.console()
  others = evaluate.check_tasks(config)
  base = _base(config, saved, workdir) if config.init_from else ""
  if base:
    begun = saved or checkpoint.config(_workdir_of(base))
    if config.model.weights != "full" and begun["model"].get("lora_rank") and not saved:
      raise Mistake(
        f"model.weights={config.model.weights!r}: {base} holds adapters: export it, import that, and begin there"
      )
    shape = {
      name: begun["model"].get(name, getattr(MaskPredictorConfig, name)) for name in SHAPE
    }  # older ones say less
    becomes = begun["model"]["causal"] and not config.model.causal and not saved
    if becomes and config.model.lora_rank:
      raise Mistake(
        f"model.lora_rank={config.model.lora_rank}: {base} is autoregressive, and what it knows of [MASK] is not in the"
        " adapters: train all of it, and adapters over that"
      )
    if config.model.shift and not becomes and not shape["shift"]:
      raise Mistake(
        f"model.shift=True: {base} has none, its states predict their own places: leave it out, or begin from an"
        " autoregressive model"
      )
    shape |= {"shift": config.model.shift} if becomes else {}  # what to do about it is the config's to say
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **shape))
    console.print(f"parameters, their shape and the tokenizer are those of {base}")
  console.print(f"reading {', '.join(config.data.corpora)}")
  if saved or base:
    text = tokenizer.load((workdir if saved else _workdir_of(base)) / "tokenizer")
    if base:
      text = _masking(text, config)
      rows = max(config.model.V, text.vocab_size)
      rows += (-rows % 128) * (rows > config.model.V)
      config = dataclasses.replace(config, model=dataclasses.replace(config.model, V=rows))
  elif text := sources.prepared_tokenizer(config.data):
    console.print("the tokenizer is that of the records")
  else:
    text = tokenizer.create(config.tokenizer, sources.texts(config.data)[0])
  check_balances(config.model)
  model = dataclasses.replace(config.model, V=config.model.V or text.rows)
  check_vocabulary(model, text)
  config = dataclasses.replace(config, model=model)
  check_mesh(config, mesh)
  extra = {"tokenizer_fingerprint": text.fingerprint, "base": base}
  if base:
    extra["base_fingerprint"] = (saved or {}).get("base_fingerprint") or checkpoint.fingerprint(address.mirror(base))
  plain = json.loads(json.dumps(dataclasses.asdict(config) | extra))
  moved = {name: plain[name] for name in ("init_from", "base", "base_fingerprint")} if base else {}
  changed = check_saved({**(saved or plain), **moved}, plain, workdir, allow)
  if config.evaluate.every and not config.data.held_out:
    raise Mistake(f"evaluate.every={config.evaluate.every}: data.held_out=0.0 leaves no text to evaluate on")
  evaluate.check(config, text, others)
  rows = sources.training(config.data, text, config.seed)
  for name, source in zip(config.data.corpora, rows, strict=True):
    console.print(f"{name}: {source.about}")
  digests = {name: source.digest[:32] for name, source in zip(config.data.corpora, rows, strict=True)}
  _check_data(read_before or digests, digests, workdir)
  plain |= {"data_digests": digests, "draws": draws}
  distributed.agree(
    config=json.dumps(plain), data=json.dumps(digests), workdir=address.of(workdir), jax=jax.__version__
  )
  done = max(checkpoint.steps(workdir), default=0)
  if config.checkpoint.near:
    done = near.Near(config.checkpoint.near, workdir).newest(after=done)
  if distributed.is_first():
    workdir.mkdir(parents=True, exist_ok=True)
    history.append(workdir, done, mesh, changed, allowed=list(allow), data=digests, draws=draws)
    _write(workdir, plain, None if saved else text, base)
  return Run(config, workdir, text, mesh, *program(config, mesh), rows, base)


def _check_data(began: dict[str, str], now: dict[str, str], workdir: Path) -> None:
  """Raises Mistake if a corpus is not the one that the run began with; older runs do not say."""
  for name in now:
    if began.get(name) != now[name]:
      raise Mistake(
        f"data.corpus: {name} has changed since the run in {workdir} began with it: put back what it was, or use"
        " another workdir"
      )


def _check_outputs(log: LogConfig, workdir: Path) -> None:
  """Raises Mistake if what a run writes could not be written, or no step lies in the profiler's window."""
  names = ("config.json", history.FILE, "metrics.jsonl", *evaluate.FILES)
  folders = ["checkpoints", "tokenizer", *["tensorboard"] * log.tensorboard, *["profile"] * (log.profile_last > 0)]
  checkpoint.check_workdir(workdir, names, folders)
  if (log.profile_first or log.profile_last) and not log.profile_first < log.profile_last:
    raise Mistake(f"log.profile_first={log.profile_first}, log.profile_last={log.profile_last}: no step lies between")


def _write(workdir: Path, config: dict[str, Any], text: tokenizer.Tokenizer | None, base: str) -> None:
  """Writes config.json; of a run that begins here (with its tokenizer) also what makes the workdir self-contained."""
  if base:
    checkpoint.need(address.mirror(base), workdir.absolute())
  if text:
    text.save(workdir / "tokenizer")
    published = _workdir_of(base) / "published"
    if base and published.is_dir():  # for the way back
      shutil.copytree(published, workdir / "published", dirs_exist_ok=True)
  new = workdir / "config.new"
  new.write_text(json.dumps(config, indent=2) + "\n")
  new.replace(workdir / "config.json")  # at once: a run may be killed here
  address.push(workdir)


def _workdir_of(base: str) -> Path:
  """The workdir that a checkpoint lies in."""
  return address.mirror(base).parent.parent


def find_base(init_from: str) -> str:
  """The checkpoint that a run begins from: `init_from` itself, or the last one of that workdir.

  Raises:
    Missing: there is none.
  """
  path = address.mirror(init_from).absolute()
  step = path.name if path.name.isdecimal() and path.parent.name == "checkpoints" else ""
  workdir = path.parent.parent if step else path
  steps = checkpoint.steps(workdir)
  if not (workdir / "config.json").is_file() or not steps or (step and int(step) not in steps):
    there = f"there are the steps {steps}" if steps else "there is no checkpoint"
    raise Missing(f"init_from={init_from}: {there}; name a workdir that was trained, or made by --mode=import")
  if not (workdir / "tokenizer").is_dir():
    raise Missing(f"init_from={init_from}: there is no tokenizer in it to read text with")
  return str(checkpoint.folder(workdir) / (step or str(steps[-1])))


def base_tokenizer(config: Config) -> tokenizer.Tokenizer:
  """The tokenizer of a run that begins from another one's checkpoint."""
  return _masking(tokenizer.load(_workdir_of(find_base(config.init_from)) / "tokenizer"), config)


def _masking(text: tokenizer.Tokenizer, config: Config) -> tokenizer.Tokenizer:
  """With a [MASK], where a model that was autoregressive has none and is to be a mask predictor."""
  return text.with_mask(config.tokenizer.mask) if text.mask_id < 0 and config.aim.fills else text


def _base(config: Config, saved: dict[str, Any] | None, workdir: Path) -> str:
  """The checkpoint that a run begins from; of a run that goes on where it was, or is now by what `init_from` says.

  Raises:
    Missing: it is needed, for adapters or since there is no checkpoint yet, and is not there.
    Mistake: `init_from` names another checkpoint than the one that the run began from.
  """
  if not saved or not saved.get("base"):
    return find_base(config.init_from)
  base, mark = address.mirror(saved["base"]), saved.get("base_fingerprint", "")
  same = config.init_from == saved["init_from"]
  given = address.mirror(config.init_from).absolute()
  for path in [base] * same + [given, given / "checkpoints" / base.name]:
    found = checkpoint.fingerprint(path)
    if found and found == (mark or (found if same and path == base else "")):  # older runs hold no mark
      return address.of(path)
  if not same:
    find_base(config.init_from)
    raise Mistake(f"init_from={config.init_from}: {workdir} began from another checkpoint, {base}")
  if checkpoint.steps(workdir) and not config.model.lora_rank:
    return address.of(base)  # the workdir holds everything
  why = "trains adapters of" if config.model.lora_rank else "has no checkpoint yet, and begins from"
  raise Missing(f"{workdir} {why} {base}, which is not there: say as init_from where that checkpoint is now")


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
    base = load(run.base, mesh=run.mesh, dtype=run.config.model.dtype, weights="full")
    params, masks = base.params, run.config.aim.fills and not base.model.objective.fills
    if masks:
      used = min(base.vocab_size, base.model.V)
      params = _with_mask(params, run.text.mask_id, used, run.config.model.V, run.config.seed)
    params = _cast(params, jnp.float32, at.params)
  opt_state = jax.jit(run.tx.init, out_shardings=at.opt_state)(params)
  return State(jax.device_put(jnp.int32(0), at.step), params, opt_state, jax.device_put(guard(), at.guard), frozen)


def _with_mask(params: Any, mask_id: int, used: int, V: int, seed: int) -> Any:
  """An autoregressive model's parameters with rows up to V, and an embedding of [MASK] that looks like a word's.

  It is drawn as the others are distributed, each number by itself: a free row has decayed to 0, from where gradients
  explode (LLaDA2.0, arXiv 2512.15745, adds noise in the first steps for that).
  """

  @jax.jit
  def made(embedding_VD, head_DV):
    words_VD = embedding_VD[:used].astype(jnp.float32)
    mean_D, std_D = words_VD.mean(axis=0), words_VD.std(axis=0)
    drawn_D = mean_D + std_D * jax.random.normal(jax.random.fold_in(jax.random.key(seed), _MASK), mean_D.shape)
    more = V - len(embedding_VD)
    embedding_VD = jnp.concatenate([embedding_VD, jnp.tile(mean_D[None], (more, 1)).astype(embedding_VD.dtype)])
    embedding_VD = embedding_VD.at[mask_id].set(drawn_D.astype(embedding_VD.dtype))
    if head_DV is not None:
      mean_D1 = head_DV[:, :used].mean(axis=1, keepdims=True)
      head_DV = jnp.concatenate([head_DV, jnp.tile(mean_D1, (1, more)).astype(head_DV.dtype)], axis=1)
    return embedding_VD, head_DV

  embedding_VD, head_DV = made(params["embedding"], params.get("head"))
  return params | {"embedding": embedding_VD} | ({} if head_DV is None else {"head": head_DV})


_MASK = 0x3A5C  # folded into the seed for the embedding of [MASK]


def _frozen_base(run: Run) -> Any:
  """What the adapters adapt."""
  c = run.config.model
  found = load(run.base, mesh=run.mesh, dtype=c.dtype, weights=c.weights).params
  return found if c.weights != "full" else _cast(found, c.compute_dtype, run.shardings.frozen)


def _cast(params: Any, dtype: Any, at: Any) -> Any:
  return jax.jit(lambda x: jax.tree.map(lambda x: x.astype(dtype), x), out_shardings=at)(params)


def restore(run: Run) -> State | None:
  """The state of the last checkpoint, or of a newer one near, read to where it lives.

  Nothing is drawn, and of a base only what is frozen read.

  None where there is no checkpoint.
  """
  shapes = jax.tree.map(
    lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), jax.eval_shape(run.init), run.shardings
  )

  def read(workdir: Path, step: int, wanted: checkpoint.Tree) -> checkpoint.Tree:
    if "guard" in checkpoint.metadata(workdir, step):
      return checkpoint.restore(workdir, step, wanted)
    wanted = {name: x for name, x in wanted.items() if name != "guard"}  # older than the guard
    return checkpoint.restore(workdir, step, wanted) | {"guard": jax.device_put(guard(), run.shardings.guard)}

  abstract = to_tree(shapes, copy=False)
  done, found = max(checkpoint.steps(run.workdir), default=0), None
  if run.config.checkpoint.near:
    found = near.Near(run.config.checkpoint.near, run.workdir).restore(abstract, after=done)
  found = found or checkpoint.restore_latest(run.workdir, abstract, read=read)
  if found is None:
    return None
  return from_tree(found[1], shapes)._replace(frozen=_frozen_base(run) if run.config.model.lora_rank else {})
