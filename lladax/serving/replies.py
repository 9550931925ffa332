"""Snapshots of rows in, texts out, as they grow; chunks of a stream, and whole answers.

What is told of a text on the way stays: no half of a character, no beginning of a stop string, no token that may still
be replaced.
"""

import bisect
import dataclasses
import math
import os
import re
import secrets
import time
import typing
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from lladax.inference.llada import LLaDA, cut
from lladax.inference.slots import Row, Snapshot

LEAST = -9999.0  # the logarithm of a confidence of 0, which JSON has no number for
_HALF = "\ufffd"  # what a character that is not whole yet is decoded to
_WINDOW = 16  # tokens that the text of the next one may depend on


class Token(NamedTuple):
  """A token of an answer as `logprobs` tells it."""

  text: str
  logprob: float | None
  offset: int  # in the text of the answer, characters
  end: int  # so many characters has the text with it
  top: dict[str, float] | None = None  # the most probable ones; None: the token itself is all that is known


class Choice:
  """One text of an answer, as far as it is known."""

  def __init__(self, llada: LLaDA, row: Row, start: int, stop: int | None, until: Sequence[str], before: str = ""):
    """The text is of the row's tokens `start` to `stop`; `before` it stands what is echoed."""
    self.row, self.until, self.before = row, until, before
    self.start, self.stop = start, stop
    self.text, self.finish, self.passes, self.count = "", None, 0, 0  # finish: "stop" | "length" when it is whole
    self.tokens: list[Token] = []
    self.prompt: list[Token] = []  # those of what is echoed, where they are scored
    self._llada, self._sent, self._told, self._seen = llada, 0, 0, -1
    self._behind = list(row.ids[:start])
    self._pieces: dict[int, str | None] = {llada.mask_id: None}

  def see(self, x: Snapshot, *, logprobs: bool, lazy: bool = False) -> tuple[str, list[Token]]:
    """(text, tokens) that are new, and stay. `lazy`: nobody waits for a part."""
    self.passes = x.passes
    end = len(x.tokens_L) if x.done else x.stable
    end = end if self.stop is None else min(end, self.stop)
    whole = x.done or end == self.stop
    if self.finish or (not whole and end == self._seen):
      return "", []
    self._seen, ids = end, x.tokens_L[self.start : end]
    ends = np.flatnonzero(np.isin(ids, self._llada.ends)) if not self.row.fills else []
    if len(ends):
      ids, whole = ids[: ends[0]], True
    if lazy and not whole and not self.until:
      return "", []
    text = self._decode(ids)
    firm = text if whole else text.rstrip(_HALF)
    said, begun = cut(firm, self.until), len(firm)
    if not whole:  # of a stop string, which may be there before another one
      lengths = (n for stop in self.until for n in range(min(len(stop) - 1, begun), 0, -1) if firm.endswith(stop[:n]))
      begun -= max(lengths, default=0)
    stopped = said != firm and len(said) <= begun
    if stopped:
      whole, n = True, 1 + bisect.bisect_left(range(1, len(ids) + 1), True, key=lambda n: self._stops(ids[:n], said))
      ids = ids[:n]
    said = said[:begun]
    if whole:
      self.finish = "stop" if len(ends) or stopped else "length"
    self.text = said
    committed_L = x.unmasked_at_L[self.start : self.start + len(ids)] > 0
    self.count = int(committed_L.sum()) if self.row.fills else len(ids)
    if logprobs:
      known, every = len(self.tokens), [*self._behind, *ids.tolist()]
      p_L = np.where(committed_L, x.confidence_L[self.start : self.start + len(ids)], np.nan)[known:].tolist()
      log_p = [None if math.isnan(p) else math.log(p) if p > 0 else LEAST for p in p_L]
      at = self.tokens[-1].end if known else len(self.before)
      more = tokens(self._llada, every, self.start + known, log_p, at)
      end = math.inf if whole and not stopped else len(self.before) + len(said)
      self.tokens += [t for t in more if t.offset < end]
    new = self.text[self._sent :], self.tokens[self._told :]
    self._sent, self._told = len(self.text), len(self.tokens)
    return new

  def _decode(self, ids: Any) -> str:
    return self._llada.reader().decode(ids.tolist(), behind=self._behind)

  def _stops(self, ids: Any, said: str) -> bool:
    """Whether the stop string behind what is said is there."""
    text = self._decode(ids)
    return len(cut(text, self.until)) == len(said) < len(text)

  def canvas(self, index: int, x: Snapshot, block: int) -> dict[str, Any]:
    """The canvas as it stands: what is behind the prompt, or all of one that is filled in."""
    own = slice(0 if self.row.fills else self.start, None if self.row.fills else self.stop)
    ids_L, mask_id = x.tokens_L[own], self._llada.mask_id
    for i in {*ids_L.tolist()} - self._pieces.keys():
      self._pieces[i] = piece(self._llada, i)
    confidence_L = np.nan_to_num(np.where(ids_L == mask_id, 0.0, x.confidence_L[own].astype(float)))
    given = sum(i != mask_id for i in self.row.ids) if self.row.fills else self.start
    return {
      "index": index, "pass": x.passes, "block": block, "given": given,
      "pieces": [self._pieces[i] for i in ids_L.tolist()],
      "unmasked_at": x.unmasked_at_L[own].tolist(),
      "edited_at": None if x.edited_at_L is None else x.edited_at_L[own].tolist(),
      "confidence": [round(p, 4) for p in confidence_L.tolist()], "done": bool(x.done or self.finish),
    }  # fmt: skip


