"""What the task files need: rows of local benchmarks, and the scoring of generated code and mathematics.

A file NAME is DIR/NAME.jsonl or DIR/NAME.json (a list), plain or .xz, where DIR is `data_dir` or the variable
LLADAX_EVAL_DATA. The harness loads this module by its path.
"""

import functools
import json
import lzma
import os
import pathlib
import re

import datasets
from lm_eval.api.samplers import ContextSampler

from lladax.data import reading
from lladax.evaluation import sandbox
from lladax.mistake import Mistake


def _read(folder, name):
  for kind in (".jsonl", ".jsonl.xz", ".json", ".json.xz"):
    path = pathlib.Path(folder).expanduser() / f"{name}{kind}"
    if folder and path.is_file():
      return _parse(path, path.stat().st_size, path.stat().st_mtime_ns)
  raise Mistake(
    f"data_dir={folder!r}: there is no {name}.jsonl (or .json, or .xz of them) in it; give the folder of the benchmarks"
    " as data_dir, or in LLADAX_EVAL_DATA"
  )


@functools.lru_cache(maxsize=64)
def _parse(path, *_):
  """The rows of a file; of one that was edited, anew."""
  try:
    with (lzma.open if path.suffix == ".xz" else open)(path, "rt", encoding="utf-8") as file:
      text = str(file.read(reading.LONGEST_LINE + 1))
    if len(text) > reading.LONGEST_LINE:
      raise ValueError(f"it holds more than {reading.LONGEST_LINE:,} characters")
    lines = ".jsonl" in path.suffixes
    found = [json.loads(line) for line in text.split("\n") if line.strip()] if lines else json.loads(text)
  except (ValueError, OSError, EOFError, RecursionError, lzma.LZMAError) as error:
    raise Mistake(f"{path} cannot be read: {error}") from None
  if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
    raise Mistake(f"{path}: must hold questions that are objects of JSON, one a line, or a list of them")
  return found


def rows(name, data_dir="", where=None):
  """The rows of a file whose fields are as in `where`."""
  found = _read(str(data_dir or os.environ.get("LLADAX_EVAL_DATA", "")), name)
  kept = [dict(row) for row in found if all(row.get(key) == value for key, value in (where or {}).items())]
  if not kept:
    raise Mistake(f"data_dir={str(data_dir)!r}: there are no questions in {name}" + f" with {where}" * bool(where))
  return kept


def _of_files(load):
  """A loader that says it of the files where their rows are not what it takes apart."""

  @functools.wraps(load)
  def named(*, test, data_dir="", **options):
    try:
      return load(test=test, data_dir=data_dir, **options)
    except Mistake:
      raise
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:  # ArrowInvalid is a ValueError
      why = f"{type(error).__name__}: {error}"[:200]
      raise Mistake(f"data_dir={str(data_dir)!r}: {test}: a question is not as the task wants it ({why})") from error

  return named


def splits(**found):
  """Split -> rows, as the harness takes them."""
  return {name: datasets.Dataset.from_list(rows) for name, rows in found.items() if rows is not None}


@_of_files
def load(*, test, shots="", data_dir="", where=None, **_):
  """A benchmark of one file of questions, and perhaps one of examples."""
  return splits(test=rows(test, data_dir, where), shots=rows(shots, data_dir, where) if shots else None)


@_of_files
def load_truthfulqa(*, test, data_dir="", **_):
  """Answers as two lists: a table has no column for every answer."""
  return splits(
    test=[
      {"question": row["question"], "choices": list(row["mc2_targets"]), "labels": list(row["mc2_targets"].values())}
      for row in rows(test, data_dir)
    ]
  )


@_of_files
def load_bbh(*, test, shots, data_dir="", where=None, **_):
  """Questions of one task; its prompt, a description and three worked examples, is taken apart."""
  (prompt,) = (row["prompt"] for row in rows(shots, data_dir, where))
  description, *examples = re.split(r"\n\nQ: ", prompt.partition("\n-----\n")[2] or prompt)
  pairs = [re.split(r"\nA: Let's think step by step\.\s*", example, maxsplit=1) for example in examples]
  return splits(
    test=[row | {"description": description} for row in rows(test, data_dir, where)],
    shots=[{"input": question, "target": answer, "description": description} for question, answer in pairs],
  )


