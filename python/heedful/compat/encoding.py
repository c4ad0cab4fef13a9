"""One encoded text, behind the interface of `tokenizers.Encoding`."""

from __future__ import annotations

from functools import cached_property
from typing import Any, NoReturn

from heedful._core import Tokenizer


def not_here(what: str, instead: str) -> NoReturn:
    """Raises NotImplementedError: what is not in the interface, and what to do instead."""
    raise NotImplementedError(f"{what} is not in this interface: {instead}")


class Encoding:
    """One encoded text: `tokenizers.Encoding`'s reading interface.

    Token strings and offsets are computed when they are first asked for.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        parts: list[str],
        rows: list[list[int]],
        around: tuple[list[int], list[int]],
        words: bool,
    ) -> None:
        """Made by `HuggingFaceTokenizer.encode`.

        Args:
            tokenizer: what encoded the parts.
            parts: the text; or its words, if it came in words.
            rows: the ids of each part.
            around: the ids that the post-processor put before and behind.
            words: whether the parts are words.
        """
        self._tokenizer, self._parts, self._rows, self._around, self._words = tokenizer, parts, rows, around, words
        before, behind = around
        self.ids: list[int] = [*before, *(id for row in rows for id in row), *behind]

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return (
            f"Encoding(num_tokens={len(self)}, "
            "attributes=[ids, type_ids, tokens, offsets, attention_mask, special_tokens_mask, overflowing])"
        )

    def _padded(self, inner: list[Any], outer: Any) -> list[Any]:
        """`inner` for the text's tokens, `outer` for the post-processor's."""
        before, behind = self._around
        return [outer] * len(before) + inner + [outer] * len(behind)

    def _text_range(self) -> range:
        before, behind = self._around
        return range(len(before), len(self.ids) - len(behind))

    @cached_property
    def offsets(self) -> list[tuple[int, int]]:
        """Where each token stands, in characters of the text (of its word, if the text came in words)."""
        found: list[tuple[int, int]] = []
        for part in self._parts:
            _, offsets = self._tokenizer.encode_with_offsets(part, allowed_special="all")
            found += [(start, end) for start, end in offsets.tolist()]
        return self._padded(found, (0, 0))

    @cached_property
    def tokens(self) -> list[str]:
        """The tokens' strings, in the byte-level alphabet; an added token with the white space that it took."""
        strings = [self._tokenizer.id_to_token(id) or "" for id in self.ids]
        added = self._tokenizer.added_tokens
        if not added.keys().isdisjoint(strings):
            inside, place = self._text_range(), self._part_of_token
            for index in inside:
                if strings[index] in added:
                    start, end = self.offsets[index]
                    span = self._parts[place[index - inside.start]][start:end]
                    strings[index] = span if span.strip() == strings[index].strip() else strings[index]
        return strings

    @cached_property
    def _part_of_token(self) -> list[int]:
        return [part for part, row in enumerate(self._rows) for _ in row]

    @property
    def attention_mask(self) -> list[int]:
        """1 for each token: nothing is padded."""
        return [1] * len(self)

    @property
    def special_tokens_mask(self) -> list[int]:
        """1 for the tokens that the post-processor put around the text."""
        return self._padded([0] * len(self._text_range()), 1)

    @property
    def type_ids(self) -> list[int]:
        """0 for each token of one text."""
        if any(self._around):
            not_here("type_ids beside a template's tokens", "the template's are not kept; encode without them")
        return [0] * len(self)

    @property
    def sequence_ids(self) -> list[int | None]:
        """0 for the text's tokens, None for the post-processor's."""
        return self._padded([0] * len(self._text_range()), None)

    @property
    def n_sequences(self) -> int:
        """How many texts: one."""
        return 1

    @property
    def overflowing(self) -> list[Encoding]:
        """What truncation cut off: nothing."""
        return []

    @property
    def word_ids(self) -> list[int | None]:
        """The word of each token, for a text that came in words.

        Raises:
            NotImplementedError: the text did not; the pieces that the pre-tokenizer made are not kept.
        """
        if not self._words:
            not_here(
                "word_ids of a text that was not given in words", "use offsets, or encode with is_pretokenized=True"
            )
        return self._padded(list(self._part_of_token), None)

    def char_to_token(self, char_pos: int, sequence_index: int = 0) -> int | None:
        """The token that holds a character; None if none does."""
        places = self._text_range() if sequence_index == 0 else range(len(self))
        return next((i for i in places if self.offsets[i][0] <= char_pos < self.offsets[i][1]), None)

    def token_to_sequence(self, token_index: int) -> int | None:
        """0 for a token of the text, None for others."""
        return 0 if token_index in self._text_range() else None

    def token_to_chars(self, token_index: int) -> tuple[int, int] | None:
        """Where a token stands; None for one that is not of the text."""
        return self.offsets[token_index] if token_index in self._text_range() else None

    def token_to_word(self, token_index: int) -> int | None:
        """A token's word; raises as `word_ids`."""
        words = self.word_ids
        return words[token_index] if token_index in self._text_range() else None

    def char_to_word(self, char_pos: int, sequence_index: int = 0) -> int | None:
        """A character's word; raises as `word_ids`."""
        words, token = self.word_ids, self.char_to_token(char_pos, sequence_index)
        return None if token is None else words[token]

    def word_to_tokens(self, word_index: int, sequence_index: int = 0) -> tuple[int, int] | None:
        """First token of a word, and one more than its last; raises as `word_ids`."""
        places = [index for index, word in enumerate(self.word_ids) if word == word_index]
        return (places[0], places[-1] + 1) if places else None

    def word_to_chars(self, word_index: int, sequence_index: int = 0) -> tuple[int, int] | None:
        """Where a word stands; raises as `word_ids`."""
        tokens = self.word_to_tokens(word_index, sequence_index)
        return tokens and (self.offsets[tokens[0]][0], self.offsets[tokens[1] - 1][1])

    def pad(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not here."""
        not_here("pad", "pad the ids where a batch is built")

    def truncate(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not here."""
        not_here("truncate", "slice ids, or use heedful.Tokenizer.truncate_to")
