"""The reversal test: what was learnt in one order is asked in both (LLaDA, arXiv 2502.09992, section 3.3).

A question is a text with a gap. A mask predictor fills the gap, wherever it is. A causal model can only continue, so
it is given what is known as a prompt: forward, what precedes the gap; backward, a sentence that ends in the gap. A
model that was trained on conversations is asked in one, as published.
"""

import dataclasses
import json
import lzma
import math
from pathlib import Path
from typing import Any

import numpy as np

from lladax.data import facts
from lladax.data.tokenizer import Tokenizer
from lladax.inference.llada import LLaDA
from lladax.mistake import Missing, Mistake
from lladax.model.mask_predictor import MaskPredictorConfig

# How LLaDA-8B-Instruct is asked: the published lengths.
_REPLY = {"gen_length": 28, "block_length": 28, "steps": 28, "logits_eos_inf": True}


_LONGEST = 2**26  # characters of a file of couplets


@dataclasses.dataclass(frozen=True)
class Question:
  """`before`, gap, `after`: the text; `prompt`: what a causal model continues, or a model that `talks` is asked."""

  direction: str
  before: str
  answer: str
  after: str
  prompt: str
  talks: bool = False


def of_facts() -> list[Question]:
  """The facts that were told forward only, asked forward, backward, and backward in the other sentence."""
  found = []
  for fact in facts.facts():
    if fact.taught:
      continue
    start, _, rest = fact.forward.partition(f" {fact.a}")
    middle = rest.removesuffix(f" {fact.b}.")
    known = fact.forward.removesuffix(f" {fact.b}.")
    other = fact.backward.removesuffix(f" {fact.a}.")
    found += [
      Question("forward", known, f" {fact.b}", ".", known),
      Question("backward", start, f" {fact.a}", f"{middle} {fact.b}.", other),
      Question("backward, other sentence", other, f" {fact.a}", ".", other),
    ]
  return found


def of_couplets(path: str | Path, talks: bool = False) -> list[Question]:
  """LLaDA's couplets, {"first": line, "second": line}, as they stand in a poem; the other line is the gap.

  Args:
    path: a JSON list, plain or .xz.
    talks: ask in a conversation for the line after or before, in the published words.
  """
  path = Path(path).expanduser()
  if not path.is_file():
    raise Missing(f"evaluate.tasks: poems:{path}: no such file")
  try:
    with (lzma.open if path.suffix == ".xz" else open)(path, "rt", encoding="utf-8") as file:
      text = file.read(_LONGEST + 1)
    if len(text) > _LONGEST:
      raise ValueError(f"it holds more than {_LONGEST:,} characters")
    pairs = [(str(pair["first"]), str(pair["second"])) for pair in json.loads(text)]
    if not all(map(all, pairs)) or not pairs:
      raise ValueError("a line is empty" if pairs else "it is empty")
  except (ValueError, TypeError, KeyError, EOFError, RecursionError, lzma.LZMAError) as error:
    wanted, why = '{"first": line, "second": line}', f"{type(error).__name__}: {error}"[:200]
    raise Mistake(f"evaluate.tasks: poems:{path} is no JSON list of {wanted} ({why})") from None
  found = []
  for first, second in pairs:
    if talks:
      ask = "{}的{}一句是什么？ 直接输出句子即可。".format
      found += [
        Question("forward", "", second, "", ask(first, "下"), talks=True),
        Question("backward", "", first, "", ask(second, "上"), talks=True),
      ]
      continue
    found += [
      Question("forward", f"{first}，", second, "。", f"{first}，"),
      Question("backward", "", first, f"，{second}。", f"{second}，"),
    ]
  return found


