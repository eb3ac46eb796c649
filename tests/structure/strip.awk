# Prints `file:line:code` for every line of C++, with comments and the insides of literals left out.
FNR == 1 { block = 0; raw = "" }
{
    rest = $0; out = ""
    while (rest != "") {
        if (block) {
            at = index(rest, "*/")
            if (!at) { rest = ""; break }
            rest = substr(rest, at + 2); block = 0
        } else if (raw != "") {
            at = index(rest, raw)
            if (!at) { rest = ""; break }
            rest = substr(rest, at + length(raw)); raw = ""; out = out "\""
        } else if (!match(rest, /"|'|\/\/|\/\*/)) {
            out = out rest; rest = ""
        } else {
            mark = substr(rest, RSTART, RLENGTH)
            out = out substr(rest, 1, RSTART - 1)
            rest = substr(rest, RSTART + RLENGTH)
            if (mark == "//") { rest = "" }
            else if (mark == "/*") { block = 1 }
            else if (mark == "\"" && out ~ /(^|[^A-Za-z0-9_])(u8|u|U|L)?R$/) {
                at = index(rest, "(")
                raw = ")" substr(rest, 1, at - 1) "\""; rest = substr(rest, at + 1); out = out "\""
            } else if (mark == "'" && out ~ /[0-9A-Fa-f]$/ && rest ~ /^[0-9A-Fa-f]/) {
                continue  # a digit separator
            } else {
                while (rest != "" && substr(rest, 1, 1) != mark)
                    rest = substr(rest, substr(rest, 1, 1) == "\\" ? 3 : 2)
                rest = substr(rest, 2); out = out mark mark
            }
        }
    }
    print FILENAME ":" FNR ":" out
}
