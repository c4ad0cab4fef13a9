"""Strings that a tokenizer is likely to get wrong, drawn from a seed.

Each generator is a function of a random number generator and a `Source`, and aims at one part of the path: the splits
(classes of characters next to each other), scanners by blocks (runs at the edges of powers of two), merging (tokens cut
and glued), added tokens (themselves and what nearly is one), normalization (composed and decomposed), UTF-8.
"""

from __future__ import annotations

import functools
import itertools
import random
import sys
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from heedful import Tokenizer

ROOT = Path(__file__).parent.parent

CLASSES = (
    # letters: ASCII of both cases, contractions' letters, Latin, title case, modifier, other, folding to ASCII
    *("a", "Z", "s", "ll", "é", "Ü", "ǅ", "ʰ", "ª", "ß", "ſ", "K", "я", "ش", "ह", "ท", "한", "ᄒ"),
    # the class of DeepSeek's second split, its edges, and what is just outside it
    *("中", "一", "龥", "龦", "あ", "ア", "ー", "・", "゙", "゠", "ㇿ", "々", "㐀", "𠀀"),
    # marks: non-spacing, spacing, enclosing
    *("\u0301", "\u0903", "\u20dd", "\ufe0f"),
    # numbers: decimal of three scripts, letter numbers, others
    *("0", "7", "٣", "７", "Ⅷ", "²", "½", "㉑"),
    # punctuation and symbols, ASCII and not
    *(
        ".",
        "'",
        "-",
        "_",
        "/",
        "!",
        "<",
        "|",
        "(",
        "`",
        "$",
        "+",
        "^",
        "~",
        "…",
        "“",
        "，",
        "｜",
        "€",
        "©",
        "→",
        "😀",
        "🏽",
    ),
    # white space
    *(" ", "  ", "\t", "\n", "\r", "\r\n", "\x0b", "\x0c", "\x85", "\xa0", "\u2003", "\u2028", "\u3000"),
    # neither: controls, format characters, private use, unassigned of old and new tables, noncharacters, U+FFFD
    *("\0", "\x1f", "\x7f", "\u200b", "\u200d", "\ufeff", "\ue000", "\u0378", "\U000323b0", "\U0010ffff", "\ufffd"),
)
"""A representative of every class that a pattern of a served file tells apart, and of its edges."""

CONTRACTIONS = ("'s", "'S", "'ll", "'LL", "'Ll", "'ſ", "'re", "'t", "'d", "'D", "’s", "'x", "''s")
EDGES = (
    1,
    2,
    3,
    4,
    15,
    16,
    17,
    31,
    32,
    33,
    63,
    64,
    65,
    127,
    128,
    129,
    255,
    256,
    257,
    1023,
    1024,
    1025,
    4095,
    4096,
    4097,
)
"""Lengths of runs: those at which a scanner by blocks begins another block."""

_EDGE_WEIGHTS = [1 / edge**0.75 for edge in EDGES]  # long runs cost the reference most


@functools.cache
def excerpts() -> tuple[str, ...]:
    """The texts of this repository."""
    patterns = ("*.md", "Cargo.lock", "python/**/*.py", "rust/**/*.rs", "rust/**/*.tsv", "examples/documents/*.txt")
    paths = sorted(path for pattern in patterns for path in ROOT.glob(pattern) if "target" not in path.parts)
    return tuple(path.read_text(encoding="utf-8") for path in paths)


@dataclass(frozen=True)
class Source:
    """What strings are made of, beside Unicode."""

    tokens: tuple[bytes, ...]
    """The bytes of the vocabulary's tokens, added ones left out."""
    marks: tuple[str, ...]
    """Added tokens."""

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Source:
        """The vocabulary and the added tokens of `tokenizer`."""
        added = tokenizer.added_tokens
        ids = [id for id in range(tokenizer.vocab_size) if tokenizer.id_to_token(id) not in added]
        tokens = (tokenizer.decode_bytes([id]) for id in ids)
        return cls(tuple(token for token in tokens if token), tuple(added))


Generator = Callable[[random.Random, Source], str]


def character(rng: random.Random) -> str:
    """Any of all planes, the common ones more often."""
    kind = rng.random()
    if kind < 0.3:
        return chr(rng.randrange(0x20, 0x7F))
    if kind < 0.45:
        return rng.choice(" \n\r\t\x0b\x0c\x85\xa0\u2028\u3000 ")
    if kind < 0.55:
        return chr(rng.randrange(0x3040, 0x9FA6))
    if kind < 0.7:
        return chr(rng.randrange(0x80, 0x3040))
    while True:
        code_point = rng.randrange(sys.maxunicode + 1)
        if not 0xD800 <= code_point < 0xE000:
            return chr(code_point)


def planes(rng: random.Random, source: Source) -> str:
    """Characters of all planes."""
    return "".join(character(rng) for _ in range(rng.randrange(40)))


def classes(rng: random.Random, source: Source) -> str:
    """Representatives of the splits' classes, now and then a few of one in a row."""
    parts = []
    for _ in range(rng.randrange(1, 14)):
        part = rng.choice(CONTRACTIONS) if rng.random() < 0.08 else rng.choice(CLASSES)
        parts.append(part * (rng.randrange(2, 6) if rng.random() < 0.2 else 1))
    return "".join(parts)


def runs(rng: random.Random, source: Source) -> str:
    """A run of one character whose length is at a power of two, between neighbours."""
    before, behind = (rng.choice(("", *CLASSES)) * rng.randrange(3) for _ in range(2))
    return before + rng.choice(CLASSES) * rng.choices(EDGES, _EDGE_WEIGHTS)[0] + behind


