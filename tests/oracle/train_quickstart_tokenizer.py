"""Trains configs/quickstart/tokenizer.json: a byte-level BPE of 2,048 entries, in GPT-2's style, on
the project's own sources and documents.

    python tests/oracle/train_quickstart_tokenizer.py

Needs the `tokenizers` of requirements.txt. The result depends on the files' contents, so it changes
when they do; training it again is never needed, and a committed file is not overwritten without
--force.
"""

import argparse
import pathlib
import subprocess
import sys

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
OUTPUT = ROOT / "configs/quickstart/tokenizer.json"
FOLDERS = ("src/", "docs/", "scripts/", "tests/")
SUFFIXES = {".h", ".cpp", ".cu", ".cuh", ".md", ".sh", ".py", ".awk", ".cmake"}
ENTRIES = 2048
END_OF_TEXT = "<|endoftext|>"


def texts():
    listed = subprocess.run(["git", "ls-files", *FOLDERS], cwd=ROOT, check=True,
                            capture_output=True, text=True).stdout.split()
    files = [ROOT / name for name in sorted(listed)
             if not name.startswith("tests/golden/") and pathlib.Path(name).suffix in SUFFIXES]
    return [file.read_text(encoding="utf-8") for file in files if file.exists()]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--force", action="store_true", help="overwrite the committed file")
    arguments = parser.parse_args()
    if OUTPUT.exists() and not arguments.force:
        sys.exit(f"error: {OUTPUT}: exists. Try: --force")
    documents = texts()
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.train_from_iterator(documents, trainers.BpeTrainer(
        vocab_size=ENTRIES, special_tokens=[END_OF_TEXT], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    assert tokenizer.get_vocab_size() == ENTRIES
    for document in documents:
        ids = tokenizer.encode(document).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == document
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(OUTPUT))
    size = sum(len(document.encode()) for document in documents)
    count = sum(len(tokenizer.encode(document).ids) for document in documents)
    print(f"{OUTPUT}: {len(documents)} files, {size} bytes, {size / count:.2f} bytes a token")


if __name__ == "__main__":
    main()
