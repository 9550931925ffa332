"""lladax beside plain PyTorch on one GPU, in ten minutes: training of the 1B model, sampling with the 8B's shape.

  pip install -e '.[cuda13,figures]' torch   # torch for its own contenders only
  python benchmarks/gpu.py --out=runs/gpu                 # everything that ten minutes hold, in order of importance
  python benchmarks/gpu.py --out=runs/gpu --parts=train,check --minutes=5
  python benchmarks/gpu.py --out=runs/gpu --only='cuDNN'  # contenders whose name the pattern finds
  python benchmarks/gpu.py --out=/tmp/tiny --tiny         # the same on anything, a CPU too: tiny shapes

Parts: `check` (gradients of the attention kernels with padded rows and packed documents against float32, and NaNs),
`train` (1B, 4096 tokens a row, bfloat16: attention kernels, rematerialisation, head, masking), `sample` (8B, random
bfloat16 weights, 256 tokens behind a prompt of 256: caches, threshold, weights in bits; one row, and eight of different
lengths), `digests` (of the 1B's training state), `kernels` (what the GPU did during a step of the first contender of
`train`, and during a pass of the sampler, by kernel).

Each contender is a process of its own, so that its memory is its own; the device is nobody else's. It is warmed up,
then timed; quoted are medians of its steps, or one call of all passes, each ended by reading a result. Memory is the
allocator's peak.
MFU: model FLOPs (README's formula; what is computed again does not count) over the time and the data sheet's peak.
Weights are random, and so is what is sampled: a threshold finds something to keep because the head is multiplied by
`SHARPNESS`, and the passes it saves are those of no trained model. What does not fit in the time, in the memory, or
is not installed is skipped, and a line says so. OUT/gpu.jsonl grows by a line a contender; then come gpu.md, a table,
and gpu.svg.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ONE_B = {"V": 126464, "D": 2048, "N": 22, "H": 32, "G": 4, "K": 64, "F": 5634, "L": 4096, "B": 8, "steps": 8}
EIGHT_B = {"V": 126464, "D": 4096, "N": 32, "H": 32, "G": 32, "K": 128, "F": 12288, "prompt": 256, "gen": 256,
           "block": 32, "steps": 256}  # fmt: skip
TINY_TRAIN = {"V": 512, "D": 64, "N": 2, "H": 4, "G": 2, "K": 16, "F": 128, "L": 64, "B": 4, "steps": 2}
TINY_SAMPLE = {"V": 512, "D": 64, "N": 2, "H": 4, "G": 4, "K": 16, "F": 128, "prompt": 24, "gen": 16, "block": 8,
               "steps": 16}  # fmt: skip
SHARPNESS = 16
COMMON = ("D", "N", "H", "G", "K", "F", "V")

# (part, name, function, options), the most telling first: what comes late is what a short lease leaves out.
CONTENDERS: list[tuple[str, str, str, dict[str, Any]]] = [
  ("check", "cuDNN, padded", "check", {"kernel": "cudnn", "segments": "right"}),
  ("check", "cuDNN, packed", "check", {"kernel": "cudnn", "segments": "packed"}),
  ("train", "lladax, cuDNN, remat attention", "lladax_train", {"remat": "attention", "attention": "cudnn"}),
  ("train", "lladax, cuDNN, remat dots", "lladax_train", {"remat": "dots", "attention": "cudnn"}),
  ("train", "PyTorch, compiled blocks, checkpointed", "torch_train", {"compiled": True, "remat": True}),
  ("sample", "lladax, 1 row", "lladax_sample", {"rows": 1}),
  ("sample", "PyTorch, compiled, head on the block, 1 row", "torch_sample", {"rows": 1, "compiled": True}),
  ("train", "lladax, cuDNN, remat dots, exact counts in pairs", "lladax_train",
   {"remat": "dots", "attention": "cudnn", "masking": "exact", "times": "antithetic"}),
  ("sample", "lladax, prefix cache, 1 row", "lladax_sample", {"rows": 1, "cache": "prefix"}),
  ("sample", "lladax, dual cache, 1 row", "lladax_sample", {"rows": 1, "cache": "dual"}),
  ("sample", "lladax, threshold, 1 row", "lladax_sample", {"rows": 1, "threshold": 0.9}),
  ("sample", "lladax, dual cache and threshold, 1 row", "lladax_sample",
   {"rows": 1, "cache": "dual", "threshold": 0.9}),
  ("sample", "lladax, 8 ragged rows", "lladax_sample", {"rows": 8}),
  ("sample", "PyTorch, compiled, head on the block, 8 ragged rows", "torch_sample", {"rows": 8, "compiled": True}),
  ("sample", "lladax, dual cache, 8 ragged rows", "lladax_sample", {"rows": 8, "cache": "dual"}),
  ("train", "lladax, cuDNN, remat full", "lladax_train", {"remat": "full", "attention": "cudnn"}),
  ("train", "PyTorch, eager, checkpointed", "torch_train", {"compiled": False, "remat": True}),
  ("sample", "PyTorch, eager, head on the block, 1 row", "torch_sample", {"rows": 1, "compiled": False}),
  ("train", "lladax, XLA's attention, remat full", "lladax_train", {"remat": "full", "attention": "xla"}),
  ("train", "lladax, packed documents, remat attention", "lladax_train", {"remat": "attention", "documents": 4}),
  ("sample", "lladax, prefix cache, 8 ragged rows", "lladax_sample", {"rows": 8, "cache": "prefix"}),
  ("sample", "lladax, int8, 1 row", "lladax_sample", {"rows": 1, "weights": "int8"}),
  ("sample", "lladax, int4, 1 row", "lladax_sample", {"rows": 1, "weights": "int4"}),
  ("sample", "lladax, nf4, 1 row", "lladax_sample", {"rows": 1, "weights": "nf4"}),
  ("digests", "of a 1B's state", "digests", {"remat": "dots"}),
  ("kernels", "training, cuDNN, remat attention", "kernels", {"remat": "attention", "attention": "cudnn"}),
  ("kernels", "sampling, 1 row", "kernels", EIGHT_B | {"rows": 1}),
]  # fmt: skip


def once(call: Callable[[], Any]) -> tuple[float, Any]:
  """(seconds, result)."""
  began = time.perf_counter()
  result = call()
  return time.perf_counter() - began, result


def median(call: Callable[[], Any], repeats: int) -> tuple[float, Any]:
  """(median of the seconds, the last result)."""
  seconds, results = zip(*(once(call) for _ in range(repeats)), strict=True)
  return statistics.median(seconds), results[-1]


def _begun(a: dict[str, Any]) -> tuple[Any, Any, Any, Any, Any]:
  """(config, optimizer, state, where it lies, where batches lie) of a training run that begins."""
  import jax

  from lladax import config
  from lladax.configs import base
  from lladax.devices import sharding
  from lladax.training import step

  values = base.get_config()
  values.model.update({name: a[name] for name in COMMON}, max_length=a["L"], remat=a["remat"])
  values.model.update(attention=a.get("attention", "auto"))
  values.data.update(length=a["L"], batch_size=a["B"])
  if a.get("documents"):
    values.data.update(segments=True)
  values.noise.update({name: a[name] for name in ("masking", "times") if name in a})
  c = config.parse(values.to_dict())
  mesh = sharding.make_mesh(c.mesh, jax.devices()[:1])
  with jax.set_mesh(mesh):
    tx, init, at, batch_at = step.program(c, mesh)
    return c, tx, jax.jit(init, out_shardings=at)(), at, batch_at


def _training(a: dict[str, Any]) -> tuple[Any, Callable[[], float], Any]:
  """(config, a call of the real train step that returns its loss, the compiled program)."""
  import jax
  import jax.numpy as jnp

  from lladax.devices import sharding
  from lladax.training import step

  c, tx, state, at, batch_at = _begun(a)
  with sharding.on_mesh_of(state):
    tokens_BL = jax.random.randint(jax.random.key(1), (a["B"], a["L"]), 2, a["V"])
    segment_BL = jnp.broadcast_to(1 + jnp.arange(a["L"]) * a.get("documents", 1) // a["L"], tokens_BL.shape)
    batch = {"tokens": tokens_BL, "weight": jnp.full(tokens_BL.shape, 1.0 / tokens_BL.size),
             "segment": segment_BL, "index": jnp.arange(a["B"])}  # fmt: skip
    batch = jax.device_put(batch, batch_at)
    program = step.jit_step(c, tx, at, mask_id=0, eos_id=1).lower(state, batch).compile()

  def call():
    nonlocal state
    state, scalars = program(state, batch)
    return float(scalars["loss"])

  return c, call, program


def lladax_train(a: dict[str, Any]) -> dict[str, Any]:
  """Updates by the step that the training loop runs."""
  import jax

  from lladax.storage import metrics
  from lladax.training import step

  built, (c, call, program) = once(lambda: _training(a))
  median(call, 2)
  seconds, loss = median(call, a["steps"])
  memory, tokens = program.memory_analysis(), a["B"] * a["L"]
  peak = metrics.peak_flops(jax.devices()[0])
  return {
    "seconds": seconds, "tokens_per_second": tokens / seconds, "loss": loss, "seconds_to_build": built,
    "mfu": step.flops_per_token(c) * tokens / seconds / peak if peak else None,
    "compiled_gib": (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**30,
  } | _jax()  # fmt: skip


def kernels(a: dict[str, Any]) -> dict[str, Any]:
  """How often a step, or a pass of the sampler, runs each kernel, and its milliseconds in all.

  As the device's own timeline has them.
  """
  import tempfile

  import jax

  if "gen" in a:
    sample = _sampling(a)
    call, count = (lambda: sample(a["gen"] // a["block"])), 3 * a["gen"] // a["block"]
  else:
    (_, call, _), count = _training(a), 3
  median(call, 2)
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      for _ in range(3):
        call()
    (path,) = Path(folder).rglob("*.xplane.pb")
    total: dict[str, tuple[int, float]] = {}
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
      if not plane.name.startswith("/device:GPU"):
        continue
      for line in plane.lines:
        if line.name.startswith("Stream"):
          for event in line.events:
            n, ms = total.get(event.name, (0, 0.0))
            total[event.name] = (n + 1, ms + event.duration_ns / 1e6)
  found = {name: (n / count, ms / count) for name, (n, ms) in sorted(total.items(), key=lambda x: -x[1][1])}
  return {"kernels": found, "seconds": sum(ms for _, ms in found.values()) / 1e3} | _jax()


def _sampling(a: dict[str, Any]) -> Callable[[int], Any]:
  """A call of LLaDA.sample on lists of ids, with so many steps."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from lladax import LLaDA
  from lladax.model.mask_predictor import MaskPredictorConfig

  shape = {name: a[name] for name in COMMON}
  model = MaskPredictorConfig(**shape, max_length=a["prompt"] + a["gen"], weights=a.get("weights", "full"))

  def init(key):
    params = model.init(key)
    params["head"] *= SHARPNESS
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)

  def in_bits(key):  # any bits are weights: nothing of 16 is ever there
    params = jax.eval_shape(lambda key: model.freeze(model.init(key)), key)
    one = {"int8": 74.0, "int4": 4.6, "nf4": 0.56}[model.weights]  # standard deviation of uniform bits, in scales

    def fill(path, x):
      name = path[-1].key
      if name in ("bits", "scale"):
        bits = jax.random.bits(key, x.shape, jnp.uint8).view(x.dtype) if name == "bits" else None
        return jnp.full(x.shape, a["D"] ** -0.5 / one, x.dtype) if bits is None else bits
      if x.ndim < 3 and "norm" in name:
        return jnp.ones(x.shape, x.dtype)
      return a["D"] ** -0.5 * (SHARPNESS if name == "head" else 1) * jax.random.normal(key, x.shape, x.dtype)

    return jax.tree_util.tree_map_with_path(fill, params)

  mask_id = a["V"] - 1
  params = jax.jit(init if model.weights == "full" else in_bits)(jax.random.key(0))
  llada = LLaDA(model, params, None, mask_id, mask_id - 1, mask_id)
  rng, options = np.random.default_rng(0), {name: a[name] for name in ("cache", "threshold") if name in a}
  prompts = [rng.integers(0, mask_id - 1, n).tolist() for n in lengths(a)]

  def call(steps):
    return llada.sample(prompts, gen_length=a["gen"], block_length=a["block"], steps=steps, **options)

  return call


