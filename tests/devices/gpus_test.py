import pytest

from lladax.devices import gpus
from lladax.storage import metrics


class Device:
  def __init__(self, kind):
    self.device_kind = kind


# Dense, summed in float32, as the data sheets have them.
@pytest.mark.parametrize(
  ("kind", "teraflops", "gigabytes"),
  [("t4", 65, 16), ("l4", 121, 24), ("rtx4090", 165.2, 24), ("a100-40", 312, 40), ("a100", 312, 80), ("h100", 989, 80),
   ("h200", 989, 141), ("b200", 2250, 180)],
)  # fmt: skip
def test_the_facts_of_a_gpu(kind, teraflops, gigabytes):
  facts = gpus.GPUS[kind]
  assert gpus.named(facts.name) is facts
  assert metrics.peak_flops(Device(facts.name)) == teraflops * 1e12
  # The rest of what is printed on it goes to error correction, or is more than that; and no fact is one digit off.
  assert 0.95 * gigabytes < facts.memory / 1e9 < 1.08 * gigabytes
  assert facts.block <= facts.shared < facts.cache < facts.memory
  vector = 2 * facts.cores * facts.units * facts.ghz * 1e9  # its matrix units are this many times faster
  assert 2 <= teraflops * 1e12 / vector <= 32


def test_every_gpu_has_its_facts():
  assert set(gpus.GPUS) == {"t4", "l4", "rtx4090", "a100-40", "a100", "h100", "h200", "b200"}
  assert gpus.named("NVIDIA H900") is None
  assert metrics.peak_flops(Device("NVIDIA L40S")) == 362e12  # no L4
