"""A server of a model, measured from outside: what rows that share a pass bring, and a mixed load for minutes on end.

  pip install -e '.[serve,figures]'
  python benchmarks/serving.py throughput --steps=16 --requests=1 --rounds=2 --concurrency 1 2 4 8 --out=runs/serving
  python benchmarks/serving.py throughput --blocks 4 --prompt=32 --concurrency 1 8 --rounds=1 --requests=1
  python benchmarks/serving.py load --minutes=10 --out=runs/serving

Every model is random, float32, and lives in a server in a process of its own; this process is all clients.

`throughput`: N clients, each of which sends one request behind the other (`--prompt` ids, or with `--ragged` from an
eighth of them to all; `--gen` tokens, one a pass unless `--steps` says otherwise), streamed. Models (107M parameters)
and Ns take turns, round by round. Quoted are medians over the rounds, and the median of the ratios of a round to its
first N; of the requests' times, medians and 95th percentiles over all rounds. Tokens that end a text are never drawn.
A model of the whole canvas is asked without a cache and with the dual one. Thresholds are left out: how many passes
they save is a matter of what a model has learnt.

`load`: a small model, and Poisson arrivals at a share of the capacity that is found first: short and long, chats,
completions, infilling and scores, streamed or not, some with n, logprobs, stop, a seed, other samplers. Of them 5% are
left by their clients, 1% are too large and 1% no JSON; now and then a burst fills the queue, and who is refused (429)
comes again. In the end every request has its answer or the refusal that it should have, what was asked again with its
seed was answered by the same text, and the server's memory is where it was, or the exit code is 1. Written are
OUT/serving.json, with every request and every second, and OUT/serving.svg. Tables go to stdout.
"""

import argparse
import asyncio
import collections
import contextlib
import dataclasses
import importlib.metadata
import json
import multiprocessing
import os
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from lladax.data import vocabularies
from lladax.terminal import Console

SIZES = {  # of the models of the two modes
  "throughput": {"V": 32768, "D": 768, "N": 8, "H": 12, "K": 64, "F": 2048},
  "load": {"V": 384, "D": 128, "N": 2, "H": 4, "K": 32, "F": 256},
}
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
EVERY = 1.0  # seconds between two looks at the server
LARGEST = 2**16  # bytes of a body, under load
GOLDEN = 24  # requests that are made again and again


class Words(vocabularies.Bytes):
  """As many tokens as one likes: bytes, and words of their number."""

  def __init__(self, size: int):
    super().__init__()
    self.size = size

  def decode(self, ids: list[int]) -> str:
    """Text of ids."""
    return "".join(chr(id) if id < 128 else f"{id:x} " for id in ids)

  def piece(self, id: int) -> str:
    """One token."""
    return self.decode([id])


def make(a: dict[str, Any], block: int) -> Any:
  """A random model, and a tokenizer of its size."""
  import jax

  from lladax import LLaDA
  from lladax.data.tokenizer import Tokenizer, TokenizerConfig
  from lladax.model.mask_predictor import MaskPredictorConfig

  names = TokenizerConfig(kind="bytes")
  vocabulary = Words(a["V"] - 8) if a["mode"] == "throughput" else vocabularies.Bytes()
  text = Tokenizer(vocabulary, {"eos": names.eos, "mask": names.mask, "pad": "", "bos": ""})
  sizes = {name: a[name] for name in SIZES["load"]} | {"V": max(a["V"], text.rows)}
  model = MaskPredictorConfig(**sizes, G=a["H"], block=block, max_length=a["max_length"], dtype="float32")
  params = jax.jit(model.init)(jax.random.key(0))
  head_DV = params["head"] * 16  # else all tokens are about as probable, and rounding has a say
  # Of many logits the greatest is more than 0. Rows behind the vocabulary are as improbable where a model has learnt.
  never = [*range(text.vocab_size, model.V), *(text.ends if a["mode"] == "throughput" else ())]
  params["head"] = head_DV.at[:, np.array(never, int)].set(0.0)
  return LLaDA(model, params, text, text.mask_id, text.eos_id, text.vocab_size, text.eot_id)


