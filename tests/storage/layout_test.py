import json

import pytest
from layouts import LLADA, publish

from lladax.storage import published, transfer

pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"n_layers": None, "d_model": "64"}, 'd_model="64": expected int; n_layers is missing'),
    ({"n_heads": 5}, "d_model=64 is not n_heads=5 heads of one width"),
    ({"n_kv_heads": 3}, "model.H=8 is not a multiple of model.G=3"),
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
    ({"head_dim": 16}, "d_model=64 is not n_heads=8 heads of head_dim=16"),
    ({"head_dim": "8"}, 'd_model=64 is not n_heads=8 heads of head_dim="8"'),
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
