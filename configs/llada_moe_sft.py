"""LLaDA-MoE 7B (1.4B active), supervised fine-tuning (arXiv 2509.24389).

  python -m lladax.main --mode=import --source=hf://inclusionAI/LLaDA-MoE-7B-A1B-Base --workdir=/shared/runs/llada_moe \
    --mask_id=156895
  python -m lladax.main --config=configs/llada_moe_sft.py --workdir=/shared/runs/llada_moe_sft \
    --config.init_from=/shared/runs/llada_moe --config.data.corpus='files:/data/sft/*.jsonl.gz'

LLaDA's objective and fine-tuning (configs/llada_8b_sft.py), with the paper's auxiliary losses: 0.01 of balance, 0.001
of the router's z. `:lora` trains adapters of rank 16 of attention and experts; `:h100_8`, `:lora_h100_1` and
`:v5p_2x2x4` have the settings of a topology, of which launch/README.md has what --mode=plan says. Not run by us: what
is tested here is that it builds, its parameter count, and its memory.
"""

from lladax.configs import base, llada_8b

LORA = {"model.lora_rank": 16, "model.lora_alpha": 32.0, "optimizer.schedule": ((50, 2e-4), (-1, 2e-4), (0.1, 2e-5)),
        "optimizer.weight_decay": 0.0}  # fmt: skip
VARIANTS = {
  "lora": LORA,
  "h100_8": {"micro_batches": 8, "model.remat": "dots"},
  "lora_h100_1": LORA | {"data.batch_size": 64, "micro_batches": 32, "model.remat": "dots", "mesh.fsdp": 1},
  "v5p_2x2x4": {"micro_batches": 4, "model.remat": "full", "mesh.tensor": 4},
}  # fmt: skip


def get_config(variant: str = ""):
  config = base.get_config()
  config.init_from = "runs/llada_moe"
  config.model.update(D=2048, N=16, H=16, G=16, K=128, F=8192, V=157184, max_length=8192, rope_theta=5e4)
  config.model.update(qk_norm=True, E=64, J=8, X=1024, balance=0.01, z_loss=0.001, remat="full", head_chunk=2048)
  config.data.update(corpus="files:data/*.jsonl", format="chat", length=4096, batch_size=256, held_out=0.001)
  config.optimizer.schedule = ((50, 2.5e-5), (-1, 2.5e-5), (0.1, 2.5e-6))
  config.steps = 10_000
  config.mesh.update(data=1, fsdp=-1)
  config.checkpoint.update(every=1000, keep=2)
  config.log.update(console_every=10)
  config.sample.update(gen_length=128, block_length=32, steps=128)
  config.evaluate.update(every=2000, rows=512, num_samples=4, batch_size=64)
  config.update_from_flattened_dict(llada_8b.settings(VARIANTS, variant))
  return config
