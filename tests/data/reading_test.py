"""Files of every name and shape, and lines that hold anything."""

import bz2
import gzip
import io
import json
import lzma
import os
import pathlib
import random

import fsspec
import hypothesis
import pyarrow
import pyarrow.parquet
import pytest
from backports import zstd
from hypothesis import strategies

from lladax.data import corpus, reading

GOOD = ["erste Zeile: äöü", "第二\u2028句 😀 \x85\x1c", "third\nline"]
PACK = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress, ".zst": zstd.compress}


def write(path: pathlib.Path, content: str | bytes) -> pathlib.Path:
  path.parent.mkdir(parents=True, exist_ok=True)
  content = content.encode() if isinstance(content, str) else content
  path.write_bytes(PACK.get(path.suffix.lower(), bytes)(content))
  return path


def line(text: str) -> str:
  return json.dumps({"text": text}, ensure_ascii=False) + "\n"


LINES = "".join(map(line, GOOD))


@pytest.mark.parametrize("name", ["ndjson", "jsonlines", "JSONL", "NDJson", "json", "Json"])
@pytest.mark.parametrize("packed", ["", ".gz", ".xz", ".bz2", ".zst", ".GZ"])
def test_lines_under_every_name(tmp_path, name, packed):
  path = write(tmp_path / f"a.{name}{packed}", "\ufeff" + LINES.replace("\n", "\r\n"))
  assert corpus.documents(f"files:{path}") == GOOD


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("before", ["", "\ufeff", "\n \n"])
def test_json_is_a_list_or_one_object(tmp_path, packed, indent, before):
  path = write(tmp_path / f"a.json{packed}", before + json.dumps([{"text": text} for text in GOOD], indent=indent))
  assert corpus.documents(f"files:{path}") == GOOD
  path = write(tmp_path / f"b.json{packed}", before + json.dumps({"text": "x"}, indent=indent))
  assert corpus.documents(f"files:{path}") == ["x"]


def test_bad_json_is_named_by_line_or_as_a_whole(tmp_path):
  path = write(tmp_path / "lines.json", LINES + "oh\n" + LINES)
  with pytest.raises(ValueError, match="lines.json line 4 is not JSON"):
    corpus.documents(f"files:{path}")
  assert corpus.documents(f"files:{path}", tally=reading.Tally("skip")) == GOOD * 2
  path = write(tmp_path / "list.json", "[\n" + LINES.replace("}\n", "},\n"))
  with pytest.raises(ValueError, match="list.json is not JSON: .*line 5"):
    corpus.documents(f"files:{path}")


def test_a_folder_is_all_files_in_it(tmp_path):
  write(tmp_path / "texts" / "deep" / "a.jsonl", LINES)
  write(tmp_path / "texts" / "b.txt", "plain")
  write(tmp_path / "texts" / "README", "of no kind")
  for hidden in (".DS_Store", ".git/config", "deep/.cache/x.txt"):
    write(tmp_path / "texts" / hidden, b"\xff")
  (tmp_path / "texts" / "empty").mkdir()
  tally = reading.Tally()
  expected = ["of no kind", "plain", *GOOD]
  assert corpus.documents(f"files:{tmp_path}/texts/", tally=tally) == expected
  assert tally.files == {".jsonl": 1, ".txt": 1, "plain": 1}
  assert corpus.documents(f"files:{tmp_path}/texts") == expected
  assert corpus.documents(f"files:{tmp_path}/texts/*,{tmp_path}/texts/deep") == expected  # a glob is as in a shell
  assert corpus.documents(f"files:{tmp_path}/te*/**") == expected
  with pytest.raises(FileNotFoundError, match="no file matches '.*empty'"):
    corpus.documents(f"files:{tmp_path}/texts/empty")
  with pytest.raises(ValueError, match="config is not UTF-8"):
    corpus.documents(f"files:{tmp_path}/texts/.git/config")  # who names it, gets it
  fsspec.filesystem("memory").pipe("/folder/sub/a.txt", b"x")
  assert corpus.documents("files:memory://folder") == ["x"]
  with pytest.raises(ValueError, match="a name between the commas is empty"):
    corpus.documents(f"files:{tmp_path}/texts,")


