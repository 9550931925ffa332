"""The reverse process: one compiled loop that fills a canvas of [MASK]s. Predict, score, commit, again.

The life of a canvas: rows of any length arrive left-padded, so that their right ends line up. The canvas is cut into
blocks from the right end; blocks are filled from left to right, each in a number of steps. A step runs the model
(*predict*), draws a candidate for every masked position of the block and gives it a confidence (*score*), and keeps the
most confident candidates (*commit*): a kept token never changes again. What is not [MASK] at the start is given,
wherever it stands, so infilling is no special case. The loop can be left after any forward pass or block, and entered
again where it was left (`State`): that is streaming. Asked to *edit*, a step also replaces tokens that it committed
earlier in the block, where another is probable enough (LLaDA2.1, arXiv 2602.08676), and goes on until a step finds
nothing to change. Asked for Dream's schedule (`eps`), a step may commit nothing.
Letters: `mask_predictor.py`; here W is the block.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
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

REMASKING = ("low_confidence", "random", "low_margin", "high_entropy", "sequential")
CACHES = ("prefix", "dual")
_LAST = -1e30  # a score behind all others


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
  """How a canvas is filled; LLaDA's fixed schedule with low-confidence remasking by default."""

  gen_length: int | None = 64  # masked tokens after the prompt; None: block after block until EOS
  block_length: int = 32  # filled together, blocks from left to right; 1: autoregressive order
  steps: int = 64  # forward passes over all blocks (of each block, where gen_length is None)
  block_steps: int | None = None  # of each block, in place of `steps` (LLaDA2.0's steps, SDAR's denoising_steps)
  tokens_per_step: int | None = None  # kept in each step, at least; in place of the steps (LLaDA2.1's num_to_transfer)
  # Dream's schedule, of each block: times t fall evenly from 1 to this, and the step from t to s keeps the share
  # 1 - s/t of the [MASK]s that are left, rounded down, the last one all. None: the same number in each step.
  eps: float | None = None
  temperature: float = 0.0  # of the candidates (Gumbel-max); 0 takes the most probable
  top_p: float | None = None  # candidates, and their confidence, are among the most probable that have this share, ...
  top_k: int | None = None  # ... and among so many
  # Who waits: "low_confidence" | "random" | "low_margin" | "high_entropy" | "sequential", what stands further right.
  remasking: str = "low_confidence"
  threshold: float | None = None  # keep every candidate more confident than this, at least one a step (Fast-dLLM)
  factor: float | None = None  # keep the most candidates k with (k + 1)(1 - k-th confidence) < factor
  edit_threshold: float | None = None  # replace committed tokens of the block where another is more confident than this
  max_post_passes: int = 16  # passes over a block without a [MASK], while edits go on
  guidance_scale: float = 0.0  # w: logits = un + (w + 1)(cond - un), `un` seeing the given tokens masked
  cache: str | None = None  # keys and values kept within a block: "prefix" of what precedes it, "dual" of all around it
  early_stop: bool = False  # a block with an EOS ends its row: the rest becomes EOS, and costs nothing
  logits_eos_inf: bool = False  # EOS is never drawn
  confidence_eos_eot_inf: bool = False  # EOS and EoT wait until the last
  logit_bias: tuple[tuple[int, float], ...] = ()  # (id, what is added to its logit)
  seed: int | tuple[int, ...] = 0  # of all noise, 0 to 2^32 - 1; a row draws by (seed, its number), or has its own seed

  def __post_init__(self):
    fields.check(self, "sample")
    for name in ("gen_length", "block_length", "steps", "block_steps", "tokens_per_step", "top_k"):
      if getattr(self, name) is not None and not 1 <= getattr(self, name) < 2**31:
        raise Mistake(f"sample.{name}={getattr(self, name)}: must be at least 1, and less than 2^31")
    if not 0 <= self.max_post_passes < 2**16:
      raise Mistake(f"sample.max_post_passes={self.max_post_passes}: must be at least 0, and less than 2^16")
    for name in ("temperature", "guidance_scale"):
      if not 0 <= getattr(self, name) <= 1e6:  # products with logits must be numbers
        raise Mistake(f"sample.{name}={getattr(self, name)}: must be at least 0, and at most a million")
    if self.eps is not None and not 0 <= self.eps < 1:
      raise Mistake(f"sample.eps={self.eps}: must be at least 0, and less than 1")
    if self.top_p is not None and not 0 < self.top_p <= 1:
      raise Mistake(f"sample.top_p={self.top_p}: must be more than 0, and at most 1")
    for name in ("threshold", "factor", "edit_threshold"):
      if getattr(self, name) is not None and math.isnan(getattr(self, name)):
        raise Mistake(f"sample.{name}={getattr(self, name)}: must be a number")
    once = len(dict(self.logit_bias)) == len(self.logit_bias)
    for id, bias in self.logit_bias:
      if not abs(bias) <= 1e6 or not once:
        raise Mistake(f"sample.logit_bias: id {id}, {bias}: give every id once, and numbers up to a million")
    for seed in self.seed if isinstance(self.seed, tuple) else (self.seed,):
      fields.check_seed(seed, "sample.seed")
    for name, known in (("remasking", REMASKING), ("cache", (None, *CACHES))):
      if getattr(self, name) not in known:
        raise Mistake(f"sample.{name}={getattr(self, name)!r}: use one of {', '.join(map(str, known))}")
    for one, other in (("threshold", "factor"), ("block_steps", "tokens_per_step"), ("eps", "tokens_per_step")):
      if getattr(self, one) is not None and getattr(self, other) is not None:
        raise Mistake(f"sample.{one} and sample.{other} are both set: use one of them")
    if self.edit_threshold is not None and self.cache == "dual":
      raise Mistake(
        f"sample.edit_threshold={self.edit_threshold} changes what the dual cache keeps until the next block: use"
        " sample.cache=prefix, or none"
      )
    if self.gen_length is None and self.logits_eos_inf:
      raise Mistake("sample.gen_length=None ends at EOS, and sample.logits_eos_inf forbids it: use one of them")


