import dataclasses
import json

import pytest
from layouts import CONFIGS, LLADA, publish

from lladax.storage import layout, published, transfer

pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"n_layers": None, "d_model": "64"}, 'd_model="64": expected int; n_layers is missing'),
    ({"n_heads": 5}, "d_model=64 is not n_heads=5 heads of one width"),
    ({"n_kv_heads": 3}, "n_heads=8 is not a multiple of n_kv_heads=3"),
    ({"rope_theta": True}, "rope_theta=true: expected float"),
    ({"mask_token_id": None}, "mask_token_id=None, and the embedding has 256 rows"),
    ({"eos_token_id": 256}, "eos_token_id=256, and the embedding has 256 rows"),
    ({"n_layers": 2}, r"blocks.2.attn_norm.weight is not known; .*up_proj.weight is not known; and 1 more$"),
    ({"n_layers": 10**9}, "n_layers=1000000000, and there are 30 tensors$"),
    ({"d_model": None}, 'architectures=."LLaDAModelLM".: there is neither d_model nor hidden_size in it'),
    (
      {"model_type": None, "architectures": None},
      "neither a workdir's nor a published model's: there is no model_type",
    ),
    ({"rope_theta": None}, "rope_theta is missing"),
    ({"vocab_size": "250"}, 'vocab_size="250": expected int'),
    ({"eos_token_id": []}, r"eos_token_id=\[\]: expected int"),
    ({"mask_token_id": "[MASK]"}, r'mask_token_id="\[MASK\]": expected int'),
    ({"rope_theta": float("inf")}, "rope_theta=Infinity: must be a number above 0"),
    ({"rope_theta": 0}, "rope_theta=0: must be a number above 0"),
    ({"head_dim": 0}, "d_model=64 is not n_heads=8 heads of head_dim=0"),
    ({"head_dim": ""}, 'head_dim="": expected int'),
    ({"d_model": 2**31}, r"d_model=2147483648: must be less than 2\^31"),
    ({"rope_theta": 10**400}, "rope_theta=1000.*…: must be a number above 0, and less than 2.128$"),
    ({"rope_theta": 1}, "rope_theta=1.0: must be above 1"),
    ({"n_layers": 0}, "config.json: n_layers=0: must be at least 1"),
    ({"max_sequence_length": -1}, "config.json: max_sequence_length=-1: must be at least 1"),
    ({"rotary_dim": 8}, "rotary_dim=8 is not supported, only null"),
    ({"block_size": 4}, "block_size=4 is not known"),
    ({"head_dim": 16}, "d_model=64 is not n_heads=8 heads of head_dim=16"),
    ({"head_dim": "8"}, 'head_dim="8": expected int'),
    # Every key is read, harmless, or refused by name.
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported, only 1.0"),
    ({"sliding_window": 16}, "sliding_window=16 is not supported, only null"),
    ({"sliding_window": 16, "use_sliding_window": True}, "use_sliding_window=true is not supported, only false"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, 'layer_types=."full_attention", "sliding_attention".'),
    ({"is_causal": True}, "is_causal=true is not supported"),
    ({"rope": False}, "rope=false is not supported"),
    ({"logit_softcap": 30.0}, "logit_softcap=30.0 is not known: it may change what the model computes"),
    ({"logit_softcap": "x" * 10**6}, 'logit_softcap="x{99}… is not known'),
    ({"y" * 10**6: [1] * 10**6}, r": y{100}…=\[1, .*… is not known"),
    ({"new\nline": 1}, "new line=1 is not known"),
    ({"hidden_size": 32}, "d_model=64 and hidden_size=32 disagree"),
    ({"max_position_embeddings": 64}, "max_sequence_length=128 and max_position_embeddings=64 disagree"),
    # Rotary embeddings, as transformers 4 and 5 write them.
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 'rope_scaling.type="linear" is not supported'),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 'rope_scaling.rope_type="llama3" is not supported'),
    ({"rope_scaling": {"type": "default", "factor": 2.0}}, "rope_scaling.factor=2.0 is not supported"),
    ({"rope_scaling": 4.0}, "rope_scaling=4.0: expected an object"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, 'rope_parameters.rope_type="yarn" is not supported'),
    ({"rope_parameters": {"rope_type": "dynamic", "alpha": 1}}, 'rope_parameters.rope_type="dynamic" is not supported'),
    ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "rope_parameters.partial_rotary_factor=0.25 is not supp"),
    ({"rope_parameters": {"rope_theta": 1e4}}, "rope_theta=500000.0 and rope_parameters.rope_theta=10000.0 disagree"),
    (
      {"rope_theta": None, "rope_parameters": {"a": {"rope_theta": 1.0}, "b": {"rope_theta": 2.0}}},
      "rope_parameters.a.rope_theta=1.0 and rope_parameters.b.rope_theta=2.0 disagree",
    ),
  ],
)
def test_a_wrong_config(tmp_path, changes, said):
  source = publish(tmp_path / "source", LLADA)
  config = {name: value for name, value in (LLADA | changes).items() if value is not None}
  (source / "config.json").write_text(json.dumps(config))
  with pytest.raises(ValueError, match=said):
    published.read(source)


