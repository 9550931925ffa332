"""LLaDA2.0 mini (16B, 1.4B active), supervised fine-tuning by blocks of 32 (arXiv 2512.15745).

  python -m lladax.main --mode=import --source=hf://inclusionAI/LLaDA2.0-mini --workdir=/shared/runs/llada2_mini
  python -m lladax.main --config=configs/llada2_mini_sft.py --workdir=/shared/runs/llada2_mini_sft \
    --config.init_from=/shared/runs/llada2_mini --config.data.corpus='files:/data/sft/*.jsonl.gz'

All replies of a dialogue are learnt at once, dialogues are packed, each filled up to whole blocks; one time a row,
between 0.3 and 0.8, and every masked token counts the same, as in the authors' trainer. `:lora` trains adapters of rank
16 of attention, experts and shared experts. The experts' choosing bias is moved towards even loads, as before, and is
not trained otherwise. `:flash` is the model of 103B, `:flash_lora` its adapters.

A topology's own settings stand behind the variant: `:h100_8`, `:lora_h100_8`, `:v5p_4x4x4`, ...; launch/README.md has
what --mode=plan says of them. Not run by us: what is tested here is that it builds, its parameter counts, and its
memory.
"""

from lladax.configs import base, llada_8b

LORA = {"model.lora_rank": 16, "model.lora_alpha": 32.0, "optimizer.schedule": ((50, 2e-4), (-1, 2e-4), (0.1, 2e-5)),
        "optimizer.weight_decay": 0.0, "model.balance_rate": 0.0}  # fmt: skip
FLASH = {"model.D": 4096, "model.N": 32, "model.H": 32, "model.F": 9216, "model.X": 1024, "model.S": 1024}
# Of every row a device holds one at a time; experts lie on `tensor`.
VARIANTS = {
  "lora": LORA,
  "flash": FLASH,
  "flash_lora": FLASH | LORA,
  "h100_8x8": {"mesh.tensor": 4, "model.remat": "full"},
  "lora_h100_8": LORA | {"mesh.tensor": 4, "micro_batches": 32, "model.remat": "full"},
  "v5p_4x4x4": {"mesh.tensor": 4, "mesh.fsdp": 16, "model.remat": "full"},
  "flash_v5p_8x8x8": FLASH | {"mesh.tensor": 4, "mesh.fsdp": 128, "model.remat": "full", "data.batch_size": 512},
  "flash_lora_h100_8x8": FLASH | LORA | {"mesh.tensor": 4, "mesh.fsdp": 16, "model.remat": "full"},
}  # fmt: skip


def get_config(variant: str = ""):
  config = base.get_config()
  config.init_from = "runs/llada2_mini"
  config.model.update(D=2048, N=20, H=16, G=4, K=128, F=5120, V=157184, max_length=32768, rope_theta=6e5)
  config.model.update(norm_eps=1e-6, qk_norm=True, rotary=64, E=256, J=8, X=512, S=512, dense=1, router="sigmoid")
  config.model.update(router_bias=True, router_groups=8, router_topk_groups=4, router_renormalise=True)
  config.model.update(router_scale=2.5, balance_rate=1e-3, remat="full", head_chunk=2048)
  config.data.update(corpus="files:data/*.jsonl", format="chat", length=4096, batch_size=128, held_out=0.001)
  config.data.update(replies="all", eos_padding="block", packing=True)
  config.noise.update(block=32, times_per="row", band=(0.3, 0.8), weights="flat")
  config.optimizer.schedule = ((50, 1e-5), (-1, 1e-5), (0.1, 1e-6))
  config.steps = 10_000
  config.mesh.update(data=1, fsdp=-1)
  config.checkpoint.update(every=500, keep=2)
  config.log.update(console_every=10)
  config.sample.update(gen_length=2048, block_length=32, block_steps=32, threshold=0.95)
  config.evaluate.update(every=1000, rows=512, num_samples=4, batch_size=64)
  config.update_from_flattened_dict(llada_8b.settings(VARIANTS, variant))
  return config
