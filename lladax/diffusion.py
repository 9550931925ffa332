"""Masked diffusion: the forward process, the loss and the likelihood, of whole canvases and of blocks, on plain arrays.

A model is any function `nll(input_BL, target_BL) -> nll_BL`: the cross-entropy in nats of every target given the
noised input, zero where the target is negative (not asked). To train on it is `weighted_nll(input_BL, target_BL,
weight_BL) -> (sum of weight_BL x nll_BL, nll_BL)`: who knows the weights at once can make the gradient of the sum in
the same pass. Of a model of blocks both also take `clean_BL`: each block of the input then sees, of the blocks before
it, these tokens. Nothing else of the model is known here.
Noise is a function of (rng, index) row by row, so it is the same on one device and on many, for any number of
micro-batches, and after any restart. The equations are those of LLaDA (arXiv 2502.09992), and of BD3-LM (arXiv
2503.09573) for blocks. Letters: `mask_predictor.py`; here S is the blocks of a row.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lladax.mistake import Mistake
from lladax.sampling import SamplerConfig

Nll = Callable[..., jax.Array]
WeightedNll = Callable[..., tuple[jax.Array, jax.Array]]

# What is folded into a key, in an example's or a draw's place, for the shift that all of them have in common.
_SHIFT = 0x51F7
_BLOCKS = 0xB10C  # and for what is drawn block by block
_REPLACED = 0x5EED


@dataclasses.dataclass(frozen=True)
class NoiseConfig:
  """The forward process: which tokens are masked, and how times are drawn."""

  # "independent": each token with probability p(t), as published | "exact": l of n tokens, P Eq. 6, less variance.
  masking: str = "independent"
  # "uniform", as published | "stratified" over the batch | "antithetic" pairs t, 1 - t, stratified too; less variance.
  times: str = "uniform"
  eps: float = 1e-3  # smallest mask probability, p = (1 - eps) t + eps; independent masking only
  # Tokens of a block, counted from each document's own start; it is noised and predicted given the clean blocks before
  # it. 0: the whole canvas is one. 1, with exact masking: the chain rule, without noise.
  block: int = 0
  # ((length, block), ...): another block in each phase of the run, in place of `block`; lengths as in
  # optimizer.schedule. Each divides the largest, at whose multiples documents begin in every phase. LLaDA2.0: 1, 4, 32
  # ... while it warms up, 0 for most of it, and 32.
  blocks: tuple[tuple[float, int], ...] = ()
  times_per: str = "block"  # of blocks: each has a time of its own | "row": all of a row have one (LLaDA2.0)
  band: tuple[float, float] = (0.0, 1.0)  # times, and so the shares that are masked, lie in it; LLaDA2.0: (0.3, 0.8)
  weights: str = "elbo"  # a masked token counts 1/p: the bound | "flat": each the same, in the mean 1 a token
  complements: bool = False  # each row twice, the other tokens masked the second time; with flat weights
  replace: float = 0.0  # so many of the masked tokens get a random token, not [MASK]: to learn editing (LLaDA2.1)

  def __post_init__(self):
    if self.masking not in ("independent", "exact"):
      raise Mistake(f"noise.masking={self.masking!r}: use independent or exact")
    if self.times not in ("uniform", "stratified", "antithetic"):
      raise Mistake(f"noise.times={self.times!r}: use uniform, stratified or antithetic")
    if not 0.0 < self.eps < 1.0:
      raise Mistake(f"noise.eps={self.eps}: must lie between 0 and 1")
    if self.block < 0:
      raise Mistake(f"noise.block={self.block}: must be at least 1, or 0 for the whole canvas")
    self._check_blocks()
    for name, known in (("times_per", ("block", "row")), ("weights", ("elbo", "flat"))):
      if getattr(self, name) not in known:
        raise Mistake(f"noise.{name}={getattr(self, name)!r}: use {' or '.join(known)}")
    object.__setattr__(self, "band", tuple(self.band))  # JSON knows lists alone
    if len(self.band) != 2 or not 0.0 <= self.band[0] < self.band[1] <= 1.0:
      raise Mistake(f"noise.band={self.band}: give the least and the largest time, between 0 and 1")
    if not 0.0 <= self.replace < 1.0:
      raise Mistake(f"noise.replace={self.replace}: must be at least 0, and less than 1")
    if self.complements and self.weights != "flat":
      raise Mistake("noise.complements=True: what the other row masks is not weighted 1/p: set noise.weights=flat")

  def _check_blocks(self):
    if self.blocks and self.block:
      raise Mistake(f"noise.block={self.block}, noise.blocks={self.blocks}: one block or a schedule of them, not both")
    for phase in self.blocks:
      if len(phase) != 2 or not (0 < phase[0] < math.inf or phase[0] == -1) or phase[1] < 0:
        raise Mistake(f"noise.blocks: {phase} is not (steps, block)")
      if phase[1] and self.align % phase[1]:
        raise Mistake(
          f"noise.blocks: {phase[1]} does not divide {self.align}, the largest: documents begin at multiples of both"
        )

  @property
  def align(self) -> int:
    """Documents begin at multiples of so many tokens: of the largest block of the run, and so of all."""
    return max([self.block, *(block for _, block in self.blocks), 1])

  @property
  def pairs_share(self) -> bool:
    """Whether two neighbouring rows mask one token more than one of them has."""
    whole = self.band == (0.0, 1.0) and not self.complements
    return whole and (self.masking, self.times) == ("exact", "antithetic")


def draw_times(
  rng: jax.Array, index_B: jax.Array, times: str, batch_size: int, blocks: int | None = None
) -> tuple[jax.Array, jax.Array]:
  """Times in [0, 1) for the examples `index_B`, each uniform on its own.

  Args:
    rng: key of this step.
    index_B: global example indices; the rows of a step are consecutive, from a multiple of `batch_size` on.
    times: "uniform"; "stratified" puts one example in each of `batch_size` equal slices of [0, 1);
      "antithetic" gives examples 2k and 2k + 1 one time, stratified over the pairs, the second mirrored.
    batch_size: the global batch B, whatever part of it is at hand.
    blocks: so many times for each example, stratified over the blocks of a row and over the rows; None: one.

  Returns:
    (t_B, or t_BS of the blocks; mirrored_B): where `mirrored` the time meant is 1 - t, or the count n + 1 - l(t).

  Raises:
    Mistake: an odd batch cannot be paired.
  """
  pairs = times == "antithetic"
  if pairs and batch_size % 2:
    raise Mistake(f"noise.times='antithetic' pairs neighbouring rows: a batch of {batch_size} must be even")
  draw_B = index_B // 2 if pairs else index_B
  if blocks is None:
    number, t = draw_B, jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(rng, i)))(draw_B)
  else:
    key_B = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(rng, i), _BLOCKS))(draw_B)
    t = jax.vmap(lambda key: jax.random.uniform(key, (blocks,)))(key_B)
  if times != "uniform":
    strata = batch_size // 2 if pairs else batch_size
    if blocks is not None:  # those of a row lie 1 / blocks apart
      number = jnp.arange(blocks)[None] * strata + draw_B[:, None] % strata
      strata *= blocks
    # A shift common to the step makes every single time uniform, not just their union.
    shift = jax.random.randint(jax.random.fold_in(rng, _SHIFT), (), 0, strata)
    t = jnp.minimum(((number + shift) % strata + t) / strata, 1.0 - 2.0**-24)
  return t, (index_B % 2 == 1) & pairs


def mask_exactly(rng: jax.Array, maskable_L: jax.Array, count: jax.Array) -> jax.Array:
  """A uniformly drawn subset of `count` of the maskable positions of one row, as booleans [L]."""
  score_L = jax.random.bits(rng, maskable_L.shape) >> 1
  score_L = jnp.where(maskable_L, score_L, jnp.uint32(0xFFFFFFFF))
  rank_L = jnp.argsort(jnp.argsort(score_L, stable=True), stable=True)
  return rank_L < count


def forward_process(
  tokens_BL: jax.Array, maskable_BL: jax.Array, index_B: jax.Array, rng: jax.Array, mask_id: int, noise: NoiseConfig,
  batch_size: int, vocab_size: int = 0,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
  """x_t ~ q(x_t | x_0): masks tokens, and says by how much to scale the cross-entropy of the masked ones.

  Args:
    tokens_BL: int32 x_0.
    maskable_BL: bool; the others are given, and never masked.
    index_B: int32 global example index.
    rng: key of this step.
    mask_id: id of [MASK].
    noise: see `NoiseConfig`.
    batch_size: the global batch.
    vocab_size: of the ids that may take a token's place, where `noise` replaces any.

  Returns:
    input_BL (x_t), masked_BL (bool), scale_BL: 1/p (P Eq. 3) or n/l (P Eq. 6), one for all that is noised together.
    The mean over noise of the summed scale x cross-entropy of the masked tokens is the bound on -log p(x_0).
  """
  L, n = tokens_BL.shape[1], noise.block
  S = -(-L // n) if n else 1
  per_block = n > 0 and noise.times_per == "block"
  t, mirrored_B = draw_times(rng, index_B, noise.times, batch_size, S if per_block else None)
  key_B = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(rng, i), 1))(index_B)
  if not n:
    masked_BL, scale_B = _masked(key_B, t, mirrored_B, maskable_BL, noise)
    scale_BL = jnp.broadcast_to(scale_B[:, None], tokens_BL.shape)
    return noised(tokens_BL, masked_BL, index_B, rng, mask_id, noise, vocab_size), masked_BL, scale_BL
  each = lambda x: jnp.broadcast_to(x.reshape(len(index_B), -1), (len(index_B), S)).reshape(-1)  # noqa: E731
  key_R = jax.vmap(lambda key: jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(S)))(key_B).reshape(-1)
  masked_RW, scale_R = _masked(key_R, each(t), each(mirrored_B), _cut(maskable_BL, n), noise)
  masked_BL = masked_RW.reshape(-1, S * n)[:, :L]
  scale_BL = jnp.repeat(scale_R.reshape(-1, S), n, axis=1)[:, :L]
  return noised(tokens_BL, masked_BL, index_B, rng, mask_id, noise, vocab_size), masked_BL, scale_BL


def noised(
  tokens_BL: jax.Array, masked_BL: jax.Array, index_B: jax.Array, rng: jax.Array, mask_id: int, noise: NoiseConfig,
  vocab_size: int,
) -> jax.Array:  # fmt: skip
  """The tokens with [MASK], or a random token, in the place of those that are masked."""
  if not noise.replace:
    return jnp.where(masked_BL, mask_id, tokens_BL)

  def row(i, masked_L):
    key = jax.random.fold_in(jax.random.fold_in(rng, i), _REPLACED)
    random_L = jax.random.randint(jax.random.fold_in(key, 0), masked_L.shape, 0, vocab_size - (mask_id < vocab_size))
    random_L += random_L >= mask_id  # any but [MASK]
    return jnp.where(jax.random.uniform(jax.random.fold_in(key, 1), masked_L.shape) < noise.replace, random_L, mask_id)

  return jnp.where(masked_BL, jax.vmap(row)(index_B, masked_BL), tokens_BL)


def _cut(array_BL: jax.Array, n: int) -> jax.Array:
  """Rows cut into blocks of n, each a row of its own [R, n]; the last one is filled up."""
  return jnp.pad(array_BL, ((0, 0), (0, -array_BL.shape[1] % n))).reshape(-1, n)


def _masked(
  key_B: jax.Array, t_B: jax.Array, mirrored_B: jax.Array, maskable_BL: jax.Array, noise: NoiseConfig
) -> tuple[jax.Array, jax.Array]:
  """(masked_BL, scale_B) of what is noised together."""
  low, high = noise.band
  if noise.masking == "independent":
    t_B = jnp.where(mirrored_B, 1.0 - t_B, t_B)
    if noise.band != (0.0, 1.0):
      t_B = low + (high - low) * t_B
    p_B = (1.0 - noise.eps) * t_B + noise.eps
    u_BL = jax.vmap(lambda key: jax.random.uniform(key, maskable_BL.shape[1:]))(key_B)
    mean = (1.0 - noise.eps) * (low + high) / 2 + noise.eps
    scale_B = 1.0 / p_B if noise.weights == "elbo" else jnp.full_like(p_B, 1.0 / mean)
    return maskable_BL & (u_BL < p_B[:, None]), scale_B
  n_B = maskable_BL.sum(axis=1)
  if noise.band == (0.0, 1.0):
    least_B, most_B, l_B = 1, n_B, _count(t_B, n_B)
  else:  # rounded inwards, where that leaves any
    least_B = jnp.maximum(jnp.ceil(low * n_B - 1e-3).astype(jnp.int32), 1)
    most_B = jnp.maximum(jnp.floor(high * n_B + 1e-3).astype(jnp.int32), least_B)
    l_B = jnp.minimum(least_B + jnp.floor(t_B * (most_B - least_B + 1)).astype(jnp.int32), most_B)
  l_B = jnp.where(mirrored_B, most_B + least_B - l_B, l_B)
  mean_B = l_B if noise.weights == "elbo" else (least_B + most_B) / 2
  return maskable_BL & jax.vmap(mask_exactly)(key_B, maskable_BL, l_B), n_B / jnp.maximum(mean_B, 1)


def _count(t_B: jax.Array, n_B: jax.Array) -> jax.Array:
  """L in 1 .. n, uniform when t is."""
  return jnp.minimum(1 + jnp.floor(t_B * n_B).astype(jnp.int32), n_B)


@dataclasses.dataclass(frozen=True)
class Masked:
  """Masked diffusion as an objective: what is learnt, how it is scored, and what that asks of model and sampler."""

  noise: NoiseConfig = NoiseConfig()

  name: ClassVar = "diffusion"
  order: ClassVar = "full"  # of attention, see `Visible`
  fills: ClassVar = True  # in the middle of a canvas; else it continues what is given
  exact: ClassVar = False  # the likelihood; else it is a bound, estimated

  def targets_per_pair(self, length: int) -> int | None:
    """How many tokens two neighbouring rows have masked at most, where that is fewer than all of them."""
    return length + 1 if self.noise.pairs_share else None

  def check_sampler(self, c: SamplerConfig) -> None:
    """All settings have a meaning here."""

  def loss(
    self, weighted_nll: WeightedNll, batch: dict[str, jax.Array], rng: jax.Array, *, mask_id: int, batch_size: int,
    vocab_size: int = 0, **_: Any,
  ) -> tuple[jax.Array, dict[str, tuple[jax.Array, jax.Array]]]:  # fmt: skip
    """The masked-diffusion training loss (P Eq. 3): a plain weighted sum of cross-entropies of masked tokens.

    Args:
      weighted_nll: the model; of the nll_BL that it returns no gradient is asked.
      batch: columns tokens int32 [B, L], weight float32 [B, L] (0 = given or padding; already normalised, so that
        the losses of micro-batches add up), index int32 [B].
      rng: key of this step, a function of (seed, step).
      mask_id: id of [MASK].
      batch_size: the global batch.
      vocab_size: ids in use, of which some may take a token's place.
      **_: what other objectives need.

    Returns:
      (loss in nats per token, metrics as (sum, how many) of this part of the batch: of the parts, both add up).
      `masked_nll` is the plain mean over masked tokens.
    """
    return _loss(self.noise, weighted_nll, batch, rng, mask_id, batch_size, vocab_size)

  def log_likelihood(
    self, nll: Nll, tokens_BL: jax.Array, scored_BL: jax.Array, segment_BL: jax.Array | None, key_B: jax.Array,
    sample_B: jax.Array, samples_B: jax.Array, *, mask_id: int, **_: Any,
  ) -> jax.Array:  # fmt: skip
    """One draw per row of the Monte-Carlo estimate of log p(scored | rest) (P Eq. 6), in nats.

    The mean over the draws 0 .. S - 1 is the estimate. Counts l are stratified over the draws; an
    answer of one token is exact with a single draw. The masks are a function of (key, draw) and of the positions:
    rows with one key are judged under the same noise, and nobody's answer depends on the rest of the batch.

    Args:
      nll: the model.
      tokens_BL: int32 prompt and answer (padding goes to the right end).
      scored_BL: bool, the answer.
      segment_BL: not read; what other objectives need, as `**_` is.
      key_B: a key per row.
      sample_B: int32 which draw each row is.
      samples_B: int32 S, of how many draws, over which l is stratified.
      mask_id: id of [MASK].

    Returns:
      float32 [B].
    """
    masked_BL, scale_B = jax.vmap(_drawn)(scored_BL, key_B, sample_B, samples_B)
    input_BL, target_BL = jnp.where(masked_BL, mask_id, tokens_BL), jnp.where(masked_BL, tokens_BL, -1)
    return -scale_B * jnp.sum(nll(input_BL, target_BL), axis=1)


@dataclasses.dataclass(frozen=True)
class Blocks:
  """Block diffusion (BD3-LM): the bound of each block given the clean blocks before it, and their sum.

  Documents begin at multiples of the block. With blocks of one token and exact masking it is the chain rule itself.
  """

  noise: NoiseConfig

  name: ClassVar = "diffusion"
  order: ClassVar = "blocks"
  fills: ClassVar = True

  @property
  def exact(self) -> bool:
    """Whether there is nothing to draw."""
    return self.noise.block == 1

  def targets_per_pair(self, length: int) -> int | None:
    """As that of `Masked`: each block of a pair of rows has one more than its tokens."""
    return length - (-length // self.noise.block) if self.noise.pairs_share else None

  def check_sampler(self, c: SamplerConfig) -> None:
    """Raises Mistake for what a model of blocks has already decided."""
    if c.cache:
      raise Mistake(f"sample.cache={c.cache!r}: a model of blocks keeps the finished ones by itself; leave it out")
    if c.block_length not in (self.noise.block, SamplerConfig.block_length):
      raise Mistake(
        f"sample.block_length={c.block_length}: this model's blocks have {self.noise.block} tokens: set it to that"
      )

  def loss(
    self, weighted_nll: WeightedNll, batch: dict[str, jax.Array], rng: jax.Array, *, mask_id: int, batch_size: int,
    vocab_size: int = 0, **_: Any,
  ) -> tuple[jax.Array, dict[str, tuple[jax.Array, jax.Array]]]:  # fmt: skip
    """As that of `Masked`, by one pass over [x_t, x_0]; x_0 is the batch's column `clean` where it has one."""
    weighted_nll = functools.partial(weighted_nll, clean_BL=batch.get("clean", batch["tokens"]))
    return _loss(self.noise, weighted_nll, batch, rng, mask_id, batch_size, vocab_size)

  def log_likelihood(
    self, nll: Nll, tokens_BL: jax.Array, scored_BL: jax.Array, segment_BL: jax.Array | None, key_B: jax.Array,
    sample_B: jax.Array, samples_B: jax.Array, *, mask_id: int, **_: Any,
  ) -> jax.Array:  # fmt: skip
    """As that of `Masked`; every block with scored tokens is noised in every draw, with a count of its own."""
    (B, L), n = tokens_BL.shape, self.noise.block
    S = -(-L // n)
    keys_BS = jax.vmap(lambda key: jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(S)))(key_B)
    each = lambda x: jnp.repeat(x, S)  # noqa: E731
    scored_RW = _cut(scored_BL, n)
    masked_RW, scale_R = jax.vmap(_drawn)(scored_RW, keys_BS.reshape(-1), each(sample_B), each(samples_B))
    masked_BL, scale_BS = masked_RW.reshape(B, -1)[:, :L], scale_R.reshape(B, S)
    input_BL, target_BL = jnp.where(masked_BL, mask_id, tokens_BL), jnp.where(masked_BL, tokens_BL, -1)
    nll_BL = nll(input_BL, target_BL, clean_BL=tokens_BL)
    return -jnp.sum(jnp.repeat(scale_BS, n, axis=1)[:, :L] * nll_BL, axis=1)


