"""A published checkpoint: a folder of config.json and *.safetensors, of a family in `layout`, found and checked.

What the folder does not say of its special ids and its blocks the caller may (`Said`).
"""

import dataclasses
import difflib
import importlib
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers as hf_tokenizers

from lladax import address
from lladax.data import template as templates
from lladax.data import tokenizer as tokenizers
from lladax.mistake import Missing, Mistake
from lladax.model.mask_predictor import MaskPredictorConfig
from lladax.storage import layout, safetensors
from lladax.storage.safetensors import named, read_json, shown

KEPT = (".json", ".jinja", ".model", ".py", ".txt")  # of a published folder, beside its tensors

NO_MASK = -1  # the id of [MASK] of a model that has none
_PROBLEMS = 8  # that are said; of the others only how many there are


class Said(NamedTuple):
  """What a caller says of a published folder: special ids, and the tokens of a block; None: the folder does."""

  mask_id: int | None = None
  eos_id: int | None = None
  block: int | None = None

  def check(self) -> "Said":
    """Itself; Mistake for what is out of range."""
    for name, least in (("mask_id", 0), ("eos_id", 0), ("block", 1)):
      if (value := getattr(self, name)) is not None and not least <= value < 2**31:
        raise Mistake(f"{name}={value}: must be at least {least}, and less than 2^31")
    return self


@dataclasses.dataclass(frozen=True)
class Published:
  """A published folder that has passed every check; no tensor is read yet."""

  folder: Path
  family: layout.Family
  model: MaskPredictorConfig
  merged: bool  # whether a layer's experts are one tensor
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


NOTHING = Said()


def read(folder: Path, said: Said = NOTHING) -> Published:
  """Reads config.json, the tokenizer and the headers of the tensors' files, and checks them against each other.

  Args:
    folder: of config.json, *.safetensors and, for text, the tokenizer's files.
    said: what the folder does not say, or says otherwise.

  Raises:
    Missing: no config.json.
    Mistake: what is wrong, in one line.
  """
  config = _config(folder)
  if refusal := _refusal(config):
    raise Mistake(f"{folder}: {refusal}")
  problems: list[str] = []
  for path in sorted(folder.iterdir()):
    if path.suffix in KEPT and (instead := safetensors.stand_in(path)):
      problems.append(f"{path.name} {instead}")
  tensors = safetensors.headers(folder, problems)
  broken = bool(problems)  # what is in the other files is said when these are mended
  llama = config.get("model_type") == "llama" and not broken
  masks = llama and (said.mask_id is not None or names_mask(folder))
  family = layout.family_of(config, masks)
  model = layout.model_of(config, family, problems)
  merged = any(re.search(r"\.experts\.(gate|up|down)_proj$", name) for name in tensors)
  if model is not None and not broken:
    _compare(model, family, merged, tensors, problems)
  if problems or model is None:
    raise Mistake(f"{folder}: {_listed(problems)}")
  model = dataclasses.replace(model, block=_block(folder, config, family, said, model.max_length))
  return Published(folder, family, model, merged, tensors, identity(folder, model, said=said))


def _block(folder: Path, config: dict[str, Any], family: layout.Family, said: Said, most: int) -> int:
  """Tokens of a block, which are `most` at most; 0 where the family has none."""
  if family.block is None:
    if said.block is not None:
      raise Mistake(f"{folder}: block={said.block}: {family.name} has no blocks; leave it out")
    return 0
  block = said.block or family.block_of(config)
  if not block or block < 0:
    raise Mistake(
      f"{folder}/config.json: {family.block_name}={shown(config.get(family.block_name))}: {family.name} generates by"
      " blocks: say of how many tokens, as block=4"
    )
  if block > most:
    where = f"block={block}" if said.block else f"{folder}/config.json: {family.block_name}={block}"
    raise Mistake(f"{where}: a block is longer than the longest text, of {most} tokens")
  return block


def _listed(problems: list[str]) -> str:
  """The first few; a folder of another model has thousands."""
  more = [f"and {len(problems) - _PROBLEMS} more"] if len(problems) > _PROBLEMS else []
  return "; ".join(problems[:_PROBLEMS] + more)


