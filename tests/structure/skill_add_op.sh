#!/usr/bin/env bash
# The skill add-op passes an op that is right, and fails it with a fault in its gradient, its
# declaration, its tests or the map, all in a copy of the tree.
source "$(dirname "$0")/lib.sh"
copy_tree
export CCACHE_BASEDIR=$copy CCACHE_NOHASHDIR=1
cd "$copy"

# expect CODE LAST PATTERN: what the skill says of softplus.
expect() {
    local got=0 output
    output=$(.agents/skills/add-op/run.sh softplus 2>&1) || got=$?
    if [ $got != "$1" ] || [ "$(tail -n 1 <<< "$output")" != "$2" ] || ! grep -qE "$3" <<< "$output"; then
        echo "error: add-op: exit code $got (need $1, $2, a line of $3):"
        echo "$output"
        exit 1
    fi
}
# fault FILE EDIT PATTERN: the skill fails with the fault, naming it.
fault() {
    cp "$1" right
    sed -i -E "$2" "$1"
    if cmp -s "$1" right; then echo "error: $1: no change (got $2)"; exit 1; fi
    expect 1 FAIL "$3"
    mv right "$1"
}
expect 0 PASS '^ok    its tests pass'
fault src/ops/formula.h 's/(SoftplusGrad: return g \* logistic\(a\))/\1 * T(1.001)/' \
    'softplus.*gradient of input 0'
fault src/ops/ops.h 's/^(Tensor softplus.*, )At at = At::here\(\)\);/\1At at);/' '^FAIL  Rank& is its first'
fault src/ops/ops.h 's/^(Tensor) softplus/\1 softer/' '^FAIL  declared'
fault tests/ops/general_test.cpp 's/softplus\(r, x\)/relu(r, x)/; s/softplus\(t/relu(t/' '^FAIL  tested'
# shellcheck disable=SC2016
fault docs/map.md 's/`softplus`, //' '^FAIL  tests/structure/map.sh'
echo "5 faults found"
