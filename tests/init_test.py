"""The public names: what `lladax.train` takes; the others have tests where they stand."""

import json

import pytest

import lladax
from lladax.config import given, parse
from lladax.configs import base
from lladax.mistake import Missing

pytestmark = pytest.mark.usefixtures("quick_compiles")


def test_a_name_a_file_a_configdict_and_a_config_are_one_run(tiny_values, tiny, tmp_path, monkeypatch):
  (tmp_path / "mine.py").write_text(
    "from lladax.configs import base\n\n"
    "def get_config(steps):\n  config = base.get_config()\n"
    f"  config.update_from_flattened_dict({tiny_values!r} | {{'steps': int(steps)}})\n  return config\n"
  )
  monkeypatch.chdir(tmp_path)
  config = base.get_config()
  config.update_from_flattened_dict(tiny_values | {"steps": 5})
  assert {given(x) for x in ("mine.py:5", tmp_path / "mine.py:5", config, tiny({"steps": 5}))} == {given(config)}
  assert given("quickstart") == parse(lladax.configs.load("quickstart").to_dict())
  found = lladax.train("mine.py:5", "run")
  (line,) = map(json.loads, (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines())
  assert line == {"step": 5} | found and {"bits_per_byte", "perplexity_stderr"} <= found.keys()
  assert lladax.train(config, tmp_path / "run") == found  # the run is finished, and only evaluated again
  assert lladax.load("run").tokenizer.encode("a") == [97]
  with pytest.raises(lladax.Mistake, match="^run holds a run with another config .seed: 0 there, 1 here."):
    lladax.train(tiny({"seed": 1, "steps": 5}), "run")


def test_a_config_that_is_none_is_refused_as_on_the_command_line(tiny, tmp_path):
  unknown = base.get_config()
  unknown.data.unlock()
  unknown.data.lenght = 3
  for config, kind, said in (
    ("quickstrat", Missing, "--config=quickstrat: there is no such recipe or file; did you mean quickstart?"),
    ("llada_8b:v9", lladax.Mistake, "--config=...:v9: there are settings for v5p_4x4x4"),
    (unknown, lladax.Mistake, "config.data.lenght: there is no such field; did you mean config.data.length?"),
    ({"steps": 3}, lladax.Mistake, "config={'steps': 3}: give a recipe's name, the path of a file, a ConfigDict or"),
    (tiny({"data.corpus": "nothing"}), lladax.Mistake, "data.corpus='nothing' is unknown"),
  ):
    with pytest.raises(kind) as error:
      lladax.train(config, tmp_path / "run")
    assert str(error.value).startswith(said) and "\n" not in str(error.value)
  assert not (tmp_path / "run").exists()
