"""LLaDA: text in, text out.

The life of a prompt:

text -> ids (tokenizer) -> ids + [MASK] x gen_length -> a left-padded batch whose length is rounded up, so that
compiled programs are reused -> sampling.sample, one compiled program -> `Sampled` -> text, or a picture.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lladax import autoregressive, checkpoint, diffusion, sampling, visualize
from lladax import tokenizer as tokenizers
from lladax.mask_predictor import MaskPredictorConfig, Params
from lladax.sampling import SamplerConfig

_BUCKET = 32  # prompts and canvases are padded to a multiple of so many tokens, so that programs are reused


@dataclasses.dataclass(frozen=True, eq=False)
class Sampled:
  """What `LLaDA.sample`, `unmask`, `infill` return; in a notebook it draws its own unmasking.

  `tokens`, `unmasked_at` (the row's forward pass that committed the token, 0 = given) and `confidence` are arrays
  [B, L] over the whole canvas; `given` counts padding too: `padding` [B] positions at the left of each row are none
  of its own. `text` is what was generated, up to the first EOS, or for canvases the whole row. `nfe` is the number
  of forward passes of the batch.
  """

  text: list[str]
  tokens: np.ndarray
  unmasked_at: np.ndarray
  confidence: np.ndarray
  nfe: int
  padding: np.ndarray
  piece: Callable[[int], str]  # id -> text of one token

  def unmaskings(self) -> list[visualize.Unmasking]:
    """The rows without their padding, ready to be drawn."""
    rows = zip(self.tokens, self.unmasked_at, self.confidence, self.padding, strict=True)
    return [
      visualize.Unmasking(tuple(self.piece(int(i)) for i in tokens[n:]), at[n:], confidence[n:])
      for tokens, at, confidence, n in rows
    ]

  def html(self, title: str = "") -> str:
    """A self-contained page with a slider over the steps."""
    return visualize.html(self.unmaskings(), title)

  def _repr_html_(self) -> str:
    return self.html()


@dataclasses.dataclass(frozen=True, eq=False)
class LLaDA:
  """A mask predictor with its parameters and tokenizer (None: ids only)."""

  model: MaskPredictorConfig
  params: Params
  tokenizer: tokenizers.Tokenizer | None
  mask_id: int
  eos_id: int
  vocab_size: int  # ids in use; rows of the embedding behind it are never sampled

  def sample(self, prompts: str | Sequence[str] | Sequence[Sequence[int]], **options) -> Sampled:
    """Continues each prompt (text, or a list of ids) with `gen_length` tokens; options are those of `SamplerConfig`.

    Raises:
      TypeError: an option that does not exist.
      ValueError: an option out of range; `gen_length` that is not a multiple of `block_length`.
    """
    c = SamplerConfig(**options)
    ids = [self._ids(prompt) for prompt in _listed(prompts)]
    if self.model.causal:
      return self._continue(ids, c)
    if c.gen_length % min(c.block_length, c.gen_length):
      raise ValueError(f"sample.gen_length={c.gen_length} is not a multiple of sample.block_length={c.block_length}")
    canvases = [row + [self.mask_id] * c.gen_length for row in ids]
    return self._fill(canvases, c, prompt_length=_round_up(max(map(len, ids))))

  def unmask(self, canvases: Sequence[Sequence[int]], **options) -> Sampled:
    """Fills `mask_id` in canvases of any lengths; needs no tokenizer. Default: one block, the whole canvas."""
    if self.model.causal:
      raise ValueError("a causal model cannot fill in the middle of a canvas: use sample()")
    canvases = [list(map(int, row)) for row in canvases]
    longest = max(map(len, canvases), default=0)
    if not longest:
      raise ValueError("unmask: the canvases are empty")
    block: dict[str, Any] = {"block_length": _round_up(longest)}
    c = SamplerConfig(**block | options)
    return self._fill(canvases, c, prompt_length=None)

  def infill(self, texts: str | Sequence[str], **options) -> Sampled:
    """Fills every "[MASK]" (one token each) of the texts."""
    return self.unmask([self._text().encode_canvas(text) for text in _listed(texts)], **options)

  def log_likelihood(self, prompt, answer, *, num_samples: int = 128, guidance_scale: float = 0.0, seed: int = 0):
    """Log p(answer | prompt) in nats: Monte-Carlo over exact-count masks (P Eq. 6), exact for a causal model.

    Args:
      prompt: text or a list of ids; or a list of either, for many pairs at once.
      answer: likewise.
      num_samples: forward passes per pair; one is enough, and all that is spent, for an answer of one token.
      guidance_scale: classifier-free guidance with the prompt masked.
      seed: of the masks; the same masks for every pair of the same lengths.

    Returns:
      A float, or a list of floats.
    """
    lists = isinstance(prompt, list) and isinstance(answer, list)
    many = lists and not any(isinstance(x, int | np.integer) for x in (*prompt, *answer))  # [] is a prompt of no ids
    pairs = [
      (self._ids(p), self._ids(a)) for p, a in (zip(prompt, answer, strict=True) if many else [(prompt, answer)])
    ]
    if any(not a for _, a in pairs):
      raise ValueError("log_likelihood: an answer is empty")
    if num_samples < 1:
      raise ValueError(f"num_samples={num_samples}: must be at least 1")
    L = _round_up(max(len(p) + len(a) for p, a in pairs))
    result = []
    for p, a in pairs:
      tokens_L = np.array(p + a + [self.eos_id] * (L - len(p) - len(a)), np.int32)
      at_L = np.arange(L)
      S = 1 if len(a) == 1 or self.model.causal else num_samples
      scored_L, segment_L = (at_L >= len(p)) & (at_L < len(p) + len(a)), (at_L < len(p) + len(a)).astype(np.int32)
      rows = max(1, min(S, 8192 // L))
      draws = [
        _likelihood(
          self.params, np.tile(tokens_L, (rows, 1)), np.tile(scored_L, (rows, 1)), np.tile(segment_L, (rows, 1)),
          np.arange(first, first + rows, dtype=np.int32), seed, model=self.model, mask_id=self.mask_id,
          eos_id=self.eos_id, num_samples=S, guidance_scale=guidance_scale,
        )
        for first in range(0, S, rows)
      ]  # fmt: skip
      result.append(float(np.concatenate(draws)[:S].mean()))
    return result if many else result[0]

  def logits(self, tokens_BL, segment_BL=None) -> np.ndarray:
    """Float32 logits [B, L, V] of a canvas of ids; `segment_BL` 0 = padding."""
    segment = None if segment_BL is None else jnp.asarray(segment_BL, jnp.int32)
    return np.asarray(_logits(self.params, jnp.asarray(tokens_BL, jnp.int32), segment, model=self.model))

  def _fill(self, canvases: list[list[int]], c: SamplerConfig, prompt_length: int | None) -> Sampled:
    """`prompt_length`: padded length of the prompts, behind which the blocks begin; None: everywhere."""
    length = _round_up(max(map(len, canvases))) if prompt_length is None else prompt_length + c.gen_length
    W = min(c.block_length, length)
    length = length if prompt_length is not None else -(-length // W) * W
    tokens_BL, segment_BL = self._left_pad(canvases, length)
    canvas = _sample(
      self.params, tokens_BL, segment_BL if (segment_BL == 0).any() else None, c.seed,
      model=self.model, c=dataclasses.replace(c, seed=0), mask_id=self.mask_id, vocab_size=self.vocab_size,
      first=prompt_length or 0,
    )  # fmt: skip
    return self._sampled(canvas.tokens_BL, canvas.unmasked_at_BL, canvas.confidence_BL, canvas.nfe, segment_BL,
                         prompt_length)  # fmt: skip

  def _continue(self, ids: list[list[int]], c: SamplerConfig) -> Sampled:
    prompt_length = _round_up(max(map(len, ids)))
    length = prompt_length + c.gen_length
    canvases = [row + [self.eos_id] * c.gen_length for row in ids]
    tokens_BL, segment_BL = self._left_pad(canvases, length)
    tokens_BL, confidence_BL, nfe = _autoregressive_sample(
      self.params, tokens_BL, segment_BL, c.seed, model=self.model, temperature=c.temperature,
      prompt_length=prompt_length, eos_id=self.eos_id, mask_id=self.mask_id, vocab_size=self.vocab_size,
    )  # fmt: skip
    unmasked_at = np.maximum(np.arange(length) - prompt_length + 1, 0)
    unmasked_at_BL = np.broadcast_to(unmasked_at, tokens_BL.shape)
    return self._sampled(tokens_BL, unmasked_at_BL, confidence_BL, nfe, segment_BL, prompt_length)

  def _left_pad(self, rows: list[list[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, segment) [B, length]: right ends line up; segment 0 = padding, 1 = the row."""
    if length > self.model.max_length:
      raise ValueError(f"a canvas of {length} tokens is longer than model.max_length={self.model.max_length}")
    tokens = np.full((len(rows), length), self.eos_id, np.int32)
    segment = np.zeros((len(rows), length), np.int32)
    for i, row in enumerate(rows):
      if row:
        tokens[i, -len(row) :], segment[i, -len(row) :] = row, 1
    return tokens, segment

  def _sampled(self, tokens_BL, unmasked_at_BL, confidence_BL, nfe, segment_BL, prompt_length) -> Sampled:
    tokens = np.asarray(tokens_BL)
    text = []
    for row, segment in zip(tokens, segment_BL, strict=True):
      row = row[prompt_length:] if prompt_length is not None else row[segment > 0]
      ends = np.flatnonzero(row == self.eos_id)
      row = row[: ends[0]] if prompt_length is not None and len(ends) else row
      text.append(self.tokenizer.decode(row.tolist()) if self.tokenizer else "")
    return Sampled(
      text=text, tokens=tokens, unmasked_at=np.asarray(unmasked_at_BL), confidence=np.asarray(confidence_BL),
      nfe=int(nfe), padding=(segment_BL == 0).sum(axis=1),
      piece=self._piece,
    )  # fmt: skip

  def _piece(self, i: int) -> str:
    """A token as it is drawn: EOS as ⏎, ids where there is no tokenizer."""
    if i == self.eos_id:
      return "⏎"
    return self.tokenizer.piece(i) if self.tokenizer else f"{i} "

  def _text(self) -> tokenizers.Tokenizer:
    if self.tokenizer is None:
      raise ValueError("this model has no tokenizer: use unmask(), and lists of ids")
    return self.tokenizer

  def _ids(self, text: str | Sequence[int]) -> list[int]:
    return self._text().encode(text) if isinstance(text, str) else list(map(int, text))


def load(path: str | Path, step: int | None = None) -> LLaDA:
  """Loads a run's last checkpoint (or that of `step`) with its tokenizer.

  Args:
    path: a workdir, or a checkpoint folder WORKDIR/checkpoints/STEP.
    step: of a checkpoint; None takes the newest readable one.

  Raises:
    FileNotFoundError: there is no run, or no checkpoint.
    ValueError: the vocabulary and the checkpoint disagree, or nothing can be read.
  """
  workdir = Path(path).expanduser()
  if workdir.name.isdecimal() and workdir.parent.name == "checkpoints":
    workdir, step = workdir.parent.parent, int(workdir.name)
  if not (workdir / "config.json").is_file():
    raise FileNotFoundError(f"{workdir} is not a workdir of lladax: there is no config.json in it")
  text = tokenizers.load(workdir / "tokenizer")
  saved = json.loads((workdir / "config.json").read_text())
  model = MaskPredictorConfig(**saved["model"])
  check_vocabulary(model, text)
  if text.fingerprint != saved["tokenizer_fingerprint"]:
    raise ValueError(f"{workdir / 'tokenizer'} holds another tokenizer than the one this model was trained with")
  available = checkpoint.steps(workdir)
  if not available or (step is not None and step not in available):
    wanted = "no checkpoint" if step is None else f"no checkpoint of step {step}"
    raise FileNotFoundError(f"{workdir} has {wanted} (there are: {available or 'none'}); train it first")
  here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  abstract = {"params": jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes)}
  if step is not None:
    tree = checkpoint.restore(workdir, step, abstract)
  else:
    found = checkpoint.restore_latest(workdir, abstract, set_aside=False)
    assert found is not None
    tree = found[1]
  return LLaDA(model, tree["params"], text, text.mask_id, text.eos_id, text.vocab_size)


