"""Kinds of vocabularies: text to ids and back, without special tokens; and how one is trained.

Each has `content`, the bytes of its `file`; its `size`; `special`, its control tokens, and `added`, those that it calls
added, id -> name; and `bos`, the name of its BOS, or "".
"""

import functools
import io
import itertools
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from lladax.mistake import Mistake

_MODEL_TYPE = "bpe"
_TRAINING_BYTES = 10_000_000  # unigram takes half a minute for these, and gains 1% from 10 MB
_SPACE = "\u2581"  # how SentencePiece writes a space inside its pieces
_LONGEST_NAME = 500  # characters of an added token: what a message may spell is looked for in all parts of names
_BYTE = re.compile("<0x([0-9A-F]{2})>")  # how vocabularies of characters spell a byte


class Bytes:
  """Every byte of UTF-8 is a token: nothing to train, nothing to store."""

  kind, file, bos, size = "bytes", "", "", 256
  special: dict[int, str] = {}
  added: dict[int, str] = {}

  def __init__(self, content: bytes = b""):
    self.content = content

  def find(self, name: str) -> int | None:
    """The id of a name; None without it."""
    return None

  def encode(self, text: str, begins: bool) -> list[int]:
    """Ids of a text that begins, or stands behind another."""
    return list(text.encode())

  def decode(self, ids: list[int]) -> str:
    """Text of ids."""
    return bytes(ids).decode(errors="replace")

  def piece(self, id: int) -> str:
    """One token as readable text."""
    return _show(bytes([id]))