def check_blocks(gen_length: int, block_length: int) -> None:
  """Raises Mistake if so many tokens are not cut evenly into blocks; fewer than a block's are one."""
  if gen_length % min(block_length, gen_length):
    raise Mistake(f"sample.gen_length={gen_length} is not a multiple of sample.block_length={block_length}")


def nth_seed(seed: int, n: int) -> int:
  """A seed for call number n of several that share one: noise of its own, the same in every run; number 0 keeps it."""
  return int(np.random.SeedSequence((seed, n)).generate_state(1)[0]) if n else seed


class Shape(NamedTuple):
  """What a program is compiled for."""

  block_length: int
  remasking: str
  cache: str | None
  guided: bool  # whether any row is
  grows: bool  # `gen_length` is None
  edits: bool = False  # whether any row does
  # A model of blocks: keys and values of finished ones are kept, as they are final; steps are those of a whole block.
  of_blocks: bool = False
  chooses: bool = False  # whether any row has a `top_p` or a `top_k`


class Settings(NamedTuple):
  """What a program reads: arrays [B], a number for each row (and [B, biases]). A change of them compiles nothing."""

  steps: jax.Array  # int32
  block_steps: jax.Array  # int32; 0: none
  tokens_per_step: jax.Array  # int32; 0: none
  eps: jax.Array  # float32; NaN: none
  temperature: jax.Array  # float32
  top_p: jax.Array  # float32; infinite: none
  top_k: jax.Array  # int32; the largest there is: none
  threshold: jax.Array  # float32; NaN, than which nothing is larger: none
  factor: jax.Array  # float32; likewise
  edit_threshold: jax.Array  # float32; likewise
  max_post_passes: jax.Array  # int32
  guidance: jax.Array  # float32, w + 1; 1: none
  early_stop: jax.Array  # bool, and so are the next two
  logits_eos_inf: jax.Array
  confidence_eos_eot_inf: jax.Array
  seed: jax.Array  # uint32
  number: jax.Array  # int32: which of the rows of its seed it is; 0 where that is its own
  bias_id: jax.Array  # int32 [B, biases]; what is not needed has a bias of 0
  bias: jax.Array  # float32, likewise


