"""Tokenizer files for the tests: real ones from tests/data, and small ones made to order."""

from __future__ import annotations

import base64
import functools
import json
import lzma
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data" / "tokenizers"

CL100K_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
CL100K_SPECIAL = {
    "<|endoftext|>": 100257,
    "<|fim_prefix|>": 100258,
    "<|fim_middle|>": 100259,
    "<|fim_suffix|>": 100260,
    "<|endofprompt|>": 100276,
}


def unpacked(name: str) -> bytes:
    """A file of tests/data/tokenizers."""
    return lzma.decompress((DATA / f"{name}.xz").read_bytes())


@contextmanager
def temporary(data: bytes) -> Iterator[Path]:
    """A file that holds `data`, as long as the block runs."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "file"
        path.write_bytes(data)
        yield path


@functools.cache
def real(name: str) -> str:
    """The tokenizer.json of "deepseek-v3.2", "deepseek-v4" or "qwen3"."""
    if name != "deepseek-v4":
        return unpacked(f"{name}.json").decode()
    document = json.loads(real("deepseek-v3.2"))
    document["added_tokens"] = json.loads(unpacked("deepseek-v4.added_tokens.json"))
    return json.dumps(document)


def cl100k_ranks() -> dict[bytes, int]:
    """tiktoken's ranks."""
    lines = (line.split() for line in unpacked("cl100k_base.tiktoken").splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def byte_characters() -> list[str]:
    """The byte-level alphabet, by byte."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "o r", "Ġw or", "1 2", "12 3", "a a", "aa a", "Ã ©", "e s"]
MERGES += ["t h", "th e"]

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def small(**changes: Any) -> dict[str, Any]:
    """A tokenizer.json with the 256 bytes and a few merges.

    Args:
        changes: parts of it that are to be otherwise; `model` is updated, and None removes a key of it.
    """
    tokens = [*byte_characters(), *("".join(merge.split()) for merge in MERGES)]
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {token: id for id, token in enumerate(tokens)},
        "merges": MERGES,
    }
    for key, value in changes.pop("model", {}).items():
        if value is None:
            del model[key]
        else:
            model[key] = value
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": BYTE_LEVEL,
        "post_processor": None,
        "decoder": BYTE_LEVEL,
        "model": model,
        **changes,
    }


def split(pattern: str, behavior: str = "Isolated", *, invert: bool = False, literal: bool = False) -> dict[str, Any]:
    """A Split pre-tokenizer."""
    kind = "String" if literal else "Regex"
    return {"type": "Split", "pattern": {kind: pattern}, "behavior": behavior, "invert": invert}


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    """Pre-tokenizers in a row, with ByteLevel at the end."""
    return {"type": "Sequence", "pretokenizers": [*steps, BYTE_LEVEL]}


def added(id: int, content: str, **flags: bool) -> dict[str, Any]:
    """An entry of added_tokens."""
    names = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return {"id": id, "content": content, **{name: flags.get(name, False) for name in names}}
