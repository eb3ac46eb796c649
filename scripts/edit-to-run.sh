#!/usr/bin/env bash
# How long from an edit of a model file to the end of the first training step: touches the model,
# rebuilds, runs one step, prints both times. Uses what scripts/quickstart.sh made, or makes a corpus.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
model=${1:-src/models/qwen3_moe.cpp}
[ -e "$model" ] || die "$model" "is not there" "a file of src/models"

ensure_packages
build cpu pith > /dev/null
tokens=runs/edit-tokens
if [ ! -e "$tokens/tokenizer.json" ]; then
    build/pith tokenize --tokenizer configs/quickstart/tokenizer.json --format text --join text \
        --include '*.h,*.cpp' --output "$tokens" --input src 2> /dev/null
fi
seconds() { date +%s.%N; }
# A comment at the end changes the object's input, so that no compiler cache answers.
cp "$model" "$model.before"
trap 'mv "$model.before" "$model"' EXIT
printf '// %s\n' "$(seconds)" >> "$model"
t0=$(seconds)
cmake --build --preset cpu --target pith > /dev/null
t1=$(seconds)
rm -rf runs/edit
build/pith train configs/quickstart/run.toml --set run.folder=runs/edit --set "data.path=$tokens" \
    --set train.steps=1 --set train.eval_interval=0 --set data.heldout_fraction=0 2> runs/edit.log ||
    { cat runs/edit.log >&2; exit 1; }
t2=$(seconds)
awk -v a="$t0" -v b="$t1" -v c="$t2" 'BEGIN {
    printf "edit to program: %.1f s; program to the end of step 1: %.1f s\n", b - a, c - b }'
