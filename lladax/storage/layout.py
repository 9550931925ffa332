"""The published layouts as tables: families, the names of their parameters and fields, and their values.

A *family* is what a config.json says it is (`Family`); a *column* is how its tensors are called: 0 as LLaDA's, 1 as
Llama's (iLLaDA, LLaDA-MoE, Dream, SDAR, Qwen), 2 as LLaDA2's.
"""

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from lladax.data import tokenizer as tokenizers
from lladax.mistake import Mistake
from lladax.model.mask_predictor import SHAPE, Block, MaskPredictorConfig
from lladax.storage.safetensors import named, shown

ROWS = 8192  # of the vocabulary that are moved at once
_LLADA, _LLAMA = "model.transformer.blocks.{}.", "model.layers.{}."


def _layer(name: str, disk: str, *names: str) -> tuple[str, str, str, str, str]:
  """A row of `NAMES` for a parameter of the layers; of two names the second is LLaDA2's, too."""
  llada, llama, llada2 = (*names, names[1])[:3]
  return name, disk, _LLADA + llada if llada else "", _LLAMA + llama, _LLAMA + llada2


_QKV = "attention.query_key_value"  # of LLaDA2: q, k and v, one behind the other
# Our parameter, its letters on disk (a space between the axes; matrices are [out, in]), and its names in each column.
NAMES = (
  ("embedding", "V D", "model.transformer.wte", "model.embed_tokens", "model.word_embeddings"),
  _layer("attention_norm", "D", "attn_norm", "input_layernorm"),
  _layer("q", "HK D", "q_proj", "self_attn.q_proj", _QKV),
  _layer("k", "GK D", "k_proj", "self_attn.k_proj", _QKV),
  _layer("v", "GK D", "v_proj", "self_attn.v_proj", _QKV),
  _layer("q_bias", "HK", "", "self_attn.q_proj.bias", _QKV + ".bias"),
  _layer("k_bias", "GK", "", "self_attn.k_proj.bias", _QKV + ".bias"),
  _layer("v_bias", "GK", "", "self_attn.v_proj.bias", _QKV + ".bias"),
  _layer("q_norm", "K", "", "self_attn.q_norm", "attention.query_layernorm"),
  _layer("k_norm", "K", "", "self_attn.k_norm", "attention.key_layernorm"),
  _layer("out", "D HK", "attn_out", "self_attn.o_proj", "attention.dense"),
  _layer("ff_norm", "D", "ff_norm", "post_attention_layernorm"),
  _layer("gate", "F D", "ff_proj", "mlp.gate_proj"),
  _layer("up", "F D", "up_proj", "mlp.up_proj"),
  _layer("down", "D F", "ff_out", "mlp.down_proj"),
  _layer("router", "E D", "", "mlp.gate"),
  _layer("choice", "E", "", "mlp.expert_bias", "mlp.gate.expert_bias"),
  _layer("experts_gate", "X D", "", "mlp.experts.{}.gate_proj"),
  _layer("experts_up", "X D", "", "mlp.experts.{}.up_proj"),
  _layer("experts_down", "D X", "", "mlp.experts.{}.down_proj"),
  _layer("shared_gate", "S D", "", "mlp.shared_expert.gate_proj", "mlp.shared_experts.gate_proj"),
  _layer("shared_up", "S D", "", "mlp.shared_expert.up_proj", "mlp.shared_experts.up_proj"),
  _layer("shared_down", "D S", "", "mlp.shared_expert.down_proj", "mlp.shared_experts.down_proj"),
  ("final_norm", "D", "model.transformer.ln_f", "model.norm", "model.norm"),
  ("head", "V D", "model.transformer.ff_out", "lm_head", "lm_head"),
)
# Our field, and its names in config.json: LLaDA's, and everybody else's.
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


