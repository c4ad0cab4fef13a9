"""The texts of the tokenizer benchmark, each by a name, so that every process makes the same ones.

`english/3` is the fourth million bytes of the English corpus, `adversarial/spaces/0` a megabyte of spaces, and any name
with a leading `@` a file.
"""

from __future__ import annotations

import base64
import functools
import random
import re
from collections.abc import Callable
from pathlib import Path

MEGABYTE = 1_000_000

KINDS = {"english": "English", "code": "code", "json": "JSON", "chinese": "Chinese"}


@functools.cache
def corpus(folder: Path, kind: str) -> bytes:
    """A corpus, UTF-8."""
    return (folder / f"{kind}.txt").read_bytes()


def slices(folder: Path) -> int:
    """How many whole slices the smallest corpus has."""
    return min((folder / f"{kind}.txt").stat().st_size for kind in KINDS) // MEGABYTE


def bytes_of(rng: random.Random) -> bytes:
    """3/4 of a megabyte of random bytes."""
    return rng.randbytes(MEGABYTE * 3 // 4)


def repeated(character: str) -> Callable[[random.Random], str]:
    """A megabyte of one character, or a little less: the length is another each time."""
    count = MEGABYTE // len(character.encode())
    return lambda rng: character * (count - rng.randrange(1000))


ADVERSARIAL: dict[str, Callable[[random.Random], str]] = {
    "one letter": repeated("a"),
    "spaces": repeated(" "),
    "newlines": repeated("\n"),
    "!": repeated("!"),
    "one Han character": repeated("中"),
    "random letters": lambda rng: "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=MEGABYTE)),
    "base64": lambda rng: base64.b64encode(bytes_of(rng)).decode(),
    "hex": lambda rng: bytes_of(rng)[: MEGABYTE // 2].hex(),
    "digits": lambda rng: "".join(rng.choices("0123456789", k=MEGABYTE)),
    "ZWJ emoji": lambda rng: "".join(rng.choices(FAMILIES, k=MEGABYTE // 20)),
    "random bytes": lambda rng: bytes_of(rng)[: MEGABYTE // 2].decode(errors="replace"),
}

FAMILIES = ["👨‍👩‍👧‍👦", "👩‍💻", "🏳️‍🌈", "👩🏽‍🚀", "🧑‍🤝‍🧑", "❤️‍🔥", "👨🏿‍⚕️", "🐻‍❄️"]


def lines(folder: Path, kind: str) -> list[str]:
    """The distinct lines of a corpus with 40 to 60 characters; longer ones are cut."""
    found = (line.strip()[:60] for line in corpus(folder, kind).decode().splitlines())
    return list(dict.fromkeys(line for line in found if len(line) >= 40))


def text(folder: Path, name: str) -> str:
    """The text of a name."""
    if name.startswith("@"):
        return Path(name[1:]).read_text(encoding="utf-8")
    kind, _, rest = name.partition("/")
    if kind == "adversarial":
        made, _, repeat = rest.rpartition("/")
        return ADVERSARIAL[made](random.Random(f"{made} {repeat}"))
    start = int(rest) * MEGABYTE
    return corpus(folder, kind)[start : start + MEGABYTE].decode(errors="ignore")


WORDS = re.compile(r"[A-Za-z]{6,}|[\u4e00-\u9fa5]{4,}")


def recombined(folder: Path, seed: int) -> str:
    """A megabyte that no corpus has: shuffled lines, in which a third of the longer words got another word's ending."""
    rng = random.Random(seed)
    source = text(folder, f"{rng.choice(list(KINDS))}/{rng.randrange(slices(folder))}")
    endings = [word[len(word) // 2 :] for word in WORDS.findall(source)] or [""]

    def other(match: re.Match[str]) -> str:
        word = match[0]
        return word if rng.random() > 1 / 3 else word[: len(word) // 2] + rng.choice(endings)

    shuffled = source.splitlines(keepends=True)
    rng.shuffle(shuffled)
    return WORDS.sub(other, "".join(shuffled))
