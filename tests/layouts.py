"""Published folders of random tensors, as the families come; their tensors' names are written down a second time."""

import json
import pathlib

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import tokenizers

from lladax.storage import published

GOLDEN = pathlib.Path(__file__).parent / "golden" / "llada-tiny"
BF16 = np.dtype(ml_dtypes.bfloat16)
LLADA = {
  "model_type": "llada", "architectures": ["LLaDAModelLM"], "d_model": 64, "n_layers": 3, "n_heads": 8, "n_kv_heads": 8,
  "mlp_hidden_size": 96, "vocab_size": 250, "embedding_size": 256, "max_sequence_length": 128, "rope_theta": 5e5,
  "rms_norm_eps": 1e-5, "weight_tying": False, "block_type": "llama", "activation_type": "silu",
  "layer_norm_type": "rms", "mask_token_id": 249, "eos_token_id": 1, "pad_token_id": 1, "torch_dtype": "bfloat16",
}  # fmt: skip
ILLADA = {
  "model_type": "illada", "architectures": ["ILLaDAForCausalLM"], "hidden_size": 64, "num_hidden_layers": 3,
  "num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 256,
  "max_position_embeddings": 256, "rope_theta": 1e6, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
  "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "rope_scaling": None, "layer_norm_eps": None,
  "mask_token_id": 5, "eos_token_id": 2, "torch_dtype": "bfloat16",
}  # fmt: skip
GQA_TIED = LLADA | {"n_kv_heads": 2, "weight_tying": True}  # LLaDA's names, iLLaDA's shape


_SAID = {
  "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 4,
  "intermediate_size": 96, "vocab_size": 256, "max_position_embeddings": 128, "rope_theta": 1e6, "rms_norm_eps": 1e-6,
  "hidden_act": "silu", "tie_word_embeddings": False, "attention_dropout": 0.0, "rope_scaling": None,
  "initializer_range": 0.02, "use_sliding_window": False, "sliding_window": 16, "max_window_layers": 2,
  "eos_token_id": 2, "use_cache": True, "torch_dtype": "bfloat16",
}  # fmt: skip
_ROUTED = {
  "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True,
  "decoder_sparse_step": 1, "mlp_only_layers": [], "output_router_logits": False, "router_aux_loss_coef": 0.001,
}  # fmt: skip
_WIDE = {"head_dim": 16, "attention_bias": False}


def _named(kind, architecture, *more):
  config = _SAID | {"model_type": kind, "architectures": [architecture]}
  for x in more:
    config = config | x
  return config


# A config.json of every family, by the name that layout.FAMILIES has for it.
CONFIGS = {
  "LLaDA": LLADA,
  "iLLaDA": ILLADA,
  "LLaDA-MoE": _named("llada", "LLaDAMoEModelLM", {
    "num_experts": 8, "num_experts_per_tok": 2, "expert_intermediate_size": 24, "shared_expert_intermediate_size": 32,
    "dense_intermediate_size": 96, "intermediate_size": None, "qk_layernorm": True, "moe_layer_freq": [0, 1, 1],
    "moe_router_enable_expert_bias": False, "moe_router_score_function": "softmax", "partial_rotary_factor": 1,
    "routed_scaling_factor": 1, "router_num_group": None, "clip_qkv": None, "mask_token_id": 5, "norm_topk_prob": None,
  }),
  "LLaDA2": _named("llada2_moe", "LLaDA2MoeModelLM", {
    "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "num_shared_experts": 2,
    "first_k_dense_replace": 1, "norm_topk_prob": True, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5,
    "moe_router_enable_expert_bias": True, "score_function": "sigmoid", "router_dtype": "fp32", "use_qkv_bias": False,
    "use_bias": False, "use_rmsnorm": True, "norm_head": False, "head_dim": 16, "partial_rotary_factor": 0.5,
    "rotary_dim": 8, "mask_token_id": 5,
  }),
  "Dream": _named("Dream", "DreamModel", {"mask_token_id": 5, "use_mrope": False}),
  "SDAR": _named("sdar", "SDARForCausalLM", _WIDE, {"block_size": 4, "mask_token_id": 5, "debug": False}),
  "SDAR-MoE": _named("sdar_moe", "SDARMoeForCausalLM", _WIDE, _ROUTED, {"block_size": 4, "mask_token_id": 5}),
  "Fast-dLLM v2": _named("Fast_dLLM_Qwen", "Fast_dLLM_QwenForCausalLM", {"bd_size": 8, "mask_token_id": 5}),
  "Llama": _named("llama", "LlamaForCausalLM", _WIDE, {"mlp_bias": False, "pretraining_tp": 1}),
  "Qwen2": _named("qwen2", "Qwen2ForCausalLM", {"layer_types": ["full_attention"] * 3}),
  "Qwen3": _named("qwen3", "Qwen3ForCausalLM", _WIDE),
  "Qwen3-MoE": _named("qwen3_moe", "Qwen3MoeForCausalLM", _WIDE, _ROUTED),
}  # fmt: skip


