"""From text to a chat on a CPU: a small model is pre-trained on text, and then fine-tuned on conversations.

  python -m lladax.main --config=configs/chat_tiny.py:base --workdir=runs/base --config.data.corpus='files:texts/*.txt'
  python -m lladax.main --config=configs/chat_tiny.py --workdir=runs/chat --config.init_from=runs/base \
    --config.data.corpus='files:alpaca_data.json'
  python -m lladax.main --workdir=runs/chat --mode=chat

Or a model of blocks of 8, which learns all replies of a dialogue at once, and answers block by block:

  python -m lladax.main --config=configs/chat_tiny.py:blocks --workdir=runs/chat_blocks \
    --config.data.corpus='files:alpaca_data.json'
  python -m lladax.main --workdir=runs/chat_blocks --mode=chat

Conversations are JSON (lines, or one list; packed too) with `messages`; with `instruction`, `input` and `output`; or
with `prompt` and `response`. Without --config.init_from the model begins from random parameters.
"""

from lladax.configs import base
from lladax.mistake import Mistake


def get_config(stage: str = "chat"):
  if stage not in ("base", "chat", "blocks"):
    raise Mistake(f"--config=chat_tiny:{stage}: the stages are base and chat, or blocks")
  config = base.get_config()
  config.model.update(D=192, N=6, H=6, G=6, K=32, F=512, tied=True)
  config.tokenizer.vocab_size = 4096
  config.data.update(corpus="files:data/*.jsonl", length=128, batch_size=32, held_out=0.02)
  config.noise.update(masking="exact", times="antithetic")
  config.evaluate.update(num_samples=8)
  config.sample.update(gen_length=64, block_length=64, steps=64)
  if stage == "base":
    config.steps = 1500
    config.optimizer.update(schedule=((0.05, 2e-3), (-1, 0.0)))
  else:
    config.steps = 600
    config.data.update(format="chat")
    config.optimizer.update(schedule=((0.1, 1e-3), (-1, 1e-3), (0.1, 1e-4)))
    config.evaluate.canvases = (
      "Name three colours.",
      "What is the capital of France?",
      "Write a short poem about rain.",
    )
  if stage == "blocks":
    config.steps = 400
    config.model.update(D=128, N=4, H=4, G=4, K=32, F=384)
    config.tokenizer.vocab_size = 2048
    config.noise.block = 8
    config.data.update(length=256, batch_size=8, replies="all", eos_padding="block", packing=True)
    config.sample.update(block_length=8, threshold=0.9)
  return config
