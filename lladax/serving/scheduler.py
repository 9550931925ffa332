"""The queue in front of the engine: who waits, who runs, and who hears of it.

One thread has the device. Between blocks it chooses whose block is next (`_turn`): kinds of rows, which cannot share a
batch, take turns; within a kind every other place is for who has come first, and the others are for those who have had
the fewest passes, so that short requests do not wait behind long ones, nor long ones for ever. Rows of a model of
blocks, whose keys and values are kept, stay until they are done. After every pass rows that nobody waits for any more
are let go of. What is asked for is asked in an event loop (`submit`), and heard of there (`Job.watch`).
"""

import asyncio
import collections
import itertools
import logging
import threading
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np

from lladax.inference.llada import LLaDA
from lladax.inference.slots import Row, Seat, Slots, Snapshot, length_of, length_together
from lladax.mistake import Mistake

_KEPT = 128  # snapshots that wait for a slow client; of more the oldest are dropped, but for a row's last


class Full(Exception):
  """Too many rows wait; `retry_after`: seconds until there may be room."""

  def __init__(self, retry_after: int):
    super().__init__(f"too many requests are waiting: try again in {retry_after} s")
    self.retry_after = retry_after


class Draining(Exception):
  """The server is going down, and takes no more."""


class Expired(Exception):
  """The time that a request had is over."""


class Failed(Exception):
  """The batch that a request was in has crashed; the cause is logged."""


class Job:
  """A request: rows that are answered together."""

  def __init__(self, rows: Sequence[Row], deadline: float | None, every: bool):
    self.rows, self.deadline, self.every = tuple(rows), deadline, every
    self.cancelled = [False] * len(rows)
    self.began_at = 0.0
    self.error: Exception | None = None
    self.passes = 0  # of all its rows
    self.stands: list[Any] = [None] * len(rows)  # as it was last told of each
    self._news: list[tuple[int, Snapshot]] = []
    self._lock, self._loop, self._event = threading.Lock(), asyncio.get_running_loop(), asyncio.Event()

  def cancel(self, index: int | None = None) -> None:
    """Row `index`, or all: it ends with the next pass, and `watch` says no more of it."""
    for i in range(len(self.rows)) if index is None else [index]:
      self.cancelled[i] = True
    self._event.set()

  async def watch(self) -> AsyncIterator[tuple[int, Snapshot]]:
    """(row, what it is now), until all rows are done or cancelled: after every pass with `every`, else when it matters.

    Raises:
      Failed, Expired, Draining: no more will come.
    """
    left = set(range(len(self.rows)))
    while True:
      self._event.clear()
      with self._lock:
        error, news, self._news = self.error, self._news, []
      for i, snapshot in news:
        if i in left and not self.cancelled[i]:
          yield i, snapshot
          left -= {i} if snapshot.done else set()
      left -= {i for i in left if self.cancelled[i]}
      if not left:
        return
      if error is not None:
        raise error
      await self._event.wait()

  def tell(self, index: int, snapshot: Snapshot) -> None:
    """Of a row, from the engine's thread."""
    with self._lock:
      if not self.every:  # the newest of each row is enough
        self._news = [x for x in self._news if x[0] != index]
      elif len(self._news) >= _KEPT:
        del self._news[next(i for i, (_, x) in enumerate(self._news) if not x.done)]
      self._news.append((index, snapshot))
    self._wake()

  def fail(self, error: Exception) -> None:
    """There will be no more, from the engine's thread."""
    with self._lock:
      self.error = self.error or error
    self._wake()

  def _wake(self) -> None:
    if not self._loop.is_closed():
      self._loop.call_soon_threadsafe(self._event.set)


