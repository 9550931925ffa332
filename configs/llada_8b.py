"""LLaDA 8B, pre-training (arXiv 2502.09992, section 2.2 and appendix B).

  python -m lladax.main --config=configs/llada_8b.py --workdir=/shared/runs/llada_8b \
    --config.data.corpus='files:/data/*.jsonl.xz' --config.tokenizer.path=/data/tokenizer.json

A topology's own settings follow a colon, --config=configs/llada_8b.py:v5p_4x4x4; launch/README.md has what --mode=plan
says of them.

8,015,581,184 parameters; 2.3T tokens of 4096 x 1280 a step. As published: 0.13M H800 hours. Betas and clipping are
not in the paper; they are those of its predecessor SMDM. Not run by us: what is tested here is that it builds, that
its parameter count and learning rates are the published ones, and that it compiles for its devices
and fits them.
"""

from lladax.configs import base
from lladax.mistake import Mistake

TOPOLOGIES = {
  # 20 rows a chip, 4 at a time: so few leave room to keep all matmuls for the backward pass. (Over 64 chips in one
  # axis libtpu 0.0.42 makes all-reduces of the gathers: 16 x 4.)
  "v5p_4x4x4": {"micro_batches": 5, "model.remat": "dots", "model.head_chunk": 4096, "mesh.data": -1, "mesh.fsdp": 16},
  # 5 rows a chip.
  "v6e_16x16": {"model.head_chunk": 2048},
  # 10 rows a chip, 2 at a time; gradients cross the data-centre network once a step, a sixteenth of them per chip.
  "v5p_4x4x4_x2": {
    "micro_batches": 5, "model.remat": "dots", "model.head_chunk": 4096, "mesh.slices": 2, "mesh.data": -1,
    "mesh.fsdp": 16,
  },
  # 160 rows a GPU, 2 at a time: all matmuls are kept, and a layer's parameters are gathered under one layer's work.
  "h100_8": {"micro_batches": 80, "model.remat": "dots"},
  # 20 rows a GPU, 2 at a time; every node gathers over NVLink alone, and gradients cross the network once a step.
  "h100_8x8": {"micro_batches": 10, "model.remat": "dots", "mesh.slices": 8},
}  # fmt: skip


def get_config(topology: str = ""):
  config = base.get_config()
  config.model.update(D=4096, N=32, H=32, G=32, K=128, F=12288, V=126464, max_length=4096, remat="full")
  config.tokenizer.update(kind="huggingface", path="tokenizer.json")
  config.data.update(length=4096, batch_size=1280, random_lengths=0.01, held_out=0.001)
  # 1.2T tokens at 4e-4 after 2000 steps of warm-up, 0.8T at 1e-4, and 0.3T down to 1e-5; 5,242,880 tokens a step.
  config.optimizer.schedule = ((2000, 4e-4), (226_882, 4e-4), (0, 1e-4), (152_588, 1e-4), (57_220, 1e-5))
  config.steps = 438_690
  config.mesh.update(data=1, fsdp=-1)
  config.checkpoint.update(every=1000, keep=3, keep_every=20_000)
  config.log.update(console_every=10)
  config.sample.update(gen_length=1024, block_length=1024, steps=1024)  # as in the paper's evaluation of the base model
  config.evaluate.update(every=5000, rows=1024, num_samples=4, batch_size=256)
  config.update_from_flattened_dict(settings(TOPOLOGIES, topology))
  return config


def settings(topologies, topology):
  """The fields of a topology's entry; none for ""."""
  if topology and topology not in topologies:
    raise Mistake(f"--config=...:{topology}: there are settings for {', '.join(topologies)}")
  return topologies.get(topology, {})
