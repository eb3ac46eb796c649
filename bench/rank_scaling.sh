#!/usr/bin/env bash
# What CPU ranks cost: the same steps of the same model on 1, 2, 4, 8 and 16 ranks of one machine, whose
# cores they share. Prints a Markdown table; bench/rank_scaling.sh > bench/results/cpu-ranks.md keeps it.
# PITH names a program to use instead of building one.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../scripts/common.sh"
export OMP_WAIT_POLICY=passive
steps=16
pith=${PITH:-build/pith}
if [ -z "${PITH:-}" ]; then
    ensure_packages > /dev/null
    build cpu pith > /dev/null
fi
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"$pith" tokenize --tokenizer configs/quickstart/tokenizer.json --format text --join text \
    --output "$scratch/tokens" --input src --include '*.h,*.cpp' > /dev/null 2>&1

# row PP DP CP EP: runs the layout and prints its line.
row() {
    local pp=$1 dp=$2 cp=$3 ep=$4 ranks=$(($1 * $2 * $3 * $4)) run=$scratch/$1-$2-$3-$4 median times
    TIMEFORMAT='%U %S'
    times=$({ time "$pith" train configs/layouts/run.toml --ranks $ranks --set run.folder="$run" \
        --set data.path="$scratch/tokens" --set train.steps=$steps --set parallel.pp="$pp" \
        --set parallel.cp="$cp" --set parallel.ep="$ep" > "$run.log" 2>&1; } 2>&1) ||
        { cat "$run.log" >&2; exit 1; }
    median=$(sed -E 's/.*"step_time": ([^,]+),.*/\1/' "$run/metrics.jsonl" | sort -g |
        sed -n "$((steps / 2 + 1))p")
    awk -v median="$median" -v steps=$steps -v ranks=$ranks -v name="pp $pp, dp $dp, cp $cp, ep $ep" '
        { printf "| %d | %s | %.3f | %.3f |\n", ranks, name, median, ($1 + $2) / steps }' <<< "$times"
}

cat <<END
# CPU ranks: what they cost

The model and batch of \`configs/layouts/\` (8 layers, 64 sequences of 32 tokens a step): the same work,
cut for more and more ranks, which are threads that share the cores. Wall time is the median of $steps
steps; processor time is that of the whole run, start and last checkpoint included, over its steps.

$(lscpu | sed -nE 's/^Model name: *//p' | head -n 1), $(nproc) cores; $(date -u +%Y-%m-%d); commit $(git rev-parse --short HEAD);
load average at the start: $(cut -d' ' -f1 /proc/loadavg) (other programs' share of the cores lengthens wall times only).

| Ranks | Layout | Wall s a step | Processor s a step |
|--:|---|--:|--:|
END
row 1 1 1 1
row 1 2 1 1
row 1 1 2 1
row 1 1 1 2
row 2 1 1 1
row 1 2 2 1
row 2 1 1 2
row 1 2 2 2
row 4 1 1 2
row 2 2 2 2
row 4 1 2 2
