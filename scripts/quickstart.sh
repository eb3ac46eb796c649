#!/usr/bin/env bash
# From text to a Hugging Face checkpoint in a few minutes on a laptop's CPU:
#   scripts/quickstart.sh            learns this project's own sources and documents
#   scripts/quickstart.sh DIR        learns the text files below DIR
# Everything is written below runs/; run it again and it goes on where it was.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if [ $# -gt 1 ]; then die scripts/quickstart.sh "too many arguments (got $#, need at most one folder)" "scripts/quickstart.sh DIR"; fi
if [ $# = 1 ] && [ ! -d "$1" ]; then die "$1" "is not a folder" "scripts/quickstart.sh DIR, with a folder of text files"; fi
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}  # other work on the machine does not stall the threads
ensure_packages
if [ ! -e /proc/driver/nvidia/version ]; then
    echo "no NVIDIA GPU found: running on the CPU"
    build cpu pith
elif ! command -v nvcc > /dev/null; then
    echo "no CUDA compiler (nvcc) found: running on the CPU"
    build cpu pith
else
    build cuda pith
fi

if [ $# = 1 ]; then
    name=$(basename "$(realpath "$1")" | tr -c 'A-Za-z0-9\n' '-')
    text=(--input "$1" --skip-bad)
else
    name=pith
    text=(--input src docs scripts tests examples README.md AGENTS.md
        --include '*.h,*.cpp,*.cu,*.md,*.sh,*.py,*.toml,*.txt')
fi
run=runs/quickstart-$name
tokens=$run-tokens
settings=(--set "run.folder=$run" --set "data.path=$tokens")

echo "== 1. text to tokens"
build/pith tokenize --tokenizer configs/quickstart/tokenizer.json --format text --join text \
    --output "$tokens" "${text[@]}"
count=$(build/pith corpus inspect "$tokens" --top 0 --samples 0 --json | sed -nE 's/.*"tokens": ([0-9]+),.*/\1/p')
if [ "$count" -lt 200000 ]; then
    echo "note: $count tokens are little: the model will learn them by heart and do badly on what is held out." \
        "A megabyte of text or more does better."
fi
echo "== 2. training"
build/pith train configs/quickstart/run.toml "${settings[@]}"
echo "== 3. to Hugging Face's format: $run/hf"
rm -rf "$run/hf"
build/pith convert export-hf "$run" "$run/hf" --tokenizer "$tokens"
echo "== 4. a sample from the exported model"
build/pith generate "$run/hf" --prompt "// The " --max-new-tokens 60 --temperature 0.7 --seed 1
cat <<END

Look at:  $run/report.html
Next:     build/pith train configs/quickstart/run.toml ${settings[*]} --set train.steps=800
          build/pith train configs/quickstart/run.toml ${settings[*]} --ranks 4 \\
              --set parallel.ep=2 --set parallel.pp=2 --set run.folder=$run-4d
END
