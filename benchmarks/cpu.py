"""lladax beside plain PyTorch on a CPU: a training step, and the published fixed-schedule sampler.

  pip install torch==2.13.0   # for this benchmark only
  python benchmarks/cpu.py                # the same sizes, float32, two threads, one table
  python benchmarks/cpu.py --D 512 --L 256 --json
  python benchmarks/cpu.py --mode sample --rounds 1 --V 32768 --D 768 --N 8 --H 12 --K 64 --F 2048 \
    --prompt 256 --gen 256 --steps 256 --rows 1   # the caches, on 107M parameters

Each contender lives in a process of its own, held to the same two cores, and they take turns: round by round one step
of each, so that a machine that slows down slows all of them. Quoted are medians, and the median of the ratios of a
round. In training, PyTorch masks as published and computes the head at the masked positions only; lladax is shown with
the published masking (head everywhere) and with exact counts and antithetic times (head on half the positions).
Beside them stand the matrix products of the step alone, each a program of its own: what is not in them is all else.
In sampling PyTorch is shown with the head on all positions, as in the published code, and on the block alone. Weights
are random, and so is what is sampled; `--sharpness` multiplies the head, so that a threshold finds something to keep:
the passes (NFE) that a threshold saves are those of this model, and of no trained one. Memory is the peak of the whole
process, Python, the framework and the compiler included.
"""

import argparse
import json
import multiprocessing
import os
import re
import resource
import statistics
import time
from collections.abc import Callable

SIZES = {"V": 1024, "D": 192, "N": 6, "H": 6, "K": 32, "F": 512}
SHAPES = {"B": 64, "L": 64, "prompt": 64, "gen": 64, "block": 32, "steps": 64, "rows": 4, "sharpness": 16}


def torch_train(a: dict, compiled: bool) -> Callable[[], object]:
  """One update of the PyTorch baseline."""
  import torch
  import torch_baseline

  model = _torch_model(a)
  if compiled:
    model.hidden = torch.compile(model.hidden)
  optimizer = torch_baseline.make_optimizer(model, 1e-3, 0.1)
  tokens_BL = torch.randint(0, a["V"] - 1, (a["B"], a["L"]))
  return lambda: float(torch_baseline.train_step(model, optimizer, tokens_BL, a["V"] - 1))


def torch_sample(a: dict, block_head: bool) -> Callable[[], object]:
  """One call of the PyTorch sampler; returns its forward passes."""
  import torch
  import torch_baseline

  model = _torch_model(a).eval()
  prompt_BL = torch.randint(0, a["V"] - 1, (a["rows"], a["prompt"]))

  def call():
    torch_baseline.generate(
      model, prompt_BL, a["gen"], a["block"], a["steps"], mask_id=a["V"] - 1, block_head=block_head
    )
    return a["steps"]

  return call


def _torch_model(a: dict):
  import torch
  import torch_baseline

  torch.manual_seed(0)
  torch.set_num_threads(2)
  return torch_baseline.MaskPredictor(a["V"], a["D"], a["N"], a["H"], a["H"], a["K"], a["F"])


def lladax_train(a: dict, exact: bool) -> Callable[[], object]:
  """One update by lladax.training.step.train_step, compiled as the training loop compiles it."""
  from lladax.training import loop

  jitted, state, batch = _lladax_step(a, exact)
  compiled = loop.compiled(jitted, state, batch)

  def call():
    nonlocal state
    state, scalars = compiled(state, batch)
    return float(scalars["loss"])

  return call


def lladax_matmuls(a: dict, exact: bool) -> Callable[[], object]:
  """The matrix products of that update and nothing else, each as a program of its own, one after another."""
  import collections

  import jax
  import numpy as np

  from lladax.devices import sharding

  jitted, state, batch = _lladax_step(a, exact)
  found: collections.Counter = collections.Counter()

  def count(jaxpr, times):
    for equation in jaxpr.eqns:
      if equation.primitive.name == "dot_general":
        shapes = tuple(x.aval.shape for x in equation.invars)
        found[shapes, equation.params["dimension_numbers"]] += times
      for inner in jax.core.jaxprs_in_params(equation.params):
        count(inner, times * equation.params.get("length", 1))

  count(jitted.trace(state, batch).jaxpr.jaxpr, 1)
  draw = np.random.default_rng(0).standard_normal
  products = []
  for (shapes, dimensions), times in found.items():
    program = sharding.jit(lambda x, y, dimensions=dimensions: jax.lax.dot_general(x, y, dimensions))
    products.append((program, [jax.numpy.asarray(draw(shape, np.float32)) for shape in shapes], times))

  def call():
    for program, operands, times in products:
      for _ in range(times):
        program(*operands).block_until_ready()
    return 1

  return call


def _lladax_step(a: dict, exact: bool) -> tuple:
  """(train_step, jitted; its state; its batch)."""
  import jax
  import jax.numpy as jnp

  from lladax import config
  from lladax.configs import base
  from lladax.devices import sharding
  from lladax.training import step

  values = base.get_config()
  values.model.update({name: a[name] for name in SIZES}, G=a["H"])
  values.data.update(length=a["L"], batch_size=a["B"])
  if exact:
    values.noise.update(masking="exact", times="antithetic")
  c = config.parse(values.to_dict())
  mesh = sharding.make_mesh(c.mesh, jax.devices()[:1])
  tx, init, at, batch_at = step.program(c, mesh)
  with jax.set_mesh(mesh):
    state = jax.jit(init, out_shardings=at)()
  tokens_BL = jax.random.randint(jax.random.key(1), (a["B"], a["L"]), 0, a["V"] - 1)
  batch = {
    "tokens": tokens_BL,
    "weight": jnp.full(tokens_BL.shape, 1.0 / tokens_BL.size),
    "segment": jnp.ones_like(tokens_BL),
    "index": jnp.arange(a["B"]),
  }
  return step.jit_step(c, tx, at, mask_id=a["V"] - 1, eos_id=0), state, jax.device_put(batch, batch_at)


