import json
import re
import subprocess
import sys

import pytest
import stores
from runs import assert_bitwise_equal

from lladax import address
from lladax.inference import convert
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


def run(environment, *given):
  process = start(environment, *given)
  out, err = process.communicate()
  assert process.returncode == 0, err
  assert "Traceback" not in err, err
  return out + err


CHECK = """
import os, sys, numpy as np, jax
from lladax import address
from lladax.inference import convert
from lladax.storage import checkpoint, metrics
from lladax.mistake import Mistake
workdir = address.mirror(sys.argv[1])
make = lambda n: {"step": jax.device_put(np.int32(n)), "params": {"w": jax.device_put(np.full((99, 99), n, "f4"))}}
abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), make(0))
system, root = address.system(sys.argv[1])
def damage(step):
  data = max((x for x in system.find(f"{root}/checkpoints/{step}") if "/d/" in x), key=lambda x: system.info(x)["size"])
  content = bytearray(system.cat_file(data)); content[len(content) // 2] ^= 1; system.pipe_file(data, bytes(content))
(workdir / "config.json").write_text('{"model": {}}')
address.push(workdir)
saver = checkpoint.Checkpoints(workdir, keep=2)
for n in (1, 2, 3):
  metrics.append(workdir / "metrics.jsonl", {"step": n})
  saver.save(n, make(n))
saver.close()
assert checkpoint.steps(workdir) == [2, 3]
assert (checkpoint.restore(workdir, 3, abstract)["params"]["w"] == 3).all()
system.rm_file(f"{root}/checkpoints/3/commit_success.txt")  # as if killed before the end of the save
assert checkpoint.steps(workdir) == [2]
damage(2)
try:
  checkpoint.restore_latest(workdir, abstract)
except checkpoint.Corrupt as error:
  print("found", address.said(str(error)))
saver = checkpoint.Checkpoints(workdir)
saver.save(5, make(5))
saver.save(7, make(7))
saver.close()
damage(7)
assert checkpoint.restore_latest(workdir, abstract)[0] == 5  # and the other is set aside
assert checkpoint.steps(workdir) == [5] and system.exists(f"{root}/checkpoints/7.unreadable")
address._mirrors.clear()
again = address.mirror(sys.argv[1])
assert [row["step"] for row in metrics.read(again / "metrics.jsonl")] == [1, 2, 3]
saver = checkpoint.Checkpoints(again)
saver.save(8, make(8))
system.pipe_file(f"{root}/config.json", b"{}")
metrics.append(again / "metrics.jsonl", {"step": 9})
try:
  saver.save(9, make(9))
except Mistake as error:
  print("refused", error)
saver.close(KeyboardInterrupt())
assert b'"step": 9' not in system.cat_file(f"{root}/metrics.jsonl")  # it is another run's
"""


