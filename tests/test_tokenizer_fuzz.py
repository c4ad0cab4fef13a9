"""Ids and offsets of drawn strings, of every code point and of bytes, against Hugging Face tokenizers and tiktoken.

The strings and the comparison are those of fuzz_tokenizer.py, which draws many more.
"""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

import fuzz_tokenizer as fuzz
from tokenizer_texts import CONTEXTS, Source, class_sequences, code_point_texts, invalid_bytes, texts

DRAWN = 20_000
"""Strings for each file."""


@pytest.fixture(params=fuzz.FILES)
def pair(request: pytest.FixtureRequest) -> fuzz.Pair:
    return fuzz.pair(request.param)


def check(pair: fuzz.Pair, strings: list[str]) -> None:
    differing = pair.differing(strings)
    assert not differing, pair.report(fuzz.minimised(differing[0], lambda text: bool(pair.differing([text]))))


def test_ids_and_offsets_of_drawn_strings_are_those_of_the_reference(pair: fuzz.Pair) -> None:
    check(pair, texts(DRAWN, pair.source, seed=1))


def test_ids_and_offsets_of_every_two_classes_are_those_of_the_reference(pair: fuzz.Pair) -> None:
    check(pair, list(class_sequences(2)))


def test_without_added_tokens_the_ids_are_those_of_a_reference_without_them(pair: fuzz.Pair) -> None:
    assert not pair.differing_plain(texts(DRAWN // 4, pair.source, seed=2))


@pytest.mark.parametrize("name", ["deepseek-v3.2", "qwen3", "cl100k"])
def test_every_code_point_has_the_ids_of_the_reference(name: str) -> None:
    pair = fuzz.pair(name)
    for batch in fuzz.batches(code_point_texts(CONTEXTS, pair.separator), 512):
        differing = pair.differing_ids(batch)
        fails = lambda text: bool(pair.differing_ids([text]))  # noqa: E731
        assert not differing, pair.report(fuzz.minimised(differing[0], fails))


def test_bytes_that_are_not_text_follow_their_policy(pair: fuzz.Pair) -> None:
    rng = random.Random(3)
    for _ in range(3000):
        fuzz.check_bytes(pair, invalid_bytes(rng, pair.source))


def test_offsets_in_bytes_are_those_in_characters(pair: fuzz.Pair) -> None:
    for text in texts(2000, pair.source, seed=4):
        ids, characters = pair.ours.encode_with_offsets(text, allowed_special="all")
        same, in_bytes = pair.ours.encode_with_offsets(text, unit="byte", allowed_special="all")
        places = np.cumsum([0, *(len(character.encode()) for character in text)])
        assert in_bytes.tolist() == places[characters].tolist(), text
        assert (ids.dtype, characters.dtype, characters.shape) == (np.uint32, np.uint32, (len(ids), 2))
        assert np.array_equal(ids, same), text


def test_a_flat_batch_is_the_batch(pair: fuzz.Pair) -> None:
    strings = ["", *texts(2000, pair.source, seed=5), ""]
    for allowed in ("none", "all"):
        ids, rows = pair.ours.encode_batch_flat(strings, allowed_special=allowed)
        assert (ids.dtype, rows.dtype, rows[0], rows[-1]) == (np.uint32, np.int64, 0, len(ids))
        expected = pair.ours.encode_batch(strings, allowed_special=allowed)
        assert [ids[a:b].tolist() for a, b in itertools.pairwise(rows)] == expected


def test_a_failing_text_is_cut_down_to_what_fails() -> None:
    assert fuzz.minimised("some 12 text, 345 and x" * 20, lambda text: "1" in text and "x" in text) in ("1x", "x1")
    assert fuzz.minimised("aaa", lambda text: len(text) >= 2) == "aa"
    assert fuzz.minimised("b", lambda text: True) == "b"


def test_the_same_seed_draws_the_same_strings() -> None:
    source = Source((b"ab", b"\xe4\xb8"), ("<s>",))
    assert texts(500, source, seed=7) == texts(500, source, seed=7) != texts(500, source, seed=8)
