"""Checkpoints with Orbax: the train state as a plain dict with stable names, on any mesh.

WORKDIR/checkpoints/STEP/ holds {"step", "params", "mu", "nu", "guard"}: parameters and Adam's moments under the names
of `MaskPredictorConfig.letters`, and what the guard of `training.step` knows. Neither Flax's nor optax's classes leave
a trace in it.
"""

import contextlib
import functools
import glob
import hashlib
import itertools
import json
import logging
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from lladax import address, fields
from lladax.devices import distributed
from lladax.mistake import Diverged, Missing, Mistake, Unsaved, refusal
from lladax.storage import digest, together, writing

Tree = dict[str, Any]


DIGESTS = "digests"  # of every array, in a checkpoint's own metadata


class Corrupt(Mistake):
  """A checkpoint that cannot be read back."""


def folder(workdir: Path) -> Path:
  """Where a workdir keeps its checkpoints."""
  return address.at(workdir / "checkpoints")


def config(workdir: Path) -> dict[str, Any]:
  """What WORKDIR/config.json holds, as plain values.

  Raises:
    Missing, Mistake: it is not there, or is no longer what was written.
  """
  path = workdir / "config.json"
  if not path.is_file():
    raise Missing(f"{workdir} is not a workdir of lladax: there is no config.json in it")
  content = fields.read_bytes(path)
  try:
    values = json.loads(content)
    why = "" if isinstance(values, dict) and isinstance(values.get("model"), dict) else "it holds something else"
  except (ValueError, RecursionError) as error:  # of UTF-8, too
    why = str(error)[:200]
  if why:
    raise Mistake(f"{path} is damaged ({why}): put back a copy of it, or use another workdir")
  return values


def check_workdir(workdir: Path, files: Sequence[str] = (), folders: Sequence[str] = ()) -> None:
  """Raises Mistake if a workdir cannot be written, or what is saved in one of this name could not be read back.

  Args:
    workdir: of a run; it need not be there.
    files: that will be written in it.
    folders: likewise.
  """
  path = workdir.absolute()
  if not workdir.is_absolute() and re.fullmatch(r"[a-z][a-z0-9+.-]+:", workdir.parts[0] if workdir.parts else ""):
    raise Mistake(f"--workdir={workdir}: an address is no folder: mount it, and name the folder")
  try:
    size = len(str(path).encode())
  except UnicodeEncodeError:
    raise Mistake(f"--workdir={ascii(str(workdir))}: the name is not UTF-8, and could not be read back") from None
  if "\\" in str(path) or "gs:" in path.parts:  # for TensorStore the one is a /, the other an address
    raise Mistake(f"--workdir={workdir}: checkpoints in a folder of this name could not be read back: use another")
  if size > _LONGEST:
    raise Mistake(f"--workdir={str(workdir)[:40]}...: {size:,} letters leave no room for the names of checkpoints")
  for name in ("", *folders):
    writing.check_writable(path / name, "--workdir", is_folder=True, parents=True)
  for name in files:
    writing.check_writable(path / name, "--workdir", parents=True)


_LONGEST = 3800  # bytes of a path: Linux takes 4095, and the files of a checkpoint have names of about 160


def steps(workdir: Path) -> list[int]:
  """Steps of the finished checkpoints, oldest first."""
  root = folder(workdir)
  if address.is_address(root):  # where nothing can be renamed, Orbax's mark says that it is whole
    system, path = address.system(str(root))
    with address.asked(root):
      found = [x.split("/")[-2] for x in system.glob(f"{path}/*/{_WHOLE}")]
    return sorted(int(x) for x in found if x.isdecimal())
  return sorted(int(x.name) for x in root.iterdir() if x.name.isdecimal()) if root.is_dir() else []


_WHOLE = "commit_success.txt"


def fingerprint(path: Path) -> str:
  """Of the checkpoint in a folder WORKDIR/checkpoints/STEP, wherever it is moved; of none, "".

  Its data files are named by random numbers of 128 bits when they are written: nothing large is read.
  """
  if address.is_address(name := address.of(path)):
    system, root = address.system(name)
    with address.asked(name):
      found = system.find(root, detail=True).items()
    files = sorted((x[len(root) + 1 :], about["size"]) for x, about in found if x.split("/")[-2] == "d")
  else:
    files = sorted((str(file.relative_to(path)), file.stat().st_size) for file in path.glob("**/d/*"))
  return hashlib.blake2b(repr(files).encode(), digest_size=8).hexdigest() if files else ""


