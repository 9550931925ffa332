"""The history of a run: WORKDIR/runs.jsonl, a line for each start, with what its numbers rest on besides the config."""

import datetime
import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from lladax.mistake import Mistake
from lladax.storage import metrics

FILE = "runs.jsonl"
# What a config and a seed stand for, by version: raised by whoever changes which rows a step sees, or what is masked in
# them. history_test.py knows the first draws of each.
DRAWS = {"order": "1", "noise": "1"}
_PACKAGES = (
  "lladax", "jax", "jaxlib", "jax-cuda13-plugin", "libtpu", "numpy", "flax", "optax", "orbax-checkpoint", "grain",
  "tokenizers", "sentencepiece", "qwix",
)  # fmt: skip


def draws() -> dict[str, str]:
  """The versions of everything that is drawn while training: ours, and JAX's generator."""
  partitionable = " partitionable" * bool(getattr(jax.config, "jax_threefry_partitionable", True))
  return DRAWS | {"rng": f"{getattr(jax.config, 'jax_default_prng_impl', 'threefry2x32')}{partitionable}"}


def check_draws(began: dict[str, str], now: dict[str, str], workdir: Path) -> None:
  """Raises Mistake if a run would go on with other draws than it began with."""
  for name in now:
    if began.get(name, now[name]) != now[name]:
      raise Mistake(
        f"{name}: the run in {workdir} draws its {name} by {began[name]!r}, and this is {now[name]!r}: go on with the"
        f" versions that {FILE} there names, or use another workdir"
      )


def append(workdir: Path, step: int, mesh: Mesh, changed: dict[str, Any], **what: Any) -> None:
  """Adds this start to the history.

  Args:
    workdir: of the run.
    step: so many are done.
    mesh: of its devices.
    changed: field -> (what it was, what it is from now on).
    **what: else is to be said of it.
  """
  device = jax.devices()[0]
  found = {name: _version(name) for name in _PACKAGES}
  metrics.append(
    workdir / FILE,
    {
      "step": step,
      "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
      "command": sys.argv,
      "changed": changed,
      "versions": {"python": platform.python_version()} | {name: version for name, version in found.items() if version},
      "commit": commit(Path(__file__).parent),
      "devices": {
        "platform": device.platform, "kind": device.device_kind, "count": jax.device_count(),
        "processes": jax.process_count(), "mesh": dict(mesh.shape), "machine": platform.platform(),
      },
    }
    | what,
  )  # fmt: skip


def _version(package: str) -> str | None:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


def commit(folder: Path) -> str | None:
  """The git commit of the checkout that keeps a folder, "-dirty" behind it where files differ; None of no checkout."""
  try:
    for words in ("ls-files --error-unmatch .", "describe --always --abbrev=40 --dirty --exclude=*"):
      said = subprocess.run(
        ["git", "-C", str(folder), *words.split()], capture_output=True, text=True, timeout=20, check=True
      )
  except (OSError, subprocess.SubprocessError):  # no git, or none that knows the folder
    return None
  return said.stdout.strip()
