"""Decoding, whole and token by token: characters in parts, prompts, stop strings, copies, batches."""

from __future__ import annotations

import base64
import copy
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from heedful import Tokenizer, TokenStream, push_batch
from tokenizer_files import added, byte_characters, real, small

ALPHABET = byte_characters()
WORDS = [
    "ab",
    "aba",
    "é",
    "中文",
    "😀",
    "\N{REPLACEMENT CHARACTER}",
    "a word of just16",
    "a token far longer than a slot is 中文",
]


def spelled(data: bytes) -> str:
    """Bytes as tokenizer.json writes them."""
    return "".join(ALPHABET[byte] for byte in data)


def made() -> Tokenizer:
    """Ids 0 to 255 are the bytes; then words, two of which break characters, and three added tokens."""
    tokens = [word.encode() for word in WORDS] + ["é".encode()[1:] + b"a", b"a" + "中".encode()[:2]]
    vocab = {token: id for id, token in enumerate([*ALPHABET, *map(spelled, tokens)])}
    size = len(vocab)
    added_tokens = [added(size, "<end>", special=True), added(size + 1, "<user>"), added(size + 2, "<é>", special=True)]
    return Tokenizer.from_str(json.dumps(small(model={"vocab": vocab, "merges": []}, added_tokens=added_tokens)))


OURS = made()
SIZE = OURS.vocab_size
REAL = Tokenizer.from_str(real("deepseek-v3.2"))
REFERENCE = tokenizers.Tokenizer.from_str(real("deepseek-v3.2"))

edges = st.sampled_from(b"ab\x80\xa9\xc3\xe4\xb8\xad\xed\xf0\x9f\x98\xc0\xf5")
one_id = st.one_of(edges, st.integers(256, SIZE + 1), st.integers(0, 255), st.just(2**32 - 1))
some_ids = st.lists(one_id, max_size=24)
stops = st.lists(st.text("abé中\N{REPLACEMENT CHARACTER}", min_size=1, max_size=4), max_size=3)


def texts(stream: TokenStream, ids: list[int]) -> str:
    return "".join([*map(stream.push, ids), stream.flush()])


def begun(data: bytes) -> bytes:
    """The end of bytes that may become a character."""
    for size in (3, 2, 1):
        try:
            data[-size:].decode()
        except UnicodeDecodeError as error:
            if error.reason == "unexpected end of data" and error.start == 0:
                return data[-size:]
    return b""


@given(ids=some_ids, skip=st.booleans())
def test_texts_and_flush_are_the_decoded_ids(ids: list[int], skip: bool) -> None:
    data = OURS.decode_bytes(ids, skip_special_tokens=skip)
    whole = OURS.decode(ids, skip_special_tokens=skip)
    assert whole == data.decode(errors="replace")
    assert texts(OURS.stream(skip_special_tokens=skip), ids) == whole
    stream = OURS.stream(skip_special_tokens=skip)
    assert stream.push_many(ids) + stream.flush() == whole


@given(prompt=some_ids, ids=some_ids, skip=st.booleans())
def test_a_prompts_text_and_the_stream_are_the_text_of_both(prompt: list[int], ids: list[int], skip: bool) -> None:
    data = OURS.decode_bytes(prompt, skip_special_tokens=skip)
    before = data.removesuffix(begun(data)).decode(errors="replace")
    stream = OURS.stream(skip_special_tokens=skip, prompt_ids=prompt)
    assert before + texts(stream, ids) == OURS.decode(prompt + ids, skip_special_tokens=skip)


@given(ids=some_ids, prompt=some_ids, stop=stops, include=st.booleans())
def test_the_text_ends_at_the_first_token_that_completes_a_stop_string(
    ids: list[int], prompt: list[int], stop: list[str], include: bool
) -> None:
    stream = OURS.stream(stop=stop, include_stop=include, prompt_ids=prompt)
    plain = OURS.stream(prompt_ids=prompt)
    given_text = whole = ""
    for id in [*ids, None]:
        given_text += stream.flush() if id is None else stream.push(id)
        whole += plain.flush() if id is None else plain.push(id)
        found = min(((whole.find(s), s) for s in stop if s in whole), default=None)
        assert stream.stopped == (None if found is None else found[1])
        if found is not None:
            end = found[0] + (len(found[1]) if include else 0)
            assert given_text == whole[:end]
            assert (stream.push(0x61), stream.push_many([0x61]), stream.flush()) == ("", "", "")
            assert stream.stopped == found[1]
            break
        held = max((n for s in stop for n in range(len(s)) if whole.endswith(s[:n])), default=0)
        assert given_text == whole[: len(whole) - (0 if id is None else held)]
    many = OURS.stream(stop=stop, include_stop=include, prompt_ids=prompt)
    assert many.push_many(ids) + many.flush() == given_text
    assert many.stopped == stream.stopped