class Family(NamedTuple):
  """A layout that is read and written."""

  name: str
  kind: str  # model_type
  architecture: str
  column: int  # of NAMES
  model: dict[str, Any] = {}  # fields of the model that it decides
  fields: dict[str, str] = {}  # ours, and their names in config.json, besides FIELDS
  options: dict[str, tuple] = {}  # what config.json may say beside them: the values that change nothing
  block: int | None = None  # tokens of a block where config.json does not say; 0: it must be told; None: there are none
  also: dict[str, str] = {}  # names in config.json, and others for the same
  block_name: str = "block_size"  # in config.json

  def block_of(self, config: dict[str, Any]) -> Any:
    """What config.json says of a block, or else the family; 0 or None: nothing."""
    return 0 if self.block is None else config.get(self.block_name) or self.block


_CAUSAL = {"causal": True, "shift": True}
_EXPERTS = {"E": "num_experts", "J": "num_experts_per_tok", "X": "moe_intermediate_size"}
_ROUTED = {  # of experts that all layers have
  "decoder_sparse_step": (1,), "mlp_only_layers": ([],), "output_router_logits": (False,),
  "router_aux_loss_coef": None,
}  # fmt: skip
_ALSO = {"num_experts": "num_local_experts"}  # which transformers 5 writes
_QWEN3_MOE = _EXPERTS | {"router_renormalise": "norm_topk_prob"}
_LLADA_MOE = {
  "moe_router_score_function": ("softmax",), "output_router_logits": (False,), "router_aux_loss_coef": None,
  # Named, and not read by its class.
  "norm_topk_prob": None, "router_num_group": None, "router_topk_group": None, "routed_scaling_factor": None,
}  # fmt: skip
_LLADA2_OPTIONS = {
  "score_function": ("sigmoid",), "router_dtype": ("fp32",), "norm_head": (False,), "use_rmsnorm": (True,),
  "norm_softmax": (False,), "output_dropout": (0.0,), "using_split_qkv_in_self_attention": (False,),
  "output_router_logits": (False,), "moe_router_topk_scaling_factor": None, "num_nextn_predict_layers": (0,),
}  # fmt: skip
FAMILIES = (
  Family(
    "LLaDA", "llada", "LLaDAModelLM", 0, options={"partial_rotary_factor": (1.0, None), "rotary_dim": (None,)},
  ),
  Family(
    "LLaDA-MoE", "llada", "LLaDAMoEModelLM", 1, {"router": "softmax"},
    {
      "E": "num_experts", "J": "num_experts_per_tok", "X": "expert_intermediate_size",
      "S": "shared_expert_intermediate_size", "F": "dense_intermediate_size", "qk_norm": "qk_layernorm",
      "router_bias": "moe_router_enable_expert_bias",
    },
    _LLADA_MOE,
  ),
  Family("iLLaDA", "illada", "ILLaDAForCausalLM", 1),
  Family(
    "LLaDA2", "llada2_moe", "LLaDA2MoeModelLM", 2, {"router": "sigmoid", "qk_norm": True},
    _EXPERTS | {
      "dense": "first_k_dense_replace", "router_renormalise": "norm_topk_prob", "router_groups": "n_group",
      "router_topk_groups": "topk_group", "router_scale": "routed_scaling_factor", "qkv_bias": "use_qkv_bias",
      "router_bias": "moe_router_enable_expert_bias",
    },
    _LLADA2_OPTIONS, block=32,
  ),
  Family("Dream", "Dream", "DreamModel", 1, {"shift": True, "qkv_bias": True}),
  Family("SDAR", "sdar", "SDARForCausalLM", 1, {"qk_norm": True}, block=0),
  Family("SDAR-MoE", "sdar_moe", "SDARMoeForCausalLM", 1, {"qk_norm": True}, _QWEN3_MOE, _ROUTED, block=0, also=_ALSO),
  Family(
    "Fast-dLLM v2", "Fast_dLLM_Qwen", "Fast_dLLM_QwenForCausalLM", 1, {"shift": True, "qkv_bias": True}, block=32,
    block_name="bd_size",
  ),
  Family("Llama", "llama", "LlamaForCausalLM", 1, _CAUSAL),
  Family("Qwen2", "qwen2", "Qwen2ForCausalLM", 1, _CAUSAL | {"qkv_bias": True}),
  Family("Qwen3", "qwen3", "Qwen3ForCausalLM", 1, _CAUSAL | {"qk_norm": True}),
  Family(
    "Qwen3-MoE", "qwen3_moe", "Qwen3MoeForCausalLM", 1, _CAUSAL | {"qk_norm": True}, _QWEN3_MOE, _ROUTED, also=_ALSO,
  ),
)  # fmt: skip
NAMED = {family.name: family for family in FAMILIES}

