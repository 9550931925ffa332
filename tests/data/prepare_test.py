"""Preparing with Beam's own runner in this process; its worker processes, and the command, in `slow` tests."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import threading
from unittest import mock

import numpy as np
import pytest
from rows import assert_same
from runs import assert_bitwise_equal

from lladax.data import batches, corpus, dialogues, prepare, records, sources, tokenizer
from lladax.data.tokenizer import TokenizerConfig
from lladax.data.windows import DataConfig
from lladax.mistake import Mistake
from lladax.training import trainer

if importlib.util.find_spec("apache_beam") is None:  # whose import warns, and takes seconds
  pytest.skip("could not import 'apache_beam', of the extra test-all", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings(
  "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"
)

BYTES = TokenizerConfig(kind="bytes")
LENGTH, SHARDS = 32, 3


@pytest.fixture(scope="module")
def texts():
  rng = random.Random(0)
  made = ["".join(rng.choices("abc dé", k=rng.randrange(1, 90))) for _ in range(200)]
  return [text for text in made if text.strip()] + made[:20]  # the last ones occur twice


@pytest.fixture(scope="module")
def config(texts, tmp_path_factory):
  folder = tmp_path_factory.mktemp("texts")
  for name, part in (("a", texts[:90]), ("b", texts[90:])):
    lines = (json.dumps({"text": text}) + "\n" for text in part)
    (folder / f"{name}.jsonl").write_text("".join(lines) + '{"text": " "}\n')
  return DataConfig(corpus=f"files:{folder}/*.jsonl", length=LENGTH, held_out=0.2)


@pytest.fixture(scope="module")
def prepared(config, tmp_path_factory):
  target = tmp_path_factory.mktemp("records") / "finished"
  return target, prepare.run(config, BYTES, str(target), SHARDS, [])


def contents(folder):
  return {path.name: path.read_bytes() for path in pathlib.Path(folder).iterdir() if path.is_file()}


def read_back(target, split):
  """The documents of a split, put together from its records shard by shard."""
  text, found = tokenizer.load(target / "tokenizer"), []
  for shard in range(SHARDS):
    source = records.grain.sources.ArrayRecordDataSource(str(target / records.file_name(split, shard, SHARDS)))
    rows = [records.decode(source[i]) for i in range(len(source))]
    ids = np.concatenate([tokens[segment > 0] for tokens, segment in rows]) if rows else np.array([], int)
    ends = np.flatnonzero(ids == text.eos_id)
    assert not len(ids) or ends[-1] == len(ids) - 1
    found += [text.decode(part[part != text.eos_id]) for part in np.split(ids, ends + 1)[:-1]]
  return found


def test_every_document_comes_back_once(prepared, config, texts):
  target, manifest = prepared
  train, held_out = corpus.split(texts, config.held_out)
  assert sorted(read_back(target, "train")) == sorted(set(train))
  assert sorted(read_back(target, "validation")) == sorted(set(held_out))  # the documents that a run on files holds out
  assert read_back(target, "train") != sorted(read_back(target, "train"))
  for split, kept in (("train", train), ("validation", held_out)):
    unique, counts = set(kept), manifest["splits"][split]
    assert counts["documents"] == len(unique) and counts["duplicates"] == len(kept) - len(unique)
    assert counts["bytes"] == sum(len(text.encode()) for text in unique)
    assert counts["tokens"] == counts["bytes"] + len(unique)  # a token a byte, and EOS
    assert counts["tokens"] + counts["padding"] == LENGTH * counts["records"]
  counts = {"parts": 2, "documents": len(texts), "empty": 2, "bad_lines": 0, "first_bad_lines": []}
  assert manifest["read"] == counts | {"excluded": {}, "files": {".jsonl": 2}}


def test_segments_number_the_documents_of_a_record(prepared):
  target, _ = prepared
  source = records.open_folder(target).source("train")
  eos_id = records.open_folder(target).tokenizer.eos_id
  for i in range(len(source)):
    tokens_L, segment_L = records.decode(source[i])
    kept = int((segment_L > 0).sum())
    ended = np.cumsum(np.concatenate([[0], tokens_L[: kept - 1] == eos_id]))
    np.testing.assert_array_equal(segment_L[:kept], 1 + ended)
    assert (segment_L[kept:] == 0).all() and (tokens_L[kept:] == eos_id).all()


def test_it_is_a_data_set_of_tfds(prepared):
  tfds = pytest.importorskip("tensorflow_datasets")
  target, manifest = prepared
  source = tfds.builder_from_directory(target).as_data_source()
  ours = records.open_folder(target).source("train")
  assert len(source["train"]) == manifest["splits"]["train"]["records"] == len(ours)
  for i in (0, len(ours) - 1):
    tokens_L, segment_L = records.decode(ours[i])
    np.testing.assert_array_equal(source["train"][i]["tokens"], tokens_L)
    np.testing.assert_array_equal(source["train"][i]["segment"], segment_L)
  assert "tensorflow" not in sys.modules


def cut_off(config, target):
  """A preparation that ends at the third shard; the keys of those that it wrote."""
  real, written = prepare._write, []

  def fail_at_the_third(gathered, *args):
    if len(written) == 2:
      raise KeyboardInterrupt
    written.append(gathered[0])
    real(gathered, *args)

  with mock.patch.object(prepare, "_write", fail_at_the_third):
    with pytest.raises(BaseException):  # noqa: B017  (Beam makes of it what it likes)
      prepare.run(config, BYTES, str(target), SHARDS, [])
  return written


def test_a_preparation_goes_on_where_it_was_cut_off(prepared, config, tmp_path):
  target, _ = prepared
  written = cut_off(config, tmp_path / "again")
  with pytest.raises(ValueError, match="is not finished: run --mode=prepare"):
    records.open_folder(tmp_path / "again")
  before = {name: (tmp_path / "again" / name).stat().st_mtime_ns for name in contents(tmp_path / "again")}
  prepare.run(config, BYTES, str(tmp_path / "again"), SHARDS, [])
  assert contents(tmp_path / "again") == contents(target)
  for split, shard in written:
    name = records.file_name(split, shard, SHARDS)
    assert (tmp_path / "again" / name).stat().st_mtime_ns == before[name]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_preparation_that_a_signal_ends_says_so(config, tmp_path, monkeypatch, capsys, number):
  """By the signal's own status, wherever in Beam it comes."""

  def stop(gathered, *args):
    raise SystemExit(128 + number) if number == signal.SIGTERM else KeyboardInterrupt  # as the door's handlers do

  monkeypatch.setattr(prepare, "_write", stop)
  monkeypatch.setattr(threading, "excepthook", threading.excepthook)
  with pytest.raises(SystemExit) as ended:
    prepare.run(config, BYTES, str(tmp_path), SHARDS, [])
  assert ended.value.code == 128 + number
  assert "stopped; the same command goes on with the shards that are not whole yet" in capsys.readouterr().err


