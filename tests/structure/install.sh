#!/usr/bin/env bash
# Installing, with apt-get, sudo and id replaced by ones that only write down what they were asked.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$scratch"/{bin,tree/src}
cp -r "$root"/{scripts,CMakePresets.json} "$scratch/tree"
# The fake apt-get makes the command that the fake package stands for.
cat > "$scratch/bin/apt-get" <<'END'
#!/bin/sh
echo "apt-get $*" >> "$LOG"
case "$*" in *--simulate*) exit "$SIMULATE" ;; *-y*) touch "$BIN/faketool"; chmod +x "$BIN/faketool" ;; esac
END
# shellcheck disable=SC2016
printf '#!/bin/sh\nif [ "$1" = -u ]; then echo "$USER_ID"; else echo somebody; fi\n' > "$scratch/bin/id"
# shellcheck disable=SC2016
printf '#!/bin/sh\n[ "$SUDO_WORKS" = yes ] || exit 1\nshift\nexec "$@"\n' > "$scratch/bin/sudo"
chmod +x "$scratch"/bin/*
export LOG=$scratch/log BIN=$scratch/bin SIMULATE=0 SUDO_WORKS=no

# run USER_ID: ensure_packages as that user -> $output, $status, $LOG.
run() {
    rm -f "$LOG" "$BIN/faketool"
    touch "$LOG"
    status=0
    output=$(PATH=$BIN:$PATH USER_ID=$1 bash -c 'set -e; source scripts/common.sh; ensure_packages; echo built' \
        scripts 2>&1) || status=$?
}
# need WHAT STATUS TEXT...: the exit status, and each text in the output or the log.
need() {
    local what=$1 text
    if [ "$status" != "$2" ]; then echo "error: $what: exit status $status, need $2: $output"; exit 1; fi
    shift 2
    for text in "$@"; do
        if ! grep -qF -- "$text" <<< "$output$(cat "$LOG")"; then
            printf 'error: %s: missing in the output (need %s):\n%s\n%s\n' "$what" "$text" "$output" "$(cat "$LOG")"
            exit 1
        fi
    done
}

cd "$scratch/tree"
printf 'faketool-dev  conda-faketool  faketool\n' > scripts/packages.txt
run 1000
need 'missing, no root' 2 'error: scripts/packages.txt:' 'install -y --no-install-recommends faketool-dev' \
    'conda-forge conda-faketool' 'docker build'
[ ! -s "$LOG" ] || { echo "error: apt-get ran without root"; exit 1; }
[[ $output != *built* ]] || { echo "error: went on to build"; exit 1; }

run 0
need 'missing, root' 0 'will install with apt-get: faketool-dev' 'apt-get install -y' built
if grep -q update "$LOG"; then echo "error: package lists fetched without need"; exit 1; fi
SIMULATE=1 run 0
need 'missing, root, no package lists' 0 'apt-get update' 'apt-get install -y' built
SUDO_WORKS=yes run 1000
need 'missing, sudo without password' 0 'will install with sudo -n apt-get' 'apt-get install -y' built

printf 'bash  bash  bash\n' > scripts/packages.txt
run 1000
need 'nothing missing, no root' 0 built
[ ! -s "$LOG" ] || { echo "error: apt-get ran although nothing was missing"; exit 1; }
printf 'bash  bash  bash\nlibnone-dev none none/none.h\n' > scripts/packages.txt
run 0
need 'not there after installing' 2 'libnone-dev'
echo "6 cases pass"
