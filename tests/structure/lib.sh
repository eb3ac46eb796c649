# shellcheck shell=bash
# Sourced by every check: NAME.sh [ROOT] looks at the tree ROOT and prints a line a fault.
set -euo pipefail
export LC_ALL=C
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "${1:-$here/../..}"

# Reads faults, `PLACE: WHAT`, a line each; fails when there is one.
verdict() {
    awk '{ print "error: " $0; n++ } END { exit n > 0 }'
}

# Leaves as a skipped test, saying why.
skip() {
    echo "skipped: $*"
    exit 77
}

# sources FOLDER...: the C++ and CUDA files below the folders that exist.
sources() {
    local folder
    for folder in "$@"; do
        if [ -d "$folder" ]; then printf '%s\n' "$folder"; fi
    done | xargs -r -I{} find {} -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | sort
}

# The code of src without comments and string contents, `file:line:code`.
stripped() {
    sources src | xargs awk -f "$here/strip.awk"
}

# copy_tree: a copy of the repository's files at $copy, removed at the end.
copy_tree() {
    copy=$(mktemp -d)
    trap 'rm -rf "$copy"' EXIT
    if git rev-parse --git-dir > /dev/null 2>&1; then
        git ls-files -coz --exclude-standard |
            { while IFS= read -r -d '' f; do [ ! -e "$f" ] || printf '%s\0' "$f"; done; }
    else
        find . \( -path ./build -o -path ./runs \) -prune -o -type f -print0
    fi | tar -cf - --null -T - | tar -xf - -C "$copy"
}