def need(path: Path, who: Path) -> None:
  """Notes that the run in the workdir `who` rests on a checkpoint of another one, which will never be removed then.

  Args:
    path: its folder, WORKDIR/checkpoints/STEP.
    who: who needs it.
  """
  note, name = address.at(path.parent.parent / _NEEDED / path.name), address.of(who)
  try:
    with address.asked(note, "written"):
      note.parent.mkdir(exist_ok=True)
      known = note.read_text("utf-8").splitlines() if note.exists() else []
      if name not in known:
        note.write_text("".join(f"{x}\n" for x in (*known, name)), "utf-8")
  except (OSError, Mistake) as error:
    logging.warning("%s cannot be written: %s: see to it that %s is not removed", note, writing.reason(error), path)


def needed(workdir: Path, step: int) -> bool:
  """Whether another run rests on a checkpoint."""
  note = address.at(workdir / _NEEDED / str(step))
  with address.asked(note):
    return note.exists()


_NEEDED = "needed"  # WORKDIR/needed/STEP names, line by line, the workdirs of the runs that began from that checkpoint


class _Kept:
  """Which checkpoints stay: the last `keep`, every `keep_every`-th step, and those that other runs rest on."""

  def __init__(self, workdir: Path, keep: int, keep_every: int):
    self._workdir, self._keep, self._every = workdir, keep, keep_every

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
    """As Orbax asks: of all that are there, oldest first."""
    last = {x.step for x in checkpoints[-self._keep :]}
    return [
      x.step in last or bool(self._every and x.step % self._every == 0) or needed(self._workdir, x.step)
      for x in checkpoints
    ]


class Checkpoints:
  """Saves in the background; keeps the last `keep` checkpoints, every `keep_every`-th step, and what others rest on.

  A save that fails is said at once, and the next one is tried: only the last one must not fail.
  """

  def __init__(self, workdir: Path, *, keep: int = 2, keep_every: int = 0):
    _drop_echoes()
    kept: Any = _Kept(workdir, keep, keep_every)
    options = ocp.CheckpointManagerOptions(preservation_policy=kept, cleanup_tmp_directories=True, create=True)
    self._open, self._meetings = functools.partial(_manager, workdir, options), together.Meetings()
    if jax.process_count() > 1:
      options.async_options = ocp.AsyncOptions(barrier_sync_fn=self._meetings.meet)
    self._workdir, self._begun, self._last = workdir, _identity(workdir), None
    with address.asked(folder(workdir), "written"):
      self._manager: ocp.CheckpointManager | None = self._open()
    self._waiter, self._saving = futures.ThreadPoolExecutor(1, "saving"), None
    self._error: Exception | None = None  # of the last save

  def save(self, step: int, tree: Tree) -> None:
    """Begins to save, once the save before is done; the arrays may be donated as soon as this returns.

    Raises:
      Diverged: one of them is not all numbers; nothing is saved.
      Mistake: the workdir was removed, or another run has begun in it.
    """
    self._settle()
    if jax.process_index() == 0 and not self._is_ours():  # others may see it late
      self._last = None
      raise Mistake(
        f"{self._workdir} was removed, or another run has begun in it, since this one did: step {step} is not saved"
      )
    digests, broken = digest.of(dict(flat(tree)))
    if broken:
      raise Diverged(
        f"{broken[0]} is not a number any more at step {step}, and is not saved: start again in another workdir with a"
        f" lower learning rate; the checkpoints before it are in {folder(self._workdir)}"
      )
    self._last = step
    self._meetings.begin()
    try:
      self._manager = self._manager or self._open()
      self._manager.save(step, args=ocp.args.PyTreeSave(tree), force=True, custom_metadata={DIGESTS: digests})
    except Exception as error:  # Orbax and TensorStore raise many kinds, of the save before, too
      self._failed(error)
    else:
      self._saving = self._waiter.submit(self._wait, self._manager)

  def _wait(self, manager: ocp.CheckpointManager) -> None:
    """In a thread of its own: a save that fails is heard of before the next one."""
    try:
      manager.wait_until_finished()
    except Exception as error:
      self._failed(error)
    self._push()

  def _push(self) -> None:
    """Of each process: it is process 0 that writes but what a profiler sees."""
    if address.is_address(folder(self._workdir)) and self._is_ours():
      address.push(self._workdir, must=False)

  def _is_ours(self) -> bool:
    """Whether the workdir is still that of this run. What a store does not say, a save will."""
    try:
      return _identity(self._workdir) == self._begun
    except Mistake:
      return True

  def _failed(self, error: Exception) -> None:
    self._error = error
    left = "which are its checkpoints is not known"
    with contextlib.suppress(Mistake):
      found = steps(self._workdir)
      left = f"the last checkpoint is step {found[-1]}" if found else "there is no checkpoint yet"
    logging.warning(
      "step %s is NOT saved: %s cannot be written: %s; %s", self._last, folder(self._workdir), writing.reason(error),
      left,
    )  # fmt: skip

  def _settle(self) -> None:
    """Waits for the save that was begun; what is left of one that failed is removed, as room may be what it lacked."""
    if self._saving:
      self._saving.result()
    self._saving = None
    failed = self._error is not None
    if jax.process_count() > 1:
      failed = bool(np.any(multihost_utils.process_allgather(np.array(failed))))
    if failed and self._manager:
      with contextlib.suppress(Exception):  # it has been said
        self._manager.close()
      self._manager = None
      with contextlib.suppress(Exception):
        self._manager = self._open()
    self._error = None

  def close(self, why: BaseException | None = None) -> None:
    """Waits for the last save.

    Args:
      why: what ends the run already; it is not hidden behind what is raised here.

    Raises:
      Unsaved: it failed.
      Mistake: it is not there, as the workdir was removed meanwhile.
    """
    if self._saving:
      self._saving.result()
    self._waiter.shutdown()
    if self._manager:
      with contextlib.suppress(Exception) if self._error or why else contextlib.nullcontext():
        self._manager.close()
    self._push()
    if why:
      return
    if self._error:
      ours = isinstance(self._error, together.Elsewhere) or refusal(self._error)
      if not ours and not address.is_address(folder(self._workdir)):
        raise self._error
      raise Unsaved(
        f"step {self._last}, the last one, could not be saved: {folder(self._workdir)} cannot be written:"
        f" {writing.reason(self._error)}; make room, or use another workdir, and give the same command again"
      ) from self._error
    if jax.process_index() == 0 and self._last is not None and self._last not in steps(self._workdir):
      raise Mistake(f"{self._workdir} was removed while step {self._last} was saved in it: it is lost")


