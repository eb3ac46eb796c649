#!/usr/bin/env bash
# run.sh [RUN.toml [STEP [OPTION...]]]: profiles a step and checks what was recorded. run.sh --check
# FOLDER STEP: checks it alone. See SKILL.md. The last line is PASS or FAIL.
set -euo pipefail
source "$(dirname "$0")/../../../scripts/common.sh"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# check FOLDER STEP: the files and the log of a profiled run.
check() {
    local files status
    files=$1/profile-step-$(printf %06d "$2")
    status=0; [ -s "$files.json" ] && [ -s "$files.tsv" ] && [ -s "$1/log.txt" ] || status=1
    gate "$files.json, .tsv and $1/log.txt are there" $status
    if [ $status = 1 ]; then return; fi
    if command -v jq > /dev/null; then
        jq empty "$files.json" 2> "$scratch/json" || status=1
    elif command -v python3 > /dev/null; then
        python3 -m json.tool "$files.json" /dev/null 2> "$scratch/json" || status=1
    else
        die run.sh "cannot read JSON (got neither jq nor python3)" "installing one of them"
    fi
    gate "the trace is JSON" $status
    if [ $status = 1 ]; then head -n 3 "$scratch/json"; fi

    # The last profile in the log: its first line and its shares.
    awk -v step="$2" '
        index($0, "profile of step " step ": ") { head = $0; shares = "" }
        head != "" && shares == "" && /^matrix products / { shares = $0 }
        END { sub(/.*: /, "", head); split(head, word, "[ ,]+"); print word[1] * 1000, word[3] + 0; print shares }' \
        "$1/log.txt" > "$scratch/said"
    local step_us launches
    read -r step_us launches < "$scratch/said"
    status=0; awk -F'\t' 'NR > 1 && (NF != 7 || $3 !~ /^[0-9]+$/ || $4 == "" || $7 == "") { bad = 1 }
        END { exit bad || NR < 2 }' "$files.tsv" || status=1
    gate "every launch has a stream, a stage and a kernel" $status
    for stage in ' forward$' ' backward$' ' weights$' '^optimizer$'; do
        status=0; awk -F'\t' -v stage="$stage" '$4 ~ stage { n++ } END { exit !n }' "$files.tsv" || status=1
        gate "a stage like '$stage'" $status
    done
    status=0; awk -F'\t' -v end="$step_us" 'NR > 1 && ($1 < -20 || $2 < 0 || $1 + $2 > end + 20) { bad = 1 }
        END { exit bad || end <= 0 }' "$files.tsv" || status=1
    gate "no launch outside the step of $step_us us" $status
    local rows events
    rows=$(($(wc -l < "$files.tsv") - 1))
    events=$(grep -oE '"tid": *"stream' "$files.json" | wc -l)
    status=0; [ "$rows" = "$launches" ] && [ "$rows" = "$events" ] || status=1
    gate "as many launches in the log ($launches), table ($rows) and trace ($events)" $status
    status=0; awk 'NR == 2 {
            n = split($0, share, ", ")
            for (i = 1; i <= n; i++) { sub(/%$/, "", share[i]); sub(/.* /, "", share[i]); sum += share[i] }
            exit !(n == 5 && sum >= 99.5 && sum <= 100.5)
        }' "$scratch/said" || status=1
    gate "the five shares sum to 100" $status
    status=0; sed -n 2p "$scratch/said" | grep -qE 'idle [0-9.]+%$' || status=1
    gate "it says how long it was idle: $(sed -n 2p "$scratch/said")" $status
}

if [ "${1:-}" = --check ]; then
    [ $# = 3 ] || die run.sh "--check takes a folder and a step (got $# words)" "run.sh --check runs/mine 3"
    check "$2" "$3"
    finish
fi

config=${1:-configs/quickstart/run.toml}
step=${2:-3}
options=("${@:3}")
preset=cuda
if ! nvidia-smi -L > "$scratch/gpus" 2>&1; then preset=cpu; fi
if [ -z "${PITH_BUILD:-}" ]; then
    ensure_packages
    build $preset pith > "$scratch/build" 2>&1 || { tail -n 5 "$scratch/build"; die build/$preset "does not build" "scripts/build.sh $preset"; }
fi
pith=${PITH_BUILD:-build/$preset}/pith
# The quickstart's corpus: the sources.
if [ $# -lt 1 ]; then
    "$pith" tokenize --tokenizer configs/quickstart/tokenizer.json --format text --join text \
        --include '*.h,*.cpp' --output "$scratch/tokens" --input src 2> /dev/null
    options+=(--set data.path="$scratch/tokens")
fi
# train FOLDER [OPTION...]: leaves the run folder and FOLDER.err; false if it fails.
train() {
    "$pith" train "$config" ${options[@]+"${options[@]}"} --set run.folder="$scratch/$1" \
        --set train.eval_interval=0 --set checkpoint.interval=0 --set train.steps=$((step + 1)) "${@:2}" > "$scratch/$1.err" 2>&1
}
if [ $preset = cpu ]; then
    echo "no GPU here: there are no kernels to record, and --profile-step has to be refused"
    code=0; train refused --profile-step "$step" || code=$?
    status=0; [ $code = 2 ] && grep -q '^error: --profile-step: needs a GPU' "$scratch/refused.err" || status=1
    gate "--profile-step is refused without a GPU" $status
    status=0; [ ! -e "$scratch/refused" ] || status=1
    gate "and nothing is written" $status
    if [ $result = FAIL ]; then cat "$scratch/refused.err"; fi
    finish
fi
cat "$scratch/gpus"
for run in plain profiled; do
    status=0
    if [ $run = plain ]; then train plain || status=1; else train profiled --profile-step "$step" || status=1; fi
    gate "trains: $run" $status
    if [ $status = 1 ]; then tail -n 5 "$scratch/$run.err"; finish; fi
done
check "$scratch/profiled" "$step"
grep -A 13 "profile of step $step:" "$scratch/profiled.err" || true
# Losses and norms as printed in full.
for run in plain profiled; do
    grep -oE '"(cross_entropy_loss|gradient_norm)": *[^,]*' "$scratch/$run/metrics.jsonl" > "$scratch/$run.numbers"
done
status=0; cmp -s "$scratch/plain.numbers" "$scratch/profiled.numbers" && [ -s "$scratch/plain.numbers" ] || status=1
gate "the same losses and gradient norms as without a profile" $status
mkdir -p runs/profile-step
cp "$scratch"/profiled/profile-step-* runs/profile-step/
echo "kept in runs/profile-step"
finish
