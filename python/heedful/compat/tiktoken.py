"""`tiktoken.Encoding`'s reading interface over `heedful.Tokenizer`.

Its special tokens are the tokenizer's added tokens, those that their file does not flag as special included: a text
must forge neither. Arguments `num_threads` are taken and have no effect: `heedful.set_num_threads` has.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterable, Sequence, Set
from functools import cached_property
from typing import Any, Literal, NoReturn

import numpy as np

from heedful._core import Tokenizer

_Special = Literal["all"] | Collection[str]


@functools.lru_cache(maxsize=64)
def _any_of(tokens: frozenset[str]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)))


def _unicode(text: str) -> str:
    """`text` with pairs of surrogates joined and lone ones replaced."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


class TiktokenEncoding:
    """`tiktoken.Encoding`'s reading interface; made by `heedful.Tokenizer.as_tiktoken`.

    Example:
        >>> from heedful import Tokenizer, builtin
        >>> from heedful.compat.tiktoken import TiktokenEncoding
        >>> encoding = TiktokenEncoding(Tokenizer.from_pretrained(builtin.path()), "built-in")
        >>> encoding.decode(encoding.encode("Attend only where it matters."))
        'Attend only where it matters.'
    """

    def __init__(self, tokenizer: Tokenizer, name: str | None = None) -> None:
        """
        Args:
            tokenizer: what does the work.
            name: the encoding's name.
        """
        self.name = "heedful" if name is None else name
        self._tokenizer = tokenizer
        self._special_tokens = tokenizer.added_tokens
        self._special_ids = frozenset(self._special_tokens.values())

    def __repr__(self) -> str:
        return f"<Encoding {self.name!r}>"

    def __reduce__(self) -> tuple[type[TiktokenEncoding], tuple[Tokenizer, str]]:
        return type(self), (self._tokenizer, self.name)  # without the tables that are made when needed

    # Encoding

    def _allowed(self, text: str | None, allowed: _Special, disallowed: _Special) -> frozenset[str]:
        """The special tokens to recognise; raises for one in `text` that is disallowed."""
        special = self.special_tokens_set
        allowed = special if allowed == "all" else frozenset(allowed)
        forbidden = frozenset(special - allowed if disallowed == "all" else disallowed)
        if text is not None and forbidden and (match := _any_of(forbidden).search(text)):
            raise ValueError(
                f"text: expected no disallowed special token, got {match.group()!r}. To have it encoded as the special "
                f"token, pass allowed_special={{{match.group()!r}, ...}}; as ordinary text, disallowed_special=() or "
                f"disallowed_special=(encoding.special_tokens_set - {{{match.group()!r}}})"
            )
        return frozenset(allowed & special)

    def encode(
        self, text: str, *, allowed_special: _Special = frozenset(), disallowed_special: _Special = "all"
    ) -> list[int]:
        """The ids of a text.

        Args:
            text: the text; lone surrogates become U+FFFD.
            allowed_special: "all", or the special tokens to recognise.
            disallowed_special: the special tokens to refuse; "all" is those that are not allowed. One that is neither
                allowed nor disallowed is text.

        Raises:
            ValueError: a disallowed token is in the text.
        """
        allowed = self._allowed(text, allowed_special, disallowed_special)
        return self._tokenizer.encode(_unicode(text), allowed_special=allowed or "none")

    def encode_ordinary(self, text: str) -> list[int]:
        """The ids of a text in which no special token is recognised, nor refused."""
        return self._tokenizer.encode(_unicode(text))

    def encode_to_numpy(
        self, text: str, *, allowed_special: _Special = frozenset(), disallowed_special: _Special = "all"
    ) -> np.ndarray[Any, np.dtype[np.uint32]]:
        """`encode`, as an array: uint32 [N]."""
        allowed = self._allowed(text, allowed_special, disallowed_special)
        return self._tokenizer.encode_to_numpy(_unicode(text), allowed_special=allowed or "none")

    def encode_batch(
        self,
        text: Iterable[str],
        *,
        num_threads: int = 8,
        allowed_special: _Special = frozenset(),
        disallowed_special: _Special = "all",
    ) -> list[list[int]]:
        """The ids of many texts; arguments and errors as for `encode`."""
        texts = list(text)
        for each in texts:
            self._allowed(each, allowed_special, disallowed_special)
        allowed = self._allowed(None, allowed_special, ())
        return self._tokenizer.encode_batch(map(_unicode, texts), allowed_special=allowed or "none")

    def encode_ordinary_batch(self, text: Iterable[str], *, num_threads: int = 8) -> list[list[int]]:
        """The ids of many texts, as `encode_ordinary` gives them."""
        return self._tokenizer.encode_batch(map(_unicode, text))

    def encode_single_token(self, text_or_bytes: str | bytes) -> int:
        """The id of a token, special or not.

        Raises:
            KeyError: there is no such token.
        """
        token = text_or_bytes.encode() if isinstance(text_or_bytes, str) else bytes(text_or_bytes)
        return self._ids[token]

    def encode_with_unstable(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not here."""
        raise NotImplementedError("encode_with_unstable is not in this interface: encode a text when it is complete")

    # Decoding

    @cached_property
    def _tokens(self) -> list[bytes | None]:
        """By id: a token's bytes; None for an id without a token."""
        ids = range(self._tokenizer.vocab_size)
        known = (self._tokenizer.id_to_token(id) is not None for id in ids)
        return [
            self._tokenizer.decode_bytes([id]) if is_known else None for id, is_known in zip(ids, known, strict=True)
        ]

    @cached_property
    def _ids(self) -> dict[bytes, int]:
        """By bytes: a token's id; one that merges make goes before a special one."""
        special = {token.encode(): id for token, id in self._special_tokens.items()}
        return special | {self._tokens[id] or b"": id for id in self._mergeable}

    @cached_property
    def _mergeable(self) -> list[int]:
        return [id for id, token in enumerate(self._tokens) if token is not None and id not in self._special_ids]

    def decode_single_token_bytes(self, token: int) -> bytes:
        """The bytes of an id.

        Raises:
            KeyError: the id has no token.
        """
        found = self._tokens[token] if 0 <= token < len(self._tokens) else None
        if found is None:
            raise KeyError(token)
        return found

    def decode_tokens_bytes(self, tokens: Sequence[int]) -> list[bytes]:
        """The bytes of each id; raises as `decode_single_token_bytes`."""
        return [self.decode_single_token_bytes(token) for token in tokens]

    @cached_property
    def _gaps(self) -> frozenset[int]:
        return frozenset(id for id, token in enumerate(self._tokens) if token is None)

    def _check(self, tokens: Sequence[int]) -> None:
        """Raises KeyError for an id without a token."""
        if len(tokens) and not (0 <= min(tokens) <= max(tokens) < len(self._tokens) and self._gaps.isdisjoint(tokens)):
            self.decode_tokens_bytes(tokens)

    def decode_bytes(self, tokens: Sequence[int]) -> bytes:
        """The bytes of ids; raises as `decode_single_token_bytes`."""
        self._check(tokens)
        return self._tokenizer.decode_bytes(tokens)

    def decode(self, tokens: Sequence[int], errors: str = "replace") -> str:
        """The text of ids.

        Args:
            tokens: the ids.
            errors: what becomes of bytes that are not UTF-8, as for `bytes.decode`.

        Raises:
            KeyError: an id has no token.
            UnicodeDecodeError: `errors` is "strict", and the bytes are not UTF-8.
        """
        return self.decode_bytes(tokens).decode("utf-8", errors)

    def decode_with_offsets(self, tokens: Sequence[int]) -> tuple[str, list[int]]:
        """The text of ids, and for each the place of the first character that has bytes of it.

        Raises:
            KeyError: an id has no token.
            UnicodeDecodeError: the bytes are not UTF-8.
        """
        places, begun = [], 0
        parts = self.decode_tokens_bytes(tokens)
        for part in parts:
            places.append(max(0, begun - (0x80 <= part[0] < 0xC0)))
            begun += sum(not 0x80 <= byte < 0xC0 for byte in part)
        return b"".join(parts).decode(), places

    def decode_batch(
        self, batch: Iterable[Sequence[int]], *, errors: str = "replace", num_threads: int = 8
    ) -> list[str]:
        """The texts of many sequences of ids; errors as for `decode`."""
        rows = list(batch)
        if errors != "replace":
            return [self.decode(tokens, errors) for tokens in rows]
        for tokens in rows:
            self._check(tokens)
        return self._tokenizer.decode_batch(rows)

    def decode_bytes_batch(self, batch: Iterable[Sequence[int]], *, num_threads: int = 8) -> list[bytes]:
        """The bytes of many sequences of ids; errors as for `decode_bytes`."""
        return [self.decode_bytes(tokens) for tokens in batch]

    # The vocabulary

    def token_byte_values(self) -> list[bytes]:
        """The bytes of the tokens that are not special, in the order of their bytes."""
        return sorted(self._tokens[id] or b"" for id in self._mergeable)

    @property
    def max_token_value(self) -> int:
        """The highest id."""
        return self._tokenizer.vocab_size - 1

    @property
    def n_vocab(self) -> int:
        """One more than the highest id."""
        return self._tokenizer.vocab_size

    @property
    def eot_token(self) -> int:
        """The id of "<|endoftext|>".

        Raises:
            KeyError: there is none.
        """
        return self._special_tokens["<|endoftext|>"]

    @property
    def special_tokens_set(self) -> Set[str]:
        """The special tokens."""
        return set(self._special_tokens)

    def is_special_token(self, token: int) -> bool:
        """Whether an id is a special token's."""
        return token in self._special_ids