def check_vocabulary(model: MaskPredictorConfig, text: tokenizers.Tokenizer) -> None:
  """Raises ValueError if the tokenizer has ids that the embedding lacks."""
  if text.vocab_size > model.V:
    raise ValueError(
      f"model.V={model.V} is smaller than the tokenizer's vocabulary of {text.vocab_size} ids:"
      f" this tokenizer does not belong to this model; it needs V={text.rows}"
    )


def _listed(x: str | Sequence) -> list:
  rows = [x] if isinstance(x, str) else list(x)
  if not rows:
    raise ValueError("there is nothing to sample: the list of prompts is empty")
  return rows


def _round_up(n: int) -> int:
  return -(-n // _BUCKET) * _BUCKET


def _positions(segment_BL: jax.Array) -> jax.Array:
  """Positions counted from each row's own first token, so that padding turns no key."""
  return jnp.maximum(jnp.cumsum(segment_BL > 0, axis=1) - 1, 0)


def _allowed(rows: int, mask_id: int, vocab_size: int) -> jax.Array:
  """Bool [V]: the ids that may be generated; not [MASK], nor rows of the embedding that are no token."""
  id_V = jnp.arange(rows)
  return (id_V != mask_id) & (id_V < vocab_size)


def _keys(seed: jax.Array, rows: int) -> jax.Array:
  return jax.vmap(lambda row: jax.random.fold_in(jax.random.key(seed), row))(jnp.arange(rows))


@functools.partial(jax.jit, static_argnames=("model", "c", "mask_id", "vocab_size", "first"))
def _sample(params, tokens_BL, segment_BL, seed, *, model, c, mask_id, vocab_size, first) -> sampling.Canvas:
  """`segment_BL` None: no row is padded, and attention needs no mask."""
  bound, B = model.bind(params), tokens_BL.shape[0]
  where = () if segment_BL is None else (segment_BL, _positions(segment_BL))
  given_BL = tokens_BL != mask_id

  def predict(canvas_BL, start, W):
    at = where
    if c.guidance_scale:  # the second half of the batch sees what is given masked
      canvas_BL = jnp.concatenate([canvas_BL, jnp.where(given_BL, mask_id, canvas_BL)])
      at = tuple(jnp.tile(x, (2, 1)) for x in where)
    hidden_BLD, _ = bound.hidden(canvas_BL, *at)
    logits = bound.logits(jax.lax.dynamic_slice_in_dim(hidden_BLD, start, W, axis=1))
    if c.guidance_scale:
      logits = logits[B:] + (c.guidance_scale + 1) * (logits[:B] - logits[B:])
    return logits

  allowed_V = _allowed(model.V, mask_id, vocab_size)
  return sampling.sample(predict, tokens_BL, _keys(seed, B), c, mask_id=mask_id, allowed_V=allowed_V, first=first)


@functools.partial(
  jax.jit, static_argnames=("model", "temperature", "prompt_length", "eos_id", "mask_id", "vocab_size")
)
def _autoregressive_sample(
  params, tokens_BL, segment_BL, seed, *, model, temperature, prompt_length, eos_id, mask_id, vocab_size
):
  bound, (B, L) = model.bind(params), tokens_BL.shape
  position_BL = _positions(segment_BL)
  allowed_V = _allowed(model.V, mask_id, vocab_size)

  def step(tokens_BW, cache, start):
    hidden_BWD, cache = bound.hidden(tokens_BW, segment_BL, position_BL, cache, start)
    return jnp.where(allowed_V[None, :], bound.logits(hidden_BWD[:, -1]), -jnp.inf), cache

  return autoregressive.sample(
    step, bound.new_cache(B, L), tokens_BL, segment_BL, _keys(seed, B),
    prompt_length=prompt_length, start_id=eos_id, eos_id=eos_id, temperature=temperature,
  )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("model", "mask_id", "eos_id", "num_samples", "guidance_scale"))