class Scheduler:
  """The thread that has the device, and the queue before it."""

  def __init__(self, llada: LLaDA, *, rows: int = 8, waiting: int = 64, slots: Any = None):
    """`rows` run at once at most, `waiting` more may wait; `slots`: `Slots` of the model's engine, or the like."""
    self.llada, self.rows, self.waiting = llada, rows, waiting
    self.state = "ready"  # "ready" | "draining"
    # Counted from the start, but for the first two, which are now.
    names = ("running", "waiting", "passes", "row_passes", "tokens", "turns", "crashes")
    self.stats: dict[str, int] = dict.fromkeys(names, 0)
    self.slots = slots or Slots(llada.engine)
    self._jobs: dict[int, tuple[Job, int]] = {}  # number of a row that is not done -> its job, and which of its rows
    self._numbers, self._rates = itertools.count(), collections.deque[float](maxlen=32)
    self._new: collections.deque[tuple[int, Job, int]] = collections.deque()
    self._scores: collections.deque[tuple[tuple[int, ...], asyncio.Future]] = collections.deque()
    self._staying: set[int] = set()  # rows of models of blocks that have begun
    self._turns: dict[Any, int] = {}  # kind -> when it had its last block
    self._until = float("inf")
    self._condition = threading.Condition()
    self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
    self._thread.start()

  def submit(self, rows: Sequence[Row], *, timeout: float | None = None, every: bool = False) -> Job:
    """A request, from within an event loop; `every`: `Job.watch` shall say of every pass.

    Raises:
      Mistake: ids or settings that the model does not take.
      Full: too many rows wait.
      Draining: the server is going down.
    """
    for row in rows:
      Seat(self.llada.engine, row)  # says what is wrong
    job = Job(rows, None if timeout is None else time.monotonic() + timeout, every)
    with self._condition:
      if self.state != "ready":
        raise Draining
      if len(rows) > self.rows + self.waiting:
        raise Mistake(
          f"n: {len(rows)} answers are more than this server's {self.rows + self.waiting} rows: ask for less"
        )
      if len(self._jobs) + len(self._new) + len(rows) > self.rows + self.waiting:
        raise Full(self._retry_after())
      self._new += [(next(self._numbers), job, i) for i in range(len(rows))]
      self.stats["waiting"] += len(rows)
      self._condition.notify()
    return job

  async def score(self, rows: Sequence[tuple[int, ...]]) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Of each row of ids: log p of each token given those before it, the most probable ids, and their log p.

    The rest of the row is masked: what `LLaDA.log_likelihood(method="chain_rule")` adds up.

    Raises:
      As `submit`; and Failed.
    """
    for i, row in enumerate(rows):
      self.llada.engine.check_ids(list(row), f"prompt[{i}]")
      self.llada.engine.check_length(len(row), f"prompt {i}")
    loop, futures = asyncio.get_running_loop(), []
    with self._condition:
      if self.state != "ready":
        raise Draining
      if len(self._scores) + len(rows) > self.rows + self.waiting:
        raise Full(self._retry_after())
      for row in rows:
        futures.append(future := loop.create_future())
        self._scores.append((row, future))
      self._condition.notify()
    return await asyncio.gather(*futures)

  def drain(self, seconds: float) -> None:
    """Takes no more, refuses what waits, and finishes what has begun within so many seconds; returns then."""
    with self._condition:
      self.state, self._until = "draining", time.monotonic() + seconds
      self._condition.notify()
    self._thread.join()

  def _retry_after(self) -> int:
    """Seconds in which some rows will have been done, as the last ones were."""
    if len(self._rates) < 2:
      return 1
    each = (self._rates[-1] - self._rates[0]) / (len(self._rates) - 1)
    return int(min(max(each * self.rows, 1), 60))

  def _work(self) -> None:
    while True:
      with self._condition:
        while not (self._jobs or self._new or self._scores or self.state == "draining"):
          self._condition.wait()
        new, scoring = list(self._new), self._scores.popleft() if self._scores else None
        self._new.clear()
      for n, job, i in new:
        self.slots.add(n, job.rows[i])
        self._jobs[n] = job, i
        if self.slots.seats[n].done:  # there is nothing to fill
          self._tell(n)
      if scoring:
        self._score(*scoring)
      if self.state == "draining":
        late = time.monotonic() > self._until
        self._end({job for job, _ in self._jobs.values() if late or not job.began_at}, Draining())
        if not self._jobs and not self._new:
          for _, future in self._scores:
            _tell(future, Draining())
          return
      self._let_go()
      if rows := self._turn():
        try:
          self._block(rows)
        except Exception as error:
          logging.getLogger("lladax").exception("a batch of %d rows crashed", len(rows))
          self.stats["crashes"] += 1
          failed = Failed("the batch of this request crashed")
          failed.__cause__ = error
          self._end({self._jobs[n][0] for n in rows if n in self._jobs}, failed)

  def _turn(self) -> list[int]:
    """The rows whose block is next."""
    seats = self.slots.seats
    staying = [n for n in self._jobs if n in self._staying]
    free = self.rows - len(staying)
    others = self._in_turn([n for n in self._jobs if n not in self._staying])
    if self.llada.model.block:
      self._staying.update(others[:free])
      candidates = staying + others[:free]
    else:
      candidates = others
    if not candidates:
      return []
    kinds = dict.fromkeys(seats[n].kind for n in candidates)
    kind = min(kinds, key=lambda kind: self._turns.get(kind, -1))
    self._turns = {x: at for x, at in self._turns.items() if x in kinds} | {kind: self.stats["turns"]}
    self.stats["turns"] += 1
    rows = [n for n in candidates if seats[n].kind == kind]
    if self.llada.model.block:
      return rows
    batch = rows[:1]  # all cost what the longest does, laid out as they are together
    most = min(2 * length_together([seats[rows[0]]]), length_of(self.llada.model.max_length, seats[rows[0]].W))
    for n in rows[1:]:
      if len(batch) < self.rows and length_together([seats[x] for x in (*batch, n)]) <= most:
        batch.append(n)
    return batch

  def _in_turn(self, rows: Sequence[int]) -> list[int]:
    """Who came first, who has had least, who came next, ...; in every other block the other way round."""
    both = [rows, sorted(rows, key=lambda n: (self._jobs[n][0].passes, n))]
    first, then = both[:: 1 if self.stats["turns"] % 2 else -1]
    return list(dict.fromkeys(x for pair in zip(first, then, strict=True) for x in pair))

  def _block(self, rows: list[int]) -> None:
    for n in rows:
      self._jobs[n][0].began_at = self._jobs[n][0].began_at or time.monotonic()
    before = {n: self.slots.seats[n].passes for n in rows}
    self.slots.begin(rows)
    goes_on = True
    while goes_on:
      goes_on = self.slots.step()
      self.stats["passes"] += 1
      for n in rows:
        if (seat := self.slots.seats.get(n)) is not None:
          job, more, before[n] = self._jobs[n][0], seat.passes - before[n], seat.passes
          self.stats["row_passes"] += more
          job.passes += more
          if more or not goes_on:
            self._tell(n)
      self._let_go()

  def _tell(self, n: int) -> None:
    """The row's job of where it stands, if that is news; a row that is done leaves."""
    (job, i), snapshot = self._jobs[n], self.slots.seats[n].snapshot()
    if snapshot.done:
      self.stats["tokens"] += int((snapshot.unmasked_at_L > 0).sum())
      self._rates.append(time.monotonic())
      self._drop([n])
    stands = snapshot.passes * job.every, snapshot.stable, snapshot.done
    if stands != job.stands[i]:
      job.stands[i] = stands
      job.tell(i, snapshot)

  def _let_go(self) -> None:
    """Of rows that nobody waits for any more, or not so long."""
    now = time.monotonic()
    late = {job for job, _ in self._jobs.values() if now > (job.deadline or now)}
    if self.state == "draining" and now > self._until:
      self._end({job for job, _ in self._jobs.values()}, Draining())
    self._end(late, Expired("the time of this request is over"))
    self._drop([n for n, (job, i) in self._jobs.items() if job.cancelled[i]])
    with self._condition:  # some may have gone away before they began
      gone = [x for x in self._new if x[1].cancelled[x[2]]]
      self._new = collections.deque(x for x in self._new if x not in gone)
      self.stats["running"] = sum(job.began_at > 0 for job, _ in self._jobs.values())
      self.stats["waiting"] = len(self._jobs) + len(self._new) - self.stats["running"]

  def _end(self, jobs: set[Job], error: Exception) -> None:
    for job in jobs:
      job.fail(error)
    self._drop([n for n, (job, _) in self._jobs.items() if job in jobs])

  def _drop(self, rows: Sequence[int]) -> None:
    if rows:
      self.slots.drop(rows)
      self._staying.difference_update(rows)
      for n in rows:
        del self._jobs[n]

  def _score(self, row: tuple[int, ...], future: asyncio.Future) -> None:
    if future.cancelled():
      return
    try:
      _tell(future, self.slots.score(row))
    except Exception as error:
      logging.getLogger("lladax").exception("the score of %d tokens crashed", len(row))
      self.stats["crashes"] += 1
      failed = Failed("the batch of this request crashed")
      failed.__cause__ = error
      _tell(future, failed)


def _tell(future: asyncio.Future, x: Any) -> None:
  """Gives a future what it waits for, from another thread."""

  def put() -> None:
    if not future.done():
      future.set_exception(x) if isinstance(x, Exception) else future.set_result(x)

  if not (loop := future.get_loop()).is_closed():
    loop.call_soon_threadsafe(put)
