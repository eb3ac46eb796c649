#!/usr/bin/env bash
# run.sh [RUN.toml [OPTION...]]: PASS or FAIL for each layout. See SKILL.md.
exec "$(dirname "$0")/../../../scripts/layouts.sh" "$@"