def offsets_in_blocks(rng: random.Random, source: Source) -> str:
    """Something of every class at a place near the end of a block: behind that many letters of words."""
    place = rng.choice((16, 32, 64, 128)) - rng.randrange(4)
    words = "".join(rng.choice("abcdefgh  ") for _ in range(place))
    return words + classes(rng, source)


def walk(rng: random.Random, source: Source) -> str:
    """Tokens glued to each other; some are cut in the middle, of a character as well."""
    glued = bytearray()
    for _ in range(rng.randrange(1, 12)):
        token = rng.choice(source.tokens)
        if rng.random() < 0.25:
            first = rng.randrange(len(token) + 1)
            token = token[first : rng.randrange(first, len(token) + 1)]
        glued += token
    return glued.decode(errors="replace")


def near_miss(rng: random.Random, mark: str) -> str:
    """An added token that is not quite one."""
    at = rng.randrange(len(mark))
    kind = rng.randrange(8)
    if kind == 0:
        return mark[:at] + mark[at + 1 :]
    if kind == 1:
        return mark[:at] + mark[at] * 2 + mark[at + 1 :]
    if kind == 2:
        return mark[:at] + rng.choice(CLASSES) + mark[at:]
    if kind == 3:
        return mark[:at] + mark  # begins, and begins again
    if kind == 4:
        return mark + mark[at:]
    if kind == 5:
        return mark.swapcase()
    if kind == 6:
        return unicodedata.normalize(rng.choice(("NFD", "NFKC")), mark)
    return mark[: at + 1]


def marks(rng: random.Random, source: Source) -> str:
    """Added tokens and near misses of them in text."""
    parts = []
    for _ in range(rng.randrange(1, 8)):
        kind = rng.random()
        if kind < 0.35 and source.marks:
            parts.append(rng.choice(source.marks))
        elif kind < 0.65 and source.marks:
            parts.append(near_miss(rng, rng.choice(source.marks)))
        elif kind < 0.85:
            parts.append(rng.choice(CLASSES))
        else:
            parts.append(rng.choice(source.tokens).decode(errors="replace"))
    return "".join(parts)


def forms(rng: random.Random, source: Source) -> str:
    """Characters composed, decomposed and with marks out of order, which NFC puts right."""
    parts = []
    for _ in range(rng.randrange(1, 12)):
        base = chr(
            rng.choice((rng.randrange(0xC0, 0x250), rng.randrange(0x1E00, 0x2000), rng.randrange(0xAC00, 0xD7A4)))
        )
        parts.append(unicodedata.normalize(rng.choice(("NFC", "NFD", "NFKD")), base))
        if rng.random() < 0.4:
            parts.append(chr(rng.choice((rng.randrange(0x300, 0x370), rng.randrange(0x1100, 0x1200), 0x5BF, 0x3099))))
        if rng.random() < 0.2:
            parts.append(chr(rng.randrange(0xF900, 0xFB50)))
    return "".join(parts)


def excerpt(rng: random.Random, source: Source) -> str:
    """A part of a real text, cut anywhere."""
    text = rng.choice(excerpts())
    first = rng.randrange(len(text))
    return text[first : first + rng.randrange(1, 120)]


def mixture(rng: random.Random, source: Source) -> str:
    """Two of the others in a row."""
    kinds = (planes, classes, walk, marks, excerpt, forms)
    return rng.choice(kinds)(rng, source) + rng.choice(kinds)(rng, source)


GENERATORS: dict[Generator, float] = {
    planes: 3,
    classes: 5,
    runs: 1,
    offsets_in_blocks: 1,
    walk: 3,
    marks: 3,
    forms: 1,
    excerpt: 2,
    mixture: 2,
}
"""The generators and their weights."""


def texts(count: int, source: Source, seed: int | str) -> list[str]:
    """`count` strings of all generators.

    Args:
        count: how many.
        source: what they are made of.
        seed: the same seed gives the same strings.
    """
    rng = random.Random(seed)
    chosen = rng.choices(list(GENERATORS), list(GENERATORS.values()), k=count)
    return [generator(rng, source) for generator in chosen]


def class_sequences(length: int) -> Iterator[str]:
    """Every sequence of `length` classes, by a representative of each."""
    return map("".join, itertools.product(CLASSES, repeat=length))


CONTEXTS = ("{}", " {}", "a{}", "1{}")
"""What every code point is tried in: alone, behind a space, a letter and a digit."""


def code_point_texts(contexts: tuple[str, ...], separator: str) -> Iterator[str]:
    """All 1,112,064 code points in each of the contexts.

    Args:
        contexts: templates with a place for the character.
        separator: an added token. What stands between two of them is normalized, cut and merged by itself, as if it
            were a text of its own; so one string asks for many, and costs the reference a tenth of the time.

    Returns:
        Strings of 256 code points each.
    """
    for first in range(0, sys.maxunicode + 1, 256):
        if not 0xD800 <= first < 0xE000:
            characters = map(chr, range(first, first + 256))
            yield separator.join(context.format(c) for c in characters for context in contexts)


def invalid_bytes(rng: random.Random, source: Source) -> bytes:
    """Bytes that are often not UTF-8: valid text damaged, cut, or with bytes of the edges of UTF-8 put into it."""
    edges = b"\x00\x7f\x80\xbf\xc0\xc1\xc2\xdf\xe0\xed\xef\xf0\xf4\xf5\xff"
    data = bytearray(rng.choice((planes, classes, walk))(rng, source)[:20].encode())
    for _ in range(rng.randrange(4)):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(4)
        if kind == 0:
            data[at:at] = bytes(rng.choices(edges, k=rng.randrange(1, 4)))
        elif kind == 1:
            del data[at : at + rng.randrange(1, 3)]
        elif kind == 2:
            data[at:at] = rng.choice(("\ud800", "\udfff", "\ud83d")).encode(errors="surrogatepass")
        elif data:
            data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)
