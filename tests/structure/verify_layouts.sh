#!/usr/bin/env bash
# verify_layouts.sh PITH: the skill verify-layouts passes what is right and fails a planted fault.
set -euo pipefail
export PITH=$1
options=(--layout "pp2-ep2,dp2-cp2-ep2-layer" --steps 2)

# expect CODE LAST PATTERN COUNT OPTION...: exit code, last line, and lines that match.
expect() {
    local code=$1 last=$2 pattern=$3 count=$4 got=0 output
    shift 4
    output=$("$skill" configs/layouts/run.toml "${options[@]}" "$@" 2>&1) || got=$?
    if [ $got != "$code" ] || [ "$(tail -n 1 <<< "$output")" != "$last" ] ||
        [ "$(grep -cE "$pattern" <<< "$output")" != "$count" ]; then
        echo "error: $skill $*: exit code $got (need $code, $last, $count lines of $pattern):"
        echo "$output"
        exit 1
    fi
}
cd "$(dirname "$0")/../.."
skill=.agents/skills/verify-layouts/run.sh
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"$PITH" tokenize --tokenizer configs/quickstart/tokenizer.json --format text --join text \
    --output "$scratch/tokens" --input src --include '*.h' > /dev/null 2>&1
options+=(--set "data.path=$scratch/tokens")
expect 0 PASS '^PASS  pp' 2
expect 1 FAIL '^FAIL  pp.*gradient .* > 1e-05 \(.*mlp\.experts' 2 --expert-gradient-fault 2
