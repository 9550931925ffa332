"""The baseline: a causal language model with the verbs of diffusion.py, on the same batches.

The shift by one lives here: the model reads [start, x_0, .., x_L-2] and is asked for [x_0, .., x_L-1], so every
token of every document is scored, the first one too. Letters: `mask_predictor.py`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lladax.mistake import Mistake
from lladax.sampling import SamplerConfig

Nll = Callable[[jax.Array, jax.Array], jax.Array]
WeightedNll = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]  # see `diffusion`, both


def shift(tokens_BL: jax.Array, segment_BL: jax.Array, start_id: int) -> jax.Array:
  """What the model reads: each document moved right by one, beginning with `start_id`."""
  first_B1 = jnp.full_like(tokens_BL[:, :1], start_id)
  previous_BL = jnp.concatenate([first_B1, tokens_BL[:, :-1]], axis=1)
  begins_BL = segment_BL[:, 1:] != segment_BL[:, :-1]
  return previous_BL.at[:, 1:].set(jnp.where(begins_BL, start_id, previous_BL[:, 1:]))


@dataclasses.dataclass(frozen=True)
class Causal:
  """Next-token prediction as an objective, with the verbs of `diffusion.Masked`."""

  name: ClassVar = "autoregressive"
  order: ClassVar = "causal"
  fills: ClassVar = False
  exact: ClassVar = True

  def targets_per_pair(self, length: int) -> None:
    """All tokens are asked for."""

  def check_sampler(self, c: SamplerConfig) -> None:
    """Raises Mistake for what a causal model cannot do: it draws one token after another, each by a pass of its own.

    Which candidates wait, and for which block, has no meaning there (`remasking`, `block_length`), nor has
    `early_stop`, since a row always ends at its EOS.
    """
    if c.gen_length is None:
      raise Mistake("sample.gen_length=None: a causal model stops at EOS by itself; give the longest answer to allow")
    for name in (
      "threshold", "factor", "edit_threshold", "guidance_scale", "cache", "confidence_eos_eot_inf", "block_steps",
      "tokens_per_step", "eps",
    ):  # fmt: skip
      if getattr(c, name) != getattr(SamplerConfig, name):
        raise Mistake(f"sample.{name}={getattr(c, name)!r}: a causal model has no use for it; leave it out")
    if c.steps < c.gen_length and c.steps != SamplerConfig.steps:
      raise Mistake(f"sample.steps={c.steps}: a causal model makes a pass for each of gen_length={c.gen_length} tokens")

  def loss(
    self, weighted_nll: WeightedNll, batch: dict[str, jax.Array], rng: Any = None, *, eos_id: int, **_: Any
  ) -> tuple[jax.Array, dict[str, tuple[jax.Array, jax.Array]]]:
    """Next-token cross-entropy with the weights of the batch.

    Args:
      weighted_nll: a causal model.
      batch: columns tokens, weight, segment [B, L], as for the diffusion loss; `clean`, where there is one, is read.
      rng: not read: there is no noise.
      eos_id: what stands before the first token of a document.
      **_: what other objectives need.

    Returns:
      (loss in nats per token, metrics as those of `Masked.loss`: none).
    """
    weight_BL = batch["weight"]
    input_BL = shift(batch.get("clean", batch["tokens"]), batch["segment"], eos_id)
    return weighted_nll(input_BL, jnp.where(weight_BL > 0, batch["tokens"], -1), weight_BL)[0], {}

  def log_likelihood(
    self, nll: Nll, tokens_BL: jax.Array, scored_BL: jax.Array, segment_BL: jax.Array, *draws: Any, eos_id: int,
    **_: Any,
  ) -> jax.Array:  # fmt: skip
    """Exact log p(scored | what precedes it) of every row in nats, float32 [B]; of any of `draws`."""
    input_BL = shift(tokens_BL, segment_BL, eos_id)
    return -jnp.sum(nll(input_BL, jnp.where(scored_BL, tokens_BL, -1)), axis=1)


def sample(
  step: Callable[[jax.Array, Any, jax.Array | int], tuple[jax.Array, Any]],
  draw: Callable[[jax.Array, Callable[[], jax.Array]], jax.Array], cache: Any, canvas_BL: jax.Array,
  segment_BL: jax.Array, rng_B: jax.Array, *, prompt_length: int, start_id: int, eos_id: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
  """Fills the canvas left to right, one token a step, with a KV cache; stops when every row has ended.

  Args:
    step: (tokens_BW, cache, start) -> (logits_BV of the last of them, cache); tokens are the shifted ones.
    draw: (logits_BV, noise) -> token_B; `noise()` gives a key for each row.
    cache: an empty cache of the canvas.
    canvas_BL: left-padded prompts, then room for the answers.
    segment_BL: 0 on the padding, 1 elsewhere.
    rng_B: a key per row.
    prompt_length: length of the padded prompts (static).
    start_id: what the model reads before the first token of a row.
    eos_id: ends a row; what follows is filled with it.

  Returns:
    (canvas_BL, confidence_BL of the tokens drawn (0 elsewhere), number of forward passes).
  """
  L = canvas_BL.shape[1]
  shifted_BL = shift(canvas_BL, segment_BL, start_id)

  def unfinished(carry):
    return (carry["i"] < L) & ~jnp.all(carry["ended_B"])

  def advance(carry):
    i, logits_BV = carry["i"], carry["logits_BV"]
    token_B = draw(logits_BV, lambda: jax.vmap(lambda key: jax.random.fold_in(key, i - prompt_length))(rng_B))
    confidence_B = jnp.take_along_axis(jax.nn.softmax(logits_BV), token_B[:, None], axis=-1)[:, 0]
    token_B = jnp.where(carry["ended_B"], eos_id, token_B)
    confidence_B = jnp.where(carry["ended_B"], 1.0, confidence_B)
    logits_BV, cache = step(token_B[:, None], carry["cache"], jnp.minimum(i + 1, L - 1))
    return {
      "i": i + 1, "canvas_BL": carry["canvas_BL"].at[:, i].set(token_B),
      "confidence_BL": carry["confidence_BL"].at[:, i].set(confidence_B),
      "ended_B": carry["ended_B"] | (token_B == eos_id), "logits_BV": logits_BV, "cache": cache,
    }  # fmt: skip

  logits_BV, cache = step(shifted_BL[:, : prompt_length + 1], cache, 0)
  carry = {
    "i": jnp.int32(prompt_length), "canvas_BL": canvas_BL.at[:, prompt_length:].set(eos_id),
    "confidence_BL": jnp.zeros(canvas_BL.shape), "ended_B": jnp.zeros(canvas_BL.shape[:1], bool),
    "logits_BV": logits_BV, "cache": cache,
  }  # fmt: skip
  carry = jax.lax.while_loop(unfinished, advance, carry)
  return carry["canvas_BL"], carry["confidence_BL"], carry["i"] - prompt_length + 1
