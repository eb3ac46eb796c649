#!/usr/bin/env bash
# Includes follow the arrows between the folders of src: app -> engine -> models -> ops -> comm -> core.
source "$(dirname "$0")/lib.sh"

# shellcheck disable=SC2016  # $ is awk's
sources src | xargs awk '
    BEGIN {
        may["core"] = "core"; may["comm"] = "comm core"; may["ops"] = "ops comm core"
        may["models"] = "models ops/ops.h core"; may["data"] = "data core"
        may["observe"] = "observe data core"
        may["engine"] = "engine models ops comm data observe core"
        may["app"] = "app engine models ops comm data observe core"
    }
    /^[ \t]*#[ \t]*include[ \t]*"/ {
        split($0, quoted, "\""); split(FILENAME, from, "/"); header = quoted[2]
        place = FILENAME ":" FNR ": "
        if (!(from[2] in may)) { print place "folder src/" from[2] " has no place in the arrows"; next }
        if (!split(header, to, "/") || header !~ /\//) {
            print place "include without its folder (got \"" header "\", need \"folder/name.h\")"; next
        }
        n = split(may[from[2]], allowed, " "); good = 0
        for (i = 1; i <= n; i++) good = good || allowed[i] == to[1] || allowed[i] == header
        if (!good)
            print place "include against the arrows (got \"" header "\", need one of: " may[from[2]] ")"
    }' | verdict