def _loss(noise, weighted_nll, batch, rng, mask_id, batch_size, vocab_size):
  tokens_BL, weight_BL, index_B = batch["tokens"], batch["weight"], batch["index"]
  input_BL, masked_BL, scale_BL = forward_process(
    tokens_BL, weight_BL > 0, index_B, rng, mask_id, noise, batch_size, vocab_size
  )
  passes = [(input_BL, masked_BL)]
  if noise.complements:  # each token is masked in one of the two
    scale_BL, other_BL = jnp.ones_like(weight_BL), (weight_BL > 0) & ~masked_BL
    passes.append((noised(tokens_BL, other_BL, index_B, rng, mask_id, noise, vocab_size), other_BL))
  found = []
  for input_BL, masked_BL in passes:
    total, nll_BL = weighted_nll(input_BL, jnp.where(masked_BL, tokens_BL, -1), weight_BL * scale_BL)
    found.append((total, jnp.sum(nll_BL), jnp.sum(masked_BL)))
  total, nats, count = (functools.reduce(jnp.add, x) for x in zip(*found, strict=True))
  return total, {"masked_nll": (nats, count)}


def _drawn(scored_L: jax.Array, key: jax.Array, sample: jax.Array, samples: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Draw number `sample` of `samples`: (masked_L, n / l), with counts stratified over the draws."""
  shift = jax.random.uniform(jax.random.fold_in(key, _SHIFT))
  key = jax.random.fold_in(key, sample)
  t = (sample + jax.random.uniform(jax.random.fold_in(key, 0))) / samples
  n = scored_L.sum()
  count = _count(jnp.mod(t + shift, 1.0), n)
  return scored_L & mask_exactly(jax.random.fold_in(key, 1), scored_L, count), n / jnp.maximum(count, 1)


def chain_rule(nll: Nll, tokens_BL: jax.Array, scored_BL: jax.Array, sample_B: jax.Array, *, mask_id: int) -> jax.Array:
  """One term per row of log p(scored | rest) from left to right, in nats, float32 [B].

  Row b gives the log-probability of the `sample_B[b]`-th scored token, with this and all later ones masked; the sum
  over the scored tokens is the likelihood of autoregressive sampling.
  """
  rank_BL = jnp.where(scored_BL, jnp.cumsum(scored_BL, axis=1) - 1, -1)
  input_BL = jnp.where(rank_BL >= sample_B[:, None], mask_id, tokens_BL)
  return -jnp.sum(nll(input_BL, jnp.where(rank_BL == sample_B[:, None], tokens_BL, -1)), axis=1)
