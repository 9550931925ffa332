import gzip
import json
import lzma
import pathlib
import unicodedata

import pytest

from lladax import corpus

TEXTS = ["first\nline two", "zweite Zeile: äöü", "第三\u2028句 😀"]


def write(path: pathlib.Path, content: str | bytes) -> pathlib.Path:
  path.parent.mkdir(parents=True, exist_ok=True)
  content = content.encode() if isinstance(content, str) else content
  pack = {".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)
  path.write_bytes(pack(content))
  return path


def json_lines(field: str = "text") -> str:
  return "".join(json.dumps({"id": 1, field: text}, ensure_ascii=False) + "\n" for text in TEXTS)


def test_unicode_names_every_named_character_once():
  names = corpus.documents("unicode")
  codes = [ord(unicodedata.lookup(name)) for name in names]
  assert codes == sorted(set(codes))
  assert 25_000 < len(names) < 50_000
  assert {"SPACE", "GREEK SMALL LETTER ALPHA", "HANGUL LETTER KIYEOK"} <= set(names)
  by_rule = ("CJK UNIFIED IDEOGRAPH-", "CJK COMPATIBILITY IDEOGRAPH-", "HANGUL SYLLABLE ")
  by_rule += ("TANGUT IDEOGRAPH-", "NUSHU CHARACTER-", "KHITAN SMALL SCRIPT CHARACTER-")
  assert not [name for name in names if name.startswith(by_rule)]


def test_stdlib_is_source_code_without_tests():
  texts = corpus.documents("stdlib")
  assert 300 < len(texts) < 2000
  assert 5e6 < sum(map(len, texts)) < 5e7
  assert pathlib.Path(json.__file__).read_text(encoding="utf-8") in texts
  assert pathlib.Path(pytest.__file__).read_text(encoding="utf-8") not in texts


def test_stdlib_order_and_what_is_left_out(tmp_path):
  write(tmp_path / "b.py", "b")
  write(tmp_path / "a" / "z.py", "z")
  write(tmp_path / "latin.py", "# -*- coding: latin-1 -*-\n# ä\r\n".encode("latin-1"))
  write(tmp_path / "broken.py", b"# \xff")
  write(tmp_path / "no_such_encoding.py", "# -*- coding: klingon -*-\n")
  for name in ("test", "a/tests", "idle_test", "site-packages/x", "dist-packages", "__pycache__"):
    write(tmp_path / name / "left_out.py", "left out")
  expected = ["z", "b", "# -*- coding: latin-1 -*-\n# ä\n"]
  assert list(corpus._stdlib(tmp_path)) == expected


@pytest.mark.parametrize("packed", ["", ".gz", ".xz"])
def test_files_of_every_kind(tmp_path, packed):
  write(tmp_path / f"a.jsonl{packed}", json_lines() + "\n" + json.dumps({"text": " \n"}))
  write(tmp_path / "deep" / "er" / f"b.txt{packed}", "\ufeffplain text")
  write(tmp_path / f"c.py{packed}", "")
  assert corpus.documents(f"files:{tmp_path}/*.jsonl{packed}") == TEXTS
  assert corpus.documents(f"files:{tmp_path}/**/*") == [*TEXTS, "plain text"]


def test_the_order_is_fixed_and_a_file_counts_once(tmp_path):
  for name in ("b.md", "a.txt", "c.txt"):
    write(tmp_path / name, name)
  expected = ["a.txt", "b.md", "c.txt"]
  assert corpus.documents(f"files:{tmp_path}/*.txt, {tmp_path}/b.md,{tmp_path}/a*") == expected


def test_home_and_text_field(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  write(tmp_path / "poems.jsonl", json_lines("title") + json.dumps({"title": ["one", "two"]}))
  assert corpus.documents("files:~/poems.jsonl", "title") == [*TEXTS, "one\ntwo"]


@pytest.mark.parametrize("name", ["nonsense", "files:", "files", "unicode:x", ""])
def test_unknown_corpus_lists_the_known(name):
  with pytest.raises(ValueError, match="data.corpus=.* use unicode, stdlib or files:GLOB"):
    corpus.documents(name)


def test_a_glob_without_files(tmp_path):
  write(tmp_path / "folder" / "a.txt", "a")
  with pytest.raises(FileNotFoundError, match="data.corpus=files:.* no file matches '.*/fold.*'"):
    corpus.documents(f"files:{tmp_path}/folder/a.txt,{tmp_path}/fold*")


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ('{"body": "x", "id": 3}', r"data.text_field='text' is not in .*a.jsonl line 4: \['body', 'id"),
    ('["x"]', "data.text_field='text' is not in .*a.jsonl line 4: a list"),
    ('{"text": 3}', "data.text_field='text' is no text in .*a.jsonl line 4"),
    ('{"text": ["x", 3]}', "data.text_field='text' is no text in .*a.jsonl line 4"),
    ('{"text": "x"', "data.corpus=.*a.jsonl line 4 is not JSON"),
    ('{"text": "\\ud800"}', "data.corpus=.*a.jsonl line 4: a lone surrogate"),
  ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
  path = write(tmp_path / "a.jsonl", json_lines() + line + "\n")
  with pytest.raises(ValueError, match=message) as error:
    corpus.documents(f"files:{path}")
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz"])
def test_invalid_utf8_names_the_file(tmp_path, name):
  path = write(tmp_path / name, b'{"text": "\xff"}')
  with pytest.raises(ValueError, match=f"data.corpus=.*{name} is not UTF-8"):
    corpus.documents(f"files:{path}")


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.xz"])
@pytest.mark.parametrize("cut", [False, True])
def test_a_damaged_archive_names_the_file(tmp_path, name, cut):
  path = write(tmp_path / name, json_lines())
  path.write_bytes(path.read_bytes()[:-9] if cut else b"not an archive")
  with pytest.raises(ValueError, match=f"data.corpus=.*{name} cannot be read"):
    corpus.documents(f"files:{path}")


def test_an_empty_corpus(tmp_path):
  path = write(tmp_path / "a.txt", " \n")
  with pytest.raises(ValueError, match="data.corpus=.* holds no text"):
    corpus.documents(f"files:{path}")


def test_split_is_a_partition_that_keeps_order_and_duplicates_together():
  texts = [f"text {i % 4000}" for i in range(5000)]
  train, held_out = corpus.split(texts, 0.1)
  assert not set(train) & set(held_out)
  in_held_out = set(held_out)
  assert held_out == [text for text in texts if text in in_held_out]
  assert train == [text for text in texts if text not in in_held_out]
  assert 0.08 < len(held_out) / len(texts) < 0.12


def test_split_of_a_document_depends_on_itself_only():
  texts = [f"text {i}" for i in range(1000)]
  held_out = corpus.split(texts, 0.1)[1]
  assert corpus.split(texts[::-1], 0.1)[1] == held_out[::-1]
  assert set(held_out) < set(corpus.split(texts, 0.2)[1])
  assert held_out[:3] == ["text 2", "text 3", "text 6"]  # on every machine, for ever


def test_split_without_holding_out():
  assert corpus.split(TEXTS, 0) == (TEXTS, [])


@pytest.mark.parametrize("held_out", [-0.1, 1, 1.5, float("nan")])
def test_split_refuses_a_fraction(held_out):
  with pytest.raises(ValueError, match="data.held_out=.*: must be at least 0 and less than 1"):
    corpus.split(TEXTS, held_out)


@pytest.mark.parametrize(("held_out", "part"), [(1e-9, "held-out"), (1 - 1e-9, "training")])
def test_split_refuses_an_empty_part(held_out, part):
  with pytest.raises(ValueError, match=f"data.held_out=.* leaves the {part} part of 3 documents"):
    corpus.split(TEXTS, held_out)