def piece(llada: LLaDA, id: int) -> str:
  """A token as it is shown; what ends a text is ⏎, and a row of the embedding that is no token its number."""
  return "⏎" if id in llada.ends else llada._piece(id) if id < llada.vocab_size else f"⟨{id}⟩"


def tokens(llada: LLaDA, ids: list[int], first: int, log_p: Sequence[float | None], at: int = 0) -> list[Token]:
  """Those of the ids from `first` on that `log_p` is of; `at`: so many characters stand before them.

  A token within a character stands where that begins.
  """
  found, spell = [], llada.reader().decode
  for i, p in enumerate(log_p, first):
    low = max(0, i - _WINDOW)
    before, text = (spell(ids[low:n], behind=ids[max(0, low - 2 * _WINDOW) : low]) for n in (i, i + 1))
    same = len(os.path.commonprefix((before, text)))
    same -= same == len(text) and text.endswith(_HALF)  # it adds to a character that is not whole yet
    found.append(Token(piece(llada, ids[i]), p, max(at - len(before) + same, 0), at := at + len(text) - len(before)))
  for i in range(len(found) - 1, 0, -1):  # bytes may be characters of their own until all of one are there
    found[i - 1] = found[i - 1]._replace(offset=min(found[i - 1].offset, found[i].offset))
  return found


