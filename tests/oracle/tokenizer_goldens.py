"""Writes tests/golden/tokenizer/: a small byte-level BPE model, tokenizers that use it in every
supported way, and Hugging Face's ids and decoded text for each.

    python tests/oracle/tokenizer_goldens.py

    model.json      {"vocab", "merges"}: 700 entries, trained on the texts
    texts.json      the texts
    variants.json   a list of {"name", "tokenizer": all of a tokenizer.json but the model,
                    "model": the model's other members, "ids", "ids_as_text" (special tokens' text
                    as text, none added), "decoded", "decoded_skip": a list each, by text}

The versions are those of requirements.txt; the texts are generated, so the result is always the same.
"""

import json
import random

import tokenizer_texts
import tokenizer_vocabularies as vocabularies
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

OUTPUT = vocabularies.ROOT / "tests/golden/tokenizer"
ENTRIES = 700
BYTE_LEVEL = vocabularies.byte_level()
GPT2 = vocabularies.byte_level(use_regex=True)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<think>", "<\uff5cUser\uff5c>",
           "<\uff5cend\u2581of\u2581sentence\uff5c>"]
DEEPSEEK_V3 = ["\\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
               "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?"
               "[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|" + vocabularies.SPACES.replace(
                   "\\r", "\r").replace("\\n", "\n")]
DEEPSEEK_V2 = [
    "[\r\n]",
    ("\\s?[A-Za-z\xb5\xc0-\xd6\xd8-\xf6\xf8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
     "\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3"
     "-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd"
     "\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-"
     "\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-"
     "\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-"
     "\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126"
     "\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00"
     "-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f"
     "\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-"
     "\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-"
     "\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943]+"),
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    "\\s+$",
    "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
]
SENTENCES = [
    "", " ", "a", "Hello, world! It's 12345 o'clock; they'LL say 'tis WE'VE. I'm here\u2019s.",
    "    indented = [x**2 for x in range(10)]\n\n\n\tif not foo_bar:\r\n        return  None  \n",
    "The quick brown fox\u00a0jumps over the lazy dog.   \n  Twice.", "\ufeffBOM first\r\nCRLF\r\n",
    "cafe\u0301 \u00e9 \u212b \u2126 \u1e9b\u0323 \u0958 \U0001d15e \u2adc\u0651 A\u0323\u0307 A\u0307\u0323",
    "\u4e2d\u6587\u5b57\u7b26\u3002\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8\u3099\ud55c\uad6d\uc5b4 \u1112\u1161\u11ab 123\u56fd456",
    "\u0627\u0644\u0639\u064e\u0631\u064e\u0628\u0650\u064a\u0651\u0629 \u0939\u093f\u0928\u094d\u0926\u0940 \u0e20\u0e32\u0e29\u0e32\u0e44\u0e17\u0e22",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467\u2764\ufe0f\U0001f1fa\U0001f1f3 \x00\x01\u0378\ue000\ufffd\U0010ffff",
    "text<|endoftext|>more <|endoftext|>\n<think>hm</think> <|im_start|><|im_sta<\uff5cUser\uff5c>",
    "foo<mask>bar <mask> baz<strip>  <strip>\n x <left>\t<left>y  <right>  <right>z <word>a <word> b<word>",
    "HTTPServerError parseJSON fooBar ABCdef \u01c5ABC \u4e2dABC \u02b0AB/CD//\n/x http://a.b/c?d=e&f#g",
    "1 12 123 1234 12345 \u0663\u0664 \u216b\u2460\u00b2\u00bd \u0be7\u0be8\u0be9", "a" * 300, "ab" * 80 + " " * 60,
    "x\u200b\u200by \u200b\x00z \x07\x07 \x07a", "don't DON'T don\u2019t '\u017f 's'S 'lL'l 'r 're", "a_b-c.d,e;f:g",
]


def added(token, number, **flags):
    return {**vocabularies.added(token, number), **flags}


def sequence(*steps):
    return {"type": "Sequence", "pretokenizers": list(steps)}


