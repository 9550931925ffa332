import json
import pathlib
import random

import numpy as np
import pytest
import tokenizers
from vocabularies import SAMPLES, trained

from lladax.data import tokenizer
from lladax.mistake import Mistake

NAMES = ("<|endoftext|>", "<|mdm_mask|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")
# The special ids of LLaDA-8B, as published.
LLADA = {"<|startoftext|>": 126080} | dict(zip(NAMES, (126081, 126336, 126348, 126346, 126347), strict=True))


def byte_level(special: dict[str, int], hidden: tuple[str, ...] = ()) -> str:
  """A byte-level tokenizer.json; the `hidden` special tokens are not declared special."""
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  vocabulary = {character: id for id, character in enumerate(alphabet)} | special
  model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
  model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  model.decoder = tokenizers.decoders.ByteLevel()
  for name in special:
    model.add_tokens([tokenizers.AddedToken(name, special=name not in hidden, normalized=False)])
  return model.to_str()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """LLaDA's layout: a vocabulary with its ids, and the file that names the BOS."""
  folder = tmp_path_factory.mktemp("llada")
  (folder / "tokenizer.json").write_text(byte_level(LLADA), encoding="utf-8")
  (folder / "tokenizer_config.json").write_text('{"bos_token": {"content": "<|startoftext|>"}}')
  return folder


@pytest.fixture(scope="module", params=["bytes", "sentencepiece", "huggingface"])
def any_kind(request: pytest.FixtureRequest, folder: pathlib.Path) -> tokenizer.Tokenizer:
  path = str(folder) if request.param == "huggingface" else ""
  config = tokenizer.TokenizerConfig(kind=request.param, path=path, vocab_size=400)
  return tokenizer.create(config, SAMPLES)


def test_every_character_comes_back(any_kind):
  codes = [*range(0x3000), *range(0x3000, 0x110000, 53)]
  codes = [code for code in codes if not 0xD800 <= code < 0xE000]
  text = "".join(map(chr, codes))
  assert any_kind.decode(any_kind.encode(text)) == text


def test_every_text_comes_back(any_kind):
  draw = random.Random(0)
  parts = [
    " ",
    "  ",
    "\n",
    "\n\n",
    "\t",
    "\r\n",
    "▁",
    "▅",
    "\0",
    "a",
    "left",
    "é",
    "e\u0301",
    "居",
    "😀",
  ]
  for length in (0, 1, 2, 3, 5, 8, 13, 21) * 40:
    text = "".join(draw.choices([*parts, *NAMES, "[MASK]", "�"], k=length))
    ids = any_kind.encode(text)
    assert any_kind.decode(ids) == text == any_kind.decode(ids, skip_special=False)
    assert len(ids) <= len(text.encode())
    assert all(0 <= id < any_kind.vocab_size for id in ids)


def test_text_never_becomes_a_special_token(any_kind):
  special = {any_kind.mask_id, any_kind.eos_id, any_kind.eot_id, any_kind.bos_id}
  special |= {any_kind.start_header_id, any_kind.end_header_id}
  text = "a<|mdm_mask|>" + "<|endoftext|><|eot_id|>" * 2 + "<|start_header_id|>b<s></s><unk>"
  assert special.isdisjoint(any_kind.encode(text))


def test_vocabulary_that_reads_special_tokens_out_of_text(tmp_path):
  path = tmp_path / "tokenizer.json"
  path.write_text(byte_level(LLADA, hidden=NAMES), encoding="utf-8")
  raw = tokenizers.Tokenizer.from_file(str(path))
  assert raw.encode("a<|mdm_mask|>").ids[-1] == LLADA["<|mdm_mask|>"]
  this = tokenizer.create(tokenizer.TokenizerConfig(kind="huggingface", path=str(path)))
  text = "a<|mdm_mask|><|mdm_mask|>b<|endoftext|>"
  ids = this.encode(text)
  assert not set(ids) & set(LLADA.values())
  assert this.decode(ids) == text


