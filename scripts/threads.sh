#!/usr/bin/env bash
# Looks for data races with ThreadSanitizer in what ranks share: the communicator, failures, training
# under a few layouts of 4 to 8 ranks, and checkpoints written beside it. Takes minutes, and is no part of
# scripts/test.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
export CCACHE_BASEDIR=${CCACHE_BASEDIR:-$PWD} CCACHE_NOHASHDIR=1
ensure_packages
build tsan test_comm test_engine
exec ctest --test-dir build/tsan -j "$(nproc)" --output-on-failure --no-tests=error \
    -R '^sanitized\.(comm\.|engine\.Layouts\.|engine\.Checkpoint\.(EveryLayout|TrainingGoesOn|Polling|AFailing))'
