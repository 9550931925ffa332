"""LLaDA in EleutherAI's lm-evaluation-harness: an adapter, the paper's settings by name, and local benchmarks.

    python -m lladax.harness --tasks lladax_gsm8k --model_args path=WORKDIR,gen_length=256 --data_dir DIR

is the harness's own command line with three things added: the model `lladax` is known (lm-eval 0.4.13 looks for no
plugins, so its own `lm_eval` cannot find it), and so are the tasks in lladax/tasks, which read benchmarks from files.

The life of a request: text (or a conversation) -> ids -> those that no file of answers (`Answers`) knows, sorted by
length, so that a batch holds little padding -> `LLaDA.log_likelihood`, `sample` or `unmask`, a batch at a time -> text
up to its first stop string -> the file of answers, batch by batch, so that an interrupted run goes on where it stopped.
"""

import argparse
import contextlib
import dataclasses
import difflib
import glob
import hashlib
import inspect
import io
import json
import logging
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast
from unittest import mock

import jax
import numpy as np

from lladax import llada as lladas
from lladax import sampling
from lladax.answers import Answers
from lladax.data import corpus
from lladax.devices import distributed, sharding
from lladax.drawing import report
from lladax.llada import LLaDA
from lladax.mistake import Missing, Mistake
from lladax.sampling import SamplerConfig

try:
  from lm_eval.api.model import LM
  from lm_eval.api.registry import register_model
  from lm_eval.models.utils import normalize_gen_kwargs
  from tqdm import tqdm
except ModuleNotFoundError as error:
  raise Mistake(f"the lm-evaluation-harness is an extra ({error}): pip install 'lladax[eval]'") from error

TASKS = Path(__file__).parent / "tasks"
DATA = "LLADAX_EVAL_DATA"  # the environment variable that names the folder of local benchmarks
_CHAT = "\x1echat:"  # begins a context that is a conversation, as JSON: its special tokens are ids, never text
_ALIASES = {"cfg": "guidance_scale", "mc_num": "num_samples"}  # the official adapter's names
_SAMPLER = {field.name: field.default for field in dataclasses.fields(SamplerConfig)}
_OWN = {"num_samples": 128, "greedy": False}
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # one thing; the first one counts
# What other models of the harness know, with the values that change nothing. Of a draw: what chooses among its tokens.
_OF_DRAWS: dict[str, tuple] = {"top_p": (1,), "top_k": (0, -1), "min_p": (0,), "typical_p": (1,)}
_NEUTRAL: dict[str, tuple] = _OF_DRAWS | {
  "num_beams": (1,), "num_return_sequences": (1,), "n": (1,), "best_of": (1,), "early_stopping": (False,),
  "length_penalty": (1,), "repetition_penalty": (1,), "frequency_penalty": (0,), "presence_penalty": (0,),
  "no_repeat_ngram_size": (0,), "use_cache": (False, True),
}  # fmt: skip
_MEANT = {"stop": "until", "stop_sequences": "until", "max_length": "max_gen_toks", "cfg": "guidance_scale"}
_BATCH_TOKENS = 32768  # of a device in a generation batch, at most: long prompts come in smaller batches
_CALL_TOKENS = 16 * 8192  # a likelihood call is about 16 of log_likelihood's batches: what an interruption may lose


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


_1024 = {"gen_length": 1024, "steps": 1024, "block_length": 1024}

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


def preset(name: str) -> Preset:
  """The published setting of that name, e.g. llada_base/arc_challenge+guidance; Mistake for any other."""
  if name not in PRESETS:
    near = difflib.get_close_matches(name, PRESETS, 1, 0.0)[0]
    raise Mistake(f"preset {name!r}: there is no such preset; did you mean {near}?")
  return PRESETS[name]


