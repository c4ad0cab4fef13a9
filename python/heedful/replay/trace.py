"""Request traces: Mooncake's JSON lines and Azure's CSV.

A Mooncake line has `timestamp` (ms), `input_length`, `output_length` and `hash_ids`, one id for each 512 tokens of the
prompt: the same id is the same text behind the same text. Azure's lines are `TIMESTAMP,ContextTokens,GeneratedTokens`.
Neither holds text, so tokens are made up: those of a Mooncake block from its id, so that equal ids give equal tokens;
an Azure prompt shares nothing.
"""

from __future__ import annotations

import datetime
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

HASHED_TOKENS = 512
"""Tokens of a prompt that one of Mooncake's ids stands for."""

MAX_LINE_BYTES = 2**20
"""A longer line is refused: it would be a prompt of 50 million tokens."""

MAX_REQUESTS = 5_000_000
"""A trace of more requests is refused, unless a limit asks for fewer."""

MAX_TOKENS = 2**24
"""Of a prompt or an output."""

_MAX_ID = 2**53  # what JSON's numbers hold in every language
_MAX_MS = 1e14  # three thousand years
_AZURE_HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"
_SHOWN = 40  # characters of a bad value


@dataclass(frozen=True)
class TraceRequest:
    """One request.

    Args:
        arrival: seconds since the first request.
        prompt_tokens: length of the prompt, at least 1.
        output_tokens: tokens it generates, at least 1.
        hash_ids: one id for each HASHED_TOKENS of the prompt, the last of them perhaps for fewer.
    """

    arrival: float
    prompt_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...]

    def token_ids(self, vocab_size: int = 129_280) -> np.ndarray:
        """The prompt, int32 [prompt_tokens]: tokens of equal ids are equal."""
        ids = np.array(self.hash_ids, dtype=np.uint64)[:, None]
        place = np.arange(HASHED_TOKENS, dtype=np.uint64)
        # The finalizer of MurmurHash3 over (id, place); products wrap, as they should.
        mixed = (ids << np.uint64(9)) + place
        for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
            mixed = (mixed ^ (mixed >> np.uint64(33))) * np.uint64(factor)
        mixed ^= mixed >> np.uint64(33)
        return (mixed % np.uint64(vocab_size)).astype(np.int32).reshape(-1)[: self.prompt_tokens]


