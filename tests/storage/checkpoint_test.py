import gc
import logging
import os
import pathlib
import shutil

import chex
import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lladax.devices import sharding
from lladax.mistake import Diverged, Mistake, Unsaved
from lladax.storage import checkpoint
from lladax.storage.checkpoint import Checkpoints, Corrupt


def tree(step):
  """A train state in small: random, so that no file compresses to nothing."""
  rng = np.random.default_rng(step)
  shapes = {"embedding": (64, 32), "blocks": {"q": (2, 32, 4, 8), "norm": (2, 32)}}

  def draw(shape):
    return jax.device_put(rng.normal(size=shape).astype(np.float32))

  def part():
    return jax.tree.map(draw, shapes, is_leaf=lambda x: isinstance(x, tuple))

  return {"step": jax.device_put(np.int32(step)), "params": part(), "mu": part(), "nu": part()}


def abstract(like, at=None):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at or x.sharding), like)


def save(workdir, *steps, **options):
  checkpoints = Checkpoints(workdir, **({"keep": 9} | options))
  for step in steps:
    checkpoints.save(step, tree(step))
  checkpoints.close()


def assert_same(a, b):
  chex.assert_trees_all_equal_shapes_and_dtypes(a, b)
  chex.assert_trees_all_equal(a, b)


def truncate(folder):
  """What a crash or a full disk leaves: files shorter than they were."""
  files = list(folder.glob("**/d/*"))
  assert files
  for path in files:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 10])


def without_metadata(folder):
  for path in folder.rglob("_METADATA"):
    path.unlink()


def empty(folder):
  shutil.rmtree(folder)
  folder.mkdir()


def another_letter(folder):
  """What one flipped bit makes of a key that Orbax knows."""
  path = folder / "_CHECKPOINT_METADATA"
  text = path.read_bytes()
  assert b'"metrics"' in text
  path.write_bytes(text.replace(b'"metrics"', b'"letrics"'))


DAMAGES = [truncate, without_metadata, empty, another_letter]


@pytest.fixture
def collected():
  """What Orbax leaves of a read that failed is collected within the test: it must not make itself heard."""
  yield
  gc.collect()


@pytest.mark.usefixtures("collected")
@pytest.mark.parametrize(
  "name",
  [
    "a[1]b",
    "[/x]",
    "a*c",
    "a?b",
    "new\nline",
    "per%20cent",
    "-a b",
    "a#b",
    "a:b",
    "日本\u2028",
    "s3:/b",
    "a.orbax-checkpoint-tmp",
  ],
)
def test_a_workdir_of_any_name_reads_back(tmp_path, name):
  """Saved, kept by count, found, read, set aside; Orbax would take [1] for a pattern, and merge what a * matches."""
  workdir = tmp_path / name
  checkpoint.check_workdir(workdir)
  save(tmp_path / "abc", 6)
  save(workdir, 1)
  save(workdir, 3, 6, keep=2)
  assert checkpoint.steps(workdir) == [3, 6] and checkpoint.metadata(workdir, 6).keys() == tree(6).keys()
  assert_same(checkpoint.restore(workdir, 6, abstract(tree(6))), tree(6))
  truncate(checkpoint.folder(workdir) / "6")
  step, found = checkpoint.restore_latest(workdir, abstract(tree(3)))
  assert step == 3
  assert_same(found, tree(3))


@pytest.mark.parametrize(
  ("name", "why"),
  [
    ("back\\slash", "could not be read back: use another"),
    ("gs:", "could not be read back: use another"),
    (os.fsdecode(b"latin-\xe9"), r"latin-\\udce9.*: the name is not UTF-8"),
    ("x" * 256, "cannot be written: File name too long"),
    ("/".join(["y" * 200] * 20), "4,.* letters leave no room for the names of checkpoints"),
    ("file/run", "cannot be written: .*file is a file, where a folder"),
    ("file", "cannot be written: .*file is a file, where a folder"),
    ("half", "evaluation.html cannot be written: it is a folder"),
    ("other", "other/tensorboard is a file, where a folder is needed"),
  ],
)
def test_other_workdirs_are_refused(tmp_path, name, why):
  (tmp_path / "file").touch()
  (tmp_path / "half/evaluation.html").mkdir(parents=True)
  (tmp_path / "other").mkdir()
  (tmp_path / "other/tensorboard").touch()
  before = sorted(tmp_path.rglob("*"))
  with pytest.raises(Mistake, match=f"^--workdir.*{why}"):
    checkpoint.check_workdir(tmp_path / name, ["evaluation.html"], ["tensorboard"])
  with pytest.raises(Mistake, match="^--workdir=s3:/bucket/run: an address is no folder: mount it"):
    checkpoint.check_workdir(pathlib.Path("s3://bucket/run"))
  assert sorted(tmp_path.rglob("*")) == before


