"""The campaign of faults, a small one: its table is all zeros; and what it does to a file is done."""

import os
import pathlib
import random
import re
import subprocess
import sys

import conftest
import pytest

SCRIPT = pathlib.Path(__file__).parent.parent / "benchmarks/faults.py"


@pytest.mark.slow
def test_a_small_campaign(quick_compiles):
  flags = ["--kills=4", "--corruptions=24", "--processes=1", "--only=kills,corruptions"]
  env = os.environ | {"XLA_FLAGS": conftest.XLA_FLAGS}
  done = subprocess.run([sys.executable, SCRIPT, *flags], env=env, capture_output=True, text=True, timeout=600)
  assert done.returncode == 0, done.stderr
  head, _, *rows = [[x.strip() for x in line.split("|")[1:-1]] for line in done.stdout.splitlines()]
  assert head[3:] == ["steps lost", "made again", "wrong values", "unreadable", "silent"]
  assert rows[-1][0] == "**all**" and int(rows[-1][1]) == 28
  for name, _, _, lost, _, *others in rows:
    assert {x.strip("*") for x in (lost, *others)} == {"0"}, name
  assert "detected, the checkpoint before is used" in done.stdout and re.search(r"SIG\w+, one process: ", done.stdout)


@pytest.mark.parametrize("kind", ["bit flipped", "range zeroed", "cut off", "emptied", "removed"])
def test_a_file_is_damaged_as_its_name_says(load_benchmark, tmp_path, kind):
  path, content = tmp_path / "file", bytes(range(1, 256)) * 40
  path.write_bytes(content)
  load_benchmark("faults").damage(path, kind, random.Random(0))
  found = path.read_bytes() if path.exists() else None
  changed = [a ^ b for a, b in zip(content, found or b"", strict=False) if a != b]
  assert {
    "bit flipped": len(changed) == 1 and changed[0].bit_count() == 1,
    "range zeroed": bool(changed) and found is not None and found.count(0) == len(changed),
    "cut off": found is not None and not changed and len(found) < len(content),
    "emptied": found == b"",
    "removed": found is None,
  }[kind]
