import json

import pytest

pytest.importorskip("lm_eval")
pytestmark = [
  pytest.mark.usefixtures("quick_compiles"),
  pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the harness and of what it imports
]


def test_rows_of_a_file_that_was_edited_are_read_anew(tmp_path):
  from lladax.evaluation.tasks import local

  for answer in "ab":  # as long as before
    (tmp_path / "x.jsonl").write_text(json.dumps({"answer": answer}) + "\n")
    assert local.rows("x", tmp_path) == [{"answer": answer}]
  (tmp_path / "y.json").write_text('[{"answer": "c"}]')
  assert local.rows("y", tmp_path) == [{"answer": "c"}]


def test_the_right_programs_pass(data_dir):
  from lladax.evaluation.tasks import local

  (row,) = local.rows("eval/humaneval", data_dir)
  assert local.humaneval(row, [row["canonical_solution"]]) == {"pass@1": 1.0}
  assert local.humaneval_instruct(row, ["  return x + 1\n```\nno code"]) == {"pass@1": 1.0}
  assert local.humaneval(row, ["  return x\n"]) == {"pass@1": 0.0}
  line = local.rows("eval/humaneval_infill_single_line", data_dir)[0]
  assert local.infill_line(line, ["  y = x + 1"]) == local.infill_span(line, ["  y = x + 1\n"]) == {"pass@1": 1.0}
  shots = local.OtherProblems(local.rows("eval/humaneval_infill_single_line", data_dir)).sample(2, eval_doc=line)
  assert [row["entry_point"] for row in shots] == ["g", "h"]
  task = {"test_list": ["assert y == 2"] * 3, "test_setup_code": "y = f(1)"}
  assert local.mbpp(task, ["def f(x):\r\n  return x + 1"]) == {"pass@1": 1.0}
  assert local.mbpp_instruct(task, ["def f(x):\n  return x + 1\n```\nDone."]) == {"pass@1": 1.0}
  assert local.mc2({"labels": [1, 0]}, [(-1000.0, False), (-1000.0, False)]) == {"acc": 0.5}
