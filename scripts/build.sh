#!/usr/bin/env bash
# Builds pith: scripts/build.sh [PRESET] [TARGET...]     -> build/PRESET, build/pith
# Presets: cpu (without one), cuda (H100, H200), cuda-blackwell (B200), debug, asan, tsan.
# The program needs no GPU to be built and runs on other x86-64 machines, so a login node will do.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

preset=${1:-cpu}
case $preset in
    cpu | cuda | cuda-blackwell | debug | asan | tsan) shift $(($# > 0)) ;;
    *) die scripts/build.sh "unknown preset (got $preset, need cpu, cuda, cuda-blackwell, debug, asan or tsan)" \
        "scripts/build.sh cpu" ;;
esac
ensure_packages
build "$preset" "$@"
