#!/usr/bin/env bash
# src, tests and bench are formatted by clang-format 14 with the .clang-format of the root.
source "$(dirname "$0")/lib.sh"

tool=
for candidate in clang-format-14 clang-format; do
    if "$candidate" --version 2> /dev/null | grep -q 'version 14\.'; then tool=$candidate; break; fi
done
[ -n "$tool" ] || skip "no clang-format 14 here; other versions format differently"
sources src tests examples bench |
    xargs "$tool" --dry-run 2>&1 | { grep -E '^[^ ]+:[0-9]+:[0-9]+: ' || true; } |
    awk -F: '!seen[$1]++ { print $1 ":" $2 ": not formatted (try: clang-format-14 -i " $1 ")" }' |
    verdict