def check(name: str, questions: list[Question], text: Tokenizer, model: MaskPredictorConfig) -> None:
  """Raises Mistake if one of the questions does not fit the model."""
  longest = 1 + max(len(text.encode(q.answer)) for q in questions)
  for q in questions:
    if q.talks:
      n = len(text.chat([{"role": "user", "content": q.prompt}])) + _REPLY["gen_length"]
    elif model.objective.fills:
      n = sum(len(text.encode(x)) for x in (q.before, q.answer, q.after)) + 1
    else:
      n = len(text.encode(q.prompt)) + longest
    if n > model.max_length:
      most = f"model.max_length={model.max_length}"
      raise Mistake(f"evaluate.tasks: {name}: a question and its answer take {n} tokens, more than {most}")


def run(llada: LLaDA, questions: list[Question], batch_size: int = 64) -> tuple[dict[str, float], list[dict[str, Any]]]:
  """Asks all questions; a hit is the whole answer, token for token (in a conversation: the reply holds it).

  Args:
    llada: the model; a mask predictor is told the number of tokens of the gap.
    questions: see `of_facts`, `of_couplets`.
    batch_size: rows of a forward pass.

  Returns:
    ({direction: fraction of hits, direction + "_stderr": its standard error}, [{"direction", "question", "answer",
    "guess", "hit"}, ...]).
  """
  text = llada.tokenizer
  if text is None:
    raise Mistake("the reversal test needs a tokenizer: this model has none")
  told: list[dict[str, Any]] = []
  fills = llada.model.objective.fills
  for first in range(0, len(questions), batch_size):
    part = questions[first : first + batch_size]
    ask = _reply if part[0].talks else _fill if fills else _continue
    gaps = [text.behind(text.encode(q.before if fills else q.prompt), q.answer) for q in part]
    for q, gap, guess in zip(part, gaps, ask(llada, part, gaps), strict=True):
      asked = q.prompt if q.talks else f"{q.before} […]{q.after}" if fills else f"{q.prompt}…"
      said = guess if isinstance(guess, str) else text.decode(guess).strip()
      told.append({"direction": q.direction, "question": asked, "answer": q.answer.strip(), "guess": said,
                   "hit": q.answer in said if q.talks else guess == gap})  # fmt: skip
  metrics = {}
  for direction in dict.fromkeys(q.direction for q in questions):
    hits = np.array([x["hit"] for x in told if x["direction"] == direction])
    metrics[direction] = float(hits.mean())
    metrics[f"{direction}_stderr"] = float(math.sqrt(hits.mean() * (1 - hits.mean()) / len(hits)))
  return metrics, told


def _fill(llada: LLaDA, questions: list[Question], gaps: list[list[int]]) -> list[list[int]]:
  """What a mask predictor puts into the gaps, whose numbers of tokens it is told."""
  assert llada.tokenizer is not None
  encode = llada.tokenizer.encode
  heads = [encode(q.before) for q in questions]
  rows = [
    [*head, *[llada.mask_id] * len(gap), *encode(q.after, begins=False), llada.eos_id]
    for q, head, gap in zip(questions, heads, gaps, strict=True)
  ]
  out = llada.unmask(rows, steps=max(map(len, gaps)))
  begins = [padding + len(head) for padding, head in zip(out.padding, heads, strict=True)]
  return [row[b : b + len(gap)].tolist() for row, b, gap in zip(out.tokens, begins, gaps, strict=True)]


def _continue(llada: LLaDA, questions: list[Question], gaps: list[list[int]]) -> list[list[int]]:
  """What a causal model continues the prompts with."""
  assert llada.tokenizer is not None
  n = max(map(len, gaps)) + 1
  out = llada.sample([llada.tokenizer.encode(q.prompt) for q in questions], gen_length=n, block_length=n, steps=n)
  return [row[-n:][: len(gap)].tolist() for row, gap in zip(out.tokens, gaps, strict=True)]


def _reply(llada: LLaDA, questions: list[Question], gaps: list[list[int]]) -> list[str]:
  """What a model replies."""
  del gaps
  options: dict[str, Any] = _REPLY | ({"block_length": llada.model.block} if llada.model.block else {})
  return llada.sample([[{"role": "user", "content": q.prompt}] for q in questions], **options).text