@given(ids=some_ids, ways=st.lists(some_ids, max_size=3), stop=stops)
def test_copies_go_on_by_themselves(ids: list[int], ways: list[list[int]], stop: list[str]) -> None:
    stream = OURS.stream(stop=stop)
    before = stream.push_many(ids)
    copies = [make(stream) for make in (TokenStream.copy, copy.copy, copy.deepcopy)]
    for way, other in zip(ways, copies, strict=False):
        after = other.push_many(way) + other.flush()
        alone = OURS.stream(stop=stop)
        assert before + after == alone.push_many(ids + way) + alone.flush()
        assert other.stopped == alone.stopped
    alone = OURS.stream(stop=stop)
    assert before + stream.flush() == alone.push_many(ids) + alone.flush()


@given(rows=st.lists(st.lists(one_id, min_size=4, max_size=4), max_size=6), stop=stops)
def test_a_batch_is_its_streams_one_by_one(rows: list[list[int]], stop: list[str]) -> None:
    tokenizers_of_rows = [OURS if row % 2 else REAL for row in range(len(rows))]
    batch = [tokenizer.stream(stop=stop) for tokenizer in tokenizers_of_rows]
    single = [tokenizer.stream(stop=stop) for tokenizer in tokenizers_of_rows]
    for column in zip(*rows, strict=True):
        expected = [stream.push(id) for stream, id in zip(single, column, strict=True)]
        assert push_batch(batch, list(column)) == expected
    for dtype in (np.int32, np.int64, np.uint32):
        ids = np.full(len(rows), 0x61, dtype)
        assert push_batch(batch, ids) == [stream.push(0x61) for stream in single]
    assert [stream.flush() for stream in batch] == [stream.flush() for stream in single]


@given(st.lists(st.integers(0, 129_500), max_size=40))
def test_decoding_is_the_references_and_streams_to_the_same_text(ids: list[int]) -> None:
    for skip in (False, True):
        whole = REAL.decode(ids, skip_special_tokens=skip)
        assert whole == REFERENCE.decode(ids, skip_special_tokens=skip)
        assert texts(REAL.stream(skip_special_tokens=skip), ids) == whole


def test_every_token_decodes_as_the_references() -> None:
    every = list(range(REAL.vocab_size))
    assert REAL.decode(np.array(every)) == REFERENCE.decode(every, skip_special_tokens=False)
    assert REAL.decode(np.array(every), skip_special_tokens=True) == REFERENCE.decode(every)


@given(st.lists(one_id, max_size=40), st.booleans())
def test_an_array_decodes_as_its_list(ids: list[int], skip: bool) -> None:
    whole = OURS.decode(ids, skip_special_tokens=skip)
    data = OURS.decode_bytes(ids, skip_special_tokens=skip)
    wide = np.array(ids, np.int64)
    arrays = [wide, wide.astype(np.uint32), wide.astype(np.uint64), wide.astype(">i8"), np.repeat(wide, 2)[::2]]
    low = [id for id in ids if id < 2**31]
    assert OURS.decode(np.array(low, np.int32), skip_special_tokens=skip) == OURS.decode(low, skip_special_tokens=skip)
    for array in arrays:
        assert OURS.decode(array, skip_special_tokens=skip) == whole
        assert OURS.decode_bytes(array, skip_special_tokens=skip) == data
    assert OURS.decode_batch([ids, *arrays], skip_special_tokens=skip) == [whole] * (1 + len(arrays))


def test_long_texts_decode_with_the_gil_released() -> None:
    ids = [256 + i % (SIZE - 256) for i in range(5000)]
    for dtype in (np.int32, np.int64, np.uint32):
        assert OURS.decode_bytes(np.array(ids, dtype)) == b"".join(OURS.decode_bytes([id]) for id in ids)
    stream = OURS.stream()
    assert stream.push_many(ids) + stream.flush() == OURS.decode(ids)


def test_a_stream_never_gives_half_a_character() -> None:
    ids = list("😀".encode())
    stream = OURS.stream()
    assert [stream.push(id) for id in ids] == ["", "", "", "😀"]
    assert [stream.push(ids[0]), stream.push(ids[1]), stream.flush()] == ["", "", "\N{REPLACEMENT CHARACTER}"]
    assert [stream.push(ids[0]), stream.push(0x61)] == ["", "\N{REPLACEMENT CHARACTER}a"]
    assert stream.flush() == ""


def test_the_replacement_character_itself_is_a_character() -> None:
    ids = list("\N{REPLACEMENT CHARACTER}".encode())
    stream = OURS.stream()
    assert [stream.push(id) for id in ids] == ["", "", "\N{REPLACEMENT CHARACTER}"]
    assert stream.flush() == ""


