"""LLaDA: text in, text out.

The life of a prompt: text -> ids (tokenizer) -> the engine, which fills a canvas -> the ids behind the prompt, up to
the first that ends a text -> text (`Sampled`), or a picture of how it was unmasked.
"""

import dataclasses
import functools
import math
import numbers
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from lladax import fields
from lladax.data import tokenizer as tokenizers
from lladax.drawing import animation, unmasking
from lladax.inference.engine import Engine, Filled, Job, bucket
from lladax.mistake import Mistake
from lladax.model.mask_predictor import MaskPredictorConfig, Params
from lladax.sampling import SamplerConfig

# A prompt: text, ids, or the messages of a conversation, which the chat template makes into ids.
Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]


@dataclasses.dataclass(frozen=True, eq=False)
class Sampled:
  """What `LLaDA.sample`, `unmask`, `infill` return; in a notebook it draws its own unmasking.

  `tokens`, `unmasked_at` (the row's forward pass that committed the token, 0 = given) and `confidence` are arrays
  [B, L] over the whole canvas; `given` counts padding too: `padding` [B] positions at the left of each row are none
  of its own. `text` is what was generated, up to the first EOS, as it stands behind its prompt, or for canvases the
  whole row. `nfe` is the number of forward passes of the batch.
  """

  text: list[str]
  tokens: np.ndarray = dataclasses.field(repr=False)
  unmasked_at: np.ndarray = dataclasses.field(repr=False)
  confidence: np.ndarray = dataclasses.field(repr=False)
  nfe: int
  padding: np.ndarray = dataclasses.field(repr=False)
  piece: Callable[[int], str] = dataclasses.field(repr=False)  # id -> text of one token
  mask_id: int  # what masked positions hold in a canvas that `LLaDA.stream` has not finished
  edited_at: np.ndarray | None = dataclasses.field(default=None, repr=False)  # [B, L]: the pass of the last edit, or 0

  def unmaskings(self) -> list[unmasking.Unmasking]:
    """The rows without their padding, ready to be drawn."""
    unmasked_at = np.where(self.tokens == self.mask_id, self.nfe + 1, self.unmasked_at)  # not yet
    edited_at = [None] * len(self.tokens) if self.edited_at is None else self.edited_at
    rows = zip(self.tokens, unmasked_at, self.confidence, self.padding, edited_at, strict=True)
    return [
      unmasking.Unmasking(
        tuple(self.piece(int(i)) for i in tokens[n:]), at[n:], confidence[n:],
        edited_at=None if edited is None else edited[n:],
      )
      for tokens, at, confidence, n, edited in rows
    ]  # fmt: skip

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
  # Options that `sample`, `stream`, `chat`, `unmask` and `infill` take where a call does not say: those of the authors
  # of a published model. What does not go with what a call says is left out.
  defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)

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
      **options: those of `SamplerConfig`; what is not said is as in `defaults`. With one `seed` each row has the noise
        of its number; with a list, a seed a row, it has that of the first row under its own seed: what
        `sample([prompt], seed=s)` gives, `s` gives anywhere.

    Raises:
      Unknown: an option that does not exist (a TypeError, too).
      Mistake: an option of another type, or out of range, or that a causal model has no use for; `gen_length` that is
        not a multiple of `block_length`; ids that are not in the vocabulary, or [MASK]; a canvas longer than the model.
    """
    if isinstance(until, str) or not isinstance(until, Collection) or not all(isinstance(x, str) and x for x in until):
      raise Mistake(f"until={until!r}: give a list of strings, none of them empty")
    if until:
      self.reader()
    job = self._job(prompts, options)
    for filled in self.engine.run(job, "block" if until else "canvas"):
      if until and all(self._has_ended(filled, i, until) for i in range(len(job.tokens_BL))):
        break
    out = self._sampled(filled, self.ends)
    return dataclasses.replace(out, text=[cut(text, until) for text in out.text])

  def stream(self, prompts: Prompt | Sequence[Prompt], *, every: str = "block", **options) -> Iterator[Sampled]:
    """`sample`, seen on its way: the canvas after each block, or each step; the last one is what `sample` returns.

    Positions still masked hold `mask_id`. The program is the one that `sample` runs.
    """
    if every not in ("block", "step"):
      raise Mistake(f"every={every!r}: use block or step")
    if not self.model.objective.fills:
      raise Mistake("a causal model is not streamed: use sample()")
    return (self._sampled(filled, self.ends) for filled in self.engine.run(self._job(prompts, options), every))

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
    whole = {} if self.model.block else {"block_length": bucket(max(map(len, rows)))}
    masks = max(row.count(self.mask_id) for row in rows)
    c = self.settings(whole | options, canvas=masks)
    (filled,) = self.engine.run(self.engine.fill(rows, c))
    return self._sampled(filled, ())

  def infill(self, texts: str | Sequence[str], **options) -> Sampled:
    """Fills every "[MASK]" (one token each) of the texts."""
    texts = fields.typed([texts] if isinstance(texts, str) else texts, tuple[str, ...], "texts")
    return self.unmask([self.reader().encode_canvas(text) for text in texts], **options)

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
    fills = self.model.objective.fills
    for i, (p, a) in enumerate(pairs):
      self.engine.check_ids(p, f"prompts[{i}]", masks=fills)
      self.engine.check_ids(a, f"answers[{i}]")
      self.engine.check_length(len(p) + len(a), f"pair {i}")
    num_samples = fields.typed(num_samples, int, "num_samples")
    guidance_scale = fields.typed(guidance_scale, float, "guidance_scale")
    seed = fields.typed(seed, int, "seed")
    fields.check_seed(seed, "seed")
    if num_samples < 1:
      raise Mistake(f"num_samples={num_samples}: must be at least 1")
    if not 0 <= guidance_scale < math.inf or (guidance_scale and not fills):
      what = "must be at least 0, and finite" if fills else "a causal model has no use for it; leave it out"
      raise Mistake(f"guidance_scale={guidance_scale}: {what}")
    if method not in ("monte_carlo", "chain_rule"):
      raise Mistake(f"method={method!r}: use monte_carlo or chain_rule")
    options = {"num_samples": num_samples, "guidance_scale": guidance_scale, "seed": seed, "method": method}
    found = self.engine.log_likelihood(pairs, **options).tolist()
    return found if many else found[0]

  def logits(self, tokens_BL, segment_BL=None) -> np.ndarray:
    """Float32 logits [B, L, V] of canvases of ids of one length; `segment_BL` 0 = padding.

    At i stands what is predicted for token i, also where a model shifts; of a causal one given the tokens before it.
    """
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
    return self.engine.logits(tokens, segment)

  @functools.cached_property
  def engine(self) -> Engine:
    """What runs it, on ids alone."""
    return Engine(self.model, self.params, self.mask_id, self.ends, self.vocab_size)

  def _job(self, prompts: Prompt | Sequence[Prompt], options: Mapping[str, Any]) -> Job:
    """Prompts that are to be continued, as ids, by the options of a call."""
    rows = [self._ids(prompt, f"prompts[{i}]") for i, prompt in enumerate(_many(prompts, "prompts"))]
    if not rows:
      raise Mistake("there is nothing to sample: the list of prompts is empty")
    for i, row in enumerate(rows):
      self.engine.check_ids(row, f"prompts[{i}]")
    return self.engine.extend(rows, self.settings(options))

  def settings(self, options: Mapping[str, Any], canvas: int | None = None) -> SamplerConfig:
    """A call's options, and the model's `defaults` where it says nothing; `canvas`: the length of one that is given."""
    left = {name: x for name, x in self.defaults.items() if name not in options}
    for one, others in _INSTEAD.items():  # of what is said
      if options.get(one) is not None:
        left = {name: x for name, x in left.items() if name not in others}
    length = canvas if canvas is not None else options.get("gen_length", self.defaults.get("gen_length"))
    if "gen_length" in self.defaults and isinstance(length, int) and length != self.defaults["gen_length"]:
      for name in left.keys() & {"steps", "block_length"}:  # those of a whole canvas are those of this one
        if left[name] == self.defaults["gen_length"]:
          left[name] = max(length, 1)
      if length % left.get("block_length", 1):
        left.pop("block_length")
    if options.get("cache") == "dual":
      left.pop("edit_threshold", None)
    if canvas is not None:
      left.pop("gen_length", None)
    return fields.parse(left | dict(options), SamplerConfig, "sample")

  def _canvases(self, canvases: Any, name: str) -> list[list[int]]:
    rows = [_row(row, f"{name}[{i}]") for i, row in enumerate(_many(canvases, name))]
    for i, row in enumerate(rows):
      self.engine.check_ids(row, f"{name}[{i}]", masks=True)
    if not rows or [] in rows:
      raise Mistake(f"{name}[{rows.index([])}] is empty" if rows else f"{name}: the canvases are empty")
    self.engine.check_length(max(map(len, rows)))
    return rows

  def _has_ended(self, filled: Filled, i: int, until: Sequence[str]) -> bool:
    """Whether a row has met EOS or a stop string; its text on the way would spell [MASK]s, too."""
    tokens_L, at_L = filled.canvas.tokens_BL[i], filled.canvas.unmasked_at_BL[i]
    given, ids = tokens_L[filled.padding_B[i] : filled.first], tokens_L[at_L > 0]  # of the blocks that are filled
    said = self.reader().decode(ids.tolist(), behind=given.tolist())
    return bool(np.isin(ids, self.ends).any()) or cut(said, until) != said

  def _sampled(self, filled: Filled, ends: tuple[int, ...]) -> Sampled:
    """The text is what stands behind the prompt, up to the first of the `ends`."""
    text, (canvas, padding_B, first) = [], filled
    for row, padding in zip(canvas.tokens_BL, padding_B, strict=True):
      given, row = row[padding:first], row[max(first, padding) :]
      row = row[: int(np.argmax(np.append(np.isin(row, ends), True)))]
      text.append(self.tokenizer.decode(row.tolist(), behind=given.tolist()) if self.tokenizer else "")
    return Sampled(
      text=text, tokens=canvas.tokens_BL, unmasked_at=canvas.unmasked_at_BL, confidence=canvas.confidence_BL,
      nfe=int(canvas.nfe), padding=padding_B, piece=self._piece, mask_id=self.mask_id,
      edited_at=canvas.edited_at_BL,
    )  # fmt: skip

  def _piece(self, i: int) -> str:
    """A token as it is drawn: EOS as ⏎, ids where there is no tokenizer."""
    if i == self.eos_id:
      return "⏎"
    return self.tokenizer.piece(i) if self.tokenizer else f"{i} "

  def reader(self) -> tokenizers.Tokenizer:
    """The tokenizer; raises Mistake where there is none."""
    if self.tokenizer is None:
      raise Mistake("this model has no tokenizer: use unmask(), and lists of ids")
    return self.tokenizer

  def _pair(self, prompt: Prompt, answer: Prompt) -> tuple[list[int], list[int]]:
    if isinstance(prompt, str) and isinstance(answer, str):
      return self.reader().pair(prompt, answer)
    ids = self._ids(prompt)
    return ids, self.reader().behind(ids, answer) if isinstance(answer, str) else self._ids(answer)

  def _ids(self, prompt: Prompt, where: str = "ids") -> list[int]:
    if isinstance(prompt, str):
      return self.reader().encode(prompt)
    if isinstance(prompt, Sequence) and len(prompt) and isinstance(prompt[0], Mapping):
      return self.reader().chat(cast(Sequence[Mapping[str, str]], prompt))
    return _row(prompt, where)


# What a call says, and the defaults that it says something else than.
_INSTEAD = {
  "factor": ("threshold",), "threshold": ("factor",), "steps": ("block_steps", "tokens_per_step"),
  "block_steps": ("tokens_per_step",), "tokens_per_step": ("block_steps", "eps"), "eps": ("tokens_per_step",),
  "logits_eos_inf": ("early_stop",),
}  # fmt: skip


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
