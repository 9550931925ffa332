"""Every recipe is a config, found by its name; so is a file. Every field stands once, in the dataclasses."""

import dataclasses
import os
import sys
import typing

import jax
import pytest

from lladax import configs, fields
from lladax.config import DECIDED, Config, parse
from lladax.mistake import Missing, Mistake


def values(name):
  return configs.load(name).to_dict()


@pytest.mark.parametrize("name", configs.names())
def test_it_builds(name):
  config = parse(values(name))
  model = dataclasses.replace(config.model, V=config.model.V or config.tokenizer.vocab_size)
  params = jax.eval_shape(model.init, jax.random.key(0))
  letters = model.letters()
  assert jax.tree.structure(params) == jax.tree.structure(letters)
  parts = model.stacks | {"": model}
  for path, x in jax.tree_util.tree_leaves_with_path(params):
    axes = letters[path[0].key][path[1].key] if path[1:] else letters[path[0].key]
    assert x.shape == tuple(getattr(parts[path[0].key if path[1:] else ""], letter) for letter in axes)
  canvas = jax.ShapeDtypeStruct((2, config.data.length), "int32")
  logits = jax.eval_shape(lambda params, canvas: model.bind(params)(canvas), params, canvas)
  assert logits.shape == (2, config.data.length, model.V) and logits.dtype == "float32"
  assert hash(config) == hash(parse(values(name)))


def groups():
  hints = typing.get_type_hints(Config)
  return [(name, kind) for name, kind in hints.items() if dataclasses.is_dataclass(kind)]


def test_the_base_config_is_that_of_the_defaults():
  assert parse(values("base")) == Config(**{name: kind() for name, kind in groups()})


@pytest.mark.parametrize(("name", "kind"), [("", Config), *groups()], ids=lambda x: x if isinstance(x, str) else "")
def test_a_field_is_a_user_s_and_has_a_comment(name, kind):
  base, path = configs.load("base"), name and f"{name}."
  group, hints, comments = base[name] if name else base, typing.get_type_hints(kind), fields.comments(kind)
  assert set(group) == {field for field in hints if path + field not in DECIDED}
  for field in set(group) - dict(groups()).keys():
    assert (group.get_type(field) is object) == (type(None) in typing.get_args(hints[field])), "None, where it may be"
    assert len(comments[field]) > 3, f"{path}{field} has no comment"
  decided = [field for x in DECIDED for at, _, field in [x.rpartition(".")] if at == name]
  assert set(decided) <= set(hints), "what is no user's is a field"


@pytest.fixture
def here(tmp_path, monkeypatch):
  """A working directory with a config of the user's own, and a package of his that is called configs, too."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / "configs").mkdir()
  (tmp_path / "configs/base.py").write_text("raise RuntimeError('not ours')\n")
  (tmp_path / "beside.py").write_text("STEPS = 3\n")
  (tmp_path / "own.py").write_text(
    "import beside\nfrom lladax.configs import base\n\n\n"
    "def get_config(seed='1'):\n  config = base.get_config()\n"
    "  config.update(steps=beside.STEPS, seed=int(seed))\n  return config\n"
  )
  yield tmp_path
  sys.modules.pop("beside", None)


def test_a_recipe_is_found_by_name_and_a_file_by_its_path(here):
  (here / "my:own.py").write_text((here / "own.py").read_text())
  (here / "poems").touch()  # a file without a suffix hides no recipe
  path = list(sys.path)
  recipe, file = configs.load("llada_8b:v5p_4x4x4"), configs.load("own.py:7")
  assert recipe.mesh.fsdp == 16 and configs.load("llada_8b").mesh.fsdp == -1
  assert (file.steps, file.seed) == (3, 7) and configs.load(f"{here}/my:own.py").seed == 1
  assert configs.load("poems").data.text_field == "lines"
  assert configs.load(os.path.relpath(configs.FOLDER / "quickstart.py")) == configs.load("quickstart")
  assert sys.path == path


def test_a_file_that_is_changed_is_read_again(here):
  for steps in (3, 4):  # within a second, and of one size
    (here / "a.py").write_text(f"get_config = lambda: {{'steps': {steps}}}\n")
    assert configs.load("a.py").steps == steps


@pytest.mark.parametrize(
  ("spec", "text", "message"),
  [
    (
      "quikstart",
      None,
      "there is no such recipe or file; did you mean quickstart? The recipes are base, blocks, chat_tiny, ",
    ),
    ("xyz.py", None, "there is no such recipe or file. The recipes are base, blocks, chat_tiny, "),
    ("configs/quickstart.py", None, "there is no file configs/quickstart.py; the recipe of that name is --config=qui"),
    ("quickstart:fast", None, "its get_config cannot be called with 'fast' behind a colon: too many positional"),
    ("llada_8b:v5p_1x1", None, "there are settings for v5p_4x4x4, v6e_16x16, v5p_4x4x4_x2"),
    ("chat_tiny:both", None, "the stages are base and chat, or blocks"),
    ("configs", None, "configs cannot be read: Is a directory"),
    ("a.py", "x = 1\n\ndef get_config(:\n", "a.py, line 3: "),
    ("a.py", "\tx = 1\n  y = 2\n", "a.py, line "),
    ("a.py", "x = '\udcff'\n", "a.py, line 1: (unicode error)"),
    ("a.py", "x = 1\0\n", "a.py"),
    ("a.py", "import torn\n", "/torn.py, line 1: "),
    ("a.py", "x = 1\n", "a.py has no function get_config"),
    (
      "a.py",
      "get_config = lambda size: None\n",
      "its get_config cannot be called with nothing behind a colon",
    ),
    ("a.py:x", "get_config = lambda: None\n", "its get_config cannot be called with 'x' behind a colon: too many"),
    ("a.py", "get_config = lambda: None\n", "its get_config returns NoneType, not a ConfigDict"),
  ],
)
def test_what_is_no_config_is_told_in_one_line(here, spec, text, message):
  (here / "torn.py").write_text("def (\n")
  if text:
    (here / "a.py").write_text(text, "utf-8", "surrogateescape")
  with pytest.raises(Mistake) as error:
    configs.load(spec)
  assert str(error.value).startswith("--config=") and message in str(error.value) and "\n" not in str(error.value)
  assert isinstance(error.value, Missing) == ("there is no" in message)


def test_a_fault_of_the_code_of_a_file_is_no_mistake_of_the_command_line(here):
  (here / "a.py").write_text("def get_config():\n  return int('x')\n")
  with pytest.raises(ValueError) as error:
    configs.load("a.py")
  assert not isinstance(error.value, Mistake)
