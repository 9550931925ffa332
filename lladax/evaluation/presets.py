"""Published settings by name: those of LLaDA's tables, with the number to expect of each, and its successors' own."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from lladax.mistake import Mistake

_1024 = {"gen_length": 1024, "steps": 1024, "block_length": 1024}


@dataclasses.dataclass(frozen=True)
class Preset:
  """One cell of a published table: what to run, how, and the number to expect of the published weights."""

  task: str  # the harness's name; with local benchmarks lladax_TASK is run, where it exists
  num_fewshot: int | None = None  # None: the task's own number
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  chat: bool = False  # prompts are conversations
  published: float | None = None  # percent


def _base(task: str, shots: int, published: float, **options) -> Preset:
  return Preset(task, shots, options, published=published)


def _both(name: str, task: str, shots: int, without: float, guidance: float, with_guidance: float) -> dict[str, Preset]:
  """A row of the base table in its two columns."""
  return {
    name: _base(task, shots, without, num_samples=128),
    f"{name}+guidance": _base(task, shots, with_guidance, num_samples=128, guidance_scale=guidance),
  }


def _instruct(task: str, length: int, block: int, published: float | None = None, **options) -> Preset:
  # The published shots of these are OpenCompass's, and are not stated: the task's own are used.
  lengths = {"gen_length": length, "steps": length, "block_length": block}
  return Preset(task, None, lengths | options, chat=True, published=published)


# LLaDA-8B (arXiv 2502.09992, Tab. 1 and 2) and the settings of its repository's EVAL page.
PRESETS: dict[str, Preset] = {
  "llada_base/mmlu": _base("mmlu", 5, 65.9, num_samples=1),  # an answer of one token needs no more
  "llada_base/cmmlu": _base("cmmlu", 5, 69.9, num_samples=1),
  "llada_base/ceval": _base("ceval-valid", 5, 70.5, num_samples=1),
  **_both("llada_base/arc_challenge", "arc_challenge", 0, 45.9, 0.5, 47.9),
  **_both("llada_base/hellaswag", "hellaswag", 0, 70.5, 0.5, 72.5),
  **_both("llada_base/piqa", "piqa", 0, 73.6, 0.5, 74.4),
  **_both("llada_base/truthfulqa", "truthfulqa_mc2", 0, 46.1, 2.0, 46.4),
  **_both("llada_base/winogrande", "winogrande", 5, 74.8, 0.0, 74.8),
  **_both("llada_base/gpqa", "gpqa_main_n_shot", 5, 25.2, 0.5, 26.1),
  "llada_base/bbh": _base("bbh", 3, 49.7, **_1024),
  "llada_base/gsm8k": _base("gsm8k", 4, 70.3, **_1024),
  "llada_base/math": _base("minerva_math", 4, 31.4, **_1024),
  "llada_base/humaneval": _base("humaneval", 0, 35.4, **_1024),
  "llada_base/mbpp": _base("mbpp", 4, 40.0, **_1024),
  # Its canvas was never released: the masks are as many as the task's max_gen_toks.
  "llada_base/humaneval_fim": _base("humaneval_single_line_infilling", 2, 73.8),
  "llada_instruct/mmlu": _instruct("mmlu_generative", 3, 3),
  "llada_instruct/mmlu_pro": _instruct("mmlu_pro", 256, 256),
  "llada_instruct/hellaswag": _instruct("hellaswag_generative", 3, 3),
  "llada_instruct/arc_challenge": _instruct("arc_challenge_chat", 512, 512),
  "llada_instruct/gsm8k": _instruct("gsm8k", 512, 512, 69.4, confidence_eos_eot_inf=True),
  "llada_instruct/gsm8k_blocks": _instruct("gsm8k", 256, 8, 78.6),
  "llada_instruct/math": _instruct("minerva_math", 512, 512, 31.9, confidence_eos_eot_inf=True),
  "llada_instruct/math_blocks": _instruct("minerva_math", 512, 64, 42.2),
  "llada_instruct/gpqa": _instruct("gpqa_main_generative_n_shot", 64, 64, confidence_eos_eot_inf=True),
  "llada_instruct/humaneval": _instruct("humaneval_instruct", 512, 512, 49.4, logits_eos_inf=True),
  "llada_instruct/mbpp": _instruct("mbpp_instruct", 256, 256, confidence_eos_eot_inf=True),
}


# How the successors sample in their reports: the task's own shots, and no numbers that we could trace to a table
# (LLaDA2.0: arXiv 2512.15745; LLaDA2.1's two modes: arXiv 2602.08676; SDAR: its repository).
_2048 = {"gen_length": 2048, "early_stop": True}
_EDITS = _2048 | {"tokens_per_step": 1, "max_post_passes": 16}
_FAMILIES: dict[str, dict[str, Any]] = {
  "llada2": _2048 | {"block_steps": 32, "threshold": 0.95},
  "llada21_quality": _EDITS | {"threshold": 0.7, "edit_threshold": 0.5},
  "llada21_speed": _EDITS | {"threshold": 0.5, "edit_threshold": 0.0},
  "sdar": _2048 | {"block_steps": 4, "threshold": 0.9},
}
_TASKS = {
  "gsm8k": "gsm8k", "math": "minerva_math", "humaneval": "humaneval_instruct", "mbpp": "mbpp_instruct",
  "mmlu_pro": "mmlu_pro",
}  # fmt: skip
PRESETS |= {
  f"{family}/{name}": Preset(task, None, options, chat=True)
  for family, options in _FAMILIES.items()
  for name, task in _TASKS.items()
}


def preset(name: str) -> Preset:
  """The published setting of that name, e.g. llada_base/arc_challenge+guidance; Mistake for any other."""
  if name not in PRESETS:
    near = difflib.get_close_matches(name, PRESETS, 1, 0.0)[0]
    raise Mistake(f"preset {name!r}: there is no such preset; did you mean {near}?")
  return PRESETS[name]