def read_trace(path: str | os.PathLike[str], limit: int | None = None) -> list[TraceRequest]:
    """Reads a trace, in the order of arrival.

    Args:
        path: a file of JSON lines or a CSV; which of the two, its first line tells.
        limit: how many requests at most, from the first line on.

    Raises:
        ValueError: names the file, the line and what is wrong with it.
        OSError: the file cannot be read.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit: expected at least 1, got {limit}")
    name = os.fsdecode(path)
    requests: list[TraceRequest] = []
    parse: Callable[[str, int], TraceRequest] | None = None
    for number, line in _lines(name):
        try:
            if parse is None and line == _AZURE_HEADER:
                parse = _Azure().parse
                continue
            if parse is None:
                parse = _parse_mooncake
            if len(requests) == (MAX_REQUESTS if limit is None else limit):
                if limit is None:
                    raise ValueError(f"expected at most {MAX_REQUESTS} requests; a limit reads the first of them")
                break
            requests.append(parse(line, len(requests)))
        except ValueError as error:
            raise ValueError(f"{name}, line {number}: {error}") from None
    if not requests:
        raise ValueError(f"{name}: expected requests, found none")
    first = min(request.arrival for request in requests)
    shifted = (TraceRequest(r.arrival - first, r.prompt_tokens, r.output_tokens, r.hash_ids) for r in requests)
    return sorted(shifted, key=lambda request: request.arrival)


def _lines(name: str) -> Iterator[tuple[int, str]]:
    """Number and text of each line that is not empty."""
    with open(name, "rb") as stream:
        number = 0
        while line := stream.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise ValueError(f"{name}, line {number}: expected at most {MAX_LINE_BYTES} bytes")
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                raise ValueError(f"{name}, line {number}: expected UTF-8 text: {error}") from None
            if text:
                yield number, text


def _parse_mooncake(line: str, index: int) -> TraceRequest:
    if not line.startswith("{"):
        raise ValueError(f"expected a JSON object, or the header {_AZURE_HEADER}, got {_shown(line)}")
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected a JSON object: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"expected a JSON object, got {_shown(values)}")
    prompt = _count(values, "input_length")
    ids = _value(values, "hash_ids")
    blocks = -(-prompt // HASHED_TOKENS)
    if not isinstance(ids, list) or len(ids) != blocks:
        got = f"{len(ids)} ids" if isinstance(ids, list) else _shown(ids)
        raise ValueError(f"hash_ids: expected {blocks} ids for {prompt} tokens, got {got}")
    for value in ids:
        if type(value) is not int or not 0 <= value < _MAX_ID:
            raise ValueError(f"hash_ids: expected integers of 0 to 2^53 - 1, got {_shown(value)}")
    milliseconds = _value(values, "timestamp")
    if type(milliseconds) not in (int, float) or not 0 <= milliseconds <= _MAX_MS:
        raise ValueError(f"timestamp: expected milliseconds of 0 to {_MAX_MS:.0e}, got {_shown(milliseconds)}")
    output = _count(values, "output_length", least=0)
    return TraceRequest(milliseconds / 1e3, prompt, max(output, 1), tuple(ids))


class _Azure:
    """Lines of one file; prompts share nothing, so each gets ids of its own."""

    def __init__(self) -> None:
        self._next_id = 0

    def parse(self, line: str, index: int) -> TraceRequest:
        fields = line.split(",")
        if len(fields) != 3:
            raise ValueError(f"expected {_AZURE_HEADER}, got {_shown(line)}")
        prompt = _csv_count("ContextTokens", fields[1], least=1)
        output = _csv_count("GeneratedTokens", fields[2], least=0)
        blocks = -(-prompt // HASHED_TOKENS)
        ids = tuple(range(self._next_id, self._next_id + blocks))
        self._next_id += blocks
        return TraceRequest(_seconds(fields[0]), prompt, max(output, 1), ids)


def _seconds(text: str) -> float:
    """Seconds since 1970; fractions may have seven digits, which datetime does not read."""
    whole, _, fraction = text.strip().partition(".")
    if fraction and not (fraction.isascii() and fraction.isdigit() and len(fraction) <= 9):
        raise ValueError(f"TIMESTAMP: expected YYYY-MM-DD HH:MM:SS.fraction, got {_shown(text)}")
    try:
        moment = datetime.datetime.strptime(whole, "%Y-%m-%d %H:%M:%S").replace(tzinfo=datetime.timezone.utc)
    except ValueError:
        raise ValueError(f"TIMESTAMP: expected YYYY-MM-DD HH:MM:SS.fraction, got {_shown(text)}") from None
    return moment.timestamp() + float(f"0.{fraction or 0}")


def _csv_count(name: str, text: str, least: int) -> int:
    text = text.strip()
    if not (text.isascii() and text.isdigit() and len(text) < 12 and least <= int(text) <= MAX_TOKENS):
        raise ValueError(f"{name}: expected {least} to {MAX_TOKENS}, got {_shown(text)}")
    return int(text)


def _count(values: dict[str, Any], key: str, least: int = 1) -> int:
    value = _value(values, key)
    if type(value) is not int or not least <= value <= MAX_TOKENS:
        raise ValueError(f"{key}: expected {least} to {MAX_TOKENS}, got {_shown(value)}")
    return value


def _value(values: dict[str, Any], key: str) -> Any:
    if key not in values:
        raise ValueError(f"{key}: missing")
    return values[key]


def _shown(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
