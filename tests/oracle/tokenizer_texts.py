"""Text to compare and time tokenizers on, from a Linux machine's own files and from generators.

collect(kind, limit) gives up to `limit` bytes of a kind as documents:

    english    Perl's manuals (.pod) and GNU's (.info)
    code       C headers, Python and Perl modules
    cjk        Chinese, Japanese, Korean: message catalogues (.mo) and manual pages
    arabic, indic, other      message catalogues of those languages; `other` is the rest

generated(rng, limit) and random_text(rng) make what such files lack: see there.
"""

import gettext
import gzip
import itertools
import pathlib

ROOTS = {
    "english": [("/usr/share/perl", "*.pod"), ("/usr/share/info", "*.info*.gz"),
                ("/usr/share/doc", "*.txt"), ("/usr/share/doc", "*.md"),
                ("/usr/share/doc", "*.html"), ("/usr/share/doc", "changelog*.gz")],
    "code": [("/usr/include", "*.h"), ("/usr/lib/python3.11", "*.py"), ("/usr/lib/python3", "*.py"),
             ("/usr/share/perl", "*.pm"), ("/usr/include", "*.hpp")],
}
LANGUAGES = {
    "cjk": ["zh_CN", "ja", "ko", "zh_TW", "zh_HK"],
    "arabic": ["ar", "fa", "ur", "ug", "he", "ckb"],
    "indic": ["hi", "bn", "ta", "te", "ml", "mr", "gu", "pa", "kn", "or", "as", "ne", "si", "th"],
}


def read(path):
    data = gzip.open(path).read() if path.suffix == ".gz" else path.read_bytes()
    return data.decode("utf-8", "replace")


def files(root, pattern):
    return sorted(path for path in pathlib.Path(root).rglob(pattern)
                  if path.is_file() and not path.is_symlink())


def catalogue(path):
    """The translations of a .mo file, a message a line."""
    try:
        with open(path, "rb") as file:
            messages = gettext.GNUTranslations(file)._catalog
    except (OSError, UnicodeDecodeError, LookupError, ValueError):
        return ""
    return "\n".join(text for key, text in messages.items() if key and isinstance(text, str))


def in_languages(languages):
    for language in languages:
        for path in files(f"/usr/share/locale/{language}", "*.mo"):
            yield catalogue(path)
        for path in files(f"/usr/share/man/{language}", "*.gz"):
            yield read(path)


def texts(kind):
    if kind in ROOTS:
        for root, pattern in ROOTS[kind]:
            for path in files(root, pattern):
                yield read(path)
    elif kind in LANGUAGES:
        yield from in_languages(LANGUAGES[kind])
    else:
        known = set(itertools.chain(*LANGUAGES.values()))
        yield from in_languages(sorted(path.name for path in pathlib.Path("/usr/share/locale")
                                       .iterdir() if path.name not in known))


def collect(kind, limit):
    documents, total = [], 0
    for text in texts(kind):
        size = len(text.encode())
        if size == 0:
            continue
        if total + size > limit:
            text = text.encode()[:limit - total].decode("utf-8", "ignore")
        documents.append(text)
        total += len(text.encode())
        if total >= limit:
            break
    return documents


# ---- generated ----------------------------------------------------------------------------------

PIECES = [*"abcdeABCDE  '''stmdrvlSTML\n\r\t.,!?/-()0123456789", " ", "  ", "\n\n", "\r\n", "'s",
          "'LL", "'\u017f", "\u00a0", "\u3000", "\u2028", "\x85", "\u200b", "\u200d", "\ufeff", "\u00e9",
          "e\u0301", "\u00df", "\u01c5", "\u02b0", "\u00aa", "\u0627", "\u064b", "\u0651", "\u0915",
          "\u094d", "\u093c", "\u093f", "\u4e2d", "\u56fd", "\u65e5\u672c", "\u3072", "\u30ab",
          "\u3099", "\u30fc", "\u30fb", "\ud55c", "\u1112", "\u1161", "\u11ab", "\U0001f600",
          "\U0001f1fa", "\u2764\ufe0f", "\x00", "\x01", "\u0378", "\U0001e030", "\U00011938",
          "\U00011935", "\U00011930", "\u0958", "\u2adc", "\u2126", "\u212b", "\u0344",
          "\u1e9b\u0323", "\u0663", "\u0be7", "\u216b", "\u2460", "\u00b2", "\u00bc", "_", "\\", "`",
          "~", "$", "+", "\u00ab", "\u20ac", "\u2122", "\ue000", "\U0010ffff", "\ufffd",
          "<|endoftext|>", "<|im_start|>", "<think>", "<|return|>", "<\uff5cUser\uff5c>",
          "<\uff5cend\u2581of\u2581sentence\uff5c>", "<|im", "<\uff5c"]


def any_character(rng):
    first, last = rng.choice([(0x20, 0x3000), (0x3000, 0xd800), (0xe000, 0x20000),
                              (0x20000, 0x110000)])
    return chr(rng.randrange(first, last))


def random_text(rng):
    """A short string of pieces that pre-tokenizers, NFC and added tokens treat in special ways."""
    length = rng.choice([1, 2, 3, 5, 8, 13, 40, 200])
    return "".join(rng.choice(PIECES) if rng.random() < 0.85 else any_character(rng)
                   for _ in range(length))


def random_words(rng, first, last):
    return " ".join("".join(chr(rng.randrange(first, last)) for _ in range(rng.randrange(1, 9)))
                    for _ in range(rng.randrange(1, 200)))


SCRIPTS = {"arabic": (0x620, 0x6d4), "devanagari": (0x904, 0x94e), "bengali": (0x985, 0x9ce),
           "tamil": (0xb85, 0xbce), "thai": (0xe01, 0xe4e), "cjk": (0x4e00, 0x9fff),
           "hangul": (0xac00, 0xd7a4), "kana": (0x3041, 0x30ff), "emoji": (0x1f300, 0x1f650),
           "marks": (0x300, 0x370), "hebrew": (0x591, 0x5eb), "cyrillic": (0x400, 0x460),
           "jamo": (0x1100, 0x1200), "fullwidth": (0xff01, 0xff5f)}


def generated(rng, limit):
    """Scripts, very long words, whitespace runs, BOM, CRLF, bytes that are no UTF-8 (replaced)."""
    makers = [
        lambda: random_words(rng, *rng.choice(list(SCRIPTS.values()))),
        lambda: "".join(random_text(rng) for _ in range(rng.randrange(1, 50))),
        lambda: rng.choice(["a", "xy", "\u4e2d", "-=", "\u0e01\u0e33", "Z9", "\u0915\u094d"]) *
        rng.randrange(100, 20000),
        lambda: "".join(rng.choice("abcdefghij") for _ in range(rng.randrange(100, 20000))),
        lambda: rng.choice([" ", "\n", "\t", "\r\n", " \n", "\u3000", " \u00a0"]) *
        rng.randrange(1, 3000) + rng.choice(["", "x", "1", "!"]),
        lambda: "\ufeff" + random_words(rng, 0x61, 0x7b).replace(" ", "\r\n"),
        lambda: rng.randbytes(rng.randrange(1, 3000)).decode("utf-8", "replace"),
        lambda: "".join("a" + "".join(chr(rng.randrange(0x300, 0x370)) for _ in
                                      range(rng.randrange(0, 20))) for _ in range(200)),
    ]
    total = 0
    while total < limit:
        text = rng.choice(makers)()
        total += len(text.encode())
        yield text
