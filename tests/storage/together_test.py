"""Two processes, played by threads with a common store of keys."""

import threading

import pytest

from lladax.storage import together
from lladax.storage.together import Elsewhere, Meetings

START, MIDDLE, END = "set_value_start", "async_write_complete.5", "async_commit_complete.5"


class Store:
  def __init__(self):
    self.keys, self.lock = {}, threading.Lock()

  def key_value_set(self, key, value, allow_overwrite=False):
    with self.lock:
      assert allow_overwrite or key not in self.keys, key
      self.keys[key] = value

  def key_value_dir_get(self, folder):
    with self.lock:
      return [(key, value) for key, value in self.keys.items() if key.startswith(folder)]

  def key_value_delete(self, folder):
    with self.lock:
      self.keys = {key: value for key, value in self.keys.items() if not key.startswith(folder)}


@pytest.fixture
def play(monkeypatch):
  """play([keys of each process]) -> what became of each: the keys it came through, and the error."""
  store, mine = Store(), threading.local()
  monkeypatch.setattr(together, "_place", lambda: (store, mine.number, 2))
  meetings = [Meetings(), Meetings()]

  def run(number, keys, out, timeout_ms):
    mine.number = number
    for key in keys:
      try:
        meetings[number].meet(key=key, timeout_ms=timeout_ms)
        out.append(key)
      except (Elsewhere, TimeoutError) as error:
        out.append(error)

  def play(*keys, timeout_ms=20_000):
    monkeypatch.setattr(together, "_saves", iter([play.saves, play.saves]))
    for number in range(2):
      mine.number = number
      meetings[number].begin()
    play.saves += 1
    outs = [[], []]
    threads = [threading.Thread(target=run, args=(i, keys[i], outs[i], timeout_ms)) for i in range(2)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    return outs

  play.saves, play.store = 0, store
  return play


def test_all_come_through_a_save_and_the_next_one(play):
  keys = [START, MIDDLE, END, START]
  for _ in range(4):
    assert play(keys, keys) == [keys, keys]
  assert {key.split("/")[2] for key in play.store.keys} == {"2", "3"}  # what is over is removed


@pytest.mark.parametrize("failing", [0, 1])
def test_nobody_waits_for_one_that_could_not_write(play, failing):
  keys = [[START, MIDDLE, START], [START, MIDDLE, START]]
  keys[failing] = [START, START]
  found = play(*keys)
  assert found[failing] == [START, START]
  first, error, last = found[1 - failing]
  assert (first, last) == (START, START) and str(error) == "another process could not write its part"
  whole = [START, MIDDLE, END, START]
  assert play(whole, whole) == [whole, whole]  # and the next one is


def test_one_that_does_not_come_is_waited_for_until_the_time_is_over(play):
  found = play([START, MIDDLE], [START], timeout_ms=200)
  assert isinstance(found[0][1], TimeoutError) and found[1] == [START]