def split(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def variants():
    """Name, members of tokenizer.json, members of its model."""
    special = [added(token, ENTRIES + i, special=i != 2) for i, token in enumerate(SPECIAL)]
    normalized = [added(t["content"], t["id"], normalized=True, special=t["special"])
                  for t in special]
    flags = [added("<mask>", ENTRIES, normalized=True, special=True),
             added("<strip>", ENTRIES + 1, lstrip=True, rstrip=True),
             added("<left>", ENTRIES + 2, lstrip=True, special=False),
             added("<right>", ENTRIES + 3, rstrip=True),
             added("<word>", ENTRIES + 4, single_word=True, special=False, normalized=True),
             added("<word", ENTRIES + 5), added("fox", ENTRIES + 6, special=False, normalized=True),
             added("quick brown", ENTRIES + 7, single_word=True)]
    nfc = {"type": "NFC"}
    for name, pattern in (("qwen2", vocabularies.QWEN2), ("cl100k", vocabularies.CL100K),
                          ("qwen3.5", vocabularies.QWEN35), ("o200k", vocabularies.O200K)):
        steps = sequence(split(pattern), BYTE_LEVEL)
        yield name, {"pre_tokenizer": steps, "added_tokens": special,
                     "normalizer": nfc if name.startswith("qwen") else None}, {
                         "ignore_merges": name == "o200k"}
    yield "gpt2", {"pre_tokenizer": GPT2, "added_tokens": special}, {"string_merges": True}
    yield "deepseek-v3", {"pre_tokenizer": sequence(*map(split, DEEPSEEK_V3), BYTE_LEVEL),
                          "added_tokens": normalized}, {}
    yield "deepseek-v2", {"pre_tokenizer": sequence(
        *map(split, DEEPSEEK_V2), {"type": "Digits", "individual_digits": True}, BYTE_LEVEL),
                          "added_tokens": normalized}, {}
    yield "flags", {"pre_tokenizer": GPT2, "added_tokens": flags,
                    "normalizer": {"type": "Sequence", "normalizers": [nfc]}}, {}
    yield "digits", {"pre_tokenizer": sequence(
        {"type": "Digits", "individual_digits": False}, GPT2)}, {}
    yield "digit-each", {"pre_tokenizer": sequence(
        {"type": "Digits", "individual_digits": True}, BYTE_LEVEL)}, {}
    yield "Isolated", {"pre_tokenizer": sequence(split("\\s|o"), split("e"), BYTE_LEVEL)}, {}
    yield "dropped-bytes", {"pre_tokenizer": GPT2}, {"without": ["e", "\u0120", "\u00c3"]}
    yield "whole-text", {"pre_tokenizer": BYTE_LEVEL, "added_tokens": special}, {}
    yield "lines", {"pre_tokenizer": sequence(
        split("^\\s*\\S+|(?i:THE )|[\\t ]+$|\\p{Nd}{2,}|(?<=o)[^\\p{Ll}\\s]|\\P{L}(?=a)"), BYTE_LEVEL)}, {}


def main():
    rng = random.Random(5)
    texts = SENTENCES + [tokenizer_texts.random_text(rng)[:60] for _ in range(60)]
    trainer_texts = texts + [tokenizer_texts.random_words(rng, *each)[:200] for each in
                             tokenizer_texts.SCRIPTS.values()]
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(trainer_texts * 3, trainers.BpeTrainer(
        vocab_size=ENTRIES, show_progress=False, min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    trained = json.loads(tokenizer.to_str())["model"]
    model = {"vocab": trained["vocab"], "merges": trained["merges"]}
    assert len(model["vocab"]) == ENTRIES
    OUTPUT.mkdir(parents=True, exist_ok=True)
    out = []
    for name, members, changes in variants():
        parts = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
                 "normalizer": None, "post_processor": BYTE_LEVEL, "decoder": BYTE_LEVEL, **members}
        full = {"type": "BPE", "dropout": None, "unk_token": None,
                "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False,
                "byte_fallback": False, "ignore_merges": changes.get("ignore_merges", False)}
        without = changes.get("without", [])
        used = {"vocab": {k: v for k, v in model["vocab"].items()
                          if not any(c in k for c in without)},
                "merges": [m for m in model["merges"] if not any(c in "".join(m) for c in without)]}
        if changes.get("string_merges"):
            used["merges"] = [" ".join(m) for m in used["merges"]]
        tok = tokenizers.Tokenizer.from_str(json.dumps({**parts, "model": {**full, **used}}))
        ids = [tok.encode(text).ids for text in texts]
        tok.encode_special_tokens = True
        as_text = [tok.encode(text, add_special_tokens=False).ids for text in texts]
        out.append({"name": name, "tokenizer": parts, "model": full, "without": without,
                    "string_merges": bool(changes.get("string_merges")), "ids": ids,
                    "ids_as_text": as_text,
                    "decoded": [tok.decode(each, skip_special_tokens=False) for each in ids],
                    "decoded_skip": [tok.decode(each) for each in ids]})
    write = lambda name, value: (OUTPUT / name).write_text(
        json.dumps(value, ensure_ascii=True, separators=(",", ":")) + "\n")
    write("model.json", model)
    write("texts.json", texts)
    (OUTPUT / "variants.json").write_text(
        "[\n" + ",\n".join(json.dumps(each, separators=(",", ":")) for each in out) + "\n]\n")
    print({each.name: each.stat().st_size for each in OUTPUT.iterdir()}, len(out), "variants",
          sum(len(i) for each in out for i in each["ids"]), "ids; tokenizers",
          tokenizers.__version__)


if __name__ == "__main__":
    main()
