"""Published checkpoints, both ways: a folder of config.json and *.safetensors, as LLaDA and iLLaDA come.

The life of a tensor: rows of a file -> the device, in the file's shape and dtype -> one compiled program
that reshapes, transposes, casts and writes them into their place in the stacked parameter, where they stay. The
host never holds more than one tensor of a layer, or `_ROWS` rows of the vocabulary; export is the same backwards.
"""

import dataclasses
import difflib
import functools
import importlib
import itertools
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers as hf_tokenizers
from jax.sharding import NamedSharding, PartitionSpec

from lladax.data import template as templates
from lladax.data import tokenizer as tokenizers
from lladax.mistake import Missing, Mistake
from lladax.model.mask_predictor import MaskPredictorConfig, Params
from lladax.storage import checkpoint, safetensors
from lladax.storage.safetensors import named, read_json, shown

_ROWS = 8192  # of the vocabulary that are moved at once
KEPT = (".json", ".jinja", ".model", ".py", ".txt")  # of a published folder, beside its tensors

# Our parameter, its letters on disk (a space between the axes; matrices are [out, in]), and its names: LLaDA, iLLaDA.
NAMES = (
  ("embedding", "V D", "model.transformer.wte", "model.embed_tokens"),
  ("blocks/attention_norm", "D", "model.transformer.blocks.{}.attn_norm", "model.layers.{}.input_layernorm"),
  ("blocks/q", "HK D", "model.transformer.blocks.{}.q_proj", "model.layers.{}.self_attn.q_proj"),
  ("blocks/k", "GK D", "model.transformer.blocks.{}.k_proj", "model.layers.{}.self_attn.k_proj"),
  ("blocks/v", "GK D", "model.transformer.blocks.{}.v_proj", "model.layers.{}.self_attn.v_proj"),
  ("blocks/out", "D HK", "model.transformer.blocks.{}.attn_out", "model.layers.{}.self_attn.o_proj"),
  ("blocks/ff_norm", "D", "model.transformer.blocks.{}.ff_norm", "model.layers.{}.post_attention_layernorm"),
  ("blocks/gate", "F D", "model.transformer.blocks.{}.ff_proj", "model.layers.{}.mlp.gate_proj"),
  ("blocks/up", "F D", "model.transformer.blocks.{}.up_proj", "model.layers.{}.mlp.up_proj"),
  ("blocks/down", "D F", "model.transformer.blocks.{}.ff_out", "model.layers.{}.mlp.down_proj"),
  ("final_norm", "D", "model.transformer.ln_f", "model.norm"),
  ("head", "V D", "model.transformer.ff_out", "lm_head"),
)
# Our field, and its names in config.json: LLaDA, iLLaDA.
FIELDS = (
  ("D", "d_model", "hidden_size"),
  ("N", "n_layers", "num_hidden_layers"),
  ("H", "n_heads", "num_attention_heads"),
  ("G", "n_kv_heads", "num_key_value_heads"),
  ("F", "mlp_hidden_size", "intermediate_size"),
  ("V", "embedding_size", "vocab_size"),
  ("tied", "weight_tying", "tie_word_embeddings"),
  ("rope_theta", "rope_theta", "rope_theta"),
  ("norm_eps", "rms_norm_eps", "rms_norm_eps"),
  ("max_length", "max_sequence_length", "max_position_embeddings"),
)
# What the mask predictor computes; a config.json that says otherwise is refused. LLaDA's first, then iLLaDA's.
_LLADA_OPTIONS: dict[str, tuple] = {
  "block_type": ("llama",), "activation_type": ("silu",), "layer_norm_type": ("rms",), "rope": (True,),
  "layer_norm_with_affine": (True,), "bias_for_layer_norm": (False, None), "include_bias": (False,),
  "include_qkv_bias": (False, None), "alibi": (False,), "input_emb_norm": (False,), "scale_logits": (False,),
  "attention_layer_norm": (False,), "clip_qkv": (None,), "multi_query_attention": (None, False),
  "block_group_size": (1,), "attention_dropout": (0.0,), "residual_dropout": (0.0,), "embedding_dropout": (0.0,),
}  # fmt: skip
_OPTIONS = _LLADA_OPTIONS | {
  "hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,), "layer_norm_eps": (None,),
  "resid_pdrop": (0.0,), "embd_pdrop": (0.0,), "quantization_config": (None,), "partial_rotary_factor": (1.0, None),
  "use_sliding_window": (False,), "sliding_window": (None,), "layer_types": ("full_attention", None),
  "use_mrope": (False,), "use_bias": (False,), "use_qkv_bias": (False,), "qk_layernorm": (False,), "num_experts": (0,),
  "is_causal": (False,), "is_encoder_decoder": (False,), "add_cross_attention": (False,), "pruned_heads": ({},),
}  # fmt: skip
# Read elsewhere in this file, beside FIELDS: `_refusal`, `_rope_theta`, `_model`, `identity`.
_USED = """model_type architectures rope_scaling rope_parameters head_dim mlp_ratio vocab_size
eos_token_id mask_token_id pad_token_id""".split()
# What no answer depends on, whatever it says: records, how it began, how it is to be run, defaults of generation.
_HARMLESS = """auto_map transformers_version torch_dtype dtype tokenizer_class bos_token_id cls_token_id sep_token_id
unk_token_id decoder_start_token_id finetuning_task task_specific_params problem_type id2label label2id num_labels
prefix unsloth_version unsloth_fixed
init_device init_fn init_std init_cutoff_factor initializer_range initializer_cutoff_factor
alibi_bias_max attention_layer_norm_with_affine max_window_layers
precision rope_full_precision flash_attention use_flash_attention attn_implementation pretraining_tp use_cache
use_return_dict return_dict output_attentions output_hidden_states torchscript use_bfloat16 tf_legacy_loss
gradient_checkpointing chunk_size_feed_forward is_decoder cross_attention_hidden_size tie_encoder_decoder
max_length min_length max_new_tokens do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature
top_k top_p min_p typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
bad_words_ids num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id
remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens""".split()
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
  folder = Path(os.path.expanduser(name))
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
  family = _family(config)
  model = _model(config, family, problems)
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
  for i in ends:
    if not isinstance(i, int) or not 0 <= i < model.V:
      raise Mistake(f"{folder}: token {json.dumps(i)} ends a text, and the embedding has {model.V} rows")
  return {"tokenizer": text, "ends": tuple(dict.fromkeys(ends))} | found


