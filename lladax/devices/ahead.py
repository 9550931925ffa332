"""Programs compiled ahead of time for TPUs and GPUs that are not here, and what the compiler says of them."""

import contextlib
import dataclasses
import importlib
import importlib.util
import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from shutil import which
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache

from lladax.devices import sharding
from lladax.devices.gpus import GPUS, Gpu, named
from lladax.devices.hlo import collectives, parse
from lladax.mistake import Mistake

_CUDNN = (9, 14, 0)  # the version that programs are compiled for


@dataclasses.dataclass(frozen=True)
class Program:
  """What the compiler says of a program, for one device; sizes in bytes, those of collectives of the whole arrays."""

  seconds: float  # that it took to compile
  arguments: int = 0
  temporaries: int = 0
  reported: int = 0  # by libtpu's own memory report, which knows of more than JAX's
  collectives: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)  # kind -> (how many, bytes)
  refusal: str = ""  # the compiler's words where it does not fit
  hlo: str = dataclasses.field(default="", repr=False)  # the program itself, optimised and scheduled, as text

  @property
  def attention(self) -> str:
    """The kernel of its attention (of a full pass, where there is a cache): "cudnn", "splash" or "xla"."""
    return next((name for mark, name in (("__cudnn$fmha", "cudnn"), ("splash_m", "splash")) if mark in self.hlo), "xla")

  @property
  def total(self) -> int:
    """The larger of arguments and temporaries (what is donated is counted once), and of libtpu's own sum."""
    return max(self.arguments + self.temporaries, self.reported)


def devices(topology: str, slices: int = 1) -> list[jax.Device]:
  """Compile-only devices: of so many slices of a TPU topology, "v5p:4x4x4", or nodes of so many GPUs, "h100:8".

  Raises:
    Mistake: the compiler is not installed, or knows no such topology.
  """
  kind, _, size = topology.partition(":")
  if slices < 1 or not re.fullmatch(r"[\w-]+:[1-9]\d*(x\d+)*", topology):
    raise Mistake(
      f"--topology={topology} --slices={slices}: name slices of TPUs as in --topology=v5p:4x4x4 --slices=2, nodes of"
      f" GPUs as in --topology=h100:8 --slices=2; GPUs that are known: {', '.join(GPUS)}"
    )
  if size.isdecimal():
    return _gpus(kind, int(size), slices, f"--topology={topology}")
  if importlib.util.find_spec("libtpu") is None:
    raise Mistake(f"--topology={topology} is compiled with libtpu, and needs no TPU: pip install 'lladax[plan]'")
  # A libtpu that shall only compile asks nobody who it is, and runs beside others.
  known = {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost",
           "TPU_WORKER_ID": "0", "TPU_ACCELERATOR_TYPE": "v5litepod-1"}  # fmt: skip
  for name, value in known.items():
    os.environ.setdefault(name, value)
  options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
  if topology.startswith("v4:"):
    options["chip_config_name"] = "megacore"  # one device a chip, as v4 runs; libtpu's default here is two
  if chips(topology) == 1:
    options["chips_per_host_bounds"] = (1, 1, 1)
  try:
    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices)
  except Exception as error:  # the runtime has its own kinds; all mean the same here
    raise Mistake(f"--topology={topology} --slices={slices}: {str(error).splitlines()[0][:300]}") from error


def _gpus(kind: str, count: int, nodes: int, option: str) -> list[jax.Device]:
  if kind not in GPUS:
    raise Mistake(f"{option}: there is no GPU {kind!r} here; known are {', '.join(GPUS)}")
  if not has_gpu_compiler():
    raise Mistake(f"{option} is compiled with JAX's CUDA plugin, and needs no GPU: pip install 'lladax[plan-gpu]'")
  g, cudnn = GPUS[kind], " ".join(f"{name}: {n}" for name, n in zip(("major", "minor", "patch"), _CUDNN, strict=True))
  major, minor = g.capability.split(".")
  features = "ACCELERATED_FEATURES" if int(major) >= 9 else "NONE"
  # xla.GpuTargetConfigProto as text.
  target = f"""
    gpu_device_info {{
      threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {g.threads}
      shared_memory_per_block: 49152 shared_memory_per_core: {g.shared} shared_memory_per_block_optin: {g.block}
      registers_per_core_limit: 65536 registers_per_block_limit: 65536
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
      core_count: {g.cores} fpus_per_core: {g.units} clock_rate_ghz: {g.ghz}
      memory_bandwidth: {g.bandwidth} device_memory_size: {g.memory} l2_cache_size: {g.cache}
      cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {features} }}
    }}
    platform_name: "CUDA" dnn_version_info {{ {cudnn} }} device_description_str: "{g.name}"
  """
  # So many domains of NVLink, of one process each, with so many GPUs.
  found = topologies.get_topology_desc("", "cuda", target_config=target, topology=f"{nodes}x1x{count}")
  return list(found.devices)