def identity(
  folder: Path, model: MaskPredictorConfig, text: tokenizers.Tokenizer | None = None, said: Said = NOTHING
) -> dict[str, Any]:
  """Tokenizer (None without its files), special ids and defaults of a published folder, under their names in LLaDA."""
  config = read_json(folder / "config.json")
  said_ends = [config.get("eos_token_id"), templates.read(folder / "generation_config.json").get("eos_token_id")]
  ends = [i for x in said_ends for i in (x if isinstance(x, list) else [x]) if i is not None]
  ends = ends if said.eos_id is None else [said.eos_id, *ends]
  _check_ends(folder, "eos_token_id={}", ends, model)
  eos_id, mask_id = ends[0] if ends else None, config.get("mask_token_id") if said.mask_id is None else said.mask_id
  masks = model.objective.fills
  if text is None and (folder / tokenizers.SETTINGS).is_file():
    text = tokenizers.load(folder)
  elif text is None and (folder / "tokenizer.json").is_file():
    path = folder / "tokenizer.json"
    mask_id = _mask_id(path) if mask_id is None and masks else mask_id
    if masks or mask_id is not None:
      names = _tokenizer_config(path, eos_id, mask_id, config.get("pad_token_id"))
      text = tokenizers.published(names, ends)
    else:
      names = _tokenizer_config(path, eos_id, None, config.get("pad_token_id"), masks=False)
      text = tokenizers.published(names, ends, masks=False)
  if text is not None:
    if text.vocab_size > model.V:  # of an import that appended chat tokens behind the last row
      text = text.bare()
    found = {name: getattr(text, name) for name in ("mask_id", "eos_id", "eot_id", "vocab_size")}
    found["vocab_size"], ends = min(text.vocab_size, model.V), [*text.ends, *ends]
  else:
    eot_id = 126348 if mask_id == 126336 else None  # LLaDA's own vocabulary
    vocab_size = min(config.get("vocab_size") or model.V, model.V)
    found = {"mask_id": mask_id, "eos_id": eos_id, "eot_id": eot_id, "vocab_size": vocab_size}
  if found["mask_id"] is None and not masks:
    found["mask_id"] = NO_MASK
  for name in ("mask_id", "eos_id"):
    missing, value = found[name] is None, found[name]
    if name == "mask_id" and value == NO_MASK and not masks:
      continue
    if not isinstance(value, int) or not 0 <= value < model.V:
      field, instead = name.replace("_id", "_token_id"), f"; say which it is, as {name}=5" if missing else ""
      raise Mistake(f"{folder}/config.json: {field}={value}, and the embedding has {model.V} rows{instead}")
  ends = [i for i in (found["eos_id"], found["eot_id"], *ends) if i is not None]
  _check_ends(folder, "token {} ends a text", ends, model)
  if found["mask_id"] in ends:
    raise Mistake(f"{folder}: token {found['mask_id']} is [MASK], and ends a text: say which is which, as mask_id=5")
  defaults = _defaults(folder, config, model)
  return {"tokenizer": text, "ends": tuple(dict.fromkeys(ends)), "defaults": defaults} | found


# How the authors of a family sample, in our words, where that is not our default.
_DEFAULTS: dict[str, dict[str, Any]] = {
  "LLaDA-MoE": {"gen_length": 128, "steps": 128, "block_length": 32},
  "LLaDA2": {"gen_length": 2048, "block_steps": 32, "threshold": 0.95, "early_stop": True},
  "LLaDA2.1": {
    "gen_length": 2048, "tokens_per_step": 1, "threshold": 0.7, "edit_threshold": 0.5, "max_post_passes": 16,
    "early_stop": True,
  },
  "Dream": {
    "gen_length": 512, "steps": 512, "block_length": 512, "eps": 1e-3, "temperature": 0.2, "top_p": 0.95,
    "remasking": "high_entropy",
  },
  "SDAR": {"gen_length": 2048, "block_steps": 4, "threshold": 0.9, "early_stop": True},
  "Fast-dLLM v2": {"gen_length": 2048, "block_steps": 32, "threshold": 0.9, "early_stop": True},
}  # fmt: skip