def _tokenizer_config(path: Path, eos_id, mask_id, pad_id) -> tokenizers.TokenizerConfig:
  """The special tokens' names, looked up by the ids of config.json (iLLaDA's names no mask)."""
  vocabulary = _vocabulary(path)
  mask_id = _mask_id(path) if mask_id is None else mask_id
  if mask_id is None:
    raise Mistake(f"{path.parent}/config.json: mask_token_id is missing, and the tokenizer names no mask either")
  names = {}
  for field, id in (("eos_token_id", eos_id), ("mask_token_id", mask_id), ("pad_token_id", pad_id)):
    name = vocabulary.id_to_token(id) if isinstance(id, int) and id >= 0 else None
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


def _family(config: dict[str, Any]) -> int:
  """Which column of the tables: 0 LLaDA's names, 1 iLLaDA's."""
  return 0 if "d_model" in config else 1


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


def _rope_theta(config: dict[str, Any], problems: list[str]) -> Any:
  """The base of the rotary embeddings, wherever it stands; None: nowhere. All but their plain kind is a problem.

  Transformers 5 writes `rope_parameters`: theta, the kind, and its settings; or one such object per type of layer.
  """
  found = {"rope_theta": config.get("rope_theta")}
  for name in ("rope_scaling", "rope_parameters"):
    value = config.get(name) or {}
    layers = isinstance(value, dict) and value and all(isinstance(x, dict) for x in value.values())
    for part, settings in ({f"{name}.{x}": value[x] for x in value} if layers else {name: value}).items():
      if not isinstance(settings, dict):
        problems.append(f"{part}={shown(settings)}: expected an object")
        continue
      kind = settings.get("rope_type") or settings.get("type") or "default"
      for key, x in settings.items():
        if key == "rope_theta":
          found[f"{part}.{key}"] = x
        elif kind != "default" and key not in ("rope_type", "type"):
          continue  # the kind is what is refused
        elif x not in (None, "default" if key in ("rope_type", "type") else 1.0):
          problems.append(f"{named(part)}.{named(key)}={shown(x)} is not supported, only the plain RoPE")
  given = {name: x for name, x in found.items() if x is not None}
  theta = next(iter(given.values()), None)
  if any(x != theta for x in given.values()):
    problems.append(" and ".join(f"{name}={shown(x)}" for name, x in given.items()) + " disagree")
  return theta


