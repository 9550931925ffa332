"""Eight CPU devices for every test, and no silent broadcasting."""

import os
import pathlib
import subprocess
import sys

import pytest

# Before jax is imported. What the user has set stays.
USER_XLA_FLAGS = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in USER_XLA_FLAGS:
  flags = f"{USER_XLA_FLAGS} --xla_force_host_platform_device_count=8"
  os.environ["XLA_FLAGS"] = flags.strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="session")
def quickstart_workdir(tmp_path_factory):
  """A workdir as the quickstart leaves it, after two steps: README's own command, on one device."""
  workdir = tmp_path_factory.mktemp("quickstart")
  command = f"-m lladax.main --config=configs/quickstart.py --workdir={workdir} --config.steps=2"
  env = {**os.environ, "XLA_FLAGS": USER_XLA_FLAGS}
  subprocess.run([sys.executable, *command.split()], cwd=ROOT, env=env, check=True)
  return workdir
