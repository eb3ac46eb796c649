#!/usr/bin/env bash
# Builds and runs the tests.
#   scripts/test.sh                     everything; the last lines are ctest's summary
#   scripts/test.sh --quick [FILTER]    after an edit: only the tests whose names match FILTER (a
#                                       regular expression), without the slow ones
set -euo pipefail
source "$(dirname "$0")/common.sh"
export CCACHE_BASEDIR=${CCACHE_BASEDIR:-$PWD} CCACHE_NOHASHDIR=1
jobs=$(nproc)

# programs_for FILTER: the test programs that hold the tests; all of them when that is not known.
programs_for() {
    local folders
    folders=$(ctest --test-dir build/cpu -N -R "$1" 2> /dev/null |
        sed -nE 's/^ *Test +#[0-9]+: ([a-z_]+)\..*/\1/p' | sort -u)
    case $folders in
        '' | *structure*) echo all ;;
        *) awk '{ print "test_" $1 }' <<< "$folders" ;;
    esac
}

quick() {
    local filter=${1:-.}
    if [ "$filter" != . ] && [ -e build/cpu/build.ninja ]; then
        # shellcheck disable=SC2046  # a list of names
        build cpu $(programs_for "$filter")
    else
        build cpu all
    fi
    ctest --test-dir build/cpu -j "$jobs" --output-on-failure --no-tests=error -R "$filter" -LE slow
}

ensure_packages
case ${1:-} in
    --quick) quick "${2:-}"; exit ;;
    '') ;;
    *) die scripts/test.sh "unknown option (got $1, need --quick [FILTER] or nothing)" scripts/test.sh ;;
esac
# A document that shows this command is itself run by a test of this command: then the quick tests do.
if [ -n "${PITH_IN_DOCUMENT:-}" ]; then quick; exit; fi

build cpu all
# Without a GPU, compiling is the test; scripts/gpu.sh runs it on one.
if command -v nvcc > /dev/null; then build cuda pith test_ops; ln -sfn cpu/pith build/pith; fi
build asan all
# One ctest over both builds: one summary.
printf 'subdirs("cpu" "asan")\n' > build/CTestTestfile.cmake
exec ctest --test-dir build -j "$jobs" --output-on-failure --no-tests=error
