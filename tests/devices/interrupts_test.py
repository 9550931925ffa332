"""Signals: where processes end that agree, at once where there is nothing to save, and what a second one does."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
import types

import pytest

from lladax.devices import interrupts
from lladax.devices.interrupts import Interrupt, Stopped


class Store:
  """The key-value store of JAX's coordination service."""

  def __init__(self):
    self._values, self._changed = {}, threading.Condition()

  def key_value_set(self, key, value):
    with self._changed:
      assert key not in self._values
      self._values[key] = value
      self._changed.notify_all()

  def blocking_key_value_get(self, key, milliseconds):
    with self._changed:
      assert self._changed.wait_for(lambda: key in self._values, milliseconds / 1000)
      return self._values[key]


class Process(threading.local):
  """What `global_state` says in each of the threads that play the processes."""

  process_id = 0


@pytest.mark.parametrize("seed", range(8))
def test_all_processes_end_at_one_place(monkeypatch, seed):
  """Wherever each of them is: none beyond the one that is ahead by more than a point, and at once where all wait."""
  draw, n, state = random.Random(seed), 3, Process()
  shared = types.SimpleNamespace(client=Store(), num_processes=n)
  monkeypatch.setattr(Process, "client", shared.client, raising=False)
  monkeypatch.setattr(Process, "num_processes", n, raising=False)
  monkeypatch.setattr(interrupts, "global_state", state)
  stops = [Interrupt() for _ in range(n)]
  waits = [draw.random() < 0.5 for _ in range(40)]  # of every point: the program is the same for all
  began = [draw.randint(8, 12) for _ in range(n)]  # how far each has come when it hears of the signal
  ended = [0] * n
  all_ahead = threading.Barrier(n)

  def act(process):
    state.process_id = process
    stop = stops[process]
    stop._key = "stop"
    with stop.steps():
      try:
        for i, wait in enumerate(waits, 1):
          if not wait:
            stop.point()
            if i == began[process]:
              all_ahead.wait()
              stop._agree(signal.SIGTERM)
          else:
            with stop.waiting():
              if i == began[process]:
                all_ahead.wait()
                stop._agree(signal.SIGTERM)
          ended[process] = i  # what lies behind this point was done
      except Stopped:
        pass

  threads = [threading.Thread(target=act, args=(i,)) for i in range(n)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(timeout=30)
  ahead = max(began)
  assert [stop.signal for stop in stops] == [signal.SIGTERM] * n
  assert {stop._end for stop in stops} == {ahead if waits[ahead - 1] else ahead + 1}
  # Who waits at the last point leaves what it waits for, and nobody does anything else behind it.
  assert set(ended) == {ahead - 1 if waits[ahead - 1] else ahead}


BUSY = """
import hashlib, os, signal, sys, threading, time
from lladax.devices import interrupts
interrupts.PATIENCE = 0.3
interrupts.own()
def send(): time.sleep(0.3); os.kill(os.getpid(), signal.SIGTERM)
for _ in range(SIGNALS): threading.Thread(target=send).start(); time.sleep(0.1)
with interrupts.Interrupt() as stop, stop.steps():
  if BEGAN: stop.point()
  print("busy", flush=True)
  hashlib.pbkdf2_hmac("sha256", b"", b"", 10**8)  # as the compiler: no line of Python is run meanwhile
"""


@pytest.mark.parametrize(
  ("signals", "began", "line"),
  [(1, False, "stopped by SIGTERM; the same command goes on from what is saved"), (2, True, "a second signal: ended")],
)
def test_a_process_that_is_busy_in_a_library_is_ended(signals, began, line):
  code = BUSY.replace("SIGNALS", str(signals)).replace("BEGAN", str(began))
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
  assert done.returncode == 128 + signal.SIGTERM and done.stdout == "busy\n"
  assert done.stderr.count("\n") == 1 and line in done.stderr


@pytest.fixture
def python_handles_ctrl_c():
  """Not so in what a shell has started in the background."""
  found = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, found)


def test_a_notebook_keeps_its_own_handlers(python_handles_ctrl_c):
  """Nothing of ours ends the process there, and a second Ctrl-C is the notebook's."""
  before = signal.getsignal(signal.SIGINT)
  with Interrupt() as stop:
    with stop.steps():
      stop.point()
      os.kill(os.getpid(), signal.SIGINT)
      assert stop.signal == signal.SIGINT
      with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
      with pytest.raises(Stopped):
        stop.point()
  with Interrupt(), pytest.raises(KeyboardInterrupt):  # outside of the steps
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(1)
  assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_that_a_library_drops_still_ends_the_steps():
  """JAX's callback of the garbage collector prints what a handler raises in it, and goes on."""
  with Interrupt() as stop:
    with contextlib.suppress(BaseException):
      os.kill(os.getpid(), signal.SIGINT)
      time.sleep(1)
    with stop.steps(), pytest.raises(Stopped), stop.waiting():
      raise AssertionError("nothing is begun")
    assert stop.signal == signal.SIGINT


def test_what_is_waited_for_is_left_at_once():
  with Interrupt() as stop, stop.steps():
    stop.point()
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    began = time.monotonic()
    with pytest.raises(Stopped), stop.waiting():
      time.sleep(60)
    assert time.monotonic() - began < 30
    assert stop.signal == signal.SIGTERM
