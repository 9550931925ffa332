"""LLaDA 1B, the size of the paper's scaling study (arXiv 2502.09992, appendix B.2); 1,487,243,264 parameters.

  python -m lladax.main --config=configs/llada_1b.py --workdir=/shared/runs/llada_1b \
    --config.data.corpus='files:/data/*.jsonl.xz' --config.tokenizer.path=/data/tokenizer.json

Geometry and vocabulary are the published ones; the learning rate is a common one for the size, not the paper's.
Not run by us beyond its parameter count.
"""

from lladax.configs import llada_8b

TOPOLOGIES = {
  "v5p_1x1x1": {"micro_batches": 64, "model.remat": "dots", "model.head_chunk": 4096, "mesh.fsdp": 1, "mesh.data": 1},
  "h100_1": {"micro_batches": 32, "model.remat": "dots", "mesh.fsdp": 1, "mesh.data": 1},  # 8 rows at a time
  "v5e_4x4": {"micro_batches": 8, "model.remat": "dots", "model.head_chunk": 1024},
}


def get_config(topology: str = ""):
  config = llada_8b.get_config()
  config.model.update(D=2048, N=22, H=32, G=4, K=64, F=5634, V=126464)
  config.data.batch_size = 256
  config.optimizer.schedule = ((2000, 4e-4), (-1, 4e-4), (0.2, 1e-5))
  config.steps = 100_000
  config.update_from_flattened_dict(llada_8b.settings(TOPOLOGIES, topology))
  return config
