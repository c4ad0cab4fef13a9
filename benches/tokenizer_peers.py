"""One face for all tokenizers of the benchmark: ours, Hugging Face tokenizers, tiktoken, gigatoken, fastokens.

Each is called the way its documentation asks for, with its defaults, by the fastest route it has to the wanted form. A
method that a library does not have is None. Control tokens never occur in the texts: who recognises them plays no part.
"""

from __future__ import annotations

import codecs
import importlib.metadata
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

Ids = np.ndarray  # uint32 [N]

CUT = "\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff"
"""The class of DeepSeek's second split."""
DEEPSEEK_SPLITS = [
    r"\p{N}{1,3}",
    f"[{CUT}]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
]
# The three splits as one expression. What an earlier split cuts out can belong to no later arm and ends a look-ahead;
# what no arm matches stays one piece up to the next place where one does, as Hugging Face has it (tiktoken drops it).
DEEPSEEK_FOLDED = "|".join(
    [
        r"\p{N}{1,3}",
        rf"[{CUT}]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+",
        rf"[^\r\n\p{{L}}\p{{P}}\p{{S}}\p{{N}}{CUT}]?[\p{{L}}\p{{M}}&&[^{CUT}]]+",
        rf" ?[\p{{P}}\p{{S}}&&[^{CUT}]]+[\r\n]*",
        r"\s*[\r\n]+",
        rf"\s+(?![^\s\p{{N}}{CUT}])",
        r"\s+",
        rf"(?:[^\s\p{{L}}\p{{M}}\p{{N}}\p{{P}}\p{{S}}{CUT}](?![\p{{L}}\p{{M}}&&[^{CUT}]]))+",
    ]
)


class NotServedError(Exception):
    """The library cannot serve this tokenizer file; the message says why."""


def joined(rows: Iterable[Any]) -> tuple[Ids, np.ndarray]:
    """Rows of ids as one array and row offsets."""
    arrays = [np.asarray(row, dtype=np.uint32) for row in rows]
    return np.concatenate(arrays), np.cumsum([0, *map(len, arrays)])


class Peer:
    """A tokenizer library with one tokenizer loaded."""

    package: str
    encode_offsets: Callable[[str, str], tuple[Ids, Any]] | None = None
    """From a text and "char" or "byte" to ids and offsets."""
    stream: Callable[[], Callable[[int], str | None]] | None = None
    """From nothing to a function that takes an id and gives the text that it completes."""
    batch: Callable[[list[str]], Any] | None = None
    """From texts to whatever the library's best batch call gives; `flat` makes ids and row offsets of it."""
    tokenizer: Any

    def __init__(self, file: Path) -> None:
        """Loads a tokenizer.json."""
        raise NotImplementedError

    def numpy(self, text: str) -> Ids:
        """The ids of a text, as an array."""
        raise NotImplementedError

    def list(self, text: str) -> list[int]:
        """The ids of a text, as a list."""
        raise NotImplementedError

    def flat(self, batch: Any) -> tuple[Ids, np.ndarray]:
        """What `batch` gave, as ids and row offsets; not timed."""
        return joined(batch)

    def decode(self, ids: Ids) -> str:
        """The text of an array of ids."""
        raise NotImplementedError


class Heedful(Peer):
    """Ours."""

    package = "heedful"

    def __init__(self, file: Path) -> None:
        from heedful import Tokenizer

        self.tokenizer = Tokenizer.from_file(file)
        self.serve()

    def serve(self) -> None:
        """Takes the methods that this version has."""
        self.numpy = self.tokenizer.encode_to_numpy
        self.list = self.tokenizer.encode
        self.decode = self.tokenizer.decode
        self.stream = lambda: self.tokenizer.stream().push
        self.batch = getattr(self.tokenizer, "encode_batch_flat", None)
        if hasattr(self.tokenizer, "encode_with_offsets"):
            self.encode_offsets = lambda text, unit: self.tokenizer.encode_with_offsets(text, unit=unit)

    def flat(self, batch: Any) -> tuple[Ids, np.ndarray]:
        return batch


class HeedfulCache(Heedful):
    """Ours, loaded from a cache file."""

    def __init__(self, file: Path) -> None:
        from heedful import Tokenizer

        self.tokenizer = Tokenizer.from_cache(file)
        self.serve()