def _identity(workdir: Path) -> Any:
  """Of the config.json that a run wrote when it began; None where there is none.

  Raises:
    Mistake: the store does not say.
  """
  try:
    if address.is_address(name := address.of(workdir)):
      system, path = address.system(name)
      with address.asked(name):
        about = system.info(f"{path}/config.json")
      return [str(about.get(x)) for x in ("ETag", "LastModified", "generation", "updated", "md5Hash")]
    found = (workdir / "config.json").stat()
  except OSError:
    return None
  return found.st_dev, found.st_ino


def drop(workdir: Path, *, after: int) -> None:
  """Removes the checkpoints of all steps behind `after`: the run has gone back there."""
  distributed.agree(back=str(after))
  if jax.process_index() == 0:
    for step in steps(workdir):
      if step > after:
        with address.asked(folder(workdir), "written"):
          epath.Path(folder(workdir) / str(step)).rmtree()
  distributed.agree(dropped=str(after))


def restore(workdir: Path, step: int, abstract: Tree) -> Tree:
  """The checkpoint's arrays in the shapes, dtypes and shardings of `abstract`.

  Args:
    workdir: of the run.
    step: one of `steps(workdir)`.
    abstract: tree of `jax.ShapeDtypeStruct`; a part of the checkpoint's tree is enough.

  Raises:
    Corrupt: if it cannot be read, or has other shapes; the message says what the reader said.
  """
  with _opened(workdir, step) as ask:
    return _restore(ask, folder(workdir) / str(step), abstract, *ask(_about))


