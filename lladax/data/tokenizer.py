"""Text and conversations to token ids and back: a vocabulary, its special tokens and a chat template.

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
import hashlib
import itertools
import json
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lladax import fields
from lladax.data import template as templates
from lladax.data import vocabularies
from lladax.data.vocabularies import KINDS, Bytes, HuggingFace, SentencePiece
from lladax.mistake import Missing, Mistake

START_HEADER, END_HEADER, EOT = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
ROLES = ("system", "user", "assistant")
SETTINGS = "lladax_tokenizer.json"
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
    if self.kind not in KINDS:
      raise Mistake(f"tokenizer.kind={self.kind!r} is unknown: use {', '.join(KINDS)}")
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
  `mask_id` (-1: the vocabulary of a causal model has none), `eos_id`, `pad_id`; `bos_id`, `eot_id`, which ends a turn,
  `start_header_id`, `end_header_id`, None without one; `ends`, ids that end a text, EOS first; `template`, the chat
  template of others, None with LLaDA's or without any; `fingerprint`, a hash of the vocabulary, its special tokens and
  that template.
  """

  def __init__(
    self, vocabulary: Bytes | SentencePiece | HuggingFace, names: Mapping[str, str],
    others: Mapping[str, Any] | None = None,
  ):  # fmt: skip
    """`names` and `others` are what `save` writes.

    Args:
      vocabulary: text to ids, without special tokens.
      names: eos, mask, pad ("": the EOS), bos ("": none).
      others: of a vocabulary whose model others have trained: its `template` ("": none), the `variables` of that,
        `ends`, more ids that end a text, and `added`, names that were appended to it all the same.
    """
    self._vocabulary, self._names, self._others = vocabulary, dict(names), others
    self.vocab_size: int = vocabulary.size
    ids: dict[str, int] = {}
    for name in (*names.values(), EOT, START_HEADER, END_HEADER):
      if name and name not in ids:
        found = vocabulary.find(name)
        if found is None and others is not None and name not in others.get("added", ()):
          continue
        ids[name] = self.vocab_size if found is None else found
        self.vocab_size += found is None
    self.rows: int = -(-self.vocab_size // 128) * 128
    self.eos_id, self.mask_id = ids[names["eos"]], ids.get(names["mask"], -1)
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
  def _reader(self) -> HuggingFace:
    assert isinstance(self._vocabulary, HuggingFace)  # foreign templates come with no other
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

  def with_mask(self, name: str) -> Tokenizer:
    """The same with a [MASK] of that name, which is appended where the vocabulary lacks it."""
    others = None if self._others is None else {**self._others, "added": [name]}
    return Tokenizer(self._vocabulary, self._names | {"mask": name}, others)

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
  settings = fields.read_json(path)
  if why := _damage(settings):
    raise Mistake(f"{path} is damaged ({why}): put back a copy of it")
  content, file = b"", KINDS[settings["kind"]].file
  if file and not path.with_name(file).is_file():
    raise Missing(f"{path.with_name(file)}: no such file, and {SETTINGS} says that it holds the vocabulary")
  try:
    content = fields.read_bytes(path.with_name(file)) if file else b""
    vocabulary = vocabularies.make(settings["kind"], content)
  except vocabularies.Broken as error:
    raise Mistake(f"{path.with_name(file)} {error}: put back a copy of it") from error
  others = settings.get("others") or {}
  for name in ("eos", "mask", "pad"):  # to the vocabulary of others nothing is appended but a mask, where it had none
    token = settings["names"][name]
    if others and token and token not in others.get("added", ()) and vocabulary.find(token) is None:
      raise Mistake(f"{path} is damaged ({name}={token!r:.80} is no token): put back a copy of it")
  return Tokenizer(vocabulary, settings["names"], settings.get("others"))


def _damage(settings: Any) -> str:
  """Why this is not what `Tokenizer.save` writes beside a vocabulary; "" where it is."""
  found = settings if isinstance(settings, dict) else {}
  kind, names, others = found.get("kind"), found.get("names"), found.get("others")
  if not isinstance(kind, str) or kind not in KINDS:
    return f"kind={kind!r:.80}"
  if (
    not isinstance(names, dict)
    or not _are_names(names)
    or names.keys() != {"eos", "mask", "pad", "bos"}
    or not (names["eos"] and (names["mask"] or others))
  ):
    return f"names={names!r:.80}"
  if others is None:
    return ""
  if not isinstance(others, dict) or kind != "huggingface" or not _are_names({"template": others.get("template", "")}):
    return f"others={others!r:.80}"
  ends = others.get("ends", [])
  if not _are_names(others.get("variables", {})) or (others.get("template") and "variables" not in others):
    return f"variables={others.get('variables')!r:.80}"
  return "" if isinstance(ends, list) and all(type(x) is int and x >= 0 for x in ends) else f"ends={ends!r:.80}"


def _are_names(found: Any) -> bool:
  """Whether it is an object of texts."""
  return isinstance(found, dict) and all(isinstance(x, str) for x in found.values())


def _rebuild(kind: str, content: bytes, names: Mapping[str, str], others: Mapping[str, Any] | None) -> Tokenizer:
  return Tokenizer(KINDS[kind](content), names, others)


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
    return Tokenizer(Bytes(), names)
  if not config.path:
    specials = len({config.eos, config.mask, config.pad or config.eos, EOT, START_HEADER, END_HEADER})
    return Tokenizer(SentencePiece(vocabularies.train(texts or (), config.vocab_size, specials)), names)
  return Tokenizer(*_read(config))


def published(config: TokenizerConfig, ends: Sequence[int] = (), masks: bool = True) -> Tokenizer:
  """The tokenizer of a published folder, with the chat template beside it; nothing is appended to the vocabulary.

  Args:
    config: names a tokenizer.json, and special tokens that are in it.
    ends: ids that end a text beside the EOS.
    masks: False: there is no [MASK], as of a causal model.

  Raises:
    Missing, Mistake: as `create`; the template's file cannot be read.
  """
  vocabulary, names = _read(config)
  names["mask"] = names["mask"] if masks else ""
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


def _read(config: TokenizerConfig) -> tuple[Bytes | SentencePiece | HuggingFace, dict[str, str]]:
  """The vocabulary of a file, and the special tokens' names."""
  names = {"eos": config.eos, "mask": config.mask, "pad": config.pad, "bos": ""}
  path = pathlib.Path(config.path).expanduser()
  if config.kind == "huggingface" and path.is_dir():
    path /= "tokenizer.json"
  if not path.is_file():
    raise Missing(f"tokenizer.path={config.path!r}: no such file")
  try:
    vocabulary = vocabularies.make(config.kind, fields.read_bytes(path))
  except vocabularies.Broken as error:
    raise Mistake(f"tokenizer.path={config.path!r} {error}") from error
  names["bos"] = vocabulary.bos
  if config.kind == "huggingface":
    beside = templates.read(path.with_name("tokenizer_config.json"))
    names["bos"] = templates.spelled(beside.get("bos_token"))
  return vocabulary, names
