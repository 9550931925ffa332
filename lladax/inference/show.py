"""The texts of `--mode=sample`, and what must be true of them before anything is loaded."""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lladax import sampling
from lladax.config import Config
from lladax.devices import distributed, sharding
from lladax.drawing import unmasking
from lladax.inference import load
from lladax.mistake import Mistake
from lladax.model.mask_predictor import MaskPredictorConfig
from lladax.sampling import SamplerConfig
from lladax.storage import writing
from lladax.terminal import Console


def check_room(lengths: Mapping[str, int], c: SamplerConfig, model: MaskPredictorConfig, *, fills: bool) -> None:
  """Raises Mistake if the model cannot fill, or continue, one of these.

  Args:
    lengths: name of a canvas or prompt, for the message -> its tokens.
    c: how it is sampled.
    model: the model.
    fills: canvases are filled in one block; prompts are continued.
  """
  if not lengths:
    return
  if fills and not model.objective.fills:
    raise Mistake(f"{next(iter(lengths))}: a causal model cannot fill a canvas in the middle, it continues a prompt")
  said, more = "", 0
  if not fills:
    W = model.block or c.block_length
    more = c.gen_length or W
    said = f" and sample.{'block_length' if c.gen_length is None else 'gen_length'}={more}"
    model.objective.check_sampler(c)
    if model.objective.fills and not model.block:
      sampling.check_blocks(more, W)
  for name, n in lengths.items():
    if n + more > model.max_length:
      raise Mistake(f"{name}: its {n} tokens{said} are more than model.max_length={model.max_length}")


def of_model(config: Config, model: MaskPredictorConfig, workdir: Path) -> Config:
  """The config with the model that was trained; Mistake if it is one for another objective."""
  if config.objective != model.objective.name:
    was = model.objective.name
    raise Mistake(f"objective={config.objective}: {workdir} was trained with {was}: set that, or leave --config out")
  return dataclasses.replace(config, model=model)


def show_samples(config: Config, workdir: Path, prompts: list[str], html: str | None) -> None:
  """Continues each prompt, or fills its [MASK]s; prints text to stdout, and draws it where that is a terminal."""
  if html:
    writing.check_writable(Path(html), "--html")
  prompts = prompts or [line.rstrip("\n") for line in sys.stdin]
  if not prompts:
    raise Mistake("--prompt is missing, and nothing came from standard input")
  model, text = load.saved_model(workdir)
  if text is None:
    raise Mistake(f"--workdir={workdir}: this model has no tokenizer to read a prompt with")
  asked = load.asked(config.model)
  config = of_model(config, model, workdir)
  for prompt in prompts:
    fills = "[MASK]" in prompt
    ids = text.encode_canvas(prompt) if fills else text.encode(prompt)
    check_room({f"--prompt={prompt[:30]!r}": len(ids)}, config.sample, model, fills=fills)
  llada = load.load(workdir, mesh=sharding.make_mesh(config.mesh), **asked)
  options, pages = dataclasses.asdict(config.sample), []
  for n, prompt in enumerate(prompts):  # each is a batch of its own, and noise must differ
    options_here: dict[str, Any] = options | {"seed": sampling.nth_seed(options["seed"], n)}
    if "[MASK]" in prompt:  # a canvas has a length of its own
      del options_here["block_length"], options_here["gen_length"]
      out = llada.infill(prompt, **options_here)
    else:
      out = llada.sample(prompt, **options_here)
    if not distributed.is_first():
      continue
    if sys.stdout.isatty():
      Console(soft_wrap=True).print(unmasking.terminal(out.unmaskings()[0]))
    else:
      print(out.text[0])
    pages += out.unmaskings()
  if html and distributed.is_first():
    Path(html).write_text(unmasking.html(pages, f"{workdir.name}"), encoding="utf-8", errors="backslashreplace")