def has_gpu_compiler() -> bool:
  """Whether programs can be compiled for GPUs: with JAX's plugin, and NVIDIA's assembler and library of functions."""
  plugins = importlib.util.find_spec("jax_plugins")
  found = plugins and any(map(importlib.util.find_spec, ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")))
  assembler = {"nvidia-cuda-nvcc", "nvidia-cuda-nvcc-cu12"} & {x.name for x in metadata.distributions()}
  return bool(found and (assembler or which("ptxas")))


def chips(topology: str) -> int:
  """Chips of a slice."""
  return math.prod(map(int, topology.partition(":")[2].split("x")))


FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"
# Of XLA's pool, what the compiler has not heard of: the CUDA context and the kernels, the workspace of cuDNN's
# attention; and NCCL's channels and buffers, where there is more than one device. (Not measured.)
RESERVE, NCCL_RESERVE = 2**30, 2**30


def fraction() -> float:
  """What XLA's pool takes of a GPU's memory."""
  said = os.environ.get(FRACTION) or "0.75"  # XLA's default
  try:
    value = float(said)
  except ValueError:
    value = 0.0
  if not 0 < value <= 1:
    raise Mistake(f"{FRACTION}={said}: it is the part of a GPU's memory for XLA, as in 0.9")
  return value


def gpu_limit(facts: Gpu, count: int, part: float) -> tuple[int, str]:
  """Bytes that a program may use of a GPU, one of `count`, where XLA's pool is such a part; and how they come about."""
  reserve, names = (RESERVE, "") if count == 1 else (RESERVE + NCCL_RESERVE, "NCCL, ")
  return int(facts.memory * part) - reserve, (
    f"{FRACTION}={part} of {facts.memory / 2**30:.2f} GiB, less a reserve of {reserve / 2**30:.0f} GiB for"
    f" {names}the CUDA context and cuDNN's workspace"
  )


def limit(device: jax.Device, count: int = 1) -> tuple[int, str]:
  """Bytes that a program may use of a device, one of `count`, and how they come about.

  Of a TPU the compiler says so when it is asked for far too much.
  """
  if device.platform == "gpu":
    facts = named(device.device_kind)
    assert facts
    return gpu_limit(facts, count, fraction())
  huge = jax.ShapeDtypeStruct((2**42,), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(device))
  try:
    jax.jit(lambda x: x + 1).lower(huge).compile()
  except jax.errors.JaxRuntimeError as error:
    found = re.search(r"available HBM \(([\d.]+)([KMGT])", str(error))
    if found:
      return int(float(found[1]) * 2 ** (10 * ("KMGT".index(found[2]) + 1))), ""
  raise RuntimeError("the compiler did not say how much memory a device has")


_DUMPED = ("after_optimizations", "memory-usage-report")


def compiled(lower: Callable[[], Any], device: jax.Device) -> Program:
  """Compiles what `lower` returns for such a device."""
  return (_compiled_for_gpus if device.platform == "gpu" else _compiled_for_tpus)(lower, device)


def _compiled_for_tpus(lower: Callable[[], Any], device: jax.Device) -> Program:
  """JAX cannot always read libtpu's program back, so libtpu writes it to a file."""
  began = time.monotonic()
  with tempfile.TemporaryDirectory() as folder:
    options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
    try:
      with _uncached():
        program = lower().compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      words = [line.strip() for line in str(error).splitlines() if line.strip()]
      return Program(time.monotonic() - began, refusal=words[0].partition("RESOURCE_EXHAUSTED: ")[2] or words[0])
    hlo, report = ("".join(path.read_text() for path in Path(folder).glob(f"*{name}.txt")) for name in _DUMPED)
  memory = program.memory_analysis()
  reported = re.search(r"color=0\)\s*Total bytes: (\d+)", report)
  return Program(
    time.monotonic() - began, memory.argument_size_in_bytes, memory.temp_size_in_bytes,
    int(reported[1]) if reported else 0, collectives(parse(hlo)), hlo=hlo,
  )  # fmt: skip


def _compiled_for_gpus(lower: Callable[[], Any], device: jax.Device) -> Program:
  """XLA refuses no program for its size: what fits is for `limit` to say."""
  began = time.monotonic()
  with _uncached(), _cudnn_of(device):
    program = lower().compile()
  memory, hlo = program.memory_analysis(), program.as_text()
  new = memory.output_size_in_bytes - memory.alias_size_in_bytes  # results that take no argument's place
  return Program(
    time.monotonic() - began, memory.argument_size_in_bytes, memory.temp_size_in_bytes + new,
    collectives=collectives(parse(hlo)), hlo=hlo,
  )  # fmt: skip


@contextlib.contextmanager
def _cudnn_of(device: jax.Device) -> Iterator[None]:
  """Answers for a cuDNN and a GPU that are not here: JAX asks them what they are before it traces cuDNN's attention.

  Raises:
    Mistake: this JAX asks in another way; what is patched here is private to it.
  """
  here = sharding.capability(device)
  assert here
  answers = {
    "check_cudnn_version": lambda: 10_000 * _CUDNN[0] + 100 * _CUDNN[1] + _CUDNN[2],
    "check_compute_capability": lambda least: here >= sharding.version(least),
    "is_cuda_compute_capability_equal": lambda other: here == sharding.version(other),
  }
  try:
    private = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    before = {name: getattr(private, name) for name in answers}
  except (ImportError, AttributeError) as error:
    raise Mistake(f"jax {jax.__version__} cannot plan for GPUs ({error}): use jax 0.10 to 0.12") from error
  try:
    vars(private).update(answers)
    yield
  finally:
    vars(private).update(before)


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
  """Programs for devices that are not here can be written to JAX's cache, but not read back."""
  before = getattr(jax.config, "jax_enable_compilation_cache")  # noqa: B009  (type checkers do not see it)
  jax.config.update("jax_enable_compilation_cache", False)
  compilation_cache.reset_cache()  # it would remember that it was used
  try:
    yield
  finally:
    jax.config.update("jax_enable_compilation_cache", before)
    compilation_cache.reset_cache()
