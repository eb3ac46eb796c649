# shellcheck shell=bash
# Sourced by the other scripts: goes to the root of the repository; packages and builds.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
if [ -t 1 ]; then export CLICOLOR_FORCE=1; fi

# die PLACE 'WHAT (got ..., need ...)' 'what to try': bad input or a machine that lacks something.
die() {
    printf 'error: %s: %s. Try: %s\n' "$1" "$2" "$3" >&2
    exit 2
}

# A program of checks: gate WHAT STATUS [WHAT TO TRY], each; finish prints the verdict and leaves.
result=PASS
gate() {
    if [ "$2" = 0 ]; then echo "ok    $1"; return; fi
    echo "FAIL  $1${3:+. Try: $3}"
    result=FAIL
}
finish() {
    echo $result
    [ $result = PASS ]
    exit
}

# found COMMAND_OR_HEADER
found() {
    case $1 in
        */* | *.h)
            local dir multiarch
            multiarch=/usr/include/$(uname -m)-linux-gnu
            for dir in ${CONDA_PREFIX:+"$CONDA_PREFIX/include"} /usr/include /usr/local/include \
                "$multiarch" "$multiarch/openblas-pthread" /usr/include/openblas; do
                if [ -e "$dir/$1" ]; then return 0; fi
            done
            return 1
            ;;
        *) command -v "$1" > /dev/null ;;
    esac
}

# missing_packages COLUMN: names (1 Debian, 2 conda-forge) of the packages that are not there.
missing_packages() {
    local debian conda probe
    while read -r debian conda probe; do
        case $debian in '' | '#'*) continue ;; esac
        if ! found "$probe"; then
            if [ "$1" = 1 ]; then printf '%s ' "$debian"; else printf '%s ' "$conda"; fi
        fi
    done < scripts/packages.txt
}

# Installs what is missing where that is allowed; else says how to, and leaves with 2. Needs no root
# when nothing is missing.
ensure_packages() {
    local debian as_root
    debian=$(missing_packages 1)
    if [ -z "$debian" ]; then return 0; fi
    as_root=none
    if command -v apt-get > /dev/null; then
        if [ "$(id -u)" = 0 ]; then
            as_root=
        elif sudo -n true 2> /dev/null; then
            as_root='sudo -n'
        fi
    fi
    if [ "$as_root" = none ]; then
        cat >&2 <<END
error: scripts/packages.txt: packages are missing (got user $(id -un), need root to install: $debian). Try one of:
  Debian 12+, Ubuntu 24.04+:  sudo apt-get install -y --no-install-recommends $debian
  conda, no root needed:      conda create -y -n pith -c conda-forge $(sed 's/#.*//' scripts/packages.txt | awk 'NF { printf "%s ", $2 }')&& conda activate pith
  Docker:                     docker build -t pith . && docker run --rm -it pith
END
        exit 2
    fi
    echo "will install with ${as_root:+$as_root }apt-get: $debian"
    # shellcheck disable=SC2086  # both are lists of words
    {
        if ! apt-get install --simulate $debian > /dev/null 2>&1; then
            $as_root apt-get update -q < /dev/null
        fi
        $as_root env DEBIAN_FRONTEND=noninteractive \
            apt-get install -y -q --no-install-recommends $debian < /dev/null
    }
    debian=$(missing_packages 1)
    if [ -n "$debian" ]; then
        die scripts/packages.txt "apt-get ran, yet headers or commands are not found (need $debian)" \
            "a Debian 12+ or Ubuntu 24.04+ machine, or docker build -t pith ."
    fi
}

# Headers that a CUDA build needs beside the toolkit's: CUTLASS and cuDNN's frontend, from PyPI.
ensure_headers() {
    local to=build/headers
    if [ -e $to/include/cudnn_frontend.h ] && [ -e $to/cutlass_library/source/include/cutlass/cutlass.h ]; then
        return 0
    fi
    echo "fetching the headers of CUTLASS and cudnn-frontend from PyPI into $to"
    rm -rf $to
    mkdir -p $to
    python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.11 \
        --platform manylinux_2_28_x86_64 --dest $to/wheels \
        nvidia-cutlass==4.2.0.0 nvidia-cudnn-frontend==1.32.0 ||
        die $to "pip could not fetch them (need python3 with pip, and PyPI)" \
            "a network, or -D PITH_HEADERS=FOLDER with both wheels unpacked"
    for wheel in "$to"/wheels/*.whl; do python3 -m zipfile -e "$wheel" $to; done
    rm -r $to/wheels
}

# build PRESET [TARGET...]: configures and builds in build/PRESET; build/pith is the last one built.
build() {
    local preset=$1
    shift
    if [[ $preset = cuda* ]] && ! command -v nvcc > /dev/null; then
        die scripts/build.sh "no CUDA compiler (got no nvcc in PATH, need CUDA 12.8 or later)" \
            "PATH=/usr/local/cuda/bin:\$PATH scripts/build.sh $preset, or scripts/build.sh cpu"
    fi
    mkdir -p build
    if [[ $preset = cuda* ]]; then ensure_headers; fi
    if ! cmake --preset "$preset" ${CONDA_PREFIX:+-DCMAKE_PREFIX_PATH="$CONDA_PREFIX"} \
        > "build/configure-$preset.log" 2>&1; then
        cat "build/configure-$preset.log" >&2
        die "build/configure-$preset.log" "cmake could not configure preset $preset" \
            "rm -r build/$preset, and install what the message above names"
    fi
    cmake --build --preset "$preset" -j "$(nproc)" ${1:+--target "$@"}
    case $preset in
        cpu | cuda* | debug) if [ -e "build/$preset/pith" ]; then ln -sfn "$preset/pith" build/pith; fi ;;
    esac
}
