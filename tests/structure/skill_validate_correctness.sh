#!/usr/bin/env bash
# The skill validate-correctness passes an unchanged tree and fails one in which the gradients of the
# experts are 4 times too large, which the loss alone does not show.
source "$(dirname "$0")/lib.sh"
copy_tree
cd "$copy"
git init -q
git add -A
git -c user.name=test -c user.email=test@localhost commit -q -m base
skill=.agents/skills/validate-correctness/run.sh

# expect CODE LAST: what the skill says -> $output.
expect() {
    local got=0
    output=$($skill HEAD 2>&1) || got=$?
    if [ $got != "$1" ] || [ "$(tail -n 1 <<< "$output")" != "$2" ]; then
        echo "error: $skill: exit code $got (need $1, $2):"
        echo "$output"
        exit 1
    fi
    echo "$output"
}
expect 0 PASS
sed -i 's|^ *reduce_replicas(rank, parameters);$|&\
    for (FlatUnit\& u : parameters.units)\
        for (int64_t i = 0; u.kind == UnitKind::Experts \&\& i < u.shard_count; i++)\
            u.grad_shard.f32()[i] *= 4;|' src/engine/trainer.cpp
if git diff --quiet; then echo "error: src/engine/trainer.cpp: no fault planted"; exit 1; fi
expect 1 FAIL
# The loss alone, the same to 0.1% at each step, would not have shown it.
loss=$(sed -nE 's/^changed-1: .*difference: loss ([^,]+),.*/\1/p' <<< "$output")
awk -v loss="${loss:-1}" 'BEGIN { exit !(loss + 0 <= 1e-3) }' ||
    { echo "error: the loss shows the fault (got a difference of ${loss:-nothing})"; exit 1; }
