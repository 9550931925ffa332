"""OpenAI's protocol: bodies of requests in, rows out.

The life of a request: bytes -> a body of known fields (`decode`) -> `Asked`: a `Row` and a `Choice` for each text that
is wanted (`replies.py`). It knows neither HTTP nor a queue.
"""

import dataclasses
import difflib
import json
import math
import re
import secrets
import time
import typing
from collections.abc import Mapping
from typing import Any

from lladax import fields, sampling
from lladax.inference.engine import bucket
from lladax.inference.llada import LLaDA
from lladax.inference.slots import Row
from lladax.mistake import Mistake
from lladax.sampling import SamplerConfig
from lladax.serving.replies import Asked, Choice

CHOICES, STOPS, STOP, BIASES, HOT = 32, 16, 1000, 300, 100.0  # at most; STOP: characters of a stop string
_KINDS = typing.get_type_hints(SamplerConfig)
_SAMPLER = {name: kind for name, kind in _KINDS.items() if name not in ("seed", "logit_bias")}
_BOTH = {
  "model": str, "n": int | None, "seed": int | None, "stop": str | tuple[str, ...] | None, "stream": bool | None,
  "stream_options": dict | None, "max_tokens": int | None, "timeout": float | None, "logit_bias": dict | None,
}  # fmt: skip
_CHAT = {"messages": list, "max_completion_tokens": int | None, "logprobs": bool | None, "top_logprobs": int | None}
_TEXT = {
  "prompt": str | list, "suffix": str | None, "echo": bool | None, "best_of": int | None, "logprobs": int | None,
}  # fmt: skip
# Fields that ask for nothing here: a type, of which any value is as good, or the values that say no more than null.
_NEUTRAL: dict[str, Any] = {
  "user": str, "safety_identifier": str, "prompt_cache_key": str, "metadata": dict, "parallel_tool_calls": bool,
  "store": [False], "service_tier": ["auto", "default"], "presence_penalty": [0], "frequency_penalty": [0],
  "response_format": [{"type": "text"}], "tools": [[]], "tool_choice": ["none", "auto"], "functions": [[]],
  "function_call": ["none", "auto"], "modalities": [["text"]], "prediction": [], "audio": [],
}  # fmt: skip


class Refused(Mistake):
  """A request that gets no answer: its status, and what OpenAI's error object says besides the message."""

  retry_after = 0  # seconds; 0: it is of no use

  def __init__(self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400,
               kind: str = "invalid_request_error"):  # fmt: skip
    super().__init__(message)
    self.status, self.body = status, {"message": str(self), "type": kind, "param": param, "code": code}

  def json(self) -> dict[str, Any]:
    """OpenAI's error object."""
    return {"error": self.body}


def refused(error: Mistake, param: str | None = None) -> Refused:
  """A mistake as the user of a field is told it: `sample.steps=0: ...` is one of the field `steps`."""
  if isinstance(error, Refused):
    return error
  message = str(error).replace("sample.", "").replace("model.max_length", "max_length")
  named = re.match(r"(\w+)(?:\[\d+\])*[=:.\[ ]", message)
  known = {*_KINDS, *_BOTH, *_CHAT, *_TEXT}
  return Refused(message, param=named[1] if named and named[1] in known else param)


def decode(content: bytes) -> dict[str, Any]:
  """The body of a request.

  Raises:
    Refused: it is no JSON, or no object, or one whose readers would not agree: names twice, NaN, half characters.
  """

  def constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")

  try:
    body = json.loads(content.decode("utf-8"), object_pairs_hook=fields.json_object, parse_constant=constant)
    json.dumps(body, ensure_ascii=False).encode()
  except RecursionError:
    raise Refused("the body's lists and objects are too deep") from None
  except UnicodeEncodeError:
    raise Refused("the body holds half of a surrogate pair, which is no character") from None
  except ValueError as error:
    raise Refused(f"the body is no JSON in UTF-8: {error}") from None
  if not isinstance(body, dict):
    raise Refused(f"the body is of type {type(body).__name__}: give an object")
  return body