@dataclasses.dataclass
class Asked:
  """A request that is understood: its rows, and what has become of them."""

  chats: bool
  model: str
  choices: list[Choice]
  seed: int
  stream: bool
  usage: bool  # whether a stream ends with it
  canvas: bool
  timeout: float | None
  logprobs: int | None  # None: not asked for
  prompts: list[tuple[int, ...]]
  each: int  # choices of each prompt
  scores: bool  # whether the prompts' own tokens are to be scored; then `score` is to be called before all else
  block: int
  runs: bool = True  # False: nothing is generated

  def __post_init__(self):
    self.id = f"{'chatcmpl' if self.chats else 'cmpl'}-{secrets.token_hex(12)}"
    self.created = int(time.time())

  @property
  def rows(self) -> list[Row]:
    """What the scheduler is asked for."""
    return [x.row for x in self.choices] if self.runs else []

  def score(self, found: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], llada: LLaDA) -> None:
    """Takes what `Scheduler.score` says of the prompts."""
    for i, (log_p_L, top_L, top_p_L) in enumerate(found):
      log_p = [None, *(max(float(p), LEAST) for p in log_p_L[1:])][: len(log_p_L)]
      every = tokens(llada, list(self.prompts[i]), 0, log_p)
      for j, t in enumerate(every[1:], 1):
        top = {t.text: typing.cast(float, t.logprob), piece(llada, int(top_L[j])): max(float(top_p_L[j]), LEAST)}
        every[j] = t._replace(top=top)
      for choice in self.choices[i * self.each : (i + 1) * self.each]:
        choice.prompt = every

  def begin(self) -> Iterator[dict[str, Any]]:
    """The first chunks of a stream."""
    for i, choice in enumerate(self.choices):
      if self.chats:
        yield self._chunk(i, {"role": "assistant", "content": ""}, [])
      elif choice.before:
        yield self._chunk(i, choice.before, choice.prompt)

  def see(self, i: int, x: Snapshot) -> dict[str, Any] | None:
    """Takes a row's snapshot; returns the chunk of a stream, None if there is nothing to tell."""
    choice = self.choices[i]
    if choice.finish:
      return None
    text, new = choice.see(x, logprobs=self.logprobs is not None, lazy=not self.stream)
    if not (self.stream and (text or new or choice.finish or self.canvas)):
      return None
    chunk = self._chunk(i, {"content": text} if self.chats else text, new)
    return chunk | ({"canvas": choice.canvas(i, x, self.block)} if self.canvas else {})

  def end(self) -> Iterator[dict[str, Any]]:
    """The last chunks of a stream."""
    if not self.runs:
      for i, choice in enumerate(self.choices):
        choice.finish = "length"
        yield self._chunk(i, "", [])
    if self.usage:
      yield self._told("chunk", []) | {"usage": self.used()}

  def answer(self) -> dict[str, Any]:
    """The whole answer."""
    every = []
    for i, x in enumerate(self.choices):
      said = {"index": i, "finish_reason": x.finish or "length"}
      if self.chats:
        said |= {"message": {"role": "assistant", "content": x.text, "refusal": None}}
      else:
        said |= {"text": x.before + x.text}
      every.append(said | {"logprobs": self._logprobs([*x.prompt, *x.tokens])})
    return self._told("", every) | {"usage": self.used()}

  def used(self) -> dict[str, int]:
    """What it has cost."""
    prompt, said = sum(map(len, self.prompts)), sum(x.count for x in self.choices)
    passes = sum(x.passes for x in self.choices)
    return {"prompt_tokens": prompt, "completion_tokens": said, "total_tokens": prompt + said, "passes": passes}

  def _chunk(self, i: int, said: Any, new: list[Token]) -> dict[str, Any]:
    choice = {"index": i, "delta" if self.chats else "text": said, "finish_reason": self.choices[i].finish}
    return self._told("chunk", [choice | {"logprobs": self._logprobs(new) if new else None}])

  def _told(self, kind: str, choices: list[Any]) -> dict[str, Any]:
    name = ("chat.completion.chunk" if kind else "chat.completion") if self.chats else "text_completion"
    told = {"id": self.id, "object": name, "created": self.created, "model": self.model, "seed": self.seed}
    return told | {"choices": choices} | ({"usage": None} if kind and self.usage else {})

  def _logprobs(self, every: list[Token]) -> dict[str, Any] | None:
    if self.logprobs is None:
      return None
    top = [({t.text: t.logprob} if t.top is None else t.top) if t.logprob is not None else None for t in every]
    if not self.chats:
      return {
        "tokens": [t.text for t in every], "token_logprobs": [t.logprob for t in every],
        "top_logprobs": top if self.logprobs else None, "text_offset": [t.offset for t in every],
      }  # fmt: skip
    said = [{"token": t.text, "logprob": t.logprob, "bytes": _bytes(t.text)} for t in every]
    return {"content": [x | {"top_logprobs": [x] if self.logprobs else []} for x in said], "refusal": None}


def _bytes(text: str) -> list[int]:
  """Of a token as `Tokenizer.piece` writes it."""
  if re.fullmatch("(⟨[0-9A-F]{2}⟩)+", text):
    return list(bytes.fromhex(re.sub("[⟨⟩]", "", text)))
  return list(text.encode())
