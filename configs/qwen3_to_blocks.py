"""A causal model becomes one of blocks: Qwen3 8B to blocks of 4, as SDAR does it.

  python -m lladax.main --mode=import --source=hf://Qwen/Qwen3-8B-Base --workdir=/shared/runs/qwen3
  python -m lladax.main --config=configs/qwen3_to_blocks.py --workdir=/shared/runs/qwen3_blocks \
    --config.init_from=/shared/runs/qwen3 --config.data.corpus='files:/data/*.jsonl.xz'
  python -m lladax.main --workdir=/shared/runs/qwen3_blocks --mode=export --target=/shared/runs/qwen3_blocks_published

[MASK] is the first row of the embedding behind the vocabulary, as SDAR's; its embedding is drawn like the words'.
Targets stand where their masks do: the causal model's shift is dropped. Documents see only themselves. `:grow` warms up
through blocks of 1 and 4 to 32, as LLaDA2.0 does (arXiv 2512.15745). The shift is kept by `:dream`, a canvas of one
block, and by `:fast`, blocks of 32 whose tokens are each masked in one of two passes, as Fast-dLLM v2 does it with
Qwen2.5 (arXiv 2509.26328).

What is SDAR's here: the model, blocks of 4, the mask, the loss. Its batches and learning rates are not published as
far as we know, and these are ours. Not run by us: what is tested here is that it builds, its parameter count, and its
memory; the same recipe on a small model is `python benchmarks/conversion.py`.
"""

from lladax.configs import base, llada_8b

VARIANTS = {
  "grow": {"noise.block": 0, "noise.blocks": ((0.02, 1), (0.05, 4), (-1, 32))},
  "dream": {"noise.block": 0, "model.shift": True},
  "fast": {"noise.block": 32, "noise.complements": True, "noise.weights": "flat", "model.shift": True},
  "h100_8": {"micro_batches": 16, "model.remat": "full"},
  "v5p_4x4x4": {"mesh.fsdp": 16, "mesh.data": -1, "model.head_chunk": 4096},
}  # fmt: skip


def get_config(variant: str = ""):
  config = base.get_config()
  config.init_from = "runs/qwen3"
  config.model.update(D=4096, N=36, H=32, G=8, K=128, F=12288, V=151936, max_length=32768, remat="full")
  config.model.update(rope_theta=1e6, norm_eps=1e-6, qk_norm=True)
  config.data.update(corpus="files:data/*.jsonl", length=4096, batch_size=256, segments=True, held_out=0.001)
  config.noise.update(block=4)
  config.optimizer.schedule = ((500, 2e-5), (-1, 2e-5), (0.1, 2e-6))
  config.steps = 50_000  # 52G tokens
  config.mesh.update(data=1, fsdp=-1)
  config.checkpoint.update(every=1000, keep=3)
  config.log.update(console_every=10)
  config.sample.update(gen_length=1024, block_steps=4, threshold=0.9)
  config.evaluate.update(every=5000, rows=1024, num_samples=4, batch_size=64)
  config.update_from_flattened_dict(llada_8b.settings(VARIANTS, variant))
  return config
