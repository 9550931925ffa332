import shutil

import pytest
from rich.console import Console

from lladax.inference import verify
from lladax.mistake import Mistake
from lladax.storage import checkpoint


@pytest.fixture
def workdir(tiny_workdir, tmp_path):
  return shutil.copytree(tiny_workdir, tmp_path / "run")


def test_what_is_sound_is_said_part_by_part(workdir, capsys):
  verify.run(workdir, Console(width=200))
  parts = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
  assert list(parts) == ["config.json", "tokenizer", "metrics.jsonl", "runs.jsonl", "checkpoints/15", "checkpoints/20"]
  assert parts["checkpoints/20"].startswith("44 arrays, 0.2 MiB, as they were written")


def test_everything_that_is_damaged_is_named_and_stays_as_it_is(workdir, capsys):
  arrays = max((checkpoint.folder(workdir) / "15").rglob("d/*"), key=lambda path: path.stat().st_size)
  content = bytearray(arrays.read_bytes())
  content[len(content) // 2] ^= 4
  arrays.write_bytes(content)
  (workdir / "config.json").write_text("{")
  before = sorted((path, path.stat().st_mtime) for path in workdir.rglob("*"))
  with pytest.raises(Mistake, match=r"config.json, tokenizer, checkpoints/15 cannot be read back: put back a copy"):
    verify.run(workdir, Console(width=200))
  out = capsys.readouterr().out
  assert "checkpoints/15: DAMAGED" in out and "checkpoints/20: 44 arrays" in out
  assert sorted((path, path.stat().st_mtime) for path in workdir.rglob("*")) == before
