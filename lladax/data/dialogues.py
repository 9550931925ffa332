"""Conversations as rows: a reply with its prompt, or several of them packed into one row.

The life of a conversation, in fine-tuning: it is rendered in the chat template; one of its replies is drawn (another in
every epoch), and what precedes it is its prompt, cut at the left where the row is too short for both; the prompt is
given; the reply, its EoT and EOS are what the loss sees.
"""

import array
import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lladax.data import corpus
from lladax.data.tokenizer import Tokenizer
from lladax.data.windows import DataConfig, Row, stable_hash
from lladax.mistake import Mistake


class Turn(NamedTuple):
  """A reply and its prompt: places in `Dialogues.ids_T`. The prompt ends where the header of the reply is added."""

  prompt: int
  prompt_end: int
  reply: int
  reply_end: int


class Dialogues:
  """Conversations in the chat template: a row is a reply with its prompt, or several where they are packed."""

  def __init__(
    self, conversations: Sequence[corpus.Messages], text: Tokenizer, c: DataConfig, *, seed: int,
    every_turn: bool = False,
  ):  # fmt: skip
    """`every_turn`: each reply is a row, for evaluation; else one of them is drawn."""
    self._c, self._seed, self._eos_id = c, seed, text.eos_id
    opening = [] if text.bos_id is None else [text.bos_id]
    ours = text.template is None  # else each prompt is rendered whole, as the template of others wants it
    self._opening, self._header = (opening, text.chat([])[len(opening) :]) if ours else ([], [])
    L, ids = c.length, array.array("i")
    self._turns: list[list[Turn]] = []
    self.num_bytes = self.num_tokens = cut = too_long = 0  # of the replies
    for messages in conversations:
      turns, prompt = [], len(ids)
      replies = corpus.replies(messages)
      history: list[int] = []
      for i, message in enumerate(messages):
        if i in replies:
          asked, reply = ([], text.reply(message["content"])) if ours else text.turn(messages[: i + 1])
          begin = 0 if ours else len(history)
          history += asked
          reply = reply if reply[-1] == text.eos_id else [*reply, text.eos_id]
          if len(reply) + len(self._header) > L:
            too_long += 1
          else:
            turns.append((begin, len(history), reply))
            cut += len(self._opening) + len(history) - begin + len(self._header) + len(reply) > L
            self.num_bytes += len(message["content"].strip().encode()) + 1
            self.num_tokens += len(reply)
        history += text.message(message) if ours else []
      ids.extend(history)
      made = []
      for begin, end, reply in turns:
        made.append(Turn(prompt + begin, prompt + end, len(ids), len(ids) + len(reply)))
        ids.extend(reply)
      self._turns += [[turn] for turn in made] if every_turn else [made] if made else []
    if not self._turns:
      raise Mistake(f"data.length={L}: no reply of {len(conversations)} conversations fits a row; use a larger length")
    self.ids_T = np.asarray(ids, np.int32)
    longest = [max(map(self._length, turns)) for turns in self._turns]
    self._rows = (
      pack([-(-n // c.align) * c.align for n in longest], L) if c.packing else [[i] for i in range(len(longest))]
    )
    turns = sum(map(len, self._turns))
    self.about = f"{len(conversations):,} conversations, {turns:,} replies"
    if c.packing:
      self.about += f", packed into {len(self._rows):,} rows"
    if cut:
      self.about += f"; {cut:,} prompts cut at the left to data.length={L}"
    if too_long:
      self.about += f"; {too_long:,} replies left out: longer than data.length={L}"

  @property
  def digest(self) -> str:
    """Of the ids."""
    return hashlib.blake2b(self.ids_T.tobytes()).hexdigest()

  def __len__(self) -> int:
    return len(self._rows)

  def shape(self, row: int, epoch: int) -> tuple[int, int]:
    """As `Source.shape`."""
    return len(self._rows[row]), sum(self._length(self._draw(i, epoch)) for i in self._rows[row])

  def row(self, row: int, epoch: int, end: int) -> Row:
    """As `Source.row`."""
    c, L = self._c, self._c.length
    end = {"batch": end, "row": L, "none": 0}[c.eos_padding]
    tokens_L, segment_L = np.full(L, self._eos_id, np.int32), np.zeros(L, np.int32)
    weight_L, at = np.zeros(L), 0
    for number, i in enumerate(self._rows[row], start=1):
      prompt, reply = self.ids(self._draw(i, epoch))
      begin, stop = at + len(prompt), max(at + len(prompt) + len(reply), end)
      tokens_L[at:begin], tokens_L[begin : begin + len(reply)] = prompt, reply
      segment_L[at:stop], weight_L[begin:stop] = number, 1.0 / (stop - begin)
      at = -(-stop // c.align) * c.align
    return tokens_L, segment_L, weight_L

  def ids(self, turn: Turn) -> tuple[np.ndarray, np.ndarray]:
    """(prompt, reply up to its EOS) as a row of its own holds them."""
    prompt = np.concatenate([self._opening, self.ids_T[turn.prompt : turn.prompt_end], self._header]).astype(np.int32)
    reply = self.ids_T[turn.reply : turn.reply_end]
    return prompt[max(0, len(prompt) + len(reply) - self._c.length) :], reply

  def _length(self, turn: Turn) -> int:
    prompt = len(self._opening) + turn.prompt_end - turn.prompt + len(self._header)
    return min(prompt + turn.reply_end - turn.reply, self._c.length)

  def _draw(self, i: int, epoch: int) -> Turn:
    """One reply of conversation `i`, uniformly (P section 2.3)."""
    turns = self._turns[i]
    return turns[stable_hash(self._seed, epoch, i) % len(turns) if len(turns) > 1 else 0]


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
  """Which items share a row: best fit, the longest first. Every length must be at most the capacity."""
  found: list[list[int]] = []
  with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # rows, by the room left
  rooms = 0  # bit n: there is a row with room for exactly n
  for i in np.argsort(-np.asarray(lengths), kind="stable").tolist():
    n = lengths[i]
    if least := (rooms >> n) & -(rooms >> n):
      room = n + least.bit_length() - 1
      row = with_room[room].pop()
      rooms &= ~(0 if with_room[room] else 1 << room)
    else:
      room, row = capacity, len(found)
      found.append([])
    found[row].append(i)
    with_room[room - n].append(row)
    rooms |= 1 << (room - n)
  return found