def test_a_folder_that_is_taken(prepared, config, tmp_path):
  target, manifest = prepared
  assert prepare.run(config, BYTES, str(target), SHARDS, []) == manifest  # finished already
  with pytest.raises(ValueError, match=r"was begun otherwise \(length: \d+ there, \d+ here\)"):
    prepare.run(dataclasses.replace(config, length=2 * config.length), BYTES, str(target), SHARDS, [])
  folder = prepare._Folder(str(tmp_path), str(tmp_path))
  recipe = prepare.Recipe("files:x", "text", "", 0.1, 32, 3, "f")
  assert folder.begin(recipe) == folder.begin(recipe) == set()
  with pytest.raises(ValueError, match="was begun otherwise .length: 32 there, 64 here.: choose another folder"):
    folder.begin(dataclasses.replace(recipe, length=64))


def test_a_bad_line_ends_the_preparation_in_one_line(tmp_path):
  (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"body": "y"}\n')
  config = DataConfig(corpus=f"files:{tmp_path}/a.jsonl", length=8, held_out=0.0)
  with pytest.raises(
    ValueError, match=r"^data.text_field='text' is not in .*a.jsonl line 2: \['body'\]; mend"
  ) as error:
    prepare.run(config, BYTES, str(tmp_path / "records"), 1, [])
  assert "\n" not in str(error.value)
  skipping = dataclasses.replace(config, bad_lines="skip")
  manifest = prepare.run(skipping, BYTES, str(tmp_path / "records"), 1, [])
  assert "a.jsonl line 2" in manifest["read"]["first_bad_lines"][0]
  assert manifest["read"]["bad_lines"] == 1 and manifest["splits"]["train"]["documents"] == 1


