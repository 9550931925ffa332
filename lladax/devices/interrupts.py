"""SIGINT and SIGTERM: a job of one process or of many ends at one place of its program, by one exit code.

A signal may reach any one process. All run the same program, and pass the same points in the same order; the processes
agree, through the key-value store of JAX's coordination service, on the first point that none of them has passed, and
end there: behind the same step. (JAX's own preemption service knows SIGTERM alone, looks once a second, can stop a job
between steps only, and swallows the signal everywhere else.)
"""

import contextlib
import itertools
import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

# It has no public name; Orbax takes it from there, too.
from jax._src.distributed import global_state

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_runs = itertools.count()  # all processes count the same
PATIENCE = 10.0  # seconds until a process that has nothing to save, and is busy in a library, is ended for it


class Stopped(BaseException):
  """A signal came, and this is where the steps end; no `except Exception` on the way shall stop it."""


def own() -> None:
  """Takes the process for a command of ours, which a signal may end from any thread; before the first slow import."""
  signal.signal(signal.SIGTERM, _terminate)


def _terminate(number: int, frame: Any) -> None:
  """SIGTERM where there is nothing to save; SIGINT raises KeyboardInterrupt, out of the box."""
  say(number)
  raise SystemExit(128 + number)


def say(number: int) -> None:
  """The one line of a process that a signal ends with nothing new to save."""
  name = signal.Signals(number).name
  print(f"lladax: stopped by {name}; the same command goes on from what is saved", file=sys.stderr, flush=True)


class Interrupt:
  """What SIGINT and SIGTERM mean from here on: once to end where all processes can, twice to end this one at once.

  Within `steps` a signal ends the job at the next `point`, or at once where all are `waiting`. Outside of it there is
  nothing to save: a process alone does what it did without us, and of several all end.
  """

  def __init__(self):
    self.signal = 0  # that ends the job, or 0
    self._lock = threading.RLock()  # of the following five: where this process is, and where all shall end
    self._stepping = self._idle = self._began = False
    self._position, self._end = 0, -1
    self._many = many()
    self._ours = self._many or signal.getsignal(signal.SIGTERM) is _terminate
    self._old: dict[int, Any] = {}
    self._pipe: tuple[int, int] | None = None
    self._nudges, self._key, self._pid = 0, "", os.getpid()

  def __enter__(self) -> "Interrupt":
    if threading.current_thread() is not threading.main_thread():
      return self  # signals are for another one: a notebook's kernel may run us elsewhere
    self._old = {number: signal.signal(number, self._note) for number in SIGNALS}
    if self._ours:  # Python's own handlers wait until the main thread leaves the compiler
      self._pipe = os.pipe()
      os.set_blocking(self._pipe[1], False)
      signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
      os.register_at_fork(after_in_child=self._restore)
      threading.Thread(target=self._listen, name="signals", daemon=True).start()
    if self._many:
      self._key = f"lladax/stop/{next(_runs)}"
      threading.Thread(target=self._hear, name="signals of others", daemon=True).start()
    return self

  def __exit__(self, *_) -> None:
    """Signals mean again what they meant before."""
    self._restore()
    if self._pipe:
      os.write(self._pipe[1], b"\0")
      os.close(self._pipe[1])
      self._pipe = None
    if self._key:
      self._tell(0)

  def _restore(self) -> None:
    if self._old and self._pipe:
      signal.set_wakeup_fd(-1)  # of a fork, too: it would write to our pipe
    for number, handler in self._old.items():
      signal.signal(number, handler)
    self._old = {}

  @contextlib.contextmanager
  def steps(self) -> Iterator[None]:
    """What is worth saving is made here."""
    with self._lock:
      self._stepping = True
      if self.signal and self._end < 0:
        self._end = 0  # what its handler raised was dropped on the way: by a callback of JAX's, as they do
    try:
      yield
    finally:
      with self._lock:
        self._stepping = False

  def point(self) -> None:
    """Passed by all processes in the same order.

    Raises:
      Stopped: they end here.
    """
    with self._lock:
      self._advance(idle=False)
      self._began = True

  @contextlib.contextmanager
  def waiting(self) -> Iterator[None]:
    """A point, and behind it what concerns no other process, and can be left at once.

    Raises:
      Stopped: the processes end here.
    """
    with self._lock:
      self._advance(idle=True)
    try:
      yield
    finally:
      with self._lock:  # not while the processes agree
        self._idle = False
    self._check()

  def _advance(self, *, idle: bool) -> None:
    self._position, self._idle = self._position + 1, idle
    self._check()

  def _check(self) -> None:
    if 0 <= self._end <= self._position:
      raise Stopped

  def _note(self, number: int, frame: Any) -> None:
    """In the main thread, between two lines of Python."""
    if self._many:  # the threads have agreed, and wake us
      if self._idle:
        self._check()
    elif not self._stepping:
      self.signal, old = number, self._old[number]
      if callable(old):
        old(number, frame)
      else:  # the system's own
        signal.signal(number, old)
        signal.raise_signal(number)
    else:
      if not self._ours:  # a notebook: the second one is its own
        signal.signal(number, self._old[number])
      self.signal = number
      if self._end < 0:
        self._end = self._position + (not self._idle)
      if self._idle:
        self._check()

  def _listen(self) -> None:
    """In a thread: what reaches this process."""
    assert self._pipe
    read, seen, number, deadline = self._pipe[0], 0, 0, float("inf")
    while True:
      patience = max(0.0, deadline - time.monotonic())
      if not select.select([read], [], [], min(patience, 3600.0))[0]:
        if time.monotonic() >= deadline and not (self._stepping and self._began):
          _leave(number)
        continue
      for byte in os.read(read, 64):
        if not byte:
          os.close(read)
          return
        if self._nudges:
          self._nudges -= 1
          continue
        number, seen = byte, seen + 1
        if seen > 1:
          print("lladax: a second signal: ended at once", file=sys.stderr, flush=True)
          os._exit(128 + number)
        if not self._many:
          deadline = time.monotonic() + PATIENCE
        elif not self._tell(number):
          _leave(number)

  def _tell(self, number: int) -> bool:
    """Tells all processes, unless one was faster; False if nobody listens."""
    if not self._key:
      return False
    try:
      service().key_value_set(self._key, str(number))
    except jax.errors.JaxRuntimeError as error:
      return "ALREADY_EXISTS" in str(error)
    return True

  def _hear(self) -> None:
    """In a thread: what reached any process."""
    client, key = service(), self._key
    number = int(patiently(lambda: client.blocking_key_value_get(key, 3_600_000)) or 0)
    if not number:  # one has come to its end
      self._key = ""
      return
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # one is lost, and the runtime ends the job
      self._agree(number)
    if self._idle and 0 <= self._end <= self._position:
      self._nudges += 1
      os.kill(self._pid, number)  # a signal of its own frees the main thread from what it waits for

  def _agree(self, number: int) -> None:
    client, at = service(), f"{self._key}/at"
    with self._lock:  # nobody moves on meanwhile
      mine = [self._stepping, self._began, self._position, self._idle]
      client.key_value_set(f"{at}/{global_state.process_id}", json.dumps(mine))
      every = [
        json.loads(client.blocking_key_value_get(f"{at}/{process}", 60_000))
        for process in range(global_state.num_processes)
      ]
      self.signal = number
      if not all(stepping for stepping, *_ in every) or not any(began for _, began, *_ in every):
        _leave(number)
      ahead = max(position for *_, position, _ in every)
      idle = all(idle for *_, position, idle in every if position == ahead)
      self._end = ahead + (not idle)


