#!/usr/bin/env bash
# static_link.sh PROGRAM: it needs no library that another Linux machine may lack.
set -euo pipefail
if [ -n "${CONDA_PREFIX:-}" ]; then
    echo "skipped: conda-forge has some libraries only as shared ones"
    exit 77
fi
ldd "$1" | awk '{ print $1 }' |
    { grep -vE '^(linux-vdso|libstdc\+\+|libgcc_s|libm|libc|libdl|librt|libpthread|/lib.*/ld-linux.*)\.so' || true; } |
    awk -v program="$1" '{ print "error: " program ": linked to a shared library (got " $0 ")"; n++ } END { exit n > 0 }'
