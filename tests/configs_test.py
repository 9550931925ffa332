"""Every recipe is a config; the defaults of the code are those of configs/base.py."""

import dataclasses
import importlib
import pathlib
import typing

import jax
import pytest

from lladax.config import Config, parse
from lladax.sampling import SamplerConfig

FILES = (pathlib.Path(__file__).parent.parent / "configs").glob("*.py")
NAMES = sorted(path.stem for path in FILES if path.stem != "workdir")  # which is the config of a run


def values(name):
  return importlib.import_module(f"configs.{name}").get_config().to_dict()


@pytest.mark.parametrize("name", NAMES)
def test_it_builds(name):
  config = parse(values(name))
  model = dataclasses.replace(config.model, V=config.model.V or config.tokenizer.vocab_size)
  params = jax.eval_shape(model.init, jax.random.key(0))
  letters = model.letters()
  assert jax.tree.structure(params) == jax.tree.structure(letters)
  for x, axes in zip(jax.tree.leaves(params), jax.tree.leaves(letters), strict=True):
    assert x.shape == tuple(getattr(model, letter) for letter in axes)
  canvas = jax.ShapeDtypeStruct((2, config.data.length), "int32")
  logits = jax.eval_shape(lambda params, canvas: model.bind(params)(canvas), params, canvas)
  assert logits.shape == (2, config.data.length, model.V) and logits.dtype == "float32"
  assert hash(config) == hash(parse(values(name)))


def groups():
  hints = typing.get_type_hints(Config)
  return [(name, kind) for name, kind in hints.items() if dataclasses.is_dataclass(kind)]


@pytest.mark.parametrize(("name", "kind"), groups(), ids=lambda x: x if isinstance(x, str) else "")
def test_a_default_is_that_of_the_base_config(name, kind):
  base = values("base")[name]
  defaults = {f.name: f.default for f in dataclasses.fields(kind) if f.default is not dataclasses.MISSING}
  assert {field: default for field, default in defaults.items() if field in base} == {
    field: value for field, value in base.items() if field in defaults
  }


def test_the_base_config_has_every_option_of_the_sampler():
  assert set(values("base")["sample"]) == {field.name for field in dataclasses.fields(SamplerConfig)}
