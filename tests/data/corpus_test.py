import gzip
import json
import lzma
import pathlib
import unicodedata

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
from backports import zstd

from lladax.data import contamination, corpus

TEXTS = ["first\nline two", "zweite Zeile: äöü", "第三\u2028句 😀"]


def write(path: pathlib.Path, content: str | bytes) -> pathlib.Path:
  path.parent.mkdir(parents=True, exist_ok=True)
  content = content.encode() if isinstance(content, str) else content
  pack = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstd.compress}.get(path.suffix, bytes)
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
  assert [text for _, text in corpus._stdlib(tmp_path)] == expected


@pytest.mark.parametrize("packed", ["", ".gz", ".xz", ".zst"])
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
  with pytest.raises(ValueError, match="data.corpus=.* use unicode, stdlib, facts, files:GLOB"):
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
  with pytest.raises(ValueError, match=f"data.corpus=.*{name}( line 1)? is not UTF-8"):
    corpus.documents(f"files:{path}")


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.xz", "a.jsonl.zst"])
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


def test_parquet_and_a_list_of_json(tmp_path):
  table = pyarrow.table({"text": TEXTS, "title": ["a", "b", "c"]})
  pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
  write(tmp_path / "b.json", json.dumps([{"text": text} for text in TEXTS]))
  assert corpus.documents(f"files:{tmp_path}/*") == TEXTS * 2
  assert corpus.documents(f"files:{tmp_path}/a.parquet", "title,text")[0] == f"a\n{TEXTS[0]}"
  with pytest.raises(ValueError, match="data.text_field='body' is not in .*a.parquet row 1: "):
    corpus.documents(f"files:{tmp_path}/a.parquet", "body")
  write(tmp_path / "d.parquet", "no parquet")
  with pytest.raises(ValueError, match="d.parquet cannot be read"):
    corpus.documents(f"files:{tmp_path}/d.parquet")


def test_files_at_an_address():
  fsspec.filesystem("memory").pipe("/corpus/a.jsonl", json_lines().encode())
  fsspec.filesystem("memory").pipe("/corpus/b.txt.gz", gzip.compress(b"x\r\ny"))
  assert corpus.parts("files:memory://corpus/*") == ["memory:///corpus/a.jsonl", "memory:///corpus/b.txt.gz"]
  assert corpus.documents("files:memory://corpus/*") == [*TEXTS, "x\ny"]
  with pytest.raises(ValueError, match="data.corpus=files:nowhere://.* cannot be opened"):
    corpus.documents("files:nowhere://corpus/*")


def test_parts_are_the_corpus(tmp_path):
  for name in "ab":
    write(tmp_path / f"{name}.jsonl", json_lines())
  tally = corpus.Tally()
  parts = corpus.parts(f"files:{tmp_path}/*")
  assert [text for part in parts for text in corpus.read_texts(part, "text", tally)] == TEXTS * 2
  assert len(parts) == 2 and tally.items == 6


def test_bad_lines_are_counted_where_that_is_wanted(tmp_path, caplog):
  bad = ['{"text": 3}', "no json", '{"body": "x"}', '{"text": "\\ud800"}', '{"text": ""}', '"x"']
  path = write(tmp_path / "a.jsonl", json_lines().encode() + "\n".join(bad).encode() + b'\n{"text": "\xff"}\n')
  tally = corpus.Tally("skip")
  assert corpus.documents(f"files:{path}", tally=tally) == [*TEXTS, "x"]
  assert (tally.items, tally.empty, tally.bad) == (4, 1, 5)
  assert [record.message.count("a.jsonl line") for record in caplog.records] == [1] * 5
  with pytest.raises(ValueError, match=r"a.jsonl line 4; mend it, or .*--config.data.bad_lines=skip"):
    corpus.documents(f"files:{path}")


LONG = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May."


def documents_without(test, texts, folder):
  path = write(folder / "texts.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in texts))
  tally = corpus.Tally(exclude=str(test))
  return corpus.documents(f"files:{path}", tally=tally), tally


def test_what_holds_a_text_of_a_test_is_left_out(tmp_path):
  test = write(tmp_path / "test.json", json.dumps([{"question": LONG, "answer": "A", "id": [{"more": "ab"}]}]))
  texts = ["A dog.", "xab", f"He read: {LONG.upper()}", "in April, and then she sold half as many clips in"]
  found, tally = documents_without(test, texts, tmp_path)
  assert found == [texts[0], texts[1], texts[3]]
  assert (tally.items, tally.excluded) == (3, {"test.json": 1})
  assert contamination.excluded(str(test)).about.startswith("1 texts; 2 shorter than 8 words")
  chat = write(tmp_path / "b.jsonl", json.dumps({"prompt": LONG, "response": "ab"}))
  with pytest.raises(ValueError, match=r"no conversation with a reply: .*left out \(1 holding a text of data.exclude"):
    corpus.conversations(f"files:{chat}", tally=corpus.Tally(exclude=str(test)))


def test_named_fields_of_a_test_count_however_short_and_no_others(tmp_path):
  record = {"first": "春眠不觉晓", "deep": [{"second": ["处处", "闻啼鸟"]}], "source": LONG}
  test = write(tmp_path / "test.jsonl.xz", json.dumps(record))
  texts = ["春眠不觉晓，处", "春眠不晓觉，晓", "夜来闻啼鸟", f"{LONG} 花落知多少"]
  assert documents_without(f"{test}:first,second", texts, tmp_path)[0] == [texts[1], texts[3]]
  assert documents_without(f"{test}:first", texts, tmp_path)[0] == texts[1:]
  assert documents_without(test, texts, tmp_path)[0] == texts[:3]


QUESTION, ANSWER = {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hi."}


@pytest.mark.parametrize(
  "record",
  [
    {"messages": [QUESTION, ANSWER, {"role": "user", "content": "left out"}]},
    {"instruction": "Hi?", "input": "", "output": "Hi."},
    {"instruction": "Hi?", "response": "Hi."},
    {"prompt": "Hi?", "response": "Hi."},
    {"prompt": "Hi?", "completion": "Hi.", "id": 3},
    {"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Hi."}]},
    {"conversation": [QUESTION, ANSWER | {"weight": 1, "id": "x", "tool_calls": None}], "messages": None},
    {"messages": [QUESTION | {"content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i?"}]}, ANSWER]},
  ],
)
def test_conversations_of_every_kind(tmp_path, record):
  path = write(tmp_path / "a.jsonl", json.dumps(record))
  assert corpus.conversations(f"files:{path}") == [[QUESTION, ANSWER]]