def test_links_are_followed(tmp_path):
  write(tmp_path / "store" / "x", "text")
  (tmp_path / "snapshot").mkdir()
  os.symlink(tmp_path / "store" / "x", tmp_path / "snapshot" / "a.txt")
  for pattern in ("snapshot", "snapshot/*.txt", "snapshot/a.txt"):
    assert corpus.documents(f"files:{tmp_path}/{pattern}") == ["text"]
  before = reading.match(str(tmp_path / "snapshot"))
  write(tmp_path / "store" / "x", "TEXT")
  assert reading.match(str(tmp_path / "snapshot")) != before
  (tmp_path / "store" / "x").unlink()
  with pytest.raises(FileNotFoundError, match=r"snapshot/a.txt is a link to .*store/x, which is gone"):
    corpus.documents(f"files:{tmp_path}/snapshot")


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tgz", "a.ZIP"])
def test_an_archive_of_files_is_no_text(tmp_path, name):
  path = write(tmp_path / name, "x")
  with pytest.raises(ValueError, match=f"{name} is an archive of several files: unpack it"):
    corpus.documents(f"files:{path}")


BAD = {
  "not UTF-8": b'{"text": "\xff\xfe"}',
  "UTF-16": json.dumps({"text": "x"}).encode("utf-16")[:-1],
  "NUL": b'{"text": "\0"}',
  "NULs alone": b"\0\0\0",
  "a lone surrogate": rb'{"text": "\ud800"}',
  "a lone surrogate as record": rb'"\udfff"',
  "a lone surrogate as field": rb'{"\ud800": "x"}',
  "a lone surrogate in a list": rb'{"text": ["x", "\ud800"]}',
  "a number of 5000 digits": b'{"text": "x", "n": ' + b"9" * 5000 + b"}",
  "a number": b"1e999",
  "not a number": b'{"text": NaN}',
  "deep": b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
  "deep and never closed": b"[" * 100_000,
  "deep objects": b'{"a":' * 100_000,
  "nearly too deep": b'{"text": ' + b"[" * 900 + b"]" * 900 + b"}",
  "twice": b'{"text": "x", "text": "y"}',
  "an empty object": b"{}",
  "null": b'{"text": null}',
  "a mark in the middle": b'{"text":\xef\xbb\xbf "x"}',
  "cut off": b'{"text": "x',
  "too much": b'{"text": "x"} {"text": "y"}',
  "a control character": b'{"text": "\x1c"}',
  "a field as long as a book": b'{"' + b"x" * 10**6 + b'": 1}',
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz"])
def test_a_line_that_cannot_be_used_is_counted_and_named(tmp_path, bad, name):
  path = write(tmp_path / name, b"".join([LINES.encode(), bad, b"\r\n", LINES.encode()]))
  tally = reading.Tally("skip")
  assert corpus.documents(f"files:{path}", tally=tally) == GOOD * 2
  assert (tally.items, tally.empty, tally.bad) == (6, 0, 1)
  assert f"{name} line 4" in tally.named[0] and len(tally.named[0]) < 500 and len(tally.named[0].splitlines()) == 1
  with pytest.raises(ValueError, match=f"{name} line 4") as error:
    corpus.documents(f"files:{path}")
  assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 600


def test_a_line_that_is_too_long_is_not_held(tmp_path):
  path = write(tmp_path / "a.jsonl.gz", LINES + line("x" * 10**7) + LINES + line("x" * 2000).strip())
  tally = reading.Tally("skip", longest=1000)
  assert corpus.documents(f"files:{path}", tally=tally) == GOOD * 2
  assert tally.bad == 2 and tally.named[0].endswith("a.jsonl.gz line 4 is longer than data.longest_line=1,000 bytes")
  longest = []

  class Watched(io.BytesIO):
    def readinto(self, buffer):
      longest.append(len(buffer))
      return super().readinto(buffer)

  content = (LINES + line("x" * 10**7) + LINES).encode()
  numbers = [
    n for n, _ in reading._raw_lines(io.BufferedReader(Watched(content)), "x", reading.Tally("skip", longest=1000))
  ]
  assert numbers == [1, 2, 3, 5, 6, 7] and max(longest) <= 2**20


@pytest.mark.parametrize("kind", ["jsonl", "json", "txt"])
@pytest.mark.parametrize("packed", PACK)
def test_what_a_damaged_archive_still_gives_is_read(tmp_path, kind, packed):
  rng = random.Random(0)
  content = "".join(line(f"{i} {rng.randbytes(40).hex()}") for i in range(2000))
  path = write(tmp_path / f"a.{kind}{packed}", content)
  whole = path.read_bytes()
  write(tmp_path / "b.txt", "x")
  texts = [json.loads(row)["text"] for row in content.splitlines()]
  for damaged in (whole[: len(whole) // 2], b"no archive", whole[:3]):
    path.write_bytes(damaged)
    tally = reading.Tally("skip")
    found = corpus.documents(f"files:{path},{tmp_path}/b.txt", tally=tally)
    assert found[-1] == "x" and tally.bad == 1 and f"a.{kind}{packed} cannot be read" in tally.named[0]
    assert found[:-1] == texts[: len(found) - 1]
    assert len(found) > 500 or len(damaged) < 20 or kind != "jsonl" or packed not in (".gz", ".xz")
    with pytest.raises(ValueError, match=f"a.{kind}{packed} cannot be read"):
      corpus.documents(f"files:{path}")
  path.write_bytes(whole[: len(whole) // 2] + bytes(999))  # what it gives from there on may be anything
  tally = reading.Tally("skip")
  assert corpus.documents(f"files:{path},{tmp_path}/b.txt", tally=tally)[-1] == "x" and tally.bad


def test_a_file_that_may_not_be_read_is_no_bad_line(tmp_path, monkeypatch):
  path = write(tmp_path / "a.jsonl", LINES)

  def refuse(*_, **__):
    raise PermissionError(13, "Permission denied")

  monkeypatch.setattr(fsspec, "open", refuse)
  with pytest.raises(ValueError, match="a.jsonl cannot be read: .*Permission denied"):
    corpus.documents(f"files:{path}", tally=reading.Tally("skip"))


def test_rows_that_cannot_be_used(tmp_path):
  good = pyarrow.array(["a", None, "b", "c"])
  spoilt = pyarrow.Array.from_buffers(
    pyarrow.string(), 4, pyarrow.array([b"a", b"b", b"\xff", b"d"], pyarrow.binary()).buffers()
  )
  times = pyarrow.array([0, 2**60, 0, 0], pyarrow.timestamp("ms"))
  for name, column, found, bad in (
    ("null", good, ["a", "b", "c"], "row 2"),
    ("bytes", spoilt, ["a", "b", "d"], "row 3"),
  ):
    path = tmp_path / f"{name}.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": column, "n": times}), path)
    tally = reading.Tally("skip")
    assert corpus.documents(f"files:{path}", tally=tally) == found
    assert tally.bad == 1 and f"{name}.parquet {bad}" in tally.named[0]
    with pytest.raises(ValueError, match=f"{name}.parquet {bad}"):
      corpus.documents(f"files:{path}")
  chat = pyarrow.table({"prompt": ["x"] * 4, "response": ["y"] * 4, "n": times})
  pyarrow.parquet.write_table(chat, tmp_path / "c.parquet")
  tally = reading.Tally("skip")
  assert len(corpus.conversations(f"files:{tmp_path}/c.parquet", tally=tally)) == 3 and tally.bad == 1


def test_a_damaged_table(tmp_path):
  path = tmp_path / "a.parquet"
  rng = random.Random(0)
  rows = [f"{i} {rng.randbytes(40).hex()}" for i in range(20_000)]
  pyarrow.parquet.write_table(pyarrow.table({"text": rows}), path, row_group_size=5000, use_dictionary=False)
  whole = path.read_bytes()
  write(tmp_path / "b.txt", "x")
  middle = len(whole) // 2
  for damaged, fewest in ((whole[:-99], 0), (whole[:middle] + b"\xff" * 9999 + whole[middle + 9999 :], 5000)):
    path.write_bytes(damaged)
    tally = reading.Tally("skip")
    found = corpus.documents(f"files:{tmp_path}/*", tally=tally)
    assert found[-1] == "x" and tally.bad >= 1 and "a.parquet" in tally.named[0] and len(found) > fewest
    with pytest.raises(ValueError, match=r"a.parquet (row \d+ )?cannot be read"):
      corpus.documents(f"files:{path}")


def test_bytes_are_text_at_any_depth():
  class Array(list):
    def tolist(self):
      return list(self)

  plain = reading.plain({"a": b"\xc3\xa4", "b": Array([b"x", {"c": b"\xff"}]), "d": 3})
  assert plain == {"a": "ä", "b": ["x", {"c": "\udcff"}], "d": 3}


FIELDS = "text messages conversations role from content value weight type prompt response instruction system input"
plain_values = strategies.recursive(
  strategies.none() | strategies.booleans() | strategies.floats() | strategies.integers() | strategies.text(max_size=9),
  lambda x: (
    strategies.lists(x, max_size=3)
    | strategies.dictionaries(strategies.sampled_from(FIELDS.split()) | strategies.text(max_size=3), x, max_size=4)
  ),
  max_leaves=8,
)
messages = strategies.fixed_dictionaries(
  {
    "role": strategies.sampled_from(["user", "assistant", "tool", None]),
    "content": strategies.text(max_size=3) | strategies.just([{"type": "text", "text": "x"}]) | strategies.none(),
  }
)
any_line = strategies.one_of(
  strategies.binary(max_size=60),
  strategies.text(max_size=30).map(lambda x: x.encode("utf-8", "surrogatepass")),
  strategies.sampled_from(list(BAD.values())),
  plain_values.map(lambda x: json.dumps(x).encode()),
  strategies.lists(messages, max_size=3).map(lambda x: json.dumps({"messages": x}).encode()),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("fuzz")


@hypothesis.settings(max_examples=150, deadline=None, derandomize=True, database=None)
@hypothesis.given(lines=strategies.lists(any_line, max_size=6), kind=strategies.sampled_from(["jsonl", "json", "txt"]))
@pytest.mark.parametrize("format", ["text", "chat"])
def test_any_lines_survive_and_are_counted(folder, format, lines, kind):
  first, last = (json.dumps(dict.fromkeys(("text", "prompt", "response"), x)).encode() for x in "AZ")
  lines = [part for x in lines for part in x.split(b"\n")]
  path = write(folder / f"a.{kind}", b"\n".join([first, *lines, last]))
  write(folder / "b.jsonl", last)
  read = corpus.documents if format == "text" else corpus.conversations
  tally = reading.Tally("skip")
  found = read(f"files:{path},{folder}/b.jsonl", tally=tally)
  corpus.split(found, 0.0)
  said = [x if isinstance(x, str) else x[-1]["content"] for x in found]
  assert said[-1] == "Z" and len(tally.named) == min(tally.bad, reading.NAMED)
  if kind != "txt":
    assert said[0] == "A" and said[-2] == "Z"
    blank = sum(not x.decode("utf-8-sig", "replace").strip() for x in lines)
    assert tally.items + tally.empty + tally.bad == len(lines) - blank + 3
