#!/usr/bin/env bash
# The project speaks only of itself: no paths of one machine, no documents that are not here, no
# tickets, in any file that ships.
source "$(dirname "$0")/lib.sh"

files() {
    find . \( -path ./.git -o -path ./build -o -path ./runs \) -prune -o -type f -print |
        sed 's|^\./||' | { grep -vE '^(LICENSE|tests/golden/.*|tests/structure/(mentions|planted)\.sh)$' || true; } | sort
}

# forbid PATTERN WHAT
forbid() {
    files | tr '\n' '\0' | xargs -0 grep -InHE "$1" | sed -E "s|^([^:]*:[0-9]+):.*|\1: $2|" || true
}

missing_documents() {
    files | tr '\n' '\0' | xargs -0 grep -InHoE '[A-Za-z0-9_./-]*[A-Z][A-Z0-9-]+\.md\b' |
        while IFS=: read -r file line document; do
            if ! find . -name "${document##*/}" -not -path './build/*' -print -quit | grep -q .; then
                echo "$file:$line: names $document, which is not in the repository"
            fi
        done
}

{
    forbid '(^|[^A-Za-z0-9_.<-])/(work|root|mnt|Users|opt/oracle|tmp/b|home/[a-z]+)(/|\b)' 'path of one machine'
    forbid '(^|[^A-Za-z0-9_])[Ii]ssues? #?[0-9]+\b' 'mentions a ticket'
    forbid '\b(deb\.debian\.org|security\.debian\.org|archive\.ubuntu\.com|pypi\.org|files\.pythonhosted\.org)\b' 'names a package host'
    forbid '\b([Hh]elper (session|agent)|[Ss]ub-?agent|[Tt]his (session|brief)|the brief (says|asks)|[Tt]he lead (owns|says|wants|will))\b' 'speaks of how it was written'
    missing_documents
} | verdict
