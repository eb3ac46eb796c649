#!/usr/bin/env bash
# Proves that parallel layouts train the same model as one rank; PASS or FAIL a layout, exit code 1 if
# one differs.
#   scripts/layouts.sh [RUN.toml [OPTION...]]         every layout of up to 16 ranks once
#   scripts/layouts.sh --all [RUN.toml [OPTION...]]   each also with replicated weights (hsdp), with
#                                                     weights gathered by layer, and in micro-batches of
#                                                     2; then every layout with each balance loss
# OPTIONs are those of layouts_check (tests/layouts), such as --layout pp2-ep4 --set train.global_batch_size=32; with
# --layout only the named ones are run. Without RUN.toml: a small model on this project's sources.
# PITH names a built pith, with layouts_check beside it, to use instead of building them.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
export OMP_WAIT_POLICY=passive

all=no
if [ "${1:-}" = --all ]; then
    all=yes
    shift
fi
config=
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then
    config=$1
    shift
fi
if [ -n "$config" ] && [ ! -e "$config" ]; then
    die "$config" "is not there" "scripts/layouts.sh RUN.toml"
fi
pith=${PITH:-build/cpu/pith}
if [ -z "${PITH:-}" ]; then
    ensure_packages
    build cpu pith layouts_check
fi
layouts_check=$(dirname "$pith")/layouts_check

if [ -z "$config" ]; then
    config=configs/layouts/run.toml
    if [ ! -e runs/layouts-tokens ]; then
        "$pith" tokenize --tokenizer configs/quickstart/tokenizer.json --format text --join text \
            --output runs/layouts-tokens --input src --include '*.h,*.cpp' > /dev/null
    fi
fi

# product: names of the full product, a line each.
product() {
    local pp dp cp ep shard gather size
    for pp in 1 2 4; do for dp in 1 2; do for cp in 1 2; do for ep in 1 2 4; do
        if [ $((pp * dp * cp * ep)) -gt 16 ]; then continue; fi
        for shard in '' -hsdp; do
            if [ "$dp$shard" = 1-hsdp ]; then continue; fi
            for gather in '' -layer; do for size in '' -mb2; do
                echo "pp$pp-dp$dp-cp$cp-ep$ep$shard$gather$size"
            done; done
        done
    done; done; done; done
}

result=0
if [ $all = yes ]; then
    "$layouts_check" "$config" --layout "$(product | paste -sd,)" "$@" || result=1
    for kind in micro-batch sequence global-batch; do
        echo "balance loss: $kind"
        "$layouts_check" "$config" --all --set router.balance_loss=$kind \
            --set router.balance_coefficient=1 "$@" || result=1
    done
else
    case " $* " in
        *' --layout'*) ;;
        *) set -- --all "$@" ;;
    esac
    "$layouts_check" "$config" "$@" || result=1
fi
if [ $result = 0 ]; then echo PASS; else echo FAIL; fi
exit $result
