import dataclasses

import numpy as np
import pytest
from rows import EOS, Letters

from lladax.data import sources
from lladax.data.windows import DataConfig


def test_a_file_that_was_edited_is_read_anew_and_one_that_is_gone_is_kept(tmp_path):
  path, test = tmp_path / "a.txt", tmp_path / "test.txt"
  test.write_text("never")
  c = DataConfig(corpus=f"files:{path}", length=4, held_out=0.0, exclude=f"{test}")
  text = Letters()
  test.write_text("one two three four five six seven eight")
  for content in ("first", "other"):  # as long as before
    path.write_text(content)
    assert sources.texts(c) == ([content], [])
    np.testing.assert_array_equal(sources.training(c, text, 0)[0].stream_T, [*map(ord, content), EOS])
  path.unlink()
  assert sources.texts(c) == (["other"], [])
  assert len(sources.training(c, text, 0)[0].stream_T) == 6
  path.write_text("x one two three four five six seven eight")
  with pytest.raises(ValueError, match="every document was left out"):
    sources.texts(c)
  test.write_text("one two three four five six seven NINE")
  assert len(sources.texts(c)[0]) == 1
  test.unlink()
  assert len(sources.texts(c)[0]) == 1


def test_what_was_read_and_left_out_is_said(tmp_path):
  (tmp_path / "a.jsonl").write_text('{"text": "abcdefg"}\noh\n{"text": "one two three four five six seven eight"}\n')
  (tmp_path / "b.txt").write_text("plain")
  (tmp_path / "test.json").write_text('["one two three four five six seven eight", "A"]')
  c = DataConfig(corpus=f"files:{tmp_path}/a.jsonl,{tmp_path}/b.txt", length=4, held_out=0.0, bad_lines="skip")
  about = sources.training(dataclasses.replace(c, exclude=f"{tmp_path}/test.json"), Letters(), 0)[0].about
  assert about.startswith("2 documents (12 bytes, 14 tokens); 1 bad lines left out; 1 left out: they hold a text of")
  assert "; files: 1 .jsonl, 1 .txt; looked for: 1 texts; 1 shorter than 8 words or 31 characters are not used" in about