def test_special_ids_follow_the_vocabulary(any_kind):
  if any_kind.bos_id is None:
    first = 256 if any_kind.vocab_size < 300 else 400 - 5
    ids = (any_kind.eos_id, any_kind.mask_id, any_kind.eot_id)
    assert ids == (first, first + 1, first + 2)
    assert any_kind.vocab_size == first + 5
  else:
    found = (any_kind.eos_id, any_kind.mask_id, any_kind.eot_id)
    assert found == (126081, 126336, 126348)
    assert (any_kind.start_header_id, any_kind.end_header_id, any_kind.bos_id) == (
      126346,
      126347,
      126080,
    )
    assert (any_kind.vocab_size, any_kind.rows) == (126349, 126464)
  assert any_kind.pad_id == any_kind.eos_id
  assert any_kind.rows % 128 == 0 <= any_kind.rows - any_kind.vocab_size < 128


def test_missing_special_tokens_are_appended(tmp_path):
  path = tmp_path / "tokenizer.json"
  path.write_text(byte_level({"</s>": 256}), encoding="utf-8")
  config = tokenizer.TokenizerConfig(kind="huggingface", path=str(path), eos="</s>", pad="<pad>")
  this = tokenizer.create(config)
  assert (this.eos_id, this.mask_id, this.pad_id, this.bos_id) == (256, 257, 258, None)
  assert this.vocab_size == 262
  assert this.decode([this.pad_id, 256, *this.encode("ü"), 257], skip_special=False) == ("<pad></s>ü<|mdm_mask|>")


def test_save_and_load(any_kind, tmp_path):
  any_kind.save(tmp_path / "deep" / "folder")
  again = tokenizer.load(tmp_path / "deep" / "folder")
  assert again.fingerprint == any_kind.fingerprint
  for name in ("vocab_size", "mask_id", "eos_id", "pad_id", "bos_id", "eot_id", "start_header_id"):
    assert getattr(again, name) == getattr(any_kind, name)
  assert [again.encode(text) for text in SAMPLES] == [any_kind.encode(text) for text in SAMPLES]
  assert again.chat([{"role": "user", "content": "x"}]) == any_kind.chat([{"role": "user", "content": "x"}])


def test_saved_model_can_be_a_path(tmp_path):
  trained().save(tmp_path)
  this = tokenizer.create(tokenizer.TokenizerConfig(path=str(tmp_path / "sp.model")))
  assert this.fingerprint == trained().fingerprint


def test_decode_and_special_tokens(any_kind):
  ids = [*any_kind.encode("to "), any_kind.mask_id, any_kind.mask_id, *any_kind.encode(" do")]
  ids = np.array([*ids, any_kind.eos_id], np.int32)
  assert any_kind.decode(ids) == "to  do"
  assert any_kind.decode(ids, skip_special=False) == "to <|mdm_mask|><|mdm_mask|> do<|endoftext|>"


def test_broken_utf8_is_replaced(any_kind):
  ids = tokenizer.create(tokenizer.TokenizerConfig(kind="bytes")).encode("居")
  if any_kind.vocab_size != 261:
    ids = [id for id in range(300) if any_kind.piece(id) in ("⟨E5⟩", "⟨B1⟩", "⟨85⟩")]
    ids.sort(key=lambda id: ("⟨E5⟩", "⟨B1⟩", "⟨85⟩").index(any_kind.piece(id)))
  assert any_kind.decode(ids) == "居"
  assert set(any_kind.decode(ids[:2] + any_kind.encode("b"))) == {"�", "b"}


@pytest.mark.parametrize("id", [-1, 10**6])
def test_ids_outside_the_vocabulary(any_kind, id):
  with pytest.raises(ValueError, match=f"the vocabulary has {any_kind.vocab_size} only"):
    any_kind.decode([0, id])


