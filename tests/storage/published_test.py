"""Published checkpoints: golden answers, the round trip, what is refused, where the bytes go."""

import json
import pathlib
import re
import shutil
import sys
import types

import jax
import numpy as np
import pytest
from layouts import BF16, CONFIGS, GOLDEN, ILLADA, LLADA, WITH_TEXT, add_tokenizer, complaint, publish

import lladax
from lladax.mistake import Mistake
from lladax.storage import published

pytestmark = pytest.mark.usefixtures("quick_compiles")


ROOT = pathlib.Path(__file__).parents[2]


def test_everything_wrong_is_named_at_once(tmp_path):
  q, k, extra = (f"model.transformer.blocks.1.{name}.weight" for name in ("q_proj", "k_proj", "q_norm"))
  config = LLADA | {"alibi": True, "attention_dropout": 0.1, "activation_type": "gelu", "include_qkv_bias": True}
  up = "model.transformer.blocks.0.up_proj.weight"
  changes = {q: None, k: np.zeros((8, 64), BF16), extra: np.zeros(8, BF16), up: np.zeros((96, 64), np.int8)}
  said = complaint(publish(tmp_path / "source", config, **changes))
  for part in (
    "alibi=true is not supported, only false", "attention_dropout=0.1", 'activation_type="gelu"',
    "include_qkv_bias=true",
    f"{q} is missing", f"{k} is of shape [8, 64], expected [64, 64]", f"{extra} is not known", f"{up} is of dtype I8",
  ):  # fmt: skip
    assert part in said, (part, said)


LLAMA = ILLADA | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


@pytest.mark.parametrize(
  ("config", "said"),
  [
    ({"model_type": "t5", "d_model": 512, "mask_token_id": 3}, "this family is not known; known are LLaDA, LLaDA-MoE"),
    ({"model_type": "bert", "hidden_size": 512, "mask_token_id": 3}, "this family is not known; known are LLaDA"),
    ({"model_type": "qwen3_next", "hidden_size": 64}, "this family is not known; near it are Qwen3-MoE, Qwen3; known"),
    ({"model_type": "llada3_moe", "hidden_size": 64}, "this family is not known; near it are LLaDA2, SDAR-MoE"),
    ({"model_type": "sdar_v", "architectures": ["SDARV"]}, "near it are SDAR, SDAR-MoE; known are LLaDA, LLaDA-MoE"),
    ({"model_type": "qwen3"}, "there is neither d_model nor hidden_size in it"),
    ({"model_type": "qwen2", "architectures": ["SDARForCausalLM"]}, "the one is Qwen2, and the other SDAR: say in it"),
    ({"model_type": "llama", "architectures": ["LLaDAModelLM"]}, "the one is Llama, and the other LLaDA: say in it"),
    ({}, "neither a workdir's nor a published model's"),
  ],
)  # fmt: skip
def test_other_models_are_refused_by_their_names(tmp_path, config, said):
  """Before anything else is asked of the folder: no list of what is missing."""
  (tmp_path / "config.json").write_text(json.dumps(config))
  message = complaint(tmp_path)
  assert said in message and len(message) < 400
  if config:
    assert json.dumps(config["model_type"]) in message
  with pytest.raises(ValueError, match=re.escape(said)):
    lladax.load(tmp_path)


def test_a_llama_with_a_mask_token_is_a_mask_predictor(tmp_path):
  theirs = published.read(publish(tmp_path / "source", LLAMA))
  assert theirs.model == published.read(publish(tmp_path / "illada", ILLADA)).model
  bare = {name: value for name, value in LLAMA.items() if name != "mask_token_id"}
  source = publish(tmp_path / "causal", bare)
  assert published.read(source).model.causal and lladax.load(source).mask_id == published.NO_MASK
  assert lladax.load(source, mask_id=5).model == theirs.model


def test_a_llama_whose_vocabulary_names_a_mask_is_a_mask_predictor(tmp_path):
  config = {name: value for name, value in LLAMA.items() if name != "mask_token_id"} | {"vocab_size": 384}
  source = publish(tmp_path / "source", config | {"eos_token_id": 257})
  add_tokenizer(source, mask="<hole>")
  assert not lladax.load(source).model.objective.fills
  add_tokenizer(source, mask="<|mdm_mask|>")
  assert lladax.load(source).mask_id == 258
  (source / "tokenizer.json").write_text("{")
  assert "tokenizer.json is no vocabulary: " in complaint(source)