def serve(pipe: Any, a: dict[str, Any], block: int) -> None:
  """The process of a server: says its port, then what it counts whenever asked, until it is told to stop."""
  import jax

  from lladax.main import keep_freed_memory
  from lladax.serving.app import make_app, make_server
  from lladax.serving.scheduler import Scheduler
  from lladax.serving.settings import ServeConfig

  keep_freed_memory()  # as `lladax` does
  programs = collections.Counter[str]()
  jax.monitoring.register_event_duration_secs_listener(lambda name, _, **__: programs.update([name]))
  llada = make(a, block)
  settings = ServeConfig(rows=a["rows"], queue=a["queue"], timeout=86400.0, max_body=a["max_body"])
  scheduler = Scheduler(llada, rows=settings.rows, waiting=settings.queue)
  server = make_server(make_app(scheduler, llada, settings, "random", a["options"]))
  listener = socket.create_server(("127.0.0.1", 0), backlog=1024)

  def answer() -> None:
    with contextlib.suppress(EOFError):
      while pipe.recv():
        compiled = programs["/jax/core/compile/backend_compile_duration"]
        pipe.send(scheduler.stats | {"programs": compiled, "rss": memory(os.getpid())})
    scheduler.drain(30.0)
    server.should_exit = True

  pipe.send(listener.getsockname()[1])
  threading.Thread(target=answer, daemon=True).start()
  server.run(sockets=[listener])


def memory(pid: int) -> float:
  """Resident MiB."""
  status = Path(f"/proc/{pid}/status").read_text()
  return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))) / 1024


class Server:
  """A server in a process of its own, as its clients see it."""

  def __init__(self, a: dict[str, Any], block: int):
    context = multiprocessing.get_context("spawn")
    self._pipe, theirs = context.Pipe()
    self._process = context.Process(target=serve, args=(theirs, a, block), daemon=True)
    self._process.start()
    theirs.close()
    self.port: int = self._pipe.recv()

  def stats(self) -> dict[str, Any]:
    """What it counts, its programs and its memory."""
    self._pipe.send(True)
    return self._pipe.recv()

  def stop(self) -> None:
    """Lets it end."""
    self._pipe.send(False)
    self._process.join()


@dataclasses.dataclass
class Answer:
  """What became of a request."""

  status: int | str = "lost"  # or "left", by its client
  texts: dict[int, str] = dataclasses.field(default_factory=dict)
  whole: bool = False  # all choices have ended, and the stream said so
  tokens: int = 0
  began: float = 0.0  # all in seconds
  first: float | None = None  # to the first text of a stream
  seconds: float = 0.0
  tries: int = 1
  again: int = 0  # seconds that the server asks to wait


async def ask(port: int, path: str, content: bytes) -> Answer:
  """One request, on a connection of its own."""
  found, began = Answer(began=time.monotonic()), time.monotonic()
  reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**24)
  try:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    told = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
    headers = dict(line.split(": ", 1) for line in told[1:] if line)
    status, found.again = int(told[0].split()[1]), int(headers.get("retry-after", 0))
    if not headers["content-type"].startswith("text/event-stream"):
      body = json.loads(await reader.readexactly(int(headers["content-length"])))
      if status == 200:
        take(found, body, began)
        found.whole = all(x["finish_reason"] for x in body["choices"])
    else:
      ended = set()
      async for line in reader:
        if line.startswith(b"data: [DONE]"):
          found.whole = ended == found.texts.keys()
        elif line.startswith(b"data: "):
          event = json.loads(line[6:])
          if "error" in event:
            status = f"error in a stream: {event['error']['message']}"
            break
          ended |= {x["index"] for x in event["choices"] if x["finish_reason"]}
          take(found, event, began)
    found.status, found.seconds = status, time.monotonic() - began
  except (OSError, asyncio.IncompleteReadError) as error:
    found.status, found.seconds = type(error).__name__, time.monotonic() - began
  finally:
    writer.transport.abort()
  return found


