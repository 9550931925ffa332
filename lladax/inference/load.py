"""From a folder to a `LLaDA`: workdirs, checkpoints, published folders, the hub."""

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lladax import address, fields
from lladax.data import tokenizer as tokenizers
from lladax.devices import sharding
from lladax.inference.llada import LLaDA
from lladax.mistake import Missing, Mistake
from lladax.model import quantized
from lladax.model.mask_predictor import MaskPredictorConfig
from lladax.storage import checkpoint, published, transfer


def load(
  path: str | Path, step: int | None = None, mesh: Mesh | None = None, *, dtype: str | None = None,
  weights: str | None = None, mask_id: int | None = None, eos_id: int | None = None, block: int | None = None,
) -> LLaDA:  # fmt: skip
  """Loads a run's last checkpoint (or that of `step`) with its tokenizer, or a published checkpoint.

  Args:
    path: a workdir, or a checkpoint folder WORKDIR/checkpoints/STEP; or a folder in the published layout
      (config.json and *.safetensors; without tokenizer files, ids only), or hf://OWNER/NAME, with @REVISION if that is
      not main, of the Hugging Face hub.
    step: of a checkpoint; None takes the newest readable one.
    mesh: where the parameters go, as `sharding.make_mesh(MeshConfig(tensor=8))`; None: on one device.
    dtype: of the computation: "float32", "bfloat16", "float16" or "auto"; None: as the model says.
    weights: of the layers' matrices: "int8", "int4" or "nf4" (extra [quantize]), made while they are read, a tensor of
      a file or a parameter of a checkpoint at a time; "full", as they are; None: as the model says. Where they are
      quantised, and where float16 is computed in, the other parameters take the dtype of the computation. Adapters are
      merged into full weights, and stay beside quantised ones.
    mask_id: id of [MASK], of a published folder that does not say it.
    eos_id: id of EOS, likewise.
    block: tokens of a block, of a published model of blocks; another number than the folder's may be named, too.

  Raises:
    Missing: there is no such folder, no run, or no checkpoint.
    Mistake: the vocabulary and the checkpoint disagree, or nothing can be read, or the layout is not supported; qwix
      is not installed, and `weights` needs it.
  """
  step = fields.typed(step, int | None, "step")
  ids = {"mask_id": mask_id, "eos_id": eos_id, "block": block}
  theirs_said = published.Said(**{name: fields.typed(x, int | None, name) for name, x in ids.items()}).check()
  both = {"dtype": fields.typed(dtype, str | None, "dtype"), "weights": fields.typed(weights, str | None, "weights")}
  said: dict[str, Any] = {name: value for name, value in both.items() if value is not None}
  if not isinstance(path, str | os.PathLike):
    raise Mistake(f"path={path!r}: give a folder, or hf://OWNER/NAME")
  given = address.mirror(path)
  folder = given.parent if given.name.isdecimal() else given
  if folder.name == "checkpoints" and not (given / "config.json").exists():
    named = None if folder == given else int(given.name)
    if None not in (named, step) and named != step:
      raise Mistake(f"step={step}: {path} is the checkpoint of step {named}; say one of them")
    path, step = folder.parent, step if named is None else named
  workdir = published.find(path)
  if published.is_published(workdir):
    theirs = published.read(workdir, theirs_said)
    model = _model(theirs.model, said, mesh)
    theirs = dataclasses.replace(theirs, model=model)
    at = None if mesh is None else sharding.shardings(mesh, model.letters())
    kept = model.compute_dtype if _narrows(model) else None
    return LLaDA(model, transfer.load_params(theirs, at, kept), **theirs.identity)
  if told := [f"{name}={x}" for name, x in ids.items() if x is not None]:
    raise Mistake(f"{', '.join(told)}: {path} is a workdir, which knows its own: leave it out")
  saved = checkpoint.config(workdir)
  trained = MaskPredictorConfig(**saved["model"])
  model = _model(trained, said, mesh)
  imported = (workdir / "published").is_dir()
  text = None
  if saved["tokenizer_fingerprint"] or not imported:
    text = tokenizers.load(workdir / "tokenizer")
  if imported:
    identity = published.identity(workdir / "published", model, text, published.Said(**saved.get("said", {})))
  else:
    assert text is not None
    check_vocabulary(model, text)
    names = ("mask_id", "eos_id", "vocab_size", "eot_id", "ends")
    identity: dict[str, Any] = {"tokenizer": text} | {name: getattr(text, name) for name in names}
  if text and text.fingerprint != saved["tokenizer_fingerprint"]:
    raise Mistake(f"{workdir / 'tokenizer'} holds another tokenizer than the one this model was trained with")
  available = checkpoint.steps(workdir)
  if not available or (step is not None and step not in available):
    wanted = "no checkpoint" if step is None else f"no checkpoint of step {step}"
    raise Missing(f"{workdir} has {wanted} (there are: {available or 'none'}); train it first")
  here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  whole = dataclasses.replace(model, weights="full")  # as it lies there
  shapes, _ = whole.split(jax.eval_shape(whole.init, jax.random.key(0)))
  at = jax.tree.map(lambda _: here, shapes)
  if mesh is not None:
    at = sharding.shardings(mesh, whole.split(whole.letters())[0])
  keeps = imported and not saved.get("init_from")  # an import keeps the dtypes of its files
  dtypes = checkpoint.metadata(workdir, available[-1])["params"] if keeps else shapes
  abstract = jax.tree.map(
    lambda x, kept, at: jax.ShapeDtypeStruct(x.shape, kept.dtype, sharding=at), shapes, dtypes, at
  )

  read = functools.partial(_narrowed, model, mesh) if _narrows(model) and not model.lora_rank else checkpoint.restore
  if step is not None:
    tree = read(workdir, step, {"params": abstract})
  else:
    found = checkpoint.restore_latest(workdir, {"params": abstract}, set_aside=False, read=read)
    assert found is not None
    tree = found[1]
  params = tree["params"]
  if not model.lora_rank:
    return LLaDA(model, params, **identity)
  if not checkpoint.folder(address.mirror(saved["base"]).parent.parent).is_dir():
    raise Missing(
      f"{workdir} holds adapters of {saved['base']}, which is not there: put it back, or train on with"
      " init_from=the place where it is now"
    )
  # What they are merged with is what they were trained over.
  over = dataclasses.replace(trained, dtype=model.dtype) if model.weights == "full" else model
  base = load(saved["base"], mesh=mesh, dtype=over.dtype, weights=over.weights).params
  if model.weights != "full":
    return LLaDA(model, model.join(params, base), **identity)
  params = jax.jit(lambda a, x: over.merge(a, x)[1])(params, base)
  return LLaDA(dataclasses.replace(model, lora_rank=0), params, **identity)


