"""What lm-eval's keywords mean: of a model (`model_args`), and of a request (`generation_kwargs`)."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from lladax.devices import sharding
from lladax.mistake import Mistake
from lladax.sampling import SamplerConfig

try:
  from lm_eval.models.utils import normalize_gen_kwargs
except ModuleNotFoundError as error:
  raise Mistake(f"the lm-evaluation-harness is an extra ({error}): pip install 'lladax[eval]'") from error

_ALIASES = {"cfg": "guidance_scale", "mc_num": "num_samples"}  # the official adapter's names
SAMPLER = {field.name: field.default for field in dataclasses.fields(SamplerConfig)}
OWN = {"num_samples": 128, "greedy": False}
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # one thing; the first one counts

# What models of the harness know, with the values that change nothing. Of a draw: what chooses among its tokens; ours
# has the first two.
_CHOICES: dict[str, tuple] = {"top_p": (1,), "top_k": (0, -1)}
_OF_DRAWS: dict[str, tuple] = _CHOICES | {"min_p": (0,), "typical_p": (1,)}
_NEUTRAL: dict[str, tuple] = _OF_DRAWS | {
  "num_beams": (1,), "num_return_sequences": (1,), "n": (1,), "best_of": (1,), "early_stopping": (False,),
  "length_penalty": (1,), "repetition_penalty": (1,), "frequency_penalty": (0,), "presence_penalty": (0,),
  "no_repeat_ngram_size": (0,), "use_cache": (False, True),
}  # fmt: skip
_MEANT = {"stop": "until", "stop_sequences": "until", "max_length": "max_gen_toks", "cfg": "guidance_scale"}


def split_options(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
  """(fields of MeshConfig, the other options by their own names); Mistake for what is none, or has a bad value."""
  axes = {field.name for field in dataclasses.fields(sharding.MeshConfig)}
  mesh = {name: value for name, value in given.items() if name in axes}
  options = {_ALIASES.get(name, name): value for name, value in given.items() if name not in axes}
  for name, value in options.items():
    if name not in OWN and name not in SAMPLER:
      near = difflib.get_close_matches(name, [*OWN, *SAMPLER, *axes, *_ALIASES], 1, 0.0)[0]
      raise Mistake(f"{name}={value!r}: there is no such option; did you mean {near}?")
  if not _is(options.get("num_samples", 1), int) or options.get("num_samples", 1) < 1:
    raise Mistake(f"num_samples={options['num_samples']!r}: must be a positive number")
  if not isinstance(options.get("greedy", False), bool):
    raise Mistake(f"greedy={options['greedy']!r}: must be True or False")
  SamplerConfig(**{name: value for name, value in options.items() if name in SAMPLER})
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
    Mistake: an unknown field; one of other models, such as min_p, at a value that changes something; a bad value.
  """
  asked = {name: value for name, value in asked.items() if value is not None}
  known = {"until", "do_sample", "temperature", "infill", *_LENGTHS, *SAMPLER}
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
  for name in asked.keys() & _CHOICES.keys():
    if not temperature or asked[name] in _CHOICES[name]:  # nothing is drawn, or all may be
      asked.pop(name)
  for name in asked.keys() & _NEUTRAL.keys() - _CHOICES.keys():
    if asked[name] not in _NEUTRAL[name] and (temperature or name not in _OF_DRAWS):
      neutral = _NEUTRAL[name][0]
      raise Mistake(
        f"generation_kwargs: {name}={asked[name]!r}: lladax's sampler has no {name}; set it to {neutral}"
        f" (--gen_kwargs {name}={neutral}), or leave it out"
      )
  own = {name: asked[name] for name in asked if name in SAMPLER or name == "infill"}
  own |= {"temperature": temperature, "max_gen_toks": told["max_gen_toks"]}
  return own | {"until": [stop for stop in until if stop]}