# What the mask predictor computes; a config.json that says otherwise is refused. LLaDA's first, then all others'.
_LLADA_OPTIONS: dict[str, tuple] = {
  "block_type": ("llama",), "activation_type": ("silu",), "layer_norm_type": ("rms",), "rope": (True,),
  "layer_norm_with_affine": (True,), "bias_for_layer_norm": (False, None), "include_bias": (False,),
  "include_qkv_bias": (False, None), "alibi": (False,), "input_emb_norm": (False,), "scale_logits": (False,),
  "attention_layer_norm": (False,), "clip_qkv": (None,), "multi_query_attention": (None, False),
  "block_group_size": (1,), "attention_dropout": (0.0,), "residual_dropout": (0.0,), "embedding_dropout": (0.0,),
}  # fmt: skip
_OPTIONS = _LLADA_OPTIONS | {
  "hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,), "layer_norm_eps": (None,),
  "resid_pdrop": (0.0,), "embd_pdrop": (0.0,), "quantization_config": (None,),
  "use_sliding_window": (False,), "sliding_window": (None,), "layer_types": ("full_attention", None),
  "use_mrope": (False,), "use_bias": (False,), "use_qkv_bias": (False,), "qk_layernorm": (False,), "num_experts": (0,),
  "is_causal": (False,), "is_encoder_decoder": (False,), "add_cross_attention": (False,), "pruned_heads": ({},),
}  # fmt: skip
# Read beside FIELDS: by `_rope`, `_others` and `model_of`, and in published.py.
_USED = """model_type architectures rope_scaling rope_parameters head_dim vocab_size rotary_dim partial_rotary_factor
eos_token_id mask_token_id pad_token_id""".split()
# What no answer depends on, whatever it says: records, how it began, how it is to be run, defaults of generation.
_HARMLESS = """auto_map transformers_version torch_dtype dtype tokenizer_class bos_token_id cls_token_id sep_token_id
unk_token_id decoder_start_token_id finetuning_task task_specific_params problem_type id2label label2id num_labels
prefix unsloth_version unsloth_fixed debug ep_size fuse_cross_entropy micro_forward skip_checkpoint use_deepep
init_device init_fn init_std init_cutoff_factor initializer_range initializer_cutoff_factor
alibi_bias_max attention_layer_norm_with_affine max_window_layers
precision rope_full_precision flash_attention use_flash_attention attn_implementation pretraining_tp use_cache
use_return_dict return_dict output_attentions output_hidden_states torchscript use_bfloat16 tf_legacy_loss
gradient_checkpointing chunk_size_feed_forward is_decoder cross_attention_hidden_size tie_encoder_decoder
max_length min_length max_new_tokens do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature
top_k top_p min_p typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
bad_words_ids num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id
remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens""".split()


def family_of(config: dict[str, Any], masks: bool = False) -> Family:
  """The family of a config.json, where it is one that is known; see `published`, which refuses the others.

  LLaDA-MoE calls itself `llada`, as LLaDA does: its experts tell. What calls itself otherwise is LLaDA by its fields'
  names, or else iLLaDA; so is a Llama that knows a [MASK], by its config.json or, where it `masks`, by its vocabulary.
  """
  kind, classes = config.get("model_type"), config.get("architectures")
  names = [kind, *(classes if isinstance(classes, list) else [classes])]
  if "d_model" in config:
    return NAMED["LLaDA"]
  if kind == "llada":
    return NAMED["LLaDA-MoE" if config.get("num_experts") else "iLLaDA"]
  known = (family for family in FAMILIES if family.kind == kind or family.architecture in names)
  family = next(known, NAMED["iLLaDA"])
  masks |= config.get("mask_token_id") is not None
  return NAMED["iLLaDA"] if family.name == "Llama" and masks else family


