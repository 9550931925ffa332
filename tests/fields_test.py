"""What comes from outside is of the type that its field declares, at the door of configs and at that of Python."""

import dataclasses

import numpy as np
import pytest

from lladax import fields, sampling
from lladax.autoregressive import Causal
from lladax.config import Config
from lladax.mistake import Mistake, Unknown
from lladax.sampling import SamplerConfig


@pytest.mark.parametrize(
  ("value", "kind", "expected"),
  [
    (3, int, 3),
    (np.int64(3), int, 3),
    (np.array(3), int, 3),
    (3, float, 3.0),
    (np.float32(0.5), float, 0.5),
    (np.True_, bool, True),
    (None, int | None, None),
    (2, float | None, 2.0),
    ([1, 2], tuple[int, ...], (1, 2)),
    (np.array([1, 2]), tuple[int, ...], (1, 2)),
    ([[1, 0.5]], tuple[tuple[int, float], ...], ((1, 0.5),)),
    (5, int | tuple[int, ...], 5),
    ([5, 6], int | tuple[int, ...], (5, 6)),
  ],
)
def test_a_value_of_the_type_comes_out_plain(value, kind, expected):
  found = fields.typed(value, kind, "x")
  assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
  ("value", "kind", "said"),
  [
    (2.5, int, "x=2.5: expected int, not float"),
    (np.float64(2.0), int, "x=2.0: expected int, not float"),
    ("8", int | None, "x='8': expected int, not str"),
    (True, int, "x=True: expected int, not bool"),
    (True, float, "x=True: expected float, not bool"),
    (1, bool, "x=1: expected bool, not int"),
    ("no", bool, "x='no': expected bool, not str"),
    (None, int, "x=None: expected int, not NoneType"),
    ([1, 2.5], tuple[int, ...], "x[1]=2.5: expected int, not float"),
    ([1, True], int | tuple[int, ...], "x[1]=True: expected int, not bool"),
    ("12", int | tuple[int, ...], "x='12': expected int, not str"),
    ("y" * 9999, int, f"x='{'y' * 199}...: expected int, not str"),
  ],
)
def test_another_type_is_one_clear_line(value, kind, said):
  with pytest.raises(Mistake) as error:
    fields.typed(value, kind, "x")
  assert str(error.value) == said


@dataclasses.dataclass
class _Noted:
  """A group."""

  a: int = 1  # behind: "ä" # and more
  # Before it,
  # on two lines.
  b: str = "# no comment"
  # Before,
  c: tuple[str, ...] = (  # not in
    "é",
  )  # and behind.
  d: bool = False

  def method(self):
    self.e: int = 2  # no field
    a: int = self.a  # a variable
    return a


def test_the_comment_of_a_field():
  assert fields.comments(_Noted) == {
    "a": 'behind: "ä" # and more',
    "b": "Before it, on two lines.",
    "c": "Before, and behind.",
    "d": "",
  }


def test_every_field_of_a_sampler_is_typed_however_it_is_made():
  wrong = {int: 2.5, float: "0.5", bool: 1, str: 3}
  for name, default in vars(SamplerConfig()).items():
    value = next((x for kind, x in wrong.items() if type(default) is kind), b"")
    with pytest.raises(Mistake, match=f"^sample.{name}=.*: expected "):
      SamplerConfig(**{name: value})
  assert SamplerConfig(temperature=1, seed=[1, 2]) == SamplerConfig(temperature=1.0, seed=(1, 2))
  with pytest.raises(Unknown, match="^sample.lenght: there is no such field; did you mean sample.gen_length"):
    fields.parse({"lenght": 3}, SamplerConfig, "sample")


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"seed": 2**32}, "seed=4294967296: must be from 0 to 2^32 - 1"),
    ({"seed": -1}, "seed=-1: must be from 0 to 2^32 - 1"),
    ({"sample.seed": 2**32}, "sample.seed=4294967296: must be from 0 to 2^32 - 1"),
    ({"objective": "autoregressive", "sample.guidance_scale": 0.5}, "sample.guidance_scale=0.5: a causal model has no"),
    ({"objective": "autoregressive", "sample.gen_length": None}, "sample.gen_length=None: a causal model stops at EOS"),
  ],
)
def test_a_config_is_held_to_the_same(tiny, changes, said):
  with pytest.raises(Mistake) as error:
    tiny(changes)
  assert str(error.value).startswith(said) and "\n" not in str(error.value)


def test_a_config_has_one_seed(tiny):
  config = tiny({"seed": 2**32 - 1, "sample.seed": 2**31})
  with pytest.raises(Mistake, match=r"^sample.seed=\(1, 2\): a config has one seed"):
    Config(**vars(config) | {"sample": SamplerConfig(seed=(1, 2))})


def test_a_causal_model_keeps_what_has_no_meaning_for_it():
  Causal().check_sampler(SamplerConfig(gen_length=128, block_length=1, remasking="random", early_stop=True))
  Causal().check_sampler(SamplerConfig(gen_length=8, steps=8, logits_eos_inf=True, temperature=0.7))


def test_seeds_of_several_calls_differ_and_the_first_is_the_seed_itself():
  seeds = [sampling.nth_seed(seed, n) for seed in range(30) for n in range(30)]
  assert len(set(seeds)) == 900 and seeds[::30] == list(range(30)) and all(0 <= seed < 2**32 for seed in seeds)
  assert sampling.nth_seed(0, 1) == 3964924996  # the same on every machine
