"""Does transformers load a folder that `pith convert export-hf` wrote, and give our logits?

    python tests/oracle/check_export.py DIR LOGITS [--tokens FILE] [--bar 1e-4] [--dtype float32]

LOGITS is what Pith computed: a .npy [rows, S, V] with --tokens FILE.npy [rows, S]; or a .json
{"tokens": [rows][S], "logits": [rows][S][V], "text": [rows] (optional)}. With "text" and a
tokenizer in DIR, the tokenizer must turn each text into that row's tokens.
Prints the largest relative error of a position's logits (L2) and PASS or FAIL; exits 0, 1, or 2 on
bad usage.
"""

import argparse
import json
import pathlib
import sys

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import common


def bad_input(message):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def read_logits(path, tokens_path):
    if path.suffix == ".npy":
        if tokens_path is None:
            bad_input(f"{path}: no tokens (need --tokens FILE.npy). Try: --tokens tokens.npy")
        return np.load(tokens_path), np.load(path), None
    record = json.loads(path.read_text())
    return np.array(record["tokens"]), np.array(record["logits"], np.float32), record.get("text")


def check_tokenizer(folder, text, tokens):
    """A list of complaints."""
    has = any((folder / f).exists() for f in ("tokenizer.json", "tokenizer_config.json"))
    if not has or text is None:
        print(f"tokenizer: {'present, no text to compare' if has else 'none'}")
        return []
    tokenizer = AutoTokenizer.from_pretrained(folder)
    bad = []
    for row, (line, want) in enumerate(zip(text, tokens)):
        got, want = tokenizer.encode(line), want.tolist()
        if got != want:
            at = next((i for i, (a, b) in enumerate(zip(got, want)) if a != b), None)
            bad.append(f"row {row}: {len(got)} tokens against Pith's {len(want)}, "
                       f"first difference at {min(len(got), len(want)) if at is None else at}")
    print(f"tokenizer: {len(text) - len(bad)} of {len(text)} texts give the same tokens")
    return bad


def check_logits(model, tokens, logits, bar):
    vocab = model.config.vocab_size
    if logits.shape != (*tokens.shape, vocab):
        return [f"logits are {logits.shape}, need {(*tokens.shape, vocab)}"]
    if not np.isfinite(logits).all():
        return ["logits hold NaN or Inf"]
    with torch.no_grad():
        want = model(input_ids=torch.from_numpy(tokens.astype(np.int64)), use_cache=False).logits
    want, got = want.double(), torch.from_numpy(logits).double()
    error = (got - want).norm(dim=-1) / want.norm(dim=-1)
    row, position = divmod(int(error.argmax()), tokens.shape[1])
    same = (got.argmax(-1) == want.argmax(-1)).double().mean().item()
    print(f"logits: max relative error {error.max():.2e} (row {row}, position {position}), "
          f"mean {error.mean():.2e}, same best token {same:.1%}, bar {bar:.0e}")
    return [] if error.max() <= bar else [f"relative error {error.max():.2e}, need <= {bar:.0e}"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("logits", type=pathlib.Path)
    parser.add_argument("--tokens", type=pathlib.Path)
    parser.add_argument("--bar", type=float, default=1e-4)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    for path in (args.folder, args.logits, args.tokens):
        if path is not None and not path.exists():
            bad_input(f"{path}: does not exist. Try: check the path")
    common.start()
    tokens, logits, text = read_logits(args.logits, args.tokens)
    model, info = AutoModelForCausalLM.from_pretrained(
        args.folder, dtype=getattr(torch, args.dtype), attn_implementation="eager",
        experts_implementation="eager", output_loading_info=True)
    problems = [f"{kind}: {sorted(info[kind])}" for kind in
                ("missing_keys", "unexpected_keys", "mismatched_keys") if info.get(kind)]
    problems += check_tokenizer(args.folder, text, tokens)
    problems += check_logits(model.eval(), tokens, logits, args.bar)
    for problem in problems:
        print(problem)
    print("FAIL" if problems else "PASS")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
