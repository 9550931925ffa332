"""The two published layouts, LLaDA's and iLLaDA's, as tables: the names of parameters and fields, and their values.

A column of the tables is a *family*: 0 LLaDA's names, 1 iLLaDA's.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from lladax.data import tokenizer as tokenizers
from lladax.mistake import Mistake
from lladax.model.mask_predictor import MaskPredictorConfig
from lladax.storage import checkpoint
from lladax.storage.safetensors import named, shown

ROWS = 8192  # of the vocabulary that are moved at once
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
# Read beside FIELDS: by `_rope_theta` and `model_of`, and in published.py.
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


def family_of(config: dict[str, Any]) -> int:
  """Which column of the tables a config.json is written in."""
  return 0 if "d_model" in config else 1


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


def model_of(config: dict[str, Any], family: int, problems: list[str]) -> MaskPredictorConfig | None:
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


class Piece(NamedTuple):
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


def pieces(c: MaskPredictorConfig, family: int) -> Iterator[Piece]:
  """All tensors of a model, those of a parameter in a row."""
  letters = dict(checkpoint.flat(dataclasses.replace(c, weights="full").letters()))
  for path, disk, *names in NAMES:
    for layer in range(c.N) if path.startswith("blocks/") else (0,):
      if path in letters:  # a tied model has no head
        yield Piece(f"{names[family].format(layer)}.weight", path, disk, letters[path], layer)


def disk_shape(c: MaskPredictorConfig, disk: str) -> tuple[int, ...]:
  """The shape of a tensor of these letters."""
  return tuple(math.prod(getattr(c, letter) for letter in axis) for axis in disk.split())


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