FULL = {"rope_type": "default", "rope_theta": 5e5}


@pytest.mark.parametrize(
  "changes",
  [
    {"rope_theta": None, "rope_parameters": FULL},  # as transformers 5 writes it
    {"rope_parameters": FULL, "rope_scaling": None},
    {"rope_theta": None, "rope_parameters": {"full_attention": FULL, "sliding_attention": FULL}},
    {"rope_scaling": {"type": "default"}},
    {"rope_scaling": {"rope_type": "default", "factor": 1.0}, "partial_rotary_factor": 1},
    {"layer_types": ["full_attention"] * 3, "use_sliding_window": False, "sliding_window": 8, "max_window_layers": 2},
    {"hidden_size": 64, "num_hidden_layers": 3, "head_dim": 8, "tie_word_embeddings": True},
    {"is_decoder": True, "id2label": {"0": "LABEL_0"}, "temperature": 1.0, "use_cache": True, "pretraining_tp": 2},
    {"_name_or_path": "x", "_attn_implementation_autoset": True, "auto_map": {"AutoModel": "a.b"}, "never_seen": None},
    {"architectures": None}, {"model_type": None},
  ],
)  # fmt: skip
def test_a_config_that_says_the_same(tmp_path, changes):
  """Whatever transformers adds to it, the model is the one of LLADA; and it comes back from an export as it was."""
  source = publish(tmp_path / "source", LLADA)
  config = LLADA | changes
  if changes.get("rope_theta", 0) is None:
    del config["rope_theta"]
  (source / "config.json").write_text(json.dumps(config))
  theirs = published.read(source)
  assert theirs.model == published.read(publish(tmp_path / "plain", LLADA)).model
  transfer.export(transfer.load_params(theirs), theirs.model, tmp_path / "target", config)
  assert json.loads((tmp_path / "target" / "config.json").read_text()) == config


def model_of(name, **changes):
  """(the model of a family's config.json with these changes, None takes a key away; what is wrong with it)."""
  config = {key: x for key, x in (CONFIGS[name] | changes).items() if x is not None or key not in changes}
  problems = []
  return layout.model_of(config, layout.family_of(config), problems), "; ".join(problems)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_key_of_a_config_counts_or_is_harmless(name):
  """Taken away or set to something else, a key changes the model, or is refused, or is on the list of the harmless."""
  model, problems = model_of(name)
  assert model is not None and not problems
  identity = {"mask_token_id", "eos_token_id", "pad_token_id", "block_size", "bd_size", "vocab_size"}  # published.py's
  for key, value in CONFIGS[name].items():
    if key in layout._HARMLESS or key in identity or key in ("model_type", "architectures"):
      continue
    family = layout.family_of(CONFIGS[name])
    if family.options.get(key, ()) is None:  # named by its class, and not read
      continue
    if key in ("rotary_dim", "sliding_window", "intermediate_size") and name in ("LLaDA2", "LLaDA-MoE"):
      continue  # said twice, or by use_sliding_window
    if key == "sliding_window":
      continue
    other = {bool: lambda x: not x, str: lambda x: x + "x", int: lambda x: x + 8, float: lambda x: x * 2 + 0.25}
    other |= {type(None): lambda x: 8, list: lambda x: [*x, 7]}
    changed, problems = model_of(name, **{key: other[type(value)](value)})
    assert changed != model or problems, key