def _defaults(folder: Path, config: dict[str, Any], model: MaskPredictorConfig) -> dict[str, Any]:
  """Options of `LLaDA.sample` as the model's authors set them; nothing where it is trained for something else since.

  LLaDA2.1's config.json is that of 2.0, and its class, which comes with it, can edit; or its name says what it is.
  """
  family = layout.family_of(config, model.objective.fills)
  if not model.objective.fills or family.model.get("causal") or bool(model.block) != (family.block is not None):
    return {}
  name = family.name.removesuffix("-MoE") if family.name == "SDAR-MoE" else family.name
  if name == "LLaDA2":
    named_so = re.search(r"llada-?2\.?1", f"{config.get('_name_or_path')} {folder.resolve()}", re.IGNORECASE)
    if named_so or any("editing_threshold" in path.read_text("utf-8", "replace") for path in folder.glob("*.py")):
      name = "LLaDA2.1"
  found = dict(_DEFAULTS.get(name, {}))
  if name in ("SDAR", "Fast-dLLM v2"):
    found["block_steps"] = model.block
  if "gen_length" in found:  # and there is room for a prompt
    unit = model.block or (found["block_length"] if name == "LLaDA-MoE" else 1)
    found["gen_length"] = max(min(found["gen_length"], model.max_length // 2 // unit * unit), unit)
  if "steps" in found:
    found["steps"] = found["gen_length"]
  if name == "Dream":
    found["block_length"] = found["gen_length"]
  return found


def _check_ends(folder: Path, said: str, ends: list[Any], model: MaskPredictorConfig) -> None:
  for i in ends:
    if type(i) is not int or not 0 <= i < model.V:
      raise Mistake(f"{folder}: {said.format(shown(i))}, and the embedding has {model.V} rows")


def _tokenizer_config(path: Path, eos_id, mask_id, pad_id, masks: bool = True) -> tokenizers.TokenizerConfig:
  """The special tokens' names, looked up by the ids of config.json (iLLaDA's names no mask)."""
  vocabulary = _vocabulary(path)
  if mask_id is None and masks:
    raise Mistake(
      f"{path.parent}/config.json: mask_token_id is missing, and the tokenizer names no mask either; say which it is,"
      " as mask_id=5"
    )
  names = {}
  for field, id in (("eos_token_id", eos_id), ("mask_token_id", mask_id), ("pad_token_id", pad_id)):
    name = vocabulary.id_to_token(id) if isinstance(id, int) and 0 <= id < 2**32 else None
    if name is None and not (id is None and (field == "pad_token_id" or field == "mask_token_id" and not masks)):
      advice = "leave it out" if field == "pad_token_id" else f"say which it is, as {field.replace('_token', '')}=5"
      raise Mistake(f"{path.parent}: {field}={shown(id)} is no token of {path.name}: {advice}")
    names[field] = name or ""
  eos, mask, pad = names.values()
  special = {"eos": eos, "pad": pad if pad != eos else ""} | ({"mask": mask} if mask else {})
  return tokenizers.TokenizerConfig("huggingface", str(path), **special)


def _vocabulary(path: Path) -> hf_tokenizers.Tokenizer:
  try:
    return hf_tokenizers.Tokenizer.from_file(str(path))
  except Exception as error:  # the library raises nothing finer
    raise Mistake(f"{path} is no vocabulary: {named(str(error))}") from error


def names_mask(folder: Path) -> bool:
  """Whether its vocabulary has a token that is called a mask."""
  return _mask_id(folder / "tokenizer.json") is not None


def _mask_id(path: Path) -> int | None:
  """The token that a vocabulary calls a mask; None where there is no such token, or no file."""
  if not path.is_file():
    return None
  found = map(_vocabulary(path).token_to_id, ("<|mdm_mask|>", "<[MASK]>", "<|mask|>", "<|MASK|>", "|<MASK>|"))
  return next((i for i in found if i is not None), None)


def _config(folder: Path) -> dict[str, Any]:
  """What config.json holds; Missing where there is none, with the folders below that have one."""
  if not os.path.lexists(folder / "config.json"):
    below = [str(path.parent) for path in sorted(folder.glob("*/config.json"))]
    hint = f"; did you mean {below[0]}?" if below else ""
    raise Missing(f"{folder}: there is no config.json in it{hint}")
  return read_json(folder / "config.json")


def _refusal(config: dict[str, Any]) -> str | None:
  """Why a model is not read, which its config.json tells by its names; None if its family is known.

  LLaDA-MoE calls itself `llada`, too.
  """
  kind, classes = config.get("model_type"), config.get("architectures")
  names = [x for x in (kind, *(classes if isinstance(classes, list) else [classes])) if isinstance(x, str)]
  kinds = {name for family in layout.FAMILIES for name in (family.kind, family.architecture)}
  why = None
  if isinstance(config.get("model"), dict):
    return "it is a workdir of lladax, and no published folder: --mode=export makes one of it"
  if not names:
    return "config.json is neither a workdir's nor a published model's: there is no model_type in it"
  if not kinds.intersection(names):
    known = [family.name for family in layout.FAMILIES]
    near = difflib.get_close_matches(names[0].lower(), [family.kind.lower() for family in layout.FAMILIES], 2, 0.5)
    close = dict.fromkeys(family.name for kind in near for family in layout.FAMILIES if family.kind.lower() == kind)
    hint = f"; near it {'are' if close.keys() - {next(iter(close))} else 'is'} {', '.join(close)}" if close else ""
    why = f"this family is not known{hint}; known are {', '.join(known)}"
  elif disagree := _disagreement(kind, names):
    why = disagree
  elif not config.keys() & {"d_model", "hidden_size"}:
    why = "there is neither d_model nor hidden_size in it"
  said = f"config.json is of model_type={shown(kind)}, architectures={shown(classes)}"
  return why and f"{said}: {why}"


def _disagreement(kind: Any, names: list[str]) -> str | None:
  """What model_type and architectures say, where the one is a family's and the other another's."""
  by_kind = [x.name for x in layout.FAMILIES if x.kind == kind or (kind, x.name) == ("llada", "iLLaDA")]
  by_class = [x.name for x in layout.FAMILIES if x.architecture in names]
  if not by_kind or not by_class or {*by_kind} & {*by_class}:
    return None
  return f"the one is {' or '.join(by_kind)}, and the other {' or '.join(by_class)}: say in it which it is"


def _compare(
  c: MaskPredictorConfig, family: layout.Family, merged: bool, tensors: dict[str, safetensors.Tensor],
  problems: list[str],
) -> None:  # fmt: skip
  """Missing, misshapen and extra tensors, each by name."""
  column = family.column
  for field, size in (("N", c.N), ("E", 0 if merged else c.E)):
    if size > len(tensors):
      names = dict(family.fields) | {"N": layout.FIELDS[1][1 + min(column, 1)]}
      problems.append(f"{names[field]}={size}, and there are {len(tensors)} tensors")
      return
  expected = layout.disk_shapes(layout.pieces(c, column, merged), c)
  for name, shape in expected.items():
    found = tensors.get(name)
    if found is None:
      problems.append(f"{name} is missing")
    elif found.shape != shape:
      problems.append(f"{name} is of shape {shown(found.shape)}, expected {list(shape)}")
    elif found.dtype not in safetensors.DTYPES:
      problems.append(f"{name} is of dtype {found.dtype}, expected one of {', '.join(safetensors.DTYPES)}")
  tied_head = layout.NAMES[-1][2 + column] + ".weight"
  for name in sorted(tensors.keys() - expected.keys()):
    if name != tied_head or not c.tied:
      problems.append(f"{named(name)} is not known")
    elif not problems:  # some writers spell a tied head out: it must be the embedding
      head, embedding = tensors[name], tensors[layout.NAMES[0][2 + column] + ".weight"]
      slabs = [(start, min(layout.ROWS, c.V - start)) for start in range(0, c.V, layout.ROWS)]
      same = (head.shape, head.dtype) == (embedding.shape, embedding.dtype)
      if not same or any((head.rows(*slab) != embedding.rows(*slab)).any() for slab in slabs):
        problems.append(f"{name} is not the embedding, and the two are tied")
