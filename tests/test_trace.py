"""Request traces: what is read of Mooncake's and Azure's lines, and that a bad line is refused by its number."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from heedful.replay import TraceRequest, read_trace
from heedful.replay.trace import HASHED_TOKENS, MAX_LINE_BYTES

TRACES = Path(__file__).parent / "data" / "traces"


def line(**changes: Any) -> str:
    values = {"timestamp": 0, "input_length": 600, "output_length": 3, "hash_ids": [4, 5]}
    return json.dumps({key: value for key, value in {**values, **changes}.items() if value is not ...})


@pytest.fixture
def written(tmp_path: Path) -> Any:
    def write(*lines: str | bytes) -> Path:
        path = tmp_path / "trace"
        path.write_bytes(b"\n".join(text if isinstance(text, bytes) else text.encode() for text in lines))
        return path

    return write


@pytest.mark.parametrize(
    ("name", "count", "first"),
    [
        ("mooncake_conversation.jsonl", 400, TraceRequest(0.0, 6758, 500, tuple(range(14)))),
        ("mooncake_synthetic.jsonl", 250, TraceRequest(0.0, 40160, 6, tuple(range(79)))),
        ("azure_2023_code.csv", 200, TraceRequest(0.0, 4808, 10, tuple(range(10)))),
    ],
)
def test_the_stored_traces_are_read(name: str, count: int, first: TraceRequest) -> None:
    trace = read_trace(TRACES / name)
    assert len(trace) == count
    assert trace[0] == first
    assert all(a.arrival <= b.arrival for a, b in itertools.pairwise(trace))


def test_azures_times_keep_their_fractions() -> None:
    assert read_trace(TRACES / "azure_2023_code.csv", 2)[1].arrival == pytest.approx(0.052, abs=1e-6)


def test_requests_of_a_csv_share_nothing() -> None:
    ids = [i for request in read_trace(TRACES / "azure_2023_code.csv") for i in request.hash_ids]
    assert len(ids) == len(set(ids))


def test_a_limit_reads_the_first_requests_and_no_further(written: Any) -> None:
    path = written(line(), line(timestamp=5), "broken")
    assert [request.arrival for request in read_trace(path, 2)] == [0.0, 0.005]
    with pytest.raises(ValueError, match="limit: expected at least 1, got 0"):
        read_trace(path, 0)


def test_requests_come_in_the_order_of_arrival_and_time_begins_at_the_first(written: Any) -> None:
    path = written(line(timestamp=9000), "", line(timestamp=7000.5))
    assert [request.arrival for request in read_trace(path)] == [0.0, pytest.approx(1.9995)]


def test_no_output_counts_as_one_token(written: Any) -> None:
    assert read_trace(written(line(output_length=0)))[0].output_tokens == 1


@given(st.integers(1, 4000), st.integers(0, 2**53 - 1), st.integers(1, 200_000))
def test_tokens_of_equal_ids_are_equal(prompt: int, seed: int, vocab_size: int) -> None:
    blocks = -(-prompt // HASHED_TOKENS)
    ids = tuple((seed + i) % 2**53 for i in range(blocks))
    tokens = TraceRequest(0.0, prompt, 1, ids).token_ids(vocab_size)
    assert tokens.shape == (prompt,)
    assert tokens.dtype == np.int32
    assert 0 <= tokens.min() <= tokens.max() < vocab_size
    longer = TraceRequest(0.0, blocks * HASHED_TOKENS + 1, 1, (*ids, seed)).token_ids(vocab_size)
    np.testing.assert_array_equal(longer[:prompt], tokens)


def test_tokens_of_different_ids_differ() -> None:
    whole = TraceRequest(0.0, 4 * HASHED_TOKENS, 1, (0, 1, 2**30, 2**53 - 1)).token_ids().reshape(4, -1, 64)
    assert len(np.unique(whole.reshape(-1, 64), axis=0)) == 4 * HASHED_TOKENS // 64


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{", "expected a JSON object: "),
        ("[" * 100_000, "expected a JSON object, or the header TIMESTAMP,ContextTokens,GeneratedTokens, got '[[["),
        ('{"a":' * 50_000, "expected a JSON object: "),
        ("hello", "or the header TIMESTAMP,ContextTokens,GeneratedTokens, got 'hello'"),
        (line(timestamp=...), "timestamp: missing"),
        (line(timestamp=-1), "timestamp: expected milliseconds of 0 to 1e+14, got -1"),
        (line(timestamp=float("nan")), "timestamp: expected milliseconds of 0 to 1e+14, got nan"),
        (line(timestamp=True), "timestamp: expected milliseconds of 0 to 1e+14, got True"),
        (line(timestamp="now"), "timestamp: expected milliseconds of 0 to 1e+14, got 'now'"),
        (line(input_length=0), "input_length: expected 1 to 16777216, got 0"),
        (line(input_length=2**24 + 1), "input_length: expected 1 to 16777216, got 16777217"),
        (line(input_length=1e3), "input_length: expected 1 to 16777216, got 1000.0"),
        (line(input_length=10**400), "input_length: expected 1 to 16777216, got an integer of 1329 bits"),
        (line().replace("600", "9" * 5000), "expected a JSON object: Exceeds the limit"),
        (line(output_length=-1), "output_length: expected 0 to 16777216, got -1"),
        (line(output_length=None), "output_length: expected 0 to 16777216, got None"),
        (line(hash_ids=7), "hash_ids: expected 2 ids for 600 tokens, got 7"),
        (line(hash_ids=[1]), "hash_ids: expected 2 ids for 600 tokens, got 1 ids"),
        (line(hash_ids=[1, -1]), "hash_ids: expected integers of 0 to 2^53 - 1, got -1"),
        (line(hash_ids=[1, 2**53]), "hash_ids: expected integers of 0 to 2^53 - 1, got 9007199254740992"),
        (line(hash_ids=[1, [2]]), "hash_ids: expected integers of 0 to 2^53 - 1, got [2]"),
        (b"\xff{}", "expected UTF-8 text"),
        (" " * MAX_LINE_BYTES + line(), f"expected at most {MAX_LINE_BYTES} bytes"),
    ],
)
def test_a_bad_line_is_refused_by_its_number(written: Any, bad: str | bytes, message: str) -> None:
    path = written(line(), "", bad, line())
    with pytest.raises(ValueError, match="trace, line 3: ") as error:
        read_trace(path)
    assert message in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("2023-11-16 18:17:03,1", "expected TIMESTAMP,ContextTokens,GeneratedTokens"),
        ("yesterday,1,1", "TIMESTAMP: expected YYYY-MM-DD HH:MM:SS.fraction, got 'yesterday'"),
        ("2023-11-16 18:17:03.x,1,1", "TIMESTAMP: expected"),
        ("2023-13-16 18:17:03,1,1", "TIMESTAMP: expected"),
        ("2023-11-16 18:17:03,0,1", "ContextTokens: expected 1 to 16777216, got '0'"),
        ("2023-11-16 18:17:03,1e3,1", "ContextTokens: expected 1 to 16777216, got '1e3'"),
        ("2023-11-16 18:17:03,1,99999999", "GeneratedTokens: expected 0 to 16777216, got '99999999'"),
    ],
)
def test_a_bad_line_of_a_csv_is_refused_by_its_number(written: Any, bad: str, message: str) -> None:
    path = written("TIMESTAMP,ContextTokens,GeneratedTokens", "2023-11-16 18:17:03.9799600,4808,10", bad)
    with pytest.raises(ValueError, match="trace, line 3: ") as error:
        read_trace(path)
    assert message in str(error.value)


@pytest.mark.parametrize("content", [b"", b"\n\n", b"TIMESTAMP,ContextTokens,GeneratedTokens\n"])
def test_an_empty_trace_is_refused(written: Any, content: bytes) -> None:
    with pytest.raises(ValueError, match="expected requests, found none"):
        read_trace(written(content))
