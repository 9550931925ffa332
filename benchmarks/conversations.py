"""Conversations as records: how fast they are prepared, and how soon a run reads them, beside JSON lines.

  python benchmarks/conversations.py OUT [--count=100000]

Writes COUNT conversations to OUT, of one to three questions and answers each, which are lines of Python's standard
library; trains a vocabulary of 4,096 on some of them; prepares them with one worker and with two; and measures the time
from the corpus to the first batch of a run, from the lines and from the records, with all replies learnt and packed.
"""

import argparse
import filecmp
import json
import random
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

from lladax.data import batches, corpus, sources, tokenizer
from lladax.data.windows import DataConfig

BATCHES = 30


def talks(count: int) -> list[list[dict[str, str]]]:
  rng = random.Random(0)
  lines = [x.strip() for text in corpus.documents("stdlib") for x in text.splitlines() if len(x.strip()) > 20]

  def talk():
    found = []
    for _ in range(rng.choice((1, 1, 2, 3))):
      for role, most in (("user", 4), ("assistant", 24)):
        at = rng.randrange(len(lines))
        found.append({"role": role, "content": "\n".join(lines[at : at + rng.randint(1, most)])})
    return found

  return [talk() for _ in range(count)]


def prepare(config: list[str], target: Path, workers: int) -> None:
  command = [sys.executable, "-m", "lladax.main", "--mode=prepare", f"--target={target}", "--shards=8", *config]
  beam = ["--", f"--direct_num_workers={workers}", "--direct_running_mode=multi_processing"]
  shutil.rmtree(target, ignore_errors=True)
  began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
  subprocess.run([*command, *beam], check=True, stderr=subprocess.DEVNULL)
  seconds, cpu = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
  splits = json.loads((target / "manifest.json").read_text())["splits"].values()
  documents, tokens = (sum(x[name] for x in splits) for name in ("documents", "tokens"))
  print(f"{workers} workers: {documents:,} conversations, {tokens:,} tokens in {seconds:.0f} s with the start")
  print(f"  {documents / seconds:,.0f} conversations/s, {tokens / seconds:,.0f} tokens/s; {cpu:.0f} s of a core")


def start(name: str, text: tokenizer.Tokenizer) -> None:
  c = DataConfig(name, format="chat", length=1024, replies="all", eos_padding="block", packing=True, align=32)
  began, before = time.monotonic(), time.process_time()
  found = sources.training(c, text, seed=0)
  read = batches.of_steps(found, c, eos_id=text.eos_id, seed=0, steps=1000, start=0, stop=1000)
  next(read)
  print(f"{name}: first batch after {time.monotonic() - began:.1f} s", end=" ")
  print(f"({time.process_time() - before:.1f} s of a core),", end=" ")
  began = time.monotonic()
  for _ in range(BATCHES):
    next(read)
  print(f"then {BATCHES * c.batch_size * c.length / (time.monotonic() - began):,.0f} tokens/s; {found[0].about}")


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument("out", type=Path)
  parser.add_argument("--count", type=int, default=100_000)
  args = parser.parse_args()
  args.out.mkdir(parents=True, exist_ok=True)
  made, parts = talks(args.count), 8
  for part in range(parts):
    lines = (json.dumps({"messages": x}) + "\n" for x in made[part::parts])
    (args.out / f"{part}.jsonl").write_text("".join(lines))
  texts = [corpus.said(x) for x in made[:5000]]
  tokenizer.create(tokenizer.TokenizerConfig(vocab_size=4096), texts).save(args.out / "tokenizer")
  name = f"files:{args.out}/*.jsonl"
  fields = {"data.corpus": name, "data.format": "chat", "data.held_out": "0.05",
            "tokenizer.path": str(args.out / "tokenizer" / "sp.model")}  # fmt: skip
  config = ["--config=base", *(f"--config.{field}={value}" for field, value in fields.items())]
  folders = [args.out / f"records{workers}" for workers in (1, 2)]
  for workers, folder in enumerate(folders, start=1):
    prepare(config, folder, workers)
  same = filecmp.dircmp(*folders)
  print("the same bytes" if not (same.diff_files or same.left_only or same.right_only) else "other bytes")
  text = tokenizer.load(folders[0] / "tokenizer")
  for corpus_ in (name, f"records:{folders[0]}"):
    start(corpus_, text)


if __name__ == "__main__":
  main()