def take(found: Answer, event: dict[str, Any], began: float) -> None:
  """A chunk, or a whole answer."""
  for x in event["choices"]:
    said = x["text"] if "text" in x else (x.get("delta") or x["message"]).get("content", "")
    found.texts[x["index"]] = found.texts.get(x["index"], "") + said
    if said and event["object"] != "chat.completion" and found.first is None:
      found.first = time.monotonic() - began
  found.tokens = (event.get("usage") or {}).get("completion_tokens", found.tokens)


async def clients(port: int, each: Sequence[Sequence[bytes]]) -> list[Answer]:
  """As many clients, each of which sends one request behind the other."""

  async def one(bodies: Sequence[bytes]) -> list[Answer]:
    return [await ask(port, TEXT, body) for body in bodies]

  found = [x for answers in await asyncio.gather(*map(one, each)) for x in answers]
  if failed := [x.status for x in found if x.status != 200 or not x.whole]:
    raise SystemExit(f"not answered: {failed}")
  return found


def throughput(a: dict[str, Any]) -> None:
  """Prints the table of all models and Ns."""
  most = max(a["concurrency"])
  a |= {"rows": most, "queue": 64, "max_body": 2**22, "max_length": 2 * (a["prompt"] + a["gen"]), "options": {}}
  servers = {block: Server(a, block) for block in a["blocks"]}
  contenders: dict[str, tuple[Server, dict[str, Any]]] = {}
  for block, server in servers.items():
    if block:
      contenders[f"blocks of {block}"] = server, {}
      continue
    whole = {"block_length": min(a["block_length"], a["gen"])}
    contenders |= {"whole canvas": (server, whole), "whole canvas, dual cache": (server, whole | {"cache": "dual"})}

  def bodies(rng: np.random.Generator, N: int, options: dict[str, Any]) -> list[list[bytes]]:
    n = N * a["requests"]
    least = a["prompt"] // 8 if a["ragged"] else a["prompt"]
    lengths = rng.permutation(least + ((a["prompt"] - least) * (np.arange(n) + 0.5) / n).round().astype(int))
    same = {"model": "random", "max_tokens": a["gen"], "temperature": 0.0, "seed": 0, "early_stop": False,
            "stream": True, "stream_options": {"include_usage": True}, **options}  # fmt: skip
    every = [json.dumps(same | {"prompt": rng.integers(0, a["V"] - 9, L).tolist()}).encode() for L in lengths.tolist()]
    return [every[i::N] for i in range(N)]

  def measured(name: str, N: int, seed: int, steps: int) -> dict[str, Any]:
    server, options = contenders[name]
    asked, before = bodies(np.random.default_rng(seed), N, options | {"steps": steps}), server.stats()
    began = time.monotonic()
    answers = asyncio.run(clients(server.port, asked))
    seconds, after = time.monotonic() - began, server.stats()
    passes, row_passes, programs = (after[x] - before[x] for x in ("passes", "row_passes", "programs"))
    return {
      "tokens_per_second": sum(x.tokens for x in answers) / seconds, "rows_per_pass": row_passes / passes,
      "first": [x.first or x.seconds for x in answers], "seconds": [x.seconds for x in answers], "programs": programs,
    }  # fmt: skip

  seen: dict[tuple[str, int], list[dict[str, Any]]] = collections.defaultdict(list)
  turns = [(name, N) for name in contenders for N in a["concurrency"]]
  with Progress(console=Console(stderr=True)) as progress:
    task = progress.add_task("", total=(1 + a["rounds"]) * len(turns))
    for r in range(-1, a["rounds"]):
      for name, N in turns:
        progress.update(task, description=f"{'warming up' if r < 0 else f'round {r + 1}'}: {name}, {N} at once")
        if r < 0:  # two passes a block, until all programs are there
          W = int(name.split()[-1]) if name.startswith("blocks") else a["block_length"]
          any(not measured(name, N, 0, max(2 * a["gen"] // W, 1))["programs"] for _ in range(4))
        else:
          for _ in range(3):  # which rows meet is a matter of chance: a round that had to compile is made again
            if not (found := measured(name, N, r + 1, a["steps"] or a["gen"]))["programs"]:
              break
          seen[name, N].append(found)
        progress.advance(task)
  for server in servers.values():
    server.stop()
  print(f"{hardware()}; {a['rounds']} rounds of {a['requests']} requests a client\n")
  print(
    "| model | clients | tokens/s | times one's | first text, s | 95% | request, s | 95% | rows a pass | compiled |"
  )
  print("|" + "---|" * 10)
  for (name, N), rounds in seen.items():
    first = seen[name, a["concurrency"][0]]
    ratio = statistics.median(
      x["tokens_per_second"] / y["tokens_per_second"] for x, y in zip(rounds, first, strict=True)
    )
    times = (np.percentile(np.concatenate([x[name] for x in rounds]), (50, 95)) for name in ("first", "seconds"))
    speed, filled = (statistics.median(x[name] for x in rounds) for name in ("tokens_per_second", "rows_per_pass"))
    print(f"| {name} | {N} | {speed:,.1f} | {ratio:.2f} | " + " | ".join(f"{x:.2f}" for t in times for x in t)
          + f" | {filled:.2f} | {sum(x['programs'] for x in rounds)} |")  # fmt: skip
  if a["out"]:
    a["out"].mkdir(parents=True, exist_ok=True)
    rows = [{"model": name, "clients": N, "rounds": rounds} for (name, N), rounds in seen.items()]
    said = {"hardware": hardware(), "sizes": a | {"out": str(a["out"])}, "results": rows}
    (a["out"] / "throughput.json").write_text(json.dumps(said))


def hardware() -> str:
  """What a number is of: the machine, the version, the commit."""
  named = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
  where = Path(__file__).resolve().parent
  run = [subprocess.run(["git", "-C", where, *x], capture_output=True, text=True).stdout.strip()
         for x in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "-uno"])]  # fmt: skip
  commit = (run[0] or "unknown") + (", changed" if run[1] else "")
  name = named[0].partition(": ")[2] if named else "an unknown processor"
  return f"{len(os.sched_getaffinity(0))} cores of {name}; jax {importlib.metadata.version('jax')}; commit {commit}"


@dataclasses.dataclass
class Question:
  """A request of the mixed load."""

  kind: str
  path: str
  content: bytes
  expected: tuple[int | str, ...] = (200,)
  leaves: float | None = None  # its client, after so many seconds
  golden: int | None = None  # the number of one that is asked again and again


def question(rng: random.Random, block: int) -> Question:
  """One that is answered."""
  (kind,) = rng.choices(("chat", "completion", "suffix", "masks", "score"), (8, 8, 2, 2, 1))
  length = rng.choice(("short", "short", "long"))
  text = " ".join(rng.choices("red green blue yellow sun moon sea hill".split(), k=rng.randint(2, 8)))
  if length == "long":
    text = " ".join([text] * 3)
  # What a program is compiled for is one of three: each of them exists for each number of rows, and each length.
  samplers = [{}, {"temperature": 0.7}, {"temperature": 1.0, "tokens_per_step": 2}, {"threshold": 0.9}]
  samplers.append({"temperature": 0.5, "top_p": 0.9})
  samplers += [] if block else [{"cache": "dual"}]
  body: dict[str, Any] = {"model": "random", "n": rng.choice((1, 1, 1, 1, 2, 3)), **rng.choice(samplers)}
  body |= {"seed": rng.randrange(2**32)} if rng.random() < 0.5 else {}
  whole = {} if block else {"block_length": 16}
  tokens = {"max_tokens": 16 if length == "short" else rng.choice((32, 48))}
  if kind == "chat":
    body |= {"messages": [{"role": "user", "content": text}], **tokens, "logprobs": rng.random() < 0.2}
  elif kind == "completion":
    body |= {"prompt": text, **tokens, "logprobs": rng.choice((None, None, None, 1))}
  elif kind == "suffix":
    body |= {"prompt": text, "suffix": " end", "max_tokens": rng.choice((4, 12))} | whole
  elif kind == "masks":
    body |= {"prompt": text + "[MASK]" * rng.choice((3, 9)) + text[:60]} | whole
  else:
    body |= {"prompt": text[:40], "echo": True, "logprobs": 1, "max_tokens": 0}
  if kind in ("chat", "completion") and rng.random() < 0.2:
    body["stop"] = rng.choice((["e"], ["q", "zz"]))
  body["stream"] = rng.random() < 0.5
  kind += f", {length}" if kind in ("chat", "completion") else ""
  return Question(kind, CHAT if "messages" in body else TEXT, json.dumps(body).encode())


def golden(block: int) -> list[Question]:
  """Those that are asked again and again: each with its seed."""
  rng, found = random.Random(1), []
  for i in range(GOLDEN):
    x = question(rng, block)
    found.append(dataclasses.replace(x, golden=i, content=json.dumps(json.loads(x.content) | {"seed": i}).encode()))
  return found


def drawn(rng: random.Random, known: Sequence[Question], block: int) -> Question:
  """The next one of the mix, faults and all."""
  x, chance = rng.choice(known) if rng.random() < 0.2 else question(rng, block), rng.random()
  if chance < 0.05:
    return dataclasses.replace(x, expected=(200, "left"), leaves=rng.uniform(0.0, 0.5))
  if chance < 0.06:
    return Question("too large", TEXT, json.dumps({"model": "random", "prompt": "a" * 2 * LARGEST}).encode(), (413,))
  if chance < 0.07:
    return Question("no JSON", x.path, x.content[: len(x.content) // 2], (400,))
  if x.golden is not None:  # its text is the same, streamed or not
    body = json.loads(x.content) | {"stream": rng.random() < 0.5}
    return dataclasses.replace(x, content=json.dumps(body).encode())
  return x


async def answered(port: int, x: Question) -> Answer:
  """Asks until there is room, or until the client has had enough."""
  began, tries = time.monotonic(), 0

  async def insist() -> Answer:
    nonlocal tries
    while True:
      tries += 1
      found, late = await ask(port, x.path, x.content), time.monotonic()
      if found.status != 429:
        return found
      await asyncio.sleep(found.again * random.uniform(0.5, 1.5))
      waited.append(time.monotonic() - late)

  waited: list[float] = []
  try:
    found = await asyncio.wait_for(insist(), x.leaves)
  except TimeoutError:
    found = Answer("left")
  seconds = time.monotonic() - began
  first = None if found.first is None else found.first + found.began - began  # from the first try on
  return dataclasses.replace(found, began=began, seconds=seconds, first=first, tries=tries)


class Load:
  """A load on a server, and what was seen of it."""

  def __init__(self, a: dict[str, Any], server: Server, progress: Progress):
    self.a, self.server, self.progress = a, server, progress
    self.known, self.rng = golden(a["block"]), random.Random(a["seed"])
    self.seen: list[tuple[Question, Answer]] = []
    self.looks: list[dict[str, Any]] = []

  async def busy(self, requests: int) -> float:
    """Requests a second, of as many clients as rows, and half as many more."""
    left, began = (
      collections.deque(drawn(self.rng, self.known, self.a["block"]) for _ in range(requests)),
      time.monotonic(),
    )

    async def client() -> None:
      while left:
        await answered(self.server.port, left.popleft())

    await asyncio.gather(*(client() for _ in range(self.a["rows"] * 3 // 2)))
    return requests / (time.monotonic() - began)

  async def warm(self) -> tuple[float, int]:
    """(capacity in requests a second, requests so far): until a batch of them brings few programs."""
    size, done = self.a["warm"], 0
    task = self.progress.add_task("warming up", total=self.a["warmup"] * size)
    for _ in range(self.a["warmup"]):
      before = self.server.stats()["programs"]
      capacity, done = await self.busy(size), done + size
      self.progress.advance(task, size)
      if self.server.stats()["programs"] - before <= 1:
        break
    self.progress.remove_task(task)
    return capacity, done

  async def one(self, x: Question) -> None:
    """One more request."""
    answer = await answered(self.server.port, x)
    self.seen.append((x, answer))

  async def run(self, rate: float) -> None:
    """Arrivals for so many minutes; returns when the last one is answered."""
    began, seconds, tasks = time.monotonic(), 60 * self.a["minutes"], set()
    task = self.progress.add_task("under load", total=seconds)
    watch = asyncio.ensure_future(self.watch(began, task))
    at, burst = 0.0, self.a["burst"]
    while at < seconds:
      await asyncio.sleep(max(0.0, began + at - time.monotonic()))
      many = 1
      if at > burst:
        burst, many = burst + self.a["burst"], self.a["rows"] + 2 * self.a["queue"]
      tasks |= {asyncio.ensure_future(self.one(drawn(self.rng, self.known, self.a["block"]))) for _ in range(many)}
      at += self.rng.expovariate(rate)
    await asyncio.wait(tasks, timeout=self.a["patience"])
    for x in tasks:
      x.cancel()
    self.lost = sum(not x.done() for x in tasks)
    watch.cancel()
    await asyncio.gather(watch, *tasks, return_exceptions=True)
    self.began = began

  async def watch(self, began: float, task: Any) -> None:
    """A look at the server every second."""
    while True:
      at = time.monotonic() - began
      self.looks.append({"at": at} | await asyncio.to_thread(self.server.stats))
      self.progress.update(task, completed=at)
      await asyncio.sleep(EVERY)


def load(a: dict[str, Any]) -> None:
  """Puts a server under load; prints tables, writes and draws what was seen, and ends by what was wrong."""
  import matplotlib  # noqa: F401  # not after ten minutes

  a |= {"max_body": LARGEST, "max_length": 256, "options": {"gen_length": 32, "block_length": 16, "steps": 32}}
  if a["block"]:
    del a["options"]["block_length"]
  server = Server(a, a["block"])
  with Progress(console=Console(stderr=True)) as progress:
    own = Load(a, server, progress)
    capacity, warmed = asyncio.run(own.warm())
    asyncio.run(own.run(rate := a["load"] * capacity))
  end = server.stats()
  server.stop()
  rows = [
    {"at": y.began - own.began, "kind": x.kind, "golden": x.golden, "expected": x.expected, "texts": y.texts,
     **{name: getattr(y, name) for name in ("status", "whole", "first", "seconds", "tries", "tokens")}}
    for x, y in own.seen
  ]  # fmt: skip
  same: dict[int, collections.Counter[str]] = collections.defaultdict(collections.Counter)
  for row in rows:
    if row["golden"] is not None and row["status"] == 200:
      same[row["golden"]][json.dumps(row["texts"], sort_keys=True)] += 1
  again, differing = sum(x.total() for x in same.values()), sum(x.total() - max(x.values()) for x in same.values())
  wrong = [x for x in rows if x["status"] not in x["expected"] or (x["status"] == 200 and not x["whole"])]
  half = own.looks[len(own.looks) // 2 :]
  slope = float(np.polyfit([x["at"] for x in half], [x["rss"] for x in half], 1)[0]) if len(half) > 1 else 0.0
  grown, compiled = slope * (half[-1]["at"] - half[0]["at"]), half[-1]["programs"] - half[0]["programs"]
  memory_MiB = statistics.median(x["rss"] for x in half)
  short = ", too short to judge" * (len(half) < 60)
  flat = bool(short) or grown < 0.03 * memory_MiB
  print(f"{hardware()}\n\n{warmed} requests to warm up; capacity {capacity:.1f} requests/s; {a['minutes']:g} minutes at"
        f" {rate:.1f} a second ({a['load']:.0%}) and bursts: {len(rows):,} requests\n")  # fmt: skip
  print("\n".join(table(rows)))
  checks = {
    "requests without the answer or the refusal they should have": (len(wrong) + own.lost, not wrong and not own.lost),
    f"of {again:,} answers to {len(same)} questions with their seeds, with another text": (differing, not differing),
    "batches that crashed": (end["crashes"], not end["crashes"]),
    "rows that the server still has in the end": (end["running"] + end["waiting"], not end["running"] + end["waiting"]),
    f"growth of the memory in the second half, MiB of {memory_MiB:,.0f} ({compiled} programs compiled in it){short}":
      (round(grown, 1), flat),
    "refusals of a full queue (429), all asked again": (sum(x["tries"] - 1 for x in rows), True),
  }  # fmt: skip
  print("\n| | | |\n|---|---|---|")
  print(
    "\n".join(
      f"| {name} | {value:,} | {'as it should be' if fine else 'WRONG'} |" for name, (value, fine) in checks.items()
    )
  )
  passes, row_passes = (own.looks[-1][x] - own.looks[0][x] for x in ("passes", "row_passes"))
  print(f"\n{row_passes / max(passes, 1):.2f} rows a pass; {passes:,} passes")
  a["out"].mkdir(parents=True, exist_ok=True)
  said = {"hardware": hardware(), "settings": a | {"out": str(a["out"])}, "capacity": capacity, "rate": rate,
          "checks": checks, "requests": rows, "server": own.looks}  # fmt: skip
  (a["out"] / "serving.json").write_text(json.dumps(said))
  draw(rows, own.looks, a["out"] / "serving.svg")
  print(f"{a['out'] / 'serving.svg'}, .json", file=sys.stderr)
  for row in wrong[:5]:
    print(f"wrong: {row['kind']}: {row['status']}, {row['tries']} tries", file=sys.stderr)
  if failed := [name for name, (_, fine) in checks.items() if not fine]:
    raise SystemExit(f"not as it should be: {'; '.join(failed)}")


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
  """Markdown: a line for each kind of request, and for all."""

  def line(name: str, part: Sequence[dict[str, Any]]) -> str:
    told = collections.Counter(str(x["status"]) for x in part)
    there = [x for x in part if x["status"] == 200]
    cells = [percentiles([x["seconds"] for x in there], (50, 95, 99)),
             percentiles([x["first"] for x in there if x["first"] is not None], (50, 95))]  # fmt: skip
    return f"| {name} | {len(part):,} | {', '.join(f'{k}: {n:,}' for k, n in sorted(told.items()))} | " + " | ".join(
      f"{x:.2f}" if x is not None else "" for cell in cells for x in cell
    ) + " |"  # fmt: skip

  kinds = sorted({x["kind"] for x in rows})
  head = "| requests | sent | status | seconds, median | 95% | 99% | to the first text, median | 95% |"
  lines = [line(kind, [x for x in rows if x["kind"] == kind]) for kind in kinds]
  return [head, "|" + "---|" * 8, *lines, line("**all**", rows)]


def percentiles(values: Sequence[float], which: Sequence[int]) -> list[Any]:
  """Of values, if there are any."""
  return np.percentile(values, which).tolist() if len(values) else [None] * len(which)


def draw(rows: Sequence[dict[str, Any]], looks: Sequence[dict[str, Any]], path: Path) -> None:
  """Over the time: how long answers take, how many there are, who waits, and the memory."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(4, 1, figsize=(7, 8), sharex=True, layout="constrained")
  there = [x for x in rows if x["status"] == 200]
  end = max(x["at"] for x in looks)
  edges = np.linspace(0, end, min(60, max(4, int(end / 5))) + 1)
  middles = (edges[1:] + edges[:-1]) / 120
  bins = np.clip(np.digitize([x["at"] + x["seconds"] for x in there], edges) - 1, 0, len(middles) - 1)
  seconds = np.array([x["seconds"] for x in there])
  for which, colour in ((50, "#0072b2"), (95, "#e69f00"), (99, "#d55e00")):
    found = [percentiles(seconds[bins == i], [which])[0] for i in range(len(middles))]
    axes[0].plot(middles, [np.nan if x is None else x for x in found], color=colour,
                 label={50: "median"}.get(which, f"{which}%"))  # fmt: skip
  axes[0].set(ylabel="seconds to the answer", yscale="log")
  width = np.diff(edges)
  axes[1].step(
    middles, np.bincount(bins, minlength=len(middles)) / width, where="mid", color="#0072b2", label="answered"
  )
  arrived = np.histogram([x["at"] for x in rows], edges)[0]
  axes[1].step(middles, arrived / width, where="mid", color="#808080", linestyle=":", label="sent")
  axes[1].set(ylabel="requests/s", ylim=(0, None))
  minutes = [x["at"] / 60 for x in looks]
  axes[2].plot(minutes, [x["waiting"] for x in looks], color="#d55e00", label="wait")
  axes[2].plot(minutes, [x["running"] for x in looks], color="#0072b2", label="run")
  axes[2].set(ylabel="rows", ylim=(0, None))
  axes[3].plot(minutes, [x["rss"] for x in looks], color="#0072b2", label="server")
  axes[3].set(ylabel="resident memory, MiB", ylim=(0, None), xlabel="minutes", xlim=(0, end / 60))
  for x in axes:
    x.spines[["top", "right"]].set_visible(False)
    x.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
  figure.savefig(path, metadata={"Date": None})
  pyplot.close(figure)


def main(argv: Iterable[str]) -> None:
  """One of the two."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  modes = parser.add_subparsers(dest="mode", required=True)
  one, two = modes.add_parser("throughput"), modes.add_parser("load")
  one.add_argument("--blocks", type=int, nargs="+", default=[0, 4, 32], help="tokens of a block; 0: the whole canvas")
  one.add_argument("--concurrency", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="clients")
  one.add_argument("--rounds", type=int, default=3)
  one.add_argument("--requests", type=int, default=2, help="of each client in a round")
  one.add_argument("--prompt", type=int, default=256)
  one.add_argument("--gen", type=int, default=64)
  one.add_argument("--block_length", type=int, default=32, help="asked of models of the whole canvas")
  one.add_argument("--steps", type=int, default=0, help="passes of a request; 0: one a token")
  one.add_argument("--ragged", action="store_true", help="prompts of different lengths")
  one.add_argument("--out", type=Path)
  two.add_argument("--minutes", type=float, default=10.0)
  two.add_argument("--load", type=float, default=0.7, help="share of the capacity at which requests arrive")
  two.add_argument("--burst", type=float, default=60.0, help="seconds between two bursts")
  two.add_argument("--rows", type=int, default=8)
  two.add_argument("--queue", type=int, default=32)
  two.add_argument("--block", type=int, default=0, help="of the model")
  two.add_argument("--warm", type=int, default=200, help="requests in a batch of those that warm up")
  two.add_argument("--warmup", type=int, default=20, help="batches of them at most")
  two.add_argument("--patience", type=float, default=300.0, help="seconds that the last answers may take")
  two.add_argument("--seed", type=int, default=0)
  two.add_argument("--out", type=Path, default=Path("runs/serving"))
  for mode, its in (("throughput", one), ("load", two)):
    for name, default in SIZES[mode].items():
      its.add_argument(f"--{name}", type=int, default=default)
  a = vars(parser.parse_args(list(argv)))
  {"throughput": throughput, "load": load}[a["mode"]](a)


if __name__ == "__main__":
  main(sys.argv[1:])
