"""`tokenizers.Tokenizer`'s reading interface over `heedful.Tokenizer`.

Results are equal to the original's. What cannot be told exactly from what the tokenizer keeps (a pair's template, the
words that a pre-tokenizer made) and what would change the tokenizer raises NotImplementedError with what to do instead.
"""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, NoReturn

from heedful._core import Tokenizer
from heedful.compat.encoding import Encoding, not_here

Words = Sequence[str]


class HuggingFaceTokenizer:
    """`tokenizers.Tokenizer`'s reading interface; made by `heedful.Tokenizer.as_hf`.

    It cannot be changed: no truncation and no padding are ever on, and one object serves any number of threads.

    Example:
        >>> from heedful import Tokenizer, builtin
        >>> from heedful.compat.hugging_face import HuggingFaceTokenizer
        >>> tokenizer = HuggingFaceTokenizer(Tokenizer.from_pretrained(builtin.path()))
        >>> tokenizer.decode(tokenizer.encode("Attend only where it matters.").ids)
        'Attend only where it matters.'
    """

    truncation = None
    padding = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        """
        Args:
            tokenizer: what does the work.
        """
        self._tokenizer = tokenizer

    def __reduce__(self) -> tuple[type[HuggingFaceTokenizer], tuple[Tokenizer]]:
        return type(self), (self._tokenizer,)  # without the tables that are made when needed

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> HuggingFaceTokenizer:
        """Of a tokenizer.json; errors as for `heedful.Tokenizer.from_file`."""
        return cls(Tokenizer.from_file(path))

    @classmethod
    def from_str(cls, json: str) -> HuggingFaceTokenizer:
        """Of the text of a tokenizer.json; errors as for `heedful.Tokenizer.from_str`."""
        return cls(Tokenizer.from_str(json))

    @classmethod
    def from_buffer(cls, buffer: bytes) -> HuggingFaceTokenizer:
        """Of the bytes of a tokenizer.json; errors as for `heedful.Tokenizer.from_str`."""
        return cls(Tokenizer.from_str(bytes(buffer).decode()))

    @cached_property
    def _around(self) -> tuple[list[int], list[int]]:
        """The ids that the post-processor puts before and behind a text."""
        alone = self._tokenizer.encode("", add_special_tokens=True)
        if not alone:
            return [], []
        # Of two texts that begin with different ids, at most one can go on as what stands behind does.
        before = len(alone)
        for text in ("a", "!"):
            ids = self._tokenizer.encode(text, add_special_tokens=True)
            same = next((n for n, (x, y) in enumerate(zip(ids, alone, strict=False)) if x != y), len(alone))
            before = min(before, same)
        return alone[:before], alone[before:]

    def _encoding(self, parts: list[str], rows: list[list[int]], words: bool, add_special_tokens: bool) -> Encoding:
        return Encoding(self._tokenizer, parts, rows, self._around if add_special_tokens else ([], []), words)

    @staticmethod
    def _parts(sequence: Any, is_pretokenized: bool) -> list[str]:
        """A text, as a list of one; or its words."""
        if not is_pretokenized:
            if isinstance(sequence, (tuple, list)) and len(sequence) == 2:
                not_here("a pair of texts", "encode the texts one by one, and join their ids as the model wants them")
            if not isinstance(sequence, str):
                raise TypeError(f"sequence: expected a string, got {type(sequence).__name__}")
            return [sequence]
        if not isinstance(sequence, (tuple, list)) or not all(isinstance(word, str) for word in sequence):
            raise TypeError(f"sequence: expected a list of strings (is_pretokenized), got {type(sequence).__name__}")
        return list(sequence)

    def encode(
        self,
        sequence: str | Words,
        pair: str | Words | None = None,
        is_pretokenized: bool = False,
        add_special_tokens: bool = True,
    ) -> Encoding:
        """The encoding of a text; added tokens are recognised in it.

        Args:
            sequence: the text; or its words, each of which is encoded by itself.
            pair: a second text: not here.
            is_pretokenized: whether `sequence` is words.
            add_special_tokens: put the post-processor's tokens around the text.

        Raises:
            TypeError: `sequence` is of another type.
            ValueError: it is not Unicode.
            NotImplementedError: `pair` is given.
        """
        if pair is not None:
            not_here("a pair of texts", "encode the texts one by one, and join their ids as the model wants them")
        return self.encode_batch([sequence], is_pretokenized, add_special_tokens)[0]

    def encode_batch(
        self, input: Iterable[str | Words], is_pretokenized: bool = False, add_special_tokens: bool = True
    ) -> list[Encoding]:
        """The encodings of many texts; arguments and errors as for `encode`."""
        texts = [self._parts(sequence, is_pretokenized) for sequence in input]
        rows = iter(self._tokenizer.encode_batch([part for text in texts for part in text], allowed_special="all"))
        return [self._encoding(text, [next(rows) for _ in text], is_pretokenized, add_special_tokens) for text in texts]

    def encode_batch_fast(
        self, input: Iterable[str | Words], is_pretokenized: bool = False, add_special_tokens: bool = True
    ) -> list[Encoding]:
        """`encode_batch`, whose offsets cost nothing until they are asked for."""
        return self.encode_batch(input, is_pretokenized, add_special_tokens)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ids; errors as for `heedful.Tokenizer.decode`."""
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def decode_batch(self, sequences: Iterable[Sequence[int]], skip_special_tokens: bool = True) -> list[str]:
        """The texts of many sequences of ids; errors as for `decode`."""
        return self._tokenizer.decode_batch(sequences, skip_special_tokens=skip_special_tokens)

    def token_to_id(self, token: str) -> int | None:
        """The id of a token's string; None if there is none."""
        return self._tokenizer.token_to_id(token)

    def id_to_token(self, id: int) -> str | None:
        """A token's string; None for an id without a token."""
        return self._tokenizer.id_to_token(id)

    @cached_property
    def _vocab(self) -> dict[str, int]:
        strings = ((self._tokenizer.id_to_token(id), id) for id in range(self._tokenizer.vocab_size))
        return {string: id for string, id in strings if string is not None}

    def get_vocab(self, with_added_tokens: bool = True) -> dict[str, int]:
        """Token strings and ids.

        Raises:
            NotImplementedError: `with_added_tokens` is False: which added tokens the model has as well is not kept.
        """
        if not with_added_tokens:
            not_here("the vocabulary without added tokens", "take heedful.Tokenizer.added_tokens out of the whole")
        return dict(self._vocab)

    def get_vocab_size(self, with_added_tokens: bool = True) -> int:
        """How many tokens there are; raises as `get_vocab`."""
        if not with_added_tokens:
            not_here("the vocabulary without added tokens", "take heedful.Tokenizer.added_tokens out of the whole")
        return len(self._vocab)

    def num_special_tokens_to_add(self, is_pair: bool = False) -> int:
        """How many tokens the post-processor puts around a text."""
        if is_pair:
            not_here("a pair of texts", "encode the texts one by one")
        return sum(map(len, self._around))

    def no_truncation(self) -> None:
        """Nothing: truncation is never on."""

    def no_padding(self) -> None:
        """Nothing: padding is never on."""

    def enable_truncation(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not here."""
        not_here("enable_truncation", "the object cannot be changed; use heedful.Tokenizer.truncate_to, or slice ids")

    def enable_padding(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not here."""
        not_here("enable_padding", "the object cannot be changed; use encode_batch_flat, or pad where a batch is built")

    def add_tokens(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not here."""
        not_here("add_tokens", "the object cannot be changed; add the tokens to the file")

    def add_special_tokens(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not here."""
        not_here("add_special_tokens", "the object cannot be changed; add the tokens to the file")

    def get_added_tokens_decoder(self) -> NoReturn:
        """Not here."""
        not_here("get_added_tokens_decoder", "heedful.Tokenizer.added_tokens and special_tokens hold names and ids")


class DecodeStream:
    """`tokenizers.decoders.DecodeStream`: decodes one sequence token by token.

    Like the original, it gives nothing while the last character is unfinished. Where the original takes any text that
    ends in U+FFFD for unfinished, this one tells a wrong byte and a true U+FFFD from the beginning of a character.
    """

    def __init__(self, ids: Sequence[int] | None = None, skip_special_tokens: bool = False) -> None:
        """
        Args:
            ids: what came before, and is not given out.
            skip_special_tokens: leave out the tokens that the file flags as special.
        """
        self._before, self._skip = list(ids or ()), skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def step(self, tokenizer: HuggingFaceTokenizer, id: int | Sequence[int]) -> str | None:
        """The text that an id, or several, complete; None if they complete none.

        Raises:
            ValueError: an id is negative or of more than 32 bits.
        """
        ids = [id] if isinstance(id, int) else list(id)
        data = tokenizer._tokenizer.decode_bytes(ids, skip_special_tokens=self._skip)
        if self._before:
            self._utf8.decode(tokenizer._tokenizer.decode_bytes(self._before, skip_special_tokens=self._skip))
            self._before = []
        text = self._held + self._utf8.decode(data)
        unfinished = bool(self._utf8.getstate()[0])
        self._held = text if unfinished else ""
        return None if unfinished else text or None
