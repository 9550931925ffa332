"""The reverse process: one compiled loop that fills a canvas of [MASK]s. Predict, score, commit, again.

The life of a canvas: rows of any length arrive left-padded, so that their right ends line up. The canvas is cut into
blocks from the right end; blocks are filled from left to right, each in a number of steps. A step runs the model
(*predict*), draws a candidate for every masked position of the block and gives it a confidence (*score*), and keeps the
most confident candidates (*commit*): a kept token never changes again. What is not [MASK] at the start is given,
wherever it stands, so infilling is no special case. Letters: `mask_predictor.py`; here W is the block.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

# (tokens_BL, start, W) -> float32 logits_BWV of the window at `start`.
Predict = Callable[[jax.Array, jax.Array, int], jax.Array]


REMASKING = ("low_confidence", "random", "low_margin", "high_entropy")


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
  """How a canvas is filled; LLaDA's fixed schedule with low-confidence remasking by default."""

  gen_length: int = 64  # masked tokens after the prompt
  block_length: int = 32  # filled together, blocks from left to right
  steps: int = 64  # forward passes over all blocks
  temperature: float = 0.0  # of the candidates (Gumbel-max); 0 takes the most probable
  remasking: str = "low_confidence"  # which candidates wait; see `confidence`
  threshold: float | None = None  # also keep every candidate at least this confident (Fast-dLLM)
  factor: float | None = None  # also keep the most candidates k with (k + 1)(1 - k-th confidence) < factor
  guidance_scale: float = 0.0  # w: logits = un + (w + 1)(cond - un), `un` seeing the given tokens masked
  seed: int = 0

  def __post_init__(self):
    for name in ("gen_length", "block_length", "steps"):
      if getattr(self, name) < 1:
        raise ValueError(f"sample.{name}={getattr(self, name)}: must be at least 1")
    if self.temperature < 0:
      raise ValueError(f"sample.temperature={self.temperature}: must not be negative")
    if self.guidance_scale < 0:
      raise ValueError(f"sample.guidance_scale={self.guidance_scale}: must not be negative")
    if self.remasking not in REMASKING:
      raise ValueError(f"sample.remasking={self.remasking!r}: use one of {', '.join(REMASKING)}")
    if self.threshold is not None and self.factor is not None:
      raise ValueError("sample.threshold and sample.factor are both set: use one of them")


class Canvas(NamedTuple):
  """A canvas being filled. `unmasked_at` replays the whole process: committed tokens never change."""

  tokens_BL: jax.Array  # int32
  unmasked_at_BL: jax.Array  # int32: the row's forward pass that committed it, from 1; 0 = given
  confidence_BL: jax.Array  # float32: probability of the token when it was committed; 1 = given
  step_B: jax.Array  # int32: forward passes in which the row had something to fill
  nfe: jax.Array  # int32: forward passes of the whole batch


def draw(
  logits_WV: jax.Array, allowed_V: jax.Array, key_W: jax.Array, temperature: float
) -> tuple[jax.Array, jax.Array]:
  """Candidates x_0 [W] among the allowed ids by Gumbel-max at `temperature`, and their probability [W].

  The probability is the softmax of all logits without the noise, as published.
  """
  scores_WV = jnp.where(allowed_V[None, :], logits_WV, -jnp.inf)
  if temperature > 0:
    V = logits_WV.shape[-1]
    scores_WV += temperature * jax.vmap(lambda key: jax.random.gumbel(key, (V,), mode="high"))(key_W)
  token_W = jnp.argmax(scores_WV, axis=-1).astype(jnp.int32)
  chosen_W = jnp.take_along_axis(logits_WV, token_W[:, None], axis=-1)[:, 0]
  return token_W, jnp.exp(chosen_W - jax.nn.logsumexp(logits_WV, axis=-1))


def score(probability_W: jax.Array, logits_WV: jax.Array, key_W: jax.Array, remasking: str) -> jax.Array:
  """What decides who waits; larger is committed sooner.

  The candidate's probability (`low_confidence`), a random number, the distance between the two most probable tokens
  (`low_margin`), or minus the entropy (`high_entropy`).
  """
  if remasking == "low_confidence":
    return probability_W
  if remasking == "random":
    return jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 1)))(key_W)
  if remasking == "low_margin":
    top_W2 = jax.lax.top_k(jax.nn.softmax(logits_WV), 2)[0]
    return top_W2[:, 0] - top_W2[:, 1]
  log_WV = jax.nn.log_softmax(logits_WV)
  return jnp.sum(jnp.exp(log_WV) * log_WV, axis=-1)


