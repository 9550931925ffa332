"""Several processes as one server: the first one has the queue, and what it does with its rows all do.

What `Slots` do follows from how they are called. So the first process writes every call down, one after the other, in
the key-value store of JAX's coordination service, and the others, each with its part of the model, call the same.
"""

import contextlib
import dataclasses
import json
import logging
import threading
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax

from lladax import fields
from lladax.devices import interrupts
from lladax.inference.engine import Engine
from lladax.inference.slots import Row, Seat, Slots
from lladax.sampling import SamplerConfig

_KEY = "lladax/serve"
_WAIT = 1_000  # milliseconds until it is asked again: a signal is not noted before


class Leader(Slots):
  """`Slots` of the first process, which says what it does."""

  def __init__(self, engine: Engine):
    super().__init__(engine)
    self._said = self._heard = 0

  def _say(self, name: str, *args: Any) -> None:
    interrupts.service().key_value_set(f"{_KEY}/{self._said}", json.dumps([name, *args]))
    self._said += 1

  def add(self, n: int, row: Row) -> Seat:
    """As that of `Slots`."""
    self._say("add", n, dataclasses.asdict(row))
    return super().add(n, row)

  def drop(self, rows: Collection[int]) -> None:
    """As that of `Slots`."""
    self._say("drop", list(rows))
    super().drop(rows)

  def begin(self, rows: Sequence[int]) -> None:
    """As that of `Slots`."""
    self._say("begin", list(rows))
    super().begin(rows)

  def step(self) -> bool:
    """As that of `Slots`."""
    self._say("step")
    goes_on = super().step()
    for i in range(self._heard, self._said - 1):  # a pass is of all processes: they have read what was said before it
      interrupts.service().key_value_delete(f"{_KEY}/{i}")
    self._heard = self._said - 1
    return goes_on

  def score(self, row: Sequence[int]) -> Any:
    """As that of `Slots`."""
    self._say("score", list(row))
    return super().score(row)

  def end(self) -> None:
    """The others end."""
    self._say("end")


def end(slots: Any) -> None:
  """The other processes end; `slots`: a `Leader`, or None where the first process has not come so far."""
  if slots is not None:
    return slots.end()
  with contextlib.suppress(jax.errors.JaxRuntimeError):  # it is compiling: the others end when it is gone
    interrupts.service().key_value_set(f"{_KEY}/0", '["end"]')


def follow(slots: Slots) -> None:
  """Of the other processes: does what the first one does, until it ends."""
  client, i = interrupts.service(), 0
  while True:
    said = interrupts.patiently(lambda i=i: client.blocking_key_value_get(f"{_KEY}/{i}", _WAIT))
    name, *args = json.loads(said or '["end"]')  # without the first process there is nothing to do
    i += 1
    if name == "end":
      return
    if name == "add":
      row = args[1]
      row["settings"] = fields.parse(row["settings"], SamplerConfig, "sample")
      args[1] = Row(**row | {"ids": tuple(row["ids"])})
    try:
      getattr(slots, name)(*args)
    except Exception:  # the first process has met it, too, and goes on
      logging.getLogger("lladax").exception("%s crashed", name)


def stop_with(stop: Callable[[], None]) -> None:
  """Has `stop` called, in a thread, when another process is to end (`stop_all`)."""

  def hear() -> None:
    if interrupts.patiently(lambda: interrupts.service().blocking_key_value_get(f"{_KEY}/stop", _WAIT)):
      stop()

  threading.Thread(target=hear, name="signals of others", daemon=True).start()


def stop_all() -> None:
  """Of another process than the first one: the server is to end."""
  with contextlib.suppress(jax.errors.JaxRuntimeError):  # another has said it, or the job is over
    interrupts.service().key_value_set(f"{_KEY}/stop", "1")
