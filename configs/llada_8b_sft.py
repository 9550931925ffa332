"""LLaDA 8B, supervised fine-tuning (arXiv 2502.09992, section 2.3 and appendix B.1).

  python -m lladax.main --mode=import --source=hf://GSAI-ML/LLaDA-8B-Base --workdir=/shared/runs/llada_8b_base
  python -m lladax.main --config=configs/llada_8b_sft.py --workdir=/shared/runs/llada_8b_sft \
    --config.init_from=/shared/runs/llada_8b_base --config.data.corpus='files:/data/sft/*.jsonl.gz'

4.5M pairs, three epochs of batch 256; of a dialogue one reply is drawn at random, and filled up with EOS to the
batch's longest row. `:lora` trains adapters of rank 16 instead, on one device of 80 GB, and `:qlora` over a base in 4
bits, on a GPU of 24 GB (QLoRA, arXiv 2305.14314); `:illada` lets a reply end with
one EOS, and packs several dialogues into a row (arXiv 2606.25331). Not run by us: what is tested here is that it
builds, its learning rates, and its memory.
"""

from lladax.configs import llada_8b


def get_config(variant: str = ""):
  config = llada_8b.get_config()
  config.init_from = "runs/llada_8b_base"
  config.data.update(corpus="files:data/*.jsonl", format="chat", length=4096, batch_size=256, random_lengths=0.0)
  config.optimizer.schedule = ((50, 2.5e-5), (-1, 2.5e-5), (0.1, 2.5e-6))
  config.steps = 52_734
  config.checkpoint.update(every=2000, keep_every=0)
  config.evaluate.update(every=2000)
  config.update_from_flattened_dict(llada_8b.settings(VARIANTS, variant))
  return config


LORA = {
  "model.lora_rank": 16, "model.lora_alpha": 32.0, "data.batch_size": 64, "micro_batches": 32, "model.remat": "dots",
  "model.head_chunk": 2048, "steps": 3000, "optimizer.schedule": ((50, 2e-4), (-1, 2e-4), (0.1, 2e-5)),
  "optimizer.weight_decay": 0.0, "checkpoint.every": 500, "evaluate.every": 500, "mesh.fsdp": 1, "mesh.data": -1,
}  # fmt: skip
VARIANTS = {
  "lora": LORA,
  "qlora": LORA | {"model.weights": "nf4", "micro_batches": 64, "model.remat": "full", "model.head_chunk": 1024},
  "illada": {"data.eos_padding": "none", "data.packing": True},
}