def test_conversations_by_fields_and_with_an_input(tmp_path):
  path = write(tmp_path / "a.jsonl", json.dumps({"question": "Hi?", "answer": "Hi."}))
  assert corpus.conversations(f"files:{path}", "question", "answer") == [[QUESTION, ANSWER]]
  path = write(tmp_path / "b.jsonl", json.dumps({"instruction": "Add.", "input": "1 2", "output": "3"}))
  assert corpus.conversations(f"files:{path}")[0][0]["content"] == "Add.\n\n1 2"


def test_a_system_message_in_all_its_places(tmp_path):
  records = [
    {"messages": [{"role": "system", "content": "Be kind."}, QUESTION, ANSWER]},
    {"messages": [{"role": "developer", "content": "Be kind."}, QUESTION, ANSWER]},
    {"system": "Be kind.", "conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Hi."}]},
    {"system": "Be kind.", "instruction": "Hi?", "output": "Hi."},
  ]
  path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, records)))
  assert corpus.conversations(f"files:{path}") == [[{"role": "system", "content": "Be kind."}, QUESTION, ANSWER]] * 4


def test_a_reply_of_weight_0_is_said_and_not_learnt(tmp_path):
  other = ANSWER | {"content": "Bye."}
  records = [[QUESTION, ANSWER | {"weight": 0}, QUESTION, other | {"weight": 1}, QUESTION, ANSWER | {"weight": 0}]]
  records += [[QUESTION, ANSWER | {"weight": 0}]]
  path = write(tmp_path / "a.jsonl", "\n".join(json.dumps({"messages": x}) for x in records))
  tally = corpus.Tally()
  found = corpus.conversations(f"files:{path}", tally=tally)
  assert found == [[QUESTION, ANSWER | {"weight": 0}, QUESTION, other]] and tally.empty == 1
  assert corpus.replies(found[0]) == [3]


@pytest.mark.parametrize(
  ("record", "message"),
  [
    (
      {"messages": [{"role": "robot", "content": "x"}]},
      "line 1: the role 'robot' is unknown to the chat template: use sys",
    ),
    ({"messages": [{"role": "user"}]}, "line 1: content is no text but NoneType"),
    ({"messages": "x"}, "line 1: messages is no list of objects"),
    (
      {"question": "x", "answer": "y"},
      r"line 1 has the fields \['question', 'answer'\], and no 'prompt'.*prompt_field",
    ),
    ({"prompt": "x", "response": 3}, "line 1: response is no text but int"),
    (["x"], "line 1 is no record with fields"),
    ({"messages": [QUESTION | {"role": "tool", "tool_call_id": "x"}]}, "line 1: the role 'tool' is unknown"),
    ({"messages": [QUESTION | {"role": ["user"]}]}, r"line 1: the role \['user'\] is unknown"),
    ({"messages": [QUESTION, ANSWER | {"tool_calls": [{}]}]}, "line 1: the field 'tool_calls' of a message is not"),
    ({"messages": [QUESTION, ANSWER | {"reasoning_content": "x"}]}, "line 1: the field 'reasoning_content' of a mess"),
    ({"messages": [QUESTION, ANSWER | {"train": False}]}, "line 1: the field 'train' of a message is not read"),
    ({"messages": [QUESTION, ANSWER | {"weight": 0.5}]}, "line 1: a message of weight 0.5: use 1, learnt, or 0, not"),
    (
      {"messages": [QUESTION | {"content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
      "line 1: content has a part of type 'image_url': only text",
    ),
    ({"messages": [QUESTION | {"content": ["x"]}]}, "line 1: content is no text but list"),
    ({"conversations": [{"from": "bing", "value": "x"}]}, "line 1: the role 'bing' is unknown"),
    ({"messages": [QUESTION, ANSWER], "tools": [{}]}, "line 1: the field 'tools' of a conversation is not read"),
    ({"instruction": "x", "output": "y", "history": [["a", "b"]]}, "line 1: the field 'history' of a conversation is"),
    ({"conversations": "x"}, "line 1: conversations is no list of objects"),
  ],
)
def test_a_bad_conversation_is_named(tmp_path, record, message):
  path = write(tmp_path / "a.jsonl", json.dumps(record))
  with pytest.raises(ValueError, match=f"a.jsonl {message}"):
    corpus.conversations(f"files:{path}")


def test_conversations_without_a_reply_are_empty(tmp_path):
  records = [{"messages": [QUESTION]}, {"messages": [ANSWER]}, {"prompt": "x", "response": " "}]
  path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, records)))
  with pytest.raises(ValueError, match="holds no conversation with a reply"):
    corpus.conversations(f"files:{path}")
  write(path, path.read_text() + "\n" + json.dumps({"messages": [QUESTION, ANSWER]}))
  tally = corpus.Tally()
  assert corpus.conversations(f"files:{path}", tally=tally) == [[QUESTION, ANSWER]]
  assert (tally.items, tally.empty) == (1, 3)


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