_ROPE_KINDS = {
  "linear": ("factor",),
  "yarn": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor"),
  "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}


def _rope_parts(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
  """The objects that say how positions are turned, with their names."""
  for name in ("rope_scaling", "rope_parameters"):
    value = config.get(name) or {}
    layers = isinstance(value, dict) and value and all(isinstance(x, dict) for x in value.values())
    yield from ({f"{name}.{x}": value[x] for x in value} if layers else {name: value}).items()


def _rope(config: dict[str, Any], plain: bool, problems: list[str]) -> dict[str, Any]:
  """The fields of the rotary embeddings, wherever they stand; of `rope_theta` None: nowhere. `plain`: no others.

  Transformers 5 writes `rope_parameters`: theta, the kind, and its settings; or one such object per type of layer.
  """
  thetas = {"rope_theta": config.get("rope_theta")}
  stretched: dict[str, dict[str, Any]] = {}
  for part, settings in _rope_parts(config):
    if not isinstance(settings, dict):
      problems.append(f"{part}={shown(settings)}: expected an object")
      continue
    kind = settings.get("rope_type") or settings.get("type") or "default"
    known = _ROPE_KINDS.get(kind, ()) if isinstance(kind, str) and not plain else ()
    thetas[f"{part}.rope_theta"] = settings.get("rope_theta")
    for key, x in settings.items():
      harmless = (None, "default") if key in ("rope_type", "type") else (None, 1.0)
      harmless = (None,) if key.startswith("mscale") else harmless  # two of them take the place of YaRN's magnitude
      if key in ("rope_type", "type") and known or key == "rope_theta" or key == "partial_rotary_factor" and not plain:
        continue
      if key in known and not _positive(x):
        problems.append(f"{named(part)}.{named(key)}={shown(x)}: {_POSITIVE}")
      elif key not in known and x not in harmless and (kind == "default" or known or key in ("rope_type", "type")):
        kinds = ("default", *(() if plain else _ROPE_KINDS)) if key in ("rope_type", "type") else ()
        kinds = f", only {', '.join(kinds)}" if kinds else ""
        problems.append(f"{named(part)}.{named(key)}={shown(x)} is not supported{kinds}")
    if known:
      stretched[part] = {key: settings.get(key) for key in known} | {"kind": kind}
  given = {name: x for name, x in thetas.items() if x is not None}
  theta = next(iter(given.values()), None)
  if any(x != theta for x in given.values()):
    problems.append(" and ".join(f"{name}={shown(x)}" for name, x in given.items()) + " disagree")
  fields: dict[str, Any] = {"rope_theta": theta}
  first = next(iter(stretched.values()), None)
  if first is None:
    return fields
  if any(x != first for x in stretched.values()):
    problems.append(f"{' and '.join(stretched)} stretch positions differently, which is not supported")
  most = _number(config.get("max_position_embeddings"))
  before = _number(first.get("original_max_position_embeddings"))
  factor = _number(first["factor"]) or (most / before if most and before else 0.0)
  if not factor:
    problems.append(f"{next(iter(stretched))}.factor is missing")
    return fields
  fields |= {"rope_scaling": first["kind"], "rope_factor": factor}
  if first["kind"] != "linear":
    fields["rope_length"] = int(before or most)
    low, high = ("beta_slow", "beta_fast") if first["kind"] == "yarn" else ("low_freq_factor", "high_freq_factor")
    ends = {low: 1.0, high: 32.0 if first["kind"] == "yarn" else 4.0}
    fields["rope_turns"] = tuple(_number(first[key]) or end for key, end in ends.items())
    fields["rope_attention"] = _number(first.get("attention_factor"))
  return fields


def _number(x: Any) -> float:
  """A number of config.json; 0 where it is none, which has been said, or is not there."""
  return float(x) if _positive(x) else 0.0


_POSITIVE = "must be a number above 0, and less than 2^128"


def _positive(x: Any) -> bool:
  """Whether it is a number above 0, and not above what float32 has."""
  return isinstance(x, int | float) and not isinstance(x, bool) and 0 < x < 2.0**128


def _typed(name: str, value: Any, kind: type, problems: list[str]) -> Any:
  """A value of config.json as our field's kind; None where it is none, which is said."""
  if isinstance(value, bool) != (kind is bool) or not isinstance(value, int | kind):
    problems.append(f"{name}={shown(value)}: expected {kind.__name__}")
  elif kind is float and not _positive(value):
    problems.append(f"{name}={shown(value)}: {_POSITIVE}")
  elif kind is int and abs(value) >= 2**31:
    problems.append(f"{name}={shown(value)}: must be less than 2^31")
  else:
    return kind(value)
  return None


def _others(config: dict[str, Any], family: Family, K: int, fields: dict[str, Any], problems: list[str]) -> dict:
  """The fields of a family that are not in FIELDS."""
  found = dict(family.model)
  for field, name in family.fields.items():
    also = family.also.get(name, name)
    if config.get(also) not in (None, config.get(name)):
      if config.get(name) is not None:
        problems.append(f"{name}={shown(config[name])} and {also}={shown(config[also])} disagree")
      name = also
    if config.get(name) is not None:
      value = _typed(name, config[name], MaskPredictorConfig.__annotations__[field], problems)
      if value is not None:
        found[field] = value
    elif field in ("E", "J", "X") or family.name == "LLaDA2" and field.startswith("router"):
      problems.append(f"{name} is missing")
  if not family.column:
    return found
  turned = {name: config.get(name) for name in ("rotary_dim", "partial_rotary_factor")}
  for part, settings in _rope_parts(config):
    if isinstance(settings, dict):
      turned[f"{part}.partial_rotary_factor"] = settings.get("partial_rotary_factor")
  widths = {}
  for name, x in turned.items():
    value = None if x is None else _typed(name, x, int if name == "rotary_dim" else float, problems)
    if value is not None:
      widths[name] = value if name == "rotary_dim" else int(K * value)
  said = [f"{name}={shown(turned[name])}" for name in widths]
  if len(set(widths.values())) > 1:
    problems.append(" and ".join(said) + " disagree")
  elif widths:
    width = widths.popitem()[1]
    if width < 1:
      problems.append(f"{said[0]} turns none of a head's {K} numbers, and two of them are the least")
    found["rotary"] = 0 if width == K else width
  if family.name == "LLaDA2" and (shared := config.get("num_shared_experts")):
    found["S"] = (_typed("num_shared_experts", shared, int, problems) or 0) * found.get("X", 0)
  layers = config.get("moe_layer_freq")
  ones = layers if isinstance(layers, list) and all(type(x) is int and x in (0, 1) for x in layers) else []
  if 1 in ones and ones == sorted(ones):
    found["dense"] = ones.count(0)
    if len(ones) != fields["N"]:
      problems.append(f"moe_layer_freq names {len(ones)} layers, and num_hidden_layers={fields['N']}")
  elif layers not in (None, 1):
    problems.append(f"moe_layer_freq={shown(layers)} is not supported, only 1 for all layers behind the dense ones")
  if family.name == "LLaDA-MoE" and found.get("router_bias"):
    problems.append("moe_router_enable_expert_bias=true is not supported, only false")
  return found


def model_of(config: dict[str, Any], family: Family, problems: list[str]) -> MaskPredictorConfig | None:
  """The model of a config.json; what is wrong with it is added to `problems`, and so is each key that is not known."""
  config = {name: x for name, x in config.items() if not name.startswith("_")}  # _name_or_path and its kin
  layer_types = config.get("layer_types")
  if isinstance(layer_types, list) and all(x == "full_attention" for x in layer_types):
    config["layer_types"] = "full_attention"
  if config.get("use_sliding_window") is False:
    config.pop("sliding_window", None)
  known = {name for _, *names in FIELDS for name in names} | {*family.fields.values(), *family.also.values()}
  known |= {*_USED, *_HARMLESS} | ({"mlp_ratio"} if family.column == 0 else set())
  known |= {family.block_name} if family.block is not None else set()
  known |= {name for name, allowed in family.options.items() if allowed is None}
  known |= {"LLaDA2": {"num_shared_experts"}, "LLaDA-MoE": {"moe_layer_freq"}}.get(family.name, set())
  if family.name == "Llama":  # it is what its class does
    known |= {"is_causal"} if config.get("is_causal") else set()
  options = _OPTIONS | family.options
  for name, value in config.items():
    allowed = None if name in family.fields.values() else options.get(name)
    if allowed and value not in allowed and (value is not None or any(allowed)):  # null is not true
      problems.append(f"{name}={shown(value)} is not supported, only {shown(allowed[0])}")
    elif not (allowed or value is None or name in known):
      problems.append(f"{named(name)}={shown(value)} is not known: it may change what the model computes")
  for name in ("vocab_size", "mask_token_id", "eos_token_id", "pad_token_id", family.block_name):
    value = config.get(name)
    ids = value if name == "eos_token_id" and isinstance(value, list) and value else [value]
    if not all(x is None or type(x) is int for x in ids):
      problems.append(f"{name}={shown(value)}: expected int")
  of_rope = _rope(config, family.column == 0, problems)
  config["rope_theta"] = of_rope.pop("rope_theta")
  fields: dict[str, Any] = {}
  column = min(family.column, 1)
  stand_in = {"G": config.get("n_heads", config.get("num_attention_heads")), "V": config.get("vocab_size")}
  if column == 0 and isinstance(config.get("mlp_ratio"), int) and isinstance(config["d_model"], int):
    stand_in["F"] = config["mlp_ratio"] * config["d_model"]
  if family.fields.get("F") and config.get("intermediate_size") is None:
    config["intermediate_size"] = config.get(family.fields["F"]) or config.get("hidden_size")  # of no layer
  for field, *names in FIELDS:
    name, value = names[column], config.get(names[column])
    value = stand_in.get(field) if value is None else value
    other = config.get(names[1 - column])
    if value is None:
      problems.append(f"{name} is missing")
    elif (typed := _typed(name, value, MaskPredictorConfig.__annotations__[field], problems)) is None:
      pass
    elif other not in (None, value) and (column, field) not in ((0, "V"), (0, "tied")):  # LLaDA's class reads its own
      problems.append(f"{name}={shown(value)} and {names[1 - column]}={shown(other)} disagree")
    else:
      fields[field] = typed
  if len(fields) < len(FIELDS):
    return None
  given = config.get("head_dim")
  K = fields["D"] // max(fields["H"], 1) if given is None else _typed("head_dim", given, int, problems)
  names = {field: names[column] for field, *names in FIELDS} | family.fields | {"K": "head_dim"}
  if K is None:
    return None
  if K * fields["H"] != fields["D"] and (given is None or not column):
    width = "of one width" if given is None else f"of head_dim={K}"
    problems.append(f"{names['D']}={fields['D']} is not {names['H']}={fields['H']} heads {width}")
    return None
  fields |= {"K": K} | of_rope | _others(config, family, K, fields, problems)
  try:
    return MaskPredictorConfig(**fields)
  except Mistake as error:
    problems.append("config.json: " + re.sub(r"model\.(\w+)", lambda field: names.get(field[1], field[0]), str(error)))
    return None


class Piece(NamedTuple):
  """A published tensor, or some of its first axis, and its place in a parameter."""

  name: str
  path: str
  disk: str  # its letters on disk
  letters: str  # the parameter's letters
  at: tuple[int, ...]  # its place along the parameter's first axes: its layer, and its expert
  row: int = 0  # where it begins in the tensor
  rows: int = 0  # how long it is there

  def moves(self, c: MaskPredictorConfig, rows: int) -> list[tuple[int, int]]:
    """(start, size) along the first axis on disk of what is moved at once."""
    if "V" not in self.letters:
      return [(0, self.rows)]
    return [(start, min(rows, c.V - start)) for start in range(0, c.V, rows)]

  def place(self, ndim: int, start: int) -> tuple[int, ...]:
    """Where in the parameter, of so many axes, what is moved begins."""
    if "V" in self.letters:
      return tuple(start if letter == "V" else 0 for letter in self.letters)
    return (*self.at, *[0] * (ndim - len(self.at)))


def parameters(c: MaskPredictorConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
  """The letters and the shape of every parameter, by its path, as they are in full."""
  outer = {"embedding": "VD", "final_norm": "D"} | ({} if c.tied else {"head": "DV"})
  found = {path: (letters, tuple(getattr(c, x) for x in letters)) for path, letters in outer.items()}
  for stack, of_stack in c.stacks.items():
    for name, letters in Block.own(of_stack).items():
      shape = tuple(getattr(of_stack, x) for x in "N" + letters)
      found[f"{stack}/{name}"] = "N" + letters, shape
  return found


def pieces(c: MaskPredictorConfig, column: int, merged: bool = False) -> Iterator[Piece]:
  """All tensors of a model, those of a parameter in a row; `merged`: a layer's experts are one tensor."""
  found = parameters(c)
  for row in NAMES:
    for stack, first, of_stack in (("", 0, c), *_stacks(c)):
      path = f"{stack}/{row[0]}" if stack else row[0]
      if path not in found or not row[2 + column]:
        continue
      letters, _ = found[path]
      disk, name = row[1], row[2 + column]
      size = _size(c, disk.split()[0])
      start = {"k": c.H * c.K, "v": (c.H + c.G) * c.K}.get(row[0][0], 0) if _QKV in name else 0
      experts = c.E if row[0].startswith("experts") and not merged else 0
      if row[0].startswith("experts") and merged:
        disk, name, size = "E " + disk, name.replace("experts.{}", "experts"), c.E
      if not stack:
        yield Piece(_spelled(name), path, disk, letters, (), 0, size)
      for layer in range(of_stack.N) if stack else ():
        if not experts:
          yield Piece(_spelled(name.format(first + layer), merged), path, disk, letters, (layer,), start, size)
        for expert in range(experts):
          yield Piece(_spelled(name.format(first + layer, expert)), path, disk, letters, (layer, expert), 0, size)


def _stacks(c: MaskPredictorConfig) -> Iterator[tuple[str, int, MaskPredictorConfig]]:
  """(its name, its first layer, what its layers are) of every stack."""
  first = 0
  for stack, of_stack in c.stacks.items():
    yield stack, first, of_stack
    first += of_stack.N


def _spelled(name: str, merged: bool = False) -> str:
  """With its suffix; biases have theirs, and experts in one tensor have none."""
  bare = name.endswith("bias") or (merged and ".experts." in name)
  return name if bare else name + ".weight"


def _size(c: MaskPredictorConfig, letters: str) -> int:
  return math.prod(getattr(c, letter) for letter in letters)


def disk_shapes(parts: Iterator[Piece] | list[Piece], c: MaskPredictorConfig) -> dict[str, tuple[int, ...]]:
  """Name -> shape of the tensors that pieces lie in."""
  found: dict[str, tuple[int, ...]] = {}
  for piece in parts:
    rows = found.get(piece.name, (0,))[0] + piece.rows
    found[piece.name] = (rows, *(_size(c, axis) for axis in piece.disk.split()[1:]))
  return found


def says(config: dict[str, Any], model: MaskPredictorConfig) -> bool:
  """Whether a config.json that a model was imported with says it still: it may be trained for something else since."""
  family = family_of(config, model.objective.fills)
  theirs = model_of(config, family, [])
  if theirs is None or model.block != family.block_of(config):
    return False
  return all(getattr(theirs, name) == getattr(model, name) for name in ("causal", *SHAPE))


def of_model(model: MaskPredictorConfig) -> Family:
  """The family that says a model which was not imported; Mistake where none does."""
  if model.causal and not model.shift:
    raise Mistake(
      "model.causal=True: a causal model of ours reads an EOS before each text, which no published layout says"
    )
  for family in FAMILIES:
    says = {"causal": False, "shift": False, "qk_norm": False, "qkv_bias": False} | family.model
    says = {name: x for name, x in says.items() if name not in family.fields.values() and name not in family.fields}
    same = all(getattr(model, name) == x for name, x in says.items() if name != "router" or model.E)
    blocks = (family.block is not None) == bool(model.block)
    narrow = family.column or (model.H * model.K == model.D and model.rope_scaling == "none" and not model.rotary)
    experts = "E" in family.fields or not model.E
    fits = all(
      field in family.fields or getattr(model, field) == getattr(MaskPredictorConfig, field)
      for field in ("E", "S", "dense", "router_bias", "router_groups", "router_renormalise", "router_scale")
      if (field, family.name) != ("dense", "LLaDA-MoE")  # which the frequency of its layers says
      and ((field, family.name) != ("S", "LLaDA2") or model.S % max(model.X, 1))  # shared experts of X each
    )
    if same and blocks and narrow and experts and fits and ("E" not in family.fields or model.E):
      return family
  raise Mistake(
    "no published layout that is known says such a model:"
    f" {', '.join(f'model.{x}={getattr(model, x)}' for x in ('E', 'block', 'shift', 'qk_norm', 'qkv_bias', 'causal'))}"
  )


def new_config(model: MaskPredictorConfig, text: tokenizers.Tokenizer) -> dict[str, Any]:
  """The config.json, in its family's words, of a model that was not imported."""
  family = of_model(model)
  config: dict[str, Any] = {"model_type": family.kind, "architectures": [family.architecture]}
  column = min(family.column, 1)
  if column == 0:
    config |= {name: allowed[0] for name, allowed in _LLADA_OPTIONS.items()}
  else:
    config |= {"head_dim": model.K, "hidden_act": "silu", "attention_bias": False}
    config |= {name: getattr(model, field) for field, name in family.fields.items()}
    config |= {"partial_rotary_factor": model.rotary / model.K} if model.rotary else {}
    config |= _scaling(model)
    config |= {family.block_name: model.block} if model.block and model.block != family.block else {}
  if family.name == "LLaDA2":
    config["num_shared_experts"] = model.S // model.X
  if family.name == "LLaDA-MoE":
    config["moe_layer_freq"] = [0] * model.dense + [1] * (model.N - model.dense)
  config |= {names[column]: getattr(model, field) for field, *names in FIELDS}
  config |= {f"{name}_token_id": getattr(text, f"{name}_id") for name in ("mask", "eos", "pad")}
  if model.causal:
    del config["mask_token_id"]
  return config | ({"vocab_size": text.vocab_size} if column == 0 else {})


def _scaling(model: MaskPredictorConfig) -> dict[str, Any]:
  """`rope_scaling`, as transformers writes it."""
  if model.rope_scaling == "none":
    return {"rope_scaling": None}
  said: dict[str, Any] = {"rope_type": model.rope_scaling, "factor": model.rope_factor}
  if model.rope_scaling != "linear":
    said["original_max_position_embeddings"] = model.rope_length
    names = ("beta_slow", "beta_fast") if model.rope_scaling == "yarn" else ("low_freq_factor", "high_freq_factor")
    said |= zip(names, model.rope_turns, strict=True)
  if model.rope_attention:
    said["attention_factor"] = model.rope_attention
  return {"rope_scaling": said}
