#!/usr/bin/env bash
# get.sh PROGRAM: scripts/get.sh against a server that drops connections, lies, and refuses; then what
# it says to do next.
source "$(dirname "$0")/lib.sh" "$(dirname "$0")/../.."
pith=$1
for needed in python3 curl; do
    if ! command -v "$needed" > /dev/null; then skip "no $needed to test downloads with"; fi
done
scratch=$(mktemp -d)
server_id=''
trap 'kill $server_id 2> /dev/null || true; rm -rf "$scratch"' EXIT
tree=$scratch/server model=Qwen/Qwen3-30B-A3B
corpus=datasets/mlfoundations/dclm-baseline-1.0
shards=global-shard_01_of_10/local-shard_0_of_10
mkdir -p "$tree/$model" "$tree/$corpus/$shards"
sed 's/15164[35]/0/' configs/qwen3-30b-a3b/config.json > "$tree/$model/config.json"
cp configs/quickstart/tokenizer.json "$tree/$model"
echo '{}' | tee "$tree/$model/generation_config.json" "$tree/$model/tokenizer_config.json" > /dev/null
head -c 300000 /dev/urandom > "$tree/$model/model-00001-of-00001.safetensors"
echo '{"weight_map": {}}' > "$tree/$model/model.safetensors.index.json"
for i in {1..2000}; do echo "{\"text\": \"Document $i is about $((i * i)).\"}"; done |
    python3 -c 'import gzip, sys; sys.stdout.buffer.write(gzip.compress(sys.stdin.buffer.read(), 1))' > "$scratch/shard.gz"
cp "$scratch/shard.gz" "$tree/$corpus/$shards/shard_00000000_processed.jsonl.zst"

# The server: what the words in the file `mode` say goes wrong. It appends each request to `log`.
cat > "$scratch/server.py" << 'END'
import hashlib, http.server, json, os, re, sys
root, scratch = sys.argv[1:]
class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *words): pass
    def reply(self, code, body=b"", length=None, headers=()):
        self.send_response(code)
        for name, value in headers: self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        mode = open(scratch + "/mode").read().split()
        asked = self.headers.get("Range", "")
        with open(scratch + "/log", "a") as log: log.write(f"{self.path} {asked}\n")
        if "locked" in mode and self.headers.get("Authorization") != "Bearer secret": return self.reply(401)
        listed = re.fullmatch(r"/api/(?:models/|(?=datasets/))(.*)/tree/main/?(.*)", self.path)
        if listed:
            if "html" in mode: return self.reply(200, b"<html>welcome</html>")
            folder = os.path.join(root, listed[1], listed[2])
            return self.reply(200, json.dumps([self.entry(folder, listed[2], f) for f in os.listdir(folder)]).encode())
        name = root + self.path.replace("/resolve/main/", "/")
        body = open(name, "rb").read()
        if "lies" in mode: body = body[:-1] + bytes([body[-1] ^ 1])
        begin = int(asked[6:-1]) if asked else 0
        send = body[begin:begin + 90000] if "drops" in mode else body[begin:]
        if "dead" in mode: send = b""
        self.reply(206 if asked else 200, send, len(body) - begin,
                   [("Content-Range", f"bytes {begin}-{len(body) - 1}/{len(body)}")] if asked else [])
        self.close_connection = True
    def entry(self, folder, below, file):
        body = open(os.path.join(folder, file), "rb").read()
        entry = {"type": "file", "oid": hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest(), "size": len(body)}
        if len(body) > 50000:
            entry["lfs"] = {"oid": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 134}
        return entry | {"path": os.path.join(below, file)}
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
open(scratch + "/port.new", "w").write(str(server.server_port))
os.rename(scratch + "/port.new", scratch + "/port")
server.serve_forever()
END
python3 "$scratch/server.py" "$tree" "$scratch" &
server_id=$!
while [ ! -e "$scratch/port" ]; do sleep 0.1; done
mirror=http://127.0.0.1:$(cat "$scratch/port")
out=$scratch/out
export PITH_GET_WAIT_S=0
unset HF_TOKEN

