"""Text to token ids and back: bytes, SentencePiece, or a Hugging Face tokenizer.json.

Special tokens ([MASK], EOS, the three of the chat template, BOS if there is one) are looked up by
name in the vocabulary, and appended behind it where it lacks them, so any vocabulary can serve.
They enter a canvas as ids only: a text that spells a special token's name is encoded as text.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import json
import pathlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from lladax.mistake import Missing, Mistake

START_HEADER, END_HEADER, EOT = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
ROLES = ("system", "user", "assistant")
_MODEL_TYPE = "bpe"
_TRAINING_BYTES = 10_000_000  # unigram takes half a minute for these, and gains 1% from 10 MB
SETTINGS = "lladax_tokenizer.json"
_SPACE = "\u2581"  # how SentencePiece writes a space inside its pieces


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
  """Which vocabulary, and the names of its special tokens (the defaults are LLaDA's)."""

  kind: str = "sentencepiece"  # bytes | sentencepiece | huggingface
  path: str = ""  # a .model or tokenizer.json; "" with sentencepiece: train one on the corpus
  vocab_size: int = 1024  # of the vocabulary to train, special tokens included
  eos: str = "<|endoftext|>"
  mask: str = "<|mdm_mask|>"
  pad: str = ""  # "": the EOS, as in LLaDA

  def __post_init__(self):
    if self.kind not in _KINDS:
      raise Mistake(f"tokenizer.kind={self.kind!r} is unknown: use {', '.join(_KINDS)}")
    if self.path and self.kind == "bytes":
      raise Mistake(f"tokenizer.path={self.path!r}: tokenizer.kind=bytes reads no file")
    if not self.path and self.kind == "huggingface":
      raise Mistake("tokenizer.path='': tokenizer.kind=huggingface needs a tokenizer.json")
    if not self.eos:
      raise Mistake("tokenizer.eos='': name the token that ends a text")
    if self.mask in ("", self.eos, self.pad):
      raise Mistake(f"tokenizer.mask={self.mask!r}: [MASK] needs a name of its own")


class Tokenizer:
  """A vocabulary and its special tokens; made by `create` or `load`.

  Attributes: `vocab_size`, ids in use; `rows`, embedding rows: `vocab_size` rounded up to a
  multiple of 128; `mask_id`, `eos_id`, `pad_id`, `eot_id`, `start_header_id`, `end_header_id`;
  `bos_id`, None without one; `fingerprint`, a hash of the vocabulary and its special tokens.
  """

  def __init__(self, vocabulary: _Bytes | _SentencePiece | _HuggingFace, names: Mapping[str, str]):
    """`names` is what `save` writes: eos, mask, pad ("": the EOS), bos ("": none)."""
    self._vocabulary, self._names = vocabulary, dict(names)
    self.vocab_size: int = vocabulary.size
    ids: dict[str, int] = {}
    for name in (*names.values(), EOT, START_HEADER, END_HEADER):
      if name and name not in ids:
        found = vocabulary.find(name)
        ids[name] = self.vocab_size if found is None else found
        self.vocab_size += found is None
    self.rows: int = -(-self.vocab_size // 128) * 128
    self.eos_id, self.mask_id = ids[names["eos"]], ids[names["mask"]]
    self.pad_id, self.bos_id = ids[names["pad"] or names["eos"]], ids.get(names["bos"])
    self.eot_id = ids[EOT]
    self.start_header_id, self.end_header_id = ids[START_HEADER], ids[END_HEADER]
    self._special = vocabulary.special | {id: name for name, id in ids.items()}
    self._spelled = re.compile(f"(?={'|'.join(map(re.escape, self._special.values()))})")
    identity = json.dumps([vocabulary.kind, self._names, sorted(self._special.items())])
    self.fingerprint: str = hashlib.sha256(identity.encode() + vocabulary.content).hexdigest()[:16]

  def encode(self, text: str) -> list[int]:
    """Ids of plain text: no BOS, no EOS, and never a special token, whatever the text spells."""
    text.encode()  # a lone surrogate is a ValueError here, and not the backend's riddle
    ids = self._vocabulary.encode(text)
    if self._special.keys().isdisjoint(ids):
      return ids
    # This vocabulary reads special tokens out of text: let it see no name in one piece.
    cuts = [match.start() + 1 for match in self._spelled.finditer(text)]
    pieces = (text[i:j] for i, j in itertools.pairwise([0, *cuts, len(text)]))
    return [id for piece in pieces for id in self._vocabulary.encode(piece)]

  def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
    """Text of ids; special tokens are dropped or written by name, broken UTF-8 becomes U+FFFD."""
    ids = [int(id) for id in ids]
    if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
      raise Mistake(f"ids {min(ids)} to {max(ids)}: the vocabulary has {self.vocab_size} only")
    if skip_special:
      return self._vocabulary.decode([id for id in ids if id not in self._special])
    runs = itertools.groupby(ids, key=self._special.__contains__)
    return "".join(
      "".join(self._special[id] for id in run) if special else self._vocabulary.decode(list(run))
      for special, run in runs
    )

  def piece(self, id: int) -> str:
    """One token as readable text, for drawings: [MASK] is ░, a part of a character is ⟨E4⟩."""
    id = int(id)
    return "░" if id == self.mask_id else self._special.get(id) or self._vocabulary.piece(id)

  def encode_canvas(self, text: str) -> list[int]:
    """Ids of text in which every literal `[MASK]` stands for one token to fill in."""
    first, *others = map(self.encode, text.split("[MASK]"))
    return first + [id for ids in others for id in (self.mask_id, *ids)]

  def chat(self, messages: Iterable[Mapping[str, str]], ask: bool = True) -> list[int]:
    """Ids of a conversation in LLaDA's template; `ask` opens the assistant's next reply."""
    ids = [] if self.bos_id is None else [self.bos_id]
    for message in messages:
      ids += self.message(message)
    return ids + self._turn("assistant", "") if ask else ids

  def message(self, message: Mapping[str, str]) -> list[int]:
    """Ids of one message of a conversation, up to its EoT."""
    role, content = message.get("role"), message.get("content")
    if role not in ROLES or not isinstance(content, str):
      raise Mistake(f"a message of role {role!r}: use {', '.join(ROLES)}, and a text as content")
    return [*self._turn(role, content.strip()), self.eot_id]

  def reply(self, text: str) -> list[int]:
    """Ids of a reply behind `chat(..., ask=True)`, up to its EoT."""
    return [*self.encode(text.strip()), self.eot_id]

  def _turn(self, role: str, text: str) -> list[int]:
    header = [self.start_header_id, *self.encode(role), self.end_header_id]
    return header + self.encode("\n\n" + text)

  def __reduce__(self):
    """Pickles as what `save` writes, so that other processes can have it."""
    return _rebuild, (self._vocabulary.kind, self._vocabulary.content, self._names)

  def save(self, folder: str | pathlib.Path) -> None:
    """Writes all that `load` needs into the folder."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if self._vocabulary.file:
      (folder / self._vocabulary.file).write_bytes(self._vocabulary.content)
    settings = {"kind": self._vocabulary.kind, "names": self._names}
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def load(folder: str | pathlib.Path) -> Tokenizer:
  """The tokenizer that `Tokenizer.save` wrote into the folder."""
  path = pathlib.Path(folder) / SETTINGS
  if not path.is_file():
    raise Missing(f"{path}: no such file; give a folder that Tokenizer.save wrote")
  settings = json.loads(path.read_text(encoding="utf-8"))
  kind = _KINDS[settings["kind"]]
  content = path.with_name(kind.file).read_bytes() if kind.file else b""
  return Tokenizer(kind(content), settings["names"])


def _rebuild(kind: str, content: bytes, names: Mapping[str, str]) -> Tokenizer:
  return Tokenizer(_KINDS[kind](content), names)


def create(config: TokenizerConfig, texts: Sequence[str] | None = None) -> Tokenizer:
  """The tokenizer of a config; SentencePiece without a path is trained on `texts`, the corpus.

  Raises:
    Missing: no file at `config.path`.
    Mistake: the file is of another kind, or `vocab_size` does not suit the corpus.
  """
  names = {"eos": config.eos, "mask": config.mask, "pad": config.pad, "bos": ""}
  if config.kind == "bytes":
    return Tokenizer(_Bytes(), names)
  if not config.path:
    specials = len({config.eos, config.mask, config.pad or config.eos, EOT, START_HEADER, END_HEADER})
    return Tokenizer(_SentencePiece(_train(texts or (), config.vocab_size, specials)), names)
  path = pathlib.Path(config.path).expanduser()
  if config.kind == "huggingface" and path.is_dir():
    path /= "tokenizer.json"
  if not path.is_file():
    raise Missing(f"tokenizer.path={config.path!r}: no such file")
  try:
    vocabulary = _KINDS[config.kind](path.read_bytes())
  except Exception as error:  # the libraries raise bare Exception and RuntimeError
    raise Mistake(f"tokenizer.path={config.path!r} is no {config.kind} vocabulary") from error
  names["bos"] = vocabulary.bos
  beside = path.with_name("tokenizer_config.json")
  if config.kind == "huggingface" and beside.is_file():
    bos = json.loads(beside.read_text(encoding="utf-8")).get("bos_token") or ""
    names["bos"] = bos if isinstance(bos, str) else bos["content"]
  return Tokenizer(vocabulary, names)


def _train(texts: Sequence[str], vocab_size: int, specials: int) -> bytes:
  """A SentencePiece model of vocab_size - specials pieces; every text survives the round trip."""
  import sentencepiece

  if vocab_size < (least := specials + 256 + 3):  # <unk>, the newline and one more
    raise Mistake(f"tokenizer.vocab_size={vocab_size}: needs {least}, for bytes and specials")
  # SentencePiece drops lines of over 4192 bytes: cut them. Of a large corpus, take every n-th line.
  lines = (line for text in texts for line in text.split("\n"))
  lines = (line[i : i + 1000] for line in lines for i in range(0, len(line), 1000))
  stride = -(-sum(len(text.encode()) for text in texts) // _TRAINING_BYTES)
  lines = list(itertools.islice(lines, 0, None, max(1, stride)))
  # It gives a piece to every character it sees (in Chinese these are more than vocab_size), and
  # reads four of them as marks of its own. Let it see the frequent ones; bytes spell the others.
  counts = Counter(itertools.chain.from_iterable(lines))
  rare = dict.fromkeys(map(ord, counts), "\n")
  for mark in ("\0", "\t", _SPACE, "\u2585"):
    counts.pop(mark, None)
  left = counts.total()
  few = 0.0005 * left
  for character, count in counts.most_common(-(-(vocab_size - least + 1) * 9 // 10)):
    if left > few:
      del rare[ord(character)]
    left -= count
  lines = [line for line in "\n".join(lines).translate(rare).split("\n") if line]
  if not lines:
    raise Mistake("tokenizer.path='': no text to train on; give a corpus, or a .model as path")
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(lines),
      model_writer=model,
      model_type=_MODEL_TYPE,
      vocab_size=vocab_size - specials,
      character_coverage=1.0,
      byte_fallback=True,
      normalization_rule_name="identity",
      add_dummy_prefix=False,
      remove_extra_whitespaces=False,
      allow_whitespace_only_pieces=True,
      user_defined_symbols=["\n"],
      bos_id=-1,
      eos_id=-1,
      num_threads=4,  # a constant: the rounding of unigram's scores depends on it
      minloglevel=2,
    )
  except RuntimeError as error:
    possible = re.search(r"value <= (\d+)", str(error))
    if not possible:
      raise
    error = f"this corpus allows at most {int(possible[1]) + specials}"
    raise Mistake(f"tokenizer.vocab_size={vocab_size}: {error}") from None
  return model.getvalue()


class _Bytes:
  """Every byte of UTF-8 is a token: nothing to train, nothing to store."""

  kind, file, bos, size = "bytes", "", "", 256
  special: dict[int, str] = {}

  def __init__(self, content: bytes = b""):
    self.content = content

  def find(self, name: str) -> int | None:
    return None

  def encode(self, text: str) -> list[int]:
    return list(text.encode())

  def decode(self, ids: list[int]) -> str:
    return bytes(ids).decode(errors="replace")

  def piece(self, id: int) -> str:
    return _show(bytes([id]))


class _SentencePiece:
  """A SentencePiece model, trained here or elsewhere."""

  kind, file = "sentencepiece", "sp.model"

  def __init__(self, content: bytes):
    import sentencepiece

    self.content = content
    self._model = model = sentencepiece.SentencePieceProcessor(model_proto=content)
    self.size: int = len(model)
    self.special = {id: model.id_to_piece(id) for id in range(self.size) if model.is_control(id)}
    self.bos = self.special.get(model.bos_id(), "")
    # The character U+2581 would come back as a space: spell it in bytes, in a model that has bytes
    # and puts no space before a text.
    block = [model.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
    prefixed = model.encode("a", out_type=str)[0].startswith(_SPACE)
    self._block = block if all(map(model.is_byte, block)) and not prefixed else []

  def find(self, name: str) -> int | None:
    id = self._model.piece_to_id(name)
    return id if self._model.id_to_piece(id) == name else None

  def encode(self, text: str) -> list[int]:
    if not self._block or _SPACE not in text:
      return self._model.encode(text)
    first, *others = map(self._model.encode, text.split(_SPACE))
    return first + [id for ids in others for id in (*self._block, *ids)]

  def decode(self, ids: list[int]) -> str:
    return self._model.decode(ids)

  def piece(self, id: int) -> str:
    piece = self._model.id_to_piece(id)
    byte = self._model.is_byte(id)
    return _show(bytes.fromhex(piece[3:5])) if byte else piece.replace(_SPACE, " ")


class _HuggingFace:
  """A Hugging Face tokenizer.json."""

  kind, file, bos = "huggingface", "tokenizer.json", ""

  def __init__(self, content: bytes):
    import tokenizers

    self.content = content
    self._model = model = tokenizers.Tokenizer.from_str(content.decode())
    model.encode_special_tokens = True  # "<|eot_id|>" in a text is text
    model.no_truncation()
    model.no_padding()
    self.size = 1 + max(model.get_vocab(with_added_tokens=True).values())
    added = model.get_added_tokens_decoder()
    self.special = {id: token.content for id, token in added.items() if token.special}
    # Byte-level vocabularies write a byte as itself if it prints, else as a character past U+00FF.
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    printing = [ord(character) for character in alphabet if ord(character) < 256]
    others = [byte for byte in range(256) if byte not in printing]
    self._byte = dict(zip(alphabet, printing + others, strict=True))

  def find(self, name: str) -> int | None:
    return self._model.token_to_id(name)

  def encode(self, text: str) -> list[int]:
    return self._model.encode(text, add_special_tokens=False).ids

  def decode(self, ids: list[int]) -> str:
    return self._model.decode(ids, skip_special_tokens=False)

  def piece(self, id: int) -> str:
    token = self._model.id_to_token(id) or ""
    if byte := re.fullmatch("<0x([0-9A-F]{2})>", token):
      return _show(bytes.fromhex(byte[1]))
    text = self._model.decode([id], skip_special_tokens=False)
    if "\ufffd" in text and self._byte.keys() >= set(token):
      return _show(bytes(self._byte[character] for character in token))
    return token.replace(_SPACE, " ") if token.startswith(_SPACE) else text


_KINDS = {kind.kind: kind for kind in (_Bytes, _SentencePiece, _HuggingFace)}


def _show(content: bytes) -> str:
  """Bytes as text, or as ⟨E4⟩ where they are a part of a character."""
  try:
    return content.decode()
  except UnicodeDecodeError:
    return "".join(f"⟨{byte:02X}⟩" for byte in content)
