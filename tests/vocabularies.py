"""Vocabularies of every kind, made here; folders that speak in a template of their own; a stream of numbers."""

import io
import json
import pathlib

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from lladax.data import tokenizer

TEXTS = ["The capital of France is Paris. the king of France, and the cat sat on the mat\n\n  The end.\t秦川"] * 9
SPECIAL = ["<s>", "</s>", "<|mdm_mask|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
ALPHABET = sorted({character for text in TEXTS for character in text})


def sentencepiece(model_type="bpe", **options):
  import sentencepiece as library

  model = io.BytesIO()
  options = {"byte_fallback": True, "remove_extra_whitespaces": False, "normalization_rule_name": "identity"} | options
  library.SentencePieceTrainer.train(
    sentence_iterator=iter(TEXTS), model_writer=model, model_type=model_type, vocab_size=330, hard_vocab_limit=False,
    character_coverage=1.0, minloglevel=2, **options,
  )  # fmt: skip
  return "sentencepiece", model.getvalue()


def merged(vocabulary, texts, **options):
  """A BPE model of characters, with the merges that spell the texts' words."""
  vocabulary, merges = dict(vocabulary), []
  for word in texts:
    for i in range(1, len(word)):
      if word[: i + 1] not in vocabulary:
        merges.append((word[:i], word[i]))
        vocabulary[word[: i + 1]] = len(vocabulary)
  return models.BPE(vocabulary, merges, **options)


WORDS = ["▁The", "▁Paris", "▁of", "▁France", "▁is", "▁▁", "ing"]


def fallback(normalizer=None, pre_tokenizer=None, decoder=None):
  """Llama-2's kind: characters and merges, bytes for what is unknown."""
  pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
  pieces += [character for character in ALPHABET if character not in "\n\t ▁秦川"]
  options = {"byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>"}
  model = tokenizers.Tokenizer(merged({x: i for i, x in enumerate(pieces)}, WORDS, **options))
  if normalizer:
    model.normalizer = normalizer
  if pre_tokenizer:
    model.pre_tokenizer = pre_tokenizer
  strip = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
  model.decoder = decoder or decoders.Sequence(strip)
  return model


def published(model):
  model.add_special_tokens(SPECIAL)
  return "huggingface", model.to_str().encode()


def prepend():
  return published(fallback(normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])))


def metaspace(scheme):
  keep = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
  split = pre_tokenizers.Metaspace(prepend_scheme=scheme)
  return published(fallback(None, split, keep if scheme == "never" else None))


def byte_level(add_prefix_space):
  alphabet = {x: i for i, x in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
  model = tokenizers.Tokenizer(merged(alphabet, ["ĠThe", "ĠParis", "ing", "ĠĠ"]))
  model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
  model.decoder = decoders.ByteLevel()
  return published(model)


def unigram():
  """T5's kind: words are split at spaces before each gets its own; no bytes, one unknown for many characters."""
  pieces = ["<unk>", "▁", *(x for x in ALPHABET if x not in " \n\t▁秦川"), *WORDS]
  model = tokenizers.Tokenizer(models.Unigram([(x, -5.0 if len(x) == 1 else -2.0) for x in pieces], 0))
  model.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
  model.decoder = decoders.Metaspace()
  return published(model)


def wordpiece():
  pieces = ["[UNK]", "the", "play", "##ing", "is", "paris", ".", *"abcdefghij", *(f"##{x}" for x in "abcdefghij")]
  model = tokenizers.Tokenizer(models.WordPiece({x: i for i, x in enumerate(pieces)}, unk_token="[UNK]"))
  model.normalizer = normalizers.BertNormalizer(lowercase=True)
  model.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  model.decoder = decoders.WordPiece()
  return published(model)


# What comes back letter for letter; and what a vocabulary changes in reading it.
EXACT = {
  "bytes": lambda: ("bytes", b""),
  "sentencepiece bpe": sentencepiece,
  "sentencepiece unigram": lambda: sentencepiece("unigram"),
  "sentencepiece plain": lambda: sentencepiece(add_dummy_prefix=False),
  "prepend": prepend,
  "metaspace always": lambda: metaspace("always"),
  "metaspace first": lambda: metaspace("first"),
  "metaspace never": lambda: metaspace("never"),
  "byte level": lambda: byte_level(False),
}
LOSSY = {
  "sentencepiece stripped": lambda: sentencepiece(remove_extra_whitespaces=True),
  "sentencepiece unknown": lambda: sentencepiece(byte_fallback=False),
  "byte level prefixed": lambda: byte_level(True),
  "unigram": unigram,
  "wordpiece": wordpiece,
}
NAMES = {"eos": "</s>", "mask": "<|mdm_mask|>", "pad": "", "bos": ""}


def make(builder):
  kind, content = builder()
  return tokenizer.Tokenizer(tokenizer.KINDS[kind](content), NAMES)


SAYINGS = [
  "Paris.",
  " Paris.",
  "  Paris",
  "\nParis",
  "\n\n",
  "\t",
  " ",
  "  ",
  "秦川雄帝宅",
  "é",
  "😀",
  " 😀😀",
  "ing",
  "",
  "▁a",
]
_made = {}


def made(name):
  if name not in _made:
    _made[name] = make(EXACT[name])
  return _made[name]


# The shapes that published templates have, each with the control tokens of its vocabulary.
CHATML = (
  "{%- for m in messages %}\n{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}\n"
  "{%- endfor %}\n{%- if add_generation_prompt %}\n{{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n"
)
KINDS = {"prepend": prepend, "first": lambda: metaspace("first"), "always": lambda: metaspace("always"),
         "bytes": lambda: byte_level(False), "prefixed": lambda: byte_level(True)}  # fmt: skip


BARE = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "model_max_length": 9}


def folder_of(path, kind, source, names, where="tokenizer_config.json", config=BARE, lowercase=False):
  """A published folder's tokenizer: names with a + in front are added tokens that are not called special."""
  model = tokenizers.Tokenizer.from_str(KINDS[kind]()[1].decode())
  model.add_tokens([tokenizers.AddedToken(x.lstrip("+"), special=x[0] != "+", normalized=lowercase) for x in names])
  if lowercase:
    model.normalizer = normalizers.Lowercase()
  path.mkdir(parents=True, exist_ok=True)
  model.save(str(path / "tokenizer.json"))
  content = config if source is None else config | {"chat_template": source}
  if where == "chat_template.jinja":
    (path / where).write_text(source)
    content = config | {"chat_template": "the old one"}
  elif where == "chat_template.json":
    (path / where).write_text(json.dumps({"chat_template": source}))
    content = config
  (path / "tokenizer_config.json").write_text(json.dumps(content))
  return path


SAMPLES = [
  "def add(left, right):\n\n    return left + right  # the sum\n",
  "  Über den Wolken,\tmuß die Freiheit   wohl grenzenlos sein.  ",
  "秦川雄帝宅，函谷壮皇居。\r\n绮殿千寻起，离宫百雉余。",
  pathlib.Path(json.__file__).read_text(encoding="utf-8"),
]


def trained(vocab_size: int = 400, **fields) -> tokenizer.Tokenizer:
  return tokenizer.create(tokenizer.TokenizerConfig(vocab_size=vocab_size, **fields), SAMPLES)
