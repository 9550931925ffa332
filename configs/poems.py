"""The reversal test of the paper (section 3.3): the next line of a Tang poem, or the one before.

  python -m lladax.main --config=configs/poems.py --workdir=runs/poems \
    --config.data.corpus='files:tang_poems.jsonl.xz' --config.evaluate.tasks='("poems:poem_data.json",)'
  python -m lladax.main --config=configs/poems.py --workdir=runs/poems_ar --config.objective=autoregressive ...

Poems as JSON lines with `lines`, a couplet each; LLaDA's 469 couplets (poem_data.json of its repository) are the test.
With --config.data.exclude=poem_data.json:first,second no poem that holds a line of them is learnt: held out, not
learnt by heart. The fields are named, as a line is shorter than what counts without (see data/contamination.py).
The line is filled into its place in the couplet, or continued by the causal baseline; a model that was trained on
conversations is asked in one, in the published words, by "poems_chat:poem_data.json". Of the 469 couplets 123 stand in
57,083 poems of the Tang exactly, with punctuation. The whole recipe has not been run; `benchmarks/poems.sh` runs one of
the size of a CPU, with both families, in which the couplets' poems come more often.
"""

from lladax.configs import base


def get_config():
  config = base.get_config()
  config.steps = 4000
  config.model.update(D=256, N=6, H=8, G=8, K=32, F=768, tied=True)
  config.data.update(corpus="files:tang_poems.jsonl*", text_field="lines", length=64, batch_size=64, held_out=0.02)
  config.data.segments = True
  config.tokenizer.vocab_size = 8192
  config.noise.update(masking="exact", times="antithetic")
  config.optimizer.update(schedule=((0.05, 2e-3), (-1, 0.0)))
  config.evaluate.update(num_samples=4)
  config.evaluate.canvases = (
    "[MASK]" * 5 + "，" + "[MASK]" * 5 + "。",
    "春" + "[MASK]" * 4 + "，" + "[MASK]" * 5 + "。",
  )
  return config
