#!/usr/bin/env bash
# On a machine with a GPU: every row of the op tests on it, compared with the CPU, the golden tests of
# the model, and the benchmarks of Qwen3-30B-A3B of 3 layers. The last line is PASS (exit code 0) or
# FAIL (1); 2 without a GPU.
#   scripts/gpu.sh                     builds preset cuda first
#   PITH_BUILD=FOLDER scripts/gpu.sh   with the programs built there
set -euo pipefail
source "$(dirname "$0")/common.sh"

gpus=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2> /dev/null) ||
    die scripts/gpu.sh "no GPU (got no answer of nvidia-smi, need an NVIDIA GPU and its driver)" scripts/test.sh
if [ -z "${PITH_BUILD:-}" ]; then
    ensure_packages
    build cuda pith test_ops test_engine
fi
programs=${PITH_BUILD:-build/cuda}
[ -x "$programs/test_ops" ] ||
    die "$programs" "no program test_ops (need a build of preset cuda)" "scripts/build.sh cuda test_ops"

printf '%s\n' "$gpus"
echo "$(date -u +%FT%TZ), commit $(git rev-parse --short HEAD 2> /dev/null || echo unknown)"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
OMP_WAIT_POLICY=passive "$programs/test_ops" --gtest_filter=-Slow* 2>&1 | tee "$log" || result=FAIL
# A test that was skipped found no GPU; the program's summary is there when it compared something.
if grep -q '  SKIPPED ' "$log" || ! grep -qE '^on the GPU: [1-9]' "$log"; then result=FAIL; fi
OMP_WAIT_POLICY=passive "$programs/test_engine" --gtest_filter='Golden.*' 2>&1 | tail -n 3 || result=FAIL
q1=bench/configs/q1.toml
"$programs/pith" bench train $q1 --micro-batch 1,2,4,8 || result=FAIL
"$programs/pith" bench train $q1 --micro-batch 1 --weight-grad-batch 4 || result=FAIL
"$programs/pith" bench floor $q1 || result=FAIL
"$programs/pith" bench ops || result=FAIL
finish
