"""The queue in front of the engine: who waits, who runs, and who hears of it."""

import asyncio
import collections
import threading
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np

from lladax.inference.llada import LLaDA
from lladax.inference.slots import Row, Snapshot
from lladax.sampling import SamplerConfig  # noqa: F401


class Full(Exception):
  """The queue is full; `retry_after`: seconds until there may be room."""

  def __init__(self, retry_after: int):
    super().__init__(f"the queue is full: try again in {retry_after} s")
    self.retry_after = retry_after


class Draining(Exception):
  """The server is going down, or not up yet."""


class Expired(Exception):
  """The deadline of a request has passed."""


class Failed(Exception):
  """The batch that a request was in has crashed."""


class Job:
  """A request: rows that are answered together."""

  def __init__(self, rows: Sequence[Row], deadline: float | None, every: bool):
    self.rows, self.deadline = tuple(rows), deadline  # time.monotonic()
    self.cancelled = [False] * len(rows)
    self.queued_at, self.began_at = time.monotonic(), None
    self.error: Exception | None = None
    self._news: collections.deque = collections.deque(maxlen=1024 if every else None)
    self._latest: dict[int, Snapshot] = {}
    self._every, self._lock = every, threading.Lock()
    self._loop, self._event = asyncio.get_running_loop(), asyncio.Event()

  def cancel(self, index: int | None = None) -> None:
    """Row `index`, or all, shall end at the next pass; `watch` says no more of it."""
    for i in range(len(self.rows)) if index is None else [index]:
      self.cancelled[i] = True
    self._wake()

  async def watch(self) -> AsyncIterator[tuple[int, Snapshot]]:
    """(row, what it is now) until all rows are done or cancelled: every pass with `every`, else the newest alone.

    Raises:
      Failed, Expired, Draining: there will be no more.
    """
    open_rows = set(range(len(self.rows)))
    while True:
      self._event.clear()
      with self._lock:
        news = list(self._news) if self._every else list(self._latest.items())
        self._news.clear()
        self._latest.clear()
      for i, snapshot in news:
        if i in open_rows and not self.cancelled[i]:
          yield i, snapshot
          if snapshot.done:
            open_rows.discard(i)
      open_rows -= {i for i, x in enumerate(self.cancelled) if x}
      if not open_rows:
        return
      if self.error is not None:
        raise self.error
      await self._event.wait()

  def _tell(self, index: int, snapshot: Snapshot) -> None:
    with self._lock:
      if self._every:
        self._news.append((index, snapshot))
      else:
        self._latest[index] = snapshot
    self._wake()

  def _fail(self, error: Exception) -> None:
    self.error = error
    self._wake()

  def _wake(self) -> None:
    if not self._loop.is_closed():
      self._loop.call_soon_threadsafe(self._event.set)


class Scheduler:
  """The one thread that has the device."""

  def __init__(self, llada: LLaDA, *, rows: int = 8, waiting: int = 64):
    """`rows` run at once at most; `waiting` more may wait."""
    self.llada, self.waiting = llada, waiting
    self.state = "ready"  # "loading" | "ready" | "draining"
    self.stats: dict[str, Any] = {"waiting": 0, "running": 0, "passes": 0, "tokens": 0, "crashes": 0}
    self._queue: collections.deque[Job] = collections.deque()
    self._condition = threading.Condition()
    self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
    self._thread.start()

  def submit(self, rows: Sequence[Row], *, timeout: float | None = None, every: bool = False) -> Job:
    """To be called in a running event loop.

    Raises:
      Mistake: ids or settings that the model does not take.
      Full: too many rows wait.
      Draining: the server is going down.
    """
    job = Job(rows, None if timeout is None else time.monotonic() + timeout, every)
    with self._condition:
      if self.state != "ready":
        raise Draining
      if len(self._queue) + len(rows) > self.waiting:
        raise Full(1)
      self._queue.append(job)
      self._condition.notify()
    return job

  async def score(self, rows: Sequence[tuple[int, ...]]) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Of each row of ids: (log p of each token given those before it, the most probable ids, their log p)."""
    raise NotImplementedError

  def drain(self, seconds: float) -> None:
    """Takes no more, finishes what runs and waits within `seconds`; the rest hears `Draining`. Blocks until then."""
    self.state = "draining"

  def _work(self) -> None:
    while True:
      with self._condition:
        while not self._queue:
          self._condition.wait()
        job = self._queue.popleft()
      try:
        for i, row in enumerate(job.rows):
          self._run(job, i, row)
      except Exception as error:
        failed = Failed()
        failed.__cause__ = error
        job._fail(failed)

  def _run(self, job: Job, i: int, row: Row) -> None:
    engine = self.llada._engine
    make = engine.fill if row.fills else engine.extend
    batch = make([list(row.ids)], row.settings)
    out = list(engine.run(batch, "step")) if not job._every else engine.run(batch, "step")
    last = None
    for filled in out:
      if job.cancelled[i]:
        return
      if last is not None:
        job._tell(i, last)
      c, n = filled.canvas, int(filled.padding_B[0])
      tokens = c.tokens_BL[0, n:]
      masks = np.flatnonzero(tokens == self.llada.mask_id)
      last = Snapshot(
        tokens, c.unmasked_at_BL[0, n:], c.confidence_BL[0, n:],
        None if c.edited_at_BL is None else c.edited_at_BL[0, n:], 0 if row.fills else len(row.ids),
        int(masks[0]) if len(masks) else len(tokens), int(c.step_B[0]), False,
      )  # fmt: skip
    assert last is not None
    job._tell(i, last._replace(done=True))
