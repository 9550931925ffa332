"""A published checkpoint: a folder of config.json and *.safetensors, as LLaDA and iLLaDA come, found and checked."""

import dataclasses
import difflib
import importlib
import os
import re
from pathlib import Path
from typing import Any

import tokenizers as hf_tokenizers

from lladax import address
from lladax.data import template as templates
from lladax.data import tokenizer as tokenizers
from lladax.mistake import Missing, Mistake
from lladax.model.mask_predictor import MaskPredictorConfig
from lladax.storage import layout, safetensors
from lladax.storage.safetensors import named, read_json, shown

KEPT = (".json", ".jinja", ".model", ".py", ".txt")  # of a published folder, beside its tensors

# A part of the name of a model that is not read, and why it is not.
_OTHERS = (
  ("llada2", "it generates by blocks, and is a mixture of experts"),
  ("moe", "it is a mixture of experts"),
  ("dream", "its logits are shifted by one position, and its q, k and v have biases"),
  ("sdar", "it generates by blocks, and norms its queries and keys"),
)
_PROBLEMS = 8  # that are said; of the others only how many there are


@dataclasses.dataclass(frozen=True)
class Published:
  """A published folder that has passed every check; no tensor is read yet."""

  folder: Path
  family: int  # column of the tables: 0 LLaDA, 1 iLLaDA
  model: MaskPredictorConfig
  tensors: dict[str, safetensors.Tensor]
  identity: dict[str, Any]  # what LLaDA has beside model and params: tokenizer, mask_id, eos_id, ...


def is_published(folder: Path) -> bool:
  """Whether the folder's config.json is a published one, and not a workdir's; Missing where there is none."""
  return not isinstance(_config(folder).get("model"), dict)


def find(source: str | Path) -> Path:
  """The folder that a name of a model means; the hub is asked for hf://OWNER/NAME[@REVISION], and for nothing else.

  Of the root of a repository in the hub's cache it is the snapshot of `main`, or the only one.

  Raises:
    Missing: there is no such folder, or no such repository.
    Mistake: it is something else than a folder; the hub cannot be asked.
  """
  name = str(source)
  if match := re.fullmatch(r"hf:/+([^/@]+/[^/@]+?)(?:@(.+?))?/*", name):
    return _download(*match.groups())
  folder = address.mirror(name)
  if os.path.isdir(folder):
    return _snapshot(folder)
  if os.path.exists(folder):
    raise Mistake(f"{source}: it is a file: give its folder, {folder.parent}")
  if re.match(r"[a-z][\w+-]*:/", name):
    known = "a hub name is written hf://OWNER/NAME or hf://OWNER/NAME@REVISION"
    raise Mistake(f"{source}: {known if name.startswith('hf:') else 'models are read from folders, and from hf://'}")
  instead = safetensors.stand_in(folder)
  advice = [instead or "there is no such folder"]
  siblings = [x.name for x in folder.parent.iterdir() if x.is_dir()] if os.path.isdir(folder.parent) else []
  if near := difflib.get_close_matches(folder.name, siblings, 1):
    raise Missing(f"{source}: {advice[0]}; did you mean {folder.parent / near[0]}?")
  if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
    advice.append(f"a repository on the Hugging Face hub is written hf://{name}")
  raise Missing(f"{source}: {'; '.join(advice)}")


def _snapshot(folder: Path) -> Path:
  """The folder, or where it is a repository's root in the hub's cache, the snapshot that is meant."""
  if (folder / "config.json").exists() or not (folder / "snapshots").is_dir():
    return folder
  found = sorted(x.name for x in (folder / "snapshots").iterdir())
  main = folder / "refs" / "main"
  wanted = main.read_text().strip() if main.is_file() else ""
  if wanted in found or len(found) == 1:
    return folder / "snapshots" / (wanted if wanted in found else found[0])
  snapshots = f"name one of its snapshots: {_listed(found)}" if found else "and there is no snapshot in it"
  raise Missing(f"{folder} is a repository in the hub's cache: {snapshots}")


def _download(name: str, revision: str | None) -> Path:
  """The folder that a repository on the hub is downloaded to, or was."""
  said = f"hf://{name}" + (f"@{revision}" if revision else "")
  try:
    hub, errors = (importlib.import_module(x) for x in ("huggingface_hub", "huggingface_hub.errors"))
  except ImportError:
    raise Mistake(f"{said}: to ask the Hugging Face hub: pip install huggingface_hub") from None
  try:
    patterns = ["*.safetensors", *(f"*{x}" for x in KEPT)]
    return Path(hub.snapshot_download(name, revision=revision, allow_patterns=patterns))
  except errors.GatedRepoError:
    why = "it is gated: ask for access on its page, and log in (hf auth login)"
  except errors.RepositoryNotFoundError:
    why = "there is no such repository on the hub, or it is private (hf auth login)"
  except errors.RevisionNotFoundError:
    why = "the repository has no such revision"
  except (OSError, errors.EntryNotFoundError, errors.HFValidationError, *errors.HfHubHTTPError.__bases__) as error:
    why = (str(error).strip().splitlines() or [type(error).__name__])[0]  # of the network, mostly
  raise Missing(f"{said}: {named(why, 300)}")