def test_broken_files(tmp_path):
  source = publish(tmp_path / "source", LLADA)
  first, second, third = sorted(source.glob("*.safetensors"))
  first.unlink()
  second.write_bytes(second.read_bytes()[:-10])
  third.write_bytes(b"\x00" * 100)
  said = complaint(source)
  assert f"{first.name} is missing, and model.safetensors.index.json names it" in said
  for path in (second, third):
    assert f"{path.name} is no whole safetensors file, get it again: " in said
  assert "weight is missing" not in said and len(said) < 1000  # what the broken files hold is not known
  (source / "config.json").write_text("{")
  assert "config.json is no JSON" in complaint(source)
  (source / "config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
  assert "config.json is no JSON that can be read: its lists and objects are too deep" in complaint(source)
  (source / "config.json").write_text(json.dumps(["x"] * 10_000))
  assert "expected a JSON object" in complaint(source) and len(complaint(source)) < 400
  (source / "config.json").unlink()
  with pytest.raises(FileNotFoundError, match="there is no config.json in it"):
    published.read(source)


def test_a_list_of_problems_is_cut(tmp_path):
  source = publish(tmp_path / "source", LLADA | {"n_layers": 9})  # 84 tensors, under names that are none of LLaDA's
  (source / "config.json").write_text(json.dumps(ILLADA | {"num_hidden_layers": 9}))
  said = complaint(source)
  assert said.endswith("; and 159 more") and len(said) < 1000


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 16060556376\n"


@pytest.mark.parametrize(
  "name",
  ["config.json", "tokenizer.json", "tokenizer.model", "model-00001-of-00003.safetensors",
   "model.safetensors.index.json"],
)  # fmt: skip
def test_what_stands_in_for_a_file_is_named(tmp_path, name):
  source = publish(tmp_path / "source", LLADA)
  (source / name).write_text(POINTER)
  for read in (published.read, lladax.load):
    with pytest.raises(Mistake, match=f"{name} is a git-lfs pointer, not the file itself: run `git lfs pull`") as error:
      read(source)
    assert len(str(error.value)) < 400
  (source / name).unlink()
  (source / name).symlink_to("../../blobs/0123")
  for read in (published.read, lladax.load):
    with pytest.raises(Mistake, match=f"{name} is a link to ../../blobs/0123, which is not there") as error:
      read(source)
    assert len(str(error.value)) < 400


def test_a_repository_in_the_hub_s_cache(tmp_path):
  root = tmp_path / "models--OWNER--NAME"
  (root / "snapshots").mkdir(parents=True)
  with pytest.raises(FileNotFoundError, match="is a repository in the hub's cache: and there is no snapshot in it"):
    lladax.load(root)
  shutil.copytree(GOLDEN, root / "snapshots" / "abc")
  assert published.find(root) == root / "snapshots" / "abc"  # the only one
  assert lladax.load(root).mask_id == 503
  shutil.copytree(GOLDEN, root / "snapshots" / "def")
  with pytest.raises(FileNotFoundError, match="name one of its snapshots: abc; def$"):
    published.find(root)
  (root / "refs").mkdir()
  (root / "refs" / "main").write_text("def")
  assert published.find(root) == root / "snapshots" / "def"


def test_a_path_that_is_not_there(tmp_path, monkeypatch, tiny_workdir):
  """One line, and never a question to the hub."""
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  monkeypatch.chdir(tmp_path)
  shutil.copytree(tiny_workdir, tmp_path / "runs" / "quickstart")
  hint = "a repository on the Hugging Face hub is written hf://"
  for path, said in (
    ("runs/quickstat", "there is no such folder; did you mean runs/quickstart?"),
    ("runs/quickstat/", "there is no such folder; did you mean runs/quickstart?"),
    ("GSAI-ML/LLaDA-8B-Base", f"there is no such folder; {hint}GSAI-ML/LLaDA-8B-Base"),
    ("nowhere", "there is no such folder"),
    ("~nobody_of_this_name/x", "there is no such folder"),
    ("x" * 5000, "there is no such folder"),
    ("runs", "there is no config.json in it; did you mean runs/quickstart?"),
    ("runs/quickstart/config.json", "it is a file: give its folder, runs/quickstart"),
    ("abfs://bucket/run", "models are read from folders, and from hf://"),
    ("hf://NAME", "a hub name is written hf://OWNER/NAME or hf://OWNER/NAME@REVISION"),
    ("hf://OWNER/NAME/folder", "a hub name is written hf://OWNER/NAME or hf://OWNER/NAME@REVISION"),
    ("hf://OWNER/NAME", "to ask the Hugging Face hub: pip install huggingface_hub"),
  ):
    with pytest.raises(Mistake) as error:
      lladax.load(path)
    assert str(error.value) == str(Mistake(f"{path}: {said}"))  # of a long line the middle is left out
  monkeypatch.setenv("HOME", str(tmp_path / "runs"))
  steps = ["runs/quickstart/", "~/quickstart", "runs/quickstart/checkpoints", "~/quickstart/checkpoints/20/"]
  params = [lladax.load(path).params for path in steps]
  jax.tree.map(np.testing.assert_array_equal, params, [params[0]] * 4)


def test_a_mask_that_config_json_does_not_name_is_looked_up(tmp_path):
  config = {name: value for name, value in WITH_TEXT.items() if name != "mask_token_id"}
  source = publish(tmp_path / "source", config)
  add_tokenizer(source, mask="<[MASK]>")
  assert lladax.load(source).mask_id == 258
  add_tokenizer(source, mask="<hole>")
  with pytest.raises(ValueError, match="mask_token_id is missing, and the tokenizer names no mask either"):
    lladax.load(source)
  (source / "config.json").write_text(json.dumps(WITH_TEXT | {"mask_token_id": 300}))
  with pytest.raises(ValueError, match="mask_token_id=300 is no token of tokenizer.json"):
    lladax.load(source)


def test_what_ends_a_text_without_tokenizer_files(tmp_path):
  source = publish(tmp_path / "source", LLADA | {"eos_token_id": [1, 7]})
  assert lladax.load(source).ends == (1, 7)
  (source / "generation_config.json").write_text(json.dumps({"eos_token_id": 9}))
  assert lladax.load(source).ends == (1, 7, 9)
  (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 256]}))
  assert "eos_token_id=256, and the embedding has 256 rows" in complaint(source)