def test_round_trip_is_bitwise(tmp_path):
  save(tmp_path, 3)
  expected = tree(3)
  assert_same(checkpoint.restore(tmp_path, 3, abstract(expected)), expected)


def test_parameters_alone(tmp_path):
  save(tmp_path, 3)
  params = {"params": tree(3)["params"]}
  assert_same(checkpoint.restore(tmp_path, 3, abstract(params)), params)


def test_onto_eight_devices(tmp_path):
  save(tmp_path, 3)
  expected = tree(3)
  mesh = sharding.make_mesh(sharding.MeshConfig(data=1, fsdp=4, tensor=2))
  letters = {"embedding": "VD", "blocks": {"q": "NDHK", "norm": "ND"}}
  at = {"step": NamedSharding(mesh, P())} | dict.fromkeys(("params", "mu", "nu"), sharding.shardings(mesh, letters))
  wanted = jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), expected, at)
  found = checkpoint.restore(tmp_path, 3, wanted)
  assert_same(found, expected)
  assert jax.tree.map(lambda x: x.sharding, found) == at
  assert found["mu"]["blocks"]["q"].addressable_shards[0].data.shape == (2, 32 // 4, 4 // 2, 8)


def test_kept_by_count_and_by_period(tmp_path):
  save(tmp_path, *range(10, 80, 10), keep=2, keep_every=30)
  assert checkpoint.steps(tmp_path) == [30, 60, 70]
  save(tmp_path, 80, keep=1)
  assert checkpoint.steps(tmp_path)[-1] == 80


def test_metadata_says_names_shapes_and_dtypes(tmp_path):
  save(tmp_path, 3)
  found = {name: (tuple(x.shape), np.dtype(x.dtype)) for name, x in checkpoint.flat(checkpoint.metadata(tmp_path, 3))}
  assert found == {name: (x.shape, x.dtype) for name, x in checkpoint.flat(tree(3))}


def test_no_checkpoint_at_all(tmp_path):
  assert checkpoint.steps(tmp_path) == []
  assert checkpoint.restore_latest(tmp_path, abstract(tree(0))) is None


@pytest.mark.usefixtures("collected")
@pytest.mark.parametrize("damage", DAMAGES)
def test_an_unreadable_checkpoint_falls_back_and_stays(tmp_path, caplog, damage):
  save(tmp_path, 3, 6)
  folder = checkpoint.folder(tmp_path)
  damage(folder / "6")
  with caplog.at_level(logging.WARNING):
    step, found = checkpoint.restore_latest(tmp_path, abstract(tree(3)))
  assert step == 3
  assert_same(found, tree(3))
  assert checkpoint.steps(tmp_path) == [3]
  assert (folder / "6.unreadable").is_dir()
  (message,) = [record.getMessage() for record in caplog.records if "falling back" in record.getMessage()]
  assert f"{folder / '6'} cannot be read" in message and "falling back to step 3" in message and "\n" not in message
  # The run goes on, saves this step again, and it may be lost again.
  save(tmp_path, 6)
  damage(folder / "6")
  assert checkpoint.restore_latest(tmp_path, abstract(tree(3)))[0] == 3
  assert len(list(folder.glob("6.unreadable*"))) == 2


@pytest.mark.usefixtures("collected")
@pytest.mark.parametrize("damage", DAMAGES)
def test_an_unreadable_one_is_in_nobodys_way(tmp_path, damage):
  save(tmp_path, 3, 6)
  damage(checkpoint.folder(tmp_path) / "3")
  assert_same(checkpoint.restore_latest(tmp_path, abstract(tree(6)))[1], tree(6))
  save(tmp_path, 9, keep=2)
  assert checkpoint.steps(tmp_path) == [6, 9]


@pytest.mark.usefixtures("collected")
@pytest.mark.parametrize("damage", DAMAGES)
def test_if_none_can_be_read_it_is_one_error(tmp_path, damage):
  save(tmp_path, 3, 6)
  for step in (3, 6):
    damage(checkpoint.folder(tmp_path) / str(step))
  with pytest.raises(Corrupt, match=f"no checkpoint of {tmp_path} can be read; the newest: .*checkpoints/6 ") as error:
    checkpoint.restore_latest(tmp_path, abstract(tree(3)))
  assert "\n" not in str(error.value)
  assert checkpoint.steps(tmp_path) == [3, 6]  # left as they were


def test_a_half_written_checkpoint_is_none(tmp_path, caplog):
  save(tmp_path, 3, 6)
  folder = checkpoint.folder(tmp_path)
  half = folder / "6.orbax-checkpoint-tmp"
  (folder / "6").rename(half)  # Orbax writes here, and renames at the end
  assert checkpoint.steps(tmp_path) == [3]
  assert checkpoint.restore_latest(tmp_path, abstract(tree(3)))[0] == 3
  assert [x for x in caplog.messages if x.startswith(f"{half}: the run ended while it was written; it is skipped")]
  save(tmp_path, 6)
  assert checkpoint.steps(tmp_path) == [3, 6] and not half.exists()
  assert_same(checkpoint.restore(tmp_path, 6, abstract(tree(6))), tree(6))


def test_another_shape_is_named(tmp_path):
  save(tmp_path, 3)
  wanted = abstract(tree(3))
  wanted["mu"]["embedding"] = jax.ShapeDtypeStruct((64, 16), np.float32)
  with pytest.raises(Corrupt, match=r"checkpoints/3: mu/embedding is of shape \(64, 32\), expected \(64, 16\)"):
    checkpoint.restore(tmp_path, 3, wanted)
  wanted = {"params": {"head": jax.ShapeDtypeStruct((4,), np.float32)}}
  with pytest.raises(Corrupt, match=r"checkpoints/3: params/head is missing, expected \(4,\)"):
    checkpoint.restore(tmp_path, 3, wanted)


@pytest.mark.usefixtures("collected")
@pytest.mark.parametrize("damage", ["a bit", "512 bytes"])
def test_a_byte_that_changed_anywhere_is_found_and_the_checkpoint_before_is_used(tmp_path, damage):
  """What is read is what was written, or it is not used: of the files of arrays only their indexes have checksums."""
  save(tmp_path / "whole", 1, 2)
  expected, rng = {step: tree(step) for step in (1, 2)}, np.random.default_rng(0)
  for n in range(8):
    shutil.copytree(tmp_path / "whole", workdir := tmp_path / str(n))
    files = sorted(x for x in (checkpoint.folder(workdir) / "2").rglob("*") if x.is_file() and x.stat().st_size)
    sizes = np.array([x.stat().st_size for x in files])
    path = files[rng.choice(len(files), p=sizes / sizes.sum())]
    content = bytearray(path.read_bytes())
    at = rng.integers(len(content))
    if damage == "a bit":
      content[at] ^= 1 << rng.integers(8)
    else:
      content[at : at + 512] = bytes(len(content[at : at + 512]))
    path.write_bytes(content)
    step, found = checkpoint.restore_latest(workdir, abstract(expected[1]))
    assert_same(found, expected[step])  # a byte that nothing rests on may change


def test_what_is_not_a_number_is_not_saved(tmp_path):
  broken = tree(2)
  broken["mu"]["blocks"]["q"] = broken["mu"]["blocks"]["q"].at[1, 3, 2, 1].set(np.nan)
  checkpoints = Checkpoints(tmp_path, keep=2)
  checkpoints.save(1, tree(1))
  with pytest.raises(Diverged, match=r"mu/blocks/q is not a number any more at step 2, and is not saved"):
    checkpoints.save(2, broken)
  checkpoints.close()
  assert checkpoint.steps(tmp_path) == [1]


def test_other_dtypes_are_read_as_they_were_written_and_cast(tmp_path):
  save(tmp_path, 1)
  like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, "bfloat16", sharding=x.sharding), tree(1)["params"])
  found = checkpoint.restore(tmp_path, 1, {"params": like})
  assert_same(found["params"], jax.tree.map(lambda x: x.astype("bfloat16"), tree(1)["params"]))