def _model(config: dict[str, Any], family: int, problems: list[str]) -> MaskPredictorConfig | None:
  """The model of a config.json; what is wrong with it is added to `problems`, and so is each key that is not known."""
  config = {name: x for name, x in config.items() if not name.startswith("_")}  # _name_or_path and its kin
  layer_types = config.get("layer_types")
  if isinstance(layer_types, list) and all(x == "full_attention" for x in layer_types):
    config["layer_types"] = "full_attention"
  if config.get("use_sliding_window") is False:
    config.pop("sliding_window", None)
  fields_named = {name for _, *names in FIELDS for name in names}
  for name, value in config.items():
    allowed = _OPTIONS.get(name)
    if allowed and value not in allowed and (value is not None or any(allowed)):  # null is not true
      problems.append(f"{name}={shown(value)} is not supported, only {shown(allowed[0])}")
    elif not (allowed or value is None or name in fields_named or name in _USED or name in _HARMLESS):
      problems.append(f"{named(name)}={shown(value)} is not known: it may change what the model computes")
  for name in ("vocab_size", "mask_token_id", "eos_token_id", "pad_token_id"):
    value = config.get(name)
    ids = value if name == "eos_token_id" and isinstance(value, list) and value else [value]
    if not all(x is None or type(x) is int for x in ids):
      problems.append(f"{name}={shown(value)}: expected int")
  config["rope_theta"] = _rope_theta(config, problems)
  fields: dict[str, Any] = {}
  stand_in = {"G": config.get("n_heads", config.get("num_attention_heads")), "V": config.get("vocab_size")}
  if family == 0 and isinstance(config.get("mlp_ratio"), int) and isinstance(config["d_model"], int):
    stand_in["F"] = config["mlp_ratio"] * config["d_model"]
  for field, *names in FIELDS:
    name, value = names[family], config.get(names[family])
    value = stand_in.get(field) if value is None else value
    other = config.get(names[1 - family])
    kind = MaskPredictorConfig.__annotations__[field]
    if value is None:
      problems.append(f"{name} is missing")
    elif isinstance(value, bool) != (kind is bool) or not isinstance(value, int | kind):
      problems.append(f"{name}={shown(value)}: expected {kind.__name__}")
    elif kind is float and not 0 < value < math.inf:
      problems.append(f"{name}={shown(value)}: must be a number above 0")
    elif other not in (None, value) and (family, field) not in ((0, "V"), (0, "tied")):  # LLaDA's class reads its own
      problems.append(f"{name}={shown(value)} and {names[1 - family]}={shown(other)} disagree")
    else:
      fields[field] = kind(value)
  if len(fields) < len(FIELDS):
    return None
  head_width = config.get("head_dim") or fields["D"] // max(fields["H"], 1)
  if not isinstance(head_width, int) or head_width * fields["H"] != fields["D"]:
    names = [names[family] for field, *names in FIELDS if field in ("D", "H")]
    width = f"of head_dim={shown(config['head_dim'])}" if config.get("head_dim") else "of one width"
    problems.append(f"{names[0]}={fields['D']} is not {names[1]}={fields['H']} heads {width}")
    return None
  try:
    return MaskPredictorConfig(**fields, K=head_width)
  except Mistake as error:
    problems.append(f"config.json: {error}")
    return None


class _Piece(NamedTuple):
  """A published tensor, and its place in a parameter."""

  name: str
  path: str
  disk: str  # its letters on disk
  letters: str  # the parameter's letters
  layer: int

  @property
  def axis(self) -> int:
    """Of the parameter, along which the tensor is moved: by layers, or by rows of the vocabulary."""
    return max(self.letters.find("V"), 0)

  def moves(self, c: MaskPredictorConfig, rows: int) -> list[tuple[int, int]]:
    """(start, size) along the axis."""
    if "V" not in self.letters:
      return [(self.layer, 1 if self.letters[0] == "N" else c.D)]
    return [(start, min(rows, c.V - start)) for start in range(0, c.V, rows)]


def _pieces(c: MaskPredictorConfig, family: int) -> Iterator[_Piece]:
  letters = dict(checkpoint.flat(c.letters()))
  for path, disk, *names in NAMES:
    for layer in range(c.N) if path.startswith("blocks/") else (0,):
      if path in letters:  # a tied model has no head
        yield _Piece(f"{names[family].format(layer)}.weight", path, disk, letters[path], layer)


