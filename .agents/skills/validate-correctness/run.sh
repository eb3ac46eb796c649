#!/usr/bin/env bash
# run.sh BASE [CHANGED]: two commits (CHANGED: default the working tree) train the same. See SKILL.md.
set -euo pipefail
source "$(dirname "$0")/../../../scripts/common.sh"
base=${1:?usage: run.sh BASE [CHANGED]}
changed=${2:-}
steps=12
scratch=$(mktemp -d)
trap 'git worktree prune; rm -rf "$scratch"' EXIT
export CCACHE_BASEDIR=$scratch CCACHE_NOHASHDIR=1 OMP_WAIT_POLICY=passive

# tree NAME [COMMIT]: a copy of the sources at $scratch/NAME, built.
tree() {
    mkdir "$scratch/$1"
    if [ -n "${2:-}" ]; then
        git rev-parse -q --verify "$2^{commit}" > /dev/null || die "$2" "is no commit" "git log"
        git archive "$2" src CMakeLists.txt CMakePresets.json | tar -xf - -C "$scratch/$1"
    else
        cp -r src CMakeLists.txt CMakePresets.json "$scratch/$1"
    fi
    (cd "$scratch/$1" && cmake --preset cpu -DPITH_TESTS=OFF > configure.log &&
        cmake --build --preset cpu --target pith > build.log) ||
        die "${2:-working tree}" "does not build (see below)" "build it by itself
$(tail -n 15 "$scratch/$1"/*.log)"
}
tree base "$base"
tree changed "$changed"

"$scratch/base/build/cpu/pith" tokenize --tokenizer configs/quickstart/tokenizer.json --format text \
    --join text --include '*.h,*.cpp' --output "$scratch/tokens" --input "$scratch/base/src" 2> /dev/null

# train NAME TREE [SETTING...]: leaves run folder $scratch/NAME.
train() {
    local name=$1 tree=$2
    shift 2
    "$scratch/$tree/build/cpu/pith" train configs/quickstart/run.toml --set run.folder="$scratch/$name" \
        --set data.path="$scratch/tokens" --set data.heldout_fraction=0 --set train.eval_interval=0 \
        --set train.steps=$steps --set data.sequence_length=64 --set train.micro_batch_size=1 \
        --set checkpoint.interval=0 "$@" > "$scratch/$name.log" 2>&1 ||
        { tail -n 5 "$scratch/$name.log"; echo "FAIL: $name did not train"; exit 1; }
}
train base-1 base
train changed-1 changed
train changed-4 changed --ranks 4 --set parallel.pp=2 --set parallel.ep=2

# compare RUN: its metrics and weights against base-1's.
compare() {
    local verdict=PASS
    # shellcheck disable=SC2016
    paste <(numbers base-1) <(numbers "$1") | awk -v run="$1" '
        function off(a, b) { d = a - b; if (d < 0) d = -d; return b == 0 ? d : d / (b < 0 ? -b : b) }
        { for (i = 2; i <= 4; i++) { e = off($(i + 4), $i); if (e > worst[i]) worst[i] = e } ; n++ }
        END {
            printf "%s: %d steps, largest relative difference: loss %.1e, balance loss %.1e, gradient norm %.1e\n",
                run, n, worst[2], worst[3], worst[4]
            exit !(n > 0 && worst[2] <= 1e-5 && worst[3] <= 1e-5 && worst[4] <= 1e-5)
        }' || verdict=FAIL
    "$scratch/changed/build/cpu/pith" checkpoint diff "$scratch/base-1" "$scratch/$1" --limit 1e-4 || verdict=FAIL
    echo "$verdict: $1"
    [ $verdict = PASS ]
}
# numbers RUN: "step loss balance norm" a step.
numbers() {
    sed -E 's/.*"step": ([0-9]+),.*"cross_entropy_loss": ([^,]+),.*"load_balance_loss": ([^,]+),.*"gradient_norm": ([^,]+),.*/\1 \2 \3 \4/' \
        "$scratch/$1/metrics.jsonl"
}
result=0
compare changed-1 || result=1
compare changed-4 || result=1
if [ $result = 0 ]; then echo PASS; else echo FAIL; fi
exit $result
