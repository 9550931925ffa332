import pathlib

import pytest
import yaml

from lladax.mistake import Mistake

pytest.importorskip("lm_eval")
from lladax.evaluation import kwargs

pytestmark = [
  pytest.mark.usefixtures("quick_compiles"),
  pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the harness and of what it imports
]


@pytest.mark.parametrize(
  ("asked", "understood"),
  [
    ({"max_new_tokens": 7}, {"max_gen_toks": 7}),
    ({"max_tokens": 7}, {"max_gen_toks": 7}),
    ({"max_completion_tokens": 7, "until": None}, {"max_gen_toks": 7}),
    ({"until": ["a", ""]}, {"until": ["a"]}),
    ({"temperature": 0.7}, {"temperature": 0.7}),
    ({"do_sample": True}, {"temperature": 1.0}),
    ({"do_sample": True, "temperature": 0.2, "top_p": 1.0, "num_beams": 1}, {"temperature": 0.2}),
    ({"do_sample": False, "temperature": 0.0, "top_p": 0.95, "top_k": 50}, {}),  # nothing is drawn
    ({"temperature": 0.2, "top_p": 0.95, "top_k": -1}, {"temperature": 0.2, "top_p": 0.95}),
    ({"temperature": 0.2, "top_p": 1, "top_k": 50}, {"temperature": 0.2, "top_k": 50}),
    ({"infill": "<here>", "steps": 3}, {"infill": "<here>", "steps": 3}),
  ],
)
def test_a_request_is_understood_as_the_harness_understands_it(asked, understood):
  assert kwargs.understood(asked) == {"until": [], "max_gen_toks": 256, "temperature": 0.0} | understood


def test_what_a_request_says_twice_is_said_once(caplog):
  logger = "lm_eval.models.utils"
  with caplog.at_level("WARNING", logger):
    for _ in range(3):
      assert kwargs.understood({"do_sample": False, "temperature": 0.625})["temperature"] == 0.0
      assert kwargs.understood({"max_tokens": 5, "max_gen_toks": 6})["max_gen_toks"] == 6
  said = [record.getMessage() for record in caplog.records if record.name == logger]
  assert len(said) == 2 and "0.625" in said[0] and "max_tokens" in said[1]


def test_every_task_of_the_harness_is_understood_or_refused_by_name():
  """A new version of the harness, with a field that no task had before, fails here."""
  import lm_eval.tasks

  class Loader(yaml.CSafeLoader if hasattr(yaml, "CSafeLoader") else yaml.SafeLoader):
    pass

  Loader.add_multi_constructor("!", lambda loader, suffix, node: None)
  known, refused = 0, []
  for path in pathlib.Path(lm_eval.tasks.__file__).parent.rglob("*"):
    if path.suffix not in ("", ".yaml", ".yml") or not path.is_file() or "generation_kwargs" not in path.read_text():
      continue
    try:
      kwargs.understood(yaml.load(path.read_text(), Loader).get("generation_kwargs") or {})
      known += 1
    except Mistake as error:
      refused.append(str(error))
  assert known > 400 and {said.partition(";")[0] for said in refused} == {
    "generation_kwargs: num_beams=10: lladax's sampler has no num_beams",
  }
