"""The reverse process: one compiled loop that fills a canvas of [MASK]s. Predict, score, commit, again.

The life of a canvas: rows of any length arrive left-padded, so that their right ends line up. The canvas is cut into
blocks from the right end; blocks are filled from left to right, each in a number of steps. A step runs the model
(*predict*), draws a candidate for every masked position of the block and gives it a confidence (*score*), and keeps the
most confident candidates (*commit*): a kept token never changes again. What is not [MASK] at the start is given,
wherever it stands, so infilling is no special case. The loop can be left after any forward pass or block, and entered
again where it was left (`State`): that is streaming. Letters: `mask_predictor.py`; here W is the block.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lladax import fields
from lladax.mistake import Mistake

# (tokens_BL, start, W, cache) -> (float32 logits_BWV of the window at `start`, cache).
# With cache None the model runs over the whole canvas; otherwise what the cache holds may be reused, and it is returned
# as it came.
Predict = Callable[[jax.Array, jax.Array, int, Any], tuple[jax.Array, Any]]

REMASKING = ("low_confidence", "random", "low_margin", "high_entropy")
CACHES = ("prefix", "dual")
_LAST = -1e30  # a score behind all others


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
  """How a canvas is filled; LLaDA's fixed schedule with low-confidence remasking by default."""

  gen_length: int | None = 64  # masked tokens after the prompt; None: block after block until EOS
  block_length: int = 32  # filled together, blocks from left to right; 1: autoregressive order
  steps: int = 64  # forward passes over all blocks (of each block, where gen_length is None)
  temperature: float = 0.0  # of the candidates (Gumbel-max); 0 takes the most probable
  remasking: str = "low_confidence"  # who waits: "low_confidence" | "random" | "low_margin" | "high_entropy"
  threshold: float | None = None  # keep every candidate more confident than this, at least one a step (Fast-dLLM)
  factor: float | None = None  # keep the most candidates k with (k + 1)(1 - k-th confidence) < factor
  guidance_scale: float = 0.0  # w: logits = un + (w + 1)(cond - un), `un` seeing the given tokens masked
  cache: str | None = None  # keys and values kept within a block: "prefix" of what precedes it, "dual" of all around it
  early_stop: bool = False  # a block with an EOS ends its row: the rest becomes EOS, and costs nothing
  logits_eos_inf: bool = False  # EOS is never drawn
  confidence_eos_eot_inf: bool = False  # EOS and EoT wait until the last
  seed: int | tuple[int, ...] = 0  # of all noise, 0 to 2^32 - 1; a row draws by (seed, its number), or has its own seed

  def __post_init__(self):
    fields.check(self, "sample")
    for name in ("gen_length", "block_length", "steps"):
      if getattr(self, name) is not None and not 1 <= getattr(self, name) < 2**31:
        raise Mistake(f"sample.{name}={getattr(self, name)}: must be at least 1, and less than 2^31")
    for name in ("temperature", "guidance_scale"):
      if not 0 <= getattr(self, name) < math.inf:
        raise Mistake(f"sample.{name}={getattr(self, name)}: must be at least 0, and finite")
    for name in ("threshold", "factor"):
      if getattr(self, name) is not None and math.isnan(getattr(self, name)):
        raise Mistake(f"sample.{name}={getattr(self, name)}: must be a number")
    for seed in self.seed if isinstance(self.seed, tuple) else (self.seed,):
      fields.check_seed(seed, "sample.seed")
    for name, known in (("remasking", REMASKING), ("cache", (None, *CACHES))):
      if getattr(self, name) not in known:
        raise Mistake(f"sample.{name}={getattr(self, name)!r}: use one of {', '.join(map(str, known))}")
    if self.threshold is not None and self.factor is not None:
      raise Mistake("sample.threshold and sample.factor are both set: use one of them")
    if self.gen_length is None and self.logits_eos_inf:
      raise Mistake("sample.gen_length=None ends at EOS, and sample.logits_eos_inf forbids it: use one of them")


def nth_seed(seed: int, n: int) -> int:
  """A seed for call number n of several that share one: noise of its own, the same in every run; number 0 keeps it."""
  return int(np.random.SeedSequence((seed, n)).generate_state(1)[0]) if n else seed


