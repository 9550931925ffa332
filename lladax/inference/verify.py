"""Whether what a workdir holds can be read back: config, tokenizer, metrics, and every array. It mends nothing."""

from collections.abc import Callable, Iterator
from pathlib import Path

from lladax import address, config
from lladax.inference.load import saved_model
from lladax.mistake import Mistake
from lladax.storage import checkpoint, metrics
from lladax.terminal import Console


def run(workdir: Path, console: Console) -> None:
  """Prints, line by line, what is sound and what is not.

  Raises:
    Mistake: something is not.
  """
  damaged = []
  for name, check in _parts(workdir):
    try:
      said = check()
    except Mistake as error:
      damaged.append(name)
      said = f"DAMAGED: {error}"
    console.print(f"{name}: {said}", soft_wrap=True)
  if damaged:
    raise Mistake(
      f"--workdir={address.of(workdir)}: {', '.join(damaged)} cannot be read back: put back a copy, or do without"
    )


def _parts(workdir: Path) -> Iterator[tuple[str, Callable[[], str]]]:
  yield "config.json", lambda: f"{len(vars(config.load(workdir)))} fields and groups"
  yield "tokenizer", lambda: _tokenizer(workdir)
  if (workdir / "metrics.jsonl").exists():
    yield "metrics.jsonl", lambda: f"{len(metrics.read(workdir / 'metrics.jsonl')):,} lines"
  if (workdir / "runs.jsonl").exists():
    yield "runs.jsonl", lambda: f"{len(metrics.read(workdir / 'runs.jsonl')):,} starts"
  for step in checkpoint.steps(workdir):
    yield f"checkpoints/{step}", lambda step=step: checkpoint.verify(workdir, step)
  for path in sorted(checkpoint.folder(workdir).glob("*.unreadable*")):
    yield f"checkpoints/{path.name}", lambda: "could not be read, and was put aside"


def _tokenizer(workdir: Path) -> str:
  text = saved_model(workdir)[1]
  if text is None:
    return "none: an import that came without one"
  saved = checkpoint.config(workdir)["tokenizer_fingerprint"]
  if text.fingerprint != saved:
    raise Mistake(f"{workdir / 'tokenizer'} is not the one that this model was trained with ({saved})")
  return f"{text.vocab_size:,} ids"