wrong() {
    echo "error: scripts/get.sh: $1:"
    cat "$scratch/said"
    exit 1
}
# get MODE CODE TEXT OPTION...: exit code and a text that it prints; an error is one line.
get() {
    local code=0 mode=$1 need=$2 text=$3
    shift 3
    echo "$mode" > "$scratch/mode"
    : > "$scratch/log"
    scripts/get.sh qwen3-30b-a3b --mirror "$mirror" --output "$out" "$@" > "$scratch/said" 2>&1 || code=$?
    if [ $code != "$need" ] || ! grep -qF -- "$text" "$scratch/said"; then
        wrong "$mode $*: exit code $code (need $need, and \"$text\")"
    fi
    if [ "$(grep -c '^error: ' "$scratch/said")" != $((need > 0)) ]; then wrong "$mode $*: need one error"; fi
}
same() {
    local name
    for name in "$@"; do
        if ! cmp -s "$out/${name##*/}" "$tree/$name"; then wrong "$name: differs or is missing"; fi
    done
    if compgen -G "$out/*.part" > /dev/null; then wrong "a .part is left"; fi
}
small=("$model"/{config,generation_config,tokenizer_config,tokenizer}.json "$corpus/$shards/shard_00000000_processed.jsonl.zst")
weights=("$model/model-00001-of-00001.safetensors" "$model/model.safetensors.index.json")

get drops 2 "cannot be reached" --mirror http://127.0.0.1:1
get html 2 "is not a list of files with checksums"
get locked 2 "the server refuses access (got 401)"
get dead 2 "the same command later; it goes on where it was"
get lies 2 "the bytes that arrived are wrong"
if [ -e "$out/config.json" ]; then wrong "wrong bytes got a name"; fi
get drops 0 "build/pith tokenize --tokenizer $out"
same "${small[@]}"
if [ "$(grep -c 'tokenizer.json bytes=' "$scratch/log")" != 1 ]; then wrong "tokenizer.json was not resumed"; fi
get drops 0 "tokenizer.json: there already"
if grep -q resolve "$scratch/log"; then wrong "what was there was fetched again"; fi

# Killed in the middle: the same as what is left then, the beginning of a file. Or a wrong one.
head -c 1000 "$tree/$model/tokenizer.json" > "$out/tokenizer.json.part"
rm "$out/tokenizer.json"
get drops 0 "tokenizer.json: "
if ! grep -q 'tokenizer.json bytes=1000-' "$scratch/log"; then wrong "did not go on at byte 1000"; fi
head -c 900 /dev/zero > "$out/config.json.part"
rm "$out/config.json"
get drops 2 "the bytes that arrived are wrong"
HF_TOKEN=secret get "drops locked" 0 "build/pith tokenize" --weights
same "${small[@]}" "${weights[@]}"
rm "$tree/$model/config.json"
get drops 2 "config.json: is not in the server's list"

# What it says to do next; the server's shard is gzip data, so the name is set right.
mv "$out/shard_00000000_processed.jsonl.zst" "$out/shard.jsonl.gz"
"$pith" tokenize --tokenizer "$out" --eos '<|endoftext|>' --input "$out/shard.jsonl.gz" \
    --output "$scratch/tokens" 2> "$scratch/said" || wrong "tokenize"
"$pith" train configs/qwen3-30b-a3b/run.toml --dry-run --set "data.path=$scratch/tokens" \
    --set data.sequence_length=16 --set train.steps=1 --set train.global_batch_size=32 \
    > "$scratch/said" 2>&1 || wrong "train --dry-run"
grep -q '^ranks  *8 = pp 1 \* dp 1 \* cp 1 \* ep 8' "$scratch/said" || wrong "the plan"
