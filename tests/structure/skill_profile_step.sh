#!/usr/bin/env bash
# skill_profile_step.sh [PROGRAM]: the checker of the skill profile-step passes a small profile that is
# right and fails it with each fault. With a program: where there is no GPU, the skill sees it refuse.
source "$(dirname "$0")/lib.sh" "$(dirname "$0")/../.."
program=${1:-}
command -v jq > /dev/null || command -v python3 > /dev/null || skip "neither jq nor python3 is here to read JSON"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
faults=0

# fresh: the profile of step 7, of 100 us.
fresh() {
    rm -rf "$scratch/run"
    mkdir "$scratch/run"
    printf '%b' 'start_us\tduration_us\tstream\tstage\tlayer\tmicro_batch\tkernel\n' \
        '0.000\t10.000\t7\tstep\t-1\t-1\tmemset\n' \
        '10.000\t20.000\t7\texperts forward\t0\t2\tnvjet_a\n' \
        '40.000\t20.000\t7\texperts backward\t0\t2\tnvjet_b\n' \
        '60.000\t20.000\t9\texperts weights\t0\t2\tnvjet_b\n' \
        '85.000\t15.000\t7\toptimizer\t-1\t-1\tadamw\n' > "$scratch/run/profile-step-000007.tsv"
    awk -F'\t' 'BEGIN { printf "{\"traceEvents\": [{\"tid\": \"stages\", \"ts\": 0, \"dur\": 100}" }
        NR > 1 { printf ", {\"tid\": \"stream %s\", \"name\": \"%s\", \"ts\": %s, \"dur\": %s}", $3, $7, $1, $2 }
        END { print "]}" }' "$scratch/run/profile-step-000007.tsv" > "$scratch/run/profile-step-000007.json"
    printf '%s\n' '2026-01-01 00:00:00 | INFO | profile of step 7: 0.100 ms, 5 launches' \
        '        ms  share  calls  kernel' '     0.040  40.0%      2  nvjet_b' \
        'matrix products 60.0%, attention 0.0%, memory-bound kernels 25.0%, communication 0.0%, idle 15.0%' \
        > "$scratch/run/log.txt"
}

# expect CODE LAST PATTERN: what the checker says.
expect() {
    local got=0 output
    output=$(.agents/skills/profile-step/run.sh --check "$scratch/run" 7 2>&1) || got=$?
    if [ $got != "$1" ] || [ "$(tail -n 1 <<< "$output")" != "$2" ] || ! grep -qE "$3" <<< "$output"; then
        echo "error: profile-step: exit code $got (need $1, $2, a line of $3):"
        echo "$output"
        exit 1
    fi
}
# fault FILE EDIT PATTERN: the checker fails with the fault, naming it.
fault() {
    fresh
    cp "$scratch/run/$1" "$scratch/right"
    sed -i -E "$2" "$scratch/run/$1"
    if cmp -s "$scratch/run/$1" "$scratch/right"; then echo "error: $1: no change (got $2)"; exit 1; fi
    expect 1 FAIL "$3"
    faults=$((faults + 1))
}
fresh
expect 0 PASS '^ok    .*idle 15.0%$'
fault profile-step-000007.json 's/\]\}//' '^FAIL  the trace is JSON'
fault profile-step-000007.json 's/"stream 9"/"stages"/' '^FAIL  as many launches .*trace \(4\)'
fault profile-step-000007.tsv 's/experts forward//' '^FAIL  every launch has'
fault profile-step-000007.tsv 's/\t9\t/\t\t/' '^FAIL  every launch has'
fault profile-step-000007.tsv 's/experts weights/step/' "^FAIL  a stage like ' weights"
fault profile-step-000007.tsv 's/^85\.000/185.000/' '^FAIL  no launch outside'
fault profile-step-000007.tsv '3d' '^FAIL  as many launches .*table \(4\)'
fault log.txt 's/products 60/products 50/' '^FAIL  the five shares'
fault log.txt 's/, idle.*//' '^FAIL  it says how long'
fault log.txt 's/step 7/step 8/' '^FAIL  '
if [ -n "$program" ] && ! nvidia-smi -L > /dev/null 2>&1; then
    output=$(PITH_BUILD=$(dirname "$program") .agents/skills/profile-step/run.sh 2>&1) || true
    if [ "$(tail -n 1 <<< "$output")" != PASS ]; then
        echo "error: profile-step, without a GPU:"
        echo "$output"
        exit 1
    fi
fi
echo "$faults faults found"