def lladax_sample(a: dict, options: dict) -> Callable[[], object]:
  """One call of LLaDA.sample on lists of ids; returns its forward passes."""
  import jax
  import numpy as np

  from lladax import LLaDA
  from lladax.model.mask_predictor import MaskPredictorConfig

  model = MaskPredictorConfig(**{name: a[name] for name in SIZES}, G=a["H"])
  mask_id = a["V"] - 1
  params = jax.jit(model.init)(jax.random.key(0))
  params["head"] = params["head"] * a["sharpness"]
  llada = LLaDA(model, params, None, mask_id, mask_id - 1, mask_id)
  prompt = np.random.default_rng(0).integers(0, mask_id - 1, (a["rows"], a["prompt"])).tolist()
  return lambda: llada.sample(prompt, gen_length=a["gen"], block_length=a["block"], steps=a["steps"], **options).nfe


CONTENDERS = {
  "train": {
    "PyTorch eager": (torch_train, False),
    "PyTorch torch.compile": (torch_train, True),
    "lladax, masking as published": (lladax_train, False),
    "lladax, exact + antithetic": (lladax_train, True),
    "matrix products of the former": (lladax_matmuls, False),
    "matrix products of the latter": (lladax_matmuls, True),
  },
  "sample": {
    "PyTorch, head everywhere": (torch_sample, False),
    "PyTorch, head on the block": (torch_sample, True),
    "lladax": (lladax_sample, {}),
    "lladax, threshold": (lladax_sample, {"threshold": 0.9}),
    "lladax, prefix cache": (lladax_sample, {"cache": "prefix"}),
    "lladax, dual cache": (lladax_sample, {"cache": "dual"}),
    "lladax, dual cache and threshold": (lladax_sample, {"cache": "dual", "threshold": 0.9}),
  },
}


def worker(pipe, mode: str, name: str, a: dict) -> None:
  """Builds a contender, warms it up, then times one call whenever asked."""
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
  make, option = CONTENDERS[mode][name]
  if "PyTorch" not in name:
    from lladax.main import keep_freed_memory

    keep_freed_memory()  # as `python -m lladax.main` does
  a = dict(a)
  call, steps = make(a, option), a["steps"]
  a["steps"] = a["gen"] // a["block"]  # the same program, with one step a block
  for _ in range(2):
    call()
  a["steps"] = steps
  pipe.send(None)
  while pipe.recv():
    began = time.perf_counter()
    passes = call() if mode == "sample" else call() and 1
    seconds = time.perf_counter() - began
    pipe.send((seconds, passes, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20))


def compare(mode: str, a: dict, rounds: int, only: str) -> dict[str, list[tuple[float, int, float]]]:
  """(seconds, forward passes, peak GiB) of each contender's calls, taken in turn."""
  context = multiprocessing.get_context("spawn")
  pipes, processes = {}, []
  for name in [name for name in CONTENDERS[mode] if re.search(only, name)]:
    pipes[name], theirs = context.Pipe()
    processes.append(context.Process(target=worker, args=(theirs, mode, name, a), daemon=True))
    processes[-1].start()
    theirs.close()
    pipes[name].recv()
  seen: dict[str, list[tuple[float, int, float]]] = {name: [] for name in pipes}
  for _ in range(rounds):
    for name, pipe in pipes.items():
      pipe.send(True)
      seen[name].append(pipe.recv())
  for process, pipe in zip(processes, pipes.values(), strict=True):
    pipe.send(False)
    process.join()
  return seen


def main() -> None:
  """Prints a table for training and one for sampling."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--mode", choices=("train", "sample", "both"), default="both")
  parser.add_argument("--rounds", type=int, default=9)
  parser.add_argument("--only", default="", help="contenders whose name this pattern finds")
  parser.add_argument("--json", action="store_true")
  for name, default in (SIZES | SHAPES).items():
    parser.add_argument(f"--{name}", type=int, default=default)
  a = vars(parser.parse_args())
  for mode in ("train", "sample") if a["mode"] == "both" else (a["mode"],):
    seen = compare(mode, a, a["rounds"], a["only"])
    tokens = a["B"] * a["L"] if mode == "train" else a["rows"] * a["gen"]
    first = next(iter(seen.values()))
    rows = {
      name: {
        "median_ms": 1e3 * statistics.median(x[0] for x in calls),
        "tokens_per_second": tokens / statistics.median(x[0] for x in calls),
        "speed_over_first": statistics.median(x[0] / y[0] for x, y in zip(first, calls, strict=True)),
        "passes": calls[-1][1],
        "peak_gib": calls[-1][2],
      }
      for name, calls in seen.items()
    }
    if a["json"]:
      print(json.dumps({"mode": mode, "sizes": a, "results": rows}))
      continue
    print(f"{mode:32}{'ms':>10}{'tokens/s':>12}{'speed':>8}{'passes':>8}{'peak GiB':>10}")
    for name, row in rows.items():
      print(f"{name:32}{row['median_ms']:10.0f}{row['tokens_per_second']:12,.1f}{row['speed_over_first']:7.2f}x"
            f"{row['passes']:8}{row['peak_gib']:10.2f}", flush=True)  # fmt: skip


if __name__ == "__main__":
  main()
