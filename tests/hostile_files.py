"""Tokenizer files that want to do harm, and a process that loads one and says what it took.

    python tests/hostile_files.py NAME

tests/test_tokenizer_hostile.py runs it for each.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

from heedful import Tokenizer
from tokenizer_files import added, byte_characters, sequence, small, split

HOSTILE: dict[str, tuple[Callable[[], str], str]] = {}
"""By name: what makes the file's text, and what must come of it: how the outcome begins."""

MANY = 1_000_000


def hostile(name: str, outcome: str = "") -> Callable[[Callable[[], str]], Callable[[], str]]:
    """Enters a maker; an empty outcome leaves open whether the file loads."""

    def enter(make: Callable[[], str]) -> Callable[[], str]:
        HOSTILE[name] = make, outcome
        return make

    return enter


def dumped(**changes: Any) -> str:
    return json.dumps(small(**changes))


def with_vocab(entries: dict[str, int], merges: list[list[str]] | None = None) -> str:
    """The 256 bytes and `entries`."""
    bytes_first = {character: id for id, character in enumerate(byte_characters())}
    return dumped(model={"vocab": bytes_first | entries, "merges": merges or []})


def with_pattern(*patterns: str, literal: bool = False) -> str:
    return dumped(pre_tokenizer=sequence(*(split(pattern, literal=literal) for pattern in patterns)))


# Ids

hostile("an id of 4 billion", "refused: model.vocab: expected ids below")(lambda: with_vocab({"zz": 2**32 - 1}))
hostile("an id beyond 64 bits", "refused: tokenizer.json")(lambda: with_vocab({"zz": 2**70}))
hostile("the highest id, and nothing below it", "refused: model.vocab: expected at most 1048576 ids without")(
    lambda: with_vocab({"zz": 2**24 - 1})
)
hostile("gaps between ids", "loaded")(lambda: with_vocab({f"z{i}": 1000 + 1000 * i for i in range(1000)}))


@hostile("one id for many tokens", "refused: model.vocab: expected an id of its own for each token, got 300 twice")
def _() -> str:
    return with_vocab({f"z{i}": 300 for i in range(300_000)})


@hostile("one token many times", "refused: model.vocab: expected each token once")
def _() -> str:
    return with_vocab({"qq": 300}).replace('"qq": 300', ", ".join(f'"qq": {id}' for id in range(300, 300_000)))


# Added tokens


@hostile("an added token with a huge id", "refused: added_tokens[0]: expected id 271")
def _() -> str:
    return dumped(added_tokens=[added(2**32 - 1, "<s>")])


@hostile("the same added token a million times")
def _() -> str:
    token = json.dumps(added(271, "<s>"))
    return dumped().replace('"added_tokens": []', f'"added_tokens": [{", ".join([token] * MANY)}]')


@hostile("a million added tokens")
def _() -> str:
    return dumped(added_tokens=[added(271 + i, f"<{i}>") for i in range(MANY)])


@hostile("added tokens of 1 MB each")
def _() -> str:
    return dumped(added_tokens=[added(271 + i, chr(97 + i) * 1_000_000) for i in range(20)])


@hostile("added tokens that begin alike")
def _() -> str:
    return dumped(added_tokens=[added(271 + i, "b" * (i + 1)) for i in range(3000)])


# Merges and tokens


@hostile("a million merges of one pair", "loaded")
def _() -> str:
    return dumped(model={"merges": ["h e"] * MANY})


@hostile("a million merges of tokens that are not there", "refused: model.merges[1]: ")
def _() -> str:
    return dumped(model={"merges": ["h e", *["q q"] * MANY]})


@hostile("merges of empty tokens", "refused: model.merges[0]")
def _() -> str:
    return dumped(model={"merges": [["", ""]] * MANY})