def lladax_sample(a: dict[str, Any]) -> dict[str, Any]:
  """Calls of LLaDA.sample."""
  sample = _sampling(a)
  first, _ = once(lambda: sample(a["gen"] // a["block"]))  # the same program, with one step a block
  seconds, passes = once(lambda: sample(a["steps"]).nfe)
  return {
    "seconds": seconds, "tokens_per_second": a["rows"] * a["gen"] / seconds, "passes": int(passes),
    "ms_a_pass": 1e3 * seconds / int(passes), "seconds_to_build": first,
  } | _jax()  # fmt: skip


def digests(a: dict[str, Any]) -> dict[str, Any]:
  """The digest of every array of a training state, as each checkpoint is given it, and checked against it."""
  import jax

  from lladax.storage import digest

  state = _begun(a)[2]
  arrays = {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(state)}
  first, _ = once(lambda: digest.of(arrays))
  seconds, _ = median(lambda: digest.of(arrays), 3)
  gib = sum(x.nbytes for x in arrays.values()) / 2**30
  return {"seconds": seconds, "gib": gib, "seconds_to_build": first} | _jax()


def lengths(a: dict[str, Any]) -> list[int]:
  """Of the prompts: one of `prompt` tokens, the others shorter, down to half of it."""
  return [a["prompt"] - i * a["prompt"] // 2 // max(1, a["rows"] - 1) for i in range(a["rows"])]


def check(a: dict[str, Any]) -> dict[str, Any]:
  """Attention in bfloat16 against float32 einsums: relative errors of values and gradients at real tokens, and NaNs."""
  import jax
  import jax.numpy as jnp

  from lladax.model import attention

  B, L, H, G, K = 4, 32 * a["K"], a["H"], a["G"], a["K"]
  at_L = jnp.arange(L)[None]
  if a["segments"] == "right":
    segment_BL = (at_L < L - jnp.arange(B)[:, None] * L // 5).astype(jnp.int32)
  else:
    segment_BL = jnp.broadcast_to(1 + at_L * 3 // L, (B, L)).astype(jnp.int32) * (at_L < L - L // 8)
  keys = jax.random.split(jax.random.key(0), 4)
  q, out = (jax.random.normal(key, (B, L, H, K)) for key in keys[:2])
  k, v = (jax.random.normal(key, (B, L, G, K)) for key in keys[2:])
  real = (segment_BL > 0)[:, :, None, None]
  visible = attention.Visible(L, L, segment_BL=segment_BL, right_padded=a["segments"] == "right").drawn()

  def loss(kernel, dtype, *qkv):
    mixed = attention.attend(*(x.astype(dtype) for x in qkv), visible, kernel=kernel)
    return jnp.sum(jnp.where(real, mixed.astype(jnp.float32) * out, 0.0)), mixed

  results = {}
  on_gpu = jax.default_backend() == "gpu"
  for name, kernel, dtype in (("ours", a["kernel"] if on_gpu else "xla", "bfloat16"), ("exact", "xla", "float32")):
    grad = jax.jit(jax.value_and_grad(lambda *x, k=kernel, d=dtype: loss(k, d, *x), (0, 1, 2), has_aux=True))
    with jax.default_matmul_precision("highest"):
      (_, mixed), grads = grad(q, k, v)
    results[name] = [jnp.where(real, mixed, 0).astype(jnp.float32), *grads]
  nans = sum(int(jnp.isnan(x).sum()) for x in results["ours"])
  errors = {
    name: float(jnp.linalg.norm(ours - exact) / jnp.linalg.norm(exact))
    for name, ours, exact in zip(("out", "dq", "dk", "dv"), *results.values(), strict=True)
  }
  return {"nans": nans, "relative_errors": errors, "seconds": None} | _jax()


def _jax() -> dict[str, Any]:
  import jax

  device = jax.devices()[0]
  used = (device.memory_stats() or {}).get("peak_bytes_in_use")
  return {"device": device.device_kind, "version": f"jax {jax.__version__}", "peak_gib": used and used / 2**30}


def torch_train(a: dict[str, Any]) -> dict[str, Any]:
  """Updates of the PyTorch baseline: bfloat16 autocast, fused AdamW, the head at the masked positions only."""
  import torch
  import torch_baseline

  model, device = _torch_model(a)
  model.remat = a["remat"]
  if a["compiled"]:
    for block in model.model["transformer"]["blocks"]:
      block.compile()  # one program serves all layers
  optimizer = torch_baseline.make_optimizer(model, 1e-3, 0.1)
  tokens_BL = torch.randint(0, a["V"] - 1, (a["B"], a["L"]), device=device)

  def call():
    return float(torch_baseline.train_step(model, optimizer, tokens_BL, a["V"] - 1, torch.bfloat16))

  first, _ = once(call)
  median(call, 2)
  seconds, loss = median(call, a["steps"])
  tokens = a["B"] * a["L"]
  matmuls = sum(p.numel() for p in model.parameters()) - a["V"] * a["D"]
  flops = tokens * (6.0 * matmuls + 12.0 * a["N"] * a["H"] * a["K"] * a["L"])
  peak = _torch_peak()
  return {
    "seconds": seconds, "tokens_per_second": tokens / seconds, "loss": loss, "seconds_to_build": first,
    "mfu": flops / seconds / peak if peak else None,
  } | _torch()  # fmt: skip


def torch_sample(a: dict[str, Any]) -> dict[str, Any]:
  """Calls of the PyTorch sampler on bfloat16 weights."""
  import torch
  import torch_baseline

  model, device = _torch_model(a)
  model.bfloat16().eval()
  if a["compiled"]:
    model.hidden = torch.compile(model.hidden)
  prompt_BL = torch.randint(0, a["V"] - 1, (a["rows"], a["prompt"]), device=device)
  attention_mask = None
  if a["rows"] > 1:
    n_B = torch.tensor(lengths(a), device=device)
    attention_mask = torch.arange(a["prompt"], device=device)[None] >= a["prompt"] - n_B[:, None]
  steps = a["steps"]

  def call(steps=steps):
    tokens_BL = torch_baseline.generate(
      model, prompt_BL, a["gen"], a["block"], steps, mask_id=a["V"] - 1, attention_mask=attention_mask, block_head=True
    )
    return int(tokens_BL.sum())

  first, _ = once(lambda: call(a["gen"] // a["block"]))
  seconds, _ = once(call)
  return {
    "seconds": seconds, "tokens_per_second": a["rows"] * a["gen"] / seconds, "passes": steps,
    "ms_a_pass": 1e3 * seconds / steps, "seconds_to_build": first,
  } | _torch()  # fmt: skip


def _torch_model(a: dict[str, Any]) -> tuple[Any, str]:
  import torch
  import torch_baseline

  device = "cuda" if torch.cuda.is_available() else "cpu"
  torch.manual_seed(0)
  torch.set_float32_matmul_precision("high")  # TF32, as JAX by default
  with torch.device(device):
    sizes = {name: a[name] for name in COMMON}
    return torch_baseline.MaskPredictor(**sizes), device


def _torch_peak() -> float | None:
  import torch

  from lladax.storage import metrics

  name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
  return next((peak for kind, peak in metrics.PEAK_FLOPS.items() if kind in name), None)


def _torch() -> dict[str, Any]:
  import torch

  found = torch.cuda.is_available()
  return {
    "device": torch.cuda.get_device_name() if found else "cpu", "version": f"torch {torch.__version__}",
    "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if found else None,
  }  # fmt: skip


def run(function: str, a: dict[str, Any], limit: float) -> dict[str, Any]:
  """A contender's result from a process of its own, or {"skipped": why}."""
  command = [sys.executable, __file__, "--worker", function, json.dumps(a)]
  path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
  try:
    done = subprocess.run(
      command, capture_output=True, text=True, timeout=limit, env={**os.environ, "PYTHONPATH": path}, check=False
    )
  except subprocess.TimeoutExpired:
    return {"skipped": f"not done in the {limit:.0f} s that were left"}
  if done.returncode == 0:
    return json.loads(done.stdout.splitlines()[-1])
  words = [line.strip() for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
  memory = next((line for line in words if "out of memory" in line.lower() or "RESOURCE_EXHAUSTED" in line), None)
  return {"skipped": (memory or words[-1])[:200]}


def table(results: list[dict[str, Any]]) -> str:
  """Markdown, a table for each part."""
  lines = []
  for part, heads in (
    ("check", ["NaNs", "relative errors of out, dq, dk, dv"]),
    ("train", ["ms a step", "tokens/s", "MFU", "peak GiB", "s to build"]),
    ("sample", ["ms a pass", "passes", "tokens/s", "peak GiB", "s to build"]),
    ("digests", ["ms", "GiB", "peak GiB", "s to build"]),
    ("kernels", ["ms a step or pass, by kernel"]),
  ):
    rows = [x for x in results if x["part"] == part]
    if not rows:
      continue
    lines += [f"| {part} | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for x in rows:
      if "skipped" in x:
        cells = [f"skipped: {x['skipped']}"] + [""] * (len(heads) - 1)
      elif part == "check":
        cells = [f"{x['nans']}", ", ".join(f"{e:.1e}" for e in x["relative_errors"].values())]
      elif part == "train":
        cells = [f"{1e3 * x['seconds']:.1f}", f"{x['tokens_per_second']:,.0f}", _or(x["mfu"], "{:.1%}"),
                 _or(x["peak_gib"], "{:.1f}"), f"{x['seconds_to_build']:.0f}"]  # fmt: skip
      elif part == "sample":
        cells = [f"{x['ms_a_pass']:.2f}", f"{x['passes']}", f"{x['tokens_per_second']:,.1f}",
                 _or(x["peak_gib"], "{:.1f}"), f"{x['seconds_to_build']:.0f}"]  # fmt: skip
      elif part == "digests":
        cells = [f"{1e3 * x['seconds']:.1f}", f"{x['gib']:.1f}", _or(x["peak_gib"], "{:.1f}"),
                 f"{x['seconds_to_build']:.0f}"]  # fmt: skip
      else:
        cells = [", ".join(f"{name[:60]} {ms:.1f}" for name, (_, ms) in list(x["kernels"].items())[:10])]
      lines.append(f"| {x['name']} | {' | '.join(cells)} |")
    lines.append("")
  return "\n".join(lines)


def _or(x: float | None, form: str) -> str:
  return form.format(x) if x is not None else "?"


def draw(results: list[dict[str, Any]], path: Path) -> None:
  """Bars of tokens a second, a panel for each part."""
  import matplotlib

  matplotlib.use("svg")
  from matplotlib import pyplot

  panels = [
    (part, rows) for part in ("train", "sample")
    if (rows := [x for x in results if x["part"] == part and "skipped" not in x])
  ]  # fmt: skip
  if not panels:
    return  # nothing was timed
  sizes = [len(rows) + 1.5 for _, rows in panels]
  figure, axes = pyplot.subplots(
    len(panels), 1, figsize=(9, 0.35 * sum(sizes) + 0.5), height_ratios=sizes, squeeze=False, layout="constrained"
  )
  for (part, rows), axis in zip(panels, axes[:, 0], strict=True):
    values = [x["tokens_per_second"] for x in rows]
    colours = ["#b3b3b3" if x["name"].startswith("PyTorch") else "#3b6fb6" for x in rows]
    bars = axis.barh([x["name"] for x in rows], values, color=colours)
    axis.bar_label(bars, [f" {v:,.0f}" for v in values])
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(f"{part}: tokens a second, {rows[0]['device']}", loc="left")
  figure.savefig(path)


def main() -> None:
  """Runs the contenders one after another, and writes what they say as they say it."""
  if sys.argv[1:2] == ["--worker"]:
    print(json.dumps(globals()[sys.argv[2]](json.loads(sys.argv[3]))))
    return
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--out", type=Path, required=True, help="a folder for gpu.jsonl, gpu.md and gpu.svg")
  parser.add_argument("--parts", default="check,train,sample,digests,kernels", help="some of these, in any order")
  parser.add_argument("--only", default="", help="contenders whose name this pattern finds")
  parser.add_argument("--minutes", type=float, default=10.0, help="for everything")
  parser.add_argument("--tiny", action="store_true", help="tiny shapes, for any device")
  a = parser.parse_args()
  parts = a.parts.split(",")
  if unknown := set(parts) - {part for part, *_ in CONTENDERS}:
    parser.error(f"--parts={a.parts}: {', '.join(sorted(unknown))} is none of check, train, sample, digests, kernels")
  train, sample = (TINY_TRAIN, TINY_SAMPLE) if a.tiny else (ONE_B, EIGHT_B)
  a.out.mkdir(parents=True, exist_ok=True)
  end, results = time.monotonic() + 60 * a.minutes, []
  with (a.out / "gpu.jsonl").open("w") as file:
    for part, name, function, options in CONTENDERS:
      if part not in parts or not re.search(a.only, name):
        continue
      options = options | TINY_SAMPLE if a.tiny and "gen" in options else options
      sizes = (sample if part == "sample" else train) | options
      if a.tiny and sizes.get("attention") == "cudnn":
        sizes["attention"] = "auto"
      left, began = end - time.monotonic(), time.monotonic()
      result = run(function, sizes, left) if left > 5 else {"skipped": "the time was up"}
      result = {"part": part, "name": name} | result | {"wall_seconds": time.monotonic() - began, "sizes": sizes}
      results.append(result)
      file.write(json.dumps(result) + "\n")
      file.flush()
      said = {k: v for k, v in result.items() if k not in ("sizes", "kernels")}
      print(" ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in said.items()), flush=True)
  (a.out / "gpu.md").write_text(table(results))
  draw(results, a.out / "gpu.svg")
  print(table(results))


if __name__ == "__main__":
  main()
