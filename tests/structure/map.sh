#!/usr/bin/env bash
# docs/map.md and the code agree. In a line of the map, each `path` exists and each `symbol` occurs in
# one of that line's paths; every public symbol of ops.h and of the engine's headers is in the map.
source "$(dirname "$0")/lib.sh"
map=docs/map.md
[ -e "$map" ] || { echo "error: $map: missing"; exit 1; }

# `file:line: name` for every type, function, alias and constant declared in the headers.
public_symbols() {
    find src/ops/ops.h src/engine -name '*.h' | sort | xargs awk -f "$here/strip.awk" |
        awk -f "$here/declarations.awk" | awk '
            {
                match($0, /^[^:]*:[0-9]+:[a-z]+:/)
                head = substr($0, 1, RLENGTH); text = substr($0, RLENGTH + 1)
                place = head; sub(/:[a-z]+:$/, "", place)
                gsub(/\[\[[^]]*\]\] */, "", text)
                while (text ~ /^template *</) {
                    sub(/^template */, "", text); deep = 0
                    for (i = 1; i <= length(text); i++) {
                        c = substr(text, i, 1)
                        if (c == "<") deep++
                        if (c == ">" && !--deep) break
                    }
                    text = substr(text, i + 1); sub(/^ */, "", text)
                }
                sub(/^requires +[^ ]+ */, "", text)
                if (text ~ /^(struct|class|union|enum)( class)? /) {
                    if (head ~ /:plain:$/) next  # declared, not defined
                    sub(/^(struct|class|union|enum)( class)? */, "", text)
                    sub(/[^A-Za-z0-9_].*/, "", text); name = text
                } else if (text ~ /^(using|concept) [A-Za-z0-9_]+ *=/) {
                    split(text, word, " "); name = word[2]
                } else {
                    sub(/[(={].*/, "", text); sub(/ *(\[.*)?$/, "", text)
                    sub(/.*[^A-Za-z0-9_]/, "", text); name = text
                }
                if (name != "" && text !~ /^operator/) print place ": " name
            }' | sort -u -k2
}

# `line<TAB>token` for everything in backticks.
tokens() {
    awk '{ n = split($0, part, "`"); for (i = 2; i <= n; i += 2) print FNR "\t" part[i] }' "$map"
}

# Paths and symbols, line by line.
check_line() {
    local line=$1 path symbol
    shift
    local -a paths=() symbols=()
    for path in "$@"; do
        case $path in
            *' '* | -*) ;;
            */* | *.md | *.sh | *.toml | *.json | *.txt | *.cmake) paths+=("$path") ;;
            *) if [[ $path =~ ^[A-Za-z_][A-Za-z0-9_.:]*(\(\))?$ ]]; then symbols+=("${path%()}"); fi ;;
        esac
    done
    for path in ${paths[@]+"${paths[@]}"}; do
        if [ ! -e "$path" ]; then echo "$map:$line: no such path (got $path)"; return; fi
    done
    if [ ${#paths[@]} = 0 ]; then
        if [ ${#symbols[@]} != 0 ]; then echo "$map:$line: symbols without a file (got ${symbols[*]})"; fi
        return
    fi
    for symbol in ${symbols[@]+"${symbols[@]}"}; do
        if ! grep -rqw -- "${symbol##*[.:]}" "${paths[@]}"; then
            echo "$map:$line: no such symbol there (got $symbol, need it in ${paths[*]})"
        fi
    done
}

{
    line= ; words=()
    while IFS=$'\t' read -r at token; do
        if [ "$at" != "$line" ]; then
            if [ -n "$line" ]; then check_line "$line" "${words[@]}"; fi
            line=$at; words=()
        fi
        words+=("$token")
    done < <(tokens)
    if [ -n "$line" ]; then check_line "$line" "${words[@]}"; fi
    public_symbols | awk -v map="$map" '
        NR == FNR { sub(/^[0-9]+\t/, ""); sub(/\(\)$/, ""); sub(/.*::/, ""); known[$0] = 1; next }
        !($2 in known) { print $1 " public symbol not in " map " (got " $2 ")" }' <(tokens) -
} | verdict
