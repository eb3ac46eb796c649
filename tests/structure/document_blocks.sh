#!/usr/bin/env bash
# Runs every block fenced as ```sh of README.md and AGENTS.md, in order, in a clean copy of the tree.
# document_blocks.sh [ROOT]
source "$(dirname "$0")/lib.sh"
copy_tree

# Compiling again what was just compiled elsewhere comes from the cache.
export CCACHE_BASEDIR=$copy CCACHE_NOHASHDIR=1 PITH_IN_DOCUMENT=1
cd "$copy"
blocks=$copy/.blocks
mkdir "$blocks"
cat README.md AGENTS.md > /dev/null
awk -v to="$blocks" '
    FNR == 1 { inside = 0 }
    /^```/ && inside { inside = 0; close(out); next }
    /^```sh[ \t]*$/ { inside = 1; out = sprintf("%s/%03d", to, ++n); print "# " FILENAME ":" FNR > out; next }
    inside { print > out }' README.md AGENTS.md
for block in "$blocks"/*; do
    [ -e "$block" ] || { echo "error: README.md, AGENTS.md: no block fenced as sh (got 0, need >= 1)"; exit 1; }
    place=$(sed -n '1s/^# //p' "$block")
    start=$SECONDS
    if ! bash -euo pipefail "$block" > "$block.log" 2>&1 < /dev/null; then
        echo "error: $place: the block failed; its last lines:"
        tail -n 40 "$block.log"
        exit 1
    fi
    echo "$place: $((SECONDS - start)) s"
done