def test_a_checkpoint_that_another_run_rests_on_is_not_removed(tmp_path, caplog):
  base = tmp_path / "base"
  save(base, 1, 2, keep=2)
  for who in ("adapters", "more", "adapters"):
    checkpoint.need(checkpoint.folder(base) / "2", tmp_path / who)
  assert (base / "needed/2").read_text().splitlines() == [str(tmp_path / "adapters"), str(tmp_path / "more")]
  save(base, 3, 4, 5, 6, keep=2, keep_every=4)
  assert checkpoint.steps(base) == [2, 4, 5, 6]
  (tmp_path / "file").touch()
  assert not caplog.records
  checkpoint.need(tmp_path / "file/checkpoints/2", tmp_path / "adapters")
  assert "needed/2 cannot be written" in caplog.text and "checkpoints/2 is not removed" in caplog.text


def test_nothing_is_saved_in_a_workdir_that_is_no_longer_there(tmp_path):
  for name, change in {
    "removed": lambda path: shutil.rmtree(path),
    "begun again": lambda path: os.replace(
      shutil.copy(path / "config.json", path / "config.new"), path / "config.json"
    ),
  }.items():
    workdir = tmp_path / name
    workdir.mkdir()
    (workdir / "config.json").write_text("{}")
    checkpoints = Checkpoints(workdir)
    checkpoints.save(1, tree(1))
    checkpoints._saving.result()
    change(workdir)
    with pytest.raises(Mistake, match=f"{name} was removed, or another run has begun in it, .*: step 2 is not saved"):
      checkpoints.save(2, tree(2))


