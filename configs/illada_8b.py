"""iLLaDA 8B (arXiv 2606.25331): grouped keys, tied embeddings, 8192 tokens; 7,615,025,152 parameters.

  python -m lladax.main --config=configs/illada_8b.py --workdir=/shared/runs/illada_8b \
    --config.data.corpus='files:/data/*.jsonl.xz' --config.tokenizer.path=/data/tokenizer.json

The geometry is the published one; the schedule is LLaDA 8B's. Not run by us beyond its parameter count.
"""

from lladax.configs import llada_8b


def get_config():
  config = llada_8b.get_config()
  config.model.update(D=4096, N=32, H=32, G=8, K=128, F=14336, V=155136, tied=True, max_length=8192)
  config.data.update(length=8192, batch_size=640)
  return config