def _about(manager: ocp.CheckpointManager, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
  """(name -> shape and dtype as written, what else is known of the checkpoint), without reading an array."""
  return dict(flat(dict(manager.item_metadata(step).tree))), manager.metadata(step).custom_metadata or {}


def _restore(ask: "_Ask", path: Any, abstract: Tree, shapes: dict[str, Any], kept: dict[str, Any]) -> Tree:
  for name, wanted in flat(abstract):
    found = shapes.get(name)
    if found is None or tuple(found.shape) != tuple(wanted.shape):
      shape = "missing" if found is None else f"of shape {tuple(found.shape)}"
      raise Corrupt(f"{path}: {name} is {shape}, expected {tuple(wanted.shape)}")
  written = {name: x.dtype for name, x in shapes.items()}
  as_written = _by_name(lambda name, x: jax.ShapeDtypeStruct(x.shape, written[name], sharding=x.sharding), abstract)
  args = ocp.args.PyTreeRestore(
    item=as_written, restore_args=ocp.checkpoint_utils.construct_restore_args(as_written), partial_restore=True
  )
  tree = ask(lambda manager, step: manager.restore(step, args=args))
  digests, broken = digest.of(dict(flat(tree)))
  expected = kept.get(DIGESTS, digests)  # older checkpoints have none
  if changed := [name for name in digests if expected.get(name) != digests[name]]:
    raise Corrupt(f"{path}: {changed[0]} is not what was written")
  if broken:
    raise Corrupt(f"{path}: {broken[0]} holds what is not a number")
  return jax.tree.map(_cast, tree, abstract)


def _cast(x: jax.Array, wanted: jax.ShapeDtypeStruct) -> jax.Array:
  if x.dtype == wanted.dtype:
    return x
  return jax.jit(lambda x: x.astype(wanted.dtype), out_shardings=wanted.sharding, donate_argnums=0)(x)


def verify(workdir: Path, step: int) -> str:
  """Reads a checkpoint, one array after another on the first device; says how much it was.

  Raises:
    Corrupt: as `restore`.
  """
  here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  with _opened(workdir, step) as ask:
    arrays, kept = ask(_about)
    for path, x in arrays.items():
      alone: Any = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here)
      for name in reversed(path.split("/")):
        alone = {name: alone}
      _restore(ask, folder(workdir) / str(step), alone, arrays, kept)
  size = sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays.values()) / 2**20
  digests = "as they were written" if DIGESTS in kept else "that can be read; they were written without digests"
  return f"{len(arrays)} arrays, {size:,.1f} MiB, {digests}"


def metadata(workdir: Path, step: int) -> Tree:
  """The tree of the checkpoint, with shape and dtype at the leaves, without reading an array."""
  with _opened(workdir, step) as ask:
    return ask(lambda manager, step: dict(manager.item_metadata(step).tree))


class _Literal(type(epath.Path("/"))):
  """A path as the file system spells it; else Orbax takes [ab] for a pattern, and /s3/runs for an address."""

  @property
  def _uri_scheme(self) -> None:
    return None

  def glob(self, pattern: str) -> Iterator[Any]:
    return map(type(self), glob.glob(os.path.join(glob.escape(str(self)), pattern)))


_ARRAYS = ocp.type_handlers.create_type_handler_registry(
  # Of what lies on several devices each writes its part, unless it is small: to cut it is a program for every part.
  (jax.Array, ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=2**20))
)


def _manager(workdir: Path, options: ocp.CheckpointManagerOptions) -> ocp.CheckpointManager:
  handler = ocp.PyTreeCheckpointHandler(type_handler_registry=_ARRAYS)
  root = folder(workdir)
  if address.is_address(root):
    _know_s3()
    address.system(str(root))
  else:
    root = _Literal(root.absolute())
  options.lightweight_initialize = True  # else one damaged checkpoint is in the way of all others
  return ocp.CheckpointManager(root, options=options, item_handlers=handler)