class HuggingFace(Peer):
    """Hugging Face tokenizers: the reference."""

    package = "tokenizers"

    def __init__(self, file: Path) -> None:
        from tokenizers import Tokenizer
        from tokenizers.decoders import DecodeStream

        self.tokenizer = tokenizer = Tokenizer.from_file(str(file))

        def stream() -> Callable[[int], str | None]:
            state = DecodeStream(skip_special_tokens=False)
            return lambda id: state.step(tokenizer, id)

        self.stream = stream

    def numpy(self, text: str) -> Ids:
        return np.array(self.list(text), dtype=np.uint32)

    def list(self, text: str) -> list[int]:
        # The batch call is the one that leaves offsets out.
        return self.tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def batch(self, texts: list[str]) -> Any:
        return [encoding.ids for encoding in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_offsets(self, text: str, unit: str) -> tuple[Ids, Any]:
        if unit != "char":
            raise NotImplementedError("no byte offsets")
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        return np.array(encoding.ids, dtype=np.uint32), encoding.offsets

    def decode(self, ids: Ids) -> str:
        return self.tokenizer.decode(ids.tolist(), skip_special_tokens=False)


class Tiktoken(Peer):
    """tiktoken with the same vocabulary: ids are merge ranks in both. Streaming is the usual idiom around its bytes."""

    package = "tiktoken"

    def __init__(self, file: Path) -> None:
        import tiktoken

        document = json.loads(file.read_text(encoding="utf-8"))
        splits = [step["pattern"].get("Regex") for step in document["pre_tokenizer"].get("pretokenizers", [])[:-1]]
        if splits != DEEPSEEK_SPLITS:
            raise NotServedError("one expression for the splits is known for DeepSeek's files only")
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = (byte for byte in range(256) if byte not in printable)
        alphabet = {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
        added = {token["id"] for token in document["added_tokens"]}
        vocabulary = document["model"]["vocab"].items()
        ranks = {bytes(map(alphabet.__getitem__, token)): id for token, id in vocabulary if id not in added}
        self.tokenizer = tiktoken.Encoding("same", pat_str=DEEPSEEK_FOLDED, mergeable_ranks=ranks, special_tokens={})
        self.list = self.tokenizer.encode_ordinary

        def stream() -> Callable[[int], str | None]:
            read, one = (
                codecs.getincrementaldecoder("utf-8")("replace").decode,
                self.tokenizer.decode_single_token_bytes,
            )
            return lambda id: read(one(id))

        self.stream = stream

    def numpy(self, text: str) -> Ids:
        return self.tokenizer.encode_to_numpy(text, disallowed_special=())

    def batch(self, texts: list[str]) -> Any:
        return self.tokenizer.encode_ordinary_batch(texts, num_threads=1)

    def decode(self, ids: Ids) -> str:
        return self.tokenizer.decode(ids.tolist())

    def encode_offsets(self, text: str, unit: str) -> tuple[Ids, Any]:
        if unit != "char":
            raise NotImplementedError("no byte offsets")
        ids = self.tokenizer.encode_ordinary(text)
        return np.array(ids, dtype=np.uint32), self.tokenizer.decode_with_offsets(ids)[1]


class Gigatoken(Peer):
    """gigatoken."""

    package = "gigatoken"

    def __init__(self, file: Path) -> None:
        from gigatoken import Tokenizer

        self.tokenizer = Tokenizer(file)
        self.numpy = self.tokenizer.encode

    def list(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).tolist()

    def batch(self, texts: list[str]) -> Any:
        return self.tokenizer.encode_batch(texts, parallel=False)

    def flat(self, batch: Any) -> tuple[Ids, np.ndarray]:
        return np.asarray(batch.layout.content.data), np.asarray(batch.layout.offsets.data)

    def decode(self, ids: Ids) -> str:
        return self.tokenizer.decode(ids).decode(errors="replace")


class Fastokens(Peer):
    """fastokens."""

    package = "fastokens"

    def __init__(self, file: Path) -> None:
        from fastokens import _native

        self.tokenizer = tokenizer = _native.Tokenizer.from_file(str(file))

        def stream() -> Callable[[int], str | None]:
            state = _native.DecodeStream()
            return lambda id: state.step(tokenizer, id)

        self.stream = stream
        self.batch = tokenizer.encode_batch_flat

    def numpy(self, text: str) -> Ids:
        return np.frombuffer(self.tokenizer.encode_batch_flat([text])[0], dtype="<u4")

    def list(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).ids

    def flat(self, batch: Any) -> tuple[Ids, np.ndarray]:
        return np.frombuffer(batch[0], dtype="<u4"), np.frombuffer(batch[1], dtype="<u8")

    def decode(self, ids: Ids) -> str:
        return self.tokenizer.decode(ids.tolist())


PEERS: dict[str, type[Peer]] = {
    "heedful": Heedful,
    "hf": HuggingFace,
    "tiktoken": Tiktoken,
    "gigatoken": Gigatoken,
    "fastokens": Fastokens,
}


def version(name: str) -> str | None:
    """The installed version of a peer's package; None if it is not installed."""
    try:
        return importlib.metadata.version(PEERS[name].package)
    except importlib.metadata.PackageNotFoundError:
        return None