def test_what_holds_a_text_of_a_test_is_left_out(tmp_path):
  (tmp_path / "a.jsonl").write_text('{"text": "x is 1"}\n{"text": "y"}\n')
  (tmp_path / "test.json").write_text('[{"question": "x is", "answer": "y", "more": "one two three four five 6 7 8"}]')
  config = DataConfig(corpus=f"files:{tmp_path}/a.jsonl", length=8, held_out=0.0)
  named = dataclasses.replace(config, exclude=f"{tmp_path}/test.json:question")
  manifest = prepare.run(named, BYTES, str(tmp_path / "records"), 1, [])
  assert manifest["read"]["excluded"] == {"test.json": 1} and manifest["exclude"] == named.exclude
  assert manifest["read"]["looked_for"] == "1 texts" and manifest["splits"]["train"]["bytes"] == 1
  every = dataclasses.replace(config, exclude=f"{tmp_path}/test.json")
  manifest = prepare.run(every, BYTES, str(tmp_path / "others"), 1, [])
  assert manifest["read"]["excluded"] == {} and manifest["splits"]["train"]["documents"] == 2
  assert manifest["read"]["looked_for"].startswith("1 texts; 2 shorter than 8 words or 31 characters are not used")
  lost = dataclasses.replace(config, exclude=f"{tmp_path}/test.json:quest")
  with pytest.raises(ValueError, match="no record has the field 'quest'"):
    prepare.run(lost, BYTES, str(tmp_path / "lost"), 1, [])