def commit(
  masked_W: jax.Array, score_W: jax.Array, probability_W: jax.Array, quota: jax.Array, c: SamplerConfig
) -> jax.Array:
  """Which masked positions of a row are kept in this step, bool [W]: at least `quota` (>= 1) of them."""
  # A score that is not a number goes last, and the rest is counted, so a broken model cannot stall the loop.
  score_W = jnp.where(masked_W, jnp.nan_to_num(score_W, nan=-1e30), -jnp.inf)
  rank_W = jnp.argsort(jnp.argsort(-score_W, stable=True), stable=True)
  keep_W = rank_W < quota
  if c.threshold is not None:
    keep_W = (rank_W < 1) | (probability_W > c.threshold)
  if c.factor is not None:
    keep_W = (rank_W < 1) | ((rank_W + 2) * (1.0 - probability_W) < c.factor)
  return masked_W & keep_W


def sample(
  predict: Predict,
  tokens_BL: jax.Array,
  key_B: jax.Array,
  c: SamplerConfig,
  *,
  mask_id: int,
  allowed_V: jax.Array,
  first: int = 0,
) -> Canvas:
  """Fills every [MASK] of the canvas; jit it with `predict`, `c`, `mask_id` and `first` static.

  Args:
    predict: the model.
    tokens_BL: int32, left-padded; [MASK] where something is to be filled in.
    key_B: a key per row; noise is a function of it, of the row's step, and of the distance from the right end.
    c: see `SamplerConfig`. The steps of a row are shared equally by its blocks that hold a mask, the first ones
      getting one more where that does not divide; within a block of n masks and s steps each step commits
      ceil(masks left / steps left), LLaDA's fixed schedule.
    mask_id: id of [MASK].
    allowed_V: bool, the ids that may be committed: neither [MASK] nor rows behind the vocabulary.
    first: where the blocks begin (static); all masks lie behind. L - first must be a multiple of the block.

  Returns:
    The filled canvas.
  """
  B, L = tokens_BL.shape
  W = min(c.block_length, L - first)
  if (L - first) % W:
    raise ValueError(f"a canvas of {L - first} positions is not cut evenly into blocks of {W}")
  num_blocks = (L - first) // W
  masks_BN = (tokens_BL[:, first:] == mask_id).reshape(B, num_blocks, W).any(axis=-1)
  order_BN = jnp.cumsum(masks_BN, axis=1) - 1  # the how-manieth of its row's blocks with a mask
  used_B1 = jnp.maximum(masks_BN.sum(axis=1, keepdims=True), 1)
  steps_BN = jnp.maximum(c.steps // used_B1 + (order_BN < c.steps % used_B1), 1)

  def window(array_BL, start):
    return jax.lax.dynamic_slice_in_dim(array_BL, start, W, axis=1)

  def step(start, steps_B, carry):
    k, canvas = carry
    masked_BW = window(canvas.tokens_BL, start) == mask_id
    step_B = canvas.step_B + masked_BW.any(axis=1)
    distance_W = L - start - jnp.arange(W)
    key_BW = jax.vmap(lambda key, i: jax.vmap(lambda d: jax.random.fold_in(jax.random.fold_in(key, i), d))(distance_W))(
      key_B, step_B
    )
    logits_BWV = predict(canvas.tokens_BL, start, W)
    token_BW, probability_BW = jax.vmap(lambda x, key: draw(x, allowed_V, key, c.temperature))(logits_BWV, key_BW)
    score_BW = jax.vmap(lambda p, x, key: score(p, x, key, c.remasking))(probability_BW, logits_BWV, key_BW)
    quota_B = -(-masked_BW.sum(axis=1) // jnp.maximum(steps_B - k, 1))
    commit_BW = jax.vmap(lambda m, s, p, q: commit(m, s, p, q, c))(masked_BW, score_BW, probability_BW, quota_B)

    def put(array_BL, new_BW):
      kept_BW = jnp.where(commit_BW, new_BW, window(array_BL, start))
      return jax.lax.dynamic_update_slice_in_dim(array_BL, kept_BW, start, axis=1)

    return k + 1, Canvas(
      tokens_BL=put(canvas.tokens_BL, token_BW),
      unmasked_at_BL=put(canvas.unmasked_at_BL, jnp.broadcast_to(step_B[:, None], (B, W))),
      confidence_BL=put(canvas.confidence_BL, probability_BW),
      step_B=step_B,
      nfe=canvas.nfe + 1,
    )

  def fill_block(n, canvas):
    start = first + n * W

    def unfinished(carry):  # each step commits at least one token of every row: W steps are enough
      return (carry[0] < W) & (window(carry[1].tokens_BL, start) == mask_id).any()

    steps_B = jnp.take(steps_BN, n, axis=1)
    return jax.lax.while_loop(unfinished, lambda carry: step(start, steps_B, carry), (jnp.int32(0), canvas))[1]

  canvas = Canvas(
    tokens_BL=tokens_BL,
    unmasked_at_BL=jnp.zeros((B, L), jnp.int32),
    confidence_BL=jnp.ones((B, L), jnp.float32),
    step_B=jnp.zeros(B, jnp.int32),
    nfe=jnp.int32(0),
  )
  return jax.lax.fori_loop(0, num_blocks, fill_block, canvas)
