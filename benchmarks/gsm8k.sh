#!/usr/bin/env bash
# From nothing to school arithmetic on a CPU: a small mixture is prepared, a model is trained on it, and then fine-tuned
# on GSM8K; the same questions are put to it before and after.
#
#   benchmarks/gsm8k.sh DATA OUT
#
# DATA holds alpaca.jsonl.xz (instruction, input, output), gsm8k_train.jsonl.xz (question, answer) and books.jsonl.xz
# (text). A step that was done is not done again.
set -euo pipefail
data=${1:?the folder with the three files} out=${2:?a folder for the runs}
base=(--config=configs/chat_tiny.py:base --config.data.length=256)

prepare() {
  [[ -f $out/$1/manifest.json ]] || lladax --mode=prepare "${base[@]}" --shards=2 --target="$out/$1" \
    --config.data.corpus="files:$data/$1.jsonl.xz" "${@:2}"
}
prepare alpaca --config.data.text_field=instruction,input,output
shared=--config.tokenizer.path=$out/alpaca/tokenizer/sp.model
prepare gsm8k_train --config.data.text_field=question,answer "$shared"
prepare books "$shared"

lladax "${base[@]}" --workdir="$out/base" --config.data.batch_size=16 --config.evaluate.num_samples=2 \
  --config.data.mixture="((\"records:$out/alpaca\", 0.4), (\"records:$out/gsm8k_train\", 0.3), (\"records:$out/books\", 0.3))"
lladax --config=configs/chat_tiny.py --workdir="$out/sft" --config.init_from="$out/base" --config.steps=500 \
  --config.data.corpus="files:$data/gsm8k_train.jsonl.xz" --config.data.prompt_field=question \
  --config.data.response_field=answer --config.data.length=256 --config.data.batch_size=16 \
  --config.evaluate.num_samples=2 --config.evaluate.canvases='()'

questions="Tom has 3 apples and buys 4 more. How many apples does he have?
A book costs 5 dollars. How much do 6 books cost?"
for run in base sft; do
  echo "== $run"
  while read -r question; do
    lladax --workdir="$out/$run" --mode=chat --config=configs/chat_tiny.py --config.sample.gen_length=96 \
      --config.sample.block_length=8 --config.sample.steps=96 <<<"$question"
  done <<<"$questions"
done