def test_what_cannot_be_prepared(tmp_path, config):
  (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
  empty = dataclasses.replace(config, corpus=f"files:{tmp_path}/empty.jsonl", held_out=0.0)
  with pytest.raises(ValueError, match="holds no text: every document is empty"):
    prepare.run(empty, BYTES, str(tmp_path / "a"), 1, [])
  with pytest.raises(ValueError, match="--shards=0: must be at least 1"):
    prepare.run(config, BYTES, str(tmp_path / "a"), 0, [])
  with pytest.raises(ValueError, match="records of one corpus: data.corpus, no data.mixture"):
    prepare.run(dataclasses.replace(config, mixture=((config.corpus, 1.0),)), BYTES, str(tmp_path / "a"), 1, [])
  with pytest.raises(FileNotFoundError, match="no file matches"):
    prepare.run(dataclasses.replace(config, corpus="files:nowhere*"), BYTES, str(tmp_path / "a"), 1, [])


def test_a_source_of_prepared_records(prepared, config):
  target, manifest = prepared
  c = dataclasses.replace(config, corpus=f"records:{target}", batch_size=4, segments=True)
  text = sources.prepared_tokenizer(c)
  assert text.fingerprint == tokenizer.create(BYTES).fingerprint
  found = sources.training(c, text, 0)
  n = manifest["splits"]["train"]["records"]
  assert len(found[0]) == n
  steps = -(-n // 4)
  options = {"eos_id": text.eos_id, "seed": 0, "steps": steps, "start": 0, "stop": steps}
  rows = np.concatenate([batch["tokens"] for batch in batches.of_steps(found, c, **options)])[:n]
  stored = np.stack([records.decode(found[0]._source[i])[0] for i in range(n)])
  assert sorted(map(bytes, rows)) == sorted(map(bytes, stored)) and (rows != stored).any()
  batch = next(batches.of_steps(found, dataclasses.replace(c, segments=False, random_lengths=1.0), **options))
  assert (batch["segment"] <= 1).all()
  np.testing.assert_allclose(batch["weight"].sum(axis=1), 1 / 4, rtol=1e-6)
  found = sources.held_out(c, text)
  counts = manifest["splits"]["validation"]
  assert (found.num_rows, found.num_tokens) == (counts["records"], counts["tokens"])
  assert found.num_bytes == counts["bytes"] + counts["documents"] and found.raw is None
  tokens_RL, segment_RL, scored_RL = found.take(np.arange(found.num_rows))
  assert scored_RL.sum() == counts["tokens"] and (scored_RL == (segment_RL > 0)).all()


def test_records_that_do_not_fit_the_run(prepared, config, tmp_path):
  target, _ = prepared
  c = dataclasses.replace(config, corpus=f"records:{target}", length=16)
  text = tokenizer.create(BYTES)
  with pytest.raises(ValueError, match="data.length=16: data.corpus='records:.*' was prepared with data.length=32"):
    sources.training(c, text, 0)
  other = tokenizer.create(dataclasses.replace(BYTES, eos="<end>"))
  with pytest.raises(ValueError, match="was prepared with another tokenizer than this run's"):
    sources.training(dataclasses.replace(c, length=LENGTH), other, 0)
  with pytest.raises(FileNotFoundError, match="there are no records; make them with --mode=prepare"):
    records.open_folder(tmp_path)
  with pytest.raises(ValueError, match="records are read from a mounted file system"):
    records.open_folder("hdfs://cluster/records")


def test_a_source_without_rows_is_named(config, tmp_path):
  (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
  one = dataclasses.replace(config, corpus=f"files:{tmp_path}/a.jsonl", held_out=0.0)
  prepare.run(one, BYTES, str(tmp_path / "records"), 1, [])
  c = dataclasses.replace(config, corpus=f"records:{tmp_path}/records")
  with pytest.raises(ValueError, match="holds no validation records: prepare it with another data.held_out"):
    sources.held_out(c, tokenizer.create(BYTES))


# Conversations.


@pytest.fixture(scope="module")
def talks(tmp_path_factory):
  """Some of which occur twice, in two files; one whose reply is not learnt, and one that is too long for most rows."""
  rng = random.Random(1)

  def said():
    return "".join(rng.choices("abcdefgh ", k=rng.randrange(1, 12))).strip() or "a"

  made = []
  for _ in range(70):
    made.append([{"role": ("user", "assistant")[i % 2], "content": said()} for i in range(2 * rng.randrange(1, 5))])
  made[3][1]["weight"] = 0
  made[5][-1]["content"] = "long " * 60
  made.insert(0, [{"role": "system", "content": "be brief"}, *made[0]])
  made += made[:9]
  folder = tmp_path_factory.mktemp("talks")
  for name, part in (("a", made[:30]), ("b", made[30:])):
    (folder / f"{name}.jsonl").write_text("".join(json.dumps({"messages": x}) + "\n" for x in part))
  return DataConfig(corpus=f"files:{folder}/*.jsonl", format="chat", length=256, held_out=0.2, batch_size=4)


@pytest.fixture(scope="module")
def prepared_talks(talks, tmp_path_factory):
  target = tmp_path_factory.mktemp("records") / "talks"
  return target, prepare.run(talks, BYTES, str(target), SHARDS, [])


@pytest.mark.parametrize("changes", [
  {}, {"length": 400}, {"eos_padding": "none", "packing": True},
  {"replies": "all", "eos_padding": "block", "align": 8}, {"replies": "all", "eos_padding": "block", "packing": True},
  {"replies": "all", "eos_padding": "block", "packing": True, "align": 16, "length": 320},
], ids=str)  # fmt: skip
def test_rows_of_prepared_conversations_are_those_of_the_files(prepared_talks, talks, changes):
  """Bit for bit, step by step over three epochs, and what is held out; in rows of any kind from the same records."""
  files = dataclasses.replace(talks, **changes)
  prepared = dataclasses.replace(files, corpus=f"records:{prepared_talks[0]}")
  text = tokenizer.create(BYTES)
  assert sources.prepared_tokenizer(prepared).fingerprint == text.fingerprint
  (a,), (b,) = (sources.training(c, text, 7) for c in (files, prepared))
  assert len(a) == len(b) and a.about.startswith(b.about)
  steps = 3 * len(a) // 4
  options = {"eos_id": text.eos_id, "seed": 7, "steps": steps, "start": 0, "stop": steps}
  for x, y in zip(*(batches.of_steps([source], files, **options) for source in (a, b)), strict=True):
    assert_same(x, y)
  a, b = (sources.held_out(c, text) for c in (files, prepared))
  assert a[:3] == b[:3]
  rows = np.arange(a.num_rows)
  for x, y in zip(a.take(rows), b.take(rows), strict=True):
    np.testing.assert_array_equal(x, y, strict=True)
  assert a.take(rows)[2].sum() == a.num_tokens


def test_what_is_written_of_conversations(prepared_talks, talks):
  _, manifest = prepared_talks
  train, held_out, tally = sources.items(talks.corpus, talks)
  for split, kept in (("train", train), ("validation", held_out)):
    counts = manifest["splits"][split]
    assert counts["documents"] == counts["records"] == len(kept)
    assert counts["replies"] == sum(len(corpus.replies(x)) for x in kept)
    assert counts["bytes"] == sum(len(corpus.said(x).encode()) for x in kept)
  assert manifest["read"]["documents"] == tally.items == len(train) + len(held_out)
  assert manifest["holds"] == "chat" and "length" not in manifest


def test_conversations_are_a_data_set_of_tfds(prepared_talks):
  tfds = pytest.importorskip("tensorflow_datasets")
  target, manifest = prepared_talks
  source = tfds.builder_from_directory(target).as_data_source()["train"]
  assert len(source) == manifest["splits"]["train"]["records"]
  ours, text = records.Conversations(f"records:{target}"), tokenizer.create(BYTES)
  assert sorted(x["tokens"].tolist() for x in source) == sorted(ours.ids(i).tolist() for i in range(len(ours)))
  begin, reply, end, size = source[0]["turns"][0]
  assert begin == 0 and len(text.decode(source[0]["tokens"][reply:end]).encode()) + 1 == size
  assert source[0]["tokens"][end - 1] == text.eot_id


def test_a_preparation_of_conversations_goes_on_where_it_was_cut_off(prepared_talks, talks, tmp_path):
  cut_off(talks, tmp_path)
  prepare.run(dataclasses.replace(talks, length=8), BYTES, str(tmp_path), SHARDS, [])  # which plays no part
  assert contents(tmp_path) == contents(prepared_talks[0])
  with pytest.raises(ValueError, match="was begun otherwise .*holds: 'chat' there, None here"):
    prepare.run(dataclasses.replace(talks, format="text"), BYTES, str(tmp_path), SHARDS, [])


def test_conversations_of_a_model_at_hand(prepared_talks, talks, tmp_path):
  """A run that begins with a model speaks as that does: with the same tokenizer, or not at all."""
  other = tokenizer.create(dataclasses.replace(BYTES, eos="<end>"))
  assert prepare.run(talks, other, str(tmp_path), 1, [])["tokenizer_fingerprint"] == other.fingerprint
  with pytest.raises(ValueError, match="was begun otherwise .*tokenizer_fingerprint"):
    prepare.run(talks, other, str(prepared_talks[0]), SHARDS, [])
  c = dataclasses.replace(talks, corpus=f"records:{tmp_path}")
  with pytest.raises(ValueError, match="was prepared with another tokenizer, or chat template, than this run's"):
    sources.training(c, tokenizer.create(BYTES), 0)


def test_what_a_worker_refuses_is_told_in_one_line(talks, tmp_path, monkeypatch):
  def fail(*_):
    raise Mistake("the model's chat template fails on these 2 messages: no")

  monkeypatch.setattr(dialogues.Renderer, "__call__", fail)
  with pytest.raises(Mistake) as error:
    prepare.run(talks, BYTES, str(tmp_path), 1, [])
  assert str(error.value) == "the model's chat template fails on these 2 messages: no"


def test_conversations_that_do_not_fit_the_run(prepared, prepared_talks, talks, config, tmp_path):
  text = tokenizer.create(BYTES)
  as_text = dataclasses.replace(config, corpus=f"records:{prepared_talks[0]}")
  with pytest.raises(ValueError, match="data.format='text': data.corpus='records:.*' was prepared with .*='chat'"):
    sources.training(as_text, text, 0)
  with pytest.raises(ValueError, match="data.format='chat': data.corpus='records:.*' was prepared with .*='text'"):
    sources.training(dataclasses.replace(talks, corpus=f"records:{prepared[0]}"), text, 0)
  with pytest.raises(ValueError, match="data.length=4: no reply of [0-9]+ conversations fits a row"):
    sources.training(dataclasses.replace(talks, corpus=f"records:{prepared_talks[0]}", length=4), text, 0)


def test_damage_to_prepared_conversations_is_found(prepared_talks, tmp_path):
  folder = tmp_path / "copy"
  shutil.copytree(prepared_talks[0], folder)
  table, shard = (folder / f("train", 1, SHARDS) for f in (records.turns_name, records.file_name))
  found = records.Conversations(f"records:{folder}")
  found._record_C[[0, 1]] = found._record_C[[1, 0]]
  with pytest.raises(ValueError, match="record [0-9]+ is none of these records: prepare them again"):
    found.ids(0)
  content = bytearray(table.read_bytes())
  content[-1] ^= 1
  table.write_bytes(content)
  with pytest.raises(ValueError, match=r"turns-train.int32-00001-of-00003 is damaged: prepare these records again"):
    records.Conversations(f"records:{folder}")
  table.unlink()
  with pytest.raises(ValueError, match=r"turns-train.int32-00001-of-00003 is missing: prepare these records again"):
    records.Conversations(f"records:{folder}")
  shutil.copytree(prepared_talks[0], folder, dirs_exist_ok=True)
  shard.write_bytes(shard.read_bytes()[:-9])
  with pytest.raises(ValueError, match="a shard of train is damaged"):
    records.Conversations(f"records:{folder}")


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compiles")
def test_a_run_on_prepared_conversations_is_the_run_on_the_files(prepared_talks, talks, tiny, tmp_path):
  more = {"data.format": "chat", "data.length": 256, "data.batch_size": 8, "data.replies": "all", "data.packing": True,
          "data.eos_padding": "block", "data.held_out": 0.2, "objective": "autoregressive", "steps": 6}  # fmt: skip
  results = [
    trainer.train(tiny(more | {"data.corpus": name}), tmp_path / str(i))
    for i, name in enumerate((talks.corpus, f"records:{prepared_talks[0]}"))
  ]
  assert_bitwise_equal(tmp_path / "0", tmp_path / "1")
  assert results[0]["bits_per_byte"] == results[1]["bits_per_byte"]


@pytest.mark.slow
@pytest.mark.parametrize("format", ["text", "chat"])
def test_the_command_gives_the_same_bytes_with_one_worker_and_with_two(request, tmp_path, tiny_workdir, format):
  names = {"text": ("config", "prepared"), "chat": ("talks", "prepared_talks")}[format]
  config, prepared = map(request.getfixturevalue, names)
  command = [
    sys.executable, "-m", "lladax.main", "--mode=prepare", "--config=configs/base.py", f"--shards={SHARDS}",
    f"--config.data.corpus={config.corpus}", f"--config.data.length={LENGTH}", "--config.data.held_out=0.2",
    f"--config.data.format={format}", "--config.tokenizer.kind=bytes",
    *[f"--config.init_from={tiny_workdir}"] * (format == "chat"),  # whose tokenizer is the same
  ]  # fmt: skip
  for workers in (1, 2):
    beam = ["--", f"--direct_num_workers={workers}", "--direct_running_mode=multi_processing"]
    target = tmp_path / str(workers)
    made = subprocess.run([*command, f"--target={target}", *beam], cwd=pathlib.Path(__file__).parents[2],
                          env=os.environ, capture_output=True, text=True, check=False)  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert contents(target) == contents(prepared[0])


@pytest.mark.slow
def test_a_data_set_of_tfds_is_a_corpus(tmp_path):
  tfds = pytest.importorskip("tensorflow_datasets")
  from array_record.python.array_record_module import ArrayRecordWriter

  features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
  writer = ArrayRecordWriter(str(tmp_path / "lines-train.array_record-00000-of-00001"), "group_size:1")
  for i in range(100):
    writer.write(features.serialize_example({"text": f"Zeile {i}: äö"}))
  writer.close()
  template = tfds.core.ShardedFileTemplate(data_dir=tmp_path, dataset_name="lines", filetype_suffix="array_record")
  split = tfds.core.SplitInfo(name="train", shard_lengths=[100], num_bytes=0, filename_template=template)
  tfds.folder_dataset.write_metadata(data_dir=tmp_path, features=features, split_infos=[split], check_data=False)
  parts = corpus.parts(f"tfds:{tmp_path}")
  assert len(parts) == 64
  assert corpus.documents(f"tfds:{tmp_path}:train") == [f"Zeile {i}: äö" for i in range(100)]
  with pytest.raises(ValueError, match="data.corpus='tfds:nothing_of_this_name' cannot be opened"):
    corpus.parts("tfds:nothing_of_this_name")
