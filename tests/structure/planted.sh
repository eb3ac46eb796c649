#!/usr/bin/env bash
# Each check of this folder finds a fault planted in a copy of the tree: it must fail and name the place.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
tree=$scratch/tree
missed=0
planted=0

# fresh: a copy of the repository's texts in $tree.
fresh() {
    rm -rf "$tree"
    mkdir -p "$tree"
    for part in src .agents .ci tests/structure docs scripts README.md AGENTS.md CLAUDE.md CMakePresets.json .clang-format; do
        if [ -e "$root/$part" ]; then
            mkdir -p "$(dirname "$tree/$part")"
            cp -r "$root/$part" "$tree/$part"
        fi
    done
}

# expect CHECK TEXT: the check fails on $tree and prints the text.
expect() {
    local output status=0
    planted=$((planted + 1))
    output=$(bash "$tree/tests/structure/$1.sh" "$tree" 2>&1) || status=$?
    if [ "$status" = 0 ] || [ "$status" = 77 ] || ! grep -qF -- "$2" <<< "$output"; then
        printf 'error: %s.sh missed the fault "%s" (got status %s):\n%s\n' "$1" "$2" "$status" \
            "$(head -n 5 <<< "$output")"
        missed=$((missed + 1))
    fi
}

# plant CHECK FILE LINE TEXT: LINE is appended to FILE.
plant() {
    fresh
    mkdir -p "$(dirname "$tree/$2")"
    printf '%s\n' "$3" >> "$tree/$2"
    expect "$1" "$4"
}

long=$(printf 'x%.0s' {1..101})
plant budget src/core/planted.h "// $long" 'src/core/planted.h:1: line too long'
plant budget src/core/planted.h "$(seq 901)" 'src/core/planted.h: file too long'
plant budget src/core/planted.h "$(seq 15001)" 'src: too many lines'
plant budget src/core/planted.h "$(yes "${long:0:90}" | head -n 6200)" 'src: too many bytes'

while IFS='|' read -r file line; do
    plant arrows "$file" "$line" "$file:1: include"
done <<'END'
src/core/planted.h|#include "ops/ops.h"
src/comm/planted.h|#include "ops/ops.h"
src/ops/planted.h|#include "models/model.h"
src/models/planted.h|#include "engine/trainer.h"
src/models/planted.h|#include "ops/kernels.h"
src/data/planted.h|#include "observe/metrics.h"
src/observe/planted.h|#include "engine/trainer.h"
src/engine/planted.h|#include "app/commands.h"
src/engine/planted.h|#include "trainer.h"
END

while IFS='|' read -r file line; do
    plant words "$file" "$line" "$file:1:"
done <<'END'
src/core/planted.h|struct A { virtual void f(); };
src/core/planted.cpp|auto* b = dynamic_cast<B*>(a);
src/core/planted.cpp|thread_local const int x = 0;
src/core/planted.cpp|using namespace std;
src/core/planted.h|#define SQUARE(x) ((x) * (x))
src/engine/planted.h|void run(std::function<void()> f);
src/ops/planted.cpp|static void f(const std::map<std::string, int>& m) {}
src/core/planted.cpp|static int counter = 0;
src/core/planted.cpp|std::vector<int> table;
src/core/planted.cpp|struct Pool { int n; } pool;
src/models/planted.h|#include <unordered_map>
src/app/planted.h|#include <nlohmann/json.hpp>
src/core/planted.cpp|// run(rank, 3);
src/core/planted.cpp|int x;  // TODO later
END
plant words src/core/planted.cpp "$(printf 'namespace pith {\nint f() {\n    static int calls = 0;\n    return calls++;\n}\n}')" \
    'src/core/planted.cpp:3:'
plant words src/core/planted.cpp "$(printf 'namespace pith {\nnamespace {\nbool seen;\n}\n}')" 'src/core/planted.cpp:3:'

plant mentions src/core/planted.h "// see /wor"'k/notes' 'src/core/planted.h:1: path'
plant mentions docs/planted.md 'As issue 7 asks.' 'docs/planted.md:1: mentions'
plant mentions src/core/planted.h '// see NOWHERE.md' 'src/core/planted.h:1: names NOWHERE.md'
plant mentions scripts/planted.sh '# this session' 'scripts/planted.sh:1: speaks'

