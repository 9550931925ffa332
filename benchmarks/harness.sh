#!/usr/bin/env bash
# From nothing to the harness's table on a CPU: a small model learns children's books, GSM8K's training set and Python's
# standard library, and then answers a sample of each benchmark from local files. What was done is not done again.
#
#   benchmarks/harness.sh OUT DATA [--config.FIELD=VALUE ...]
#
# OUT is a folder for the runs; DATA a folder of JSON lines, plain or .xz: en/books_children (text), math/gsm8k_train
# (question, answer), and the benchmarks that evaluation/tasks name. Fields after them are of the evaluation. The table is
# in OUT/model/evaluation.html.
set -euo pipefail
out=${1:?a folder for the runs} data=${2:?the folder of the benchmarks}
shape=(--config.data.length=256 --config.data.batch_size=16 --config.evaluate.num_samples=2)

prepare() {
  [[ -f $out/$1/manifest.json ]] || lladax --mode=prepare --config=configs/chat_tiny.py:base "${shape[@]}" --shards=2 \
    --target="$out/$1" --config.data.corpus="$2" "${@:3}"
}
prepare books "files:$data/en/books_children.jsonl*"
shared=--config.tokenizer.path=$out/books/tokenizer/sp.model
prepare gsm8k "files:$data/math/gsm8k_train.jsonl*" --config.data.text_field=question,answer "$shared"
prepare stdlib stdlib "$shared"

weights="((\"records:$out/books\", 0.4), (\"records:$out/gsm8k\", 0.3), (\"records:$out/stdlib\", 0.3))"
lladax --config=configs/chat_tiny.py:base --workdir="$out/model" "${shape[@]}" --config.data.mixture="$weights" \
  --config.steps=1500
tasks=(lladax_arc_challenge lladax_hellaswag lladax_lambada_openai lladax_mmlu lladax_gsm8k lladax_humaneval
  lladax_humaneval_single_line_infilling)
lladax --workdir="$out/model" --mode=evaluate --config.data.held_out=0.0 --config.evaluate.data_dir="$data" \
  --config.evaluate.tasks="($(printf '"%s",' "${tasks[@]}"))" --config.evaluate.limit=64 \
  --config.evaluate.batch_size=16 --config.evaluate.allow_code=True --config.sample.block_length=64 \
  --config.sample.cache=dual "${@:3}"
