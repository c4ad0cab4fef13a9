"""The tokenizer against its references: Hugging Face tokenizers and tiktoken, on real files and on made ones."""

from __future__ import annotations

import json
import random
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from heedful import Tokenizer, builtin
from tokenizer_files import (
    BYTE_LEVEL,
    CL100K_PATTERN,
    CL100K_SPECIAL,
    added,
    cl100k_ranks,
    real,
    sequence,
    small,
    split,
    unpacked,
)
from tokenizer_texts import Source, excerpts
from tokenizer_texts import texts as drawn_texts

REAL = ("deepseek-v3.2", "deepseek-v4", "qwen3", "built-in")


def pair_of(document: str | dict[str, Any]) -> tuple[Tokenizer, tokenizers.Tokenizer]:
    text = document if isinstance(document, str) else json.dumps(document)
    return Tokenizer.from_str(text), tokenizers.Tokenizer.from_str(text)


@pytest.fixture(scope="module", params=REAL)
def pair(request: pytest.FixtureRequest) -> tuple[Tokenizer, tokenizers.Tokenizer]:
    """Ours and the reference's, of one real file."""
    if request.param == "built-in":
        return pair_of((builtin.path() / "tokenizer.json").read_text(encoding="utf-8"))
    return pair_of(real(request.param))


def theirs(reference: tokenizers.Tokenizer, texts: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in reference.encode_batch(texts, add_special_tokens=False)]


def test_ids_of_real_files_are_those_of_the_reference(pair: tuple[Tokenizer, tokenizers.Tokenizer]) -> None:
    ours, reference = pair
    texts = list(excerpts())
    assert sum(map(len, texts)) > 500_000
    assert ours.encode_batch(texts, allowed_special="all") == theirs(reference, texts)
    assert [ours.decode(ours.encode(text)) for text in texts] == [
        unicodedata.normalize("NFC", text) if reference.normalizer and "NFC" in repr(reference.normalizer) else text
        for text in texts
    ]


@given(st.text(max_size=200))
def test_ids_of_any_text_are_those_of_the_reference(text: str) -> None:
    for ours, reference in (DEEPSEEK, QWEN):
        assert ours.encode(text, allowed_special="all") == reference.encode(text, add_special_tokens=False).ids


DEEPSEEK = pair_of(real("deepseek-v3.2"))
QWEN = pair_of(real("qwen3"))
OURS = DEEPSEEK[0]


@pytest.mark.parametrize(
    "text",
    [*(character * 50_000 for character in "a \n!中7"), " \n" * 20_000, "e\u0301" * 9_000],
    ids=lambda text: f"{len(text)} of {text[:2]!r}",
)
def test_long_runs_are_encoded_as_the_reference_does(text: str) -> None:
    for ours, reference in (DEEPSEEK, QWEN):
        assert ours.encode(text) == reference.encode(text, add_special_tokens=False).ids


def test_long_random_letters_are_merged_as_the_reference_does() -> None:
    rng = random.Random(3)
    for length in (63, 64, 65, 66, 1000, 30_000):
        text = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=length))
        assert OURS.encode(text) == DEEPSEEK[1].encode(text, add_special_tokens=False).ids


# Files of ranks


@pytest.fixture(scope="module")
def cl100k(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, tiktoken.Encoding]:
    path = tmp_path_factory.mktemp("tiktoken") / "cl100k_base.tiktoken"
    path.write_bytes(unpacked("cl100k_base.tiktoken"))
    reference = tiktoken.Encoding(
        "cl100k", pat_str=CL100K_PATTERN, mergeable_ranks=cl100k_ranks(), special_tokens=CL100K_SPECIAL
    )
    return Tokenizer.from_tiktoken(path, CL100K_PATTERN, CL100K_SPECIAL), reference


def test_a_tiktoken_file_has_tiktokens_number_of_ids(cl100k: tuple[Tokenizer, tiktoken.Encoding]) -> None:
    ours, reference = cl100k
    assert ours.vocab_size == reference.n_vocab


def test_special_tokens_of_a_tiktoken_file(cl100k: tuple[Tokenizer, tiktoken.Encoding]) -> None:
    ours, _ = cl100k
    assert ours.special_tokens == CL100K_SPECIAL
    text = "a<|endoftext|>b<|endofprompt|>"
    assert ours.encode(text, allowed_special={"<|endoftext|>"})[1] == 100257
    assert ours.decode(ours.encode(text, allowed_special="all"), skip_special_tokens=True) == "ab"


