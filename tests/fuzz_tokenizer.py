"""The tokenizer against its references on any number of strings: ids and offsets. Run by `make fuzz-tokenizer`.

    python tests/fuzz_tokenizer.py [--count 1000000] [--seed 0] [--files deepseek-v3.2 qwen3]

For each file: every code point in six contexts, every sequence of three classes, `count` drawn strings, and bytes that
are not UTF-8. A string that gives another result is cut down to what still does, and printed with the seed.
tests/test_tokenizer_fuzz.py draws fewer.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import pytest
import tiktoken
import tokenizers

from heedful import Tokenizer, builtin
from tokenizer_files import CL100K_PATTERN, CL100K_SPECIAL, byte_characters, cl100k_ranks, real, temporary, unpacked
from tokenizer_texts import CONTEXTS, Source, class_sequences, code_point_texts, invalid_bytes, texts

FILES = ("deepseek-v3.2", "deepseek-v4", "qwen3", "cl100k", "built-in")
BATCH = 8192
"""Strings compared at once."""
MORE_CONTEXTS = (*CONTEXTS, "!{}!", "中{}\n")

Offsets = list[tuple[int, int]]


class Reference(Protocol):
    """Whose results are right."""

    normalizes: bool

    def encode(self, texts: list[str]) -> list[tuple[list[int], Offsets]]:
        """Ids and offsets in characters, added tokens recognised."""

    def ids(self, texts: list[str]) -> list[list[int]]:
        """Ids alone, added tokens recognised."""

    def plain(self, texts: list[str]) -> list[list[int]]:
        """Ids, no added token recognised."""


class HuggingFace:
    """`tokenizers`."""

    def __init__(self, document: str) -> None:
        self._all = tokenizers.Tokenizer.from_str(document)
        self._none = tokenizers.Tokenizer.from_str(json.dumps({**json.loads(document), "added_tokens": []}))
        self.normalizes = "NFC" in repr(self._all.normalizer)

    def encode(self, texts: list[str]) -> list[tuple[list[int], Offsets]]:
        """Ids and offsets in characters, added tokens recognised."""
        return [(e.ids, e.offsets) for e in self._all.encode_batch(texts, add_special_tokens=False)]

    def ids(self, texts: list[str]) -> list[list[int]]:
        """Ids alone, added tokens recognised."""
        return [e.ids for e in self._all.encode_batch_fast(texts, add_special_tokens=False)]

    def plain(self, texts: list[str]) -> list[list[int]]:
        """Ids, no added token recognised."""
        return [e.ids for e in self._none.encode_batch_fast(texts, add_special_tokens=False)]


class Tiktoken:
    """`tiktoken`. It has the beginnings of tokens only; a token's end is that of the character its last byte is in."""

    normalizes = False

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self._encoding = encoding

    def encode(self, texts: list[str]) -> list[tuple[list[int], Offsets]]:
        """Ids and offsets in characters, added tokens recognised."""
        return [(ids, self._offsets(ids)) for ids in self.ids(texts)]

    def ids(self, texts: list[str]) -> list[list[int]]:
        """Ids alone, added tokens recognised."""
        return self._encoding.encode_batch(texts, num_threads=2, allowed_special="all")

    def _offsets(self, ids: list[int]) -> Offsets:
        begun = (sum(byte & 0xC0 != 0x80 for byte in token) for token in self._encoding.decode_tokens_bytes(ids))
        return list(zip(self._encoding.decode_with_offsets(ids)[1], itertools.accumulate(begun), strict=True))

    def plain(self, texts: list[str]) -> list[list[int]]:
        """Ids, no added token recognised."""
        return self._encoding.encode_ordinary_batch(texts, num_threads=2)