def _disk_shape(c: MaskPredictorConfig, disk: str) -> tuple[int, ...]:
  return tuple(math.prod(getattr(c, letter) for letter in axis) for axis in disk.split())


def _compare(c: MaskPredictorConfig, family: int, tensors: dict[str, safetensors.Tensor], problems: list[str]) -> None:
  """Missing, misshapen and extra tensors, each by name."""
  if c.N > len(tensors):
    problems.append(f"{FIELDS[1][1 + family]}={c.N}, and there are {len(tensors)} tensors")
    return
  expected = {piece.name: _disk_shape(c, piece.disk) for piece in _pieces(c, family)}
  for name, shape in expected.items():
    found = tensors.get(name)
    if found is None:
      problems.append(f"{name} is missing")
    elif found.shape != shape:
      problems.append(f"{name} is of shape {shown(found.shape)}, expected {list(shape)}")
    elif found.dtype not in safetensors.DTYPES:
      problems.append(f"{name} is of dtype {found.dtype}, expected one of {', '.join(safetensors.DTYPES)}")
  tied_head = NAMES[-1][2 + family] + ".weight"
  for name in sorted(tensors.keys() - expected.keys()):
    if name != tied_head or not c.tied:
      problems.append(f"{named(name)} is not known")
    elif not problems:  # some writers spell a tied head out: it must be the embedding
      head, embedding = tensors[name], tensors[NAMES[0][2 + family] + ".weight"]
      slabs = [(start, min(_ROWS, c.V - start)) for start in range(0, c.V, _ROWS)]
      same = (head.shape, head.dtype) == (embedding.shape, embedding.dtype)
      if not same or any((head.rows(*slab) != embedding.rows(*slab)).any() for slab in slabs):
        problems.append(f"{name} is not the embedding, and the two are tied")


def load_params(published: Published, shardings: Any = None, dtype: Any = None) -> Params:
  """Reads the tensors into stacked parameters; every device reads what it keeps.

  Args:
    published: what `read` returned.
    shardings: tree like the parameters', as from `sharding.shardings(mesh, model.letters())`; None: on one device.
    dtype: of the parameters; None keeps that of the files.
  """
  c, flat = published.model, {}
  here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  at = dict(checkpoint.flat(shardings or jax.tree.map(lambda _: here, c.letters())))
  for path, group in itertools.groupby(_pieces(c, published.family), key=lambda piece: piece.path):
    pieces = list(group)
    letters, disk = pieces[0].letters, pieces[0].disk
    kept = dtype or functools.reduce(
      jnp.promote_types, {safetensors.DTYPES[published.tensors[x.name].dtype] for x in pieces}
    )
    disk_at, where = at[path], {}
    if isinstance(disk_at, NamedSharding):  # the axes of the file are cut as ours will be
      where = dict(zip(letters, disk_at.spec, strict=False))
      disk_at = NamedSharding(disk_at.mesh, PartitionSpec(*(where.get(axis[0]) for axis in disk.split())))
    most = _ROWS if where.get("V") is None else c.V
    new = functools.partial(jnp.zeros, tuple(getattr(c, letter) for letter in letters), kept)
    x = jax.jit(new, out_shardings=at[path])()
    fill = functools.partial(_fill, c=c, disk=disk, letters=letters, axis=pieces[0].axis)
    fill = jax.jit(fill, out_shardings=at[path], donate_argnums=0)
    for piece in pieces:
      tensor = published.tensors[piece.name]
      for start, size in piece.moves(c, most):
        rows = (start, size) if "V" in letters else (0, tensor.shape[0])
        shape, part = (rows[1], *tensor.shape[1:]), functools.partial(tensor.rows, *rows)
        slab = jax.make_array_from_callback(shape, disk_at, part)
        x = jax.block_until_ready(fill(x, slab, start))  # or slabs would pile up
    flat[path] = x
  blocks = {path.removeprefix("blocks/"): x for path, x in flat.items() if path.startswith("blocks/")}
  return {path: x for path, x in flat.items() if "/" not in path} | {"blocks": blocks}


