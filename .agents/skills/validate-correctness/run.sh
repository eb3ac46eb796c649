#!/usr/bin/env bash
# run.sh BASE [CHANGED]: two commits (CHANGED: default the working tree) train the same. See SKILL.md.
set -euo pipefail
source "$(dirname "$0")/../../../scripts/common.sh"
base=${1:-}
changed=${2:-}
steps=8
if [ -z "$base" ] || [ $# -gt 2 ]; then die run.sh "takes one or two commits (got $#)" "run.sh HEAD"; fi
ensure_packages
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
tree=$PWD/build/validate-correctness
mkdir -p "$tree"
export CCACHE_BASEDIR=$tree CCACHE_NOHASHDIR=1 OMP_WAIT_POLICY=passive

# program NAME [COMMIT]: builds $scratch/NAME. The sources of both go through one folder, in which
# only what differs is replaced and compiled again.
program() {
    local new=$scratch/sources path
    mkdir "$new"
    if [ -n "${2:-}" ]; then
        git rev-parse -q --verify "$2^{commit}" > /dev/null || die "$2" "is no commit" "git log"
        git archive "$2" src bench CMakeLists.txt CMakePresets.json | tar -xf - -C "$new"
    else
        cp -r src bench CMakeLists.txt CMakePresets.json "$new"
    fi
    if [ -e "$tree/src" ]; then
        (cd "$tree" && find src -type f) | while IFS= read -r path; do
            [ -e "$new/$path" ] || rm "$tree/$path"
        done
    fi
    (cd "$new" && find . -type f) | while IFS= read -r path; do
        if cmp -s "$new/$path" "$tree/$path"; then continue; fi
        mkdir -p "$(dirname "$tree/$path")"
        cp "$new/$path" "$tree/$path"
    done
    rm -r "$new"
    (cd "$tree" && cmake --preset cpu -DPITH_TESTS=OFF && cmake --build --preset cpu --target pith) \
        > "$scratch/build.log" 2>&1 ||
        die "${2:-working tree}" "does not build (its last lines are below)" "building it by itself
$(tail -n 15 "$scratch/build.log")"
    cp "$tree/build/cpu/pith" "$scratch/$1"
}
program base "$base"
program changed "$changed"

"$scratch/base" tokenize --tokenizer configs/quickstart/tokenizer.json --format text --join text \
    --include '*.h,*.cpp' --output "$scratch/tokens" --input src 2> /dev/null

# train RUN PROGRAM [OPTION...]: leaves the run folder $scratch/RUN.
train() {
    local run=$1 program=$2
    shift 2
    "$scratch/$program" train configs/layouts/run.toml --set run.folder="$scratch/$run" \
        --set data.path="$scratch/tokens" --set train.steps=$steps \
        --set router.balance_loss=global-batch --set router.balance_coefficient=1e-2 "$@" \
        > "$scratch/$run.log" 2>&1 ||
        { tail -n 5 "$scratch/$run.log"; echo "$run did not train"; echo FAIL; exit 1; }
}
train base-1 base
train changed-1 changed
train changed-4 changed --ranks 4 --set parallel.pp=2 --set parallel.ep=2

# numbers RUN: "loss balance-loss norm" a step.
numbers() {
    # shellcheck disable=SC2016
    awk 'function of(key) {
            if (!match($0, "\"" key "\": *[^,]*")) return "none"
            return substr($0, RSTART + length(key) + 3, RLENGTH - length(key) - 3)
        }
        { print of("cross_entropy_loss"), of("load_balance_loss"), of("gradient_norm") }' "$scratch/$1/metrics.jsonl"
}
# compare RUN: its metrics and weights against base-1's.
compare() {
    local verdict=PASS
    # shellcheck disable=SC2016
    paste -d' ' <(numbers base-1) <(numbers "$1") | awk -v run="$1" -v steps=$steps '
        function off(a, b) { d = a - b; if (d < 0) d = -d; return b == 0 ? d : d / (b < 0 ? -b : b) }
        !/none|null/ && NF == 6 { for (i = 1; i <= 3; i++) { e = off($(i + 3), $i); if (e > worst[i]) worst[i] = e } ; n++ }
        END {
            printf "%s: %d steps, largest relative difference: loss %.1e, balance loss %.1e, gradient norm %.1e\n",
                run, n, worst[1], worst[2], worst[3]
            exit !(n == steps && worst[1] <= 1e-5 && worst[2] <= 1e-5 && worst[3] <= 1e-5)
        }' || verdict=FAIL
    "$scratch/changed" checkpoint diff "$scratch/base-1" "$scratch/$1" --limit 1e-4 > "$scratch/diff" ||
        verdict=FAIL
    head -n 3 "$scratch/diff" | sed 's/^/    /'
    echo "$verdict  $1"
    [ $verdict = PASS ]
}
result=0
compare changed-1 || result=1
compare changed-4 || result=1
if [ $result = 0 ]; then echo PASS; else echo FAIL; fi
exit $result
