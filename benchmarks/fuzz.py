"""Every reader of lladax on damaged and hostile files: it reads them, or says in one line what is wrong.

  python benchmarks/fuzz.py [--inputs=10000] [--only=READER,...]

Of each reader a valid input is made; each try damages one of its files (bits, bytes, cuts, splices; in JSON a value, a
name, a depth) and reads all of them, in a process with a limit of time and of memory. What is counted: what was read;
what was refused, by a `Mistake` of one line; and what must not be: crashes (any other exception, or a message that a
terminal would obey), hangs, memory. Exits with 1 where there was one. Try number n of a reader is always the same.
"""

import argparse
import bz2
import collections
import contextlib
import dataclasses
import gzip
import json
import logging
import lzma
import os
import random
import re
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

SECONDS, MEMORY = 10, 1024  # that one input may take; MiB more than the process had
OUTCOMES = ("read", "mistake", "crash", "hang", "memory")
# Values that are none of what a reader expects.
VALUES = (
  None, True, False, 0, -1, 1, 2, 1.5, 2**31, 2**63, -(2**63), 2**64 + 1, 10**30, 1e308, -1e308, 1e400, float("nan"),
  "", "x", "\x1b[31m", "\x9b2J", "\u202eabc", "\ud800", "../../etc/passwd", "/etc/passwd", "a\0b", "model.safetensors",
  "1", "[MASK]", "<|eot_id|>", "x" * 5000, [], {}, [[]], [0], [None], {"": {}}, {"a": 1}, [1, 2, 3], [-1, 2**40],
)  # fmt: skip
BYTES = (
  b"", b"\0", b"\xff", b"\x1b]0;x\x07", b"\xed\xa0\x80", b"[" * 50_000, b"{\"a\":" * 20_000, b"9" * 5000, b"1e999",
  b"NaN", b"\n", b"\r", b"\xef\xbb\xbf", b"\xe2\x80\xae", b"\\ud800", b"\\u0000", b'"', b"}", b"]", b",", b"null", b"-",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Reader:
  """`make` writes a valid input to an empty folder; `read` reads it; `damaged`: the endings of files that are."""

  make: Callable[[Path], object]
  read: Callable[[Path], object]
  damaged: tuple[str, ...] = ("",)


# The inputs.


def workdir(folder: Path) -> None:
  from lladax import configs
  from lladax.data import tokenizer

  text = tokenizer.create(tokenizer.TokenizerConfig(kind="bytes"))
  text.save(folder / "tokenizer")
  values = configs.load("base").to_dict() | {"tokenizer_fingerprint": text.fingerprint, "data_digests": ["00"]}
  (folder / "config.json").write_text(json.dumps(values))
  rows = [{"step": step, "loss": 2.0, "note": "x"} for step in range(1, 6)]
  (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


LLADA = {
  "model_type": "llada", "architectures": ["LLaDAModelLM"], "d_model": 8, "n_layers": 2, "n_heads": 2, "n_kv_heads": 2,
  "mlp_hidden_size": 8, "embedding_size": 384, "vocab_size": 384, "weight_tying": False, "rope_theta": 1e4,
  "rms_norm_eps": 1e-5, "max_sequence_length": 64, "block_type": "llama", "activation_type": "silu",
  "layer_norm_type": "rms", "rope": True, "include_bias": False, "alibi": False, "mask_token_id": 258,
  "eos_token_id": 257, "pad_token_id": 257,
}  # fmt: skip


def published(folder: Path, files: int = 2) -> None:
  from safetensors.numpy import save_file

  from lladax.storage import layout

  model = layout.model_of(LLADA, layout.NAMED["LLaDA"], problems := [])
  assert model is not None and not problems, problems
  drawn = np.random.default_rng(0)
  shapes = layout.disk_shapes(layout.pieces(model, 0), model)
  tensors = {name: drawn.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
  weight_map = {}
  for i in range(files):
    name = f"model-{i + 1:05}-of-{files:05}.safetensors"
    part = dict(list(tensors.items())[i::files])
    save_file(part, folder / name)
    weight_map |= dict.fromkeys(part, name)
  (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
  (folder / "config.json").write_text(json.dumps(LLADA))
  (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, 261]}))
  vocabulary(folder)


def vocabulary(folder: Path) -> None:
  import tokenizers
  from tokenizers import decoders, models, pre_tokenizers

  alphabet = {x: i for i, x in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
  model = tokenizers.Tokenizer(models.BPE(alphabet, []))
  model.pre_tokenizer, model.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
  model.add_special_tokens(
    ["<|startoftext|>", "<|endoftext|>", "<|mdm_mask|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
  )
  model.save(str(folder / "tokenizer.json"))
  template = (
    "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>' + m['content'] | trim"
    " + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant' }}{% endif %}"
  )
  (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|startoftext|>", "chat_template": template}))


def saved_tokenizer(kind: str) -> Callable[[Path], None]:
  def make(folder: Path) -> None:
    from lladax.data import tokenizer

    if kind == "huggingface":
      vocabulary(folder)
      names = {"eos": "<|endoftext|>", "mask": "<|mdm_mask|>", "path": str(folder / "tokenizer.json")}
      text = tokenizer.published(tokenizer.TokenizerConfig("huggingface", **names))
      for path in folder.iterdir():
        path.unlink()
    else:
      texts = [f"{name} has a vocabulary of its own" for name in VALUES if isinstance(name, str) and name.isascii()]
      text = tokenizer.create(tokenizer.TokenizerConfig("sentencepiece", vocab_size=290), texts)
    text.save(folder)

  return make


def records(folder: Path) -> None:
  from array_record.python.array_record_module import ArrayRecordWriter

  from lladax.data import records, tokenizer

  text = tokenizer.create(tokenizer.TokenizerConfig(kind="bytes"))
  text.save(folder / "tokenizer")
  counts = {"documents": 4, "duplicates": 0, "bytes": 60, "tokens": 64, "records": 8, "padding": 0}
  for split in records.SPLITS:
    for shard in range(2):
      writer = ArrayRecordWriter(str(folder / records.file_name(split, shard, 2)), "group_size:1")
      for i in range(4):
        writer.write(records.encode(np.arange(i, i + 8), np.ones(8, int)))
      writer.close()
  manifest = {"format": 1, "corpus": "unicode", "length": 8, "shards": 2, "vocab_size": text.vocab_size,
              "tokenizer_fingerprint": text.fingerprint, "splits": dict.fromkeys(records.SPLITS, counts)}  # fmt: skip
  (folder / records.MANIFEST).write_text(json.dumps(manifest))


def prepared_talks(folder: Path) -> None:
  from array_record.python.array_record_module import ArrayRecordWriter

  from lladax.data import dialogues, records, tokenizer

  text = tokenizer.create(tokenizer.TokenizerConfig(kind="bytes"))
  text.save(folder / "tokenizer")
  said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2
  talk, manifest = dialogues.Renderer(text)(said), {"turns": {}}
  for split in records.SPLITS:
    made = [records.encode_talk((0, i), talk.ids, talk.turns) for i in range(4)]
    writer = ArrayRecordWriter(str(folder / records.file_name(split, 0, 1)), "group_size:1")
    for record, _ in made:
      writer.write(record)
    writer.close()
    table, digest = records.encode_table([rows for _, rows in made])
    (folder / records.turns_name(split, 0, 1)).write_bytes(table)
    manifest["turns"][split] = [digest]
  counts = {"documents": 4, "replies": 8, "bytes": 16, "tokens": 4 * len(talk.ids), "records": 4}
  manifest |= {"format": 1, "holds": "chat", "corpus": "files:x", "shards": 1, "vocab_size": text.vocab_size,
               "tokenizer_fingerprint": text.fingerprint, "splits": dict.fromkeys(records.SPLITS, counts)}  # fmt: skip
  (folder / records.MANIFEST).write_text(json.dumps(manifest))


ROWS = [{"text": f"The text of document {i}, und Grüße.", "n": i, "more": [{"a": i, "b": None}]} for i in range(6)]
TALKS = [{"messages": [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"It is {i}."}]}
         for i in range(4)] + [{"instruction": "Add", "input": "1", "output": "2"}, {"prompt": "a", "response": "b"},
         {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}]  # fmt: skip


def lines(rows: list, name: str = "rows.jsonl") -> Callable[[Path], None]:
  return lambda folder: (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def whole(value: object, name: str) -> Callable[[Path], None]:
  return lambda folder: (folder / name).write_text(json.dumps(value))


def packed(folder: Path) -> None:
  from lladax.data.reading import zstd

  content = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
  for ending, pack in ((".gz", gzip), (".bz2", bz2), (".xz", lzma), (".zst", zstd)):
    (folder / f"rows.jsonl{ending}").write_bytes(pack.compress(content))
  (folder / "plain.txt.gz").write_bytes(gzip.compress("ein Text, größer".encode()))


def parquet(folder: Path) -> None:
  import pyarrow
  from pyarrow import parquet

  parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "rows.parquet")


def command_line(folder: Path) -> None:
  words = ["--config=quickstart", "--mode=show", "--config.steps=7", "--noconfig.log.tensorboard", "--prompt", "[MASK]"]
  words += ["--config.data.length=64", "--config.optimizer.schedule=((5, 0.03), (-1, 0.03))", "--shards=3"]
  (folder / "command").write_text(json.dumps(words))


# The readers.


def read_workdir(folder: Path) -> None:
  from lladax import config
  from lladax.inference import load

  config.load(folder)
  load.saved_model(folder)


def read_published(folder: Path) -> None:
  """As `lladax.load` does, up to the arrays: a slab of every tensor."""
  from lladax.storage import published

  if published.is_published(folder):
    for tensor in published.read(folder).tensors.values():
      part = tensor.rows(0, tensor.shape[0])
      assert part.shape == tensor.shape, "other numbers than the header says"


def read_tokenizer(folder: Path) -> None:
  from lladax.data import tokenizer

  text = tokenizer.load(folder)
  ids = text.encode("The text, <|eot_id|> und Grüße\n")
  text.decode(ids)
  text.decode(range(min(text.vocab_size, 300)), skip_special=False)
  text.chat([{"role": "user", "content": "Hi"}])


def read_metrics(folder: Path) -> None:
  from lladax.storage import metrics

  metrics.losses(folder)
  metrics.Writer(folder, 10, start=3, tensorboard=False).close()


def read_records(folder: Path) -> None:
  from lladax.data import records, windows

  for split in records.SPLITS:
    source = records.Records(f"records:{folder}", windows.DataConfig(corpus=f"records:{folder}", length=8), split)
    for row in range(len(source)):
      tokens_L, _, _ = source.row(row, 0, 8)
      assert tokens_L.shape == (8,), "a row of another length"


def read_prepared_talks(folder: Path) -> None:
  from lladax.data import dialogues, records, windows

  name = f"records:{folder}"
  for split in records.SPLITS:
    talks = records.Conversations(name, split)
    c = windows.DataConfig(name, format="chat", length=128, eos_padding="none", packing=True)
    source = dialogues.Dialogues(talks, records.open_folder(folder).tokenizer, c, seed=0)
    for row in range(len(source)):
      source.row(row, 0, 0)


def read_corpus(folder: Path) -> None:
  from lladax.data import corpus, reading

  corpus.documents(f"files:{folder}", tally=reading.Tally(random.choice(["stop", "skip"])))


def read_talks(folder: Path) -> None:
  from lladax.data import corpus, dialogues, tokenizer, windows

  found = corpus.conversations(f"files:{folder}")
  c = windows.DataConfig(format="chat", length=64)
  source = dialogues.Dialogues(found, tokenizer.create(tokenizer.TokenizerConfig(kind="bytes")), c, seed=0)
  source.row(0, 0, 64)


def read_exclude(folder: Path) -> None:
  from lladax.data import contamination

  contamination.excluded(f"{folder}/*:text")


def read_couplets(folder: Path) -> None:
  from lladax.evaluation import reversal

  for path in folder.iterdir():
    reversal.of_couplets(path)


def read_task(folder: Path) -> None:
  from lladax.evaluation.tasks import local

  local.load(test="rows", data_dir=folder)


def read_answers(folder: Path) -> None:
  from lladax.evaluation.answers import Answers

  Answers(folder / "rows.jsonl").add("generate_until", {"x": "y"})


def read_command(folder: Path) -> None:
  from absl.testing import flagsaver

  from lladax import config, main

  try:
    words = json.loads((folder / "command").read_bytes())
    words = [word for word in words if isinstance(word, str) and "\0" not in word]
    [os.fsencode(word) for word in words]
  except (ValueError, TypeError, RecursionError):
    words = (folder / "command").read_bytes().decode(errors="replace").split("\0")[:20]
  # A name of a file would be run: that is what the option is for.
  words = [word for word in words if not re.match("--?(config|flagfile)(=(?!quickstart)|$)", word)]
  with flagsaver.flagsaver(), contextlib.suppress(SystemExit):
    main._parse(["lladax", *words])
    from absl import flags

    if flags.FLAGS.config is not None:
      config.parse(flags.FLAGS.config.to_dict())


READERS = {
  "config.json of a workdir": Reader(workdir, read_workdir, ("config.json",)),
  "tokenizer of a workdir": Reader(workdir, read_workdir, ("lladax_tokenizer.json",)),
  "metrics.jsonl": Reader(workdir, read_metrics, ("metrics.jsonl",)),
  "published config.json": Reader(published, read_published, ("config.json",)),
  "model.safetensors.index.json": Reader(published, read_published, ("index.json",)),
  "safetensors": Reader(published, read_published, (".safetensors",)),
  "published tokenizer.json": Reader(published, read_published, ("tokenizer.json",)),
  "tokenizer_config.json, its template": Reader(published, read_published, ("tokenizer_config.json",)),
  "a saved tokenizer, Hugging Face's": Reader(saved_tokenizer("huggingface"), read_tokenizer),
  "a saved tokenizer, SentencePiece": Reader(saved_tokenizer("sentencepiece"), read_tokenizer),
  "records: the manifest": Reader(records, read_records, ("manifest.json",)),
  "records: the shards": Reader(records, read_records, ("-of-00002",)),
  "records of conversations": Reader(prepared_talks, read_prepared_talks, ("manifest.json", "-of-00001")),
  "a corpus of JSON lines": Reader(lines(ROWS), read_corpus),
  "a corpus of one JSON list": Reader(whole(ROWS, "rows.json"), read_corpus),
  "a packed corpus (.gz, .bz2, .xz, .zst)": Reader(packed, read_corpus),
  "a corpus of Parquet": Reader(parquet, read_corpus),
  "conversations": Reader(lines(TALKS), read_talks),
  "a test to leave out": Reader(lines(ROWS), read_exclude),
  "couplets": Reader(whole([{"first": "ab", "second": "cd"}] * 3, "couplets.json"), read_couplets),
  "rows of a task": Reader(lines(ROWS), read_task),
  "the answers' cache": Reader(
    lines([["generate_until", "a", "b"], ["loglikelihood", "c", [-1.5, True]], ["loglikelihood_rolling", "d", -3.25]]),
    read_answers,
  ),
  "command lines": Reader(command_line, read_command),
}


# The damage.


def damage(name: str, content: bytes, rng: random.Random, others: list[bytes]) -> bytes:
  """The content of a file with something wrong in it."""
  if name.endswith((".gz", ".bz2", ".xz", ".zst")) and rng.random() < 0.5:  # what is inside
    from lladax.data.reading import zstd

    pack = {"gz": gzip, "bz2": bz2, "xz": lzma, "zst": zstd}[name.rpartition(".")[2]]
    return pack.compress(damage(name.rpartition(".")[0], pack.decompress(content), rng, others))
  if name.endswith(".safetensors") and rng.random() < 0.7:
    size = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + size]
    header = _structure(header, rng) if rng.random() < 0.7 else _bytes(header, rng, others)
    length = len(header) if rng.random() < 0.8 else rng.choice([0, 1, size, 2**31, 2**63, 2**64 - 1, len(content)])
    return length.to_bytes(8, "little") + header + content[8 + size :]
  if name.endswith((".json", ".jsonl", "command")) and rng.random() < 0.6:
    parts = content.splitlines(keepends=True) if name.endswith(".jsonl") else [content]
    i = rng.randrange(len(parts))
    parts[i] = _structure(parts[i], rng) + b"\n" * name.endswith(".jsonl")
    return b"".join(parts)
  return _bytes(content, rng, others)


def _structure(content: bytes, rng: random.Random) -> bytes:
  """JSON in which one to three values, or names, are others."""
  value = json.loads(content)
  for _ in range(rng.choice([1, 1, 2, 3])):
    places = []  # (the list or object, its key or index)
    waiting = [value]
    while waiting:
      x = waiting.pop()
      items = list(x.items()) if isinstance(x, dict) else list(enumerate(x)) if isinstance(x, list) else []
      places += [(x, key) for key, _ in items]
      waiting += [part for _, part in items]
    if not places:
      return json.dumps(rng.choice(VALUES)).encode()
    group, key = places[rng.randrange(len(places))]
    what = rng.randrange(7)
    if what == 0:
      del group[key]
    elif what == 1 and isinstance(group, dict):
      group[rng.choice(["", "x", "\x1b[2J", "../x", "a" * 3000, key + "x"])] = group.pop(key)
    elif what == 2:
      other, place = places[rng.randrange(len(places))]
      if place in (other if isinstance(other, dict) else range(len(other))):
        group[key] = json.loads(json.dumps(other[place]))
    elif what == 3 and isinstance(group[key], int | float) and not isinstance(group[key], bool):
      group[key] = group[key] * rng.choice([-1, 0, 2, 0.5, 10**3, 10**6, 10**9, 10**18]) + rng.choice([-1, 0, 1])
    elif what == 4 and isinstance(group[key], str):
      at = rng.randrange(len(group[key]) + 1)
      group[key] = group[key][:at] + str(rng.choice(VALUES))[:50] + group[key][at:]
    else:
      group[key] = json.loads(json.dumps(rng.choice(VALUES)))
  return json.dumps(value, ensure_ascii=rng.random() < 0.9).encode("utf-8", "surrogatepass")


def _bytes(content: bytes, rng: random.Random, others: list[bytes]) -> bytes:
  for _ in range(rng.choice([1, 1, 1, 2, 4, 8])):
    a, b = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    near = min(b, a + rng.randrange(1, 33))
    what = rng.randrange(8)
    if what < 2 and content:
      a = min(a, len(content) - 1)
      content = content[:a] + bytes([content[a] ^ 1 << rng.randrange(8)]) + content[a + 1 :]
    elif what == 2:
      content = content[:a]
    elif what == 3:
      content = content[:a] + content[near:]
    elif what == 4:
      content = content[:a] + rng.choice(BYTES) + content[a:]
    elif what == 5:
      content = content[:a] + bytes(rng.randrange(256) for _ in range(near - a)) + content[near:]
    elif what == 6:
      content = content[:b] + content[a:b] + content[b:]
    else:
      other = rng.choice(others)
      content = content[:a] + other[len(other) * a // (len(content) + 1) :]
  return content


# The campaign.


def attempt(reader: Reader, folder: Path, rng: random.Random) -> tuple[str, str]:
  """(outcome, what was said or raised) of one damaged input; the folder is as before afterwards."""
  from lladax.mistake import Mistake
  from lladax.terminal import visible

  before = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
  paths = [path for path in before if path.name.endswith(reader.damaged)]
  path = paths[rng.randrange(len(paths))]
  try:
    path.write_bytes(damage(path.name, before[path], rng, [x for x in before.values() if x]))
    reader.read(folder)
    return "read", ""
  except Mistake as error:
    said = str(error)
    if not said or len(said) > 3000 or visible(said) != said or "\n" in said:
      return "crash", f"a message that is not one readable line: {said[:500]!r}"
    return "mistake", said
  except MemoryError:
    return "memory", traceback.format_exc()
  except Exception:
    return "crash", traceback.format_exc()
  finally:
    for at in [x for x in folder.rglob("*") if x.is_file() and x not in before]:
      at.unlink()
    for at, content in before.items():
      at.write_bytes(content)


def _work(name: str, first: int, last: int, out: int) -> None:
  """A process's part: writes a line for every try."""
  reader = READERS[name]
  warnings.simplefilter("ignore")
  logging.disable(logging.CRITICAL)
  null = os.open(os.devnull, os.O_RDWR)
  for fd in (0, 1, 2):
    os.dup2(null, fd)
  with tempfile.TemporaryDirectory(prefix="lladax-fuzz-", dir=os.environ.get("LLADAX_FUZZ_DIR")) as folder:
    here = Path(folder)
    reader.make(here)
    reader.read(here)  # it is valid, and what is imported or compiled once is there
    used = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10
    resource.setrlimit(resource.RLIMIT_AS, (used + (MEMORY << 20), resource.RLIM_INFINITY))
    for n in range(first, last):
      random.seed(n)
      began, had = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
      outcome, said = attempt(reader, here, random.Random(f"{name} {n}"))
      more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - had
      line = json.dumps([n, outcome, said[-4000:], round(time.monotonic() - began, 3), more >> 10]).encode() + b"\n"
      os.write(out, line)
  os._exit(0)


def campaign(name: str, inputs: int) -> dict:
  """What became of so many inputs of a reader."""
  counts, first, slowest, most, after = collections.Counter(), {}, 0.0, 0, 0
  began = time.monotonic()
  while after < inputs:
    read, write = os.pipe()
    if not (process := os.fork()):
      os.close(read)
      try:
        _work(name, after, inputs, write)
      finally:
        os.write(write, json.dumps([-1, "crash", traceback.format_exc(), 0, 0]).encode() + b"\n")
        os._exit(1)
    os.close(write)
    with os.fdopen(read, "rb", buffering=0) as pipe:
      buffer, patience = b"", 120.0  # of the first: it imports
      while True:
        if not select.select([pipe], [], [], patience)[0]:
          end = "hang"
          break
        patience = SECONDS
        if not (part := pipe.read(2**16)):
          end = ""
          break
        buffer += part
        *told, buffer = buffer.split(b"\n")
        for line in told:
          n, outcome, said, seconds, more = json.loads(line)
          if n < 0:
            raise SystemExit(f"{name}: {said}")
          after = n + 1
          counts[outcome] += 1
          slowest, most = max(slowest, seconds), max(most, more)
          first.setdefault(outcome, (n, said))
    with contextlib.suppress(ProcessLookupError):
      os.kill(process, signal.SIGKILL)
    status = os.waitpid(process, 0)[1]
    if after < inputs:
      end = end or "crash"
      counts[end] += 1
      first.setdefault(end, (after, f"the process ended with status {status}" if end == "crash" else "no answer"))
      after += 1
  minutes = (time.monotonic() - began) / 60
  return {"counts": counts, "first": first, "slowest": slowest, "memory": most, "minutes": minutes}


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--inputs", type=int, default=10_000, help="of each reader")
  parser.add_argument("--only", default="", help="readers, by a part of their names")
  given = parser.parse_args()
  wanted = [name for name in READERS if not given.only or any(x in name for x in given.only.split(","))]
  print(f"| reader | {' | '.join(OUTCOMES)} | slowest, s | memory, MiB | minutes |")
  print("|---|" + "---|" * (len(OUTCOMES) + 3))
  bad = 0
  for name in wanted:
    found = campaign(name, given.inputs)
    counts = found["counts"]
    cells = [
      *(f"{counts[x]:,}" for x in OUTCOMES),
      f"{found['slowest']:.2f}",
      found["memory"],
      f"{found['minutes']:.1f}",
    ]
    print(f"| {name} | {' | '.join(map(str, cells))} |", flush=True)
    for outcome in OUTCOMES[2:]:
      if counts[outcome]:
        n, said = found["first"][outcome]
        print(f"{name}: {outcome} at input {n}:\n{said}", file=sys.stderr, flush=True)
        bad += counts[outcome]
  return int(bad > 0)


if __name__ == "__main__":
  sys.exit(main())