def _fill(x: jax.Array, slab: jax.Array, start, *, c: MaskPredictorConfig, disk: str, letters: str, axis: int):
  """Writes a tensor of a file, or some rows of it, into its place in a parameter."""
  sizes = [
    [getattr(c, letter) for letter in group] if group[1:] else [n]
    for group, n in zip(disk.split(), slab.shape, strict=True)
  ]
  order = disk.replace(" ", "")
  slab = slab.reshape(list(itertools.chain(*sizes))).transpose([order.index(letter) for letter in letters.lstrip("N")])
  slab = slab[None] if letters[0] == "N" else slab
  return jax.lax.dynamic_update_slice_in_dim(x, slab.astype(x.dtype), start, axis)


@functools.partial(jax.jit, static_argnames=("disk", "letters", "axis", "size", "dtype"))
def _take(x: jax.Array, start, *, disk: str, letters: str, axis: int, size: int, dtype: np.dtype) -> jax.Array:
  """The inverse of `_fill`."""
  slab = jax.lax.dynamic_slice_in_dim(x, start, size, axis)
  slab, letters = (slab[0], letters[1:]) if letters[0] == "N" else (slab, letters)
  slab = slab.transpose([letters.index(letter) for letter in disk.replace(" ", "")])
  sizes = iter(slab.shape)
  return slab.reshape([math.prod(itertools.islice(sizes, len(group))) for group in disk.split()]).astype(dtype)


def export(
  params: Params,
  model: MaskPredictorConfig,
  folder: Path,
  config: dict[str, Any],
  *,
  dtype: Any = None,
  max_shard_bytes: int = 4 * 2**30,
) -> None:
  """Writes parameters in the published layout: files of tensors, an index if there are several, config.json.

  Args:
    params: of the model.
    model: its shape.
    folder: new, or without tensors.
    config: to be config.json; its names decide between LLaDA's and iLLaDA's.
    dtype: of the tensors; None keeps that of the parameters.
    max_shard_bytes: of the tensors of a file.

  Raises:
    Mistake: the layout cannot say this, or the folder holds tensors already.
  """
  check_exportable(model)
  if any(folder.glob("*.safetensors")):
    raise Mistake(f"{folder} holds *.safetensors already: name a new folder")
  family, flat = _family(config), dict(checkpoint.flat(params))
  shards, sizes = [[]], [0]
  for piece in _pieces(model, family):
    kept = np.dtype(dtype or flat[piece.path].dtype)
    size = math.prod(_disk_shape(model, piece.disk)) * kept.itemsize
    if sizes[-1] and sizes[-1] + size > max_shard_bytes:
      shards.append([])
      sizes.append(0)
    shards[-1].append((piece, kept))
    sizes[-1] += size

  def slabs(shard) -> Iterator[np.ndarray]:
    for piece, kept in shard:
      options = {"disk": piece.disk, "letters": piece.letters, "axis": piece.axis, "dtype": kept}
      for start, size in piece.moves(model, _ROWS):
        yield np.asarray(_take(flat[piece.path], start, size=size, **options))

  folder.mkdir(parents=True, exist_ok=True)
  index = {}
  for number, shard in enumerate(shards, 1):
    name = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
    shapes = {piece.name: (kept, _disk_shape(model, piece.disk)) for piece, kept in shard}
    safetensors.write(folder / name, shapes, slabs(shard))
    index |= dict.fromkeys(shapes, name)
  if len(shards) > 1:
    values = {"metadata": {"total_size": sum(sizes)}, "weight_map": index}
    (folder / safetensors.INDEX).write_text(json.dumps(values, indent=2) + "\n")
  (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")


def check_exportable(model: MaskPredictorConfig) -> None:
  """Raises Mistake for a model that the published layout cannot say."""
  if not model.objective.fills:
    raise Mistake("model.causal=True: the published layout is that of mask predictors")
  if model.H * model.K != model.D:
    raise Mistake(f"model.H={model.H} times model.K={model.K} is not model.D={model.D}, as the published layout wants")


def new_config(model: MaskPredictorConfig, text: tokenizers.Tokenizer) -> dict[str, Any]:
  """The config.json, in LLaDA's words, of a model that was not imported."""
  config: dict[str, Any] = {"model_type": "llada", "architectures": ["LLaDAModelLM"]}
  config |= {name: allowed[0] for name, allowed in _LLADA_OPTIONS.items()}
  config |= {name: getattr(model, field) for field, name, _ in FIELDS}
  config |= {f"{name}_token_id": getattr(text, f"{name}_id") for name in ("mask", "eos", "pad")}
  return config | {"vocab_size": text.vocab_size}