class SentencePiece:
  """A SentencePiece model, trained here or elsewhere."""

  kind, file = "sentencepiece", "sp.model"
  added: dict[int, str] = {}

  def __init__(self, content: bytes):
    import sentencepiece

    self.content = content
    self._model = model = sentencepiece.SentencePieceProcessor(model_proto=content)
    self.size: int = len(model)
    if not 0 <= model.unk_id() < self.size:
      raise ValueError("it has no piece for what is unknown")
    self.special = {id: model.id_to_piece(id) for id in range(self.size) if model.is_control(id)}
    self.bos = self.special.get(model.bos_id(), "")
    # The character U+2581 would come back as a space: spell it in bytes, in a model that has bytes
    # and puts no space before a text.
    block = [model.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
    prefixed = model.encode("a", out_type=str)[0].startswith(_SPACE)
    self._block = block if all(map(model.is_byte, block)) and not prefixed else []
    # The same model for what stands behind a text: the fields behind a serialised message are merged into it, and
    # these are normalizer_spec.add_dummy_prefix = false.
    plain = content + b"\x1a\x02\x18\x00"
    self._inner = sentencepiece.SentencePieceProcessor(model_proto=plain) if prefixed else model
    self._strips = model.encode("  a") == model.encode("a")  # spaces at the front, and the prefix stands for them

  def find(self, name: str) -> int | None:
    """As `Bytes.find`."""
    id = self._model.piece_to_id(name)
    return id if self._model.id_to_piece(id) == name else None

  def encode(self, text: str, begins: bool) -> list[int]:
    """As `Bytes.encode`."""
    if not self._block or _SPACE not in text:
      return (self._model if begins or (self._strips and text[:1].isspace()) else self._inner).encode(text)
    first, *others = map(self._model.encode, text.split(_SPACE))
    return first + [id for ids in others for id in (*self._block, *ids)]

  def decode(self, ids: list[int]) -> str:
    """As `Bytes.decode`."""
    return self._model.decode(ids)

  def piece(self, id: int) -> str:
    """As `Bytes.piece`."""
    piece = self._model.id_to_piece(id)
    byte = self._model.is_byte(id)
    return _show(bytes.fromhex(piece[3:5])) if byte else piece.replace(_SPACE, " ")


class HuggingFace:
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
    if (longest := max((len(token.content) for token in added.values()), default=0)) > _LONGEST_NAME:
      raise ValueError(f"an added token of {longest:,} characters")
    self.special = {id: token.content for id, token in added.items() if token.special}
    self.added = {id: token.content for id, token in added.items()}
    # Byte-level vocabularies write a byte as itself if it prints, else as a character past U+00FF.
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    printing = [ord(character) for character in alphabet if ord(character) < 256]
    others = [byte for byte in range(256) if byte not in printing]
    self._byte = dict(zip(alphabet, printing + others, strict=True))
    self._prefixes = self._inner(model, "a") != model.encode("a", add_special_tokens=False).ids

  def find(self, name: str) -> int | None:
    """As `Bytes.find`."""
    return self._model.token_to_id(name)

  def encode(self, text: str, begins: bool) -> list[int]:
    """As `Bytes.encode`."""
    if not begins and self._prefixes and text:
      return self._inner(self._model, text)
    return self._model.encode(text, add_special_tokens=False).ids

  def _inner(self, model: Any, text: str) -> list[int]:
    """Ids of what stands behind a text: behind a character that shares no token with it, without that."""
    for before in ("\ue000", ".", "a"):
      alone, whole = (model.encode(x, add_special_tokens=False) for x in (before, before + text))
      n = len(alone.ids)
      cut = whole.offsets[n - 1 : n + 1]
      if n and whole.ids[:n] == alone.ids and cut[0][1] <= 1 and all(begin >= 1 for begin, _ in cut[1:]):
        return whole.ids[n:]
    return model.encode(text, add_special_tokens=False).ids

  @functools.cached_property
  def _controlled(self) -> Any:
    """The model that reads special tokens out of text."""
    import tokenizers

    model = tokenizers.Tokenizer.from_str(self.content.decode())
    model.no_truncation()
    model.no_padding()
    return model

  def read(self, text: str, begins: bool) -> list[int]:
    """Ids of a text in which control tokens are spelled, letter for letter: what becomes one otherwise is text."""
    whole = self._controlled.encode(text, add_special_tokens=False)
    for id, (begin, end) in zip(whole.ids, whole.offsets, strict=True):
      name = self.added.get(id)
      if name is not None and text[begin:end].strip() != name.strip():  # a normalizer has made it
        if end - begin < 2:
          return self.encode(text, begins)
        return self.read(text[: begin + 1], begins) + self.read(text[begin + 1 :], False)
    return whole.ids if begins or not self._prefixes or not text else self._inner(self._controlled, text)

  def begins_behind(self, name: str) -> bool:
    """Whether the vocabulary begins a text anew behind a special token."""
    behind = self._controlled.encode(name + "a", add_special_tokens=False).ids[1:]
    return behind == self._model.encode("a", add_special_tokens=False).ids

  def decode(self, ids: list[int]) -> str:
    """As `Bytes.decode`."""
    text = self._model.decode(ids, skip_special_tokens=False)
    decoder = self._model.decoder
    if "\ufffd" not in text or not decoder or not any(_BYTE.fullmatch(self._token(id)) for id in ids):
      return text
    # The library gives up a whole run of bytes for one that is broken: make characters of the others here.
    tokens: list[str] = []
    for is_byte, run in itertools.groupby(map(self._token, ids), key=lambda token: bool(_BYTE.fullmatch(token))):
      spelled = list(run)
      tokens += [bytes(int(x[3:5], 16) for x in spelled).decode(errors="replace")] if is_byte else spelled
    return decoder.decode(tokens)

  def _token(self, id: int) -> str:
    return self._model.id_to_token(id) or ""

  def piece(self, id: int) -> str:
    """As `Bytes.piece`."""
    token = self._token(id)
    if byte := _BYTE.fullmatch(token):
      return _show(bytes.fromhex(byte[1]))
    text = self._model.decode([id], skip_special_tokens=False)
    if "\ufffd" in text and self._byte.keys() >= set(token):
      return _show(bytes(self._byte[character] for character in token))
    return token.replace(_SPACE, " ") if token.startswith(_SPACE) else text


class Broken(ValueError):
  """Bytes that are no vocabulary of their kind."""


def make(kind: str, content: bytes) -> Bytes | SentencePiece | HuggingFace:
  """The vocabulary that a file holds; raises Broken, with what the library says of it."""
  try:
    return KINDS[kind](content)
  except Exception as error:  # the libraries raise bare Exception and RuntimeError
    why = (str(error).splitlines() or [type(error).__name__])[0][:200]
    raise Broken(f"is no {kind} vocabulary ({why})") from error


KINDS = {kind.kind: kind for kind in (Bytes, SentencePiece, HuggingFace)}


def _show(content: bytes) -> str:
  """Bytes as text, or as ⟨E4⟩ where they are a part of a character."""
  try:
    return content.decode()
  except UnicodeDecodeError:
    return "".join(f"⟨{byte:02X}⟩" for byte in content)


def train(texts: Sequence[str], vocab_size: int, specials: int) -> bytes:
  """A SentencePiece model of vocab_size - specials pieces, of which every text comes back letter for letter.

  Raises:
    Mistake: `vocab_size` does not suit the texts, or there is none.
  """
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
    # The rounding of unigram's scores depends on the number of threads: it is a constant.
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(lines), model_writer=model, model_type=_MODEL_TYPE, vocab_size=vocab_size - specials,
      character_coverage=1.0, byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=False,
      remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, user_defined_symbols=["\n"], bos_id=-1,
      eos_id=-1, num_threads=4, minloglevel=2,
    )  # fmt: skip
  except RuntimeError as error:
    possible = re.search(r"value <= (\d+)", str(error))
    if not possible:
      raise
    error = f"this corpus allows at most {int(possible[1]) + specials}"
    raise Mistake(f"tokenizer.vocab_size={vocab_size}: {error}") from None
  return model.getvalue()