@dataclass(frozen=True)
class Pair:
    """Ours and its reference, of one file."""

    ours: Tokenizer
    reference: Reference
    source: Source = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "source", Source.of(self.ours))

    @property
    def separator(self) -> str:
        """The shortest of the added tokens that no other begins with or ends with."""
        marks = self.source.marks
        alone = (m for m in marks if not any(m in other for other in marks if other != m))
        return min(alone, key=len)

    def expected(self, texts: list[str]) -> list[tuple[list[int], Offsets]]:
        """The reference's ids and offsets."""
        return self.reference.encode(texts)

    def got(self, texts: list[str]) -> list[tuple[list[int], Offsets]]:
        """Ours."""
        batch = self.ours.encode_batch(texts, allowed_special="all")
        results = []
        for text, ids in zip(texts, batch, strict=True):
            with_offsets, offsets = self.ours.encode_with_offsets(text, allowed_special="all")
            same = with_offsets.tolist() == ids
            results.append((ids, [(first, end) for first, end in offsets.tolist()] if same else []))
        return results

    def differing(self, texts: list[str]) -> list[str]:
        """Those of `texts` whose ids or offsets are not the reference's."""
        pairs = zip(texts, self.got(texts), self.expected(texts), strict=True)
        return [text for text, got, expected in pairs if got != expected]

    def differing_ids(self, texts: list[str]) -> list[str]:
        """Those of `texts` whose ids are not the reference's."""
        pairs = zip(texts, self.ours.encode_batch(texts, allowed_special="all"), self.reference.ids(texts), strict=True)
        return [text for text, got, expected in pairs if got != expected]

    def differing_plain(self, texts: list[str]) -> list[str]:
        """Those of `texts` whose ids are not the reference's when no added token is recognised."""
        pairs = zip(texts, self.ours.encode_batch(texts), self.reference.plain(texts), strict=True)
        return [text for text, got, expected in pairs if got != expected]

    def report(self, text: str) -> str:
        """A string and both results."""
        return f"{text!a}\n  ours     {self.got([text])[0]}\n  expected {self.expected([text])[0]}"


@functools.cache
def pair(name: str) -> Pair:
    """Ours and the reference, of one of `FILES`."""
    if name != "cl100k":
        built_in = builtin.path() / "tokenizer.json"
        document = built_in.read_text(encoding="utf-8") if name == "built-in" else real(name)
        return Pair(Tokenizer.from_str(document), HuggingFace(document))
    reference = tiktoken.Encoding(
        "cl100k", pat_str=CL100K_PATTERN, mergeable_ranks=cl100k_ranks(), special_tokens=CL100K_SPECIAL
    )
    with temporary(unpacked("cl100k_base.tiktoken")) as path:
        ours = Tokenizer.from_tiktoken(path, CL100K_PATTERN, CL100K_SPECIAL)
    return Pair(ours, Tiktoken(reference))


