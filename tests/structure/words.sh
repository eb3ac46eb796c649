#!/usr/bin/env bash
# The rules of the house that a search can see; AGENTS.md gives the reasons.
source "$(dirname "$0")/lib.sh"

code=$(mktemp)
trap 'rm -f "$code"' EXIT
stripped > "$code"

# forbid PATTERN WHAT [FILES [EXCEPT]]: no line of code matches; FILES and EXCEPT are patterns of paths.
forbid() {
    { grep -E "^(${3:-[^:]*}):[0-9]+:.*($1)" "$code" || true; } |
        { grep -vE "^(${4:-nothing}):" || true; } | sed -E "s|^([^:]*:[0-9]+):.*|\1: $2|"
}

# The whole comment is a call or an assignment that ends like a statement; an example of use is indented.
commented_out_code() {
    sources src | xargs grep -nE '^ *// ?([A-Za-z_][A-Za-z0-9_:<>*&., ]* )?[A-Za-z_][A-Za-z0-9_.>-]*(\(.*\)| \+?= .*);$' |
        sed -E 's|^([^:]*:[0-9]+):.*|\1: commented-out code|' || true
}

function_statics() {
    { grep -E '^[^:]*:[0-9]+: +static +[A-Za-z_][A-Za-z_0-9:<>,*& ]* [A-Za-z_][A-Za-z_0-9]*(\[[^]]*\])? *(=|;|\{)' \
        "$code" || true; } | { grep -vE '^src/core/process\.cpp:|\b(const|constexpr)\b' || true; } |
        sed -E 's|^([^:]*:[0-9]+):.*|\1: static variable in a function or struct|'
}

# A variable at namespace level that is not constant.
mutable_globals() {
    awk -f "$here/declarations.awk" "$code" |
        sed -E 's/:body:((static )?(struct|class|union|enum( class)?)( [A-Za-z_0-9]+)? [a-z_][A-Za-z_0-9]*(\[[^]]*\])?( =)? *)$/:plain:variable \1/' |
        { grep ':plain:' || true; } |
        { grep -vE '^src/core/process\.cpp:|:plain:(\[\[.*\]\] )?(using|namespace|typedef|struct|class|enum|union|template|friend|extern|static_assert)\b' || true; } |
        { grep -vE ':plain:[^=]*\(|:plain:.*\b(const|constexpr|consteval)\b' || true; } |
        sed -E 's|^([^:]*:[0-9]+):.*|\1: mutable global; what a function depends on is in its parameters|'
}

# Each heavy library is the business of one or two .cpp files, and of no header.
heavy_libraries() {
    local library files
    for library in nlohmann/ rapidjson/ toml++/ CLI/ pcre2.h utf8proc.h zstd.h zlib.h cblas.h; do
        files=$(sources src | xargs grep -lF "#include <$library" || true)
        if [ "$(wc -w <<< "$files")" -gt 2 ]; then
            echo "src: <$library is included by more than two files (got ${files//$'\n'/ })"
        fi
        { grep -E '\.(h|cuh)$' <<< "$files" || true; } | xargs -r grep -nHF "#include <$library" |
            sed -E "s|^([^:]*:[0-9]+):.*|\1: heavy library <$library in a header|"
    done
}

heavy='iostream|sstream|fstream|iomanip|filesystem|regex|functional|thread|mutex|condition_variable|future|chrono|random|map|unordered_map|memory|algorithm'
{
    forbid '\bvirtual\b' 'virtual function; call directly'
    forbid '\bdynamic_cast\b' 'dynamic_cast'
    forbid '\bthread_local\b' 'thread_local; pass Rank'
    forbid '\busing +namespace\b' 'using namespace'
    forbid '# *define +[A-Za-z_0-9]+\(' 'function-like macro; write a function' '[^:]*' '.*/ptx\.cuh'
    forbid 'std::function\b' 'std::function in a header' '[^:]*\.(h|cuh)'
    forbid 'map<(std::)?string' 'lookup by string outside the readers of files and commands' \
        'src/(core|comm|ops|models)/[^:]*' 'src/core/json\.(h|cpp)'
    function_statics
    forbid "# *include +<($heavy)>" 'heavy header; models and the headers they use stay light' \
        'src/((core/(check|tensor|tape|rank|allocator|rng)|ops/[^:]*|models/[^:]*)\.h|models/[^:]*\.cpp)'
    mutable_globals
    heavy_libraries
    commented_out_code
    { sources src tests; find scripts -type f; } |
        xargs grep -nE '\b(TODO|FIXME|XXX|HACK)\b' | sed -E 's|^([^:]*:[0-9]+):.*|\1: unfinished work|' || true
} | verdict
