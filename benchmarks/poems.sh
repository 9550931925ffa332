#!/usr/bin/env bash
# The reversal test on Tang poems, at the size of a CPU: both families learn the same batches, of which a fifth are poems
# of the collection, and the rest the poems that hold one of LLaDA's couplets, which the web quotes more often, too.
#
#   benchmarks/poems.sh OUT TANG_POEMS COUPLETS [--config.FIELD=VALUE ...]
#
# OUT is a folder; TANG_POEMS are JSON lines with `lines`, plain or .xz; COUPLETS is poem_data.json of LLaDA's
# repository. Asked are the couplets that stand in the collection (known.json), and all of them. OUT/reversal.md has the
# table. The held-out variant has no such poems: configs/poems.py with
# --config.data.exclude=COUPLETS:first,second.
set -euo pipefail
out=${1:?a folder for the runs} poems=${2:?a file of poems} couplets=${3:?a file of couplets}
mkdir -p "$out"
python - "$out" "$poems" "$couplets" <<'PY'
import json, lzma, pathlib, sys

out, poems, couplets = map(pathlib.Path, sys.argv[1:])
read = lambda path: (lzma.open if path.suffix == ".xz" else open)(path, "rt", encoding="utf-8")
pairs = json.load(read(couplets))
lines = {f"{pair['first']}，{pair['second']}。": pair for pair in pairs}
rows = [json.loads(row) for row in read(poems)]
famous = [row for row in rows if not lines.keys().isdisjoint(row["lines"])]
known = {line: lines[line] for row in famous for line in row["lines"] if line in lines}
(out / "famous.jsonl").write_text("".join(json.dumps(row) + "\n" for row in famous))
(out / "known.json").write_text(json.dumps(list(known.values())))
print(f"{len(rows)} poems; {len(famous)} of them hold {len(known)} of {len(pairs)} couplets")
PY
python benchmarks/reversal.py --config=configs/poems.py --workdir="$out" \
  --config.data.mixture="((\"files:$poems\", 0.2), (\"files:$out/famous.jsonl\", 0.8))" \
  --config.evaluate.tasks="(\"poems:$out/known.json\", \"poems:$couplets\")" \
  --config.data.held_out=0.0 --config.steps=2500 --config.model.D=192 --config.model.N=4 --config.model.H=6 \
  --config.model.G=6 --config.model.F=512 --config.optimizer.weight_decay=0.0 \
  --config.optimizer.schedule='((0.05, 3e-3), (-1, 0.0))' "${@:4}"