def test_a_token_that_is_none_or_two(tmp_path):
  source = publish(tmp_path / "source", WITH_TEXT)
  add_tokenizer(source)

  def said(**changes):
    (source / "config.json").write_text(json.dumps({k: x for k, x in (WITH_TEXT | changes).items() if x is not None}))
    return complaint(source)

  assert said(eos_token_id=None).endswith(
    "eos_token_id=null is no token of tokenizer.json: say which it is, as eos_id=5"
  )
  assert said(pad_token_id=300).endswith("pad_token_id=300 is no token of tokenizer.json: leave it out")
  assert "token 258 is [MASK], and ends a text: say which is which, as mask_id=5" in said(eos_token_id=[257, 258])
  (source / "tokenizer.json").unlink()
  assert "token 258 is [MASK], and ends a text" in said(eos_token_id=258)


def test_a_block_is_no_longer_than_a_text(tmp_path):
  source = publish(tmp_path / "source", CONFIGS["SDAR"] | {"block_size": 129})
  assert complaint(source).endswith(
    "config.json: block_size=129: a block is longer than the longest text, of 128 tokens"
  )
  with pytest.raises(Mistake, match="^block=1000: a block is longer than the longest text, of 128 tokens"):
    lladax.load(source, block=1000)


@pytest.mark.parametrize("name", ["LLaDA-MoE", "Dream"])
def test_the_authors_options_fit_a_short_model(tmp_path, name):
  source = publish(tmp_path / "source", CONFIGS[name] | {"max_position_embeddings": 100})
  c = lladax.load(source).defaults
  assert c["gen_length"] == c["steps"] == (32 if name == "LLaDA-MoE" else 50)
  assert c["gen_length"] % c["block_length"] == 0


def test_hub_names(monkeypatch):
  import huggingface_hub
  from huggingface_hub import errors

  asked = []

  def download(name, revision, allow_patterns):
    asked.append((name, revision))
    assert {"*.safetensors", "*.json"} <= set(allow_patterns)
    return str(GOLDEN)

  monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
  names = ["hf://GSAI-ML/LLaDA-8B-Base", "hf://GSAI-ML/LLaDA-8B-Base/", "hf://GSAI-ML/LLaDA-8B-Base@refs/pr/1"]
  for name in (*names, pathlib.Path(names[0])):
    assert lladax.load(name).mask_id == 503
  repository = "GSAI-ML/LLaDA-8B-Base"
  assert asked == [(repository, None), (repository, None), (repository, "refs/pr/1"), (repository, None)]

  def refused(name, revision, allow_patterns):
    raise failure

  monkeypatch.setattr(huggingface_hub, "snapshot_download", refused)
  response = types.SimpleNamespace(headers={}, request=None)
  network = errors.HfHubHTTPError.__bases__[0]  # the base of all that the HTTP library raises
  for error, said in (
    (errors.LocalEntryNotFoundError("no network\nat all"), "no network"),
    (errors.GatedRepoError("403", response=response), "it is gated: ask for access on its page"),
    (errors.RepositoryNotFoundError("404", response=response), "there is no such repository on the hub, or it is"),
    (errors.RevisionNotFoundError("404", response=response), "the repository has no such revision"),
    (errors.HFValidationError("bad name"), "bad name"),
    (OSError(28, "No space left on device"), ".Errno 28. No space left on device"),
    (network("x" * 10_000), "x{300}…$"),
    (ConnectionError(), "ConnectionError$"),
  ):
    failure = error
    with pytest.raises(FileNotFoundError, match=f"^hf://OWNER/NAME@v1: {said}") as raised:
      lladax.load("hf://OWNER/NAME@v1")
    assert "\n" not in str(raised.value)
  failure = AttributeError("of a bug, not of the network")
  with pytest.raises(AttributeError):  # a crash stays one
    lladax.load("hf://OWNER/NAME")
