"""How the processes of a save meet: Orbax's barriers, but nobody waits for a process that could not write its part.

Orbax's own barrier is left after twenty minutes. Here a process that comes to the end of a save without having come
through the middle of it, where its part would have been written, tells the others so, and they give that save up.
Each barrier is a few keys of JAX's coordination service: every process says that it is there, and the first one, which
looks whether all are, that they may go on.
"""

import collections
import itertools
import time
from typing import Any

from jax._src.distributed import global_state

from lladax.mistake import Mistake

_saves = itertools.count()  # all processes begin the same saves


class Elsewhere(Mistake, OSError):
  """Another process could not write its part."""


class Meetings:
  """The barriers of one save after the other."""

  def __init__(self) -> None:
    self._save = -1
    self._times: collections.Counter[str] = collections.Counter()
    self._whole = False

  def begin(self) -> None:
    """A save begins; what is left of the last but one is removed."""
    self._save, self._times, self._whole = next(_saves), collections.Counter(), False
    client, mine, number = _place()
    if number > 1 and not mine and self._save > 1:
      client.key_value_delete(f"{_ROOT}/{self._save - 2}/")

  def meet(self, *, key: str, timeout_ms: int) -> None:
    """Waits for all processes, as Orbax's `BarrierSyncFn`.

    Args:
      key: of the barrier; those in the middle of a save have "complete" in it.
      timeout_ms: after which it fails.

    Raises:
      Elsewhere: another process has given the save up.
    """
    client, mine, number = _place()
    if number == 1:
      return
    here = f"{_ROOT}/{self._save}/"
    at = f"{here}{key}/{self._times[key]}/"
    middle, again = "complete" in key, self._times[key] > 0
    self._times[key] += 1
    if again and not middle and not self._whole:
      client.key_value_set(f"{here}failed/{mine}", "", allow_overwrite=True)
    client.key_value_set(f"{at}there/{mine}", "")
    until, pause = time.monotonic() + timeout_ms / 1000, 0.005
    while not client.key_value_dir_get(f"{at}go/"):
      if not mine and len(client.key_value_dir_get(f"{at}there/")) == number:
        client.key_value_set(f"{at}go/{mine}", "")
      elif middle and client.key_value_dir_get(f"{here}failed/"):
        raise Elsewhere("another process could not write its part")
      elif time.monotonic() > until:
        raise TimeoutError(f"not all processes came to {key} of a save within {timeout_ms / 1000:.0f} s")
      else:
        time.sleep(pause)
        pause = min(2 * pause, 0.5)
    self._whole |= "commit_complete" in key


_ROOT = "lladax/saves"


def _place() -> tuple[Any, int, int]:
  """(the coordination service's client, this process's number, of how many)."""
  return global_state.client, global_state.process_id or 0, global_state.num_processes or 1
