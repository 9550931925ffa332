import errno
import json

import jax
import pytest

from lladax.storage import metrics, writing
from lladax.storage.metrics import Writer


def lines(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def write(workdir, steps, start=0, **options):
  writer = Writer(workdir, 10, start=start, **({"tensorboard": False} | options))
  for step in steps:
    writer.write(step, {"loss": 1.0 / step})
  writer.close()


def test_flops_are_the_matmuls_counted_by_hand():
  D, N, H, K, F, V, T = 8, 3, 2, 4, 12, 128, 16
  projections = 4 * D * H * K + 3 * D * F  # q, k, v, out; gate, up, down
  per_token = 0
  for _ in range(N):
    per_token += 2 * projections
    per_token += 2 * H * K * T  # queries with T keys
    per_token += 2 * H * K * T  # weights with T values
  per_token += 2 * D * V  # head
  forward_and_backward = 3 * per_token
  assert metrics.flops_per_token(N * projections + D * V, N, H * K, T) == forward_and_backward


def test_peaks():
  class Device:
    device_kind = "NVIDIA H100 80GB HBM3"

  assert metrics.peak_flops(Device()) == 989e12
  assert metrics.peak_flops(jax.devices("cpu")[0]) is None


@pytest.mark.parametrize(
  ("seconds", "shown"), [(0, "0s"), (5.9, "5s"), (60, "1m00s"), (83, "1m23s"), (3600, "1h00m"), (3723, "1h02m")]
)
def test_clock(seconds, shown):
  assert metrics.clock(seconds) == shown


def test_one_object_a_line(tmp_path, capsys):
  write(tmp_path / "deep" / "run", [1, 2])
  assert lines(tmp_path / "deep" / "run") == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]
  shown = capsys.readouterr()
  assert "step 2/10  loss 0.5" in shown.err and not shown.out


def test_a_resumed_run_drops_what_was_after_its_checkpoint(tmp_path):
  write(tmp_path, range(1, 6))
  write(tmp_path, [4], start=3)
  assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]
  write(tmp_path, [1], start=0)
  assert [line["step"] for line in lines(tmp_path)] == [1]


TORN = [
  b'{"step": 3, "lo', b'{"st', b"{", b"3", b'"step"', b"{}", b'{"step": "3', b"\x00" * 9, b'{"step": 3, "x": "\xc3'
]  # fmt: skip


@pytest.mark.parametrize("half", [*TORN, b"\n"])
def test_half_a_line_is_dropped(tmp_path, half, caplog):
  write(tmp_path, [1, 2])
  path = tmp_path / "metrics.jsonl"
  path.write_bytes(path.read_bytes() + half)
  assert metrics.losses(tmp_path) == [(1, 1.0), (2, 0.5)]
  said = [record.getMessage() for record in caplog.records]
  assert said == ([] if half == b"\n" else [f"{path}: torn, and left out: line 3"])
  write(tmp_path, [3], start=2)
  assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize("half", TORN)
def test_what_is_appended_stands_in_a_line_of_its_own(tmp_path, half):
  path = tmp_path / "evaluations.jsonl"
  metrics.append(path, {"step": 1})
  path.write_bytes(path.read_bytes() + half)
  metrics.append(path, {"step": 2})
  metrics.append(path, {"step": 3})
  assert metrics.read(path) == [{"step": 1}, {"step": 2}, {"step": 3}]
  assert path.read_bytes() == b'{"step": 1}\n' + half + b'\n{"step": 2}\n{"step": 3}\n'


def records(content):
  """The records of a TFRecord file: length (8 bytes), checksum (4), record, checksum (4)."""
  while content:
    length = int.from_bytes(content[:8], "little")
    yield content[12 : 12 + length]
    content = content[16 + length :]


def test_tensorboard_gets_the_scalars(tmp_path):
  from tensorboardX.proto.event_pb2 import Event

  write(tmp_path, [3, 4], start=2, tensorboard=True)
  (path,) = (tmp_path / "tensorboard").iterdir()
  events = [Event.FromString(record) for record in records(path.read_bytes())]
  scalars = [(event.step, value.tag, value.simple_value) for event in events for value in event.summary.value]
  assert scalars == [(3, "loss", pytest.approx(1 / 3)), (4, "loss", 0.25)]
  # What TensorBoard is told to forget begins behind the checkpoint.
  assert [event.step for event in events if event.HasField("session_log")] == [3]


def test_the_profiler_sees_its_window(tmp_path, monkeypatch):
  trace = []
  monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: trace.append(f"start {folder}"))
  monkeypatch.setattr(jax.profiler, "stop_trace", lambda: trace.append("stop"))

  def run(first, last, steps=6):
    trace.clear()
    window = metrics.ProfilerWindow(tmp_path, first, last)
    for step in range(1, steps + 1):
      window.at(step)
      trace.append(step)
    window.stop()
    return trace

  assert run(2, 4) == [1, f"start {tmp_path}", 2, 3, "stop", 4, 5, 6]
  assert run(5, 99) == [1, 2, 3, 4, f"start {tmp_path}", 5, 6, "stop"]
  assert run(0, 0) == [1, 2, 3, 4, 5, 6]


class Full:
  """A file on a disk that is full, then is not."""

  def __init__(self, file):
    self.file, self.full = file, True

  def __getattr__(self, name):
    if self.full:
      raise OSError(errno.ENOSPC, "No space left on device")
    return getattr(self.file, name)


def test_a_log_that_cannot_be_written_is_said_once_and_ends_nothing(tmp_path, caplog):
  writing._say.cache_clear()
  writer = metrics.Writer(tmp_path, 3)
  writer.write(1, {"loss": 1.0})
  file, board = writer._file, writer._board._file
  writer._file, writer._board._file = Full(file), Full(board)
  for step in (2, 3):
    writer.write(step, {"loss": 1.0})
  expected = [f"{tmp_path / x} cannot be written: No space left on device; the run goes on without" for x in
              ("metrics.jsonl", "tensorboard")]  # fmt: skip
  assert caplog.messages == expected
  writer._file.full = writer._board._file.full = False
  writer.write(4, {"loss": 1.0})
  writer.close()
  assert [row["step"] for row in metrics.read(tmp_path / "metrics.jsonl")] == [1, 4]
  (tmp_path / "file").touch()
  nowhere = metrics.Writer(tmp_path / "file", 3)
  nowhere.write(1, {"loss": 1.0})
  nowhere.close()
  assert "file/metrics.jsonl cannot be written: " in caplog.text and "file/tensorboard cannot be wr" in caplog.text
  profiler = metrics.ProfilerWindow(tmp_path / "file/profile", 1, 2)
  for step in (1, 2):
    profiler.at(step)
