"""A `LLaDA` as EleutherAI's lm-evaluation-harness asks a model.

The life of a request: text (or a conversation) -> ids -> those that no file of answers (`Answers`) knows, sorted by
length, so that a batch holds little padding -> `LLaDA.log_likelihood`, `sample` or `unmask`, a batch at a time -> text
up to its first stop string -> the file of answers, batch by batch, so that an interrupted run goes on where it stopped.
"""

import dataclasses
import hashlib
import json
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np

from lladax.devices import distributed, sharding
from lladax.evaluation.answers import Answers
from lladax.evaluation.kwargs import OWN, SAMPLER, split_options, understood
from lladax.inference import load
from lladax.inference.llada import LLaDA, cut
from lladax.mistake import Mistake
from lladax.sampling import SamplerConfig

try:
  from lm_eval.api.model import LM
  from lm_eval.api.registry import register_model
  from tqdm import tqdm
except ModuleNotFoundError as error:
  raise Mistake(f"the lm-evaluation-harness is an extra ({error}): pip install 'lladax[eval]'") from error

CHAT = "\x1echat:"  # begins a context that is a conversation, as JSON: its special tokens are ids, never text
_BATCH_TOKENS = 32768  # of a device in a generation batch, at most: long prompts come in smaller batches
_CALL_TOKENS = 16 * 8192  # a likelihood call is about 16 of log_likelihood's batches: what an interruption may lose


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
    mesh, options = split_options(options)
    if not str(batch_size).isdecimal() or int(batch_size) < 1:
      raise Mistake(f"batch_size={batch_size!r}: must be a positive number")
    if (llada is None) == (not path):
      raise Mistake("give the model as path=..., a workdir or a published checkpoint (or as llada=)")
    if llada is None:
      llada = load.load(path, step, mesh=sharding.make_mesh(sharding.MeshConfig(**mesh)) if mesh else None)
    if llada.tokenizer is None:
      raise Mistake("this model has no tokenizer, and the harness gives it text: add the tokenizer's files")
    self.llada, self.text, self.batch_size, self.options = llada, llada.tokenizer, int(batch_size), options
    self.num_samples, self.greedy = (options.get(name, OWN[name]) for name in OWN)
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
    guidance, seed = (self.options.get(name, SAMPLER[name]) for name in ("guidance_scale", "seed"))
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
        seed = self.options.get("seed", SAMPLER["seed"])
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
      return [cut(text, plans[i].until) for i, text in zip(at, texts, strict=True)]

    return self._run("generate_until", keys, split, answer, disable_tqdm)

  def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
    """A conversation as a context; what its messages spell can never become a special token (`Tokenizer.chat`)."""
    self.text.check_chat()
    return CHAT + json.dumps([chat_history, add_generation_prompt], ensure_ascii=False)

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
      model = fingerprint(self)
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
    if not context.startswith(CHAT):
      return self.text.encode(context)
    messages, ask = json.loads(context.removeprefix(CHAT))
    if ask:
      return self.text.chat(messages)
    prompt = self.text.chat(messages[:-1])
    return prompt + self.text.behind(prompt, messages[-1]["content"])  # a reply that has begun

  def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Ids of both, as the harness splits them: spaces before the continuation are its own (`Tokenizer.pair`)."""
    if context.startswith(CHAT):
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
        rows, dataclasses.replace(plan, infill="" if self.llada.model.objective.fills else None), [0] * len(rows)
      )
      found += [x[: len(a)] == a for x, (_, a) in zip(filled, batch, strict=True)]
    return found

  def _plan(self, asked: Mapping[str, Any]) -> "_Plan":
    """What a request's generation_kwargs and the options come to."""
    asked = understood(asked)
    most = asked["max_gen_toks"]
    sampler = {"temperature": 0.0, "remasking": SAMPLER["remasking"], "seed": SAMPLER["seed"]}
    sampler |= {name: value for x in (asked, self.options) for name, value in x.items() if name in SAMPLER}
    length = sampler.get("gen_length") or most
    if "gen_length" in sampler:
      most = length
    block = self.llada.model.block or min(sampler.get("block_length", length), length)
    length = -(-length // block) * block
    sampler |= {"gen_length": length, "block_length": block, "steps": sampler.get("steps", length)}
    c = SamplerConfig(**sampler)  # says what is wrong now
    self.llada.model.objective.check_sampler(c)
    if asked.get("infill") is not None and not self.llada.model.objective.fills:
      raise Mistake(f"infill={asked['infill']!r}: a causal model cannot fill in the middle of a text")
    self._cut([], length)
    return _Plan(sampler, sampler.pop("seed"), most, asked["until"], asked.get("infill"))

  def _split(self, context: str, plan: "_Plan") -> tuple[list[int], list[int], list[int]]:
    """Ids (before, masks, behind); without a mark nothing is behind."""
    masks = [self.llada.mask_id] * plan.sampler["gen_length"]
    if plan.infill is None:
      return self._cut(self._context(context), len(masks)), masks, []
    if context.startswith(CHAT):
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


def fingerprint(harness: Harness) -> str:
  """Of what an answer depends on besides the request: some weights of every array, and the options."""
  llada = harness.llada
  told = hashlib.sha256(json.dumps([str(llada.model), harness.options, harness.tokenizer_name], default=str).encode())
  for x in jax.tree.leaves(llada.params):
    told.update(np.asarray(x[(0,) * (x.ndim - 1)][:256], np.float32).tobytes())
  return told.hexdigest()[:16]


register_model("lladax")(Harness)