@_of_files
def load_mbpp(*, test, data_dir="", **_):
  """Tasks 11 to 510 are the test; the examples are 2, 3, 4 (the harness's three), and then those behind them."""
  found = rows(test, data_dir)
  return splits(
    test=[row for row in found if 11 <= row["task_id"] <= 510],
    shots=[row for row in found if 2 <= row["task_id"] <= 10],
  )


@_of_files
def load_math(*, test, data_dir="", **_):
  """Problems with their normalised answers."""
  minerva = _minerva()

  def answer(solution):
    return minerva.normalize_final_answer(minerva.remove_boxed(minerva.last_boxed_only_string(solution) or ""))

  return splits(test=[row | {"answer": answer(row["solution"])} for row in rows(test, data_dir)])


def _minerva():
  """The harness's own functions, so that the numbers are the harness's."""
  try:
    from lm_eval.tasks.minerva_math import utils
  except (ModuleNotFoundError, AssertionError) as error:
    raise Mistake("the tasks of mathematics compare formulas: pip install 'lm-eval[math]'") from error
  return utils


def minerva_shots():
  """The four worked examples of Minerva."""
  return _minerva().list_fewshot_samples()


def minerva(doc, results):
  """`exact_match` of the normalised final answer, and `math_verify`."""
  return _minerva().process_results(doc, results)


def winogrande_option(doc):
  """Which of the two beginnings is right."""
  return int(doc["answer"]) - 1


def winogrande_beginnings(doc):
  """The sentence up to its gap, with either option in it."""
  beginning = doc["sentence"].partition("_")[0]
  return [beginning + doc["option1"], beginning + doc["option2"]]


def winogrande_end(doc):
  """What stands behind the gap, which is scored."""
  return doc["sentence"].partition("_")[2].strip()


def mc2(doc, results):
  """The share of the probability that true answers have."""
  import numpy as np

  nats = np.array([nats for nats, _ in results], np.float64)
  p = np.exp(nats - nats.max())
  return {"acc": float(p[np.array(doc["labels"]) == 1].sum() / p.sum())}


class OtherProblems(ContextSampler):
  """The first examples that are of other problems than the question: lines of one program would give it away."""

  def sample(self, n, eval_doc=None, df=None, **_):
    """The first `n`, each of a problem of its own."""
    found = {}
    for row in df or self.df:
      if not eval_doc or row["entry_point"] != eval_doc["entry_point"]:
        found.setdefault(row["entry_point"], row)
    return list(found.values())[:n]


def _passes(program):
  return {"pass@1": float(sandbox.run(program).passed)}


def humaneval(doc, results):
  """Whether the completed function passes its tests."""
  return _passes(f"{doc['prompt']}{results[0]}\n{doc['test']}\ncheck({doc['entry_point']})")


def humaneval_instruct(doc, results):
  """Likewise; the answer ends where its code block does."""
  return humaneval(doc, [results[0].partition("```")[0]])


def infill_line(doc, results):
  """Whether the program with the line in its place passes its tests; the line's own end is put back."""
  return _infilled(doc, results[0] + "\n")


def infill_span(doc, results):
  """Whether the program with the span in its place passes its tests."""
  return _infilled(doc, results[0])


def _infilled(doc, middle):
  return _passes(f"{doc['prompt']}{middle}{doc['suffix']}\n{doc['test']}\ncheck({doc['entry_point']})")


def mbpp(doc, results):
  """Whether the program passes its three tests; what they need is set up with what the program defines."""
  return _passes("\n".join([results[0], doc.get("test_setup_code") or "", *doc["test_list"][:3]]))


def mbpp_instruct(doc, results):
  """Likewise, of the code block that the prompt has opened (or the reply opens again).

  The harness's own pattern takes the first word of such a reply for the name of a language.
  """
  return mbpp(doc, [re.sub(r"^\s*```\w*\n", "", results[0]).partition("```")[0]])
