"""Text to token ids and back: bytes, SentencePiece, or a Hugging Face tokenizer.json.

Special tokens ([MASK], EOS, the three of the chat template, BOS if there is one) are looked up by
name in the vocabulary, and appended behind it where it lacks them, so any vocabulary can serve.
They enter a canvas as ids only: a text that spells a special token's name is encoded as text.

A text may begin, or stand behind something: many vocabularies put a space before what begins, and before nothing
else. A text begins at the start of a canvas and behind a special token that is not [MASK].

To the vocabulary of a published folder nothing is appended, as nobody has trained those rows of the embedding. It
speaks in the folder's own chat template (`template.py`), in LLaDA's where the folder's says the same, or not at all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import os
import pathlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lladax.data import template as templates
from lladax.mistake import Missing, Mistake

START_HEADER, END_HEADER, EOT = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
ROLES = ("system", "user", "assistant")
_MODEL_TYPE = "bpe"
_TRAINING_BYTES = 10_000_000  # unigram takes half a minute for these, and gains 1% from 10 MB
SETTINGS = "lladax_tokenizer.json"
_SPACE = "\u2581"  # how SentencePiece writes a space inside its pieces
_BYTE = re.compile("<0x([0-9A-F]{2})>")  # how vocabularies of characters spell a byte
_RUN = 16  # tokens before others that their text may depend on: what is left of a character, and one more


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
  """Which vocabulary, and the names of its special tokens (the defaults are LLaDA's)."""

  kind: str = "sentencepiece"  # "sentencepiece" | "bytes" | "huggingface" (a tokenizer.json)
  path: str = ""  # of a .model or tokenizer.json; "": train SentencePiece on the corpus
  vocab_size: int = 1024  # to train, special tokens included
  eos: str = "<|endoftext|>"  # name of the end of a text; a special token that the vocabulary lacks is added behind it
  mask: str = "<|mdm_mask|>"  # name of [MASK]
  pad: str = ""  # name of padding; "": the EOS, as in LLaDA

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
  """A vocabulary and its special tokens; made by `create`, `published` or `load`.

  Attributes: `vocab_size`, ids in use; `rows`, embedding rows: `vocab_size` rounded up to a multiple of 128;
  `mask_id`, `eos_id`, `pad_id`; `bos_id`, `eot_id`, which ends a turn, `start_header_id`, `end_header_id`, None without
  one; `ends`, ids that end a text, EOS first; `template`, the chat template of others, None with LLaDA's or without
  any; `fingerprint`, a hash of the vocabulary, its special tokens and that template.
  """

  def __init__(
    self,
    vocabulary: _Bytes | _SentencePiece | _HuggingFace,
    names: Mapping[str, str],
    others: Mapping[str, Any] | None = None,
  ):
    """`names` and `others` are what `save` writes.

    Args:
      vocabulary: text to ids, without special tokens.
      names: eos, mask, pad ("": the EOS), bos ("": none).
      others: of a vocabulary whose model others have trained: its `template` ("": none), the `variables` of that, and
        `ends`, more ids that end a text.
    """
    self._vocabulary, self._names, self._others = vocabulary, dict(names), others
    self.vocab_size: int = vocabulary.size
    ids: dict[str, int] = {}
    for name in (*names.values(), EOT, START_HEADER, END_HEADER):
      if name and name not in ids:
        found = vocabulary.find(name)
        if found is None and others is not None:
          continue
        ids[name] = self.vocab_size if found is None else found
        self.vocab_size += found is None
    self.rows: int = -(-self.vocab_size // 128) * 128
    self.eos_id, self.mask_id = ids[names["eos"]], ids[names["mask"]]
    self.pad_id, self.bos_id = ids[names["pad"] or names["eos"]], ids.get(names["bos"])
    self.eot_id = ids.get(EOT)
    self.start_header_id, self.end_header_id = ids.get(START_HEADER), ids.get(END_HEADER)
    self._special = vocabulary.special | {id: name for name, id in ids.items()}
    identity: list[Any] = [vocabulary.kind, self._names, sorted(self._special.items())]
    others, self.template = others or {}, None
    if others.get("template"):
      identity += [others["template"], others["variables"]]
      self.template = templates.Template(others["template"], others["variables"])
      self.eot_id, self._control = self._probe(self.template)
      if self.eot_id is not None:  # its vocabulary may not call it special
        self._special[self.eot_id] = vocabulary.added.get(self.eot_id) or self._special[self.eot_id]
    self._spelled = re.compile(f"(?={'|'.join(map(re.escape, self._special.values()))})")
    # A text begins behind these: a mask is a part of one.
    self._starts = {id: name for id, name in self._special.items() if id != self.mask_id}
    if self.template is not None:
      self._starts |= {id: name for id, name in vocabulary.added.items() if name in self._control}
    ends = (self.eos_id, self.eot_id, *others.get("ends", ()))
    self.ends: tuple[int, ...] = tuple(dict.fromkeys(id for id in ends if id is not None))
    self.fingerprint: str = hashlib.sha256(json.dumps(identity).encode() + vocabulary.content).hexdigest()[:16]

  def _probe(self, template: templates.Template) -> tuple[int | None, tuple[str, ...]]:
    """(the token that ends a turn of a foreign template, the names that no message may spell)."""
    marked = {name: id for id, name in (self._vocabulary.added | self._special).items()}
    names = re.compile("|".join(map(re.escape, sorted(marked, key=len, reverse=True))))
    asked, said = ({"role": role, "content": "zyzzyva"} for role in ("user", "assistant"))
    control, eot_id = set(self._special.values()), None
    for messages in ([asked], [asked, said], [{"role": "system", "content": "system"}, asked]):
      with contextlib.suppress(Mistake):  # it will be told when somebody wants to talk
        text = template.render(messages, ask=messages[-1] is asked, control=())
        if messages[-1] is asked:
          control.update(names.findall(text))
        elif end := names.search(text, max(0, text.rfind("zyzzyva"))):
          eot_id = marked[end[0]]
          control.add(end[0])
    return eot_id, tuple(sorted(control))

  def encode(self, text: str, begins: bool = True) -> list[int]:
    """Ids of plain text: no BOS, no EOS, and never a special token, whatever the text spells.

    Args:
      text: of any characters.
      begins: False for a text that stands behind another: no space is put before it, whatever the vocabulary does.

    Raises:
      Mistake: the text holds a lone surrogate, which is no character.
    """
    _check_unicode(text)
    ids = self._vocabulary.encode(text, begins)
    if self._special.keys().isdisjoint(ids):
      return ids
    # This vocabulary reads special tokens out of text: let it see no name in one piece.
    cuts = [match.start() + 1 for match in self._spelled.finditer(text)]
    pieces = (text[i:j] for i, j in itertools.pairwise([0, *cuts, len(text)]))
    return [id for i, piece in enumerate(pieces) for id in self._vocabulary.encode(piece, begins and not i)]

  def behind(self, ids: Sequence[int], text: str) -> list[int]:
    """Ids of a text as it stands behind ids; of its own tokens, as none of theirs is opened again."""
    return self.encode(text, self._begins_behind(ids))

  def pair(self, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """Ids of a prompt, and of an answer as it is tokenised behind it.

    Where the two share a token no split is right, and each is encoded by itself, the answer as what stands behind.
    """
    ids, whole = self.encode(prompt), self.encode(prompt + answer)
    return ids, whole[len(ids) :] if whole[: len(ids)] == ids else self.behind(ids, answer)

  def decode(self, ids: Iterable[int], skip_special: bool = True, behind: Iterable[int] = ()) -> str:
    """Text of ids; special tokens are dropped or written by name, broken UTF-8 becomes U+FFFD.

    Args:
      ids: of the vocabulary.
      skip_special: whether special tokens are dropped.
      behind: what the ids stand behind: the text of both, without what these spell alone. A character that is cut
        between the two belongs to the text.
    """
    ids, before = [int(id) for id in ids], [int(id) for id in behind]
    found, known = {*ids, *before}, range(self.vocab_size)
    if found and not (min(found) in known and max(found) in known):
      raise Mistake(f"ids {min(found)} to {max(found)}: the vocabulary has {self.vocab_size} only")
    start = max((i for i, id in enumerate(before, 1) if id in self._starts), default=0)
    run = [id for id in before[start:] if id != self.mask_id][-_RUN:]  # the tokens since the text began
    text, ids = "", [id for id in ids if id != self.mask_id] if skip_special else ids
    for special, group in itertools.groupby(ids, key=self._special.__contains__):
      group = list(group)
      if special:
        text += "" if skip_special else "".join(self._special[id] for id in group)
        run = [] if any(id in self._starts for id in group) else run
      else:
        alone, whole = self._vocabulary.decode(run) if run else "", self._vocabulary.decode(run + group)
        text += whole[len(os.path.commonprefix([alone, whole])) :]
        run = (run + group)[-_RUN:]
    return text

  def _begins_behind(self, ids: Sequence[int]) -> bool:
    """Whether a text that stands behind ids is encoded as one that begins."""
    if not ids or ids[-1] not in self._starts or self.template is None:
      return not ids or ids[-1] in self._starts
    return self._reader.begins_behind(self._starts[ids[-1]])  # as the model has seen it

  def piece(self, id: int) -> str:
    """One token as readable text, for drawings: [MASK] is ░, a part of a character is ⟨E4⟩."""
    id = int(id)
    return "░" if id == self.mask_id else self._special.get(id) or self._vocabulary.piece(id)

  def encode_canvas(self, text: str) -> list[int]:
    """Ids of text in which every literal `[MASK]` stands for one token to fill in."""
    first, *others = text.split("[MASK]")
    return self.encode(first) + [id for x in others for id in (self.mask_id, *self.encode(x, begins=False))]

  def check_chat(self) -> None:
    """Raises Mistake where there is no chat template."""
    if self.template is None and None in (self.eot_id, self.start_header_id, self.end_header_id):
      raise Mistake(f"a conversation: this model has no chat template, nor LLaDA's chat tokens ({EOT}); give it text")

  def chat(self, messages: Iterable[Mapping[str, Any]], ask: bool = True) -> list[int]:
    """Ids of a conversation in the chat template; `ask` opens the assistant's next reply.

    Raises:
      Mistake: there is no template; or it does not take these messages.
    """
    if self.template is not None:
      return self._read(self.template.render(list(messages), ask, self._control))
    ids = [] if self.bos_id is None else [self.bos_id]
    for message in messages:
      ids += self.message(message)
    return ids + self._turn("assistant", "") if ask else ids

  def turn(self, messages: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[int]]:
    """Ids (prompt, reply) of a conversation that ends with a reply: `chat` before it, and it up to what ends it."""
    *asked, said = messages
    if self.template is None:
      return self.chat(asked), self.reply(said["content"])
    prompt, whole = (self.template.render(x, ask, self._control) for x, ask in ((asked, True), (messages, False)))
    end = "" if self.eot_id is None else self._special[self.eot_id]
    if whole.startswith(prompt):
      text = whole[len(prompt) :].partition(end)[0] if end else whole[len(prompt) :]
    else:  # the template writes a reply otherwise than it asks for one
      text = templates.apart(said["content"].strip(), self._control)
    ids = self._read(prompt)
    return ids, self._read(text, ids) + ([] if self.eot_id is None else [self.eot_id])

  def _read(self, text: str, behind: Sequence[int] = ()) -> list[int]:
    """Ids of what a foreign template wrote: control tokens by name, except where a seam lies in the name."""
    _check_unicode(text)
    first, *others = text.split(templates.SEAM)
    ids = self._reader.read(first, self._begins_behind(behind))
    return ids + [id for piece in others for id in self._reader.read(piece, begins=False)]

  @property
  def _reader(self) -> _HuggingFace:
    assert isinstance(self._vocabulary, _HuggingFace)  # foreign templates come with no other
    return self._vocabulary

  def message(self, message: Mapping[str, Any]) -> list[Any]:
    """Ids of one message of a conversation in LLaDA's template, up to its EoT."""
    if not isinstance(message, Mapping):
      raise Mistake(f"a message is {message!r:.80}: give an object with role and content")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES or not isinstance(content, str):
      raise Mistake(f"a message of role {role!r}: use {', '.join(ROLES)}, and a text as content")
    return [*self._turn(role, content.strip()), self.eot_id]

  def reply(self, text: str) -> list[Any]:
    """Ids of a reply behind `chat(..., ask=True)` in LLaDA's template, up to its EoT."""
    return [*self.encode(text.strip(), begins=False), self.eot_id]

  def _turn(self, role: str, text: str) -> list[Any]:
    self.check_chat()
    header = [self.start_header_id, *self.encode(role, begins=False), self.end_header_id]
    return header + self.encode("\n\n" + text, begins=False)

  def __reduce__(self):
    """Pickles as what `save` writes, so that other processes can have it."""
    return _rebuild, (self._vocabulary.kind, self._vocabulary.content, self._names, self._others)

  def bare(self) -> Tokenizer:
    """The same vocabulary with nothing appended to it."""
    return Tokenizer(self._vocabulary, self._names, self._others or {})

  def save(self, folder: str | pathlib.Path) -> None:
    """Writes all that `load` needs into the folder."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if self._vocabulary.file:
      (folder / self._vocabulary.file).write_bytes(self._vocabulary.content)
    settings: dict[str, Any] = {"kind": self._vocabulary.kind, "names": self._names}
    if self._others is not None:
      settings["others"] = self._others
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def load(folder: str | pathlib.Path) -> Tokenizer:
  """The tokenizer that `Tokenizer.save` wrote into the folder."""
  path = pathlib.Path(folder) / SETTINGS
  if not path.is_file():
    raise Missing(f"{path}: no such file; give a folder that Tokenizer.save wrote")
  settings = json.loads(path.read_text(encoding="utf-8"))
  kind = _KINDS[settings["kind"]]
  content = path.with_name(kind.file).read_bytes() if kind.file else b""
  return Tokenizer(kind(content), settings["names"], settings.get("others"))


def _rebuild(kind: str, content: bytes, names: Mapping[str, str], others: Mapping[str, Any] | None) -> Tokenizer:
  return Tokenizer(_KINDS[kind](content), names, others)


def _check_unicode(text: str) -> None:
  try:
    text.encode()
  except UnicodeEncodeError as error:
    at = error.start
    around = ascii(text[max(0, at - 20) : at + 20])
    raise Mistake(f"a text holds {ascii(text[at])}, a lone surrogate, which is no character: {around}") from None


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
  return Tokenizer(*_read(config))


def published(config: TokenizerConfig, ends: Sequence[int] = ()) -> Tokenizer:
  """The tokenizer of a published folder, with the chat template beside it; nothing is appended to the vocabulary.

  Args:
    config: names a tokenizer.json, and special tokens that are in it.
    ends: ids that end a text beside the EOS.

  Raises:
    Missing, Mistake: as `create`; the template's file cannot be read.
  """
  vocabulary, names = _read(config)
  if vocabulary.find(names["bos"]) is None:
    names["bos"] = ""
  others = {"template": "", "variables": {}, "ends": list(ends)}
  ours, found = Tokenizer(vocabulary, names, others), templates.find(pathlib.Path(config.path).parent)
  if found is None:
    return ours
  theirs = Tokenizer(vocabulary, names, others | {"template": found.source, "variables": found.variables})
  with contextlib.suppress(Mistake):  # of a template that fails, or there are no chat tokens
    if all(ours.chat(messages) == theirs.chat(messages) for messages in _PROBES):
      return ours
  return theirs


# Where a foreign template says of these what LLaDA's says, it is LLaDA's.
_PROBES = [[{"role": role, "content": f" {role}\n"} for role in roles] for roles in (("user",), (*ROLES, "user"))]


def _read(config: TokenizerConfig) -> tuple[_SentencePiece | _HuggingFace, dict[str, str]]:
  """The vocabulary of a file, and the special tokens' names."""
  names = {"eos": config.eos, "mask": config.mask, "pad": config.pad, "bos": ""}
  path = pathlib.Path(config.path).expanduser()
  if config.kind == "huggingface" and path.is_dir():
    path /= "tokenizer.json"
  if not path.is_file():
    raise Missing(f"tokenizer.path={config.path!r}: no such file")
  try:
    vocabulary = (_HuggingFace if config.kind == "huggingface" else _SentencePiece)(path.read_bytes())
  except Exception as error:  # the libraries raise bare Exception and RuntimeError
    raise Mistake(f"tokenizer.path={config.path!r} is no {config.kind} vocabulary") from error
  names["bos"] = vocabulary.bos
  if config.kind == "huggingface":
    beside = templates.read(path.with_name("tokenizer_config.json"))
    names["bos"] = templates.spelled(beside.get("bos_token"))
  return vocabulary, names


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
  added: dict[int, str] = {}

  def __init__(self, content: bytes = b""):
    self.content = content

  def find(self, name: str) -> int | None:
    return None

  def encode(self, text: str, begins: bool) -> list[int]:
    return list(text.encode())

  def decode(self, ids: list[int]) -> str:
    return bytes(ids).decode(errors="replace")

  def piece(self, id: int) -> str:
    return _show(bytes([id]))


class _SentencePiece:
  """A SentencePiece model, trained here or elsewhere."""

  kind, file = "sentencepiece", "sp.model"
  added: dict[int, str] = {}

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
    # The same model for what stands behind a text: the fields behind a serialised message are merged into it, and
    # these are normalizer_spec.add_dummy_prefix = false.
    plain = content + b"\x1a\x02\x18\x00"
    self._inner = sentencepiece.SentencePieceProcessor(model_proto=plain) if prefixed else model
    self._strips = model.encode("  a") == model.encode("a")  # spaces at the front, and the prefix stands for them

  def find(self, name: str) -> int | None:
    id = self._model.piece_to_id(name)
    return id if self._model.id_to_piece(id) == name else None

  def encode(self, text: str, begins: bool) -> list[int]:
    if not self._block or _SPACE not in text:
      return (self._model if begins or (self._strips and text[:1].isspace()) else self._inner).encode(text)
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
    self.added = {id: token.content for id, token in added.items()}
    # Byte-level vocabularies write a byte as itself if it prints, else as a character past U+00FF.
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    printing = [ord(character) for character in alphabet if ord(character) < 256]
    others = [byte for byte in range(256) if byte not in printing]
    self._byte = dict(zip(alphabet, printing + others, strict=True))
    self._prefixes = self._inner(model, "a") != model.encode("a", add_special_tokens=False).ids

  def find(self, name: str) -> int | None:
    return self._model.token_to_id(name)

  def encode(self, text: str, begins: bool) -> list[int]:
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
    token = self._token(id)
    if byte := _BYTE.fullmatch(token):
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
