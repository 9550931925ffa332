"""NVIDIA's GPUs: what is known of those that are planned for."""

from typing import NamedTuple


class Gpu(NamedTuple):
  """What XLA's compiler asks of a GPU."""

  name: str  # as it calls itself, `device_kind`
  capability: str
  cores: int  # streaming multiprocessors
  units: int  # for float32, of each
  threads: int  # resident in each at once
  ghz: float
  bandwidth: int  # bytes a second
  memory: int  # bytes that a program sees
  cache: int  # bytes, of the second level
  shared: int  # bytes of shared memory of a multiprocessor
  block: int  # bytes of it that one block may ask for


# A100 to B200: the target configurations in XLA's sources (xla/backends/gpu/target_config/specs, openxla/xla at
# 4336d12; B200 at 300ec95). The others: NVIDIA's data sheets and tuning guides (capability 7.5, 8.9), and what
# deviceQuery, PyTorch or nvbench print of such a card: T4 of Colab; L4, bottlerocket-kernel-kit#139; RTX 4090,
# NVIDIA/nvbench#207.
GPUS = {
  "t4": Gpu("Tesla T4", "7.5", 40, 64, 1024, 1.59, 320_064_000_000, 15_828_320_256, 4_194_304, 65_536, 65_536),
  "l4": Gpu("NVIDIA L4", "8.9", 58, 128, 1536, 2.04, 300_048_000_000, 23_583_784_960, 50_331_648, 102_400, 101_376),
  "rtx4090": Gpu("NVIDIA GeForce RTX 4090", "8.9", 128, 128, 1536, 2.52, 1_008_096_000_000, 25_756_172_288, 75_497_472,
                 102_400, 101_376),
  "a100-40": Gpu("NVIDIA A100-SXM4-40GB", "8.0", 108, 64, 2048, 1.41, 1_555_200_000_000, 42_331_013_120, 41_943_040,
                 167_936, 166_912),
  "a100": Gpu("NVIDIA A100-SXM4-80GB", "8.0", 108, 64, 2048, 1.41, 2_039_040_000_000, 85_100_068_864, 41_943_040,
              167_936, 166_912),
  "h100": Gpu("NVIDIA H100 80GB HBM3", "9.0", 132, 128, 2048, 1.98, 3_352_320_000_000, 84_942_979_072, 52_428_800,
              233_472, 232_448),
  "h200": Gpu("NVIDIA H200", "9.0", 132, 128, 2048, 1.98, 4_800_000_000_000, 151_397_597_184, 52_428_800, 233_472,
              232_448),
  "b200": Gpu("NVIDIA B200", "10.0", 148, 128, 2048, 1.965, 7_672_320_000_000, 191_514_411_008, 132_644_864, 233_472,
              232_448),
}  # fmt: skip


def named(kind: str) -> Gpu | None:
  """The facts of the GPU that calls itself so; None of one that is not known."""
  return next((x for x in GPUS.values() if x.name == kind), None)
