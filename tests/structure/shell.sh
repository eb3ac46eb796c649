#!/usr/bin/env bash
# Every shell script parses, can be executed, and passes shellcheck where that is installed.
source "$(dirname "$0")/lib.sh"

scripts() { find scripts tests .agents .ci -name '*.sh' -o -path .ci/run | sort; }

{
    scripts | while read -r script; do
        if ! bash -n "$script" 2> /dev/null; then echo "$script: does not parse"; fi
        case $script in
            */common.sh | */lib.sh) ;;
            *) if [ ! -x "$script" ]; then echo "$script: not executable (try: chmod +x $script)"; fi ;;
        esac
    done
    if command -v shellcheck > /dev/null; then
        scripts | xargs shellcheck -x -P SCRIPTDIR -f gcc | sed -E 's/^([^:]*:[0-9]+):[0-9]+: [a-z]+:/\1:/' || true
    fi
} | verdict
