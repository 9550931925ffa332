"""A server of a model on a port of this machine, in a thread or by its command; a scheduler that goes by the book."""

import asyncio
import collections
import contextlib
import os
import pathlib
import re
import socket
import subprocess
import sys
import threading
import time
from typing import Any

import numpy as np

from lladax.inference.slots import Snapshot
from lladax.serving.settings import ServeConfig

OPTIONS = {"gen_length": 16, "block_length": 8, "steps": 16, "temperature": 0.0}


@contextlib.contextmanager
def serving(llada, scheduler, options=OPTIONS, **settings):
  """The address of a server, and its gate."""
  from lladax.serving.app import make_app, make_server

  gate = make_app(scheduler, llada, ServeConfig(**settings), "tiny", options)
  listener = socket.create_server(("127.0.0.1", 0))
  server = make_server(gate)
  thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
  thread.start()
  until(lambda: server.started)
  try:
    yield f"http://127.0.0.1:{listener.getsockname()[1]}", gate
  finally:
    server.should_exit = True
    thread.join()
    listener.close()


@contextlib.contextmanager
def command(workdir, *flags):
  """(a process that serves, its address); killed if the test has not ended it."""
  line = [sys.executable, "-m", "lladax.main", "--mode=serve", f"--workdir={workdir}", "--port=0", *flags]
  root, env = pathlib.Path(__file__).parent.parent, {**os.environ, "XLA_FLAGS": ""}
  with subprocess.Popen(line, cwd=root, stdout=-1, stderr=-1, text=True, env=env) as process:
    try:
      assert process.stdout
      said = process.stdout.readline()
      address = re.search(r"http://\S+", said)
      assert address, said + process.stderr.read()
      yield process, address[0]
    finally:
      process.kill()


def until(true, seconds=20.0):
  """Waits for it."""
  end = time.monotonic() + seconds
  while not true():
    assert time.monotonic() < end, "it did not happen"
    time.sleep(0.01)


def snapshots(llada, row, ids):
  """What a row's passes leave that commit `ids` from left to right, one a pass."""
  first, n = len(row.ids), len(ids)
  for k in range(1, n + 1):
    tokens = np.array([*row.ids, *ids[:k], *[llada.mask_id] * (n - k)], np.int32)
    at = np.array([*[0] * first, *range(1, k + 1), *[0] * (n - k)], np.int32)
    yield Snapshot(tokens, at, np.full(first + n, 0.5, np.float32), None, first, first + k, k, k == n)


class Book:
  """A scheduler that gives every row the same answer, a pass whenever `gate` lets it, and fails when it is told to."""

  def __init__(self, llada, text="so be it", error=None, refuse=None):
    self.llada, self.ids, self.error, self.refuse = llada, llada.tokenizer.encode(text), error, refuse
    self.state, self.stats = "ready", collections.Counter()
    self.jobs: list[Any] = []
    self.gate = threading.Event()  # set: the rest may come
    self.gate.set()

  def submit(self, rows, *, timeout=None, every=False):
    if self.refuse:
      raise self.refuse
    self.jobs.append(_Job(self, rows, timeout))
    return self.jobs[-1]

  async def score(self, rows):
    """By the model itself."""
    return [self._scored(row) for row in rows]

  def _scored(self, row):
    found = [(0.0, 0, 0.0)]
    for i in range(1, len(row)):
      logits = self.llada.logits([[*row[:i], *[self.llada.mask_id] * (len(row) - i)]])[0, i].astype(float)
      log_p = logits - np.log(np.exp(logits).sum())
      found.append((log_p[row[i]], log_p.argmax(), log_p.max()))
    return tuple(np.array(x) for x in zip(*found, strict=True))

  def drain(self, seconds):
    self.state = "draining"


class _Job:
  def __init__(self, book, rows, timeout):
    self.book, self.rows, self.timeout, self.cancelled = book, rows, timeout, [False] * len(rows)

  def cancel(self, index=None):
    for i in range(len(self.rows)) if index is None else [index]:
      self.cancelled[i] = True

  async def watch(self):
    for i, row in enumerate(self.rows):
      for k, snapshot in enumerate(snapshots(self.book.llada, row, self.book.ids)):
        while k and not self.book.gate.is_set():
          await asyncio.sleep(0.01)
        if self.book.error and k:
          raise self.book.error
        if not self.cancelled[i]:
          yield i, snapshot
