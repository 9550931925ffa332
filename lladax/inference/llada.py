"""LLaDA: text in, text out.

The life of a prompt:

text -> ids (tokenizer) -> ids + [MASK] x gen_length -> a left-padded batch whose length is rounded up (`bucket`), so
that compiled programs are reused -> sampling.run, one compiled program -> `Sampled` -> text, or a picture.
"""

import dataclasses
import functools
import math
import numbers
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from lladax import autoregressive, diffusion, fields, sampling
from lladax.data import tokenizer as tokenizers
from lladax.devices import sharding
from lladax.drawing import animation, unmasking
from lladax.mistake import Mistake
from lladax.model.mask_predictor import MaskPredictorConfig, Params
from lladax.sampling import SamplerConfig

# A prompt: text, ids, or the messages of a conversation, which the chat template makes into ids.
Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]


def bucket(length: int) -> int:
  """The length that prompts and canvases are padded to: multiples of 32 up to 256, then eight to an octave.

  32, 64, ..., 256, 288, 320, ..., 512, 576, ...: a program is compiled once for each, and at most an eighth is padding.
  """
  quantum = max(32, 2 ** ((length - 1).bit_length() - 4)) if length else 1
  return -(-length // quantum) * quantum


@dataclasses.dataclass(frozen=True, eq=False)
class Sampled:
  """What `LLaDA.sample`, `unmask`, `infill` return; in a notebook it draws its own unmasking.

  `tokens`, `unmasked_at` (the row's forward pass that committed the token, 0 = given) and `confidence` are arrays
  [B, L] over the whole canvas; `given` counts padding too: `padding` [B] positions at the left of each row are none
  of its own. `text` is what was generated, up to the first EOS, as it stands behind its prompt, or for canvases the
  whole row. `nfe` is the number of forward passes of the batch.
  """

  text: list[str]
  tokens: np.ndarray
  unmasked_at: np.ndarray
  confidence: np.ndarray
  nfe: int
  padding: np.ndarray
  piece: Callable[[int], str] = dataclasses.field(repr=False)  # id -> text of one token
  mask_id: int  # what masked positions hold in a canvas that `LLaDA.stream` has not finished

  def unmaskings(self) -> list[unmasking.Unmasking]:
    """The rows without their padding, ready to be drawn."""
    unmasked_at = np.where(self.tokens == self.mask_id, self.nfe + 1, self.unmasked_at)  # not yet
    rows = zip(self.tokens, unmasked_at, self.confidence, self.padding, strict=True)
    return [
      unmasking.Unmasking(tuple(self.piece(int(i)) for i in tokens[n:]), at[n:], confidence[n:])
      for tokens, at, confidence, n in rows
    ]

  def html(self, title: str = "") -> unmasking.Html:
    """A self-contained page with a slider over the steps."""
    return unmasking.html(self.unmaskings(), title)

  def heat_map(self, title: str = "") -> unmasking.Html:
    """A self-contained page of order against position: how often a position was unmasked at a step, over all rows."""
    return unmasking.heat_map(self.unmaskings(), title)

  def gif(self, path: str | Path, **options) -> None:
    """Writes the unmasking as an animation (needs matplotlib); options are those of `animation.gif`."""
    animation.gif(self.unmaskings(), path, **options)

  def _repr_html_(self) -> str:
    return self.html()


@dataclasses.dataclass(frozen=True, eq=False)
class LLaDA:
  """A mask predictor with its parameters and tokenizer (None: ids only).

  Parameters on a mesh (`load(path, mesh=...)`) are used there: rows and heads are shared out, answers come back whole.
  """

  model: MaskPredictorConfig
  params: Params = dataclasses.field(repr=False)
  tokenizer: tokenizers.Tokenizer | None
  mask_id: int
  eos_id: int
  vocab_size: int  # ids in use; rows of the embedding behind it are never sampled
  eot_id: int | None = None  # ends a turn of a conversation
  ends: tuple[int, ...] = ()  # ids that end a text, EOS first; (): EOS, and EoT where there is one

  def __post_init__(self):
    if not self.ends:
      ends = (self.eos_id,) if self.eot_id is None else (self.eos_id, self.eot_id)
      object.__setattr__(self, "ends", ends)

  def sample(self, prompts: Prompt | Sequence[Prompt], *, until: Sequence[str] = (), **options) -> Sampled:
    """Continues each prompt with `gen_length` tokens, or until EOS where that is None.

    Args:
      prompts: a text, a list of ids, or a conversation (a list of {"role": ..., "content": ...}); or a list of these.
      until: strings that end a text, which is cut there. No block is begun when all texts have ended: the canvas keeps
        `mask_id` behind them.
      **options: those of `SamplerConfig`. With one `seed` each row has the noise of its number; with a list, a seed a
        row, it has that of the first row under its own seed: what `sample([prompt], seed=s)` gives, `s` gives anywhere.

    Raises:
      Unknown: an option that does not exist (a TypeError, too).
      Mistake: an option of another type, or out of range, or that a causal model has no use for; `gen_length` that is
        not a multiple of `block_length`; ids that are not in the vocabulary, or [MASK]; a canvas longer than the model.
    """
    if isinstance(until, str) or not isinstance(until, Collection) or not all(isinstance(x, str) and x for x in until):
      raise Mistake(f"until={until!r}: give a list of strings, none of them empty")
    if until:
      self._text()
    rows = self._prompts(prompts)
    c = self._settings(options, len(rows))
    for out in self._continue_or_fill(rows, c, every="block" if until else None):
      if until and all(self._has_ended(out, i, until) for i in range(len(rows))):
        break
    return dataclasses.replace(out, text=[cut(text, until) for text in out.text])

  def stream(self, prompts: Prompt | Sequence[Prompt], *, every: str = "block", **options) -> Iterator[Sampled]:
    """`sample`, seen on its way: the canvas after each block, or each step; the last one is what `sample` returns.

    Positions still masked hold `mask_id`. The program is the one that `sample` runs.
    """
    if every not in ("block", "step"):
      raise Mistake(f"every={every!r}: use block or step")
    if not self.model.objective.fills:
      raise Mistake("a causal model is not streamed: use sample()")
    rows = self._prompts(prompts)
    return self._continue_or_fill(rows, self._settings(options, len(rows)), every=every)

  def chat(self, messages: Sequence[Mapping[str, str]], **options) -> Sampled:
    """The assistant's reply to a conversation, `out.text[0]`; ends at EOS or EoT (`early_stop`) unless told otherwise.

    Args:
      messages: {"role": "system" | "user" | "assistant", "content": text}, oldest first; more roles and fields where
        a published folder's own template knows them.
      **options: those of `SamplerConfig`.
    """
    if not isinstance(messages, Sequence) or not messages or not all(isinstance(x, Mapping) for x in messages):
      raise Mistake(f"chat: {messages!r:.80} is no conversation: give a list of messages with role and content")
    options.setdefault("early_stop", True)
    return self.sample([messages], **options)

  def unmask(self, canvases: Sequence[int] | Sequence[Sequence[int]], **options) -> Sampled:
    """Fills `mask_id` in a canvas, or in many of any lengths; needs no tokenizer. Default: one block, all of it."""
    if not self.model.objective.fills:
      raise Mistake("a causal model cannot fill in the middle of a canvas: use sample()")
    rows = self._canvases(canvases, "unmask")
    longest = max(map(len, rows))
    c = self._settings({"block_length": bucket(longest)} | options, len(rows))
    if c.gen_length is None:
      raise Mistake("sample.gen_length=None: a canvas has a length; leave it out")
    W = min(c.block_length, bucket(longest))
    *_, last = self._fill(*self._left_pad(rows, -(-bucket(longest) // W) * W), None, c, every=None)
    return last

  def infill(self, texts: str | Sequence[str], **options) -> Sampled:
    """Fills every "[MASK]" (one token each) of the texts."""
    texts = fields.typed([texts] if isinstance(texts, str) else texts, tuple[str, ...], "texts")
    return self.unmask([self._text().encode_canvas(text) for text in texts], **options)

  def log_likelihood(
    self, prompt, answer, *, num_samples: int = 128, guidance_scale: float = 0.0, seed: int = 0,
    method: str = "monte_carlo",
  ):  # fmt: skip
    """Log p(answer | prompt) in nats; exact for a causal model.

    Args:
      prompt: text or a list of ids; or a list of either, for many pairs at once, of any lengths.
      answer: likewise; text is tokenised as it stands behind the prompt (`Tokenizer.pair`).
      num_samples: forward passes per pair; for answers of one token one is enough, and all that is spent on all those
        to the same prompt.
      guidance_scale: classifier-free guidance with the prompt masked.
      seed: of the masks; the same masks for every pair of the same lengths.
      method: "monte_carlo", over stratified exact-count masks (P Eq. 6); or "chain_rule", the answer's tokens from
        left to right, those to the right of each masked: one forward pass a token, no noise.

    Returns:
      A float, or a list of floats.
    """
    lists = isinstance(prompt, list) and isinstance(answer, list)
    many = lists and not any(isinstance(x, int | np.integer) for x in (*prompt, *answer))  # [] is a prompt of no ids
    if many and len(prompt) != len(answer):
      raise Mistake(f"log_likelihood: {len(prompt)} prompts and {len(answer)} answers")
    pairs = [self._pair(p, a) for p, a in (zip(prompt, answer, strict=True) if many else [(prompt, answer)])]
    if any(not a for _, a in pairs):
      raise Mistake("log_likelihood: an answer is empty")
    for i, (p, a) in enumerate(pairs):
      self._check_ids(p, f"prompts[{i}]", masks=self.model.objective.fills)
      self._check_ids(a, f"answers[{i}]")
      self._check_length(len(p) + len(a), f"pair {i}")
    num_samples = fields.typed(num_samples, int, "num_samples")
    guidance_scale = fields.typed(guidance_scale, float, "guidance_scale")
    seed = fields.typed(seed, int, "seed")
    fields.check_seed(seed, "seed")
    if num_samples < 1:
      raise Mistake(f"num_samples={num_samples}: must be at least 1")
    fills = self.model.objective.fills
    if not 0 <= guidance_scale < math.inf or (guidance_scale and not fills):
      what = "must be at least 0, and finite" if fills else "a causal model has no use for it; leave it out"
      raise Mistake(f"guidance_scale={guidance_scale}: {what}")
    if method not in ("monte_carlo", "chain_rule"):
      raise Mistake(f"method={method!r}: use monte_carlo or chain_rule")
    if not self.model.objective.fills:
      method, num_samples = "monte_carlo", 1

    # Every forward pass of every pair is a row; rows of one bucketed length share batches, whosever they are.
    total, lengths = np.zeros(len(pairs)), [bucket(len(p) + len(a)) for p, a in pairs]
    choices: dict[tuple[int, ...], list[int]] = {}  # answers of one token to one prompt share a pass
    passes = {}
    for i, (p, a) in enumerate(pairs):
      if len(a) == 1 and self.model.objective.fills:
        choices.setdefault(tuple(p), []).append(i)
      else:
        passes[i] = len(a) if method == "chain_rule" else num_samples
    for L in sorted(set(lengths)):
      for batch, size in _batched([p for p, at in choices.items() if lengths[at[0]] == L], L):
        for p, log_p_V in zip(batch, self._next(batch, L, size, guidance_scale), strict=False):
          total[choices[p]] = log_p_V[[pairs[i][1][0] for i in choices[p]]]
      for batch, size in _batched([(i, s) for i, n in passes.items() if lengths[i] == L for s in range(n)], L):
        drawn = self._draws([(*pairs[i], s, passes[i]) for i, s in batch], L, size, seed, method, guidance_scale)
        np.add.at(total, [i for i, _ in batch], drawn[: len(batch)])
    if method == "monte_carlo":
      total[list(passes)] /= num_samples
    return total.tolist() if many else float(total[0])

  def _draws(self, rows: list[tuple], L: int, size: int, seed: int, method: str, guidance_scale: float) -> np.ndarray:
    """The terms of (prompt, answer, which of its passes, of how many), in nats; short batches repeat their last row."""
    tokens_BL = np.full((size, L), self.eos_id, np.int32)
    scored_BL, segment_BL = np.zeros((size, L), bool), np.zeros((size, L), np.int32)
    for b, (p, a, _, _) in enumerate(rows):
      n = len(p) + len(a)
      tokens_BL[b, :n], scored_BL[b, len(p) : n], segment_BL[b, :n] = p + a, True, 1
    for array_BL in (tokens_BL, scored_BL, segment_BL):
      array_BL[len(rows) :] = array_BL[len(rows) - 1]
    sample_B, samples_B = (np.resize([row[i] for row in rows], size).astype(np.int32) for i in (2, 3))
    with sharding.on_mesh_of(self.params):
      return np.asarray(_likelihood(
        self.params, tokens_BL, scored_BL, segment_BL, sample_B, samples_B, np.uint32(seed), model=self.model,
        mask_id=self.mask_id, eos_id=self.eos_id, guidance_scale=guidance_scale, method=method,
      ))  # fmt: skip

  def _next(self, prompts: list[tuple[int, ...]], L: int, size: int, guidance_scale: float) -> np.ndarray:
    """Log p [B, V] of every id behind each prompt; short batches are filled up."""
    at_B = np.zeros(size, np.int32)
    at_B[: len(prompts)] = [len(p) for p in prompts]
    segment_BL = (np.arange(L) <= at_B[:, None]).astype(np.int32)
    tokens_BL = np.full((size, L), self.mask_id, np.int32)
    for b, p in enumerate(prompts):
      tokens_BL[b, : len(p)] = p
    with sharding.on_mesh_of(self.params):
      return np.asarray(_next(
        self.params, tokens_BL, segment_BL, at_B, model=self.model, mask_id=self.mask_id, guidance_scale=guidance_scale
      ))  # fmt: skip

  def logits(self, tokens_BL, segment_BL=None) -> np.ndarray:
    """Float32 logits [B, L, V] of canvases of ids of one length; `segment_BL` 0 = padding."""
    rows = self._canvases(tokens_BL, "logits")
    if len({*map(len, rows)}) > 1:
      raise Mistake("logits: the canvases differ in length; pad them, and say where with segment_BL")
    tokens, segment = np.array(rows, np.int32), None
    if segment_BL is not None:
      try:
        segment = np.asarray(segment_BL)
      except ValueError:  # of rows of several lengths
        raise Mistake(f"segment_BL: give one array of shape {tokens.shape}") from None
      if segment.shape != tokens.shape or segment.dtype.kind not in "biu" or segment.min() < 0:
        raise Mistake(
          f"segment_BL: {segment.dtype} {segment.shape}: give numbers of segments {tokens.shape}, 0 = padding"
        )
      segment = segment.astype(np.int32)
    with sharding.on_mesh_of(self.params):
      return np.asarray(_logits(self.params, tokens, segment, model=self.model))

  def _prompts(self, prompts: Prompt | Sequence[Prompt]) -> list[list[int]]:
    rows = [self._ids(prompt, f"prompts[{i}]") for i, prompt in enumerate(_many(prompts, "prompts"))]
    if not rows:
      raise Mistake("there is nothing to sample: the list of prompts is empty")
    for i, row in enumerate(rows):
      self._check_ids(row, f"prompts[{i}]")
    return rows

  def _canvases(self, canvases: Any, name: str) -> list[list[int]]:
    rows = [_row(row, f"{name}[{i}]") for i, row in enumerate(_many(canvases, name))]
    for i, row in enumerate(rows):
      self._check_ids(row, f"{name}[{i}]", masks=True)
    if not rows or [] in rows:
      raise Mistake(f"{name}[{rows.index([])}] is empty" if rows else f"{name}: the canvases are empty")
    self._check_length(max(map(len, rows)))
    return rows

  def _check_ids(self, ids: list[int], where: str, masks: bool = False) -> None:
    """Raises Mistake for what is not in the vocabulary, and for [MASK] unless there may be `masks`."""
    for i, x in enumerate(ids):
      if x == self.mask_id and not masks:
        raise Mistake(f"{where}[{i}]={x} is [MASK], which has no place here: unmask() is what fills a canvas in")
      if x != self.mask_id and not 0 <= x < self.vocab_size:
        raise Mistake(f"{where}[{i}]={x}: the ids of this model's vocabulary are 0 to {self.vocab_size - 1}")

  def _check_length(self, length: int, what: str = "a canvas") -> None:
    if length > self.model.max_length:
      raise Mistake(f"{what} of {length} tokens is longer than model.max_length={self.model.max_length}")

  def _settings(self, options: Mapping[str, Any], rows: int) -> SamplerConfig:
    """The options of a call on so many rows."""
    c = fields.parse(dict(options), SamplerConfig, "sample")
    if isinstance(c.seed, tuple) and len(c.seed) != rows:
      raise Mistake(f"sample.seed={list(c.seed)}: give one seed, or one for each of the {rows} rows")
    self.model.objective.check_sampler(c)
    return c

  def _continue_or_fill(self, rows: list[list[int]], c: SamplerConfig, every: str | None) -> Iterator[Sampled]:
    longest, most, W = max(map(len, rows)), self.model.max_length, c.block_length
    first = bucket(longest)
    self._check_length(longest + (c.gen_length or 0))
    if not self.model.objective.fills:
      return iter([self._continue(rows, c)])
    if c.gen_length is not None:
      if c.gen_length % min(W, c.gen_length):
        raise Mistake(f"sample.gen_length={c.gen_length} is not a multiple of sample.block_length={W}")
      canvases = self._left_pad([row + [self.mask_id] * c.gen_length for row in rows], first + c.gen_length)
      return self._fill(*canvases, first, c, every)
    room = (most - longest) // W * W
    if room < 1:
      raise Mistake(f"a prompt of {longest} tokens leaves no block of {W} within model.max_length={most}")
    return self._grow(*self._left_pad(rows, first), room, dataclasses.replace(c, early_stop=True), every)

  def _fill(self, tokens_BL, segment_BL, first: int | None, c: SamplerConfig, every: str | None) -> Iterator[Sampled]:
    for state in self._advance(self._start(tokens_BL, first, c), segment_BL, first, c, every):
      yield self._sampled(state.canvas, segment_BL, first)

  def _grow(self, tokens_BL, segment_BL, room: int, c: SamplerConfig, every: str | None) -> Iterator[Sampled]:
    """Block after block until every row has ended, or `room` is used up; a full canvas doubles."""
    first, W = tokens_BL.shape[1], c.block_length
    size, canvas, ended_B = 0, None, np.zeros(len(tokens_BL), bool)
    while size < room and not np.all(ended_B):
      old, size = size, min(max(4 * W, 2 * size), room)
      more = ((0, 0), (0, size - old))
      segment_BL = np.pad(segment_BL, more, constant_values=1)
      new_BL = np.full((len(tokens_BL), size - old), self.mask_id)
      new_BL[ended_B] = self.eos_id
      begun = self._start(np.concatenate([tokens_BL, new_BL], axis=1, dtype=np.int32), first, c)
      if canvas is not None:
        unmasked_at_BL = np.pad(canvas.unmasked_at_BL, more)
        unmasked_at_BL[ended_B, first + old :] = canvas.step_B[ended_B, None]
        begun = begun._replace(
          block=jnp.int32(old // W),
          canvas=canvas._replace(
            tokens_BL=begun.canvas.tokens_BL, unmasked_at_BL=jnp.asarray(unmasked_at_BL),
            confidence_BL=np.pad(canvas.confidence_BL, more, constant_values=1.0),
          ),
        )  # fmt: skip
      for state in self._advance(begun, segment_BL, first, c, every):
        end = first + int(state.block + (state.step > 0)) * W
        seen = [x[:, :end] if x.ndim == 2 else x for x in state.canvas]
        yield self._sampled(sampling.Canvas(*seen), segment_BL[:, :end], first)
      canvas = jax.device_get(state.canvas)
      tokens_BL = canvas.tokens_BL
      ended_B = np.isin(tokens_BL[:, first:], self.ends).any(axis=1)

  def _start(self, tokens_BL: np.ndarray, first: int | None, c: SamplerConfig) -> sampling.State:
    cache = None
    if c.cache:
      rows = tokens_BL.shape[0] * (2 if c.guidance_scale else 1)
      with sharding.on_mesh_of(self.params):
        cache = _new_cache(self.model, rows, tokens_BL.shape[1])
    return sampling.start(jnp.asarray(tokens_BL), c, mask_id=self.mask_id, first=first or 0, cache=cache)

  def _advance(
    self, state: sampling.State, segment_BL: np.ndarray, first: int | None, c: SamplerConfig, every: str | None
  ) -> Iterator[sampling.State]:
    """The state at the end, or after every block or step; one compiled program for all three.

    It ends after as many calls as there are blocks or steps, whatever the program leaves masked.
    """
    padded = (segment_BL == 0).any() or c.gen_length is None
    never = np.int32(2**30)
    where = jax.tree.leaves(self.params)[0].sharding  # where the program leaves the canvas, too: it is compiled once
    where = NamedSharding(where.mesh, sharding.spec("")) if isinstance(where, NamedSharding) else where
    bare = jax.device_put(jax.device_get(state._replace(cache=None)), where)
    state = bare._replace(cache=jax.device_put(state.cache, jax.tree.map(lambda x: x.sharding, state.cache)))
    seed_B, row_B = _noise(c.seed, len(segment_BL))
    blocks = state.steps_BN.shape[1] - int(state.block)
    places = blocks * min(c.block_length, segment_BL.shape[1])
    for _ in range({"block": blocks, "step": places}.get(every or "", 1)):
      until_nfe = np.int32(state.canvas.nfe + 1) if every == "step" else never
      until_block = np.int32(state.block + 1) if every == "block" else never
      with sharding.on_mesh_of(self.params):
        state = _run(
          self.params, state, segment_BL if padded else None, seed_B, row_B, until_nfe, until_block, model=self.model,
          c=_fixed(c), mask_id=self.mask_id, ends=self.ends, vocab_size=self.vocab_size, first=first,
        )  # fmt: skip
      yield state
      if not (state.canvas.tokens_BL == self.mask_id).any():
        return

  def _has_ended(self, out: Sampled, i: int, until: Sequence[str]) -> bool:
    """Whether a row has met EOS or a stop string; its text on the way would spell [MASK]s, too."""
    ids = out.tokens[i][out.unmasked_at[i] > 0]  # of the blocks that are filled
    given = out.tokens[i][(out.unmasked_at[i] == 0) & (out.tokens[i] != self.mask_id)][out.padding[i] :]
    said = self._text().decode(ids.tolist(), behind=given.tolist())
    return bool(np.isin(ids, self.ends).any()) or cut(said, until) != said

  def _continue(self, ids: list[list[int]], c: SamplerConfig) -> Sampled:
    assert c.gen_length is not None
    prompt_length = bucket(max(map(len, ids)))
    length = prompt_length + c.gen_length
    canvases = [row + [self.eos_id] * c.gen_length for row in ids]
    tokens_BL, segment_BL = self._left_pad(canvases, length)
    with sharding.on_mesh_of(self.params):
      tokens_BL, confidence_BL, nfe = _autoregressive_sample(
        self.params, tokens_BL, segment_BL, *_noise(c.seed, len(ids)), model=self.model, temperature=c.temperature,
        logits_eos_inf=c.logits_eos_inf, prompt_length=prompt_length, eos_id=self.eos_id, mask_id=self.mask_id,
        vocab_size=self.vocab_size,
      )  # fmt: skip
    unmasked_at_BL = np.broadcast_to(np.maximum(np.arange(length) - prompt_length + 1, 0), tokens_BL.shape)
    canvas = sampling.Canvas(tokens_BL, jnp.asarray(unmasked_at_BL), confidence_BL, nfe, nfe)
    return self._sampled(canvas, segment_BL, prompt_length)

  def _left_pad(self, rows: list[list[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, segment) [B, length]: right ends line up; segment 0 = padding, 1 = the row."""
    tokens = np.full((len(rows), length), self.eos_id, np.int32)
    segment = np.zeros((len(rows), length), np.int32)
    for i, row in enumerate(rows):
      if row:
        tokens[i, -len(row) :], segment[i, -len(row) :] = row, 1
    return tokens, segment

  def _sampled(self, canvas: sampling.Canvas, segment_BL: np.ndarray, first: int | None) -> Sampled:
    """The text is what stands behind the prompt, up to its end; `first` None: the whole row of a canvas."""
    canvas = jax.device_get(canvas)
    text = []
    for row, segment in zip(canvas.tokens_BL, segment_BL, strict=True):
      prompt, row = (row[:0], row[segment > 0]) if first is None else (row[:first][segment[:first] > 0], row[first:])
      ends = np.flatnonzero(np.isin(row, self.ends))
      row = row[: ends[0]] if first is not None and len(ends) else row
      text.append(self.tokenizer.decode(row.tolist(), behind=prompt.tolist()) if self.tokenizer else "")
    return Sampled(
      text=text, tokens=np.asarray(canvas.tokens_BL), unmasked_at=np.asarray(canvas.unmasked_at_BL),
      confidence=np.asarray(canvas.confidence_BL), nfe=int(canvas.nfe), padding=(segment_BL == 0).sum(axis=1),
      piece=self._piece, mask_id=self.mask_id,
    )  # fmt: skip

  def _piece(self, i: int) -> str:
    """A token as it is drawn: EOS as ⏎, ids where there is no tokenizer."""
    if i == self.eos_id:
      return "⏎"
    return self.tokenizer.piece(i) if self.tokenizer else f"{i} "

  def _text(self) -> tokenizers.Tokenizer:
    if self.tokenizer is None:
      raise Mistake("this model has no tokenizer: use unmask(), and lists of ids")
    return self.tokenizer

  def _pair(self, prompt: Prompt, answer: Prompt) -> tuple[list[int], list[int]]:
    if isinstance(prompt, str) and isinstance(answer, str):
      return self._text().pair(prompt, answer)
    ids = self._ids(prompt)
    return ids, self._text().behind(ids, answer) if isinstance(answer, str) else self._ids(answer)

  def _ids(self, prompt: Prompt, where: str = "ids") -> list[int]:
    if isinstance(prompt, str):
      return self._text().encode(prompt)
    if isinstance(prompt, Sequence) and len(prompt) and isinstance(prompt[0], Mapping):
      return self._text().chat(cast(Sequence[Mapping[str, str]], prompt))
    return _row(prompt, where)


def _row(ids: Any, where: str) -> list[int]:
  """A row of ids as plain numbers; they must be numbers, and whole."""
  plain = isinstance(ids, Sequence) and not isinstance(ids, bytes)
  return list(fields.typed(list(ids) if plain else ids, tuple[int, ...], where))


def _many(given: Any, name: str) -> list[Any]:
  """What a caller gives as one (a text, a row of ids, a conversation) or as a list of these, as a list."""
  given = given.tolist() if hasattr(given, "tolist") else given
  if not isinstance(given, Sequence) or isinstance(given, bytes):
    raise Mistake(f"{name}={given!r:.80}: give a list")
  one = isinstance(given, str) or (len(given) > 0 and isinstance(given[0], Mapping | numbers.Number))
  return [given] if one else list(given)


def cut(text: str, until: Sequence[str]) -> str:
  """The text up to the first of the strings."""
  return text[: min((at for stop in until if (at := text.find(stop)) >= 0), default=len(text))]


def _positions(segment_BL: jax.Array) -> jax.Array:
  """Positions counted from each row's own first token, so that padding turns no key."""
  return jnp.maximum(jnp.cumsum(segment_BL > 0, axis=1) - 1, 0)


def _allowed(rows: int, mask_id: int, vocab_size: int) -> jax.Array:
  """Bool [V]: the ids that may be generated; not [MASK], nor rows of the embedding that are no token."""
  id_V = jnp.arange(rows)
  return (id_V != mask_id) & (id_V < vocab_size)


def _noise(seed: int | tuple[int, ...], rows: int) -> tuple[np.ndarray, np.ndarray]:
  """(seed_B, row_B), of which `_keys` makes the rows' keys: a row with a seed of its own is number 0 of it."""
  numbers_B = np.arange(rows, dtype=np.int32) if isinstance(seed, int) else np.zeros(rows, np.int32)
  return np.broadcast_to(np.array(seed, np.uint32), rows), numbers_B


def _keys(seed_B: jax.Array, row_B: jax.Array) -> jax.Array:
  return jax.vmap(lambda seed, row: jax.random.fold_in(jax.random.key(seed), row))(seed_B, row_B)


_new_cache = jax.jit(MaskPredictorConfig.new_cache, static_argnums=(0, 1, 2))


def _batched(rows: list[Any], L: int) -> Iterator[tuple[list[Any], int]]:
  """(rows, rows of the program) of batches of about 8192 tokens, in rows of length L."""
  size = min(max(1, 8192 // L), 2 ** (len(rows) - 1).bit_length()) if rows else 1
  for first in range(0, len(rows), size):
    yield rows[first : first + size], size


def _laid_out(x: Any) -> Any:
  """How a program leaves what it returns on a mesh: caches sliced along rows and heads, all else whole everywhere."""
  return jax.tree.map(lambda x: sharding.constrain(x, ".B.G." if x.ndim == 5 else "." * x.ndim), x)


@functools.partial(jax.jit, static_argnames=("model", "c", "mask_id", "ends", "vocab_size", "first"))
def _run(
  params, state, segment_BL, seed_B, row_B, until_nfe, until_block, *, model, c, mask_id, ends, vocab_size, first
) -> sampling.State:
  """`segment_BL` None: no row is padded, attention needs no mask. gen_length None: nothing behind a block is seen.

  `first` None: canvases, whose noise is told by the distance from the right end, and not from the prompt's.
  """
  bound, (B, L) = model.bind(params), state.canvas.tokens_BL.shape
  at_L = jnp.arange(L)
  place_L, first = (L - at_L, 0) if first is None else (at_L - first, first)
  position_BL = None if segment_BL is None else _positions(segment_BL)
  given_BL = (state.canvas.tokens_BL != mask_id) & (state.canvas.unmasked_at_BL == 0)

  def predict(canvas_BL, start, W, cache):
    segment, position = segment_BL, position_BL
    if c.gen_length is None and segment is not None:
      segment = jnp.where(at_L[None] < start + W, segment, 0)
    if c.guidance_scale:  # the second half of the batch sees what is given masked
      canvas_BL = jnp.concatenate([canvas_BL, jnp.where(given_BL, mask_id, canvas_BL)])
      segment, position = jax.tree.map(lambda x: jnp.tile(x, (2, 1)), (segment, position))

    def hidden(size, window_start, reuse_L):  # of the block, from a window that holds it
      tokens_BW = jax.lax.dynamic_slice_in_dim(canvas_BL, window_start, size, axis=1)
      visible = model.visible(L, segment, W=size, start=window_start, reuse_L=reuse_L)
      hidden_BWD, _ = bound.hidden(tokens_BW, visible, position, cache)
      return jax.lax.dynamic_slice_in_dim(hidden_BWD, start - window_start, W, axis=1)

    if cache is None:
      empty = model.new_cache(canvas_BL.shape[0], L) if c.cache else None
      hidden_BLD, cache = bound.hidden(canvas_BL, model.visible(L, segment), position, empty)
      hidden_BWD = jax.lax.dynamic_slice_in_dim(hidden_BLD, start, W, axis=1)
    elif c.cache == "dual" or c.gen_length is None:
      hidden_BWD = hidden(W, start, (at_L < start) | (at_L >= start + W))
    else:  # the rest of the canvas, in the smallest of a few windows that holds it
      sizes = [W << i for i in range((L - first).bit_length()) if W << i < L - first] + [L - first]
      windows = [functools.partial(hidden, size, L - size, at_L < start) for size in sizes]
      hidden_BWD = jax.lax.switch(jnp.searchsorted(jnp.array(sizes), L - start), windows)
    logits = bound.logits(hidden_BWD)
    if c.guidance_scale:
      logits = logits[B:] + (c.guidance_scale + 1) * (logits[:B] - logits[B:])
    if c.logits_eos_inf:
      logits = logits.at[..., ends[0]].set(-jnp.inf)
    return logits, cache

  def alike(canvas_BL):  # every place of a row of [MASK]s sees the same, wherever it stands
    return ((canvas_BL == mask_id) | (False if segment_BL is None else segment_BL == 0)).all(axis=1)

  state = sampling.run(
    predict, state, _keys(seed_B, row_B), c, mask_id=mask_id, allowed_V=_allowed(model.V, mask_id, vocab_size),
    late_V=jnp.isin(jnp.arange(model.V), jnp.array(ends)) if c.confidence_eos_eot_inf else None, ends=ends, first=first,
    place_L=place_L, alike=alike, until_nfe=until_nfe, until_block=until_block,
  )  # fmt: skip
  return _laid_out(state)


def _fixed(c: SamplerConfig) -> SamplerConfig:
  """Without what is not the program's matter, so that it is compiled once."""
  return dataclasses.replace(c, seed=0, steps=1, gen_length=None if c.gen_length is None else 1)


def lower_sampler(
  model: MaskPredictorConfig, params: Any, state: Any, c: SamplerConfig, *, first: int, mask_id: int,
  ends: tuple[int, ...],
) -> Any:  # fmt: skip
  """The program that `LLaDA.sample` runs on prompts of `first` tokens, lowered from shapes for `plan.py`."""
  tokens = state.canvas.tokens_BL
  segment, noise = jax.ShapeDtypeStruct(tokens.shape, jnp.int32, sharding=tokens.sharding), _noise(0, tokens.shape[0])
  if not model.objective.fills:
    return _autoregressive_sample.lower(
      params, tokens, segment, *noise, model=model, temperature=c.temperature, logits_eos_inf=c.logits_eos_inf,
      prompt_length=first, eos_id=ends[0], mask_id=mask_id, vocab_size=model.V,
    )  # fmt: skip
  return _run.lower(
    params, state, segment, *noise, 0, 0, model=model, c=_fixed(c), mask_id=mask_id, ends=ends, vocab_size=model.V,
    first=first,
  )  # fmt: skip


@functools.partial(
  jax.jit,
  static_argnames=("model", "temperature", "logits_eos_inf", "prompt_length", "eos_id", "mask_id", "vocab_size"),
)
def _autoregressive_sample(
  params, tokens_BL, segment_BL, seed_B, row_B, *, model, temperature, logits_eos_inf, prompt_length, eos_id, mask_id,
  vocab_size,
):  # fmt: skip
  bound, (B, L) = model.bind(params), tokens_BL.shape
  position_BL = _positions(segment_BL)
  allowed_V = _allowed(model.V, mask_id, vocab_size) & ~(logits_eos_inf & (jnp.arange(model.V) == eos_id))

  def step(tokens_BW, cache, start):
    visible = model.visible(L, segment_BL, W=tokens_BW.shape[1], start=start)
    hidden_BWD, cache = bound.hidden(tokens_BW, visible, position_BL, cache)
    return jnp.where(allowed_V[None, :], bound.logits(hidden_BWD[:, -1]), -jnp.inf), cache

  return _laid_out(autoregressive.sample(
    step, model.new_cache(B, L), tokens_BL, segment_BL, _keys(seed_B, row_B),
    prompt_length=prompt_length, start_id=eos_id, eos_id=eos_id, temperature=temperature,
  ))  # fmt: skip


@functools.partial(jax.jit, static_argnames=("model", "mask_id", "eos_id", "guidance_scale", "method"))
def _likelihood(
  params, tokens_BL, scored_BL, segment_BL, sample_B, samples_B, seed, *, model, mask_id, eos_id, guidance_scale, method
):
  bound, visible = model.bind(params), model.visible(tokens_BL.shape[1], segment_BL, right_padded=True)

  def nll(input_BL, target_BL):
    if not guidance_scale:
      return bound.nll(input_BL, target_BL, visible)
    unconditional_BL = jnp.where(scored_BL | (segment_BL == 0), input_BL, mask_id)
    cond_BLD, un_BLD = (bound.hidden(x, visible)[0] for x in (input_BL, unconditional_BL))

    def row(x):  # one row's logits at a time
      cond, un = bound.logits(x[0]), bound.logits(x[1])
      log_p = jax.nn.log_softmax(un + (guidance_scale + 1) * (cond - un))
      picked_L = jnp.take_along_axis(log_p, jnp.maximum(x[2], 0)[:, None], axis=-1)[:, 0]
      return jnp.where(x[2] < 0, 0.0, -picked_L)

    return jax.lax.map(row, (cond_BLD, un_BLD, target_BL))

  if method == "chain_rule":
    return _laid_out(diffusion.chain_rule(nll, tokens_BL, scored_BL, sample_B, mask_id=mask_id))
  key_B = jnp.broadcast_to(jax.random.key(seed), tokens_BL.shape[:1])  # every pair meets the same masks
  return _laid_out(model.objective.log_likelihood(
    nll, tokens_BL, scored_BL, segment_BL, key_B, sample_B, samples_B, mask_id=mask_id, eos_id=eos_id
  ))  # fmt: skip


@functools.partial(jax.jit, static_argnames=("model", "mask_id", "guidance_scale"))
def _next(params, tokens_BL, segment_BL, at_B, *, model, mask_id, guidance_scale):
  """Log p [B, V] at one masked place of each row."""
  bound = model.bind(params)

  def logits_BV(x_BL):
    hidden_BLD = bound.hidden(x_BL, model.visible(x_BL.shape[1], segment_BL, right_padded=True))[0]
    return bound.logits(jnp.take_along_axis(hidden_BLD, at_B[:, None, None], axis=1)[:, 0])

  found_BV = logits_BV(tokens_BL)
  if guidance_scale:
    un_BV = logits_BV(jnp.full_like(tokens_BL, mask_id))
    found_BV = un_BV + (guidance_scale + 1) * (found_BV - un_BV)
  return _laid_out(jax.nn.log_softmax(found_BV))


@functools.partial(jax.jit, static_argnames="model")
def _logits(params, tokens_BL, segment_BL, *, model):
  return _laid_out(model.bind(params)(tokens_BL, model.visible(tokens_BL.shape[1], segment_BL)))
