"""Published folders of random tensors, as LLaDA and iLLaDA come."""

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


def shapes(config):
  """Name -> shape of every tensor, written down a second time."""
  if "d_model" in config:
    D, F, V = config["d_model"], config["mlp_hidden_size"], config["embedding_size"]
    G = D // config["n_heads"] * config["n_kv_heads"]
    outer = {"wte": (V, D), "ln_f": (D,)} | ({} if config["weight_tying"] else {"ff_out": (V, D)})
    block = {
      "attn_norm": (D,), "q_proj": (D, D), "k_proj": (G, D), "v_proj": (G, D), "attn_out": (D, D), "ff_norm": (D,),
      "ff_proj": (F, D), "up_proj": (F, D), "ff_out": (D, F),
    }  # fmt: skip
    prefix, blocks, N = "model.transformer.", "blocks", config["n_layers"]
  else:
    D, F, V = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    G = D // config["num_attention_heads"] * config["num_key_value_heads"]
    outer = {"embed_tokens": (V, D), "norm": (D,)}
    block = {
      "input_layernorm": (D,), "self_attn.q_proj": (D, D), "self_attn.k_proj": (G, D), "self_attn.v_proj": (G, D),
      "self_attn.o_proj": (D, D), "post_attention_layernorm": (D,), "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D),
      "mlp.down_proj": (D, F),
    }  # fmt: skip
    prefix, blocks, N = "model.", "layers", config["num_hidden_layers"]
  outer |= {f"{blocks}.{i}.{name}": shape for i in range(N) for name, shape in block.items()}
  return {f"{prefix}{name}.weight": shape for name, shape in outer.items()}


def publish(folder, config, dtype=BF16, files=3, seed=0, **changes):
  """A published folder of random tensors, written by the format's own library. `changes`: name -> array, or None."""
  rng = np.random.default_rng(seed)
  draw = (
    (lambda shape: np.zeros(shape, dtype)) if seed is None else (lambda s: (0.1 * rng.standard_normal(s)).astype(dtype))
  )
  names = list(shapes(config))
  parts = [names[i::files] for i in range(files)]
  folder.mkdir(parents=True)
  index = {}
  for number, part in enumerate(parts, 1):
    name = f"model-{number:05}-of-{files:05}.safetensors" if files > 1 else "model.safetensors"
    tensors = {tensor: draw(shapes(config)[tensor]) for tensor in part} | (changes if number == files else {})
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