@pytest.mark.parametrize(
    ("lines", "pattern", "special", "message"),
    [
        ("IQ==\n", r"\S+", {}, "line 1: expected base64, a space and a rank"),
        ("IQ== 0\n*** 1\n", r"\S+", {}, "line 2: expected base64"),
        ("IQ== -1\n", r"\S+", {}, "line 1: expected base64"),
        (" 0\n", r"\S+", {}, "line 1: expected base64"),
        ("IQ== 0\n", r"\S+", {}, "ranks: expected a token for each of the 256 bytes, got none for 0x00"),
        ("IQ== 0\nIQ== 1\n", r"\S+", {}, "ranks: expected each token once"),
        ("IQ== 0\nIg== 0\n", r"\S+", {}, "ranks: expected an id of its own for each token, got 0 twice"),
        ("IQ== 4000000000\n", r"\S+", {}, "ranks: expected ids below"),
        ("IQ== 0\n", r"(a)\1", {}, r"pattern: .*\\1 is not supported"),
        (None, r"\S+", {"<s>": 7}, "special_tokens: expected an id of its own"),
        (None, r"\S+", {"": 300}, "special_tokens: expected tokens that are not empty"),
    ],
)
def test_a_bad_tiktoken_file_is_refused(
    tmp_path: Path, lines: str | None, pattern: str, special: dict[str, int], message: str
) -> None:
    import base64

    every_byte = "".join(f"{base64.b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(256))
    path = tmp_path / "ranks"
    path.write_text(every_byte if lines is None else lines)
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_tiktoken(path, pattern, special)


# Files of the same construction

PATTERNS = {
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "cl100k": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "o200k": "|".join(
        [
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
            r"\p{N}{1,3}",
            r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
            r"\s*[\r\n]+",
            r"\s+(?!\S)",
            r"\s+",
        ]
    ),
    "words": r"\s?\p{L}+",
    "lines": r"[^\n]*\n",
    "Han and kana": r"[\p{Han}\p{Hiragana}\p{Katakana}]+",
    "look-ahead at a class": r"\s+(?=[a-z])",
    "not a property": r"\P{L}+",
    "caret property": r"\p{^N}{2,}",
    "code points": r"[\x{4E00}-\x{9FA5}\u3040-\u30FF\x41-\x5A]+",
    "nested sets": r"[^(\s|[.,!?])]+",
    "any": r"..",
    "escapes": r"[\t\f\v\-\]\\^]+|\.\*\+",
}

MIXED = st.text(
    st.one_of(
        st.sampled_from(" \n\r\t'stSſ'mlLvVeEdD12٣Ⅷ.,!?-]\\^ax\x0b\x0c\u3000中あア々é\u0301ǅʰ한ß"),
        st.characters(exclude_categories=["Cs"]),
    ),
    max_size=60,
)


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_split_as_the_reference_splits(name: str) -> None:
    # A real vocabulary, whose many merges show where the pieces were cut.
    document = json.loads(real("deepseek-v3.2")) | {"pre_tokenizer": sequence(split(PATTERNS[name]))}
    ours, reference = pair_of(document)

    @settings(max_examples=200)
    @given(MIXED)
    def check(text: str) -> None:
        assert ours.encode(text) == reference.encode(text).ids

    check()
    for text in ("hello hello123 world 12123aaaa", "It's I'LL we'Ve 'ſ", "a  b\n\n c\r\n\td", "x" * 300, "the 中 the"):
        assert ours.encode(text) == reference.encode(text).ids


BEHAVIORS = ("Isolated", "Removed", "MergedWithPrevious", "MergedWithNext", "Contiguous")


@pytest.mark.parametrize("invert", [False, True])
@pytest.mark.parametrize("behavior", BEHAVIORS)
def test_split_behaviors_are_those_of_the_reference(behavior: str, invert: bool) -> None:
    pairs = [
        pair_of(small(pre_tokenizer=sequence(split("l", behavior, invert=invert, literal=True)))),
        pair_of(small(pre_tokenizer=sequence(split(r"\p{L}", "Isolated"), split("[el]+", behavior, invert=invert)))),
        pair_of(small(pre_tokenizer=sequence(split(r"[12 ]|the", behavior, invert=invert)))),
    ]

    @settings(max_examples=100)
    @given(st.text("hello 123thew", max_size=30))
    def check(text: str) -> None:
        for ours, reference in pairs:
            assert ours.encode(text) == reference.encode(text).ids

    check()


CONSTRUCTIONS: dict[str, dict[str, Any]] = {
    "individual digits": {"pre_tokenizer": sequence({"type": "Digits", "individual_digits": True})},
    "runs of digits": {"pre_tokenizer": sequence({"type": "Digits", "individual_digits": False})},
    "GPT-2's own pattern": {"pre_tokenizer": {**BYTE_LEVEL, "use_regex": True}},
    "prefix space": {"pre_tokenizer": {**BYTE_LEVEL, "add_prefix_space": True, "use_regex": True}},
    "prefix space behind a split": {
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split(r"\p{N}"), {**BYTE_LEVEL, "add_prefix_space": True}],
        }
    },
    "a sequence in a sequence": {"pre_tokenizer": sequence({"type": "Sequence", "pretokenizers": [split(r"\s")]})},
    "an empty sequence": {"pre_tokenizer": sequence({"type": "Sequence", "pretokenizers": []})},
    "NFC": {"normalizer": {"type": "NFC"}},
    "NFC in a sequence": {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}]}},
    "no normalizers": {"normalizer": {"type": "Sequence", "normalizers": []}},
    "whole pieces first": {"model": {"ignore_merges": True}, "pre_tokenizer": sequence(split(r"\p{L}+"))},
    "merges as pairs": {"model": {"merges": [["h", "e"], ["l", "l"], ["he", "ll"]]}},
    "one merge twice": {"model": {"merges": ["h e", "l l", "he ll", "l l", "h e"]}},
    "a file of an older version": {"model": {"type": None, "ignore_merges": None}},
    "added tokens": {
        "added_tokens": [
            added(271, "<s>", special=True),
            added(270, "the"),
            added(272, "then"),
            added(273, "éa", normalized=True),
        ],
        "normalizer": {"type": "NFC"},
    },
    "stripping tokens": {
        "added_tokens": [added(271, "<l>", lstrip=True), added(272, "<r>", rstrip=True), added(273, " <", rstrip=True)]
    },
    "single words": {"added_tokens": [added(270, "the", single_word=True), added(271, "<w>", single_word=True)]},
    "tokens of the vocabulary": {"added_tokens": [added(256, "he", special=True), added(271, "hellos")]},
    "normalized tokens behind others": {
        "added_tokens": [added(271, "<s>", normalized=True), added(272, "<s>e"), added(263, "12", normalized=True)]
    },
}
PARTS = [
    "hello",
    "123",
    "é",
    "éa",
    "e\u0301a",
    "<s>",
    "<l>",
    "<r>",
    "<w>",
    "the",
    "then",
    "\n\u3000",
    "中",
    "'s",
    " ",
    "  ",
]


