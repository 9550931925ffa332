"""Conversations as rows: a reply with its prompt, all replies of a dialogue, or several of either packed into one row.

The life of a conversation, in fine-tuning: it is rendered in the chat template; one of its replies is drawn (another in
every epoch), and what precedes it is its prompt, cut at the left where the row is too short for both; the prompt is
given; the reply, its EoT and EOS are what the loss sees.

Where nothing sees what follows (`noise.block`, and the causal baseline) all replies of a dialogue can be learnt at
once. A block may hold the end of a reply and the beginning of the next question, which the reply must not see: the row
is two canvases. The clean one, which later blocks see, is the dialogue, without a gap. On the other, which is noised,
a reply ends with EOS up to its block's end, as the sampler fills it. Of two replies that meet in one block, the second
has a copy of the dialogue for itself, and so has one whose prompt has to be cut.
"""

import array
import hashlib
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from lladax.data import corpus
from lladax.data.tokenizer import Tokenizer
from lladax.data.windows import DataConfig, Row, stable_hash
from lladax.mistake import Mistake


class Talk(NamedTuple):
  """A conversation as ids. The prompt of a turn is ids[begin:reply], its reply ids[reply:end] and an EOS.

  Turns of one `begin` continue each other: the prompt of the later one begins with the earlier one, prompt and reply.
  """

  ids: list[int]
  turns: list[tuple[int, int, int, int]]  # begin, reply, end; bytes of the reply as text, with one for its end
  history: list[int]  # what digests have always been of, besides the replies


class Renderer:
  """Conversations to ids, in the tokenizer's chat template."""

  def __init__(self, text: Tokenizer):
    opening = [] if text.bos_id is None else [text.bos_id]
    self._text, self._ours = text, text.template is None  # that of others wants each prompt rendered whole
    self._opening, self.header = (opening, text.chat([])[len(opening) :]) if self._ours else ([], [])

  def __call__(self, messages: corpus.Messages) -> Talk:
    """The conversation, with a turn for each reply that is learnt."""
    text, replies, found = self._text, corpus.replies(messages), Talk([], [], [])
    for i, message in enumerate(messages):
      if i in replies:
        if self._ours:
          prompt, reply = [*self._opening, *found.history, *self.header], text.reply(message["content"])
        else:
          prompt, reply = text.turn(messages[: i + 1])
          found.history.extend(prompt)
        begin = found.turns[-1][0] if found.turns else 0
        before = found.ids[begin:]
        if prompt[: len(before)] != before:  # a template may leave out what it likes of earlier replies
          begin, before = len(found.ids), []
        found.ids.extend(prompt[len(before) :])
        place = len(found.ids)
        found.ids.extend(reply[:-1] if reply[-1] == text.eos_id else reply)
        found.turns.append((begin, place, len(found.ids), len(message["content"].strip().encode()) + 1))
      if self._ours:
        found.history.extend(text.message(message))
    return found


class Talks(Protocol):
  """Conversations as ids, numbered."""

  turns_RC: np.ndarray  # int64 [turns, 5], in order: the number of the conversation, and a turn of `Talk`

  @property
  def digest(self) -> str:
    """Of the ids."""
    ...

  def __len__(self) -> int: ...

  def ids(self, number: int) -> np.ndarray:
    """Those of one conversation."""
    ...


class Spoken:
  """Conversations rendered here, and kept in memory."""

  def __init__(self, conversations: Sequence[corpus.Messages], text: Tokenizer, length: int):
    """`length`: of the rows; the digest knows no replies that do not fit one."""
    ids, first, turns, digest = array.array("i"), array.array("q", [0]), array.array("q"), hashlib.blake2b()
    render = Renderer(text)
    for number, messages in enumerate(conversations):
      talk = render(messages)
      ids.extend(talk.ids)
      first.append(len(ids))
      digest.update(np.asarray(talk.history, np.int32).tobytes())
      for begin, reply, end, size in talk.turns:
        turns.extend((number, begin, reply, end, size))
        if end + 1 - reply + len(render.header) <= length:
          digest.update(np.asarray([*talk.ids[reply:end], text.eos_id], np.int32).tobytes())
    self._ids_T, self._first = np.asarray(ids, np.int32), first
    self.turns_RC = np.asarray(turns, np.int64).reshape(-1, 5)
    self.digest = digest.hexdigest()

  def __len__(self) -> int:
    return len(self._first) - 1

  def ids(self, number: int) -> np.ndarray:
    """As `Talks.ids`."""
    return self._ids_T[self._first[number] : self._first[number + 1]]


