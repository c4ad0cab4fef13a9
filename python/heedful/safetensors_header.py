"""The header of a safetensors file, checked before anything is taken on its word.

The format: 8 bytes of little-endian length, that many bytes of JSON, then the data. A file may be damaged or
hostile, so the length is compared with the file's before memory is taken, and every tensor's place with its shape
and dtype.
"""

from __future__ import annotations

import json
import math
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

MAX_HEADER_BYTES = 100 * 2**20
"""The format's own limit."""

_MAX_RANK = 64  # torch's limit; bounds the product of sizes too

DTYPE_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "F8_E4M3FNUZ": 1,
    "F8_E5M2FNUZ": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
    "C64": 8,
}
"""Size of an element by the format's name of its dtype."""


_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 120


def shown(value: object) -> str:
    """A name or value from a file as messages show it: without control characters, and not without end."""
    return _repr.repr(value)


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is and what it is."""

    file: Path
    dtype: str
    """The format's name: "F32", "BF16", "F8_E4M3", ..."""
    shape: tuple[int, ...]
    nbytes: int


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file by name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the header is damaged; the message names the file and the tensor.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        if len(prefix) < 8:
            raise ValueError(f"{file.name}: expected 8 bytes of header length, got {len(prefix)}")
        length = int.from_bytes(prefix, "little")
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise ValueError(
                f"{file.name}: header length: expected at most {min(MAX_HEADER_BYTES, size - 8)} bytes, got {length}"
            )
        text = stream.read(length)
    try:
        header = json.loads(text.decode(), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file.name}: header: expected JSON: {error}") from error
    if not isinstance(header, dict):
        raise ValueError(f"{file.name}: header: expected an object, got {type(header).__name__}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{file.name}: __metadata__: expected an object of strings, got {shown(metadata)}")
    places = {name: _place(file, name, entry) for name, entry in header.items()}
    _check_cover(file, places, size - 8 - length)
    return {
        name: TensorInfo(file, header[name]["dtype"], tuple(header[name]["shape"]), end - start)
        for name, (start, end) in places.items()
    }


def _place(file: Path, name: str, entry: object) -> tuple[int, int]:
    """A tensor's bytes in the data, checked against its shape and dtype."""

    def error(what: str, expected: str, got: object) -> ValueError:
        return ValueError(f"{file.name}: tensor {shown(name)}: {what}: expected {expected}, got {shown(got)}")

    if not isinstance(entry, dict):
        raise error("entry", "an object", entry)
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise error("dtype", f"one of {', '.join(DTYPE_BYTES)}", dtype)
    if not _is_sizes(shape) or len(shape) > _MAX_RANK:
        raise error("shape", f"a list of at most {_MAX_RANK} sizes", shape)
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise error("data_offsets", "[start, end] with start <= end", offsets)
    nbytes = math.prod(shape) * DTYPE_BYTES[dtype]
    if offsets[1] - offsets[0] != nbytes:
        raise error("data_offsets", f"{nbytes} bytes for {dtype} {shape}", offsets)
    return offsets[0], offsets[1]


def _without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object; readers differ in which of two equal names they take, so there must be none."""
    values: dict[str, object] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"{shown(name)} is there twice")
        values[name] = value
    return values


def _is_sizes(values: object) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(
        isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63 for value in values
    )


def _check_cover(file: Path, places: dict[str, tuple[int, int]], nbytes: int) -> None:
    """Tensors must lie end to end: no hole, no overlap, nothing past the file's end, nothing left over."""
    at = 0
    for name, (start, end) in sorted(places.items(), key=lambda item: item[1]):
        if end > nbytes:
            raise ValueError(
                f"{file.name}: tensor {shown(name)}: data_offsets: expected at most {nbytes}, got [{start}, {end}]"
            )
        if start != at:
            raise ValueError(f"{file.name}: tensor {shown(name)}: data_offsets: expected to start at {at}, got {start}")
        at = end
    if at != nbytes:
        raise ValueError(f"{file.name}: expected {at} bytes of data, got {nbytes}")