def read(folder: Path) -> Published:
  """Reads config.json, the tokenizer and the headers of the tensors' files, and checks them against each other.

  Raises:
    Missing: no config.json.
    Mistake: what is wrong, in one line.
  """
  config = _config(folder)
  if refusal := _refusal(config, folder):
    raise Mistake(f"{folder}: {refusal}")
  problems: list[str] = []
  for path in sorted(folder.iterdir()):
    if path.suffix in KEPT and (instead := safetensors.stand_in(path)):
      problems.append(f"{path.name} {instead}")
  tensors = safetensors.headers(folder, problems)
  broken = bool(problems)  # what is in the other files is said when these are mended
  family = layout.family_of(config)
  model = layout.model_of(config, family, problems)
  if model is not None and not broken:
    _compare(model, family, tensors, problems)
  if problems or model is None:
    raise Mistake(f"{folder}: {_listed(problems)}")
  return Published(folder, family, model, tensors, identity(folder, model))


def _listed(problems: list[str]) -> str:
  """The first few; a folder of another model has thousands."""
  more = [f"and {len(problems) - _PROBLEMS} more"] if len(problems) > _PROBLEMS else []
  return "; ".join(problems[:_PROBLEMS] + more)


def identity(folder: Path, model: MaskPredictorConfig, text: tokenizers.Tokenizer | None = None) -> dict[str, Any]:
  """Tokenizer (None without its files) and special ids of a published folder, under their names in LLaDA."""
  config = read_json(folder / "config.json")
  said = [config.get("eos_token_id"), templates.read(folder / "generation_config.json").get("eos_token_id")]
  ends = [i for x in said for i in (x if isinstance(x, list) else [x]) if i is not None]
  _check_ends(folder, "eos_token_id={}", ends, model)
  eos_id, mask_id = ends[0] if ends else None, config.get("mask_token_id")
  if text is None and (folder / tokenizers.SETTINGS).is_file():
    text = tokenizers.load(folder)
  elif text is None and (folder / "tokenizer.json").is_file():
    names = _tokenizer_config(folder / "tokenizer.json", eos_id, mask_id, config.get("pad_token_id"))
    text = tokenizers.published(names, ends)
  if text is not None:
    if text.vocab_size > model.V:  # of an import that appended chat tokens behind the last row
      text = text.bare()
    found = {name: getattr(text, name) for name in ("mask_id", "eos_id", "eot_id", "vocab_size")}
    found["vocab_size"], ends = min(text.vocab_size, model.V), [*text.ends, *ends]
  else:
    eot_id = 126348 if mask_id == 126336 else None  # LLaDA's own vocabulary
    vocab_size = min(config.get("vocab_size") or model.V, model.V)
    found = {"mask_id": mask_id, "eos_id": eos_id, "eot_id": eot_id, "vocab_size": vocab_size}
  for name in ("mask_id", "eos_id"):
    if not isinstance(found[name], int) or not 0 <= found[name] < model.V:
      field = name.replace("_id", "_token_id")
      raise Mistake(f"{folder}/config.json: {field}={found[name]}, and the embedding has {model.V} rows")
  ends = [i for i in (found["eos_id"], found["eot_id"], *ends) if i is not None]
  _check_ends(folder, "token {} ends a text", ends, model)
  return {"tokenizer": text, "ends": tuple(dict.fromkeys(ends))} | found


def _check_ends(folder: Path, said: str, ends: list[Any], model: MaskPredictorConfig) -> None:
  for i in ends:
    if type(i) is not int or not 0 <= i < model.V:
      raise Mistake(f"{folder}: {said.format(shown(i))}, and the embedding has {model.V} rows")


def _tokenizer_config(path: Path, eos_id, mask_id, pad_id) -> tokenizers.TokenizerConfig:
  """The special tokens' names, looked up by the ids of config.json (iLLaDA's names no mask)."""
  vocabulary = _vocabulary(path)
  mask_id = _mask_id(path) if mask_id is None else mask_id
  if mask_id is None:
    raise Mistake(f"{path.parent}/config.json: mask_token_id is missing, and the tokenizer names no mask either")
  names = {}
  for field, id in (("eos_token_id", eos_id), ("mask_token_id", mask_id), ("pad_token_id", pad_id)):
    name = vocabulary.id_to_token(id) if isinstance(id, int) and 0 <= id < 2**32 else None
    if name is None and not (field == "pad_token_id" and id is None):
      raise Mistake(f"{path.parent}/config.json: {field}={id} is no token of {path.name}")
    names[field] = name or ""
  eos, mask, pad = names.values()
  return tokenizers.TokenizerConfig("huggingface", str(path), eos=eos, mask=mask, pad=pad if pad != eos else "")


