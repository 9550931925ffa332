"""The engine: rows of ids and settings in, canvases out. It knows no text.

The life of a row: ids -> a left-padded batch whose length is rounded up (`bucket`), so that compiled programs are
reused (`Job`) -> [MASK]s behind it, all of them at once, or more and more until every row has ended -> sampling.run,
one compiled program, entered once, or once a block or a step -> `Filled`.
A model of blocks counts them from each row's own start: rows are padded by whole blocks, so that they line up; what a
prompt has behind its last whole block is filled up together with new tokens. `Filled` knows nothing of it.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from lladax import autoregressive, diffusion, sampling
from lladax.devices import sharding
from lladax.mistake import Mistake
from lladax.model.mask_predictor import MaskPredictorConfig, Params
from lladax.sampling import Canvas, SamplerConfig, Settings, Shape, State

Ids = list[int]
_NEVER = np.int32(2**30)


def bucket(length: int) -> int:
  """The length that prompts and canvases are padded to: multiples of 32 up to 256, then eight to an octave.

  32, 64, ..., 256, 288, 320, ..., 512, 576, ...: a program is compiled once for each, and at most an eighth is padding.
  """
  quantum = max(32, 2 ** ((length - 1).bit_length() - 4)) if length else 1
  return -(-length // quantum) * quantum


class Job(NamedTuple):
  """A batch that is to be filled."""

  tokens_BL: np.ndarray  # int32, left-padded: prompts, or canvases with the [MASK]s that they have
  padding_B: np.ndarray  # so many positions at the left are none of a row's own
  first: int  # where the blocks begin
  origin: int  # the position from which the noise counts the others
  lengths: list[int]  # of the canvas behind `first`; it grows from each to the next
  shape: Shape
  settings: Settings
  given_B: np.ndarray | None = None  # of a model of blocks: so many tokens behind `first` are the prompt's
  own_B: np.ndarray | None = None  # and so many are a row's own, with its prompt; None: all that are not padding


class Read(NamedTuple):
  """A cache within a block."""

  cache: Any
  read: Any  # as `MaskPredictorConfig.reading` makes it


class Filled(NamedTuple):
  """A batch as it stands; [MASK] where it is not filled yet."""

  canvas: Any  # a Canvas of NumPy's arrays
  padding_B: np.ndarray
  first: int  # what was asked for begins here


@dataclasses.dataclass(frozen=True, eq=False)
class Engine:
  """A mask predictor (or a causal model) with its parameters, and what its ids mean. Settings: one, or one a row."""

  model: MaskPredictorConfig
  params: Params = dataclasses.field(repr=False)
  mask_id: int
  ends: tuple[int, ...]  # ids that end a row, EOS first
  vocab_size: int

  def extend(self, rows: Sequence[Ids], settings: SamplerConfig | Sequence[SamplerConfig]) -> Job:
    """Prompts that are to be continued, `gen_length` tokens or until EOS; see `LLaDA.sample` for the mistakes."""
    each = [settings] if isinstance(settings, SamplerConfig) else settings
    shape, numbers = compiled_for(self.model, *sampling.split(settings, len(rows)))
    for c in each:
      self.check_sampler(c)
    if self.model.block:
      return self._extend_blocks(rows, shape, numbers, each[0].gen_length)
    longest, n, W = max(map(len, rows)), each[0].gen_length, shape.block_length
    self.check_length(longest + (n or 0))
    if n is None:
      lengths = self._growing(longest, longest, W)
    else:
      if self.model.objective.fills:
        sampling.check_blocks(n, W)
      lengths = [n]
    first = bucket(longest)
    return Job(*self._left_pad(rows, first), first, first, lengths, shape, numbers)

  def _growing(self, prompt: int, behind: int, W: int) -> list[int]:
    """The lengths of a canvas that grows `behind` so many tokens, by whole blocks, as far as the model goes."""
    most = self.model.max_length
    room = (most - behind) // W * W
    if room < 1:
      raise Mistake(f"a prompt of {prompt} tokens leaves no block of {W} within model.max_length={most}")
    lengths = [min(4 * W, room)]
    while lengths[-1] < room:
      lengths.append(min(2 * lengths[-1], room))
    return lengths

  def _extend_blocks(self, rows: Sequence[Ids], shape: Shape, settings: Settings, gen_length: int | None) -> Job:
    """`extend` of a model of blocks."""
    n = self.model.block
    length_B = np.array([len(row) for row in rows])
    self.check_length(int(length_B.max()) + (gen_length or 1))
    given_B = length_B % n
    longest = int((length_B - given_B).max())
    first = -(-bucket(max(longest, n)) // n) * n  # a block before the first one that is filled, at least
    if gen_length is None:
      lengths = self._growing(int(length_B.max()), longest, n)
      own_B, behind_B = None, np.full(len(rows), n)
    else:
      own_B = length_B + gen_length
      behind_B = -(-(given_B + gen_length) // n) * n
      lengths = [int(behind_B.max())]
      settings = settings._replace(steps=of_a_block(settings.steps, n, gen_length))
    tokens_BL = np.full((len(rows), first + int(behind_B.max())), self.ends[0], np.int32)
    padding_B = first - (length_B - given_B)
    for row, tokens_L, padding, behind in zip(rows, tokens_BL, padding_B, behind_B, strict=True):
      tokens_L[padding : padding + len(row)] = row
      tokens_L[padding + len(row) : first + behind] = self.mask_id
    return Job(tokens_BL, padding_B, first, first, lengths, shape, settings, given_B, own_B)

  def _fill_blocks(self, rows: Sequence[Ids], shape: Shape, settings: Settings) -> Job:
    """`fill` of a model of blocks: right ends of blocks line up."""
    n = self.model.block
    own_B = np.array([len(row) for row in rows])
    whole_B = -(-own_B // n) * n
    L = n + -(-bucket(int(whole_B.max())) // n) * n
    padding_B = L - whole_B
    tokens_BL = np.full((len(rows), L), self.ends[0], np.int32)
    for row, tokens_L, padding in zip(rows, tokens_BL, padding_B, strict=True):
      tokens_L[padding : padding + len(row)] = row
    masks_BL = tokens_BL == self.mask_id
    first = max(int(np.argmax(masks_BL.any(axis=0))) // n * n, n)  # what stands before is read in one pass
    steps = of_a_block(settings.steps, n, np.maximum(masks_BL.sum(axis=1), 1))
    return Job(tokens_BL, padding_B, first, L, [L - first], shape, settings._replace(steps=steps), None, own_B)

  def fill(self, rows: Sequence[Ids], settings: SamplerConfig | Sequence[SamplerConfig]) -> Job:
    """Canvases of any lengths whose [MASK]s are to be filled."""
    shape, numbers = compiled_for(self.model, *sampling.split(settings, len(rows)))
    if shape.grows:
      raise Mistake("sample.gen_length=None: a canvas has a length; leave it out")
    for c in [settings] if isinstance(settings, SamplerConfig) else settings:
      self.check_sampler(c)
    if self.model.block:
      return self._fill_blocks(rows, shape, numbers)
    longest = bucket(max(map(len, rows)))
    W = min(shape.block_length, longest)
    L = -(-longest // W) * W
    return Job(*self._left_pad(rows, L), 0, L, [L], shape, numbers)

  def run(self, job: Job, every: str = "canvas") -> Iterator[Filled]:
    """The canvas whenever a "block" or a "step" is done, or the whole "canvas"; one compiled program for all three.

    It ends after as many calls as there are blocks or steps, whatever the program leaves masked.
    """
    if not self.model.objective.fills:
      yield self._continue(job)
      return
    first, shape, (B, L) = job.first, job.shape, job.tokens_BL.shape
    zeros_BL = np.zeros((B, L), np.int32)
    canvas = (job.tokens_BL, zeros_BL, np.ones((B, L), np.float32), np.zeros(B, np.int32), np.int32(0))
    canvas += (zeros_BL if shape.edits else None,)
    canvas, block = Canvas(*jax.device_get(canvas)), np.int32(0)
    for length in job.lengths:
      canvas, L, W = self._grown(canvas, first, length), first + length, min(shape.block_length, length)
      at_1L = np.arange(L)[None]
      segment_BL = at_1L >= job.padding_B[:, None]
      if job.own_B is not None:  # a canvas may end within a block; what continues a prompt fills its last one up
        own_B = job.own_B if job.given_B is None else -(-job.own_B // W) * W
        segment_BL &= at_1L < (job.padding_B + own_B)[:, None]
      segment_BL = segment_BL.astype(np.int32)
      padded = job.padding_B.any() or shape.grows or shape.of_blocks
      with sharding.on_mesh_of(self.params):
        cache = new_cache(self.model, B * (1 + shape.guided), L) if shape.cache or shape.of_blocks else None
        if shape.of_blocks:
          known = first + int(block) * W
          cache = prefill(
            self.params, cache, canvas, segment_BL, model=self.model, known=known, guided=shape.guided,
            mask_id=self.mask_id,
          )  # fmt: skip
      begun = _start(
        canvas.tokens_BL, job.settings.steps, shape, mask_id=self.mask_id, first=first,
        block_steps_B=job.settings.block_steps,
      )  # fmt: skip
      host = jax.device_get(begun)._replace(canvas=canvas, block=block)
      state = self.put(host)
      state = state._replace(cache=jax.device_put(cache, jax.tree.map(lambda x: x.sharding, cache)))
      blocks = length // W - int(block)
      most = int(sampling.most_passes(W, host.steps_BN, job.settings, shape))
      for _ in range({"block": blocks, "step": blocks * most}.get(every, 1)):
        until_nfe = np.int32(host.canvas.nfe + 1) if every == "step" else _NEVER
        until_block = np.int32(host.block + 1) if every == "block" else _NEVER
        segments, origin = segment_BL if padded else None, np.int32(job.origin)
        state = self.advance(state, segments, job.settings, origin, until_nfe, until_block, shape, first)
        host = jax.device_get(state._replace(cache=None))
        end = first + int(host.block + (host.step > 0)) * W if shape.grows else L
        shown = jax.tree.map(lambda x, end=end: x[:, :end] if x.ndim == 2 else x, host.canvas)
        filled = Filled(shown, job.padding_B, first)
        yield self._in_line(filled, job) if shape.of_blocks else filled
        edits = shape.edits and host.step > 0 and host.open_B.any()
        if not edits and not (host.canvas.tokens_BL == self.mask_id).any():
          break
      canvas, block = host.canvas, host.block
      if self._ended(canvas, first).all():
        return

  def put(self, tree: Any) -> Any:
    """Arrays where a program leaves the canvas, too: it is compiled once."""
    where = jax.tree.leaves(self.params)[0].sharding
    where = NamedSharding(where.mesh, sharding.spec("")) if isinstance(where, NamedSharding) else where
    return jax.device_put(tree, where)

  @functools.cached_property
  def layers(self) -> Any:
    """The layers cut apart, for those who enter a program again and again: on a CPU each entry copies them.

    They are there a second time, then. None: they need not be cut.
    """
    if not self.model.unrolled:
      return None
    with sharding.on_mesh_of(self.params):
      return jax.jit(lambda params: self.model.bind(params).layers())(self.params)

  def advance(
    self, state: State, segment_BL: Any, settings: Settings, origin: Any, until_nfe: Any, until_block: Any,
    shape: Shape, first: int, within: bool = False, layers: Any = None,
  ) -> State:  # fmt: skip
    """Further, up to a pass or a block (see `sampling.run`); `within`: a pass further in a block that has begun.

    `layers`: `Engine.layers`. What the passes of a block only read of the cache is made once for them, and no program
    hands the cache through.
    """
    cache, read = (state.cache.cache, state.cache.read) if isinstance(state.cache, Read) else (state.cache, None)
    within &= cache is not None
    with sharding.on_mesh_of(self.params):
      if within and read is None:
        read = reading(cache, model=self.model)
      state = unmask_until(
        self.params, state._replace(cache=None if within else cache), segment_BL, settings, origin, until_nfe,
        until_block, read if within else None, layers, model=self.model, shape=shape, mask_id=self.mask_id,
        ends=self.ends, vocab_size=self.vocab_size, first=first,
      )  # fmt: skip
    return state._replace(cache=Read(cache, read)) if within else state

  def _ended(self, canvas: Any, first: int) -> np.ndarray:
    """Which rows have met an end behind their prompts, bool [B]."""
    there_BL = np.isin(canvas.tokens_BL, self.ends) & (canvas.unmasked_at_BL > 0)
    return there_BL[:, first:].any(axis=1)

  def _in_line(self, filled: Filled, job: Job) -> Filled:
    """As the rows of other models are laid out: what is asked for begins at one place, or right ends line up."""
    canvas, padding_B, first = filled
    L = canvas.tokens_BL.shape[1]
    end_B = np.full(len(padding_B), L) if job.own_B is None else np.minimum(padding_B + job.own_B, L)
    given_B = end_B - padding_B if job.given_B is None else first - padding_B + job.given_B
    new_first = int(given_B.max())
    width = new_first + int((end_B - padding_B - given_B).max())
    ended_B = self._ended(canvas, first)

    def laid(array_BL, fill_B):
      out_BL = np.repeat(np.asarray(fill_B, array_BL.dtype)[:, None], width, axis=1)
      for out_L, array_L, padding, given, end in zip(out_BL, array_BL, padding_B, given_B, end_B, strict=True):
        out_L[new_first - given : new_first - given + end - padding] = array_L[padding:end]
      return out_BL

    zeros_B = np.zeros(len(padding_B))
    token_B = np.where(ended_B, self.ends[0], self.mask_id)  # behind a row that has less room for its answer
    tokens_BL = laid(canvas.tokens_BL, token_B)
    tokens_BL = np.where(np.arange(width) < (new_first - given_B)[:, None], self.ends[0], tokens_BL)
    canvas = canvas._replace(
      tokens_BL=tokens_BL, unmasked_at_BL=laid(canvas.unmasked_at_BL, zeros_B),
      confidence_BL=laid(canvas.confidence_BL, zeros_B + 1),
      edited_at_BL=None if canvas.edited_at_BL is None else laid(canvas.edited_at_BL, zeros_B),
    )  # fmt: skip
    return Filled(canvas, new_first - given_B, 0 if job.given_B is None else new_first)

  def _grown(self, canvas: Any, first: int, length: int) -> Any:
    """The canvas with so many positions behind `first`: new ones are [MASK], or EOS of the last pass in ended rows."""
    more, ended_B = first + length - canvas.tokens_BL.shape[1], self._ended(canvas, first)
    token_B, at_B = np.where(ended_B, self.ends[0], self.mask_id), np.where(ended_B, canvas.step_B, 0)

    def grow(array_BL, new_B):
      return np.concatenate([array_BL, np.tile(new_B[:, None], more)], axis=1, dtype=array_BL.dtype)

    edited_at_BL = canvas.edited_at_BL
    return canvas._replace(
      tokens_BL=grow(canvas.tokens_BL, token_B), unmasked_at_BL=grow(canvas.unmasked_at_BL, at_B),
      confidence_BL=grow(canvas.confidence_BL, np.ones(len(token_B))),
      edited_at_BL=None if edited_at_BL is None else grow(edited_at_BL, np.zeros(len(token_B), np.int32)),
    )  # fmt: skip

  def _continue(self, job: Job) -> Filled:
    """A causal model's: one token after another."""
    first, L = job.first, job.first + job.lengths[0]
    tokens_BL = np.pad(job.tokens_BL, ((0, 0), (0, L - first)), constant_values=self.ends[0])
    segment_BL = (np.arange(L) >= job.padding_B[:, None]).astype(np.int32)
    with sharding.on_mesh_of(self.params):
      tokens_BL, confidence_BL, nfe = _autoregressive_sample(
        self.params, tokens_BL, segment_BL, job.settings, model=self.model, prompt_length=first, eos_id=self.ends[0],
        mask_id=self.mask_id, vocab_size=self.vocab_size, chooses=job.shape.chooses,
      )  # fmt: skip
    at_BL = np.tile(np.maximum(np.arange(1, L + 1, dtype=np.int32) - first, 0), (len(tokens_BL), 1))
    canvas = jax.device_get((tokens_BL, at_BL, confidence_BL, nfe, nfe))
    return Filled(Canvas(*canvas), job.padding_B, first)

  def log_likelihood(
    self, pairs: Sequence[tuple[Ids, Ids]], *, num_samples: int, guidance_scale: float, seed: int, method: str
  ) -> np.ndarray:
    """Log p(answer | prompt) of every pair in nats; see `LLaDA.log_likelihood`."""
    exact = self.model.objective.exact
    if exact:
      method, num_samples = "monte_carlo", 1
    # Every forward pass of every pair is a row; rows of one bucketed length share batches, whosever they are.
    total, lengths = np.zeros(len(pairs)), [bucket(len(p) + len(a)) for p, a in pairs]
    choices: dict[tuple[int, ...], list[int]] = {}  # answers of one token to one prompt share a pass
    passes = {}
    for i, (p, a) in enumerate(pairs):
      if len(a) == 1 and not exact:
        choices.setdefault(tuple(p), []).append(i)
      else:
        passes[i] = len(a) if method == "chain_rule" else num_samples
    for L in sorted(set(lengths)):
      for batch, size in _batched([p for p, at in choices.items() if lengths[at[0]] == L], L):
        for p, log_p_V in zip(batch, self._choices(batch, L, size, guidance_scale), strict=False):
          total[choices[p]] = log_p_V[[pairs[i][1][0] for i in choices[p]]]
      for batch, size in _batched([(i, s) for i, n in passes.items() if lengths[i] == L for s in range(n)], L):
        drawn = self._draws([(*pairs[i], s, passes[i]) for i, s in batch], L, size, seed, method, guidance_scale)
        np.add.at(total, [i for i, _ in batch], drawn[: len(batch)])
    if method == "monte_carlo":
      total[list(passes)] /= num_samples
    return total

  def _draws(self, rows: list[tuple], L: int, size: int, seed: int, method: str, guidance_scale: float) -> np.ndarray:
    """The terms of (prompt, answer, which of its passes, of how many), in nats; short batches repeat their last row."""
    tokens_BL = np.full((size, L), self.ends[0], np.int32)
    scored_BL, segment_BL = np.zeros((size, L), bool), np.zeros((size, L), np.int32)
    for b, (p, a, _, _) in enumerate(rows):
      n = len(p) + len(a)
      tokens_BL[b, :n], scored_BL[b, len(p) : n], segment_BL[b, :n] = p + a, True, 1
    for array_BL in (tokens_BL, scored_BL, segment_BL):
      array_BL[len(rows) :] = array_BL[len(rows) - 1]
    sample_B, samples_B = (np.resize([row[i] for row in rows], size).astype(np.int32) for i in (2, 3))
    with sharding.on_mesh_of(self.params):
      return np.asarray(_likelihood(
        self.params, tokens_BL, scored_BL, segment_BL, sample_B, samples_B, np.uint32(seed),
        np.float32(guidance_scale + 1), model=self.model, mask_id=self.mask_id, eos_id=self.ends[0],
        guided=guidance_scale > 0, method=method,
      ))  # fmt: skip

  def _choices(self, prompts: list[tuple[int, ...]], L: int, size: int, guidance_scale: float) -> np.ndarray:
    """Log p [B, V] of every id behind each prompt; short batches are filled up."""
    at_B = np.zeros(size, np.int32)
    at_B[: len(prompts)] = [len(p) for p in prompts]
    segment_BL = (np.arange(L) <= at_B[:, None]).astype(np.int32)
    tokens_BL = np.full((size, L), self.mask_id, np.int32)
    for b, p in enumerate(prompts):
      tokens_BL[b, : len(p)] = p
    with sharding.on_mesh_of(self.params):
      return np.asarray(_next(
        self.params, tokens_BL, segment_BL, at_B, np.float32(guidance_scale + 1), model=self.model,
        mask_id=self.mask_id, guided=guidance_scale > 0,
      ))  # fmt: skip

  def chain(self, row: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each token of a row, given those before it, the rest masked: (log p, the most probable id, its log p)."""
    L, found = bucket(len(row)), []
    tokens_1L, segment_1L = np.full((1, L), self.ends[0], np.int32), np.zeros((1, L), np.int32)
    tokens_1L[0, : len(row)], segment_1L[0, : len(row)] = row, 1
    for batch, size in _batched(list(range(len(row))), L):
      with sharding.on_mesh_of(self.params):
        told = _chain(
          self.params, tokens_1L, segment_1L, np.resize(batch, size).astype(np.int32), model=self.model,
          mask_id=self.mask_id, vocab_size=self.vocab_size,
        )  # fmt: skip
      found.append([np.asarray(x)[: len(batch)] for x in told])
    log_p, top, top_log_p = (np.concatenate(x) for x in zip(*found, strict=True))
    return log_p, top, top_log_p

  def logits(self, tokens_BL: np.ndarray, segment_BL: np.ndarray | None) -> np.ndarray:
    """Float32 logits [B, L, V]; `segment_BL` 0 = padding, None: there is none."""
    with sharding.on_mesh_of(self.params):
      return np.asarray(_logits(self.params, tokens_BL, segment_BL, model=self.model, eos_id=self.ends[0]))

  def check_ids(self, ids: Sequence[int], where: str, masks: bool = False) -> None:
    """Raises Mistake for what is not in the vocabulary, and for [MASK] unless there may be `masks`."""
    for i, x in enumerate(ids):
      if x == self.mask_id and not masks:
        raise Mistake(f"{where}[{i}]={x} is [MASK], which has no place here: unmask() is what fills a canvas in")
      if x != self.mask_id and not 0 <= x < self.vocab_size:
        raise Mistake(f"{where}[{i}]={x}: the ids of this model's vocabulary are 0 to {self.vocab_size - 1}")

  def check_sampler(self, c: SamplerConfig) -> None:
    """Raises Mistake for options that are not for this model."""
    self.model.objective.check_sampler(c)
    self.check_ids([id for id, _ in c.logit_bias], "sample.logit_bias")

  def check_length(self, length: int, what: str = "a canvas") -> None:
    """Raises Mistake for more tokens than the model takes."""
    if length > self.model.max_length:
      raise Mistake(f"{what} of {length} tokens is longer than model.max_length={self.model.max_length}")

  def _left_pad(self, rows: Sequence[Ids], length: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [B, length], padding [B]): right ends line up."""
    tokens_BL = np.array([[self.ends[0]] * (length - len(row)) + list(row) for row in rows], np.int32)
    return tokens_BL.reshape(len(rows), length), np.array([length - len(row) for row in rows])


def _batched(rows: list[Any], L: int) -> Iterator[tuple[list[Any], int]]:
  """(rows, rows of the program) of batches of about 8192 tokens, in rows of length L."""
  size = min(max(1, 8192 // L), 2 ** (len(rows) - 1).bit_length()) if rows else 1
  for first in range(0, len(rows), size):
    yield rows[first : first + size], size


def _positions(segment_BL: jax.Array) -> jax.Array:
  """Positions counted from each row's own first token, so that padding turns no key."""
  return jnp.maximum(jnp.cumsum(segment_BL > 0, axis=1) - 1, 0)


def _allowed(rows: int, mask_id: int, vocab_size: int) -> jax.Array:
  """Bool [V]: the ids that may be generated; not [MASK], nor rows of the embedding that are no token."""
  id_V = jnp.arange(rows)
  return (id_V != mask_id) & (id_V < vocab_size)


new_cache = jax.jit(MaskPredictorConfig.new_cache, static_argnums=(0, 1, 2))
reading = jax.jit(lambda cache, *, model: model.reading(cache), static_argnames="model")
_start = jax.jit(sampling.start, static_argnames=("shape", "mask_id", "first"))  # one program, not one a line


def compiled_for(model: MaskPredictorConfig, shape: Shape, settings: Settings) -> tuple[Shape, Settings]:
  """As `sampling.split` split them, for a model: one of blocks has a block length of its own, and a cache."""
  return (shape._replace(block_length=model.block, of_blocks=True) if model.block else shape), settings


def of_a_block(steps_B: Any, block: int, asked: Any) -> np.ndarray:
  """The steps of a whole block, where all that is asked for has so many; int32 [B]."""
  return np.maximum(-(-np.asarray(steps_B, np.int64) * block // asked), 1).astype(np.int32)


def _twice(canvas_BL: jax.Array, given_BL: jax.Array, mask_id: int) -> jax.Array:
  """A batch for guidance: its second half sees what is given masked."""
  return jnp.concatenate([canvas_BL, jnp.where(given_BL, mask_id, canvas_BL)])


@functools.partial(sharding.jit, static_argnames=("model", "known", "guided", "mask_id"), donate_argnames="cache")
def prefill(params, cache, canvas, segment_BL, layers=None, *, model, known, guided, mask_id):
  """The cache of a model of blocks with the keys and values of the first `known` positions, whole blocks."""
  given_BL = (canvas.tokens_BL != mask_id) & (canvas.unmasked_at_BL == 0)
  canvas_BL = _twice(canvas.tokens_BL, given_BL, mask_id) if guided else canvas.tokens_BL
  segment_BL = jnp.tile(segment_BL, (1 + guided, 1))
  visible = model.visible(segment_BL.shape[1], segment_BL, W=known)
  return laid_out(model.bind(params).hidden(canvas_BL[:, :known], visible, _positions(segment_BL), cache, layers)[1])


def laid_out(x: Any) -> Any:
  """How a program leaves what it returns on a mesh: caches sliced along rows and heads, all else whole everywhere."""
  return jax.tree.map(lambda x: sharding.constrain(x, ".B.G." if x.ndim == 5 else "." * x.ndim), x)


@functools.partial(sharding.jit, static_argnames=("model", "shape", "mask_id", "ends", "vocab_size", "first"))
def unmask_until(
  params, state, segment_BL, settings, origin, until_nfe, until_block, read=None, layers=None, *, model, shape, mask_id,
  ends, vocab_size, first,
) -> State:  # fmt: skip
  """`segment_BL` None: no row is padded, attention needs no mask. If canvases grow nothing behind a block is seen."""
  bound, (B, L) = model.bind(params), state.canvas.tokens_BL.shape
  layers, at_L = bound.layers() if layers is None else layers, jnp.arange(L)
  position_BL = None if segment_BL is None else _positions(segment_BL)
  given_BL = (state.canvas.tokens_BL != mask_id) & (state.canvas.unmasked_at_BL == 0)

  def predict(canvas_BL, start, W, cache, begins=False):
    segment, position = segment_BL, position_BL
    if shape.grows and segment is not None:
      segment = jnp.where(at_L[None] < start + W, segment, 0)
    if shape.guided:
      canvas_BL = _twice(canvas_BL, given_BL, mask_id)
      segment, position = jax.tree.map(lambda x: jnp.tile(x, (2, 1)), (segment, position))

    def hidden(size, window_start, reuse_L):  # of the block, from a window that holds it
      if model.shift and not begins:  # and what is before it, where its first token is predicted
        size, window_start = min(size + 1, L), jnp.maximum(window_start - 1, 0)
      tokens_BW = jax.lax.dynamic_slice_in_dim(canvas_BL, window_start, size, axis=1)
      visible = model.visible(L, segment, W=size, start=window_start, reuse_L=reuse_L)
      hidden_BWD, written = bound.hidden(tokens_BW, visible, position, cache, layers)
      return jax.lax.dynamic_slice_in_dim(hidden_BWD, start - window_start, W, axis=1), written

    if begins:  # and the block before, which is final now
      hidden_BWD, cache = hidden(2 * W, start - W, None)
    elif shape.of_blocks:
      hidden_BWD, _ = hidden(W, start, at_L < start)
    elif cache is None:
      empty = model.new_cache(canvas_BL.shape[0], L) if shape.cache else None
      visible = model.visible(L, segment, contiguous=True)
      hidden_BLD, cache = bound.hidden(canvas_BL, visible, position, empty, layers)
      hidden_BWD = jax.lax.dynamic_slice_in_dim(hidden_BLD, start, W, axis=1)
    elif shape.cache == "dual" or shape.grows:
      hidden_BWD, _ = hidden(W, start, (at_L < start) | (at_L >= start + W))
    else:  # the rest of the canvas, in the smallest of a few windows that holds it
      sizes = [W << i for i in range((L - first).bit_length()) if W << i < L - first] + [L - first]
      windows = [lambda size=size: hidden(size, L - size, at_L < start)[0] for size in sizes]
      hidden_BWD = jax.lax.switch(jnp.searchsorted(jnp.array(sizes), L - start), windows)
    logits = bound.logits(hidden_BWD)
    if shape.guided:
      guidance_B11, un = settings.guidance[:, None, None], logits[B:]
      logits = jnp.where(guidance_B11 == 1, logits[:B], un + guidance_B11 * (logits[:B] - un))
    return logits, cache

  def alike(canvas_BL):  # every place of a row of [MASK]s sees the same, wherever it stands
    return ((canvas_BL == mask_id) | (False if segment_BL is None else segment_BL == 0)).all(axis=1)

  state = sampling.run(
    predict, state, sampling.keys(settings), settings, shape, mask_id=mask_id,
    allowed_V=_allowed(model.V, mask_id, vocab_size), ends=ends, origin=origin, first=first, alike=alike,
    until_nfe=until_nfe, until_block=until_block, reading=model.reading,
    begin=functools.partial(predict, begins=True) if shape.of_blocks else None, read=read,
  )  # fmt: skip
  return laid_out(state)


def lower_sampler(
  model: MaskPredictorConfig, params: Any, state: Any, c: SamplerConfig, *, first: int, mask_id: int,
  ends: tuple[int, ...],
) -> Any:  # fmt: skip
  """The program that `LLaDA.sample` runs on prompts of `first` tokens, lowered from shapes for `plan.py`."""
  tokens = state.canvas.tokens_BL
  segment = jax.ShapeDtypeStruct(tokens.shape, jnp.int32, sharding=tokens.sharding)
  shape, settings = compiled_for(model, *sampling.split(c, len(tokens)))
  if not model.objective.fills:
    return _autoregressive_sample.lower(
      params, tokens, segment, settings, model=model, prompt_length=first, eos_id=ends[0], mask_id=mask_id,
      vocab_size=model.V, chooses=shape.chooses,
    )  # fmt: skip
  return unmask_until.lower(
    params, state, segment, settings, np.int32(first), 0, 0, model=model, shape=shape, mask_id=mask_id, ends=ends,
    vocab_size=model.V, first=first,
  )  # fmt: skip


@functools.partial(
  sharding.jit, static_argnames=("model", "prompt_length", "eos_id", "mask_id", "vocab_size", "chooses")
)
def _autoregressive_sample(
  params, tokens_BL, segment_BL, settings, *, model, prompt_length, eos_id, mask_id, vocab_size, chooses
):
  bound, (B, L) = model.bind(params), tokens_BL.shape
  position_BL = _positions(segment_BL)
  never_BV = settings.logits_eos_inf[:, None] & (jnp.arange(model.V) == eos_id)[None]
  allowed_BV = _allowed(model.V, mask_id, vocab_size)[None] & ~never_BV
  bias_BV = sampling.biases(settings, model.V)

  def step(tokens_BW, cache, start):
    visible = model.visible(L, segment_BL, W=tokens_BW.shape[1], start=start)
    hidden_BWD, cache = bound.hidden(tokens_BW, visible, position_BL, cache)
    logits_BV = bound.logits(hidden_BWD[:, -1])
    logits_BV = jnp.where(allowed_BV, logits_BV if bias_BV is None else logits_BV + bias_BV, -jnp.inf)
    if chooses:
      logits_BV = jnp.where(sampling.probable(logits_BV[:, None], settings)[:, 0], logits_BV, -jnp.inf)
    return logits_BV, cache

  def draw(logits_BV, noise):
    return sampling.draw(logits_BV[:, None], lambda: noise()[:, None], settings.temperature)[:, 0]

  return laid_out(autoregressive.sample(
    step, draw, model.new_cache(B, L), tokens_BL, segment_BL, sampling.keys(settings), prompt_length=prompt_length,
    start_id=eos_id, eos_id=eos_id,
  ))  # fmt: skip


@functools.partial(sharding.jit, static_argnames=("model", "mask_id", "eos_id", "guided", "method"))
def _likelihood(
  params, tokens_BL, scored_BL, segment_BL, sample_B, samples_B, seed, guidance, *, model, mask_id, eos_id, guided,
  method,
):  # fmt: skip
  """`guidance`: w + 1."""
  bound = model.bind(params)
  visible = model.visible(tokens_BL.shape[1], segment_BL, right_padded=True, aligned=True)

  def nll(input_BL, target_BL, clean_BL=None):
    if not guided:
      return bound.nll(input_BL, target_BL, visible, clean_BL=clean_BL)
    unconditional = lambda x: None if x is None else jnp.where(scored_BL | (segment_BL == 0), x, mask_id)  # noqa: E731
    cond_BLD = bound.seen(input_BL, visible, clean_BL)
    un_BLD = bound.seen(unconditional(input_BL), visible, unconditional(clean_BL))

    def row(x):  # one row's logits at a time
      cond, un = bound.logits(x[0]), bound.logits(x[1])
      log_p = jax.nn.log_softmax(un + guidance * (cond - un))
      picked_L = jnp.take_along_axis(log_p, jnp.maximum(x[2], 0)[:, None], axis=-1)[:, 0]
      return jnp.where(x[2] < 0, 0.0, -picked_L)

    return jax.lax.map(row, (cond_BLD, un_BLD, target_BL))

  if method == "chain_rule":
    return laid_out(diffusion.chain_rule(nll, tokens_BL, scored_BL, sample_B, mask_id=mask_id))
  key_B = jnp.broadcast_to(jax.random.key(seed), tokens_BL.shape[:1])  # every pair meets the same masks
  return laid_out(model.objective.log_likelihood(
    nll, tokens_BL, scored_BL, segment_BL, key_B, sample_B, samples_B, mask_id=mask_id, eos_id=eos_id
  ))  # fmt: skip


@functools.partial(sharding.jit, static_argnames=("model", "mask_id", "guided"))
def _next(params, tokens_BL, segment_BL, at_B, guidance, *, model, mask_id, guided):
  """Log p [B, V] at one masked place of each row; `guidance`: w + 1."""
  bound = model.bind(params)

  def logits_BV(x_BL):
    hidden_BLD = bound.hidden(x_BL, model.visible(x_BL.shape[1], segment_BL, right_padded=True))[0]
    return bound.logits(jnp.take_along_axis(hidden_BLD, at_B[:, None, None], axis=1)[:, 0])

  found_BV = logits_BV(tokens_BL)
  if guided:
    un_BV = logits_BV(jnp.full_like(tokens_BL, mask_id))
    found_BV = un_BV + guidance * (found_BV - un_BV)
  return laid_out(jax.nn.log_softmax(found_BV))


@functools.partial(sharding.jit, static_argnames=("model", "mask_id", "vocab_size"))
def _chain(params, tokens_1L, segment_1L, at_B, *, model, mask_id, vocab_size):
  """`Engine.chain` at some places of one row."""
  bound, (B, L) = model.bind(params), (len(at_B), tokens_1L.shape[1])
  segment_BL = jnp.broadcast_to(segment_1L, (B, L))
  masked_BL = jnp.where(jnp.arange(L)[None] < at_B[:, None], tokens_1L, mask_id)
  hidden_BLD = bound.hidden(masked_BL, model.visible(L, segment_BL, right_padded=True))[0]
  log_p_BV = jax.nn.log_softmax(bound.logits(jnp.take_along_axis(hidden_BLD, at_B[:, None, None], axis=1)[:, 0]))
  found_B1 = jnp.take_along_axis(log_p_BV, tokens_1L[0, at_B][:, None], axis=1)
  drawn_BV = jnp.where(_allowed(model.V, mask_id, vocab_size)[None], log_p_BV, -jnp.inf)
  return laid_out((found_B1[:, 0], jnp.argmax(drawn_BV, axis=1).astype(jnp.int32), drawn_BV.max(axis=1)))


@functools.partial(sharding.jit, static_argnames=("model", "eos_id"))
def _logits(params, tokens_BL, segment_BL, *, model, eos_id):
  if model.causal:
    tokens_BL = autoregressive.shift(tokens_BL, jnp.ones_like(tokens_BL) if segment_BL is None else segment_BL, eos_id)
  return laid_out(model.bind(params)(tokens_BL, model.visible(tokens_BL.shape[1], segment_BL)))