@hostile("merges that double", "refused: model.vocab: expected tokens of at most 65536 bytes")
def _() -> str:
    tokens = ["a" * 2**power for power in range(1, 19)]
    halves = [[token[len(token) // 2 :]] * 2 for token in tokens]
    return with_vocab({token: 256 + i for i, token in enumerate(tokens)}, halves)


@hostile("a token of 50 MB")
def _() -> str:
    return with_vocab({"z" * 50_000_000: 256})


# The text of the file


@hostile("a string of a million escapes", "refused: version")
def _() -> str:
    return dumped(version="@").replace("@", r"\u0041" * MANY)


@hostile("deep nesting of lists", "refused: tokenizer.json")
def _() -> str:
    return "[" * 10_000_000


@hostile("deep nesting in a setting", "refused: normalizer: expected at most")
def _() -> str:
    return dumped().replace('"normalizer": null', '"normalizer": ' + '{"a":' * MANY + "1" + "}" * MANY)


@hostile("sequences in sequences")
def _() -> str:
    deep = '{"type": "Sequence", "normalizers": [' * 60 + "]}" * 60
    return dumped().replace('"normalizer": null', f'"normalizer": {deep}')


@hostile("a million unknown keys", "refused: tokenizer.json")
def _() -> str:
    return json.dumps(small() | {f"k{i}": i for i in range(MANY)})


# Components


@hostile("a million steps", "refused: pre_tokenizer")
def _() -> str:
    return dumped(pre_tokenizer=sequence(*[split("a")] * MANY))


@hostile("a million normalizers")
def _() -> str:
    return dumped(normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}] * MANY})


@hostile("a template of a billion ids")
def _() -> str:
    token = {"id": "t", "ids": [3] * MANY, "tokens": ["t"]}
    single = [{"SpecialToken": {"id": "t", "type_id": 0}}] * 1000 + [{"Sequence": {"id": "A", "type_id": 0}}]
    template = {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": {"t": token}}
    return dumped(post_processor=template)


# Patterns

_PATTERN = "refused: pre_tokenizer.pretokenizers[0].pattern"

hostile("repetitions of repetitions", _PATTERN)(lambda: with_pattern(r"(((a{1,100}){1,100}){1,100}){1,100}"))
hostile("repetitions of classes")(lambda: with_pattern(r"\p{L}{1,1000}\p{N}{1,1000}"))
hostile("a quantifier of 4 billion", _PATTERN)(lambda: with_pattern("a{4294967295}"))
hostile("groups in groups", _PATTERN)(lambda: with_pattern("(" * 100_000 + "a" + ")" * 100_000))
hostile("sets in sets", _PATTERN)(lambda: with_pattern("[" * 100_000 + "a" + "]" * 100_000))
hostile("a million alternatives")(lambda: with_pattern("|".join(["ab"] * MANY)))
hostile("look-aheads in a row")(lambda: with_pattern(r"a(?!b)" * 1000))
hostile("a literal of 20 MB")(lambda: with_pattern("a" * 20_000_000, literal=True))
hostile("62 large patterns")(lambda: with_pattern(*(rf"\p{{L}}{{1,200}}|\p{{N}}{{{i}}}" for i in range(1, 63))))


def peak() -> float:
    """The most memory that this process has held since `reset`, in MB."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024


def reset() -> None:
    """Lets the peak begin again at what is held now."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def main(name: str) -> None:
    """Loads a file and encodes a little; prints the outcome, seconds, and MB beyond the file's text."""
    text = HOSTILE[name][0]()
    Tokenizer.from_str(dumped()).encode("hello")  # what is set up once is not the file's
    reset()
    before, began = peak(), time.perf_counter()
    try:
        tokenizer = Tokenizer.from_str(text)
        ids = tokenizer.encode("hello 123 " * 10, allowed_special="all")
        assert tokenizer.decode(ids) or not ids
        outcome = "loaded"
    except ValueError as error:
        outcome = f"refused: {str(error)[:300]}"
    seconds = time.perf_counter() - began
    print(json.dumps({"outcome": outcome, "seconds": round(seconds, 2), "mb": round(peak() - before)}))


if __name__ == "__main__":
    main(sys.argv[1])