def _vocabulary(path: Path) -> hf_tokenizers.Tokenizer:
  try:
    return hf_tokenizers.Tokenizer.from_file(str(path))
  except Exception as error:  # the library raises nothing finer
    raise Mistake(f"{path} is no vocabulary: {named(str(error))}") from error


def _mask_id(path: Path) -> int | None:
  """The token that a vocabulary calls a mask; None where there is no such token, or no file."""
  if not path.is_file():
    return None
  found = map(_vocabulary(path).token_to_id, ("<|mdm_mask|>", "<[MASK]>"))
  return next((i for i in found if i is not None), None)


def _config(folder: Path) -> dict[str, Any]:
  """What config.json holds; Missing where there is none, with the folders below that have one."""
  if not os.path.lexists(folder / "config.json"):
    below = [str(path.parent) for path in sorted(folder.glob("*/config.json"))]
    hint = f"; did you mean {below[0]}?" if below else ""
    raise Missing(f"{folder}: there is no config.json in it{hint}")
  return read_json(folder / "config.json")


def _refusal(config: dict[str, Any], folder: Path) -> str | None:
  """Why a model is not read, which its config.json tells by its names; None if it is LLaDA's or iLLaDA's.

  LLaDA-MoE calls itself `llada`, too. Of a Llama, which iLLaDA's names are those of, the mask token tells what it is:
  that of config.json, or of the vocabulary.
  """
  kind, classes = config.get("model_type"), config.get("architectures")
  names = [x for x in (kind, *(classes if isinstance(classes, list) else [classes])) if isinstance(x, str)]
  experts = next((x for x in ("num_experts", "num_local_experts", "n_routed_experts") if config.get(x)), None)
  why = next((why for part, why in _OTHERS if any(part in x.lower() for x in names)), None)
  if isinstance(config.get("model"), dict):
    return "it is a workdir of lladax, and no published folder: --mode=export makes one of it"
  if not names:
    return "config.json is neither a workdir's nor a published model's: there is no model_type in it"
  if experts and not why:
    why = f"it is a mixture of experts ({experts}={shown(config[experts])})"
  elif not why and any("llada" in x.lower() for x in names):
    why = None if config.keys() & {"d_model", "hidden_size"} else "there is neither d_model nor hidden_size in it"
  elif not why and config.get("mask_token_id") is None and _mask_id(folder / "tokenizer.json") is None:
    why = "it names no mask_token_id, so it is no mask predictor"
  elif not why and (kind != "llama" or "hidden_size" not in config):
    why = "this layout is not known"
  said = f"config.json is of model_type={shown(kind)}, architectures={shown(classes)}"
  return why and f"{said}: {why}; only LLaDA and iLLaDA are supported, dense ones"


def _compare(c: MaskPredictorConfig, family: int, tensors: dict[str, safetensors.Tensor], problems: list[str]) -> None:
  """Missing, misshapen and extra tensors, each by name."""
  if c.N > len(tensors):
    problems.append(f"{layout.FIELDS[1][1 + family]}={c.N}, and there are {len(tensors)} tensors")
    return
  expected = {piece.name: layout.disk_shape(c, piece.disk) for piece in layout.pieces(c, family)}
  for name, shape in expected.items():
    found = tensors.get(name)
    if found is None:
      problems.append(f"{name} is missing")
    elif found.shape != shape:
      problems.append(f"{name} is of shape {shown(found.shape)}, expected {list(shape)}")
    elif found.dtype not in safetensors.DTYPES:
      problems.append(f"{name} is of dtype {found.dtype}, expected one of {', '.join(safetensors.DTYPES)}")
  tied_head = layout.NAMES[-1][2 + family] + ".weight"
  for name in sorted(tensors.keys() - expected.keys()):
    if name != tied_head or not c.tied:
      problems.append(f"{named(name)} is not known")
    elif not problems:  # some writers spell a tied head out: it must be the embedding
      head, embedding = tensors[name], tensors[layout.NAMES[0][2 + family] + ".weight"]
      slabs = [(start, min(layout.ROWS, c.V - start)) for start in range(0, c.V, layout.ROWS)]
      same = (head.shape, head.dtype) == (embedding.shape, embedding.dtype)
      if not same or any((head.rows(*slab) != embedding.rows(*slab)).any() for slab in slabs):
        problems.append(f"{name} is not the embedding, and the two are tied")