def test_a_last_checkpoint_that_vanishes_is_not_called_done(tmp_path):
  checkpoints = Checkpoints(tmp_path / "run")
  checkpoints.save(1, tree(1))
  checkpoints._saving.result()
  shutil.rmtree(tmp_path / "run")
  with pytest.raises(Mistake, match="run was removed while step 1 was saved in it: it is lost"):
    checkpoints.close()


@pytest.fixture
def refusing(tmp_path):
  """Has a disk refuse what is written to the checkpoints of RUN, and take it again."""
  root, aside = tmp_path / "run/checkpoints", tmp_path / "run/aside"

  def refuse():
    root.rename(aside)
    root.touch()

  def take():
    root.unlink()
    aside.rename(root)

  return refuse, take


def test_a_save_that_fails_is_said_and_the_next_one_is_tried(tmp_path, refusing, caplog):
  refuse, take = refusing
  checkpoints = Checkpoints(tmp_path / "run", keep=2)
  for step in range(1, 6):
    if step == 3:
      checkpoints._saving.result()
      refuse()
    elif step == 5:
      take()
    checkpoints.save(step, tree(step))
    if step in (3, 4) and checkpoints._saving:
      checkpoints._saving.result()
  checkpoints.close()
  said = [x.getMessage() for x in caplog.records if x.name == "root" and "NOT saved" in x.getMessage()]
  where = f"{tmp_path}/run/checkpoints cannot be written: Not a directory"
  assert said == [f"step {step} is NOT saved: {where}; there is no checkpoint yet" for step in (3, 4)]
  assert checkpoint.steps(tmp_path / "run") == [2, 5]  # those that failed push none out
  for step in (2, 5):
    assert_same(checkpoint.restore(tmp_path / "run", step, abstract(tree(step))), tree(step))


def test_a_last_save_that_fails_is_one_line(tmp_path, refusing):
  checkpoints = Checkpoints(tmp_path / "run")
  checkpoints.save(1, tree(1))
  checkpoints._saving.result()
  refusing[0]()
  checkpoints.save(2, tree(2))
  with pytest.raises(Unsaved, match="step 2, the last one, could not be saved: .*Not a directory; make room") as error:
    checkpoints.close()
  assert "\n" not in str(error.value)


def test_a_save_that_fails_of_something_else_is_a_crash(tmp_path, monkeypatch, caplog):
  checkpoints = Checkpoints(tmp_path)

  def fail(*args, **options):
    raise RuntimeError("a bug\nof ours")

  monkeypatch.setattr(type(checkpoints._manager), "wait_until_finished", fail)
  checkpoints.save(1, tree(1))
  with pytest.raises(RuntimeError, match="a bug"):
    checkpoints.close()
  assert "step 1 is NOT saved: " in caplog.text and "RuntimeError: a bug;" in caplog.text
  checkpoints = Checkpoints(tmp_path / "other")
  checkpoints.save(1, tree(1))
  checkpoints.close(why=KeyboardInterrupt())  # which is not hidden
