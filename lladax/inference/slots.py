"""Rows that join and leave a batch between blocks: the engine of a server. It knows no text.

The life of a row: what is asked for (`Row`) -> a canvas of its own on the host (`Seat`) -> at the beginning of each
block all seats are laid out anew, so that the blocks that are due stand in one place: what a row has before its block
ends there, what it has behind begins there, all else is padding -> one pass after the other, each of which can be seen
(`Snapshot`) -> back to the seats when the block is filled. A row has the noise and the schedule that it would have
alone, and attention knows its own positions only, wherever it is laid: its answer is that of `LLaDA.sample`, up to
rounding.

A model of blocks keeps its keys and values between blocks. They are turned by a row's own positions: they can be moved
along the canvas and from slot to slot as they are. A prompt is read by a program of its own before its row joins.
Numbers of rows and lengths are rounded up (`rows_of`, `length_of`), so that programs are few.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lladax import sampling
from lladax.devices import sharding
from lladax.inference import engine as engines
from lladax.inference.engine import Engine, bucket
from lladax.mistake import Mistake
from lladax.sampling import Canvas, SamplerConfig, Settings, Shape, State

_PROGRAMS = 512  # that may be compiled at once


@dataclasses.dataclass(frozen=True)
class Row:
  """What is asked for: a prompt to continue, or (`fills`) a canvas whose [MASK]s are to be filled in."""

  ids: tuple[int, ...]
  settings: SamplerConfig  # its seed is one number; the row has the noise of `sample([prompt], seed=[seed])`
  fills: bool = False
  most: int | None = None  # tokens at most, where `gen_length` is None


class Snapshot(NamedTuple):
  """A row behind one of its passes; its own positions alone, prompt and all."""

  tokens_L: np.ndarray  # int32; [MASK] where nothing is committed yet
  unmasked_at_L: np.ndarray  # int32: the row's pass that committed it, from 1; 0: given, or masked
  confidence_L: np.ndarray  # float32: probability at the commit
  edited_at_L: np.ndarray | None  # int32: the row's pass that replaced it last; 0: none. None: nobody edits
  first: int  # what was asked for begins here: behind the prompt; 0 of a canvas
  stable: int  # so many positions from the left will not change any more
  passes: int  # the row's own forward passes
  done: bool


def rows_of(rows: int) -> int:
  """The rows of the program for so many: a power of two."""
  return 1 << (rows - 1).bit_length()


def length_of(length: int, W: int) -> int:
  """The length of the program for a canvas of so many tokens: 64, 96, 128, 192, 256, 384, ..., in whole blocks of W."""
  octave = max(64, 1 << (length - 1).bit_length())
  size = octave * 3 // 4 if length <= octave * 3 // 4 and octave > 64 else octave
  return W if length <= W else -(-size // W) * W


class Seat:
  """A row's canvas on the host, and where it stands."""

  def __init__(self, engine: Engine, row: Row):
    """Raises Mistake for what the model does not take; runs nothing."""
    c, model, n = row.settings, engine.model, len(row.ids)
    if not model.objective.fills:
      raise Mistake("a causal model is not served: its tokens come one after another; use --mode=sample")
    engine.check_ids(row.ids, "ids", masks=row.fills)
    engine.check_sampler(c)
    self.shape, self.settings = engines.compiled_for(model, *sampling.split(c, 1))
    self.shape = self.shape._replace(grows=False)  # nothing is laid out behind its block
    self.passes, self.done = 0, False
    block, grows = model.block, c.gen_length is None
    if row.fills:
      if grows:
        raise Mistake("sample.gen_length=None: a canvas has a length; leave it out")
      engine.check_length(n)
      W = block or min(c.block_length, bucket(n))
      masks = [i for i, id in enumerate(row.ids) if id == engine.mask_id]
      whole = -(-n // W) * W
      begin = 0 if block else n - whole
      self.first, self.end, self.origin = 0, n, whole if block else n
      more, steps = 0, engines.of_a_block(c.steps, W, max(len(masks), 1)) if block else None
    else:
      W = block or (c.block_length if grows else min(c.block_length, c.gen_length or 0))
      begin = n - n % W if block else n
      if c.gen_length is None:
        engine.check_length(n + 1)
        room = (model.max_length - begin) // W * W
        if room < 1 or begin + room <= n:
          raise Mistake(f"a prompt of {n} tokens leaves no block of {W} within model.max_length={model.max_length}")
        asked = room - (n - begin)
        asked = asked if row.most is None else min(asked, row.most)
        steps = c.steps
      else:
        engine.check_length(n + c.gen_length)
        asked, steps = c.gen_length, engines.of_a_block(c.steps, W, c.gen_length) if block else None
        if not block:
          sampling.check_blocks(asked, W)
      self.first, self.end, self.origin = n, n + asked, begin
      more = -(-(n - begin + asked) // W) * W - (n - begin)  # whole blocks
    self.shape = self.shape._replace(block_length=W)
    self.grows = grows
    self.ahead = row.fills or not (block or grows)  # what stands behind its block is laid out, too
    self.stops = bool(c.early_stop or grows)
    self.tokens_L = np.array([*row.ids, *[engine.mask_id] * more], np.int32)
    L = len(self.tokens_L)
    self.unmasked_at_L, self.confidence_L = np.zeros(L, np.int32), np.ones(L, np.float32)
    self.edited_at_L = np.zeros(L, np.int32) if self.shape.edits else None
    self._mask_id, self._ends, self.W, self.begin, self.next = engine.mask_id, engine.ends, W, begin, begin
    blocks = [self._masked(at) for at in range(begin, L, W)]
    if c.block_steps is not None:
      steps = c.block_steps
    if steps is not None:
      self._steps = [int(steps)] * len(blocks)
    else:  # shared by the blocks with a [MASK], the first ones getting one more
      each, rest = divmod(c.steps, max(sum(blocks), 1))
      self._steps = [max(each + (sum(blocks[:i]) < rest), 1) for i in range(len(blocks))]
    self._on(0)

  def _masked(self, at: int) -> bool:
    return bool((self.tokens_L[max(at, 0) : at + self.W] == self._mask_id).any())

  def _on(self, blocks: int) -> None:
    """So many blocks further, and to one where there is something to do."""
    self.next += blocks * self.W
    if self.shape.of_blocks and blocks:  # given ones are read like others
      self.done = not (self.tokens_L[self.next :] == self._mask_id).any()
      return
    while self.next < len(self.tokens_L) and not self._masked(self.next):
      self.next += self.W
    self.done = self.next >= len(self.tokens_L)

  @property
  def kind(self) -> Any:
    """Rows of one kind can be in one batch."""
    return self.shape, self.settings.bias.shape[1]

  @property
  def steps(self) -> int:
    """Of the block that is due."""
    return self._steps[(self.next - self.begin) // self.W]

  @property
  def laid(self) -> int:
    """So many of its positions are laid out."""
    return len(self.tokens_L) if self.ahead else min(len(self.tokens_L), self.next + self.W)

  def filled(self) -> None:
    """Its block is there."""
    if self.stops and (self.shape.of_blocks or not self.ahead):
      there_L = np.isin(self.tokens_L, self._ends) & (self.unmasked_at_L > 0)
      if there_L[: self.next + self.W].any():
        if self.grows:
          self.end = min(self.end, self.next + self.W)
        rest_L = self.tokens_L == self._mask_id
        self.tokens_L[rest_L], self.unmasked_at_L[rest_L] = self._ends[0], self.passes
    self._on(1)

  def snapshot(self) -> Snapshot:
    """What it is now."""
    L = self.end if self.ahead or self.shape.of_blocks else min(self.end, self.laid)
    tokens_L = self.tokens_L[:L].copy()
    masked_L = tokens_L == self._mask_id
    stable = int(np.argmax(np.append(masked_L, True)))
    if self.shape.edits and not self.done:
      stable = min(stable, max(self.next, self.first))
    edited_at_L = None if self.edited_at_L is None else self.edited_at_L[:L].copy()
    return Snapshot(
      tokens_L, self.unmasked_at_L[:L].copy(), np.where(masked_L, 0, self.confidence_L[:L]), edited_at_L, self.first,
      L if self.done else stable, self.passes, self.done,
    )  # fmt: skip


@dataclasses.dataclass
class Kept:
  """The cache of the rows of one kind, between two of their blocks."""

  cache: Any = None
  order: list[int] = dataclasses.field(default_factory=list)  # whose keys and values its rows are, of a model of blocks
  at: int = 0  # where the block that is due begins, and ...
  length: int = 0  # ... of how many positions


def length_together(seats: Sequence[Seat]) -> int:
  """Of the program for a block of all of these, of a model without blocks."""
  W = seats[0].W
  at, right = max(-(-seat.next // W) * W for seat in seats), max(seat.laid - seat.next for seat in seats)
  return length_of(at + -(-right // W) * W, W)


class Slots:
  """Rows by number, of any kinds. `begin` lays a block of some of one kind out, `step` fills it, pass by pass.

  What the methods do follows from how they are called: several processes that call the same stay together.
  """

  def __init__(self, engine: Engine):
    self._engine, self._kept = engine, {}
    self.seats: dict[int, Seat] = {}
    self._state: State | None = None  # of the block that has begun
    self._order: list[int] = []  # its rows
    self._now = Kept()  # of its kind
    self._programs: set[Any] = set()  # that have been compiled

  def add(self, n: int, row: Row) -> Seat:
    """A row that `begin` may name from now on."""
    self.seats[n] = seat = Seat(self._engine, row)
    return seat

  def drop(self, rows: Collection[int]) -> None:
    """Rows that are done, or that nobody waits for any more: the pass that is next does not either."""
    for n in rows:
      self.seats.pop(n, None)
    kinds = {seat.kind for seat in self.seats.values()}
    self._kept = {
      kind: kept for kind, kept in self._kept.items() if kind in kinds or (self._state and kept is self._now)
    }
    at = [b for b, n in enumerate(self._order) if n in rows]
    if self._state is None or not at:
      return
    tokens_BL = np.array(jax.device_get(self._state.canvas.tokens_BL))
    tokens_BL[at] = np.where(tokens_BL[at] == self._engine.mask_id, self._engine.ends[0], tokens_BL[at])
    state = self._state._replace(canvas=self._state.canvas._replace(tokens_BL=self._engine.put(tokens_BL)))
    if state.open_B is not None:
      open_B = np.array(jax.device_get(state.open_B))
      open_B[at] = False
      state = state._replace(open_B=self._engine.put(open_B))
    self._state = state

  def begin(self, rows: Sequence[int]) -> None:
    """Lays out the block that is due, of each of these rows, which are of one kind and not done."""
    engine, seats = self._engine, [self.seats[n] for n in rows]
    kind, shape = seats[0].kind, seats[0].shape
    assert all(seat.kind == kind and not seat.done for seat in seats)
    self._now = now = self._kept.setdefault(kind, Kept())
    W = shape.block_length
    at = max(-(-seat.next // W) * W for seat in seats)
    if shape.of_blocks:
      right = -(-max(seat.laid - seat.next for seat in seats) // W) * W
      self._keep_up(now, rows, shape, max(at, W), right)
    else:
      now.order, now.at, now.length = list(rows), at, length_together(seats)
    at, B, L = now.at, rows_of(len(now.order)), now.length
    tokens_BL, segment_BL = np.full((B, L), engine.ends[0], np.int32), np.zeros((B, L), np.int32)
    unmasked_at_BL, edited_at_BL = np.zeros((B, L), np.int32), np.zeros((B, L), np.int32)
    confidence_BL, steps_BN = np.ones((B, L), np.float32), np.ones((B, L // W), np.int32)
    step_B, origin_B = np.zeros(B, np.int32), np.zeros(B, np.int32)
    each, self._offsets = [seats[0].settings] * B, {}
    for b, n in enumerate(now.order):
      if n not in rows:  # it has left, and its place is free
        continue
      seat = self.seats[n]
      self._offsets[b] = offset = at - seat.next
      own, laid = np.s_[b, offset : offset + seat.laid], seat.laid
      tokens_BL[own], unmasked_at_BL[own] = seat.tokens_L[:laid], seat.unmasked_at_L[:laid]
      confidence_BL[own], segment_BL[own] = seat.confidence_L[:laid], 1
      if seat.edited_at_L is not None:
        edited_at_BL[own] = seat.edited_at_L[:laid]
      step_B[b], origin_B[b], steps_BN[b], each[b] = seat.passes, offset + seat.origin, seat.steps, seat.settings
    self._settings = Settings._make(np.concatenate(x) for x in zip(*each, strict=True))
    arrays = (tokens_BL, unmasked_at_BL, confidence_BL, step_B, np.int32(0), edited_at_BL if shape.edits else None)
    canvas = Canvas._make(arrays)
    more = (np.zeros(B, bool), np.zeros(B, np.int32)) if shape.edits else (None, None)
    if shape.cache and (now.cache is None or jax.tree.leaves(now.cache)[0].shape[1:3] != (B * (1 + shape.guided), L)):
      with sharding.on_mesh_of(engine.params):
        now.cache = engines.new_cache(engine.model, B * (1 + shape.guided), L)
    state = self._engine.put(State._make((canvas, steps_BN, np.int32(at // W), np.int32(0), None, *more)))
    self._bound((kind, B, L))
    cache = jax.device_put(now.cache, jax.tree.map(lambda x: x.sharding, now.cache))  # said to be there: one program
    self._state, self._order, self._shape = state._replace(cache=cache), now.order, shape
    self._segment_BL, self._origin_B, self._passes = segment_BL, origin_B, 0
    self._most = 2 + int(sampling.most_passes(W, steps_BN, self._settings, shape))

  def step(self) -> bool:
    """One pass over the block that has begun; False: it is filled.

    Raises:
      RuntimeError: the program leaves it masked.
    """
    assert self._state is not None
    engine, state, now, W = self._engine, self._state, self._now, self._shape.block_length
    state = engine.advance(
      state, self._segment_BL, self._settings, self._origin_B, np.int32(self._passes + 1), np.int32(now.at // W + 1),
      self._shape, 0, self._passes > 0, engine.layers,
    )  # fmt: skip
    host = jax.device_get(state._replace(cache=None))
    self._state, self._passes, canvas = state, self._passes + 1, host.canvas
    goes_on = int(host.block) * W <= now.at and int(canvas.nfe) == self._passes
    if goes_on and self._passes > self._most:
      raise RuntimeError(f"a block of {W} tokens is not filled after {self._passes} passes")
    for b, offset in self._offsets.items():
      if (seat := self.seats.get(self._order[b])) is None:
        continue
      own, laid, seat.passes = np.s_[b, offset : offset + seat.laid], seat.laid, int(canvas.step_B[b])
      seat.tokens_L[:laid], seat.unmasked_at_L[:laid] = canvas.tokens_BL[own], canvas.unmasked_at_BL[own]
      seat.confidence_L[:laid] = canvas.confidence_BL[own]
      if seat.edited_at_L is not None:
        seat.edited_at_L[:laid] = canvas.edited_at_BL[own]
      if not goes_on:
        seat.filled()
    if not goes_on:
      now.cache = state.cache.cache if isinstance(state.cache, engines.Read) else state.cache
      now.at, self._state, self._order = now.at + W, None, []
    return goes_on

  def warm(self, c: SamplerConfig, rows: int, longest: int, say: Callable[[str], Any] = str) -> int:
    """Compiles what rows of these settings need, up to so many at once and canvases of so many tokens.

    Args:
      c: of the rows.
      rows: at once, at most.
      longest: tokens of a canvas, at most.
      say: is told what comes next.

    Returns:
      How many programs.
    """
    c = dataclasses.replace(c, seed=0, steps=2, block_steps=None, tokens_per_step=None, eps=None, threshold=None)
    W = Seat(self._engine, Row((), c)).W
    lengths = {length_of(n, W): n for n in range(W, max(longest, W) + 1, W)}  # of a program: the longest canvas for it
    each = sorted({rows_of(n + 1) for n in range(rows)})
    for L, n in lengths.items():
      ids = (self._engine.ends[0],) * (n - W)
      for B in each:
        say(f"rows: {B}, length: {L}")
        rows_here = [-1 - b for b in range(B)]
        for b in rows_here:
          self.add(b, Row(ids, dataclasses.replace(c, gen_length=W)))
        self.begin(rows_here)
        while self.step():
          pass
        self.drop(rows_here)
    return len(lengths) * len(each)

  def score(self, row: Sequence[int]) -> Any:
    """What `Engine.chain` says of a row of ids."""
    return self._engine.chain(row)

  def _bound(self, program: Any) -> None:
    """Lets go of all programs when there are too many: whoever asks may ask for ever new ones."""
    self._programs.add(program)
    if len(self._programs) > _PROGRAMS:
      self._programs = {program}
      jax.clear_caches()

  def _keep_up(self, now: Kept, rows: Sequence[int], shape: Shape, least: int, right: int) -> None:
    """The cache of a model of blocks: of its rows what is kept, moved to where they are laid out, and new ones'."""
    engine, B, W = self._engine, rows_of(len(rows)), shape.block_length
    kept, new = ([n for n in rows if (n in now.order) is there] for there in (True, False))
    if not new and B == rows_of(len(now.order)) and now.at + right <= now.length:
      return
    length, order = length_of(least + right, W), kept + new
    with sharding.on_mesh_of(engine.params):
      cache = engines.new_cache(engine.model, B * (1 + shape.guided), length)
      if kept:
        from_B = [now.order.index(n) for n in kept]
        cache = self._placed(cache, now.cache, from_B, 0, least - now.at, shape.guided)
      for b, n in enumerate(new, len(kept)):
        if (seat := self.seats[n]).next > W:  # the block before the one that is due is read with that
          read, size = self._read(seat, shape.guided)
          cache = self._placed(cache, read, [0], b, least - size, shape.guided)
    now.cache, now.order, now.at, now.length = cache, order, least, length

  def _placed(self, cache: Any, other: Any, rows: list[int], first: int, shift: int, guided: bool) -> Any:
    """A cache with these rows of another one, from row `first` on, so many positions further right."""
    B, others = (jax.tree.leaves(x)[0].shape[1] // (1 + guided) for x in (cache, other))
    from_B = np.full(B, -1, np.int32)
    from_B[first : first + len(rows)] = rows
    if guided:
      from_B = np.concatenate([from_B, np.where(from_B < 0, -1, from_B + others)])
    return _placed(cache, other, from_B, np.int32(shift))

  def _read(self, seat: Seat, guided: bool) -> tuple[Any, int]:
    """The cache of what a row has before its block, at the right end of so many positions."""
    engine, n = self._engine, seat.next
    L = length_of(n, seat.W)
    tokens_BL, segment_BL = np.full((1, L), engine.ends[0], np.int32), np.zeros((1, L), np.int32)
    tokens_BL[0, L - n :], segment_BL[0, L - n :] = seat.tokens_L[:n], 1
    zeros_BL = np.zeros((1, L), np.int32)
    canvas = Canvas._make((tokens_BL, zeros_BL, np.ones((1, L), np.float32), zeros_BL[:, 0], np.int32(0), None))
    cache = engines.prefill(
      engine.params, engines.new_cache(engine.model, 1 + guided, L), canvas, segment_BL, engine.layers,
      model=engine.model, known=L, guided=guided, mask_id=engine.mask_id,
    )  # fmt: skip
    return cache, L


@functools.partial(sharding.jit, donate_argnames="cache")
def _placed(cache, other, from_B, shift):
  """A cache with rows of another one, so many positions further right; -1: a row stays as it is."""

  def place(x_NBLGK, other_NBLGK):
    at_L = jnp.arange(x_NBLGK.shape[2]) - shift
    there_L = (at_L >= 0) & (at_L < other_NBLGK.shape[2])
    taken = jnp.take(other_NBLGK, jnp.maximum(from_B, 0), axis=1)
    taken = jnp.take(taken, jnp.clip(at_L, 0, other_NBLGK.shape[2] - 1), axis=2)
    put_BL = (from_B >= 0)[:, None] & there_L[None]
    return jnp.where(put_BL[None, :, :, None, None], taken, x_NBLGK)

  return engines.laid_out(jax.tree.map(place, cache, other))
