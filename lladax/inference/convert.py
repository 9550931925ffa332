"""Published checkpoints and workdirs: one made from the other.

WORKDIR/published/ keeps the files that came with the tensors (config.json, the tokenizer's), for the way back.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lladax import address
from lladax.data import tokenizer as tokenizers
from lladax.devices import sharding
from lladax.inference import load
from lladax.mistake import Mistake
from lladax.model import mask_predictor
from lladax.model.mask_predictor import MaskPredictorConfig
from lladax.storage import checkpoint, layout, published, safetensors, transfer


def from_published(
  source: str | Path, workdir: Path, values: dict[str, Any], said: published.Said = published.NOTHING
) -> None:
  """Makes a published folder, or one of the hub, into a workdir with the checkpoint of step 0, in the files' dtypes.

  Args:
    source: folder, or hf://OWNER/NAME[@REVISION].
    workdir: new, or empty.
    values: a run's config as plain values; its model, and its tokenizer if there is one, become the source's. A mesh
      that slices parameters is used.
    said: what the source does not say of its ids and blocks.

  Raises:
    Missing, Mistake: as `huggingface.find` and `read`; the workdir is in use.
  """
  if workdir.is_dir() and any(workdir.iterdir()):
    raise Mistake(f"--workdir={workdir} is not empty: an import needs a new workdir")
  checkpoint.check_workdir(workdir, ["config.json"], ["checkpoints", "tokenizer", "published"])
  theirs = published.read(published.find(source), said.check())
  dataclasses.replace(theirs.model, weights=values["model"].get("weights", "full"))  # must go together
  c = sharding.MeshConfig(**values.get("mesh", {}))
  at, step_at = None, None
  if (c.fsdp, c.tensor) != (1, 1):  # copies of the parameters would help nobody here
    mesh = sharding.make_mesh(c)
    theirs.model.check_mesh(mesh)
    at, step_at = sharding.shardings(mesh, theirs.model.letters()), sharding.shardings(mesh, "")
  text = theirs.identity["tokenizer"]
  for path in theirs.folder.iterdir():
    if path.is_file() and path.suffix in published.KEPT and path.name != safetensors.INDEX:
      (workdir / "published").mkdir(parents=True, exist_ok=True)
      shutil.copyfile(path, workdir / "published" / path.name)
  if text:
    text.save(workdir / "tokenizer")
    settings = json.loads((workdir / "tokenizer" / tokenizers.SETTINGS).read_text())
    files = [path for path in (workdir / "tokenizer").iterdir() if path.name != tokenizers.SETTINGS]
    special = {name: settings["names"][name] for name in ("eos", "mask", "pad")}
    special |= {"kind": settings["kind"], "path": "".join(map(address.of, files))}
    values = values | {"tokenizer": values["tokenizer"] | special}
  saver = checkpoint.Checkpoints(workdir)
  params = transfer.load_params(theirs, at)
  saver.save(0, {"step": jax.device_put(np.int32(0), step_at), "params": params})
  saver.close()
  shape = {name: getattr(theirs.model, name) for name in (*mask_predictor.SHAPE, "causal", "block")}
  values = values | {"objective": theirs.model.objective.name, "model": values["model"] | shape}
  values["noise"] = values.get("noise", {}) | {"block": theirs.model.block, "blocks": ()}
  values |= {"tokenizer_fingerprint": text.fingerprint if text else ""}
  values["sample"] = values.get("sample", {}) | theirs.identity["defaults"]
  values |= {
    "merged": theirs.merged,
    "said": {name: x for name, x in said._asdict().items() if x is not None and name != "block"},
  }
  (workdir / "config.json").write_text(json.dumps(values, indent=2) + "\n")  # the last: now it is a workdir
  address.push(workdir)


def _says(config: dict[str, Any], folder: Path, model: MaskPredictorConfig) -> bool:
  """Whether an imported folder says still what a model trained from it is, and what it masks with."""
  masks = config.get("mask_token_id") is not None or published.names_mask(folder)
  return layout.says(config, model) and (masks or not model.objective.fills)


def to_published(workdir: Path, target: Path, dtype: str | None = None) -> None:
  """Writes a workdir's last checkpoint in the published layout, with the files that were imported beside it.

  Raises:
    Missing: there is no checkpoint.
    Mistake: as `huggingface.export`; no checkpoint can be read.
  """
  if target.is_dir() and any(target.iterdir()):
    raise Mistake(f"--target={target} is not empty: an export needs a new folder")
  saved = checkpoint.config(workdir)
  model = MaskPredictorConfig(**saved["model"])
  theirs = workdir / "published" / "config.json"
  config = json.loads(theirs.read_text("utf-8")) if theirs.is_file() else None
  imported = config is not None and ("base" not in saved or _says(config, theirs.parent, model))
  if not imported:
    layout.of_model(model)  # before anything is read
  # Adapters are merged, with what they were trained over. What float16 cannot say of a file is not lost here.
  dtype_here = "bfloat16" if model.compute_dtype == jnp.float16 else None
  found = load.load(workdir, weights="full", dtype=dtype_here)
  model, params = found.model, found.params
  target.mkdir(parents=True, exist_ok=True)
  if config is not None:
    shutil.copytree(workdir / "published", target, dirs_exist_ok=True)
  if config is None or not imported:
    text = tokenizers.load(workdir / "tokenizer")
    text.save(target)
    config = layout.new_config(model, text) | {"dtype": str(params["embedding"].dtype)}
  if dtype:
    config[next((name for name in ("torch_dtype", "dtype") if name in config), "dtype")] = dtype
  transfer.export(params, model, target, config, dtype=dtype, merged=saved.get("merged", False))
  address.push(target)