# shellcheck disable=SC2016
plant documents docs/planted.md 'Look at `src/core/nowhere.h`.' 'docs/planted.md:1: names a path'
plant documents docs/planted.md '[here](nowhere.txt)' 'docs/planted.md:1: link'
plant documents AGENTS.md "$(seq 151)" 'AGENTS.md: too long'
plant documents CLAUDE.md 'more' 'CLAUDE.md: need'

plant shell scripts/planted.sh 'if then' 'scripts/planted.sh: does not parse'
plant shell scripts/planted.sh 'true' 'scripts/planted.sh: not executable'

fresh
sed -i 's/exit 2/exit 0/' "$tree/scripts/common.sh"
expect install 'missing, no root: exit status 0'

if bash "$root/tests/structure/format.sh" > "$scratch/format" || ! grep -q skipped "$scratch/format"; then
    plant format src/core/planted.h 'int  f( );' 'src/core/planted.h:1: not formatted'
fi

# The map, on a tree of its own, right first and then wrong in each way.
small() {
    fresh
    rm -rf "$tree"/src "$tree"/docs
    mkdir -p "$tree"/src/ops "$tree"/src/engine "$tree"/docs
    printf '%s\n' 'struct Tensor;' '// add: x + y' 'Tensor add(Tensor x, Tensor y = {},' '    int at = 0);' \
        > "$tree/src/ops/ops.h"
    printf '%s\n' 'namespace pith {' 'enum class Kind : int { A, B };' 'template <class M, class N = A<M>>' \
        'struct Step { int begin(); };' 'inline constexpr int kMax[] = {1, 2};' '}' > "$tree/src/engine/step.h"
    # shellcheck disable=SC2016
    printf '%s\n' '| what | where |' '| sums | `src/ops/ops.h`: `add` |' \
        '| steps | `src/engine/step.h`: `Step::begin`, `Step`, `Kind`, `kMax` |' > "$tree/docs/map.md"
}
small
bash "$tree/tests/structure/map.sh" "$tree" || { echo "error: map.sh fails on a right map"; missed=$((missed + 1)); }
while IFS='|' read -r file edit text; do
    small
    sed -i "$edit" "$tree/$file"
    expect map "$text"
done <<'END'
docs/map.md|s/ops\/ops.h/ops\/gone.h/|docs/map.md:2: no such path
docs/map.md|s/begin/start/|docs/map.md:3: no such symbol
docs/map.md|s/`src.ops.ops.h`//|docs/map.md:2: symbols without a file
docs/map.md|s/`Kind`, //|src/engine/step.h:2: public symbol
docs/map.md|s/, `kMax`//|src/engine/step.h:5: public symbol
src/ops/ops.h|$aTensor mul(Tensor x, Tensor y);|src/ops/ops.h:5: public symbol
src/ops/ops.h|$ausing Shape = int;|src/ops/ops.h:5: public symbol
END

# Blocks of the documents.
# shellcheck disable=SC2016
printf '%s\n' 'text' '```sh' 'x=3' 'test "$x" = 3' '```' '```text' 'false' '```' > "$tree/README.md"
cp "$tree/README.md" "$tree/AGENTS.md"
bash "$tree/tests/structure/document_blocks.sh" "$tree" > /dev/null ||
    { echo "error: document_blocks.sh fails on blocks that run"; missed=$((missed + 1)); }
sed -i 's/= 3$/= 4/' "$tree/AGENTS.md"
expect document_blocks 'AGENTS.md:2: the block failed'

if [ -z "${CONDA_PREFIX:-}" ]; then
    planted=$((planted + 1))
    if bash "$here/static_link.sh" "$(command -v cmake)" > "$scratch/link"; then
        echo "error: static_link.sh missed the shared libraries of cmake"
        missed=$((missed + 1))
    fi
fi

echo "$planted faults planted, $missed missed"
[ "$missed" = 0 ]