def _likelihood(
  params, tokens_BL, scored_BL, segment_BL, sample_B, seed, *, model, mask_id, eos_id, num_samples, guidance_scale=0.0
):
  bound = model.bind(params)

  def nll(input_BL, target_BL):
    if not guidance_scale:
      return bound.nll(input_BL, target_BL, segment_BL)
    unconditional_BL = jnp.where(scored_BL | (segment_BL == 0), input_BL, mask_id)
    cond, un = bound(input_BL, segment_BL), bound(unconditional_BL, segment_BL)
    log_p = jax.nn.log_softmax(un + (guidance_scale + 1) * (cond - un))
    picked_BL = jnp.take_along_axis(log_p, jnp.maximum(target_BL, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(target_BL < 0, 0.0, -picked_BL)

  if model.causal:
    return autoregressive.log_likelihood(nll, tokens_BL, scored_BL, segment_BL, start_id=eos_id)
  key_B = jnp.broadcast_to(jax.random.key(seed), tokens_BL.shape[:1])  # every pair meets the same masks
  return diffusion.log_likelihood(nll, tokens_BL, scored_BL, key_B, sample_B, mask_id=mask_id, num_samples=num_samples)


@functools.partial(jax.jit, static_argnames="model")
def _logits(params, tokens_BL, segment_BL, *, model):
  return model.bind(params)(tokens_BL, segment_BL)
