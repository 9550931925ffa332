"""From a folder to a `LLaDA`: workdirs, checkpoints, published folders, the hub."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from lladax import fields
from lladax.data import tokenizer as tokenizers
from lladax.devices import sharding
from lladax.inference.llada import LLaDA
from lladax.mistake import Missing, Mistake
from lladax.model.mask_predictor import MaskPredictorConfig
from lladax.storage import checkpoint, published, transfer


def load(path: str | Path, step: int | None = None, mesh: Mesh | None = None) -> LLaDA:
  """Loads a run's last checkpoint (or that of `step`) with its tokenizer, or a published checkpoint.

  Args:
    path: a workdir, or a checkpoint folder WORKDIR/checkpoints/STEP; or a folder in the published layout
      (config.json and *.safetensors; without tokenizer files, ids only), or hf://OWNER/NAME, with @REVISION if that is
      not main, of the Hugging Face hub.
    step: of a checkpoint; None takes the newest readable one.
    mesh: where the parameters go, as `sharding.make_mesh(MeshConfig(tensor=8))`; None: on one device.

  Raises:
    Missing: there is no such folder, no run, or no checkpoint.
    Mistake: the vocabulary and the checkpoint disagree, or nothing can be read, or the layout is not supported.
  """
  step = fields.typed(step, int | None, "step")
  if not isinstance(path, str | os.PathLike):
    raise Mistake(f"path={path!r}: give a folder, or hf://OWNER/NAME")
  given = Path(os.path.expanduser(path))
  folder = given.parent if given.name.isdecimal() else given
  if folder.name == "checkpoints" and not (given / "config.json").exists():
    named = None if folder == given else int(given.name)
    if None not in (named, step) and named != step:
      raise Mistake(f"step={step}: {path} is the checkpoint of step {named}; say one of them")
    path, step = folder.parent, step if named is None else named
  workdir = published.find(path)
  if published.is_published(workdir):
    theirs = published.read(workdir)
    at = None if mesh is None else sharding.shardings(mesh, theirs.model.letters())
    return LLaDA(theirs.model, transfer.load_params(theirs, at), **theirs.identity)
  saved = checkpoint.config(workdir)
  model = MaskPredictorConfig(**saved["model"])
  imported = (workdir / "published").is_dir()
  text = None
  if saved["tokenizer_fingerprint"] or not imported:
    text = tokenizers.load(workdir / "tokenizer")
  if imported:
    identity = published.identity(workdir / "published", model, text)
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
  shapes, _ = model.split(jax.eval_shape(model.init, jax.random.key(0)))
  at = jax.tree.map(lambda _: here, shapes)
  if mesh is not None:
    at = sharding.shardings(mesh, model.split(model.letters())[0])
  keeps = imported and not saved.get("init_from")  # an import keeps the dtypes of its files
  dtypes = checkpoint.metadata(workdir, available[-1])["params"] if keeps else shapes
  abstract = jax.tree.map(
    lambda x, kept, at: jax.ShapeDtypeStruct(x.shape, kept.dtype, sharding=at), shapes, dtypes, at
  )
  abstract = {"params": abstract}
  if step is not None:
    tree = checkpoint.restore(workdir, step, abstract)
  else:
    found = checkpoint.restore_latest(workdir, abstract, set_aside=False)
    assert found is not None
    tree = found[1]
  params = tree["params"]
  if model.lora_rank:
    if not checkpoint.folder(Path(saved["base"]).parent.parent).is_dir():
      raise Missing(
        f"{workdir} holds adapters of {saved['base']}, which is not there: put it back, or train on with"
        " init_from=the place where it is now"
      )
    given = load(saved["base"], mesh=mesh).params
    model, params = dataclasses.replace(model, lora_rank=0), jax.jit(lambda a, x: model.merge(a, x)[1])(params, given)
  return LLaDA(model, params, **identity)


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
