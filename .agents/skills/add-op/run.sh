#!/usr/bin/env bash
# run.sh NAME: the op NAME is declared with a contract, implemented, tested, and keeps the rules. See
# SKILL.md. The last line is PASS or FAIL.
set -euo pipefail
source "$(dirname "$0")/../../../scripts/common.sh"
export CCACHE_BASEDIR=${CCACHE_BASEDIR:-$PWD} CCACHE_NOHASHDIR=1
op=${1:-}
[[ $op =~ ^[a-z][a-z0-9_]*$ ]] || die run.sh "needs the name of an op (got \"$op\")" "run.sh rms_norm"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# Each declaration of the op on a line, behind its comment: the lines above it without a blank one
# between, or the end of its own line.
awk -v op="$op" '
    /^$/ { comment = "" }
    /^ *\/\// { comment = comment $0 }
    $0 ~ "^[A-Za-z][A-Za-z0-9_:]* " op "\\(" { inside = 1; text = "" }
    inside {
        text = text $0
        if (/;/) { print comment "\t" text; inside = 0 }
    }' src/ops/ops.h > "$scratch/declared"
status=0; [ -s "$scratch/declared" ] || status=1
gate "declared in src/ops/ops.h" $status "declaring it there: $op(Rank& rank, ..., At at = At::here());"
if [ $status = 1 ]; then finish; fi
status=0; grep -qvE $'\t.*\\(Rank& rank,.*At at = At::here\\(\\)\\);' "$scratch/declared" && status=1
gate "Rank& is its first parameter, At its last" $status
status=0; grep -qE $'^\t[^/]*$' "$scratch/declared" && status=1
gate "a contract: a comment above it, or behind it" $status "formula, shapes, dtypes, source"

# An op without a gradient works in place, outside the tape.
tape=yes
if ! cut -f2 "$scratch/declared" | grep -qvE '^(void|double) '; then tape=no; fi

# A file that defines it.
file=$(grep -lE "^[A-Za-z][A-Za-z0-9_:]* $op\(Rank& " src/ops/*.cpp | head -n 1 || true)
status=0; [ -n "$file" ] || status=1
gate "implemented in ${file:-a file of src/ops}" $status

# The tests that call it, Suite.Name; of an op with a gradient, those that check it.
awk -v op="$op" -v tape=$tape '
    function done() { if (calls && (checks || tape == "no")) print name; calls = checks = 0 }
    /^TEST\(/ { done(); name = $0; gsub(/^TEST\(|\).*/, "", name); gsub(/, */, ".", name) }
    $0 ~ "(^|[^A-Za-z0-9_.])" op "\\(" { calls = 1 }
    /(^|[^A-Za-z0-9_])gradcheck\(/ { checks = 1 }
    END { done() }' tests/ops/*_test.cpp > "$scratch/tests"
status=0; [ -s "$scratch/tests" ] || status=1
gate "tested in tests/ops$([ $tape = no ] || echo ' with gradcheck'): $(paste -sd' ' "$scratch/tests")" $status
if [ $result = FAIL ]; then finish; fi

ensure_packages
status=0
build cpu test_ops > "$scratch/build" 2>&1 || status=1
gate "builds" $status
if [ $status = 1 ]; then grep -E 'error|warning' "$scratch/build" | head -n 5; finish; fi
status=0
OMP_WAIT_POLICY=passive build/cpu/test_ops --gtest_filter="$(paste -sd: "$scratch/tests")" > "$scratch/log" 2>&1 || status=1
grep -qE '^\[  PASSED  \] [1-9]' "$scratch/log" || status=1
gate "its tests pass" $status
if [ $status = 1 ]; then grep -vE '^\[ *(OK|RUN|---|===)' "$scratch/log" | head -n 20; fi

for check in arrows words format map mentions; do
    status=0
    bash tests/structure/$check.sh > "$scratch/log" 2>&1 || status=$?
    if [ $status = 77 ]; then status=0; fi
    gate "tests/structure/$check.sh" $status
    if [ $status != 0 ]; then head -n 10 "$scratch/log"; fi
done
finish