class Protocol:
  """What a served model is asked for, understood."""

  def __init__(self, llada: LLaDA, name: str, options: Mapping[str, Any], most_rows: int):
    """`options`: of `SamplerConfig`, where a request says nothing; `most_rows` of a request."""
    options = {"early_stop": True} | {k: v for k, v in options.items() if k != "seed"}
    self.llada = dataclasses.replace(llada, defaults={**llada.defaults, **options})
    self.name, self.most_rows = name, most_rows
    self._engine, self._created = self.llada.engine, int(time.time())
    self.defaults = self.llada.settings({})

  def models(self) -> dict[str, Any]:
    """The list of the one model."""
    return {"object": "list", "data": [self.model(self.name)]}

  def model(self, name: str) -> dict[str, Any]:
    """The one model."""
    self._check_name(name)
    try:
      self.llada.reader().check_chat()
      chats = True
    except Mistake:
      chats = False
    more = {
      "max_length": self.llada.model.max_length, "block": self.llada.model.block,
      "sampler": dataclasses.asdict(self.defaults), "chats": chats,
    }  # fmt: skip
    return {"id": self.name, "object": "model", "created": self._created, "owned_by": "lladax", "lladax": more}

  def chat(self, body: dict[str, Any]) -> Asked:
    """A request of /v1/chat/completions.

    Raises:
      Refused: a field that does not exist, or means nothing here, or is out of its range.
    """
    said = self._said(body, _CHAT, "messages")
    ids = self._read("messages", lambda: self.llada.reader().chat(_messages(said["messages"])))
    top = _within(said, "top_logprobs", 0, 20)
    if top is not None and not said.get("logprobs"):
      raise Refused(f"top_logprobs={top}: it needs logprobs=true", param="top_logprobs")
    c, limit, most = self._continued(said)
    row = self._row(ids, c, most, "messages")
    return self._asked(said, True, [(row, len(ids), limit, "")], c, (top or 0) if said.get("logprobs") else None)

  def completions(self, body: dict[str, Any]) -> Asked:
    """A request of /v1/completions; raises as `chat` does."""
    said = self._said(body, _TEXT, "prompt")
    logprobs, best = _within(said, "logprobs", 0, 20), said.get("best_of")
    if best is not None and best != (said.get("n") or 1):
      raise Refused(f"best_of={best}: nothing is thrown away here; leave it out, or set n to it", param="best_of")
    prompts, suffix, echo = self._prompts(said), said.get("suffix"), bool(said.get("echo"))
    wanted, c, runs = [], self.defaults, True
    for prompt in prompts:
      ids = self._ids(prompt, canvas=suffix is None)
      if suffix is not None or self.llada.mask_id in ids:
        if echo:
          raise Refused("echo=true: what is filled in has text on both sides; leave it out", param="echo")
        wanted.append(self._filled(said, ids, suffix))
        c = wanted[-1][0].settings
        continue
      if runs := not (echo and said.get("max_tokens") == 0):
        c, limit, most = self._continued(said)
        row = self._row(ids, c, most, "prompt")
      else:
        row, limit = Row(tuple(ids), c), 0
        self._read("prompt", lambda ids=ids: self._engine.check_length(len(ids), "a prompt"))
      before = "" if not echo else prompt if isinstance(prompt, str) else self.llada.reader().decode(ids)
      wanted.append((row, len(ids), limit, before))
    asked = self._asked(said, False, wanted, c, logprobs)
    asked.scores, asked.runs = echo and logprobs is not None, runs
    if asked.scores and () in asked.prompts:
      raise Refused("prompt: an empty text has no tokens to score; leave echo or logprobs out", param="prompt")
    return asked

  def _asked(self, said: dict[str, Any], chats: bool, wanted: list[tuple[Row, int, int | None, str]],
             c: SamplerConfig, logprobs: int | None) -> Asked:  # fmt: skip
    """The choices of all prompts: (row, where its text starts, tokens of it, what is echoed)."""
    n = self._each(said, len(wanted))
    seed, until = said.get("seed"), _stops(said.get("stop"))
    if seed is None:
      seed = secrets.randbits(32)
    self._read("seed", lambda: fields.check_seed(seed, "seed"))
    timeout, options = said.get("timeout"), said.get("stream_options")
    if timeout is not None and not 0 < timeout < math.inf:
      raise Refused(f"timeout={timeout}: give seconds, more than 0", param="timeout")
    if options is not None and not said.get("stream"):
      raise Refused("stream_options: only a stream has them; set stream=true, or leave it out", param="stream_options")
    if wrong := [k for k, v in (options or {}).items() if k not in _STREAM or not isinstance(v, bool | None)]:
      raise Refused(f"stream_options.{wrong[0]:.80}: use {', '.join(_STREAM)}, true or false", param="stream_options")
    choices = []
    for row, start, limit, before in wanted:
      if until and row.fills and limit is None:
        raise Refused("stop: a text with [MASK]s has an end of its own; leave it out", param="stop")
      for k in range(n):
        own = dataclasses.replace(row, settings=dataclasses.replace(row.settings, seed=sampling.nth_seed(seed, k)))
        choices.append(Choice(self.llada, own, start, None if limit is None else start + limit, until, before))
    options = options or {}
    given = [tuple(i for i in row.ids if i != self.llada.mask_id) for row, *_ in wanted]
    return Asked(
      chats, self.name, choices, seed, bool(said.get("stream")), bool(options.get("include_usage")),
      bool(options.get("canvas")), timeout, logprobs, given, n, False, self.llada.model.block or c.block_length,
    )  # fmt: skip

  def _each(self, said: dict[str, Any], prompts: int) -> int:
    """Choices of each of the prompts."""
    n = _within(said, "n", 1, CHOICES) or 1
    if n * prompts > self.most_rows:
      name = "prompt" if prompts > 1 else "n"
      raise Refused(f"{name}: {n * prompts} texts are more than the {self.most_rows} that may wait", param=name)
    return n

  def _prompts(self, said: dict[str, Any]) -> list[Any]:
    """What a request gives as one (a text, ids) or as a list of these, as a list of texts or of lists of ids."""
    prompt = said["prompt"]
    if prompt == []:
      raise Refused("prompt: the list is empty", param="prompt")
    one = isinstance(prompt, str) or not isinstance(prompt[0], str | list)
    every: list[Any] = [prompt] if one else [*prompt]
    self._each(said, len(every))
    for i, x in enumerate(every):
      where = "prompt" if one else f"prompt[{i}]"
      if not isinstance(x, str if isinstance(every[0], str) else list):
        raise Refused(f"{where}={x!r:.80}: give texts alone, or lists of ids alone", param="prompt")
      if isinstance(x, list):
        self._read("prompt", lambda x=x, where=where: fields.typed(x, tuple[int, ...], where))
    return every

  def _said(self, body: dict[str, Any], more: dict[str, Any], needed: str) -> dict[str, Any]:
    """The fields of a body that say something, of their types."""
    known, said = _BOTH | more | {k: v for k, v in _SAMPLER.items() if k not in more}, {}
    for name, value in body.items():
      if name in known:
        if value is not None or (name in _SAMPLER and name not in ("temperature", "top_p")):
          said[name] = self._read(name, lambda v=value, name=name: _typed(v, known[name], name))
      elif name not in _NEUTRAL:
        near = difflib.get_close_matches(name[:80], known, 1, 0.0)[0]
        raise Refused(f"{name:.80}: there is no such field; did you mean {near}?", param=name[:80])
      elif value is not None:
        neutral = _NEUTRAL[name]
        fine = isinstance(value, neutral) if isinstance(neutral, type) else value in neutral
        if not fine:
          what = "this server does nothing of the kind; leave it out"
          what = f"expected {neutral.__name__}" if isinstance(neutral, type) else what
          raise Refused(f"{name}={json.dumps(value):.80}: {what}", param=name)
    for name in ("model", needed):
      if name not in said:
        raise Refused(f"{name} is missing", param=name)
    self._check_name(said["model"])
    return said

  def _check_name(self, name: str) -> None:
    if name != self.name:
      message = f"model={name!r:.80}: there is no such model here; use {self.name!r}"
      raise Refused(message, param="model", code="model_not_found", status=404)

  def _read(self, param: str, read: Any) -> Any:
    """What `read()` returns; its mistakes are of the field `param`, unless they name another."""
    try:
      return read()
    except Mistake as error:
      raise refused(error, param) from None

  def _options(self, said: dict[str, Any]) -> dict[str, Any]:
    """Those of `SamplerConfig` that a request says."""
    for name in ("temperature", "guidance_scale"):  # of far larger ones no logit stays a number
      _within(said, name, 0, HOT)
    options = {name: said[name] for name in _SAMPLER if name in said}
    if not (bias := said.get("logit_bias")):
      return options
    if len(bias) > BIASES:
      raise Refused(f"logit_bias: {len(bias)} ids: give at most {BIASES}", param="logit_bias")
    pairs = []
    for id, x in bias.items():
      number = isinstance(x, int | float) and not isinstance(x, bool)
      if not re.fullmatch("[0-9]{1,9}", id) or not number or not -100 <= x <= 100:
        raise Refused(f"logit_bias: {id!r:.40}: {x!r:.40}: give ids, and numbers from -100 to 100", param="logit_bias")
      pairs.append((int(id), float(x)))
    return options | {"logit_bias": tuple(pairs)}

  def _continued(self, said: dict[str, Any]) -> tuple[SamplerConfig, int | None, int | None]:
    """(settings, tokens of the text at most, those of a row that grows) of what continues a prompt."""
    options, asked = self._options(said), _most(said)
    limit = options.get("gen_length", self.defaults.gen_length)
    asked = limit if asked is None and "block_length" in options and "gen_length" not in options else asked
    if asked is not None:
      if limit is not None and "gen_length" not in options:
        W = max(options.get("block_length", self.defaults.block_length), 1)
        alone = "block_length" not in options and W == self.defaults.gen_length  # the whole canvas is one block
        free = alone or self.llada.model.block  # of whole blocks
        options["gen_length"] = asked if free or asked <= W else -(-asked // W) * W
        if not free:
          options.setdefault("block_length", W)
      limit = asked
    c = self._read("max_tokens", lambda: self.llada.settings(options))
    return c, limit, asked if c.gen_length is None else None

  def _row(self, ids: list[int], c: SamplerConfig, most: int | None, param: str) -> Row:
    """A row that continues a prompt, if the model can."""
    need, room = c.gen_length or self.llada.model.block or c.block_length, self.llada.model.max_length
    if len(ids) + need > room:
      message = f"{param}: its {len(ids)} tokens and {need} to generate are more than the {room} that this model takes"
      message += ": shorten it, or ask for fewer with max_tokens"
      raise Refused(message, param=param, code="context_length_exceeded")
    self._read(param, lambda: self._engine.extend([ids], c))
    return Row(tuple(ids), c, most=most)

  def _filled(self, said: dict[str, Any], ids: list[int], suffix: str | None) -> tuple[Row, int, int | None, str]:
    """A canvas to fill in, as `_asked` takes it."""
    options, start, limit, n = self._options(said), 0, None, _most(said)
    if suffix is not None:
      n = options.get("gen_length", self.defaults.gen_length) if n is None else n
      if n is None or n < 1:
        raise Refused("max_tokens is missing: with a suffix it says how many tokens to fill in", param="max_tokens")
      start, limit = len(ids), n
      gap = [self.llada.mask_id] * min(n, self.llada.model.max_length + 1)  # which is too long already
      ids = [*ids, *gap, *self._read("suffix", lambda: self.llada.reader().encode(suffix, begins=False))]
    elif n is not None or "gen_length" in options:
      name = next(x for x in ("max_tokens", "max_completion_tokens", "gen_length") if x in said)
      raise Refused(f"{name}={said[name]}: a text with [MASK]s has a length of its own; leave it out", param=name)
    options.pop("gen_length", None)
    if len(ids) > (room := self.llada.model.max_length):
      message = f"prompt: a canvas of {len(ids)} tokens is longer than the {room} that this model takes: shorten it"
      raise Refused(message, param="prompt", code="context_length_exceeded")
    whole = {} if self.llada.model.block else {"block_length": bucket(len(ids))}
    c = self._read("prompt", lambda: self.llada.settings(whole | options, canvas=ids.count(self.llada.mask_id)))
    self._read("prompt", lambda: self._engine.fill([ids], c))
    return Row(tuple(ids), c, fills=True), start, limit, ""

  def _ids(self, prompt: str | list[int], canvas: bool) -> list[int]:
    """Ids of a prompt; [MASK]s of a `canvas` are to be filled in."""
    text = self.llada.reader()
    if isinstance(prompt, str):
      if not canvas and "[MASK]" in prompt:
        raise Refused("suffix: this prompt holds [MASK]s, and says itself what is to be filled in", param="suffix")
      return self._read("prompt", lambda: text.encode_canvas(prompt) if canvas else text.encode(prompt))
    self._read("prompt", lambda: self._engine.check_ids(prompt, "prompt", masks=canvas))
    return prompt


_STREAM = ("include_usage", "canvas", "include_obfuscation")


def _typed(value: Any, kind: Any, name: str) -> Any:
  """As `fields.typed`, of which lists and objects are none."""
  if kind in (list, dict | None, str | list):
    wanted = {list: "a list", dict | None: "an object", str | list: "a text or a list"}[kind]
    if not isinstance(value, kind):
      raise Mistake(f"{name}={value!r:.80}: expected {wanted}")
    return value
  return fields.typed(value, kind, name)


def _within(said: dict[str, Any], name: str, least: float, most: float) -> Any:
  """A number of a request, if it says one."""
  if (n := said.get(name)) is not None and not least <= n <= most:
    raise Refused(f"{name}={n}: must be from {least:g} to {most:g}", param=name)
  return n


def _most(said: dict[str, Any]) -> int | None:
  """Tokens of the text at most, if the request says it."""
  for name in ("max_tokens", "max_completion_tokens"):
    if name in said and not 1 <= said[name] < 2**31:
      raise Refused(f"{name}={said[name]}: must be at least 1, and less than 2^31", param=name)
  found = {said[name] for name in ("max_tokens", "max_completion_tokens") if name in said}
  if len(found | {said["gen_length"]} if found and said.get("gen_length") else found) > 1:
    raise Refused(
      "max_tokens, max_completion_tokens and gen_length are not the same: use one of them", param="max_tokens"
    )
  return found.pop() if found else None


def _stops(stop: str | tuple[str, ...] | None) -> tuple[str, ...]:
  until = () if stop is None else (stop,) if isinstance(stop, str) else stop
  if len(until) > STOPS or not all(0 < len(x) <= STOP for x in until):
    raise Refused(f"stop: give at most {STOPS} strings, of 1 to {STOP} characters", param="stop")
  return until


def _messages(messages: list[Any]) -> list[dict[str, str]]:
  """Messages as a chat template takes them: a role and a text."""
  if not messages:
    raise Refused("messages: the list is empty", param="messages")
  return [_message(x, f"messages[{i}]") for i, x in enumerate(messages)]


def _message(x: Any, where: str) -> dict[str, str]:
  param = "messages"
  if not isinstance(x, dict):
    raise Refused(f"{where}={x!r:.80}: give an object with role and content", param=param)
  for name, value in x.items():  # an answer that is sent back has names of what it has not
    if name not in ("role", "content") and value not in (None, []) and (name, value) != ("type", "text"):
      raise Refused(f"{where}.{name:.80}: a message has a role and a content here; leave it out", param=param)
  role, content = x.get("role"), x.get("content")
  if role not in ("system", "developer", "user", "assistant"):
    raise Refused(f"{where}.role={role!r:.80}: use system, developer, user or assistant", param=param)
  if isinstance(content, list):
    for j, part in enumerate(content):
      fine = isinstance(part, dict) and part.keys() == {"type", "text"} and part["type"] == "text"
      if not fine or not isinstance(part["text"], str):
        message = f'{where}.content[{j}]: this model reads text alone: give {{"type": "text", "text": ...}}'
        raise Refused(message, param=param)
    content = "".join(part["text"] for part in content)
  if not isinstance(content, str):
    raise Refused(f"{where}.content={content!r:.80}: give a text", param=param)
  return {"role": "system" if role == "developer" else role, "content": content}