def split(given: SamplerConfig | Sequence[SamplerConfig], rows: int) -> tuple[Shape, Settings]:
  """One config for so many rows, or one a row, as what is compiled and what is read (in NumPy's arrays).

  Raises:
    Mistake: there are not as many configs, or seeds, as rows; or rows of one batch want programs of different shapes.
  """
  one = isinstance(given, SamplerConfig)
  each = [given] * rows if one else given
  if len(each) != rows:
    raise Mistake(f"sample: {len(each)} settings for {rows} rows: give one, or one for each")
  for name in ("gen_length", "block_length", "remasking", "cache"):
    if len({getattr(c, name) for c in each}) > 1:
      raise Mistake(f"sample.{name}: rows of one batch must agree in it, and these do not: sample them apart")
  seeds = given.seed if one else tuple(c.seed for c in each)
  if isinstance(seeds, tuple) and len(seeds) != rows:
    raise Mistake(f"sample.seed={list(seeds)}: give one seed, or one for each of the {rows} rows")
  c = each[0]
  chooses = any(c.top_k is not None or c.top_p not in (None, 1.0) for c in each)
  most = max(len(c.logit_bias) for c in each)
  biases = next(n for n in (0, 8, 64, 512, most) if n >= most)  # few programs
  shape = Shape(c.block_length, c.remasking, c.cache, any(c.guidance_scale > 0 for c in each), c.gen_length is None,
                any(c.edit_threshold is not None for c in each), chooses=chooses)  # fmt: skip
  bias = [[*c.logit_bias, *[(0, 0.0)] * (biases - len(c.logit_bias))] for c in each]

  def column(values: Iterable[Any], dtype: Any = np.float32) -> Any:
    with np.errstate(over="ignore"):
      return np.array(list(values), dtype)

  return shape, Settings(
    steps=column((c.steps for c in each), np.int32),
    block_steps=column((c.block_steps or 0 for c in each), np.int32),
    tokens_per_step=column((c.tokens_per_step or 0 for c in each), np.int32),
    eps=column(c.eps for c in each),
    temperature=column(c.temperature for c in each),
    top_p=column(math.inf if c.top_p in (None, 1.0) else c.top_p for c in each),
    top_k=column((c.top_k or 2**31 - 1 for c in each), np.int32),
    threshold=column(c.threshold for c in each),  # None becomes NaN
    factor=column(c.factor for c in each),
    edit_threshold=column(c.edit_threshold for c in each),
    max_post_passes=column((c.max_post_passes for c in each), np.int32),
    guidance=column(c.guidance_scale + 1 for c in each),
    early_stop=column((c.early_stop or shape.grows for c in each), bool),
    logits_eos_inf=column((c.logits_eos_inf for c in each), bool),
    confidence_eos_eot_inf=column((c.confidence_eos_eot_inf for c in each), bool),
    seed=column([seeds] * rows if isinstance(seeds, int) else seeds, np.uint32),
    number=column(range(rows) if isinstance(seeds, int) else [0] * rows, np.int32),
    bias_id=column(([id for id, _ in x] for x in bias), np.int32),
    bias=column([x for _, x in row] for row in bias),
  )


def biases(settings: Settings, V: int) -> jax.Array | None:
  """What is added to the logits, [B, V]; None: nothing."""
  if not settings.bias.shape[1]:
    return None
  at_B1 = jnp.arange(len(settings.bias))[:, None]
  return jnp.zeros((len(at_B1), V)).at[at_B1, settings.bias_id].add(settings.bias)


def keys(settings: Settings) -> jax.Array:
  """A key for each row, of which all its noise is made."""
  return jax.vmap(lambda seed, n: jax.random.fold_in(jax.random.key(seed), n))(settings.seed, settings.number)


class Canvas(NamedTuple):
  """A canvas being filled. `unmasked_at` replays the whole process: without edits committed tokens never change."""

  tokens_BL: jax.Array  # int32
  unmasked_at_BL: jax.Array  # int32: the row's forward pass that committed it, from 1; 0 = given
  confidence_BL: jax.Array  # float32: probability of the token when it was committed; 1 = given
  step_B: jax.Array  # int32: forward passes in which the row had something to fill
  nfe: jax.Array  # int32: forward passes of the whole batch
  edited_at_BL: Any = None  # int32: the row's forward pass that replaced it last; 0 = none. None: nobody edits