@pytest.mark.parametrize("store", ["s3", pytest.param("gs", marks=pytest.mark.slow)], indirect=True)
def test_checkpoints_and_small_files_at_an_address(store):
  at = f"{store.kind}://{stores.BUCKET}/runs/a"
  env = stores.clean() | {"JAX_PLATFORMS": "cpu"} | store.environment
  done = subprocess.run([sys.executable, "-c", CHECK, at], env=env, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  found, refused = done.stdout.splitlines()
  assert found.startswith(f"found no checkpoint of {at} can be read; the newest: {at}/checkpoints/2")
  assert refused.startswith("refused") and "step 9 is not saved" in refused


AWAY = """
import sys, numpy as np, jax
from lladax import address
from lladax.inference import convert
from lladax.mistake import Mistake
from lladax.storage import checkpoint
workdir = address.mirror(sys.argv[1])
make = lambda n: {"step": jax.device_put(np.int32(n))}
abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), make(0))
def ask(what):
  print(what, flush=True)
  input()
(workdir / "config.json").write_text('{"model": {}}')
address.push(workdir)
saver = checkpoint.Checkpoints(workdir)
saver.save(1, make(1))
saver._settle()
ask("refuse")
saver.save(2, make(2))
saver._settle()
for ask_it in (lambda: checkpoint.restore(workdir, 1, abstract), lambda: checkpoint.steps(workdir)):
  try:
    ask_it()
  except Mistake as error:
    assert not isinstance(error, checkpoint.Corrupt)
    print(error)
ask("accept")
saver.save(3, make(3))
saver._settle()
assert checkpoint.steps(workdir) == [1, 3]
ask("refuse")
saver.save(4, make(4))
try:
  saver.close()
except Mistake as error:
  print(error)
"""


@pytest.mark.slow
def test_a_store_that_refuses_ends_nothing_but_the_last_save(store):
  """Nor is a checkpoint that cannot be asked for taken for a damaged one."""
  at, proxy = f"{store.kind}://{stores.BUCKET}/runs/a", stores.Unreliable(store.port, fails=9999, waits=9999)
  env = stores.clean() | {"JAX_PLATFORMS": "cpu"} | stores.environment(store.kind, proxy.port)
  command, pipe, said = [sys.executable, "-c", AWAY, at], subprocess.PIPE, []
  process = subprocess.Popen(command, env=env, text=True, stdin=pipe, stdout=pipe, stderr=pipe)
  assert process.stdin and process.stdout
  for line in process.stdout:
    if line.strip() in ("refuse", "accept"):
      proxy.refuses = line.strip() == "refuse"
      process.stdin.write("\n")
      process.stdin.flush()
    else:
      said.append(line)
  _, err = process.communicate()
  proxy.close()
  assert process.returncode == 0 and len(said) == 3, (said, err)
  assert said[0].startswith(f"{at}/checkpoints/1 cannot be read: ")
  assert said[1].startswith(f"{at}/checkpoints cannot be read: ")
  assert said[2].startswith(f"step 4, the last one, could not be saved: {at}/checkpoints cannot be written: ")
  assert "step 2 is NOT saved" in err


FETCH = "import sys; from lladax import address; s, p = address.system(sys.argv[1]); s.get(p, sys.argv[2], True)"


def fetch(store, name, here):
  env = stores.clean() | store.environment
  subprocess.run([sys.executable, "-c", FETCH, name, here], env=env, check=True)


def names(folder):
  """Of all files, without what is drawn or a time."""
  return {
    re.sub(r"[0-9a-f]{32}|\d{5,}.*|\d{4}_\d\d.*", "*", str(x.relative_to(folder)))
    for x in folder.rglob("*")
    if x.is_file()
  }


@pytest.mark.slow
@pytest.mark.parametrize("store", ["s3"], indirect=True)  # for gs, see the next one
def test_a_run_lives_at_an_address(store, tiny_flags, tmp_path):
  """Trained over a store that fails and dawdles, continued, evaluated, begun from; bitwise as unbroken here."""
  proxy = stores.Unreliable(store.port, fails=13, waits=9)
  unreliable = stores.environment(store.kind, proxy.port)
  at, flags = f"{store.kind}://{stores.BUCKET}/runs", [*tiny_flags, "--config.log.profile_last=2"]
  run(unreliable, *flags, "--config.steps=10", f"--workdir={at}/a")
  said = run(unreliable, *flags, f"--workdir={at}/a")
  assert f"continuing from step 10 of {at}/a" in said and f"everything is in {at}/a" in said
  assert proxy.failed > 10
  proxy.close()
  run({}, *flags, f"--workdir={tmp_path / 'here'}")
  begun = [f"--config.init_from={at}/a", "--config.steps=5", f"--workdir={at}/b"]
  run(store.environment, f"--config={at}/a/config.json", *begun)
  fetch(store, f"{at}/a", tmp_path / "there")
  assert_bitwise_equal(tmp_path / "there", tmp_path / "here")
  assert (tmp_path / "there/needed/20").read_text() == f"{at}/b\n"
  assert names(tmp_path / "there") - {"needed/20"} == names(tmp_path / "here")  # nothing is missing, or too much


@pytest.mark.slow
def test_models_and_records_at_an_address(store, tiny_flags, tiny_workdir, tmp_path):
  """Exported, imported, read as published; prepared, and trained on."""
  pytest.importorskip("apache_beam")
  at, env = f"{store.kind}://{stores.BUCKET}", store.environment
  run(env, "--mode=export", f"--workdir={tiny_workdir}", f"--target={at}/published")
  fetch(store, f"{at}/published", tmp_path / "published")
  convert.to_published(tiny_workdir, tmp_path / "here")
  assert names(tmp_path / "published") == names(tmp_path / "here")
  for name in names(tmp_path / "here"):
    assert (tmp_path / "published" / name).read_bytes() == (tmp_path / "here" / name).read_bytes(), name
  run(env, "--mode=import", f"--source={at}/published", f"--workdir={at}/imported")
  run(env, "--mode=sample", f"--workdir={at}/imported", "--prompt=red")
  run(env, "--mode=prepare", *tiny_flags, f"--target={at}/records", "--shards=2")
  run(env, *tiny_flags, f"--config.data.corpus=records:{at}/records", "--config.steps=5", f"--workdir={at}/run")


@pytest.mark.slow
@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_conversations_at_an_address(store, tiny_flags, tmp_path):
  """The same bytes as here, and a run on them."""
  pytest.importorskip("apache_beam")
  at, env, path = f"{store.kind}://{stores.BUCKET}", store.environment, tmp_path / "talks.jsonl"
  path.write_text("".join(json.dumps({"prompt": f"{i}?", "response": "red"}) + "\n" for i in range(80)))
  flags = [*tiny_flags, "--config.data.format=chat", "--config.data.length=64"]
  prepare = ["--mode=prepare", *flags, f"--config.data.corpus=files:{path}", "--shards=2"]
  run({}, *prepare, f"--target={tmp_path / 'here'}")
  run(env, *prepare, f"--target={at}/talks")
  fetch(store, f"{at}/talks", tmp_path / "there")
  here, there = (
    {str(x.relative_to(tmp_path / name)): x.read_bytes() for x in (tmp_path / name).rglob("*") if x.is_file()}
    for name in ("here", "there")
  )
  assert here == there and "turns-train.int32-00001-of-00002" in here
  run(env, *flags, f"--config.data.corpus=records:{at}/talks", "--config.steps=5", f"--workdir={at}/run")


@pytest.mark.slow
@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_two_processes_without_a_shared_folder(store, tiny_flags, tmp_path):
  """Each with a disk of its own; trained, and continued."""
  at, port = f"{store.kind}://{stores.BUCKET}/run", stores.free_port()
  flags = [*tiny_flags, "--config.mesh.fsdp=2", f"--workdir={at}", f"--coordinator=localhost:{port}"]
  env = stores.clean() | {"JAX_PLATFORMS": "cpu"} | store.environment
  env |= {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
  for steps in (10, 20):
    both, logs = [], [tmp_path / f"{steps}_{number}.log" for number in range(2)]
    for number, log in enumerate(logs):
      (own := log.with_suffix("")).mkdir()
      command = [sys.executable, "-m", "lladax.main", *flags, f"--config.steps={steps}", "--num_processes=2"]
      with log.open("w") as file:  # no pipe: one that nobody reads yet would fill up
        both.append(subprocess.Popen(
          [*command, f"--process_id={number}"], env=env | {"TMPDIR": str(own)}, stdout=file, stderr=file
        ))  # fmt: skip
    assert [process.wait() for process in both] == [0, 0], "\n".join(log.read_text() for log in logs)
  assert f"continuing from step 10 of {at}" in logs[0].read_text()


def test_what_is_missing_is_said(monkeypatch):
  monkeypatch.setattr(address.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(Mistake, match=r"gs://bucket/run: gcsfs is not installed: pip install 'lladax\[gs\]'"):
    address.mirror("gs://bucket/run")


def test_a_folder_here_is_itself(tmp_path):
  assert address.mirror(tmp_path) == tmp_path == address.at(tmp_path)
  assert address.of(tmp_path) == str(tmp_path) == address.said(str(tmp_path))
  address.push(tmp_path)
  assert not list(tmp_path.iterdir())
