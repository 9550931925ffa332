"""The held-out text, or replies, in bits per byte, beside a unigram model of the same tokens and `xz -9`."""

import functools
import lzma
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from lladax.config import Config
from lladax.data import sources
from lladax.devices import sharding
from lladax.inference.llada import LLaDA
from lladax.mistake import Mistake


def _nobody(doing: str) -> None:
  del doing


def bound(
  llada: LLaDA, config: Config, *, rows: int = 0, seed: int = 0, beat: Callable[[str], None] = _nobody
) -> dict[str, float]:
  """Bits per byte of the held-out documents: an upper bound for the mask predictor, exact for the baseline.

  The held-out documents, each followed by one separator (EOS for the model, a newline for the byte count and for
  xz), are cut into rows as for training, and every token is scored once. Of conversations every reply is scored, up to
  its EOS, given its prompt.

  Args:
    llada: the model.
    config: of the run.
    rows: use so many rows only (evenly spread), and leave out the yardsticks; 0: all.
    seed: of the masks.
    beat: called with what comes next, before every batch and whatever else may take long; for a watchdog.

  Returns:
    `bits_per_byte`, `perplexity` (of a token), their standard errors over rows (`bits_per_byte_stderr`,
    `perplexity_stderr`), `nats_per_token`; over all rows of text that is at hand also `unigram_bits_per_byte` (add-one
    counts of the training tokens) and `xz_bits_per_byte`.
  """
  assert llada.tokenizer is not None
  found = sources.held_out(config.data, llada.tokenizer)
  if found is None:
    raise Mistake("data.held_out=0.0: there is no held-out text to evaluate on")
  keep = np.arange(found.num_rows)
  if rows and rows < len(keep):
    keep = np.linspace(0, len(keep) - 1, rows).round().astype(int)
  tokens_RL, segment_RL, scored_RL = found.take(keep)
  nats_R = _nats(llada, config, tokens_RL, segment_RL, scored_RL, seed, beat)
  tokens = int(scored_RL.sum())
  nats, error = float(nats_R.sum()), float(nats_R.std(ddof=1) * math.sqrt(len(keep))) if len(keep) > 1 else 0.0
  per_byte = found.num_tokens / found.num_bytes / tokens / math.log(2)  # nats of these rows -> bits per byte
  perplexity = math.exp(min(nats / tokens, 700.0))  # of a broken model, too
  metrics = {
    "bits_per_byte": nats * per_byte, "bits_per_byte_stderr": error * per_byte, "perplexity": perplexity,
    "perplexity_stderr": perplexity * error / tokens, "nats_per_token": nats / tokens,
  }  # fmt: skip
  if len(keep) == found.num_rows and found.raw:
    train_T = sources.train_stream(config.data, llada.tokenizer)
    metrics |= yardsticks(train_T, tokens_RL[scored_RL], found.raw, llada.vocab_size, beat)
  return metrics


def yardsticks(
  train_T: np.ndarray, held_out_T: np.ndarray, raw: bytes, vocab_size: int, beat: Callable[[str], None] = _nobody
) -> dict[str, float]:
  """Bits per byte of `raw` under a unigram model of its tokens (add-one), and under `xz -9`."""
  beat("counting tokens")
  count_V = np.bincount(train_T, minlength=vocab_size) + 1.0
  bits = -np.log2(count_V / count_V.sum())[held_out_T].sum()
  xz, size, part = lzma.LZMACompressor(preset=9), 0, 2**22
  for first in range(0, len(raw), part):
    beat(f"compressing the held-out text, byte {first} of {len(raw)}")
    size += len(xz.compress(raw[first : first + part]))
  size += len(xz.flush())
  return {"unigram_bits_per_byte": float(bits / len(raw)), "xz_bits_per_byte": 8.0 * size / len(raw)}


def _nats(
  llada: LLaDA, config: Config, tokens_RL: np.ndarray, segment_RL: np.ndarray, scored_RL: np.ndarray, seed: int,
  beat: Callable[[str], None],
) -> np.ndarray:  # fmt: skip
  """Minus the log-likelihood (bound) of what is scored of every row, given the rest."""
  R, size = len(tokens_RL), min(config.evaluate.batch_size, len(tokens_RL))
  draws = 1 if llada.model.objective.exact else config.evaluate.num_samples
  total_R = np.zeros(R)
  for first in range(0, R, size):
    beat(f"scoring held-out row {first} of {R}")
    at = np.minimum(np.arange(first, first + size), R - 1)  # the last rows again, to fill the batch
    with sharding.on_mesh_of(llada.params):
      nats = [
        _score(
          llada.params, tokens_RL[at], segment_RL[at], scored_RL[at], at, seed, draw, model=llada.model,
          mask_id=llada.mask_id, eos_id=llada.eos_id, num_samples=draws, right_padded=not config.data.segments,
        )
        for draw in range(draws)
      ]  # fmt: skip
    n = min(size, R - first)
    total_R[first : first + n] = np.mean(jax.device_get(nats), axis=0)[:n]
  return total_R


@functools.partial(sharding.jit, static_argnames=("model", "mask_id", "eos_id", "num_samples", "right_padded"))
def _score(
  params, tokens_BL, segment_BL, scored_BL, row_B, seed, draw, *, model, mask_id, eos_id, num_samples, right_padded
):
  """Minus the log-likelihood of what is scored of rows, by draw number `draw`; [B]."""
  visible = model.visible(tokens_BL.shape[1], segment_BL, right_padded=right_padded, aligned=True)
  nll = functools.partial(model.bind(params).nll, visible=visible)
  key_B = jax.vmap(lambda row: jax.random.fold_in(jax.random.key(seed), row))(row_B)
  draw_B, draws_B = jnp.broadcast_to(draw, row_B.shape), jnp.full(row_B.shape, num_samples)
  nats_B = -model.objective.log_likelihood(
    nll, tokens_BL, scored_BL, segment_BL, key_B, draw_B, draws_B, mask_id=mask_id, eos_id=eos_id
  )
  return sharding.constrain(nats_B, ".")
