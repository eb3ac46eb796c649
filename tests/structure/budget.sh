#!/usr/bin/env bash
# The size of src: lines, bytes, columns, file length.
source "$(dirname "$0")/lib.sh"

# shellcheck disable=SC2016  # $ is awk's
sources src | xargs awk -v lines_max=15000 -v bytes_max=550000 -v columns_max=100 -v file_max=900 '
    { lines++; bytes += length($0) + 1; in_file[FILENAME]++ }
    { gsub(/[\200-\277]/, "") }  # a character of several bytes is one column
    length($0) > columns_max {
        printf "%s:%d: line too long (got %d columns, need <= %d)\n", FILENAME, FNR, length($0), columns_max
    }
    END {
        for (f in in_file) if (in_file[f] > file_max)
            printf "%s: file too long (got %d lines, need <= %d)\n", f, in_file[f], file_max
        if (lines > lines_max) printf "src: too many lines (got %d, need <= %d)\n", lines, lines_max
        if (bytes > bytes_max) printf "src: too many bytes (got %d, need <= %d)\n", bytes, bytes_max
        printf "src: %d lines, %d bytes\n", lines, bytes > "/dev/stderr"
    }' | verdict