class Harness(LM):
  """A LLaDA as the harness sees it: text in, text and log-likelihoods out.

  Without `greedy` the second value of a likelihood (would greedy decoding have given this answer?) is False and means
  "not asked": with it each answer is also filled in, a forward pass a token, and compared.
  """

  def __init__(
    self, path: str = "", *, llada: LLaDA | None = None, step: int | None = None, batch_size: int | str = 1,
    device: str | None = None, max_batch_size: int | None = None, trust_remote_code: bool = False, **options,
  ):  # fmt: skip
    """Loads the model at `path`, or takes `llada`.

    Args:
      path: as of `lladax.load`.
      llada: a model at hand, instead of a path.
      step: of a checkpoint.
      batch_size: prompts of a generation batch, at most; of long ones fewer (32,768 tokens of a device). Likelihoods
        batch by tokens, whatever this says.
      device: ignored, JAX has chosen (the harness always passes one).
      max_batch_size: likewise.
      trust_remote_code: likewise; it is for the harness's data sets.
      **options: `num_samples` (or `mc_num`) and `greedy`, for likelihoods; the fields of `SamplerConfig`
        (`guidance_scale` may be called `cfg`), of which gen_length, block_length and steps follow the task's
        max_gen_toks where they are not given; `fsdp`, `tensor` and the other axes of `MeshConfig`, for the mesh.

    Raises:
      Mistake: an unknown option or a bad value; a model without a tokenizer.
    """
    super().__init__()
    del device, max_batch_size, trust_remote_code
    mesh, options = _options(options)
    if not str(batch_size).isdecimal() or int(batch_size) < 1:
      raise Mistake(f"batch_size={batch_size!r}: must be a positive number")
    if (llada is None) == (not path):
      raise Mistake("give the model as path=..., a workdir or a published checkpoint (or as llada=)")
    if llada is None:
      llada = lladas.load(path, step, mesh=sharding.make_mesh(sharding.MeshConfig(**mesh)) if mesh else None)
    if llada.tokenizer is None:
      raise Mistake("this model has no tokenizer, and the harness gives it text: add the tokenizer's files")
    self.llada, self.text, self.batch_size, self.options = llada, llada.tokenizer, int(batch_size), options
    self.num_samples, self.greedy = (options.get(name, _OWN[name]) for name in _OWN)
    self.answers: Answers | None = None
    self._asked: Counter[str] = Counter()  # how often each text that is drawn has been asked for
    self._has_cut = False

  def keep(self, path: str | Path) -> None:
    """Has answers read from a file, and new ones written to it; see `Answers`. Models and settings may share it."""
    self.answers = Answers(path)

  def set_cache_hook(self, cache_hook: Any) -> None:
    """Refused: what the harness keeps its answers in are pickles, and a pickle runs what it holds."""
    raise Mistake("the harness's own cache of answers is not read: use lladax.harness's use_cache, or Harness.keep")

  def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
    """(log p(continuation | context) in nats, whether it is the greedy answer) for each (context, continuation)."""
    pairs = _each(requests, self._pair)
    guidance, seed = (self.options.get(name, _SAMPLER[name]) for name in ("guidance_scale", "seed"))
    if empty := [request for request, (_, answer) in zip(requests, pairs, strict=True) if not answer]:
      more = f", and {len(empty) - 1} more like it" if len(empty) > 1 else ""
      logging.warning("%s: the answer %r is empty%s: log p of nothing is 0", _name(empty[0]), empty[0].args[1], more)

    def answer(at: list[int]) -> list[tuple[float, bool]]:
      found = dict.fromkeys(at, (0.0, bool(self.greedy)))  # log p of nothing
      if full := [i for i in at if pairs[i][1]]:
        prompts, answers = [pairs[i][0] for i in full], [pairs[i][1] for i in full]
        nats = self.llada.log_likelihood(
          prompts, answers, num_samples=self.num_samples, guidance_scale=guidance, seed=seed
        )
        greedy = self._are_greedy(prompts, answers) if self.greedy else [False] * len(full)
        found.update(zip(full, zip(cast(list[float], nats), greedy, strict=True), strict=True))
      return list(found.values())

    costs = [(len(p) + len(a)) * (1 if len(a) == 1 else self.num_samples) for p, a in pairs]
    lengths = [len(p) + len(a) for p, a in pairs]
    keys = [_digest(pair) for pair in pairs]
    return self._run("loglikelihood", keys, lambda left: _calls(left, lengths, costs), answer, disable_tqdm)

  def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
    """Log p of each whole text in nats, given nothing; a long one is cut into windows of `model.max_length` tokens."""
    most = self.llada.model.max_length
    rows = _each(requests, lambda text: self.text.encode(text))

    def answer(at: list[int]) -> list[float]:
      windows = [(i, rows[i][first : first + most]) for i in at for first in range(0, len(rows[i]), most)]
      total = dict.fromkeys(at, 0.0)
      if windows:
        answers = [ids for _, ids in windows]
        seed = self.options.get("seed", _SAMPLER["seed"])
        nats = self.llada.log_likelihood([[]] * len(windows), answers, num_samples=self.num_samples, seed=seed)
        for (i, _), value in zip(windows, cast(list[float], nats), strict=True):
          total[i] += value
      return list(total.values())

    lengths = [len(row) for row in rows]
    costs = [length * self.num_samples for length in lengths]
    keys = [_digest(row) for row in rows]
    return self._run("loglikelihood_rolling", keys, lambda left: _calls(left, lengths, costs), answer, disable_tqdm)

  def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
    """The text that each context is continued with, up to EOS, the first stop string, or max_gen_toks tokens.

    A task whose generation_kwargs have `infill: MARK` is filled in instead: the canvas is what stands before the last
    MARK of the context, as many masks as a continuation would have, and what stands behind it; the answer is what
    takes the place of MARK. Few-shot examples simply stand before.

    Where tokens are drawn, the seed of a row is a hash of the request, of the option `seed`, and of how often this
    harness has been asked the same: repeats are draws of their own, and a draw does not depend on its batch.
    """
    ready = _each(requests, lambda context, asked: (plan := self._plan(asked), self._split(context, plan)))
    plans, rows = [plan for plan, _ in ready], [row for _, row in ready]
    keys = [self._numbered(_digest(row, dataclasses.astuple(plan)), plan) for plan, row in ready]
    most = _BATCH_TOKENS * len(jax.tree.leaves(self.llada.params)[0].sharding.device_set)

    def split(left: list[int]) -> list[list[int]]:
      calls, groups = [], defaultdict(list)  # only what shares a program shares a batch
      for i in left:
        groups[json.dumps(plans[i].sampler, sort_keys=True), plans[i].infill is not None, *plans[i].until].append(i)
      for at in groups.values():
        at.sort(key=lambda i: -sum(map(len, rows[i])))  # the longest first: what does not fit, fails at once
        while at:
          fitting = max(1, most // sum(map(len, rows[at[0]])))
          size = min(self.batch_size, 1 << fitting.bit_length() - 1)  # powers of two: programs are few
          calls.append(at[:size])
          at = at[size:]
      return calls

    def answer(at: list[int]) -> list[str]:
      ids = self._fill([rows[i] for i in at], plans[at[0]], [_seed(keys[i]) for i in at])
      texts = [
        self.text.decode(self._ended(x[: plans[i].most]), behind=rows[i][0]) for i, x in zip(at, ids, strict=True)
      ]
      return [lladas.cut(text, plans[i].until) for i, text in zip(at, texts, strict=True)]

    return self._run("generate_until", keys, split, answer, disable_tqdm)

  def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
    """A conversation as a context; what its messages spell can never become a special token (`Tokenizer.chat`)."""
    self.text.check_chat()
    return _CHAT + json.dumps([chat_history, add_generation_prompt], ensure_ascii=False)

  def chat_template(self, chat_template: bool | str = False) -> str:
    """What stands in the harness's logs for the template."""
    return "lladax.tokenizer.Tokenizer.chat" if chat_template else ""

  @property
  def tokenizer_name(self) -> str:
    """Tells vocabularies apart in the harness's cache of requests."""
    return f"lladax-{self.text.fingerprint}"

  def _run(self, name: str, keys: list[str], split: Callable, answer: Callable, quiet: bool) -> list[Any]:
    """Answers what the file of answers does not know, in the calls (lists of places) that `split` makes of it.

    A call is kept as soon as it is made.
    """
    answers: list[Any] = [None] * len(keys)
    if self.answers is not None:
      model = _fingerprint(self)
      keys = [_digest(model, key) for key in keys]
      answers = [self.answers.known.get((name, key)) for key in keys]
    left = [i for i, value in enumerate(answers) if value is None]
    bar = tqdm(total=len(keys), initial=len(keys) - len(left), desc=name, disable=quiet or not distributed.is_first())
    with bar:
      for at in split(left):
        for i, value in zip(at, answer(at), strict=True):
          answers[i] = value
        if self.answers is not None:
          self.answers.add(name, {keys[i]: answers[i] for i in at})
        bar.update(len(at))
    return answers

  def _numbered(self, key: str, plan: "_Plan") -> str:
    """The key with the number of the repeat; what is not drawn is the same every time."""
    if not plan.sampler["temperature"] and plan.sampler["remasking"] != "random":
      return key
    self._asked[key] += 1
    return _digest(key, self._asked[key])

  def _context(self, context: str) -> list[int]:
    if not context.startswith(_CHAT):
      return self.text.encode(context)
    messages, ask = json.loads(context.removeprefix(_CHAT))
    if ask:
      return self.text.chat(messages)
    prompt = self.text.chat(messages[:-1])
    return prompt + self.text.behind(prompt, messages[-1]["content"])  # a reply that has begun

  def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Ids of both, as the harness splits them: spaces before the continuation are its own (`Tokenizer.pair`)."""
    if context.startswith(_CHAT):
      prompt = self._context(context)
      answer = self.text.behind(prompt, continuation)
    else:
      bare = context.rstrip()
      prompt, answer = self.text.pair(bare, context[len(bare) :] + continuation)
    return self._cut(prompt, len(answer)), answer

  def _cut(self, prompt: list[int], rest: int) -> list[int]:
    """The end of the prompt that leaves room for `rest` more tokens."""
    most = self.llada.model.max_length
    if rest > most or (prompt and rest == most):
      raise Mistake(f"{rest} tokens to score or to generate leave no room in model.max_length={most}: ask for fewer")
    if len(prompt) + rest > most and not self._has_cut:
      self._has_cut = True
      text = "a prompt of %d tokens and %d more do not fit into model.max_length=%d: such prompts lose their start"
      logging.warning(text, len(prompt), rest, most)
    return prompt[max(0, len(prompt) + rest - most) :]

  def _are_greedy(self, prompts: list[list[int]], answers: list[list[int]]) -> list[bool]:
    steps = max(map(len, answers))
    plan = _Plan({"steps": steps, "gen_length": steps, "guidance_scale": self.options.get("guidance_scale", 0.0)}, 0)
    found = []
    for first in range(0, len(prompts), self.batch_size):
      batch = list(zip(prompts, answers, strict=True))[first : first + self.batch_size]
      rows = [(p, [self.llada.mask_id] * len(a), []) for p, a in batch]
      filled = self._fill(
        rows, dataclasses.replace(plan, infill=None if self.llada.model.causal else ""), [0] * len(rows)
      )
      found += [x[: len(a)] == a for x, (_, a) in zip(filled, batch, strict=True)]
    return found

  def _plan(self, asked: Mapping[str, Any]) -> "_Plan":
    """What a request's generation_kwargs and the options come to."""
    asked = understood(asked)
    most = asked["max_gen_toks"]
    sampler = {"temperature": 0.0, "remasking": _SAMPLER["remasking"], "seed": _SAMPLER["seed"]}
    sampler |= {name: value for x in (asked, self.options) for name, value in x.items() if name in _SAMPLER}
    length = sampler.get("gen_length") or most
    if "gen_length" in sampler:
      most = length
    block = min(sampler.get("block_length", length), length)
    length = -(-length // block) * block
    sampler |= {"gen_length": length, "block_length": block, "steps": sampler.get("steps", length)}
    c = SamplerConfig(**sampler)  # says what is wrong now
    if self.llada.model.causal:
      sampling.check_causal(c)
      if asked.get("infill") is not None:
        raise Mistake(f"infill={asked['infill']!r}: a causal model cannot fill in the middle of a text")
    self._cut([], length)
    return _Plan(sampler, sampler.pop("seed"), most, asked["until"], asked.get("infill"))

  def _split(self, context: str, plan: "_Plan") -> tuple[list[int], list[int], list[int]]:
    """Ids (before, masks, behind); without a mark nothing is behind."""
    masks = [self.llada.mask_id] * plan.sampler["gen_length"]
    if plan.infill is None:
      return self._cut(self._context(context), len(masks)), masks, []
    if context.startswith(_CHAT):
      raise Mistake(f"infill={plan.infill!r}: a conversation has no gap to fill in; leave out the chat template")
    before, mark, behind = context.rpartition(plan.infill)
    if not mark:
      raise Mistake(f"infill={plan.infill!r}: the context does not hold this mark")
    suffix = self.text.encode(behind, begins=False)
    return self._cut(self.text.encode(before), len(masks) + len(suffix)), masks, suffix

  def _fill(
    self, rows: list[tuple[list[int], list[int], list[int]]], plan: "_Plan", seeds: list[int]
  ) -> list[list[int]]:
    """The ids that take the place of the masks; the last row fills up a batch, as programs have fixed shapes."""
    more = min(self.batch_size, 2 ** (len(rows) - 1).bit_length()) - len(rows)
    full, seeds = rows + rows[-1:] * more, seeds + seeds[-1:] * more
    if plan.infill is None:
      # Here the stop strings only spare work: `generate_until` cuts the texts.
      out = self.llada.sample([before for before, _, _ in full], until=plan.until, seed=seeds, **plan.sampler)
      return [row[-plan.sampler["gen_length"] :].tolist() for row in out.tokens[: len(rows)]]
    options = {name: value for name, value in plan.sampler.items() if name not in ("gen_length", "block_length")}
    out = self.llada.unmask([before + masks + behind for before, masks, behind in full], seed=seeds, **options)
    filled = []
    for row, (_, masks, behind) in zip(out.tokens[: len(rows)], rows, strict=True):
      end = len(row) - len(behind)
      filled.append(row[end - len(masks) : end].tolist())
    return filled

  def _ended(self, ids: list[int]) -> list[int]:
    return ids[: next((i for i, token in enumerate(ids) if token in self.llada.ends), len(ids))]


register_model("lladax")(Harness)


@dataclasses.dataclass(frozen=True)
class _Plan:
  """How a text is to be generated."""

  sampler: dict[str, Any]  # fields of SamplerConfig
  seed: int  # of the run; a row has its own
  most: int = 2**30  # tokens kept
  until: list[str] = dataclasses.field(default_factory=list)
  infill: str | None = None


def _digest(*what: Any) -> str:
  return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]


def _seed(key: str) -> int:
  """31 bits, as a seed of JAX may have."""
  return int(key[:8], 16) >> 1


def _name(request: Any) -> str:
  """Task and question of a request, and the choice where there may be several."""
  choice = f", choice {request.idx}" if request.request_type == "loglikelihood" else ""
  return f"task {request.task_name}, question {request.doc_id}{choice}"


def _each(requests: Iterable[Any], make: Callable) -> list[Any]:
  """What `make` makes of the arguments of each request; a Mistake names the request."""
  found = []
  for request in requests:
    try:
      found.append(make(*request.args))
    except Mistake as error:
      raise Mistake(f"{_name(request)}: {error}") from None
  return found


def _options(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
  """(fields of MeshConfig, the other options by their own names); Mistake for what is none, or has a bad value."""
  axes = {field.name for field in dataclasses.fields(sharding.MeshConfig)}
  mesh = {name: value for name, value in given.items() if name in axes}
  options = {_ALIASES.get(name, name): value for name, value in given.items() if name not in axes}
  for name, value in options.items():
    if name not in _OWN and name not in _SAMPLER:
      near = difflib.get_close_matches(name, [*_OWN, *_SAMPLER, *axes, *_ALIASES], 1, 0.0)[0]
      raise Mistake(f"{name}={value!r}: there is no such option; did you mean {near}?")
  if not _is(options.get("num_samples", 1), int) or options.get("num_samples", 1) < 1:
    raise Mistake(f"num_samples={options['num_samples']!r}: must be a positive number")
  if not isinstance(options.get("greedy", False), bool):
    raise Mistake(f"greedy={options['greedy']!r}: must be True or False")
  SamplerConfig(**{name: value for name, value in options.items() if name in _SAMPLER})
  return mesh, options


def _is(value: Any, *kinds: type) -> bool:
  return isinstance(value, kinds) and not isinstance(value, bool)


def understood(asked: Mapping[str, Any]) -> dict[str, Any]:
  """A task's generation_kwargs as the harness's own models understand them, and no others.

  `max_gen_toks` has three more names. Tokens are drawn where `do_sample` is true, or where it is not given and there is
  a temperature; `do_sample: false` beside a temperature is said once. The fields of `SamplerConfig`, and `infill`, are
  lladax's own.

  Returns:
    `until`, a list; `max_gen_toks`; `temperature`, 0.0 where nothing is drawn; fields of SamplerConfig, and infill.

  Raises:
    Mistake: an unknown field; one of other models, such as top_p, at a value that changes something; a bad value.
  """
  asked = {name: value for name, value in asked.items() if value is not None}
  known = {"until", "do_sample", "temperature", "infill", *_LENGTHS, *_SAMPLER}
  for name, value in asked.items():
    said = f"generation_kwargs: {name}={value!r}"
    if name not in known and name not in _NEUTRAL:
      near = _MEANT.get(name) or difflib.get_close_matches(name, known, 1, 0.0)[0]
      raise Mistake(f"{said}: there is no such field; did you mean {near}?")
    if name in _LENGTHS and not (_is(value, int) and value > 0):
      raise Mistake(f"{said}: must be a positive number")
    if name == "temperature" and not (_is(value, int, float) and value >= 0):
      raise Mistake(f"{said}: must be a number from 0")
    if name == "do_sample" and not isinstance(value, bool):
      raise Mistake(f"{said}: must be true or false")
    if name == "infill" and not (isinstance(value, str) and value):
      raise Mistake(f"{said}: must be a string")
  until = asked.get("until", [])
  until = [until] if isinstance(until, str) else until
  if not isinstance(until, list | tuple) or not all(isinstance(stop, str) for stop in until):
    raise Mistake(f"generation_kwargs: until={until!r}: must be a list of strings")
  if asked.get("do_sample"):
    asked.setdefault("temperature", 1.0)
  shared = (*_LENGTHS, "do_sample", "temperature")
  told: dict[str, Any] = dict(normalize_gen_kwargs({name: asked[name] for name in shared if name in asked}))
  temperature = told["temperature"] if told["do_sample"] else 0.0
  for name in asked.keys() & _NEUTRAL.keys():
    if asked[name] not in _NEUTRAL[name] and (temperature or name not in _OF_DRAWS):
      neutral = _NEUTRAL[name][0]
      raise Mistake(
        f"generation_kwargs: {name}={asked[name]!r}: lladax's sampler has no {name}; set it to {neutral}"
        f" (--gen_kwargs {name}={neutral}), or leave it out"
      )
  own = {name: asked[name] for name in asked if name in _SAMPLER or name == "infill"}
  own |= {"temperature": temperature, "max_gen_toks": told["max_gen_toks"]}
  return own | {"until": [stop for stop in until if stop]}


def _calls(places: Iterable[int], lengths: list[int], costs: list[int]) -> list[list[int]]:
  """Places from long to short, cut into calls of about the same work."""
  calls, spent = [], 0
  for i in sorted(places, key=lambda i: -lengths[i]):
    if not calls or spent >= _CALL_TOKENS:
      calls.append([])
      spent = 0
    calls[-1].append(i)
    spent += costs[i]
  return calls


def evaluate(
  llada: LLaDA, names: str | Sequence[str], *, data_dir: str = "", limit: int | None = None, batch_size: int = 8,
  allow_code: bool = False, use_cache: str | Path | None = None, output: str | Path | None = None,
  num_fewshot: int | None = None, chat: bool | None = None, **options,
) -> dict[str, dict[str, float]]:  # fmt: skip
  """Runs presets and tasks, one after the other.

  Args:
    llada: the model, with its tokenizer.
    names: of presets (`PRESETS`), of the tasks in lladax/tasks, or of the harness's own.
    data_dir: the folder of the local benchmarks; "": what LLADAX_EVAL_DATA says. With one, lladax_TASK is run for
      TASK where it exists; without one the harness fetches its own data.
    limit: only so many questions of each task, for a trial.
    batch_size: prompts of a generation batch, at most.
    allow_code: generated code may be run (in `lladax.sandbox`); without it tasks that do are refused.
    use_cache: a folder for the answers; a run that stopped goes on at the batch where it did. Every model and setting
      has a file of its own there (see `Answers`).
    output: a name for the report of the results, some answers with them: a .json and a .html file, written anew after
      each name.
    num_fewshot: instead of the preset's or the task's.
    chat: prompts are conversations; None: what the preset says.
    **options: those of `Harness`, before the preset's.

  Returns:
    name (or name/TASK, for the parts of a group) -> {metric: value, metric_stderr: its standard error, "samples":
    questions, "published": a preset's number as a fraction, of the published weights}.

  Raises:
    Mistake: an unknown name or option, a missing data folder, a task that runs code without `allow_code`, or one that
      asks for what this model or sampler has not.
  """
  from lm_eval.evaluator import evaluate as run

  os.environ.setdefault("DISABLE_MULTIPROC", "1")  # of its standard errors: a process with JAX in it must not fork
  checked = check(names, data_dir=data_dir, allow_code=allow_code)
  if use_cache and jax.process_count() > 1:
    raise Mistake(f"use_cache={str(use_cache)!r}: processes of one job would read different caches; leave it out")
  if output:
    _check_folder(Path(output).parent, "output")
  asked = models(llada, checked, options, batch_size)  # what one of them cannot is said before the first question
  results: dict[str, dict[str, float]] = {}
  told: dict[str, list[dict[str, Any]]] = {}
  for name, (plan, group, loaded) in checked.items():
    talks, lm = plan.chat if chat is None else chat, asked[name]
    with _quiet():
      for task in loaded["tasks"].values():
        shots = plan.num_fewshot if num_fewshot is None else num_fewshot
        if task.get_config("num_fewshot") is None or (shots is not None and task.get_config("num_fewshot") != 0):
          task.set_config(key="num_fewshot", value=shots or 0)
        task.set_fewshot_seed(seed=1234)  # the harness's default
      if use_cache:
        lm.keep(Path(use_cache) / f"{_fingerprint(lm)}.jsonl")
      found: Any = run(
        lm=lm, task_dict=loaded, limit=limit, log_samples=True, apply_chat_template=talks, fewshot_as_multiturn=talks,
        confirm_run_unsafe_code=allow_code, bootstrap_iters=1000,
      )  # fmt: skip
    assert found is not None
    results |= _numbers(name, group, found)
    if plan.published is not None and name in results:
      results[name]["published"] = plan.published / 100
    if output and distributed.is_first():
      settings = {"limit": limit, "batch_size": batch_size, "num_fewshot": num_fewshot, "chat": chat} | options
      told |= _told(name, group, found["samples"])
      about = {key: value for key, value in settings.items() if value is not None}
      report.write(report.Report("lm-evaluation-harness", about, results, told), Path(output))
  return results


def check(
  names: str | Sequence[str], *, data_dir: str = "", allow_code: bool = False
) -> dict[str, tuple[Preset, str, Any]]:
  """Name -> (preset, task, the task with its questions); raises what `evaluate` raises of names and data."""
  names = [names] if isinstance(names, str) else list(names)
  plans = {name: preset(name) if "/" in name else Preset(name) for name in names}
  if not plans:
    raise Mistake("there is nothing to evaluate: the list of names is empty")
  manager, tasks = _find({name: plan.task for name, plan in plans.items()}, data_dir or os.environ.get(DATA, ""))
  if not allow_code:
    _check_code(manager, tasks)
  found = {name: (plans[name], task, _load(manager, name, [task])) for name, task in tasks.items()}
  for name, (_, _, loaded) in found.items():
    _check_parts(name, loaded)
  return found


def models(
  llada: LLaDA, checked: Mapping[str, tuple[Preset, str, Any]], options: Mapping[str, Any], batch_size: int = 1
) -> dict[str, Any]:
  """Name -> the model as the task asks it, of what `check` returned; raises what `evaluate` raises of model and task.

  The model needs no parameters yet.
  """
  found = {}
  for name, (plan, _, loaded) in checked.items():
    parts = loaded["tasks"].values()
    # A likelihood that is no choice between answers is asked for with "is it the greedy one?".
    defaults: dict[str, Any] = {"greedy": True} if any(task.OUTPUT_TYPE == "loglikelihood" for task in parts) else {}
    found[name] = Harness(llada=llada, batch_size=batch_size, **(defaults | dict(plan.options) | dict(options)))
    _check_parts(name, loaded, found[name]._plan)
  return found


def _check_code(manager: Any, tasks: Mapping[str, str]) -> None:
  """Raises Mistake if one of the tasks (by any names) runs generated code."""
  for name, task in tasks.items():
    if _runs_code(manager, task):
      how = "--config.evaluate.allow_code=True of a run, --allow_code of the other commands"
      raise Mistake(f"{name} runs generated code: allow it with allow_code=True ({how})")


def _check_folder(path: Path, field: str) -> None:
  """Raises Mistake if nothing can be written to a folder, which is made where it is not there."""
  try:
    path.expanduser().mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise Mistake(f"{field}={path}: {error.strerror}; name a folder that can be written") from None
  if not os.access(path.expanduser(), os.W_OK):
    raise Mistake(f"{field}={path}: this folder cannot be written; name another")


def _load(manager: Any, name: str, tasks: list[Any]) -> Any:
  """The tasks with their questions."""
  try:
    with _quiet():
      return manager.load(tasks)
  except Mistake:
    raise
  except OSError as error:  # of the hub, and of files
    why = (str(error) or type(error).__name__).splitlines()[0]
    which = ", ".join(map(str, tasks))
    raise Mistake(f"{name}: the questions of {which} could not be read ({why}); is there a network?") from None


def _check_parts(name: str, loaded: Any, plan: Callable = understood, more: Mapping[str, Any] = {}) -> None:  # noqa: B006
  """Raises Mistake if a task asks for what cannot be done; `more` is added to its generation_kwargs."""
  for part, task in loaded["tasks"].items():
    where = part if name in ("", part) else f"{name}: {part}"
    if getattr(task, "MULTIMODAL", False):
      raise Mistake(f"{where}: its questions are not of text alone, which a LLaDA does not read")
    if task.OUTPUT_TYPE == "generate_until":
      try:
        plan({**(task.get_config("generation_kwargs") or {}), **more})
      except Mistake as error:
        raise Mistake(f"{where}: {error}") from None


def _find(wanted: Mapping[str, str], data_dir: str) -> tuple[Any, dict[str, str]]:
  """The harness's task manager, and name -> task. Its own thousands of tasks are read only where they are needed."""
  from lm_eval.tasks import TaskManager

  options = {"include_path": str(TASKS), "metadata": {"data_dir": data_dir} if data_dir else {}}
  manager = TaskManager(include_defaults=False, **options)
  local = set(manager.all_tasks)
  tasks = {name: f"lladax_{task}" if data_dir and f"lladax_{task}" in local else task for name, task in wanted.items()}
  if any(task not in local and not task.startswith("lladax_") for task in tasks.values()):
    manager = TaskManager(**options)
  for task in tasks.values():
    if task not in manager.all_tasks:
      raise _unknown(manager, task, " (its local form needs data_dir)" * (f"lladax_{task}" in local and not data_dir))
  return manager, tasks


def _unknown(manager: Any, task: str, hint: str = "") -> Mistake:
  near = difflib.get_close_matches(task, manager.all_tasks, 1, 0.0)[0]
  return Mistake(f"task {task!r}: there is no such task{hint}; did you mean {near}?")


def _runs_code(manager: Any, task: str) -> bool:
  entry = manager.task_index[task]
  config = entry.cfg or {}
  parts = config.get("task")
  parts = parts if isinstance(parts, list) else [] if config else entry.tags  # of a group, of a tag
  names = [part if isinstance(part, str) else part.get("task", "") for part in parts]
  known = (name for name in names if name in manager.task_index and name != task)
  return bool(config.get("unsafe_code")) or any(_runs_code(manager, name) for name in known)


def _numbers(name: str, task: str, found: Mapping[str, Any]) -> dict[str, dict[str, float]]:
  """The harness's results without the filter's name where there is but one."""
  rows, asked = found["results"] | found.get("groups", {}), found["n-samples"]
  numbers = {}
  for row in sorted(rows, key=lambda row: row != task):  # a group's mean, then its parts
    values = rows[row]
    metrics = {key: value for key, value in values.items() if "," in key and isinstance(value, float | int)}
    several = len({key.split(",")[1] for key in metrics}) > 1
    short = {}
    for key, value in metrics.items():
      metric, filter = key.split(",")
      metric, error = metric.removesuffix("_stderr"), "_stderr" * metric.endswith("_stderr")
      short[f"{metric}/{filter}{error}" if several else metric + error] = value
    of = [asked[row]] if row in asked else asked.values() if row == task else []
    if of:
      short["samples"] = sum(x["effective"] for x in of)
    numbers[name if row == task else f"{name}/{row.rpartition('::')[2]}"] = short
  return numbers


def _told(name: str, task: str, samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
  """Of each part some questions with the answers to them, for the report."""
  told = {}
  for part, of in samples.items():
    rows = []
    for x in [x for x in of if x["filter"] == of[0]["filter"]][: report.SHOWN]:
      context, replies = x["arguments"][0][0], [reply[0] if isinstance(reply, list) else reply for reply in x["resps"]]
      answer, guess, hit = x["target"], replies[0], x[x["metrics"][0]]
      if len(replies) > 1:  # a choice: (log-likelihood, greedy) of each
        choices = [str(arguments[1]).strip() for arguments in x["arguments"]]
        guess = choices[int(np.argmax([nats for nats, _ in replies]))]
        answer = choices[answer] if isinstance(answer, int) and answer < len(choices) else answer
      elif not isinstance(guess, str):
        guess = f"{guess[0]:.2f} nats" if isinstance(guess, tuple) else guess
      if context.startswith(_CHAT):
        context = corpus.said(json.loads(context.removeprefix(_CHAT))[0])
      rows.append({"question": context, "answer": answer, "guess": guess, "hit": bool(hit)})
    told[name if part == task else f"{name}/{part.rpartition('::')[2]}"] = rows
  return told


def _fingerprint(harness: Harness) -> str:
  """Of what an answer depends on besides the request: some weights of every array, and the options."""
  llada = harness.llada
  told = hashlib.sha256(json.dumps([str(llada.model), harness.options, harness.tokenizer_name], default=str).encode())
  for x in jax.tree.leaves(llada.params):
    told.update(np.asarray(x[(0,) * (x.ndim - 1)][:256], np.float32).tobytes())
  return told.hexdigest()[:16]


class _quiet:
  """The harness warns of every local task that it has a function for its data: once is too often."""

  def __enter__(self):
    self.filter = lambda record: "Custom kwargs can be passed" not in record.getMessage()
    logging.getLogger("lm_eval.api.task").addFilter(self.filter)

  def __exit__(self, *_):
    logging.getLogger("lm_eval.api.task").removeFilter(self.filter)


_HELP = """lladax adds to the command line of lm-eval below:
  --model lladax  the default; --model_args path=WORKDIR and the options of lladax.harness.Harness (mc_num, cfg,
                  gen_length, block_length, steps, ...; tensor, fsdp, ... for a mesh), with commas between them
  --data_dir DIR  the folder of local benchmarks, for the tasks lladax_...
  --allow_code    generated code may be run, in a sandbox
"""


def main(argv: list[str]) -> None:
  """The harness's command line with `--model lladax` as the default, and `--data_dir DIR` and `--allow_code`."""
  from lm_eval import tasks
  from lm_eval._cli import HarnessCLI
  from lm_eval.api import model
  from lm_eval.utils import setup_logging

  if {"-h", "--help"} & set(argv):
    print(_HELP)
  ours = argparse.ArgumentParser(prog="lladax.harness", add_help=False, allow_abbrev=False)
  ours.add_argument("--data_dir")
  ours.add_argument("--allow_code", action="store_true")
  own, given = ours.parse_known_args(argv[1:])
  if own.data_dir is not None:
    if not Path(own.data_dir).expanduser().is_dir():
      raise Missing(f"--data_dir {own.data_dir}: there is no such folder; give that of the local benchmarks")
  if given and given[0] not in ("run", "ls", "validate"):
    given.insert(0, "run")
  given += ["--confirm_run_unsafe_code"] * own.allow_code
  environment = {} if own.data_dir is None else {DATA: own.data_dir}
  with contextlib.ExitStack() as for_this_run:  # the harness is afterwards as it was
    put = for_this_run.enter_context
    put(mock.patch.object(sys, "argv", [argv[0], *given]))
    put(mock.patch.dict(os.environ, environment))
    put(_quiet())
    setup_logging()
    args = HarnessCLI().parse_args()
    if given:
      args.include_path = args.include_path or str(TASKS)
    if args.command == "run":
      manager = _check_run(args)
      put(mock.patch.object(tasks, "TaskManager", lambda **_: manager))
      put(mock.patch.object(model, "CachingLM", _kept))
    args.func(args)


def _check_run(args: argparse.Namespace) -> Any:
  """Says what is wrong with a run before there is a model.

  Returns:
    The task manager for the run: what it gives are the tasks that have been loaded here, read once.
  """
  import lm_eval.models  # noqa: F401  fills the registry
  from lm_eval import tasks
  from lm_eval.api.registry import MODEL_REGISTRY
  from lm_eval.config.evaluate_config import EvaluatorConfig

  try:  # these look at the command line and its file, and at nothing else
    said = EvaluatorConfig.load_yaml_config(args.config) if args.config else {}
    args.model = args.model or said.get("model", "lladax")
    with contextlib.redirect_stdout(io.StringIO()):  # the run itself will show it
      c = EvaluatorConfig.from_cli(args)
  except (ValueError, TypeError, OSError) as error:
    raise Mistake(" ".join(str(error).split())) from None
  if c.model not in MODEL_REGISTRY:
    near = difflib.get_close_matches(c.model, list(MODEL_REGISTRY), 1, 0.0)[0]
    raise Mistake(f"--model {c.model}: there is no such model; did you mean {near}?")
  if c.model == "lladax":
    _options({name: x for name, x in c.model_args.items() if name not in inspect.signature(Harness).parameters})
  elif c.use_cache:
    raise Mistake(
      f"--use_cache {c.use_cache}: answers of other models than lladax would be kept as pickles; leave it out"
    )
  if c.output_path:
    path = Path(c.output_path)
    _check_folder(path.parent if path.suffix == ".json" else path, "--output_path")
  if not Path(c.include_path or TASKS).is_dir():
    raise Missing(f"--include_path {c.include_path}: there is no such folder")

  names = c.tasks.split(",") if isinstance(c.tasks, str) else [x for task in c.tasks for x in task.split(",")]
  if not names:
    raise Mistake("--tasks is missing: name some, as in --tasks lladax_gsm8k,lladax_mmlu")
  for name in names:
    if name.endswith(".yaml") and not glob.glob(name):
      raise Missing(f"--tasks {name}: there is no such file")
  options = {"include_path": list(dict.fromkeys([str(TASKS), c.include_path or str(TASKS)])), "metadata": c.metadata}
  manager = tasks.TaskManager(include_defaults=False, **options)
  if any(name not in manager.all_tasks and not name.startswith("lladax_") for name in names):
    manager = tasks.TaskManager(**options)
  for name in names:
    if not (name.endswith(".yaml") or manager.match_tasks([name]) or Path(name).is_dir()):
      raise _unknown(manager, name)
  if not c.confirm_run_unsafe_code:
    _check_code(manager, {name: name for name in manager.match_tasks(names)})
  with mock.patch.object(tasks, "TaskManager", lambda **_: manager):  # its thousands of files are read once
    c.process_tasks(c.metadata)  # reads task files that are named by their paths
  loaded = _load(manager, "--tasks", list(c.tasks))
  _check_parts("", loaded, understood, c.gen_kwargs)
  manager.load = lambda task_list: loaded
  return manager


def _kept(lm: Any, path: str) -> Any:
  """In the place of the harness's own cache of answers, a pickle named PATH_rank0.db."""
  lm.keep(Path(path).with_suffix(".jsonl"))
  return lm


if __name__ == "__main__":
  sys.exit(distributed.guard(main, sys.argv, "lladax.harness"))
