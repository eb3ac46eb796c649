#!/usr/bin/env bash
# Plants one-line faults in a model file, one at a time, and looks where the first error points. For 18
# of 20 it has to name the edited file and line, whether the compiler or the program says it.
#   fault_locality.sh [-v]        -v prints every first error
source "$(dirname "$0")/lib.sh" "$(dirname "$0")/../.."
table=$here/fault_locality.txt
model=src/models/qwen3_moe.cpp
need=18
verbose=${1:-}

# The tree is copied, so that nothing here touches the real one; unchanged files come from ccache.
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -r src bench CMakeLists.txt CMakePresets.json configs "$copy"
cd "$copy"
export CCACHE_BASEDIR=$copy CCACHE_NOHASHDIR=1
cmake --preset cpu -DPITH_TESTS=OFF > configure.log || { cat configure.log; exit 1; }
cmake --build --preset cpu --target pith > build.log || { tail -n 30 build.log; exit 1; }

# A corpus of some hundred lines, and one step of the quickstart on it.
build/cpu/pith tokenize --tokenizer configs/quickstart/tokenizer.json --format text --join text \
    --output tokens --input src/core > tokenize.log 2>&1 || { cat tokenize.log; exit 1; }
run_step() {
    rm -rf run
    timeout 120 build/cpu/pith train configs/quickstart/run.toml --set run.folder=run \
        --set data.path=tokens --set data.heldout_fraction=0 --set data.max_epochs=1000 \
        --set train.steps=1 --set train.eval_interval=0
}
run_step > step.log 2>&1 || { echo "error: $model: the step fails without a fault"; tail -n 20 step.log; exit 1; }

# statement LINE: the first and last line of the statement that holds the line.
statement() {
    awk -v at="$1" '
        FNR <= at && ended { first = FNR; ended = 0 }
        { ended = /[;{}][ \t]*(\/\/.*)?$/ }
        FNR == 1 { first = 1 }
        FNR >= at && ended { print first, FNR; exit }' "$model"
}

total=0
local_ones=0
cp "$model" right.cpp
while IFS=$'\t' read -r what line_pattern edit; do
    case $what in '' | '#'*) continue ;; esac
    total=$((total + 1))
    line=$(grep -nF -- "$line_pattern" right.cpp | head -n 1 | cut -d: -f1 || true)
    [ -n "$line" ] || { echo "error: $table: no line of $model holds: $line_pattern"; exit 1; }
    sed "${line}s${edit}" right.cpp > "$model"
    if cmp -s right.cpp "$model"; then echo "error: $table: no change (got $edit for line $line)"; exit 1; fi
    read -r first last < <(statement "$line")
    if ! ninja -C build/cpu pith > build.log 2>&1; then
        kind=compiler
        message=$(grep -m1 -E 'error:' build.log || tail -n 1 build.log)
    elif ! PITH_DEBUG=1 run_step > step.log 2>&1; then
        kind=program
        message=$(sed -n '/error:/,$p' step.log | head -n 12)
    else
        kind=none
        message='no error'
    fi
    named=no
    for ((l = first; l <= last; l++)); do
        if grep -qE "(^|[^0-9A-Za-z_])$model:$l([^0-9]|$)" <<< "${message//$copy\//}"; then named=yes; fi
    done
    if [ $named = yes ]; then local_ones=$((local_ones + 1)); fi
    printf '%-3s  %-8s  %s:%d  %s\n' "$named" "$kind" "$model" "$line" "$what"
    if [ $named = no ] || [ "$verbose" = -v ]; then awk '{ print "       " $0 }' <<< "$message"; fi
done < "$table"
cp right.cpp "$model"

echo "$local_ones of $total first errors name the edited line (need $need of 20)"
[ "$total" -ge 20 ] && [ "$((local_ones * 20))" -ge "$((need * total))" ]
