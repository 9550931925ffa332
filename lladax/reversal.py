"""The reversal test: what was learnt in one order is asked in both (LLaDA, arXiv 2502.09992, section 3.3).

A question is a text with a gap. A mask predictor fills the gap, wherever it is. A causal model can only continue, so
it is given what is known as a prompt: forward, what precedes the gap; backward, a sentence that ends in the gap.
"""

import dataclasses
import json
import lzma
import math
from pathlib import Path
from typing import Any

import numpy as np

from lladax import facts
from lladax.llada import LLaDA


@dataclasses.dataclass(frozen=True)
class Question:
  """`before`, gap, `after`: the text; `prompt`: what a causal model continues."""

  direction: str
  before: str
  answer: str
  after: str
  prompt: str


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


def of_couplets(path: str | Path) -> list[Question]:
  """LLaDA's couplets, {"first": line, "second": line}, as they stand in a poem; the other line is the gap.

  Args:
    path: a JSON list, plain or .xz.
  """
  path = Path(path).expanduser()
  if not path.is_file():
    raise FileNotFoundError(f"evaluate.tasks: poems:{path}: no such file")
  with (lzma.open if path.suffix == ".xz" else open)(path, "rt", encoding="utf-8") as file:
    pairs = json.load(file)
  found = []
  for pair in pairs:
    first, second = pair["first"], pair["second"]
    found += [
      Question("forward", f"{first}，", second, "。", f"{first}，"),
      Question("backward", "", first, f"，{second}。", f"{second}，"),
    ]
  return found


def run(llada: LLaDA, questions: list[Question], batch_size: int = 64) -> tuple[dict[str, float], list[dict[str, Any]]]:
  """Asks all questions; a hit is the whole answer, token for token.

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
    raise ValueError("the reversal test needs a tokenizer: this model has none")
  gaps = [text.encode(q.answer) for q in questions]
  guesses: list[list[int]] = []
  for first in range(0, len(questions), batch_size):
    part, wanted = questions[first : first + batch_size], gaps[first : first + batch_size]
    longest = max(map(len, wanted))
    if llada.model.causal:
      n = longest + 1
      out = llada.sample([text.encode(q.prompt) for q in part], gen_length=n, block_length=n, steps=n)
      guesses += [row[-n:][: len(gap)].tolist() for row, gap in zip(out.tokens, wanted, strict=True)]
      continue
    heads = [text.encode(q.before) for q in part]
    rows = [
      [*head, *[llada.mask_id] * len(gap), *text.encode(q.after), llada.eos_id]
      for q, head, gap in zip(part, heads, wanted, strict=True)
    ]
    out = llada.unmask(rows, steps=longest)
    for row, padding, head, gap in zip(out.tokens, out.padding, heads, wanted, strict=True):
      begin = padding + len(head)
      guesses.append(row[begin : begin + len(gap)].tolist())
  told = []
  for q, gap, guess in zip(questions, gaps, guesses, strict=True):
    asked = f"{q.prompt}…" if llada.model.causal else f"{q.before} […]{q.after}"
    told.append({"direction": q.direction, "question": asked, "answer": q.answer.strip(),
                 "guess": text.decode(guess).strip(), "hit": guess == gap})  # fmt: skip
  metrics = {}
  for direction in dict.fromkeys(q.direction for q in questions):
    hits = np.array([x["hit"] for x in told if x["direction"] == direction])
    metrics[direction] = float(hits.mean())
    metrics[f"{direction}_stderr"] = float(math.sqrt(hits.mean() * (1 - hits.mean()) / len(hits)))
  return metrics, told