def place() -> tuple[int, int]:
  """(number of this process, of how many), which JAX itself would tell only when all have shown it their devices."""
  return global_state.process_id, global_state.num_processes or 1


def many() -> bool:
  """Whether this is one process of several that have found each other."""
  return jax.distributed.is_initialized() and place()[1] > 1


def abandon(number: int) -> None:
  """Of a signal that ends this process before `Interrupt` listens: the others, which wait for it, are told."""
  if many():
    client, key = service(), f"lladax/stop/{next(_runs)}"
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # they have ended, or another was faster
      client.key_value_set(f"{key}/at/{global_state.process_id}", json.dumps([False, False, 0, False]))
      client.key_value_set(key, str(number))


def service() -> Any:
  """Of JAX's coordination service, which has a store of keys and values."""
  return global_state.client


def patiently(get: Callable[[], str]) -> str | None:
  """What `get` waits for, however often its time is over; None: the job is."""
  while True:
    try:
      return get()
    except jax.errors.JaxRuntimeError as error:
      if "DEADLINE_EXCEEDED" not in str(error):
        return None  # the job is over


def _leave(number: int) -> None:
  """Ends this process from a thread."""
  depart()
  if not global_state.process_id:
    say(number)  # last: the main thread may have complained of the others, which are gone
  os._exit(128 + number)


def depart(patience: float = PATIENCE) -> None:
  """Called as the last thing before a process ends: the coordinator, whose end would abort the others, goes last.

  It waits for them, so many seconds at most: one may have been lost.
  """
  if not many():
    return
  client, others = service(), place()[1] - 1
  with contextlib.suppress(jax.errors.JaxRuntimeError):
    if global_state.process_id:
      client.key_value_set(f"{_GONE}/{global_state.process_id}", "", allow_overwrite=True)
      return
    until = time.monotonic() + patience
    while len(client.key_value_dir_get(f"{_GONE}/")) < others and time.monotonic() < until:
      time.sleep(0.02)
    time.sleep(0.2)  # they are about to


_GONE = "lladax/gone"
