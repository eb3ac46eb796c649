# From stripped code, `file:line:code`: every declaration at namespace level, on one line, as
# `file:line:kind:text`; kind is `body` when it had one (a function, a struct), else `plain`.
function flush_text(kind) {
    gsub(/[ \t]+/, " ", text); sub(/^ /, "", text)
    if (text != "") print where ":" kind ":" text
    text = ""
}
{
    match($0, /^[^:]*:[0-9]+:/)
    place = substr($0, 1, RLENGTH - 1); code = substr($0, RLENGTH + 1)
    file = place; sub(/:.*/, "", file)
    if (file != last) { last = file; inside = 0; open = 0; text = ""; continued = 0 }
    if (continued || code ~ /^[ \t]*#/) { continued = code ~ /\\$/; next }
    n = length(code)
    for (i = 1; i <= n; i++) {
        c = substr(code, i, 1)
        if (inside) {
            if (c == "{") inside++
            if (c == "}" && !--inside && is_function) flush_text("body")
        } else if (c == "{" && !open) {
            if (text ~ /(^|[ \t])namespace([ \t]|$)|^[ \t]*extern ""[ \t]*$/) { text = ""; continue }
            is_function = text ~ /\(/ && text !~ /=[ \t]*$/
            if (text ~ /^[^(]*(struct|class|enum|union)[ \t]/ && !is_function) kind = "body"
            inside = 1
        } else if (c == "}" && !open) {
            text = ""
        } else if (c == ";" && !open) {
            flush_text(kind == "" ? "plain" : kind); kind = ""
        } else {
            if (c == "(") open++
            if (c == ")") open--
            if (text ~ /^[ \t]*$/ && c !~ /[ \t]/) where = place
            text = text c
        }
    }
    text = text " "
}