class Canvas(NamedTuple):
  """A canvas being filled. `unmasked_at` replays the whole process: committed tokens never change."""

  tokens_BL: jax.Array  # int32
  unmasked_at_BL: jax.Array  # int32: the row's forward pass that committed it, from 1; 0 = given
  confidence_BL: jax.Array  # float32: probability of the token when it was committed; 1 = given
  step_B: jax.Array  # int32: forward passes in which the row had something to fill
  nfe: jax.Array  # int32: forward passes of the whole batch


def draw(logits_WV: jax.Array, allowed_V: jax.Array, key_W: jax.Array, temperature: float) -> jax.Array:
  """Candidates x_0 [W] among the allowed ids, by Gumbel-max at `temperature`."""
  scores_WV = jnp.where(allowed_V[None, :], logits_WV, -jnp.inf)
  if temperature > 0:
    V = logits_WV.shape[-1]
    scores_WV += temperature * jax.vmap(lambda key: jax.random.gumbel(key, (V,), mode="high"))(key_W)
  return jnp.argmax(scores_WV, axis=-1).astype(jnp.int32)


def score(probability_W: jax.Array, logits_WV: jax.Array, key_W: jax.Array, remasking: str) -> jax.Array:
  """What decides who waits; larger is committed sooner.

  The candidate's probability (`low_confidence`), a random number, the distance between the two most probable tokens
  (`low_margin`), or minus the entropy (`high_entropy`).
  """
  if remasking == "low_confidence":
    return probability_W
  if remasking == "random":
    return jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 1)))(key_W)
  p_WV = jax.nn.softmax(logits_WV)
  if remasking == "low_margin":
    top_W2 = jax.lax.top_k(p_WV, 2)[0]
    return top_W2[:, 0] - top_W2[:, 1]
  return jnp.sum(jax.scipy.special.xlogy(p_WV, p_WV), axis=-1)