def minimised(text: str, fails: Callable[[str], bool]) -> str:
    """A text that still fails, and of which no single character can be left out (ddmin, by characters)."""
    parts = 2
    while len(text) > 1:
        size = -(-len(text) // parts)
        for first in range(0, len(text), size):
            shorter = text[:first] + text[first + size :]
            if fails(shorter):
                text, parts = shorter, max(parts - 1, 2)
                break
        else:
            if size == 1:
                break
            parts = min(parts * 2, len(text))
    return text


# Bytes


def valid_parts(data: bytes) -> Iterator[str | bytes]:
    """The parts of `data` that are UTF-8, as text, and between them those that are not, as bytes."""
    while data:
        try:
            yield data.decode()
            return
        except UnicodeDecodeError as error:
            if error.start:
                yield data[: error.start].decode()
            yield data[error.start : error.end]
            data = data[error.end :]


def check_bytes(pair: Pair, data: bytes) -> None:
    """Asserts what each policy makes of `data`.

    strict: an error at the byte where `bytes.decode` has one. replace: the ids of `data.decode(errors="replace")`.
    raw: each part that is UTF-8 has the ids of itself as a text of its own, each other byte is the byte's token; so the
    bytes of the ids are the data, unless a normalizer changed a part.
    """
    ours = pair.ours
    assert ours.encode(data, errors="replace") == ours.encode(data.decode(errors="replace")), data
    byte_ids = [ours.token_to_id(c) for c in byte_characters()]
    expected: list[int | None] = []
    for part in valid_parts(data):
        expected += ours.encode(part) if isinstance(part, str) else [byte_ids[byte] for byte in part]
    ids = ours.encode(data, errors="raw")
    assert ids == expected, data
    assert pair.reference.normalizes or ours.decode_bytes(ids) == data, data
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        with pytest.raises(ValueError, match=f"another byte at {error.start} "):
            ours.encode(data)
    else:
        assert ours.encode(data) == ours.encode(text) == ids, data


# The long run


def batches(items: Iterable[str], size: int) -> Iterator[list[str]]:
    """Lists of `size`, the last one shorter."""
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def drawn(pair: Pair, count: int, seed: int) -> Iterator[str]:
    """`count` strings; each batch has a seed of its own, so that it can be drawn again without those before it."""
    for first in range(0, count, BATCH):
        yield from texts(min(BATCH, count - first), pair.source, f"{seed}/{first}")


class Run:
    """One file's comparison: progress, and the strings that differed."""

    def __init__(self, name: str, seed: int) -> None:
        self.name, self.seed, self.failed = name, seed, 0
        self.pair = pair(name)

    def stage(self, title: str, strings: Iterable[str], differing: Callable[[list[str]], list[str]]) -> None:
        """Compares `strings` and prints what differed, cut down."""
        began, done, size, shown = time.monotonic(), 0, 0, 0.0
        for batch in batches(strings, BATCH if title != "code points" else 512):
            for text in differing(batch):
                self.failed += 1
                if self.failed <= 10:
                    shortest = minimised(text, lambda shorter: bool(differing([shorter])))
                    print(f"\n{self.name}, {title}, seed {self.seed}: {self.pair.report(shortest)}")
            done, size = done + len(batch), size + sum(map(len, batch))
            seconds = time.monotonic() - began
            if seconds - shown >= 2:
                shown = seconds
                print(f"\r{self.name}, {title}: {done:,} strings, {self.failed} differ", end="", flush=True)
        seconds = time.monotonic() - began
        line = f"{self.name}, {title}: {done:,} strings, {size / 1e6:.1f} M characters, {seconds:.0f} s"
        print(f"\r{line}, {self.failed} differ", flush=True)

    def bytes_stage(self, count: int) -> None:
        """Checks `count` byte strings."""
        rng = random.Random(f"{self.seed}/bytes")
        for _ in range(count):
            try:
                check_bytes(self.pair, invalid_bytes(rng, self.pair.source))
            except AssertionError as error:
                self.failed += 1
                if self.failed <= 10:
                    print(f"\n{self.name}, bytes, seed {self.seed}: {error}")
        print(f"{self.name}, bytes: {count:,} strings, {self.failed} differ")


def main() -> int:
    """Runs the comparison; 1 if anything differed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1_000_000, help="drawn strings for each file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--files", nargs="+", default=FILES, choices=FILES)
    args = parser.parse_args()
    failed = 0
    for name in args.files:
        run = Run(name, args.seed)
        points = code_point_texts(MORE_CONTEXTS, run.pair.separator)
        run.stage("code points", points, run.pair.differing_ids)
        run.stage("classes", itertools.chain(class_sequences(2), class_sequences(3)), run.pair.differing)
        run.stage("drawn", drawn(run.pair, args.count, args.seed), run.pair.differing)
        run.stage("no added tokens", drawn(run.pair, args.count // 4, args.seed + 1), run.pair.differing_plain)
        run.bytes_stage(args.count // 50)
        failed += run.failed
    print(f"{failed} differ" if failed else "no difference")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