@functools.cache
def _know_s3() -> None:
  """Orbax (0.12.8) knows gs:// alone: what it does there is right for s3://, too, and TensorStore has a driver for it.

  That asks for the end point, where it is not Amazon's, by name; boto, behind s3fs, by the environment.
  """
  from orbax.checkpoint._src.path import gcs_utils
  from orbax.checkpoint._src.serialization import tensorstore_utils

  both, of_gs, normal = ("gs://", "s3://"), gcs_utils.get_kvstore_for_gcs, tensorstore_utils._normalize_path
  said = {"endpoint": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"), "aws_region": ("AWS_REGION", "AWS_DEFAULT_REGION")}

  def spec(path: str) -> dict[str, Any]:
    found = of_gs(path)
    if path.startswith("s3://"):
      found["driver"] = "s3"
      for name, variables in said.items():
        if value := next(filter(None, map(os.environ.get, variables)), None):
          found[name] = value
    return found

  gcs_utils._GCS_PATH_PREFIX = both
  gcs_utils.get_kvstore_for_gcs = spec
  tensorstore_utils._use_gcs_driver = lambda directory: directory.startswith(both)
  tensorstore_utils._normalize_path = lambda path: normal(path).replace("s3:/", "s3://")


_Ask = Callable[[Callable[[ocp.CheckpointManager, int], Any]], Any]


@contextlib.contextmanager
def _opened(workdir: Path, step: int) -> Iterator[_Ask]:
  """What asks Orbax for something of a checkpoint, as often as one likes: only the first time it lists what is there.

  Raises:
    Corrupt, Mistake: when it is asked; see `restore`.
  """
  _drop_echoes()
  with contextlib.ExitStack() as opened:
    options = ocp.CheckpointManagerOptions(create=False, enable_async_checkpointing=False)
    manager = functools.cache(lambda: opened.enter_context(_manager(workdir, options)))

    def ask(how: Callable[[ocp.CheckpointManager, int], Any]) -> Any:
      try:
        return how(manager(), step)
      except Exception as error:  # Orbax and TensorStore raise many kinds; all mean the same here
        cause, path = error.__cause__ or error, folder(workdir) / str(step)
        why = (str(cause).splitlines() or [""])[0][:200]
        # ... but of a store that is away: nothing is known of the checkpoint then, and it is not set aside.
        kind = Mistake if address.is_address(path) and address.unreachable(error) else Corrupt
        raise kind(f"{path} cannot be read: {type(cause).__name__}: {why}") from error

    yield ask


@functools.cache
def _drop_echoes() -> None:
  """When one array cannot be read or written, Orbax abandons the others, and each would print a traceback of its own.

  TensorStore prints what it still has to say to Orbax's loop, once that is closed, as Python prints what nobody caught.
  """
  report, uncaught = sys.unraisablehook, sys.excepthook

  def unraisable(about):
    abandoned = getattr(about.object, "__name__", "") == "_read_array_index_and_device_put"
    if not abandoned and str(about.exc_value) != _ECHO:
      report(about)

  def excepthook(kind, error, traceback):
    if str(error) != _ECHO:
      uncaught(kind, error, traceback)

  sys.unraisablehook, sys.excepthook = unraisable, excepthook
  warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
  logging.getLogger("asyncio").addFilter(lambda record: "orbax" not in record.getMessage())


_ECHO = "Event loop is closed"


def restore_latest(
  workdir: Path, abstract: Tree, *, set_aside: bool = True, read: Callable[[Path, int, Tree], Tree] | None = None
) -> tuple[int, Tree] | None:
  """The newest readable checkpoint; unreadable ones are named in a warning, never deleted.

  Args:
    workdir: of the run.
    abstract: as in `restore`.
    set_aside: rename the unreadable ones, so that the run can save these steps again; a reader leaves them alone.
    read: `restore`, or what takes its place.

  Returns:
    (step, tree), or None if there is no checkpoint at all.

  Raises:
    Corrupt: if there are checkpoints, but none can be read.
  """
  failed, every = [], steps(workdir)
  if set_aside and jax.process_index() == 0:
    for path in _unfinished(folder(workdir), every):
      logging.warning("%s: the run ended while it was written; it is skipped, and cleaned away", path)
  for step in reversed(every):
    try:
      tree = (read or restore)(workdir, step, abstract)
    except Corrupt as error:
      failed.append((step, error))
      continue
    for bad, error in failed:
      names = (f"{bad}.unreadable{n or ''}" for n in itertools.count())
      with address.asked(folder(workdir), "written"):
        aside = next(path for name in names if not (path := folder(workdir) / name).exists())
        left = aside if set_aside else folder(workdir) / str(bad)
        logging.warning("%s; falling back to step %d, the old files are in %s", error, step, left)
        if set_aside and jax.process_index() == 0:
          address.move(folder(workdir) / str(bad), aside)
    return step, tree
  if failed:
    raise Corrupt(f"no checkpoint of {workdir} can be read; the newest: {failed[0][1]}")
  return None


def _unfinished(root: Path, whole: Sequence[int]) -> list[Path]:
  with address.asked(root):
    if not root.is_dir():
      return []
    if address.is_address(root):
      return sorted(x for x in root.iterdir() if x.name.isdecimal() and int(x.name) not in whole)
    return sorted(root.glob("*.orbax-checkpoint-tmp*"))


def flat(tree: Tree) -> list[tuple[str, Any]]:
  """[("blocks/q", array), ...] of a nested dict."""
  return [("/".join(k.key for k in path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def nested(flat: dict[str, Any]) -> Tree:
  """The inverse of `flat`, of at most two storeys."""
  found: Tree = {}
  for path, x in flat.items():
    *above, name = path.split("/")
    (found.setdefault(above[0], {}) if above else found)[name] = x
  return found


def _by_name(fn: Callable[[str, Any], Any], tree: Tree) -> Tree:
  return jax.tree_util.tree_map_with_path(lambda path, leaf: fn("/".join(k.key for k in path), leaf), tree)
