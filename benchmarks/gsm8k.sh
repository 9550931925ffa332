#!/usr/bin/env bash
# From nothing to school arithmetic on a CPU: a mixture is prepared, a model is trained on it and then fine-tuned on
# GSM8K; two questions are put to it before and after. What was done is not done again.
#
#   benchmarks/gsm8k.sh OUT INSTRUCTIONS GSM8K_TRAIN BOOKS
#
# OUT is a folder for the runs; the others are files of JSON lines, plain or packed: (instruction, input, output),
# (question, answer), (text).
set -euo pipefail
out=${1:?a folder for the runs} instructions=${2:?a file} gsm8k=${3:?a file} books=${4:?a file}
shape=(--config.data.length=256 --config.data.batch_size=16 --config.evaluate.num_samples=2)

prepare() {
  [[ -f $out/$1/manifest.json ]] || lladax --mode=prepare --config=configs/chat_tiny.py:base "${shape[@]}" --shards=2 \
    --target="$out/$1" --config.data.corpus="files:$2" "${@:3}"
}
prepare instructions "$instructions" --config.data.text_field=instruction,input,output
shared=--config.tokenizer.path=$out/instructions/tokenizer/sp.model
prepare gsm8k "$gsm8k" --config.data.text_field=question,answer "$shared"
prepare books "$books" "$shared"

weights="((\"records:$out/instructions\", 0.4), (\"records:$out/gsm8k\", 0.3), (\"records:$out/books\", 0.3))"
lladax --config=configs/chat_tiny.py:base --workdir="$out/base" "${shape[@]}" --config.data.mixture="$weights"
lladax --config=configs/chat_tiny.py --workdir="$out/sft" "${shape[@]}" --config.init_from="$out/base" \
  --config.steps=500 --config.data.corpus="files:$gsm8k" --config.data.prompt_field=question \
  --config.data.response_field=answer --config.evaluate.canvases='()'

for run in base sft; do
  for question in "Tom has 3 apples and buys 4 more. How many apples does he have?" \
    "A book costs 5 dollars. How much do 6 books cost?"; do
    printf '\n%s, asked: %s\n' "$run" "$question"
    lladax --workdir="$out/$run" --mode=chat --config=configs/chat_tiny.py --config.sample.gen_length=96 \
      --config.sample.block_length=8 --config.sample.steps=96 <<<"$question"
  done
done
