#!/usr/bin/env bash
# Fetches what a shipped configuration needs: the tokenizer, config.json, one shard of DCLM.
#   scripts/get.sh MODEL                  MODEL: a folder of configs/ that is published (qwen3-30b-a3b)
#   scripts/get.sh MODEL --weights        the weights too
#   --mirror URL                          another server with Hugging Face's paths
#   --output DIR                          default: runs/get/MODEL
# Run again, it goes on where it was. Every file is checked against the checksum that the server
# lists for it. HF_TOKEN in the environment is sent where it is set.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() { die scripts/get.sh "$1" "scripts/get.sh qwen3-30b-a3b [--weights] [--mirror URL] [--output DIR]"; }

model='' weights=no server=https://huggingface.co output=''
while [ $# -gt 0 ]; do
    case $1 in
        --weights) weights=yes ;;
        --mirror | --output)
            if [ -z "${2:-}" ]; then usage "$1 lacks its value"; fi
            if [ "$1" = --mirror ]; then server=${2%/}; else output=$2; fi
            shift
            ;;
        -*) usage "unknown option (got $1)" ;;
        *)
            if [ -n "$model" ]; then usage "more than one model (got $model and $1)"; fi
            model=$1
            ;;
    esac
    shift
done
case $model in
    qwen3-30b-a3b) repository=Qwen/Qwen3-30B-A3B eos='<|endoftext|>' ;;
    '') usage "names no model" ;;
    *) usage "no such model (got $model, need qwen3-30b-a3b)" ;;
esac
corpus=datasets/mlfoundations/dclm-baseline-1.0
shards=global-shard_01_of_10/local-shard_0_of_10
shard=shard_00000000_processed.jsonl.zst
output=${output:-runs/get/$model}
mkdir -p "$output"
exec 9> "$output/.lock"
if ! flock -n 9; then die "$output" "another scripts/get.sh writes there" "waiting for it, or --output DIR"; fi
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# request URL OPTION...: curl, with the token kept off the command line. Status in $http and $curl.
request() {
    local url=$1
    shift
    curl=0
    http=$(curl --silent --show-error --fail --location --connect-timeout 20 --speed-limit 1000 \
        --speed-time 60 --write-out '%{http_code}' "$@" "$url" 2> "$scratch/error" \
        --config <(if [ -n "${HF_TOKEN:-}" ]; then echo "header = \"Authorization: Bearer $HF_TOKEN\""; fi)) || curl=$?
}

# give_up URL: says why the last request did not succeed.
give_up() {
    local why
    why=$(sed -n '$s/^curl: //p' "$scratch/error")
    case $http in
        401 | 403) die "$1" "the server refuses access (got $http)" "HF_TOKEN=... in the environment" ;;
        404) die "$1" "is not there (got 404)" "--mirror URL of a server that has it" ;;
        000) die "$server" "cannot be reached ${why:-(curl: $curl)}" "a network, or --mirror URL of a server that can be" ;;
        *) die "$1" "cannot be fetched ${why:-(curl: $curl)}" "the same command later; it goes on where it was" ;;
    esac
}

# listing REPOSITORY [FOLDER]: its files, a line each: "BYTES sha256|git CHECKSUM PATH".
listing() {
    local kind=models name=$1 url
    if [ "${name#datasets/}" != "$name" ]; then kind=datasets name=${name#datasets/}; fi
    url=$server/api/$kind/$name/tree/main${2:+/$2}
    for _ in 1 2 3; do
        request "$url" --output "$scratch/listing"
        if [ "$curl" = 0 ]; then break; fi
    done
    if [ "$curl" != 0 ]; then give_up "$url"; fi
    # An object of the list holds at most one other: "lfs", the file where it is not kept by git.
    tr -d ' \n' < "$scratch/listing" | { grep -oE '\{([^{}]|\{[^{}]*\})*\}' || true; } | awk '
        function value(object, key) {
            if (!match(object, "\"" key "\":\"?[^\",}]+")) return "-"
            object = substr(object, RSTART, RLENGTH)
            sub(/^"[a-z]+":"?/, "", object)
            return object
        }
        { lfs = match($0, /"lfs":\{[^}]*\}/) ? substr($0, RSTART, RLENGTH) : "" }
        { print value($0, "size"), lfs ? "sha256" : "git", value(lfs ? lfs : $0, "oid"), value($0, "path") }
    ' > "$scratch/files"
    if [ ! -s "$scratch/files" ]; then
        die "$url" "is not a list of files with checksums" "--mirror URL of a server with Hugging Face's paths"
    fi
}

size_of() { stat -c %s "$1" 2> /dev/null || echo 0; }

# matches FILE KIND CHECKSUM; a git checksum has the size before the bytes.
matches() {
    if [ "$2" = sha256 ]; then
        [ "$(sha256sum < "$1")" = "$3  -" ]
    else
        [ "$({ printf 'blob %d\0' "$(size_of "$1")" && cat "$1"; } | sha1sum)" = "$3  -" ]
    fi
}

# fetch REPOSITORY PATH: into $output, under its name when whole and right, by the list in $scratch.
fetch() {
    local url=$server/$1/resolve/main/$2 file=$output/${2##*/} size kind checksum before stuck=0
    read -r size kind checksum _ < <(awk -v path="$2" '$4 == path' "$scratch/files") ||
        die "$url" "is not in the server's list" "--mirror URL of a server that has it"
    if [ "$(size_of "$file")" = "$size" ] && matches "$file" "$kind" "$checksum"; then
        echo "$file: there already"
        return
    fi
    echo "$file: $size bytes"
    while [ "$(size_of "$file.part")" != "$size" ]; do
        before=$(size_of "$file.part")
        if [ "$before" -gt "$size" ]; then rm "$file.part" && before=0; fi
        request "$url" --continue-at - --output "$file.part"
        if [ "$http" -ge 400 ] && [ "$http" -lt 500 ]; then give_up "$url"; fi
        # A connection that broke is taken up again as long as something arrives.
        if [ "$(size_of "$file.part")" -gt "$before" ]; then
            stuck=0
        else
            stuck=$((stuck + 1))
            if [ $stuck = 5 ]; then give_up "$url"; fi
            sleep "${PITH_GET_WAIT_S:-$((stuck * 2))}"
        fi
    done
    if ! matches "$file.part" "$kind" "$checksum"; then
        rm "$file.part"
        die "$file" "the bytes that arrived are wrong (need $kind $checksum)" "the same command, which fetches it anew"
    fi
    mv "$file.part" "$file"
}

listing "$repository"
for file in config.json generation_config.json tokenizer_config.json tokenizer.json; do
    fetch "$repository" "$file"
done
if [ $weights = yes ]; then
    while read -r file; do
        fetch "$repository" "$file"
    done < <(awk '$4 ~ /\.safetensors(\.index\.json)?$/ { print $4 }' "$scratch/files")
fi
listing "$corpus" "$shards"
fetch "$corpus" "$shards/$shard"

cat << END
Next:
  build/pith tokenize --tokenizer $output --eos '$eos' --input $output/$shard --output runs/$model-tokens
  build/pith train configs/$model/run.toml --set train.steps=40 --dry-run
END