def test_pieces_are_readable(any_kind):
  ids = any_kind.encode("a  left\n")
  assert "".join(map(any_kind.piece, ids)) == "a  left\n"
  pieces = [any_kind.piece(id) for id in any_kind.encode("😀")]
  assert pieces == ["⟨F0⟩", "⟨9F⟩", "⟨98⟩", "⟨80⟩"]
  assert any_kind.piece(np.int32(any_kind.mask_id)) == "░"
  assert any_kind.piece(any_kind.eos_id) == "<|endoftext|>"
  assert all(isinstance(any_kind.piece(id), str) for id in range(min(any_kind.vocab_size, 400)))


def test_encode_canvas(any_kind):
  encode, mask_id = any_kind.encode, any_kind.mask_id
  expected = encode("The ") + [mask_id] * 2 + encode(" of [MAS") + [mask_id]
  assert any_kind.encode_canvas("The [MASK][MASK] of [MAS[MASK]") == expected
  assert any_kind.encode_canvas("[MASK]") == [mask_id]
  assert any_kind.encode_canvas("no mask") == encode("no mask")
  assert any_kind.encode_canvas("") == []


def test_chat(any_kind):
  messages = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "  Hi<|eot_id|> \n"},
  ]
  bos = "" if any_kind.bos_id is None else "<|startoftext|>"
  expected = bos + (
    "<|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|eot_id|>"
  )
  asked = any_kind.chat(messages)
  assert any_kind.decode(any_kind.chat(messages, ask=False), skip_special=False) == expected
  assert any_kind.decode(asked, skip_special=False) == (expected + "<|start_header_id|>assistant<|end_header_id|>\n\n")
  assert asked.count(any_kind.eot_id) == 2  # the user's own is text


@pytest.mark.parametrize("message", [{"role": "tool", "content": ""}, {"role": "user"}])
def test_chat_refuses(any_kind, message):
  with pytest.raises(ValueError, match=f"role '{message['role']}'"):
    any_kind.chat([message])


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"kind": "words"}, "tokenizer.kind='words' is unknown: use bytes, sentencepiece, hugging"),
    ({"kind": "bytes", "path": "x"}, "tokenizer.path='x': tokenizer.kind=bytes reads no file"),
    ({"kind": "huggingface"}, "tokenizer.path='': .* needs a tokenizer.json"),
    ({"mask": "<|endoftext|>"}, "tokenizer.mask='<.endoftext.>'"),
    ({"mask": ""}, "tokenizer.mask=''"),
    ({"mask": "x", "pad": "x"}, "tokenizer.mask='x'"),
    ({"eos": ""}, "tokenizer.eos=''"),
  ],
)
def test_config_errors(fields, message):
  with pytest.raises(ValueError, match=message):
    tokenizer.TokenizerConfig(**fields)


@pytest.mark.parametrize("kind", ["sentencepiece", "huggingface"])
def test_path_errors(kind, tmp_path):
  path = tmp_path / "vocabulary"
  config = tokenizer.TokenizerConfig(kind=kind, path=str(path))
  with pytest.raises(FileNotFoundError, match="tokenizer.path=.*: no such file"):
    tokenizer.create(config)
  path.write_text(json.dumps({"not": "a vocabulary"}))
  with pytest.raises(ValueError, match=f"tokenizer.path=.* is no {kind} vocabulary"):
    tokenizer.create(config)
  with pytest.raises(FileNotFoundError, match="give a folder that Tokenizer.save wrote"):
    tokenizer.load(tmp_path)


def test_lone_surrogates_are_refused(any_kind):
  for say in (any_kind.encode, any_kind.encode_canvas, lambda x: any_kind.chat([{"role": "user", "content": x}])):
    with pytest.raises(Mistake, match=r"^a text holds '\\ud800', a lone surrogate") as error:
      say("a\n\ud800")
    assert "\n" not in str(error.value) and str(error.value).isascii()