def draw(scores_BWV: jax.Array, noise: Callable[[], jax.Array], temperature_B: jax.Array) -> jax.Array:
  """Ids [B, W] by Gumbel-max; 0 takes the largest. `noise()` gives the keys [B, W], and is drawn only if asked for."""

  def noisy(scores_BWV):
    gumbel = functools.partial(jax.random.gumbel, shape=scores_BWV.shape[-1:], mode="high")
    temperature_B11 = temperature_B[:, None, None]
    noisy_BWV = scores_BWV + temperature_B11 * jax.vmap(jax.vmap(gumbel))(noise())
    return jnp.argmax(jnp.where(temperature_B11 > 0, noisy_BWV, scores_BWV), axis=-1)

  greedy = functools.partial(jnp.argmax, axis=-1)
  return jax.lax.cond(jnp.any(temperature_B > 0), noisy, greedy, scores_BWV).astype(jnp.int32)


def probable(logits_BWV: jax.Array, settings: Settings) -> jax.Array:
  """Bool [B, W, V]: the ids that `top_p` and `top_k` leave, at the temperature of each row; of ties all or none.

  Those more probable than an id must number less than k, and have no larger a share than p. The least such id is
  found by bisection, among all floats: 32 sums, where sorting the vocabulary would cost more.
  """
  temperature_B = jnp.where(settings.temperature > 0, settings.temperature, 1.0)
  logits_BWV = jnp.where(jnp.isnan(logits_BWV), -jnp.inf, logits_BWV / temperature_B[:, None, None])
  p_BWV = jax.nn.softmax(logits_BWV)
  bits_BWV = jax.lax.bitcast_convert_type(logits_BWV, jnp.int32)
  place_BWV = jnp.where(bits_BWV < 0, bits_BWV ^ 0x7FFFFFFF, bits_BWV)  # ordered as the floats are

  def halve(_, found):
    low_BW, high_BW = found
    middle_BW = (low_BW & high_BW) + ((low_BW ^ high_BW) >> 1)
    above_BWV = place_BWV > middle_BW[..., None]
    share_BW = jnp.sum(jnp.where(above_BWV, p_BWV, 0.0), axis=-1)
    left_BW = (share_BW <= settings.top_p[:, None]) & (jnp.sum(above_BWV, axis=-1) < settings.top_k[:, None])
    return jnp.where(left_BW, low_BW, middle_BW + 1), jnp.where(left_BW, middle_BW, high_BW)

  most_BW = place_BWV.max(axis=-1)
  least_BW = jax.lax.fori_loop(0, 32, halve, (jnp.full_like(most_BW, -(2**31)), most_BW))[1]
  return place_BWV >= least_BW[..., None]


def score(
  probability_BW: jax.Array, logits_BWV: jax.Array, noise: Callable[[], jax.Array], remasking: str
) -> jax.Array:
  """What decides who waits; larger is committed sooner.

  The candidate's probability (`low_confidence`), a random number, the distance between the two most probable tokens
  (`low_margin`), minus the entropy (`high_entropy`), or how far left it stands (`sequential`).
  """
  if remasking == "low_confidence":
    return probability_BW
  if remasking == "sequential":
    return jnp.broadcast_to(-jnp.arange(probability_BW.shape[1], dtype=jnp.float32), probability_BW.shape)
  if remasking == "random":
    return jax.vmap(jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 1))))(noise())
  p_BWV = jax.nn.softmax(logits_BWV)
  if remasking == "low_margin":
    top_BW2 = jax.lax.top_k(p_BWV, 2)[0]
    return top_BW2[..., 0] - top_BW2[..., 1]
  return jnp.sum(jax.scipy.special.xlogy(p_BWV, p_BWV), axis=-1)