class Dialogues:
  """Conversations in the chat template: a row is an item, or several where they are packed.

  An item is a reply with its prompt, drawn from a conversation; where all replies are learnt, a copy of a dialogue.
  """

  def __init__(
    self, conversations: Sequence[corpus.Messages] | Talks, text: Tokenizer, c: DataConfig, *, seed: int,
    every_turn: bool = False,
  ):  # fmt: skip
    """`every_turn`: each reply is a row, for evaluation; else as `c.replies` says."""
    self._c, self._seed, self._eos_id, L = c, seed, text.eos_id, c.length
    self._all = c.replies == "all" and not every_turn
    talks = Spoken(conversations, text, L) if isinstance(conversations, Sequence) else conversations
    fits_R = talks.turns_RC[:, 3] + 1 - talks.turns_RC[:, 2] + len(Renderer(text).header) <= L
    self._talks, turns_RC = talks, talks.turns_RC[fits_R]
    if not len(turns_RC):
      raise Mistake(f"data.length={L}: no reply of {len(talks)} conversations fits a row; use a larger length")
    self._of_R, self._begin_R, self._reply_R, self._end_R, bytes_R = turns_RC.T
    size_R = self._end_R + 1 - self._begin_R
    length_R = np.minimum(size_R, L)
    if self._all:
      self._turn, self._first = self._copies()
      self._share_R = 1 / np.bincount(self._of_R)[self._of_R]
    else:
      begins_R = np.diff(self._of_R, prepend=-1) > 0
      self._first = np.append(np.flatnonzero(begins_R | every_turn), len(turns_RC))
      self._turn, self._share_R = np.arange(len(turns_RC)), np.ones(len(turns_RC))
    self._length_R, longest_I = length_R, np.maximum.reduceat(length_R[self._turn], self._first[:-1])
    self._rows = pack((-(-longest_I // c.align) * c.align).tolist(), L) if c.packing else None
    filled_R = -(-length_R // c.align) * c.align if c.eos_padding == "block" else length_R
    self.num_bytes = int(bytes_R.sum())  # of the replies
    self.num_tokens = int((filled_R - length_R + self._end_R + 1 - self._reply_R).sum())
    self.about = f"{len(talks):,} conversations, {len(turns_RC):,} replies"
    if self._all:
      self.about += f", learnt in {len(longest_I):,} copies of their dialogues"
    if self._rows is not None:
      self.about += f", packed into {len(self._rows):,} rows"
    if cut := int((size_R > L).sum()):
      self.about += f"; {cut:,} prompts cut at the left to data.length={L}"
    if too_long := int((~fits_R).sum()):
      self.about += f"; {too_long:,} replies left out: longer than data.length={L}"

  def _copies(self) -> tuple[np.ndarray, np.ndarray]:
    """(turns of all items, where each item begins among them): what is learnt in one copy of its dialogue.

    Greedily: a reply joins the first copy whose dialogue it continues, and whose last reply ends a block before.
    """
    n, L, conversation = self._c.align, self._c.length, -1
    first_R = np.arange(len(self._of_R))  # the first turn of the copy in which a turn is learnt
    copies: list[tuple[int, int, int]] = []  # of a conversation: first turn, begin, the block where the last turn ends
    (several_S,) = np.nonzero(np.bincount(self._of_R)[self._of_R] > 1)
    columns = (self._of_R, self._begin_R, self._reply_R, self._end_R)
    for turn, of, begin, reply, end in zip(several_S.tolist(), *(x[several_S].tolist() for x in columns), strict=True):
      if of != conversation:
        conversation, copies = of, []
      if end + 1 - begin > L:  # its prompt is cut
        continue
      block, last = (reply - begin) // n, (end - begin) // n
      i = next((i for i, (_, start, full) in enumerate(copies) if start == begin and full < block), None)
      if i is None:
        copies.append((turn, begin, last))
      else:
        first_R[turn] = copies[i][0]
        copies[i] = (copies[i][0], begin, last)
    turn_R = np.argsort(first_R, kind="stable")
    return turn_R, np.append(np.flatnonzero(np.diff(first_R[turn_R], prepend=-1)), len(turn_R))

  @property
  def digest(self) -> str:
    """Of the ids."""
    return self._talks.digest

  def __len__(self) -> int:
    return len(self._first) - 1 if self._rows is None else len(self._rows)

  def shape(self, row: int, epoch: int) -> tuple[float, int]:
    """As `Source.shape`."""
    turns = [self._learnt(i, epoch) for i in self._items(row)]
    return sum(float(self._share_R[x].sum()) for x in turns), sum(int(self._length_R[x[-1]]) for x in turns)

  def row(self, row: int, epoch: int, end: int) -> Row:
    """As `Source.row`."""
    c, L, n = self._c, self._c.length, self._c.align
    end = {"batch": end, "row": L, "none": 0, "block": 0}[c.eos_padding]
    tokens_L, segment_L = np.full(L, self._eos_id, np.int32), np.zeros(L, np.int32)
    clean_L, weight_L, at = tokens_L.copy(), np.zeros(L), 0
    for number, i in enumerate(self._items(row), start=1):
      turns = self._learnt(i, epoch)
      begin, last = self._begin_R[turns[0]], self._end_R[turns[-1]]
      shift = at - begin - max(0, last + 1 - begin - L)  # from a place among the ids to one in the row
      clean_L[at : last + shift] = self._talks.ids(self._of_R[turns[0]])[at - shift : last]
      tokens_L[at : last + shift] = clean_L[at : last + shift]
      stop = at
      for turn in turns:
        first, eos = self._reply_R[turn] + shift, self._end_R[turn] + shift
        stop = -(-(eos + 1) // n) * n if c.eos_padding == "block" else max(eos + 1, end)
        tokens_L[eos:stop], weight_L[first:stop] = self._eos_id, self._share_R[turn] / (stop - first)
      segment_L[at:stop] = number
      at = -(-stop // n) * n
    return (tokens_L, segment_L, weight_L, clean_L) if self._all else (tokens_L, segment_L, weight_L)

  def _items(self, row: int) -> Sequence[int]:
    return [row] if self._rows is None else self._rows[row]

  def _learnt(self, i: int, epoch: int) -> np.ndarray:
    """The turns of an item: all, or one reply of conversation `i`, uniformly (P section 2.3)."""
    turns = self._turn[self._first[i] : self._first[i + 1]]
    if self._all or len(turns) == 1:
      return turns
    drawn = stable_hash(self._seed, epoch, i) % len(turns)
    return turns[drawn : drawn + 1]


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