def test_a_token_of_a_very_high_id_streams_as_well(tmp_path: Path) -> None:
    path = tmp_path / "bytes.tiktoken"
    path.write_text("".join(f"{base64.b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(256)))
    far = Tokenizer.from_tiktoken(path, r"\s+|\S+", {"<far>": 300_000})
    stream = far.stream()
    assert [stream.push(id) for id in (300_000, 0x61, 300_000, 299_999)] == ["<far>", "a", "<far>", ""]


def test_a_prompt_of_special_tokens_is_looked_through() -> None:
    end = OURS.token_to_id("<end>")
    assert end is not None
    first, second = "é".encode()
    prompt = [first, *[end] * 5]
    assert OURS.stream(skip_special_tokens=True, prompt_ids=prompt).push(second) == "é"
    assert OURS.stream(prompt_ids=prompt).push(second) == "\N{REPLACEMENT CHARACTER}"


def test_a_stop_string_in_the_prompt_stops_nothing() -> None:
    stream = OURS.stream(prompt_ids=list(b"xa"), stop="ab")
    assert (stream.push(0x62), stream.stopped) == ("b", None)


def test_of_stop_strings_with_one_beginning_the_shortest_is_found() -> None:
    stream = OURS.stream(stop=["aba", "ab", "b"], include_stop=True)
    assert stream.push(257) == "ab"  # the token "aba"
    assert stream.stopped == "ab"


FAILURES: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: OURS.stream().push(-1), ValueError, "id: expected an id of at least 0, got -1"),
    (lambda: OURS.stream().push(2**32), ValueError, "id: expected an id of at most 4294967295, got 4294967296"),
    (lambda: OURS.stream().push(2**64), ValueError, "id: expected an integer"),
    (lambda: OURS.stream().push("a"), TypeError, "id: expected an integer of 64 bits, got str"),
    (lambda: OURS.stream().push_many([1, -1]), ValueError, "ids: expected ids from 0"),
    (lambda: OURS.stream().push_many("ab"), TypeError, "ids: expected a list of ints"),
    (lambda: OURS.stream(prompt_ids=[-1]), ValueError, "prompt_ids: expected ids from 0"),
    (lambda: OURS.stream(stop=""), ValueError, "stop: expected non-empty strings, got an empty one at 0"),
    (lambda: OURS.stream(stop=["a", ""]), ValueError, "stop: expected non-empty strings, got an empty one at 1"),
    (lambda: OURS.stream(stop=["a", 3]), TypeError, r"stop\[1\]: expected valid Unicode text, got int"),
    (lambda: OURS.stream(stop="\ud800"), ValueError, "stop: expected valid Unicode text"),
    (lambda: OURS.stream(stop=3), TypeError, "stop: expected a string or strings, got int"),
    (lambda: OURS.decode(np.array([1, -1], np.int32)), ValueError, "ids: expected ids from 0 to .*, got -1"),
    (lambda: OURS.decode(np.array([1, -2])), ValueError, "ids: expected ids from 0 to .*, got -2"),
    (lambda: OURS.decode(np.array([2**40])), ValueError, "ids: expected ids from 0 to .*, got 1099511627776"),
    (lambda: OURS.decode_bytes(np.array([[1]])), TypeError, "ids: expected a list of ints"),
    (lambda: OURS.decode_batch([[1], np.array([-5])]), ValueError, r"batch\[1\]: expected ids"),
    (lambda: push_batch([OURS.stream()], [1, 2]), ValueError, "ids: expected one for each of 1 streams, got 2"),
    (lambda: push_batch([OURS.stream(), 3], [1, 2]), TypeError, r"streams\[1\]: expected a TokenStream, got int"),
    (lambda: push_batch([OURS.stream()], [-1]), ValueError, "ids: expected ids from 0"),
]


@pytest.mark.parametrize(("call", "error", "message"), FAILURES)
def test_bad_arguments_are_named(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_a_failed_batch_pushes_nothing() -> None:
    streams = [OURS.stream(), OURS.stream()]
    for bad in ([streams[0], streams[1], streams[0]], [*streams, None], streams):
        with pytest.raises((RuntimeError, TypeError, ValueError)):
            push_batch(bad, [0xE4] * 3)
    with pytest.raises(RuntimeError, match=r"streams\[1\]: expected one that no other call is using"):
        push_batch([streams[0]] * 2, [0xE4] * 2)
    assert [stream.flush() for stream in streams] == ["", ""]


def test_a_stream_in_use_by_another_thread_is_refused_and_stays_whole() -> None:
    ids = np.full(3_000_000, 0x61)
    stream = OURS.stream(stop="b" * 50)
    results: list[str] = []
    for _ in range(50):
        other = threading.Thread(target=lambda: results.append(stream.push_many(ids)))
        other.start()
        refused = False
        while other.is_alive() and not refused:
            try:
                stream.stopped  # noqa: B018
            except RuntimeError as error:
                assert "stream: expected one that no other call is using" in str(error)  # noqa: PT017
                refused = True
        other.join()
        assert len(results.pop()) == len(ids)
        if refused:
            assert stream.push(0x62) + stream.flush() == "b"
            return
    pytest.fail("no call met the other thread's")