@pytest.mark.parametrize(
  ("name", "changes", "said"),
  [
    ("LLaDA2", {"score_function": "softmax"}, 'score_function="softmax" is not supported, only "sigmoid"'),
    ("LLaDA2", {"use_bias": True}, "use_bias=true is not supported"),
    ("LLaDA2", {"norm_head": True}, "norm_head=true is not supported"),
    ("LLaDA2", {"num_nextn_predict_layers": 1}, "num_nextn_predict_layers=1 is not supported"),
    ("LLaDA2", {"n_group": 3}, "n_group=3 does not divide num_experts=8"),
    ("LLaDA2", {"rotary_dim": 4}, "rotary_dim=4 and partial_rotary_factor=0.5 disagree"),
    ("LLaDA2", {"norm_topk_prob": None}, "norm_topk_prob is missing"),
    ("LLaDA2", {"routed_scaling_factor": None}, "routed_scaling_factor is missing"),
    ("LLaDA2", {"num_experts": None}, "num_experts is missing"),
    ("LLaDA-MoE", {"clip_qkv": 8.0}, "clip_qkv=8.0 is not supported"),
    ("LLaDA-MoE", {"moe_router_enable_expert_bias": True}, "moe_router_enable_expert_bias=true is not supported"),
    ("LLaDA-MoE", {"moe_router_score_function": "sigmoid"}, 'moe_router_score_function="sigmoid" is not supported'),
    ("LLaDA-MoE", {"moe_layer_freq": [1, 0, 1]}, "moe_layer_freq=[1, 0, 1] is not supported"),
    ("LLaDA-MoE", {"moe_layer_freq": [0, 1]}, "moe_layer_freq names 2 layers, and num_hidden_layers=3"),
    ("Dream", {"use_mrope": True}, "use_mrope=true is not supported"),
    ("SDAR", {"attention_bias": True}, "attention_bias=true is not supported"),
    ("SDAR", {"block_size": "4"}, 'block_size="4": expected int'),
    ("Llama", {"mlp_bias": True}, "mlp_bias=true is not supported"),
    ("Llama", {"attention_bias": True}, "attention_bias=true is not supported"),
    ("Qwen2", {"use_sliding_window": True}, "use_sliding_window=true is not supported"),
    ("Qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, 'layer_types=["full_attention", "sliding'),
    ("Qwen3", {"num_experts": 8}, "num_experts=8 is not supported"),
    ("Qwen3", {"num_local_experts": 8}, "num_local_experts=8 is not known"),
    ("Qwen3-MoE", {"num_local_experts": 4}, "num_experts=8 and num_local_experts=4 disagree"),
    ("Qwen3-MoE", {"num_experts": None, "num_local_experts": "8"}, 'num_local_experts="8": expected int'),
    ("Qwen3", {"block_size": 4}, "block_size=4 is not known"),
    ("Fast-dLLM v2", {"block_size": 4}, "block_size=4 is not known"),
    ("Qwen3", {"mlp_ratio": 4}, "mlp_ratio=4 is not known"),
    ("Qwen3", {"num_hidden_layers": 0}, "config.json: num_hidden_layers=0: must be at least 1"),
    ("Qwen3", {"head_dim": 0}, "config.json: head_dim=0: must be at least 1"),
    ("Qwen3-MoE", {"num_experts_per_tok": 9}, "num_experts_per_tok=9: a token is given to at least 1 of num_experts=8"),
    ("LLaDA-MoE", {"moe_layer_freq": [0, "1"]}, 'moe_layer_freq=[0, "1"] is not supported'),
    ("LLaDA-MoE", {"moe_layer_freq": [[1]] * 3}, "moe_layer_freq=[[1], [1], [1]] is not supported"),
    ("Qwen3-MoE", {"mlp_only_layers": [0]}, "mlp_only_layers=[0] is not supported"),
    ("Qwen3-MoE", {"decoder_sparse_step": 2}, "decoder_sparse_step=2 is not supported"),
    ("SDAR-MoE", {"num_experts": None}, "num_experts is missing"),
    # Rotary embeddings.
    ("Dream", {"rotary_dim": []}, "rotary_dim=[]: expected int"),
    ("Dream", {"rotary_dim": ""}, 'rotary_dim="": expected int'),
    ("Dream", {"rotary_dim": 0}, "rotary_dim=0 turns none of a head's 8 numbers"),
    ("Llama", {"partial_rotary_factor": 1e-9}, "partial_rotary_factor=1e-09 turns none of a head's 16 numbers"),
    ("Llama", {"partial_rotary_factor": 10**400}, "…: must be a number above 0"),
    ("Qwen3", {"max_position_embeddings": 10**400, "rope_scaling": {"type": "yarn", "factor": 2.0}}, "less than 2^31"),
    ("Qwen3", {"rope_theta": 1.0, "rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_theta=1.0: must be above 1"),
    ("Qwen3", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, 'rope_type="dynamic" is not supported, only'),
    ("Qwen3", {"rope_scaling": {"type": "longrope"}}, 'rope_scaling.type="longrope" is not supported'),
    ("Qwen3", {"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
    ("Qwen3", {"rope_scaling": {"type": "linear", "factor": "2"}}, 'rope_scaling.factor="2": must be a number above 0'),
    ("Qwen3", {"rope_scaling": {"type": "linear", "factor": 0.5}}, "model.rope_factor=0.5"),
    (
      "Qwen3",
      {"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": 1.0, "mscale_all_dim": 1.0}},
      "rope_scaling.msc",
    ),
    ("Qwen3", {"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": False}}, "rope_scaling.truncate=false"),
    ("Qwen3", {"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": 1}}, "model.rope_turns=(1.0, 1.0)"),
    (
      "Qwen3",
      {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "linear", "factor": 4.0}},
      "rope_scaling and rope_parameters stretch positions differently",
    ),
    (
      "Qwen3",
      {"partial_rotary_factor": 0.5, "rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.25}},
      "partial_rotary_factor=0.5 and rope_parameters.partial_rotary_factor=0.25 disagree",
    ),
  ],
  ids=str,
)
def test_a_family_s_config_that_is_refused(name, changes, said):
  assert said in model_of(name, **changes)[1]


YARN = {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_length": 32, "rope_turns": (1.0, 32.0)}
LLAMA3 = {"rope_scaling": "llama3", "rope_factor": 8.0, "rope_length": 16, "rope_turns": (1.0, 4.0)}
LLAMA3_SAID = {
  "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16, "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
}  # fmt: skip
AS_5 = {"rope_theta": None, "rope_scaling": None}


@pytest.mark.parametrize(
  ("name", "changes", "model"),
  [
    ("Qwen3", {"rope_scaling": {"type": "linear", "factor": 2}}, {"rope_scaling": "linear", "rope_factor": 2.0}),
    (
      "Qwen2",
      {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
      YARN,
    ),
    ("Qwen3", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, YARN | {"rope_length": 128}),
    (
      "Qwen3",
      {"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 32}},  # 128 is 4 times as long
      YARN,
    ),
    (
      "SDAR-MoE",
      {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 16,
                        "beta_slow": 2, "attention_factor": 1.5, "truncate": True}},
      YARN | {"rope_turns": (2.0, 16.0), "rope_attention": 1.5},
    ),
    ("Llama", {"rope_scaling": LLAMA3_SAID}, LLAMA3),
    ("Llama", AS_5 | {"rope_parameters": LLAMA3_SAID | {"rope_theta": 1e6}}, LLAMA3),
    (
      "Qwen2",
      AS_5 | {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}}},
      {"rope_scaling": "linear", "rope_factor": 2.0},
    ),
    ("Qwen3", AS_5 | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, {}),
    ("Llama", {"partial_rotary_factor": 0.5}, {"rotary": 8}),
    ("Llama", {"partial_rotary_factor": 1.0}, {}),
    ("Llama", AS_5 | {"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.25}}, {"rotary": 4}),
    (
      "Llama",
      AS_5 | {"rope_parameters": {"full_attention": {"rope_theta": 1e6, "partial_rotary_factor": 0.25}}},
      {"rotary": 4},
    ),
    ("Llama", {"rope_scaling": {"type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}},
     {"rotary": 8, "rope_scaling": "linear", "rope_factor": 2.0}),
    ("Qwen3-MoE", {"num_experts": None, "num_local_experts": 8}, {}),  # as transformers 5 writes it
    ("Qwen3-MoE", {"num_local_experts": 8}, {}),
    ("SDAR-MoE", {"num_experts": None, "num_local_experts": 8}, {}),
    ("LLaDA2", {"rotary_dim": None}, {}),
    ("LLaDA2", {"partial_rotary_factor": None}, {}),
    ("LLaDA2", {"num_shared_experts": 0}, {"S": 0}),
    ("LLaDA2", {"use_qkv_bias": True}, {"qkv_bias": True}),
    ("LLaDA-MoE", {"moe_layer_freq": 1}, {"dense": 0}),
    ("LLaDA-MoE", {"shared_expert_intermediate_size": None}, {"S": 0}),
  ],
  ids=str,
)  # fmt: skip
def test_a_family_s_config_that_is_read(name, changes, model):
  found, problems = model_of(name, **changes)
  assert not problems
  assert found == dataclasses.replace(model_of(name)[0], **model)