def _model(model: MaskPredictorConfig, said: dict[str, Any], mesh: Mesh | None) -> MaskPredictorConfig:
  """The model with what is said of it, checked before anything is read."""
  model = dataclasses.replace(model, **said)
  if model.weights != "full":
    quantized.library()
  if mesh is not None:
    model.check_mesh(mesh)
  return model


def _narrows(model: MaskPredictorConfig) -> bool:
  """Whether a model's parameters are not kept as they were written."""
  return model.weights != "full" or model.compute_dtype == jnp.float16


def _narrowed(model: MaskPredictorConfig, mesh: Mesh | None, workdir: Path, step: int, abstract: Any) -> Any:
  """As `checkpoint.restore`, but read and narrowed one by one: no two parameters are there as they were written."""
  letters, params = model.letters(), {stack: {} for stack in model.stacks}
  for path, x in checkpoint.flat(abstract["params"]):
    *group, name = path.split("/")
    alone = {"params": {group[0]: {name: x}} if group else {name: x}}
    of_x, kept = (letters[group[0]], params[group[0]]) if group else (letters, params)
    at = x.sharding if mesh is None else sharding.shardings(mesh, of_x[name])
    keep = jax.jit(functools.partial(model.keep, name, dtype=model.compute_dtype), out_shardings=at)
    kept[name] = jax.block_until_ready(keep(*jax.tree.leaves(checkpoint.restore(workdir, step, alone))))
  return {"params": params}


def asked(model: MaskPredictorConfig) -> dict[str, Any]:
  """How a command's config asks for its model: what `load` takes, and a checkpoint does not decide."""
  return {name: getattr(model, name) for name in ("dtype", "weights")}


def check_vocabulary(model: MaskPredictorConfig, text: tokenizers.Tokenizer) -> None:
  """Raises Mistake if the tokenizer has ids that the embedding lacks."""
  if text.vocab_size > model.V:
    raise Mistake(
      f"model.V={model.V} is smaller than the tokenizer's vocabulary of {text.vocab_size} ids:"
      f" this tokenizer does not belong to this model; it needs V={text.rows}"
    )


def saved_model(workdir: Path) -> tuple[MaskPredictorConfig, tokenizers.Tokenizer | None]:
  """The model of a workdir and its tokenizer, if it has one: what can be checked before the parameters are read."""
  saved = checkpoint.config(workdir)
  text = tokenizers.load(workdir / "tokenizer") if saved.get("tokenizer_fingerprint") else None
  return MaskPredictorConfig(**saved["model"]), text