@pytest.mark.parametrize("name", CONSTRUCTIONS)
def test_constructions_give_the_ids_of_the_reference(name: str) -> None:
    ours, reference = pair_of(small(**CONSTRUCTIONS[name]))

    @settings(max_examples=200)
    @given(st.lists(st.sampled_from(PARTS) | st.text(max_size=1), max_size=20).map("".join))
    def check(text: str) -> None:
        ids = ours.encode(text, allowed_special="all")
        assert ids == reference.encode(text, add_special_tokens=False).ids
        for skip in (False, True):
            assert ours.decode(ids, skip_special_tokens=skip) == reference.decode(ids, skip_special_tokens=skip)

    check()


def template(single: list[Any], **tokens: int) -> dict[str, Any]:
    listed = {name: {"id": name, "ids": [id], "tokens": [name]} for name, id in tokens.items()}
    return {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": listed}


TEXT = {"Sequence": {"id": "A", "type_id": 0}}
BOS = {"SpecialToken": {"id": "bos", "type_id": 0}}
EOS = {"SpecialToken": {"id": "eos", "type_id": 0}}


@pytest.mark.parametrize(
    ("processor", "before", "behind"),
    [
        (None, [], []),
        (BYTE_LEVEL, [], []),
        (template([BOS, TEXT], bos=3), [3], []),
        (template([BOS, BOS, TEXT, EOS], bos=3, eos=5), [3, 3], [5]),
        ({"type": "Sequence", "processors": [BYTE_LEVEL, template([TEXT, EOS], eos=5)]}, [], [5]),
    ],
)
def test_the_post_processor_puts_its_tokens_around_the_text(
    processor: Any, before: list[int], behind: list[int]
) -> None:
    ours, reference = pair_of(small(post_processor=processor))
    for text in ("", "hello the"):
        assert ours.encode(text, add_special_tokens=True) == [*before, *ours.encode(text), *behind]
        assert ours.encode(text, add_special_tokens=True) == reference.encode(text).ids


# What is refused

CYCLIC = ["h e", "he ", " he"]
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another model": ({"model": {"type": "Unigram"}}, r'model.type: "Unigram" is not supported'),
    "dropout": ({"model": {"dropout": 0.1}}, "model.dropout: 0.1 is not supported"),
    "a prefix of subwords": ({"model": {"continuing_subword_prefix": "##"}}, "model.continuing_subword_prefix"),
    "a suffix of words": ({"model": {"end_of_word_suffix": "</w>"}}, "model.end_of_word_suffix"),
    "an unknown setting of the model": ({"model": {"new_idea": 1}}, "new_idea"),
    "no vocabulary": ({"model": {"vocab": {}}}, "model.vocab: expected a token for each of the 256 bytes"),
    "no merges": ({"model": {"merges": None}}, "merges"),
    "a merge of unknown tokens": ({"model": {"merges": ["h e", "q q"]}}, r'model.merges\[1\]: .*"qq"'),
    "a merge that gives itself": ({"model": {"merges": [["h", ""]]}}, r"model.merges\[0\]: expected two tokens"),
    "a merge in a circle": ({"model": {"merges": ["h e", ["", "he"]]}}, r"model.merges\[1\]: expected two tokens"),
    "a merge of three": ({"model": {"merges": ["h e l"]}}, "a merge: two tokens"),
    "a merge that is a number": ({"model": {"merges": [7]}}, "a merge: two tokens"),
    "a normalizer": ({"normalizer": {"type": "Lowercase"}}, "normalizer: Lowercase is not supported"),
    "a normalizer in a sequence": (
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "NFKC"}]}},
        r"normalizer.normalizers\[1\]: NFKC is not supported",
    ),
    "a pre-tokenizer": (
        {"pre_tokenizer": sequence({"type": "Metaspace", "replacement": "_"})},
        r"pre_tokenizer.pretokenizers\[0\]: Metaspace is not supported",
    ),
    "a pre-tokenizer behind the bytes": (
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [BYTE_LEVEL, split("a")]}},
        r"pre_tokenizer.pretokenizers\[1\]: a pre-tokenizer behind ByteLevel",
    ),
    "no ByteLevel": ({"pre_tokenizer": split("a")}, "pre_tokenizer: a tokenizer without ByteLevel"),
    "no pre-tokenizer": ({"pre_tokenizer": None}, "pre_tokenizer: a tokenizer without ByteLevel"),
    "an unknown setting of Split": (
        {"pre_tokenizer": sequence({**split("a"), "greedy": True})},
        r"pre_tokenizer.pretokenizers\[0\]: .*greedy",
    ),
    "an unknown behavior": ({"pre_tokenizer": sequence(split("a", "Shuffled"))}, "Shuffled"),
    "a back reference": ({"pre_tokenizer": sequence(split(r"(a)\1"))}, r"pretokenizers\[0\].pattern: .*\\1"),
    "a look-behind": ({"pre_tokenizer": sequence(split(r"(?<=a)b"))}, r"pattern: the group \(\?<="),
    "an anchor": ({"pre_tokenizer": sequence(split(r"a$"))}, r"pattern: the anchor \$"),
    "a lazy quantifier": ({"pre_tokenizer": sequence(split(r"a+?"))}, r"pattern: the lazy quantifier"),
    "a pattern for nothing": ({"pre_tokenizer": sequence(split(r"a*"))}, "pattern: .*empty string"),
    "an enormous automaton": (
        {"pre_tokenizer": sequence(split(r"((\p{L}{1000}){1000}){1000}"))},
        "pattern: a pattern that does not compile",
    ),
    "no decoder": ({"decoder": None}, "decoder: a decoder other than ByteLevel"),
    "another decoder": ({"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}, "decoder"),
    "a post-processor": (
        {"post_processor": {"type": "BertProcessing", "sep": ["x", 1], "cls": ["y", 2]}},
        "post_processor: BertProcessing is not supported",
    ),
    "a template without its token": (
        {"post_processor": template([BOS, TEXT])},
        'post_processor.single: expected a special token of the template, got "bos"',
    ),
    "a template with a foreign id": ({"post_processor": template([BOS, TEXT], bos=9999)}, "got 9999"),
    "a template with two texts": ({"post_processor": template([TEXT, TEXT])}, "a template with 2 texts"),
    "truncation": ({"truncation": {"max_length": 8}}, "truncation: a setting that changes every encoding"),
    "padding": ({"padding": {"length": 8}}, "padding: a setting that changes every encoding"),
    "another version": ({"version": "2.0"}, 'version: "2.0" is not supported'),
    "an unknown part": ({"translator": {}}, "translator"),
    "an added token with a wrong id": ({"added_tokens": [added(500, "<s>")]}, r"added_tokens\[0\]: expected id 271"),
    "an added token with another's id": ({"added_tokens": [added(271, "he")]}, r"added_tokens\[0\]: expected id 256"),
    "an empty added token": ({"added_tokens": [added(271, "")]}, r"added_tokens\[0\]: expected a token that is not"),
    "an added token with an unknown flag": ({"added_tokens": [{**added(271, "x"), "glued": True}]}, "glued"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_served_exactly_is_refused_by_name(name: str) -> None:
    changes, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_str(json.dumps(small(**changes)))


@pytest.mark.parametrize(
    ("vocab", "message"),
    [
        ({"a": 0}, "expected a token for each of the 256 bytes"),
        ({"a": 0, "b": 0}, "model.vocab: expected an id of its own for each token, got 0 twice"),
        ({"a": 2**31}, "model.vocab: expected ids below 16777216, got 2147483648"),
        ({"a": 2**40}, "tokenizer.json: expected the layout"),
        ({"a": -1}, "tokenizer.json: expected the layout"),
        ({"a": 1.5}, "tokenizer.json: expected the layout"),
        ([["a", 0]], "tokenizer.json: expected the layout"),
    ],
)
def test_a_bad_vocabulary_is_refused(vocab: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_str(json.dumps(small(model={"vocab": vocab, "merges": []})))


def test_a_token_twice_is_refused() -> None:
    text = json.dumps(small()).replace('"vocab": {', '"vocab": {"a": 500, ', 1)
    with pytest.raises(ValueError, match=r"model\.vocab: expected each token once"):
        Tokenizer.from_str(text)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"model": 3}', "[" * 100_000, '{"version": "1.0"}'], ids=lambda text: text[:20]
)
def test_what_is_no_tokenizer_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.json: expected the layout"):
        Tokenizer.from_str(text)


@given(st.data())
@settings(max_examples=150)
def test_a_damaged_file_loads_or_is_refused(data: st.DataObject) -> None:
    text = json.dumps(small(pre_tokenizer=sequence(split(PATTERNS["gpt2"])), added_tokens=[added(271, "<s>")]))
    at = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(at, min(len(text), at + 20)))
    damaged = text[:at] + data.draw(st.text(max_size=5)) + text[end:]
    try:
        tokenizer = Tokenizer.from_str(damaged)
    except ValueError:
        return
    assert tokenizer.decode(tokenizer.encode("hello")) in ("hello", " hello", "")


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no/such"):
        Tokenizer.from_file("no/such/tokenizer.json")
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        Tokenizer.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected a file"):
        Tokenizer.from_file(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b'{"version": "\xff"}')
    with pytest.raises(ValueError, match=r"tokenizer\.json: expected UTF-8 text, got another byte at 13"):
        Tokenizer.from_pretrained(tmp_path)


# Calls


def test_text_is_text_unless_tokens_are_allowed() -> None:
    text = "<｜User｜>hi<｜end▁of▁sentence｜>"
    every = OURS.encode(text, allowed_special="all")
    assert [every[0], every[-1]] == [OURS.token_to_id("<｜User｜>"), 1]
    assert max(OURS.encode(text)) < 128_000
    assert OURS.decode(OURS.encode(text)) == text
    eos = OURS.encode(text, allowed_special={"<｜end▁of▁sentence｜>"})
    assert eos[-1] == 1
    assert eos[:-1] == OURS.encode("<｜User｜>hi")
    assert OURS.encode(text, allowed_special=list(OURS.added_tokens)) == every
    assert OURS.encode(text, allowed_special=set()) == OURS.encode(text)


def test_role_marks_are_added_tokens_that_are_not_special() -> None:
    assert "<｜User｜>" in OURS.added_tokens
    assert "<｜User｜>" not in OURS.special_tokens
    assert OURS.special_tokens["<｜begin▁of▁sentence｜>"] == 0
    ids = OURS.encode("<｜User｜>hi<｜end▁of▁sentence｜>", allowed_special="all")
    assert OURS.decode(ids, skip_special_tokens=True) == "<｜User｜>hi"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: OURS.encode(3), TypeError, "text: expected a string or bytes, got int"),
        (lambda: OURS.encode(["a"]), TypeError, "text: expected a string or bytes, got list"),
        (lambda: OURS.encode("\ud800a"), ValueError, "text: expected Unicode text"),
        (lambda: OURS.encode(b"ab\xffc"), ValueError, "text: expected UTF-8 text, got another byte at 2"),
        (lambda: OURS.encode(b"a", errors="ignore"), ValueError, "errors: expected strict, replace or raw, got"),
        (lambda: OURS.encode("a", allowed_special="some"), ValueError, 'allowed_special: .*got "some"'),
        (lambda: OURS.encode("a", allowed_special=3), TypeError, "allowed_special: .*got int"),
        (lambda: OURS.encode("a", allowed_special=[3]), TypeError, "allowed_special: .*got list"),
        (lambda: OURS.encode("a", allowed_special={"<x>"}), ValueError, 'allowed_special: .*got "<x>"'),
        (lambda: OURS.encode_batch("abc"), TypeError, "texts: expected a list of texts, got one str"),
        (lambda: OURS.encode_batch(["a", b"\xff"]), ValueError, r"texts\[1\]: expected UTF-8 text"),
        (lambda: OURS.encode_batch(["a", None]), TypeError, r"texts\[1\]: expected a string or bytes"),
        (lambda: OURS.decode([1, -1]), ValueError, "ids: expected ids from 0"),
        (lambda: OURS.decode([2**40]), ValueError, "ids: expected ids from 0"),
        (lambda: OURS.decode("ab"), TypeError, "ids: expected a list of ints"),
        (lambda: OURS.decode(np.zeros((2, 2), np.int64)), TypeError, "ids: expected a list of ints"),
        (lambda: OURS.decode_batch([[1], [-5]]), ValueError, r"batch\[1\]: expected ids"),
    ],
)
def test_bad_arguments_are_named(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
    assert OURS.decode(OURS.encode("still here")) == "still here"


@given(st.binary(max_size=80))
def test_bytes_are_text_in_utf8(data: bytes) -> None:
    text = data.decode(errors="replace")
    assert OURS.encode(data, errors="replace") == OURS.encode(text)
    assert OURS.encode(text.encode()) == OURS.encode(text)
    try:
        data.decode()
    except UnicodeDecodeError as error:
        with pytest.raises(ValueError, match=f"another byte at {error.start} "):
            OURS.encode(data)
    else:
        assert OURS.decode_bytes(OURS.encode(data)) == data


@given(st.text(max_size=100))
def test_text_comes_back_whole(text: str) -> None:
    ids = OURS.encode(text)
    assert OURS.decode(ids) == text
    assert OURS.decode_bytes(ids) == text.encode()
    assert OURS.count(text) == len(ids)
    array = OURS.encode_to_numpy(text)
    assert (array.dtype, array.tolist()) == (np.uint32, ids)


def test_ids_come_as_lists_or_integer_arrays() -> None:
    ids = OURS.encode("hello world, 中文")
    for dtype in (np.int32, np.int64, np.uint32):
        array = np.array(ids, dtype)
        assert OURS.decode(array) == OURS.decode(ids)
        assert OURS.decode(np.repeat(array, 2)[::2]) == OURS.decode(ids)
    assert OURS.decode_batch([ids, [], np.array(ids)]) == [OURS.decode(ids), "", OURS.decode(ids)]
    assert OURS.decode(np.array([], np.int32)) == ""


def test_tokens_and_ids_are_named_as_the_file_names_them(pair: tuple[Tokenizer, tokenizers.Tokenizer]) -> None:
    ours, reference = pair
    for token, id in reference.get_vocab(with_added_tokens=True).items():
        assert ours.token_to_id(token) == id, token
        assert ours.id_to_token(id) == token, id
    assert ours.vocab_size == reference.get_vocab_size(with_added_tokens=True)
    for id in (ours.vocab_size, 10**9, -1, 2**40):
        assert ours.id_to_token(id) is None
    assert ours.token_to_id("no such token") is None
    assert ours.decode([ours.vocab_size, 10**9]) == ""


def test_threads_share_one_object() -> None:
    texts = drawn_texts(300, Source.of(OURS), seed=5)
    texts += [text * 60 for text in texts[:50]]  # long enough to give the GIL back
    expected = [OURS.encode(text) for text in texts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(OURS.encode, texts)) == expected
    assert OURS.encode_batch(texts) == expected