def random_config(name, seed):
  """One of the family, of another shape."""
  rng, config = np.random.default_rng(seed), dict(CONFIGS[name])
  any_of = lambda *values: values[rng.integers(len(values))]  # noqa: E731
  G, K, N = any_of(1, 2, 3), any_of(4, 6, 10), any_of(1, 2, 4)
  H, F, V = G * any_of(1, 2, 3), any_of(7, 12, 33), any_of(130, 150)
  if name == "LLaDA":
    more = {"d_model": H * K, "n_layers": N, "n_heads": H, "n_kv_heads": G, "mlp_hidden_size": F, "embedding_size": V}
    return config | more | {"vocab_size": V - 3, "weight_tying": any_of(False, True), "mask_token_id": 5}
  config |= {"num_hidden_layers": N, "num_attention_heads": H, "num_key_value_heads": G, "vocab_size": V}
  config |= {"hidden_size": any_of(8, 12, 30) if "head_dim" in config else H * K, "rope_theta": any_of(1e4, 5e5)}
  config |= {"head_dim": K} if "head_dim" in config else {}
  config |= {"tie_word_embeddings": any_of(False, True)} | ({"layer_types": None} if "layer_types" in config else {})
  config["dense_intermediate_size" if name == "LLaDA-MoE" else "intermediate_size"] = F
  if "num_experts" in config:
    width = "expert_intermediate_size" if name == "LLaDA-MoE" else "moe_intermediate_size"
    # LLaDA2's are in four groups, each of two at least.
    config |= {"num_experts": any_of(4, 8) * (2 if name == "LLaDA2" else 1), width: any_of(3, 9)}
  dense = int(rng.integers(N))
  if name == "LLaDA-MoE":
    config |= {"moe_layer_freq": [0] * dense + [1] * (N - dense), "qk_layernorm": any_of(False, True)}
    config |= {"shared_expert_intermediate_size": any_of(None, 5)}
  if name == "LLaDA2":
    config |= {"first_k_dense_replace": dense, "use_qkv_bias": any_of(False, True), "rotary_dim": K // 2 // 2 * 2}
    config |= {"moe_router_enable_expert_bias": any_of(False, True), "num_shared_experts": any_of(0, 1, 2)}
    config |= {"partial_rotary_factor": None}
  return config


def shapes(config, merged=False):
  """Name -> shape of every tensor, written down a second time; `merged`: a layer's experts are one."""
  if "d_model" in config:
    D, F, V = config["d_model"], config["mlp_hidden_size"], config["embedding_size"]
    G = D // config["n_heads"] * config["n_kv_heads"]
    outer = {"wte": (V, D), "ln_f": (D,)} | ({} if config["weight_tying"] else {"ff_out": (V, D)})
    block = {
      "attn_norm": (D,), "q_proj": (D, D), "k_proj": (G, D), "v_proj": (G, D), "attn_out": (D, D), "ff_norm": (D,),
      "ff_proj": (F, D), "up_proj": (F, D), "ff_out": (D, F),
    }  # fmt: skip
    outer |= {f"blocks.{i}.{name}": shape for i in range(config["n_layers"]) for name, shape in block.items()}
    return {f"model.transformer.{name}.weight": shape for name, shape in outer.items()}
  kind, D, V = config["model_type"], config["hidden_size"], config["vocab_size"]
  two = kind == "llada2_moe"
  K = config.get("head_dim") or D // config["num_attention_heads"]
  Q, G = K * config["num_attention_heads"], K * config["num_key_value_heads"]
  found = {f"model.{'word_embeddings' if two else 'embed_tokens'}.weight": (V, D), "model.norm.weight": (D,)}
  if not config["tie_word_embeddings"]:
    found["lm_head.weight"] = (V, D)

  def three(prefix, width, suffix=".weight", *each):
    names = {"gate_proj": (width, D), "up_proj": (width, D), "down_proj": (D, width)}
    return {f"{prefix}{name}{suffix}": (*each, *shape) for name, shape in names.items()}

  for i in range(config["num_hidden_layers"]):
    at = f"model.layers.{i}."
    found |= {at + "input_layernorm.weight": (D,), at + "post_attention_layernorm.weight": (D,)}
    if two:
      found |= {at + "attention.query_key_value.weight": (Q + 2 * G, D), at + "attention.dense.weight": (D, Q)}
      found |= {at + f"attention.{x}_layernorm.weight": (K,) for x in ("query", "key")}
      found |= {at + "attention.query_key_value.bias": (Q + 2 * G,)} if config["use_qkv_bias"] else {}
    else:
      widths = {"q": Q, "k": G, "v": G}
      found |= {at + f"self_attn.{x}_proj.weight": (width, D) for x, width in widths.items()}
      found |= {at + "self_attn.o_proj.weight": (D, Q)}
      if kind in ("Dream", "Fast_dLLM_Qwen", "qwen2"):
        found |= {at + f"self_attn.{x}_proj.bias": (width,) for x, width in widths.items()}
      if "qwen3" in kind or "sdar" in kind or config.get("qk_layernorm"):
        found |= {at + f"self_attn.{x}_norm.weight": (K,) for x in "qk"}
    experts, dense = config.get("num_experts"), config.get("first_k_dense_replace") or 0
    dense = config["moe_layer_freq"].count(0) if "moe_layer_freq" in config else dense
    if not experts or i < dense:
      found |= three(at + "mlp.", config.get("dense_intermediate_size") or config["intermediate_size"])
      continue
    X = config.get("expert_intermediate_size") or config["moe_intermediate_size"]
    found[at + "mlp.gate.weight"] = (experts, D)
    if config.get("moe_router_enable_expert_bias"):
      found[at + "mlp.gate.expert_bias"] = (experts,)
    if merged:
      found |= three(at + "mlp.experts.", X, "", experts)
    for e in range(0 if merged else experts):
      found |= three(at + f"mlp.experts.{e}.", X)
    if two and config["num_shared_experts"]:
      found |= three(at + "mlp.shared_experts.", X * config["num_shared_experts"])
    elif config.get("shared_expert_intermediate_size"):
      found |= three(at + "mlp.shared_expert.", config["shared_expert_intermediate_size"])
  return found


def publish(folder, config, dtype=BF16, files=3, seed=0, merged=False, **changes):
  """A published folder of random tensors, written by the format's own library. `changes`: name -> array, or None."""
  rng = np.random.default_rng(seed)
  draw = (
    (lambda shape: np.zeros(shape, dtype)) if seed is None else (lambda s: (0.1 * rng.standard_normal(s)).astype(dtype))
  )
  wanted = shapes(config, merged)
  names = list(wanted)
  parts = [names[i::files] for i in range(files)]
  folder.mkdir(parents=True)
  index = {}
  for number, part in enumerate(parts, 1):
    name = f"model-{number:05}-of-{files:05}.safetensors" if files > 1 else "model.safetensors"
    tensors = {tensor: draw(wanted[tensor]) for tensor in part} | (changes if number == files else {})
    tensors = {
      tensor: value for tensor, value in tensors.items() if changes.get(tensor, value) is value and value is not None
    }
    safetensors.numpy.save_file(tensors, folder / name, {"format": "pt"})
    index |= dict.fromkeys(tensors, name)
  if files > 1:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
  (folder / "config.json").write_text(json.dumps(config))
  return folder


def tensors(folder):
  """Name -> (dtype, shape, bytes) of all files, read by the format's own library."""
  found = {}
  for path in folder.glob("*.safetensors"):
    found |= {name: (x.dtype, x.shape, x.tobytes()) for name, x in safetensors.numpy.load_file(path).items()}
  return found


def complaint(folder):
  with pytest.raises(ValueError) as error:
    published.read(folder)
  assert "\n" not in str(error.value)
  return str(error.value)


def add_tokenizer(folder, mask="<|mdm_mask|>"):
  """A byte-level tokenizer.json of 256 bytes and LLaDA's special tokens; returns name -> id."""

  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  vocabulary = {character: i for i, character in enumerate(alphabet)}
  model = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
  model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  model.decoder = tokenizers.decoders.ByteLevel()
  special = ["<|startoftext|>", "<|endoftext|>", mask, "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
  model.add_special_tokens(special)
  model.save(str(folder / "tokenizer.json"))
  template = (
    "{% for m in messages %}{{ (bos_token if loop.first else '') + '<|start_header_id|>' + m['role'] + "
    "'<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
  )
  (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|startoftext|>", "chat_template": template}))
  return {name: model.token_to_id(name) for name in special}


WITH_TEXT = LLADA | {
  "embedding_size": 384,
  "vocab_size": 384,
  "eos_token_id": 257,
  "mask_token_id": 258,
  "pad_token_id": 257,
}