def candidates(
  logits_BWV: jax.Array, noise: Callable[[], jax.Array], settings: Settings, *, remasking: str, allowed_V: jax.Array,
  ends: tuple[int, ...], alike_B: jax.Array, chooses: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
  """Candidates [B, W], their probability in the softmax of all logits without noise, as published, and their score.

  Of rows whose ends are late their candidates have probability 0 and the last score, at any temperature. Where all
  places of a row are alike their logits differ by rounding alone, which must not choose between them: the numbers of
  the last place are those of all. Where any row `chooses`, the softmax is that of the ids that its `top_p` and `top_k`
  leave, as published.
  """
  id_1V = jnp.arange(logits_BWV.shape[-1])[None]
  late_BV = settings.confidence_eos_eot_inf[:, None] & jnp.isin(id_1V, jnp.array(ends))
  never_BV = settings.logits_eos_inf[:, None] & (id_1V == ends[0])
  drawn_BV = allowed_V[None] & ~never_BV
  alike_B1, greedy_B1 = alike_B[:, None], (settings.temperature == 0)[:, None]
  drawn_BWV = jnp.where(drawn_BV[:, None], logits_BWV, -jnp.inf)
  seen_BWV = jnp.where((late_BV | never_BV)[:, None], -jnp.inf, logits_BWV)
  if chooses:
    left_BWV = probable(drawn_BWV, settings)
    left_BWV = jnp.where(alike_B[:, None, None], left_BWV[:, -1:], left_BWV)
    drawn_BWV, seen_BWV = (jnp.where(left_BWV, x, -jnp.inf) for x in (drawn_BWV, seen_BWV))
  token_BW = draw(drawn_BWV, noise, settings.temperature)
  token_BW = jnp.where(alike_B1 & greedy_B1, token_BW[:, -1:], token_BW)
  total_BW = jnp.maximum(jax.nn.logsumexp(seen_BWV, axis=-1), jnp.finfo(jnp.float32).min)  # nothing may be left of late
  log_p_BW = jnp.take_along_axis(seen_BWV, token_BW[..., None], axis=-1)[..., 0] - total_BW
  last_BW = jnp.take_along_axis(seen_BWV[:, -1], token_BW, axis=-1) - total_BW[:, -1:]
  probability_BW = jnp.exp(jnp.where(alike_B1, last_BW, log_p_BW))
  score_BW = score(probability_BW, seen_BWV, noise, remasking)
  if remasking in ("low_margin", "high_entropy"):
    score_BW = jnp.where(alike_B1, score_BW[:, -1:], score_BW)
  return token_BW, probability_BW, jnp.where(jnp.take_along_axis(late_BV, token_BW, axis=-1), _LAST, score_BW)


def scheduled(W: int, steps_B: jax.Array, step: jax.Array | int) -> jax.Array:
  """How many tokens of a whole block of W step number `step` commits at least, of so many steps; int32 [B]."""
  return jnp.maximum(W // steps_B + (step < W % steps_B), 1)


def by_time(masks_B: jax.Array, steps_B: jax.Array, step: jax.Array | int, eps_B: jax.Array) -> jax.Array:
  """How many of so many [MASK]s step number `step` commits by Dream's schedule, maybe none, the last all; int32 [B]."""
  t_B, s_B = (1.0 + n * ((eps_B - 1.0) / steps_B) for n in (step, step + 1))
  return jnp.where(step < steps_B - 1, (masks_B * (1.0 - s_B / t_B)).astype(jnp.int32), masks_B)


def commit(
  masked_BW: jax.Array, score_BW: jax.Array, probability_BW: jax.Array, quota_B: jax.Array, settings: Settings,
  always: bool = False,
) -> jax.Array:  # fmt: skip
  """Which masked positions are kept in this step, bool [B, W]: of each row at least one, or as many as its quota.

  A row with a threshold or a factor keeps its best candidate, and all that these allow; another one `quota`.
  `always`: the quota is for both (LLaDA2.0), as it is where it was asked for by `tokens_per_step`.
  """
  # A score that is not a number goes last, and the rest is counted, so a broken model cannot stall the loop.
  score_BW = jnp.where(masked_BW, jnp.nan_to_num(score_BW, nan=_LAST), -jnp.inf)
  rank_BW = jnp.argsort(jnp.argsort(-score_BW, stable=True), stable=True)
  threshold_B1, factor_B1 = settings.threshold[:, None], settings.factor[:, None]
  fixed_B1 = always | (settings.tokens_per_step[:, None] > 0) | jnp.isnan(threshold_B1) & jnp.isnan(factor_B1)
  keep_BW = rank_BW < jnp.where(fixed_B1, quota_B[:, None], 1)
  keep_BW |= probability_BW > threshold_B1
  keep_BW |= (rank_BW + 2) * (1.0 - probability_BW) < factor_B1
  return masked_BW & keep_BW


def edit(
  there_BW: jax.Array, held_BW: jax.Array, token_BW: jax.Array, probability_BW: jax.Array, settings: Settings
) -> jax.Array:
  """Which of the tokens that are `there` are replaced by their candidate: another, more probable than the threshold."""
  return there_BW & (token_BW != held_BW) & (probability_BW > settings.edit_threshold[:, None])


def most_passes(W: int, steps_BN: Any, settings: Settings, shape: Shape) -> Any:
  """So many passes are enough for a block of W: each commits a token of every row that has a [MASK] there.

  By Dream's schedule some commit none, but the last step all.
  """
  by_time_B1 = ~jnp.isnan(settings.eps)[:, None]
  most = jnp.maximum(W, jnp.max(jnp.where(by_time_B1, jnp.minimum(steps_BN, 2**30), 0)))
  return most + jnp.max(settings.max_post_passes) if shape.edits else most


class State(NamedTuple):
  """Where the reverse process stands."""

  canvas: Canvas
  steps_BN: jax.Array  # int32 steps of each row's blocks
  block: jax.Array  # int32: which block is being filled
  step: jax.Array  # int32: forward passes spent on it
  cache: Any
  open_B: Any = None  # bool: rows that go on in the block, where some edit
  post_B: Any = None  # int32: passes over it that found no [MASK]


def start(
  tokens_BL: jax.Array, steps_B: jax.Array, shape: Shape, *, mask_id: int, first: int = 0, cache: Any = None,
  block_steps_B: jax.Array | int = 0,
) -> State:  # fmt: skip
  """The state of a canvas nobody has touched.

  Args:
    tokens_BL: int32, left-padded; [MASK] where something is to be filled in.
    steps_B: int32, shared equally by a row's blocks that hold a mask, the first ones getting one more where that does
      not divide. Of a canvas that grows, or of a model of blocks, every block gets all of them.
    shape: see `Shape`.
    mask_id: id of [MASK].
    first: where the blocks begin; all masks lie behind. L - first must be a multiple of the block.
    cache: an empty cache, if the shape asks for one.
    block_steps_B: int32 steps of each block, in place of all that; 0: none.
  """
  B, L = tokens_BL.shape
  W = min(shape.block_length, L - first)
  if (L - first) % W:
    raise Mistake(f"a canvas of {L - first} positions is not cut evenly into blocks of {W}")
  masks_BN = (tokens_BL[:, first:] == mask_id).reshape(B, -1, W).any(axis=-1)
  order_BN = jnp.cumsum(masks_BN, axis=1) - 1  # number of a block among its row's with a mask
  used_B1 = jnp.maximum(masks_BN.sum(axis=1, keepdims=True), 1)
  steps_B1 = jnp.asarray(steps_B)[:, None]
  shared_BN = jnp.maximum(steps_B1 // used_B1 + (order_BN < steps_B1 % used_B1), 1)
  canvas = Canvas(
    tokens_BL=tokens_BL,
    unmasked_at_BL=jnp.zeros((B, L), jnp.int32),
    confidence_BL=jnp.ones((B, L), jnp.float32),
    step_B=jnp.zeros(B, jnp.int32),
    nfe=jnp.int32(0),
    edited_at_BL=jnp.zeros((B, L), jnp.int32) if shape.edits else None,
  )
  steps_BN = jnp.broadcast_to(steps_B1, shared_BN.shape) if shape.grows or shape.of_blocks else shared_BN
  block_steps_B1 = jnp.broadcast_to(block_steps_B, (B,))[:, None]
  steps_BN = jnp.where(block_steps_B1 > 0, block_steps_B1, steps_BN)
  rows = (jnp.zeros(B, bool), jnp.zeros(B, jnp.int32)) if shape.edits else (None, None)
  return State(canvas, steps_BN, jnp.int32(0), jnp.int32(0), cache, *rows)


def run(
  predict: Predict, state: State, key_B: jax.Array, settings: Settings, shape: Shape, *, mask_id: int,
  allowed_V: jax.Array, ends: tuple[int, ...], origin: jax.Array | int, first: int = 0,
  alike: Callable[[jax.Array], jax.Array] = lambda tokens_BL: jnp.zeros(len(tokens_BL), bool),
  until_nfe: jax.Array | int = 2**30, until_block: jax.Array | int = 2**30,
  reading: Callable[[Any], Any] = lambda cache: cache, begin: Predict | None = None, read: Any = None,
) -> State:  # fmt: skip
  """Fills the canvas up to a forward pass or a block; jit it with `predict`, `shape` and the ids static.

  Args:
    predict: the model.
    state: from `start`, or from an earlier `run`.
    key_B: a key per row; noise is a function of it, of the row's step, and of how far a position is from `origin`.
    settings: see `SamplerConfig`. Within a block of n masks and s steps each step commits ceil(masks left / steps
      left), LLaDA's fixed schedule, unless another one is asked for.
    shape: see `Shape`. With a cache the first step of a block is a pass over the whole canvas.
    mask_id: id of [MASK].
    allowed_V: bool, the ids that may be committed: neither [MASK] nor rows behind the vocabulary.
    ends: ids that end a row, EOS first. Where it stops early the rest is filled with EOS.
    origin: the position from which the noise counts the others; a number, or one a row [B].
    first: where the blocks begin (static).
    alike: tokens_BL -> bool [B], the rows whose masked places the model cannot tell apart; those are filled in order.
    until_nfe: stop when so many forward passes have been spent in all.
    until_block: stop when so many blocks are filled.
    reading: what to make of a block's cache once, for the passes that only read it.
    begin: of a model of blocks, the first pass over a block, which leaves in the cache what the block before it is now.
    read: what `reading` made of the cache behind the first pass over a block, and the state comes without: the passes
      that are left of the block are run.

  Returns:
    The state, finished if neither limit was met.
  """
  B, L = state.canvas.tokens_BL.shape
  W = min(shape.block_length, L - first)
  num_blocks = (L - first) // W
  place_BL = jnp.abs(jnp.arange(L)[None] - jnp.broadcast_to(jnp.asarray(origin), (B,))[:, None])
  bias_BV = biases(settings, len(allowed_V))

  def window(array_BL, at):
    return jax.lax.dynamic_slice_in_dim(array_BL, at, W, axis=1)

  def step(state, cache, predict=predict):
    canvas, at = state.canvas, first + state.block * W
    masked_BW, open_B = masked(state), going(state)
    step_B = canvas.step_B + open_B

    def noise():  # a key for each place
      step_key_B = jax.vmap(jax.random.fold_in)(key_B, step_B)
      return jax.vmap(lambda key, at_W: jax.vmap(functools.partial(jax.random.fold_in, key))(at_W))(
        step_key_B, window(place_BL, at)
      )

    logits_BWV, cache = predict(canvas.tokens_BL, at, W, cache)
    logits_BWV = logits_BWV if bias_BV is None else logits_BWV + bias_BV[:, None]
    token_BW, probability_BW, score_BW = candidates(
      logits_BWV, noise, settings, remasking=shape.remasking, allowed_V=allowed_V, ends=ends,
      alike_B=alike(canvas.tokens_BL), chooses=shape.chooses,
    )  # fmt: skip
    steps_B, masks_B = jnp.take(state.steps_BN, state.block, axis=1), masked_BW.sum(axis=1)
    if shape.of_blocks:
      quota_B = scheduled(W, steps_B, state.step)
    else:
      quota_B = -(-masks_B // jnp.maximum(steps_B - state.step, 1))
    quota_B = jnp.where(jnp.isnan(settings.eps), quota_B, by_time(masks_B, steps_B, state.step, settings.eps))
    quota_B = jnp.where(settings.tokens_per_step > 0, settings.tokens_per_step, quota_B)
    commit_BW = commit(masked_BW, score_BW, probability_BW, quota_B, settings, shape.of_blocks)
    put_BW = commit_BW
    if shape.edits:
      there_BW = open_B[:, None] & (window(canvas.unmasked_at_BL, at) > 0)
      edit_BW = edit(there_BW, window(canvas.tokens_BL, at), token_BW, probability_BW, settings)
      put_BW |= edit_BW

    def put(array_BL, new_BW, put_BW):
      kept_BW = jnp.where(put_BW, new_BW, window(array_BL, at))
      return jax.lax.dynamic_update_slice_in_dim(array_BL, kept_BW, at, axis=1)

    step_BW = jnp.broadcast_to(step_B[:, None], (B, W))
    canvas = Canvas(
      tokens_BL=put(canvas.tokens_BL, token_BW, put_BW),
      unmasked_at_BL=put(canvas.unmasked_at_BL, step_BW, commit_BW),
      confidence_BL=put(canvas.confidence_BL, probability_BW, put_BW),
      step_B=step_B,
      nfe=canvas.nfe + 1,
      edited_at_BL=put(canvas.edited_at_BL, step_BW, edit_BW) if shape.edits else None,
    )
    if shape.of_blocks and not shape.edits:  # all is there up to an end
      end_BL = ended(canvas)
      before_BL = jnp.cumsum(canvas.tokens_BL == mask_id, axis=1)
      canvas = close(canvas, (end_BL & (before_BL == 0)).any(axis=1))
    state = state._replace(canvas=canvas, step=state.step + 1, cache=cache)
    if shape.edits:
      post_B = jnp.where(state.step == 1, 0, state.post_B) + (open_B & (masks_B == 0))
      changed_B = ((masks_B > 0) | edit_BW.any(axis=1)) & (post_B < settings.max_post_passes)
      changed_B &= ~jnp.isnan(settings.edit_threshold)
      state = state._replace(open_B=open_B & (masked(state).any(axis=1) | changed_B), post_B=post_B)
    return state

  def masked(state):
    return window(state.canvas.tokens_BL, first + state.block * W) == mask_id

  def going(state):  # rows that have something to do in the block
    masked_B = masked(state).any(axis=1)
    return jnp.where(state.step == 0, masked_B, state.open_B) if shape.edits else masked_B

  def ended(canvas):
    return jnp.isin(canvas.tokens_BL, jnp.array(ends)) & (canvas.unmasked_at_BL > 0)

  def close(canvas, ended_B):  # the rest of rows that stop early
    rest_BL = (settings.early_stop & ended_B)[:, None] & (canvas.tokens_BL == mask_id)
    return canvas._replace(
      tokens_BL=jnp.where(rest_BL, ends[0], canvas.tokens_BL),
      unmasked_at_BL=jnp.where(rest_BL, canvas.step_B[:, None], canvas.unmasked_at_BL),
    )

  most = most_passes(W, state.steps_BN, settings, shape)

  def unfilled(state):
    return (state.step < most) & going(state).any()

  def unfinished(state):
    return (state.canvas.nfe < until_nfe) & unfilled(state)

  def fill_block(state):
    cache = state.cache if begin else None
    if read is not None:
      pass
    elif begin:  # also where a block is given: it is in nobody's cache yet

      def beginning(state):
        return (state.step < 1) & (state.canvas.nfe < until_nfe)

      state = jax.lax.while_loop(beginning, lambda s: step(s, s.cache, begin), state)
      cache = state.cache
    elif shape.cache:  # the first step makes the cache, the others read it
      state = jax.lax.while_loop(lambda s: (s.step < 1) & unfinished(s), lambda s: step(s, None), state)
      cache = state.cache
    bare = state._replace(cache=None)  # what is only read stays out of the loop
    of_block = reading(cache) if read is None and (shape.cache or begin) else read
    bare = jax.lax.while_loop(unfinished, lambda s: step(s, of_block)._replace(cache=None), bare)
    state = bare._replace(cache=cache)
    filled = ~unfilled(state)
    if begin:
      filled &= state.step > 0
    behind_L = jnp.arange(L) < first + (state.block + 1) * W
    state = state._replace(canvas=close(state.canvas, filled & (behind_L[None] & ended(state.canvas)).any(axis=1)))
    return state._replace(block=state.block + filled, step=jnp.where(filled, 0, state.step))

  def going_on(state):
    within = (state.block < jnp.minimum(num_blocks, until_block)) & (state.canvas.nfe < until_nfe)
    masks = (state.canvas.tokens_BL == mask_id).any()
    return within & (masks | ((state.step > 0) & going(state).any()) if shape.edits else masks)

  return jax.lax.while_loop(going_on, fill_block, state)
