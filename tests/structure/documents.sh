#!/usr/bin/env bash
# What the documents name exists: links, paths in backticks, AGENTS.md short, CLAUDE.md pointing to it.
source "$(dirname "$0")/lib.sh"

markdown() { find . \( -path ./.git -o -path ./build -o -path ./runs \) -prune -o -name '*.md' -print; }

# Links [text](target) to files.
links() {
    { markdown | xargs -r grep -nHoE '\]\([^)#: ]+[^): ]*\)' || true; } | while IFS=: read -r file line link; do
        target=${link#](}
        target=${target%)}
        target=${target%%#*}
        if [ ! -e "$(dirname "$file")/$target" ]; then
            echo "${file#./}:$line: link to nothing (got $target)"
        fi
    done
}

# `path` in backticks below a folder of the repository; *, {a,b}, <x> and NAME stand for anything.
paths() {
    # shellcheck disable=SC2016
    { markdown | xargs -r grep -nHoE '`(src|scripts|tests|configs|docs|examples|bench|\.agents|\.ci)/[^` ]*`' || true; } |
        while IFS=: read -r file line path; do
            path=${path//\`/}
            path=$(sed -E 's/:[0-9]+$//; s/\{[^}]*\}|<[^>]*>|NAME/*/g' <<< "$path")
            if ! compgen -G "$path" > /dev/null; then
                echo "${file#./}:$line: names a path that is not there (got $path)"
            fi
        done
}

{
    links
    paths
    for file in README.md AGENTS.md LICENSE docs/architecture.md docs/install.md docs/map.md; do
        if [ ! -s "$file" ]; then echo "$file: missing"; fi
    done
    if [ -e AGENTS.md ] && [ "$(wc -l < AGENTS.md)" -gt 150 ]; then
        echo "AGENTS.md: too long (got $(wc -l < AGENTS.md) lines, need <= 150)"
    fi
    if [ "$(cat CLAUDE.md)" != '@AGENTS.md' ]; then echo "CLAUDE.md: need the one line @AGENTS.md"; fi
} | verdict