def candidates(
  logits_WV: jax.Array, key_W: jax.Array, c: SamplerConfig, *, allowed_V: jax.Array, late_V: jax.Array | None,
  alike: jax.Array | bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
  """A row's candidates [W], their probability [W] in the softmax of all logits without noise, as published, and score.

  Candidates of `late_V` have probability 0 and the last score, at any temperature. Where all places are `alike` their
  logits differ by rounding alone, which must not choose between them: the numbers of the last place are those of all.
  """
  token_W = draw(logits_WV, allowed_V, key_W, c.temperature)
  if late_V is not None:
    logits_WV = jnp.where(late_V[None, :], -jnp.inf, logits_WV)
  if not c.temperature:
    token_W = jnp.where(alike, token_W[-1], token_W)
  total_W = jax.nn.logsumexp(logits_WV, axis=-1)
  log_p_W = jnp.take_along_axis(logits_WV, token_W[:, None], axis=-1)[:, 0] - total_W
  probability_W = jnp.exp(jnp.where(alike, jnp.take(logits_WV[-1], token_W) - total_W[-1], log_p_W))
  score_W = score(probability_W, logits_WV, key_W, c.remasking)
  if c.remasking in ("low_margin", "high_entropy"):
    score_W = jnp.where(alike, score_W[-1], score_W)
  return token_W, probability_W, score_W if late_V is None else jnp.where(late_V[token_W], _LAST, score_W)


def commit(
  masked_W: jax.Array, score_W: jax.Array, probability_W: jax.Array, quota: jax.Array, c: SamplerConfig
) -> jax.Array:
  """Which masked positions of a row are kept in this step, bool [W]: at least `quota` (>= 1) of them."""
  # A score that is not a number goes last, and the rest is counted, so a broken model cannot stall the loop.
  score_W = jnp.where(masked_W, jnp.nan_to_num(score_W, nan=_LAST), -jnp.inf)
  rank_W = jnp.argsort(jnp.argsort(-score_W, stable=True), stable=True)
  keep_W = rank_W < quota
  if c.threshold is not None:
    keep_W = (rank_W < 1) | (probability_W > c.threshold)
  if c.factor is not None:
    keep_W = (rank_W < 1) | ((rank_W + 2) * (1.0 - probability_W) < c.factor)
  return masked_W & keep_W


class State(NamedTuple):
  """Where the reverse process stands."""

  canvas: Canvas
  steps_BN: jax.Array  # int32 steps of each row's blocks
  block: jax.Array  # int32: which block is being filled
  step: jax.Array  # int32: forward passes spent on it
  cache: Any


def start(tokens_BL: jax.Array, c: SamplerConfig, *, mask_id: int, first: int = 0, cache: Any = None) -> State:
  """The state of a canvas nobody has touched.

  Args:
    tokens_BL: int32, left-padded; [MASK] where something is to be filled in.
    c: the steps of a row are shared equally by its blocks that hold a mask, the first ones getting one more where that
      does not divide. Where `gen_length` is None every block gets all of them.
    mask_id: id of [MASK].
    first: where the blocks begin; all masks lie behind. L - first must be a multiple of the block.
    cache: an empty cache, if `c.cache` asks for one.
  """
  B, L = tokens_BL.shape
  W = min(c.block_length, L - first)
  if (L - first) % W:
    raise Mistake(f"a canvas of {L - first} positions is not cut evenly into blocks of {W}")
  masks_BN = (tokens_BL[:, first:] == mask_id).reshape(B, -1, W).any(axis=-1)
  order_BN = jnp.cumsum(masks_BN, axis=1) - 1  # number of a block among its row's with a mask
  used_B1 = jnp.maximum(masks_BN.sum(axis=1, keepdims=True), 1)
  shared_BN = jnp.maximum(c.steps // used_B1 + (order_BN < c.steps % used_B1), 1)
  canvas = Canvas(
    tokens_BL=tokens_BL,
    unmasked_at_BL=jnp.zeros((B, L), jnp.int32),
    confidence_BL=jnp.ones((B, L), jnp.float32),
    step_B=jnp.zeros(B, jnp.int32),
    nfe=jnp.int32(0),
  )
  steps_BN = shared_BN if c.gen_length is not None else jnp.full_like(shared_BN, c.steps)
  return State(canvas, steps_BN, jnp.int32(0), jnp.int32(0), cache)


def run(
  predict: Predict,
  state: State,
  key_B: jax.Array,
  c: SamplerConfig,
  *,
  mask_id: int,
  allowed_V: jax.Array,
  late_V: jax.Array | None = None,
  ends: tuple[int, ...] = (),
  first: int = 0,
  place_L: jax.Array | None = None,
  alike: Callable[[jax.Array], jax.Array] | None = None,
  until_nfe: jax.Array | int = 2**30,
  until_block: jax.Array | int = 2**30,
) -> State:
  """Fills the canvas up to a forward pass or a block; jit it with `predict`, `c` and the ids static.

  Args:
    predict: the model.
    state: from `start`, or from an earlier `run`.
    key_B: a key per row; noise is a function of it, of the row's step, and of `place_L`.
    c: see `SamplerConfig`. Within a block of n masks and s steps each step commits ceil(masks left / steps left),
      LLaDA's fixed schedule. With `c.cache` the first step of a block is a pass over the whole canvas.
    mask_id: id of [MASK].
    allowed_V: bool, the ids that may be committed: neither [MASK] nor rows behind the vocabulary.
    late_V: bool, the ids whose candidates have no confidence, and are left out of the softmax that gives it.
    ends: ids that end a row, if `c.early_stop`; the rest of it is filled with the first.
    first: where the blocks begin (static).
    place_L: int32, what the noise calls each position; default: the distance from the right end.
    alike: tokens_BL -> bool [B], the rows whose masked places the model cannot tell apart; those are filled in order.
    until_nfe: stop when so many forward passes have been spent in all.
    until_block: stop when so many blocks are filled.

  Returns:
    The state, finished if neither limit was met.
  """
  B, L = state.canvas.tokens_BL.shape
  W = min(c.block_length, L - first)
  num_blocks = (L - first) // W
  if place_L is None:
    place_L = L - jnp.arange(L)

  def window(array_BL, at):
    return jax.lax.dynamic_slice_in_dim(array_BL, at, W, axis=1)

  def step(state, cache):
    canvas, at = state.canvas, first + state.block * W
    masked_BW = window(canvas.tokens_BL, at) == mask_id
    step_B = canvas.step_B + masked_BW.any(axis=1)
    place_W = jax.lax.dynamic_slice_in_dim(place_L, at, W)
    key_BW = jax.vmap(lambda key, i: jax.vmap(lambda n: jax.random.fold_in(jax.random.fold_in(key, i), n))(place_W))(
      key_B, step_B
    )
    logits_BWV, cache = predict(canvas.tokens_BL, at, W, cache)
    token_BW, probability_BW, score_BW = jax.vmap(
      lambda x, key, alike: candidates(x, key, c, allowed_V=allowed_V, late_V=late_V, alike=alike)
    )(logits_BWV, key_BW, jnp.zeros(B, bool) if alike is None else alike(canvas.tokens_BL))
    steps_B = jnp.take(state.steps_BN, state.block, axis=1)
    quota_B = -(-masked_BW.sum(axis=1) // jnp.maximum(steps_B - state.step, 1))
    commit_BW = jax.vmap(lambda m, s, p, q: commit(m, s, p, q, c))(masked_BW, score_BW, probability_BW, quota_B)

    def put(array_BL, new_BW):
      kept_BW = jnp.where(commit_BW, new_BW, window(array_BL, at))
      return jax.lax.dynamic_update_slice_in_dim(array_BL, kept_BW, at, axis=1)

    canvas = Canvas(
      tokens_BL=put(canvas.tokens_BL, token_BW),
      unmasked_at_BL=put(canvas.unmasked_at_BL, jnp.broadcast_to(step_B[:, None], (B, W))),
      confidence_BL=put(canvas.confidence_BL, probability_BW),
      step_B=step_B,
      nfe=canvas.nfe + 1,
    )
    return state._replace(canvas=canvas, step=state.step + 1, cache=cache)

  def unfilled(state):  # each step commits at least one token of every row: W steps are enough
    return (state.step < W) & (window(state.canvas.tokens_BL, first + state.block * W) == mask_id).any()

  def unfinished(state):
    return (state.canvas.nfe < until_nfe) & unfilled(state)

  def fill_block(state):
    cache = None
    if c.cache:  # the first step makes the cache, the others read it
      state = jax.lax.while_loop(lambda s: (s.step < 1) & unfinished(s), lambda s: step(s, None), state)
      cache = state.cache
    bare = state._replace(cache=None)  # what is only read stays out of the loop
    bare = jax.lax.while_loop(unfinished, lambda s: step(s, cache)._replace(cache=None), bare)
    state = bare._replace(cache=cache)
    filled = ~unfilled(state)
    if c.early_stop:
      canvas = state.canvas
      behind_L = jnp.arange(L) < first + (state.block + 1) * W
      end_BL = jnp.isin(canvas.tokens_BL, jnp.array(ends)) & (canvas.unmasked_at_BL > 0)
      ended_B = (behind_L[None] & end_BL).any(axis=1)
      rest_BL = (filled & ended_B)[:, None] & (canvas.tokens_BL == mask_id)
      canvas = canvas._replace(
        tokens_BL=jnp.where(rest_BL, ends[0], canvas.tokens_BL),
        unmasked_at_BL=jnp.where(rest_BL, canvas.step_B[:, None], canvas.unmasked_at_BL),
      )
      state = state._replace(canvas=canvas)
    return state._replace(block=state.block + filled, step=jnp.where(filled, 0, state.step))

  def going_on(state):
    within = (state.block < jnp.minimum(num_blocks, until_block)) & (state.canvas.nfe < until_nfe)
    return within & (state.canvas.tokens_BL == mask_id).any()

  return jax.lax.while_loop(going_on, fill_block, state)


def sample(predict: Predict, tokens_BL: jax.Array, key_B: jax.Array, c: SamplerConfig, **options) -> Canvas:
  """Fills every [MASK] of the canvas: `start` and `run` in one, with the options of `run`."""
  state = start(tokens_BL, c, mask_id=options["mask_id"], first=options.get("first", 0))
  if c.cache:
    shapes = jax.eval_shape(lambda: predict(tokens_BL, jnp.int32(0), 1, None)[1])
    state = state._replace(cache=jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes))
  return run(predict, state, key_B, c, **options).canvas
