import subprocess
import sys

import pytest
import stores
from runs import assert_bitwise_equal

from lladax import address
from lladax.mistake import Mistake

SCHEMES = ["s3", "gs"]
BUILT_OF = {"s3": ("s3fs", "moto", "flask_cors"), "gs": ("gcsfs", "gcp_storage_emulator")}


@pytest.fixture(params=SCHEMES)
def store(request, tmp_path):
  for name in BUILT_OF[request.param]:
    pytest.importorskip(name)
  made = stores.Store(request.param, tmp_path)
  yield made
  made.close()


def start(environment, *given):
  env = stores.clean() | {"JAX_PLATFORMS": "cpu"} | environment
  command = [sys.executable, "-m", "lladax.main", *map(str, given)]
  return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(environment, *given, code=0):
  process = start(environment, *given)
  out, err = process.communicate()
  assert process.returncode == code, err
  assert "Traceback" not in err, err
  return out + err


CHECK = """
import os, sys, numpy as np, jax
from lladax import address
from lladax.storage import checkpoint, metrics
from lladax.mistake import Mistake
workdir = address.mirror(sys.argv[1])
make = lambda n: {"step": jax.device_put(np.int32(n)), "params": {"w": jax.device_put(np.full((99, 99), n, "f4"))}}
abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), make(0))
(workdir / "config.json").write_text('{"model": {}}')
address.push(workdir)
saver = checkpoint.Checkpoints(workdir, keep=2)
for n in (1, 2, 3):
  metrics.append(workdir / "metrics.jsonl", {"step": n})
  saver.save(n, make(n))
saver.close()
assert checkpoint.steps(workdir) == [2, 3]
assert (checkpoint.restore(workdir, 3, abstract)["params"]["w"] == 3).all()
system, root = address.system(sys.argv[1])
system.rm_file(f"{root}/checkpoints/3/commit_success.txt")  # as if killed before the end of the save
assert checkpoint.steps(workdir) == [2]
data = max(system.find(f"{root}/checkpoints/2"), key=lambda x: system.info(x)["size"])
content = bytearray(system.cat_file(data)); content[len(content) // 2] ^= 1; system.pipe_file(data, bytes(content))
try:
  checkpoint.restore_latest(workdir, abstract)
except checkpoint.Corrupt as error:
  print("found", address.said(str(error)))
address._mirrors.clear()
again = address.mirror(sys.argv[1])
assert [row["step"] for row in metrics.read(again / "metrics.jsonl")] == [1, 2, 3]
saver = checkpoint.Checkpoints(again)
saver.save(4, make(4))
system.pipe_file(f"{root}/config.json", b"{}")
try:
  saver.save(5, make(5))
except Mistake as error:
  print("refused", error)
"""


def test_checkpoints_and_small_files_at_an_address(store):
  if store.kind == "gs":
    pytest.skip("in a slow test")
  env = stores.clean() | {"JAX_PLATFORMS": "cpu"} | store.environment
  command = [sys.executable, "-c", CHECK, f"s3://{stores.BUCKET}/runs/a"]
  done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  found, refused = done.stdout.splitlines()
  assert found.startswith(f"found no checkpoint of s3://{stores.BUCKET}/runs/a can be read; the newest: s3://")
  assert refused.startswith("refused") and "step 5 is not saved" in refused


@pytest.mark.slow
def test_a_run_lives_at_an_address(store, tiny_flags, tmp_path):
  """Trained over a store that fails and dawdles, continued, evaluated, verified, begun from; bitwise as here."""
  proxy = stores.Unreliable(store.port, fails=7, waits=5)
  env = stores.environment(store.kind, proxy.port)
  at = f"{store.kind}://{stores.BUCKET}/runs"
  run(env, *tiny_flags, "--config.steps=10", f"--workdir={at}/a")
  said = run(env, *tiny_flags, f"--workdir={at}/a")
  assert f"continuing from step 10 of {at}/a" in said and f"everything is in {at}/a" in said
  run(env, *tiny_flags, f"--workdir={tmp_path / 'here'}")
  for name in ("sample", "evaluate", "verify"):
    run(env, f"--mode={name}", f"--workdir={at}/a", *["--prompt=red"] * (name == "sample"))
  fetch = "import sys; from lladax import address; s, p = address.system(sys.argv[1]); s.get(p, sys.argv[2], True)"
  command = [sys.executable, "-c", fetch, f"{at}/a", tmp_path / "there"]
  subprocess.run(command, env=stores.clean() | store.environment, check=True)
  assert_bitwise_equal(tmp_path / "there", tmp_path / "here")
  run(env, *tiny_flags, f"--config.init_from={at}/a", "--config.steps=3", f"--workdir={at}/b")
  proxy.close()


@pytest.mark.slow
def test_two_processes_without_a_shared_folder(store, tiny_flags, tmp_path):
  at, port = f"{store.kind}://{stores.BUCKET}/run", stores.free_port()
  flags = [*tiny_flags, "--config.mesh.fsdp=2", f"--workdir={at}", f"--coordinator=localhost:{port}"]
  env = store.environment | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
  for steps in (10, 20):
    both = []
    for number in range(2):
      own = tmp_path / f"{steps}_{number}"
      own.mkdir()
      given = [*flags, f"--config.steps={steps}", "--num_processes=2", f"--process_id={number}"]
      both.append(start(env | {"TMPDIR": str(own)}, *given))
    for process in both:
      _, err = process.communicate()
      assert process.returncode == 0, err
  assert "checkpoints/20: " in run(env, "--mode=verify", f"--workdir={at}")


def test_what_is_missing_is_said(monkeypatch):
  monkeypatch.setattr(address.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(Mistake, match=r"gs://bucket/run: gcsfs is not installed: pip install 'lladax\[gs\]'"):
    address.mirror("gs://bucket/run")


def test_a_folder_here_is_itself(tmp_path):
  assert address.mirror(tmp_path) == tmp_path == address.at(tmp_path)
  assert address.of(tmp_path) == str(tmp_path) == address.said(str(tmp_path))
  address.push(tmp_path)
  assert not list(tmp_path.iterdir())
