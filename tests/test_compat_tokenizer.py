"""The tokenizer behind other libraries' interfaces, side by side with those libraries."""

from __future__ import annotations

import functools
import json
import pickle
import subprocess
import sys
import unicodedata
from typing import Any

import numpy as np
import pytest
import tiktoken
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from heedful import Tokenizer
from heedful.compat.hugging_face import DecodeStream, HuggingFaceTokenizer
from heedful.compat.tiktoken import TiktokenEncoding
from tokenizer_files import (
    CL100K_PATTERN,
    CL100K_SPECIAL,
    added,
    cl100k_ranks,
    real,
    sequence,
    small,
    split,
    temporary,
    unpacked,
)
from tokenizer_texts import CLASSES

FILES = ("deepseek-v3.2", "qwen3", "with a template")
BOS, EOS = {"SpecialToken": {"id": "bos", "type_id": 0}}, {"SpecialToken": {"id": "eos", "type_id": 0}}
TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [BOS, {"Sequence": {"id": "A", "type_id": 0}}, EOS],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {name: {"id": name, "ids": [id], "tokens": [name]} for name, id in (("bos", 271), ("eos", 272))},
}


def document(name: str) -> str:
    if name != "with a template":
        return real(name)
    marks = [added(271, "bos", special=True), added(272, "eos", special=True), added(273, "<s>", lstrip=True)]
    splits = sequence(split(r"\p{L}+| "))
    return json.dumps(small(post_processor=TEMPLATE, added_tokens=marks, pre_tokenizer=splits))


@functools.cache
def hugging_face(name: str) -> tuple[HuggingFaceTokenizer, tokenizers.Tokenizer]:
    return HuggingFaceTokenizer.from_str(document(name)), tokenizers.Tokenizer.from_str(document(name))


MARKS = (
    "<｜User｜>",
    "<｜end▁of▁sentence｜>",
    "</think>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|endofprompt|>",
    "<s>",
    "bos",
)
TEXTS = st.lists(st.sampled_from((*CLASSES, *MARKS, "hello", "the")) | st.text(max_size=4), max_size=12).map("".join)


slow = settings(deadline=None, max_examples=100)  # the first example loads the files
few = settings(deadline=None, max_examples=30)


# Hugging Face


def check_encoding(ours: Any, reference: Any) -> None:
    fields = ("ids", "tokens", "offsets", "attention_mask", "special_tokens_mask", "sequence_ids", "n_sequences")
    for field in (*fields, "overflowing"):
        assert getattr(ours, field) == getattr(reference, field), field
    assert (len(ours), repr(ours)) == (len(reference), repr(reference))
    for index in range(len(reference) + 2):
        assert ours.token_to_chars(index) == reference.token_to_chars(index), index
        assert ours.token_to_sequence(index) == reference.token_to_sequence(index), index


@slow
@given(TEXTS)
def test_encodings_are_those_of_the_reference(text: str) -> None:
    for ours, reference in map(hugging_face, FILES):
        for add_special_tokens in (True, False):
            got = ours.encode(text, add_special_tokens=add_special_tokens)
            expected = reference.encode(text, add_special_tokens=add_special_tokens)
            check_encoding(got, expected)
            for place in range(len(text) + 2):
                assert got.char_to_token(place) == expected.char_to_token(place)
                assert got.char_to_token(place, 1) == expected.char_to_token(place, 1)
            if not ours.num_special_tokens_to_add() or not add_special_tokens:
                assert got.type_ids == expected.type_ids


@slow
@given(st.lists(TEXTS.filter(bool), max_size=5))
def test_encodings_of_words_are_those_of_the_reference(words: list[str]) -> None:
    for name in FILES:
        ours, reference = hugging_face(name)
        got, expected = (face.encode(words, is_pretokenized=True) for face in (ours, reference))
        check_encoding(got, expected)
        assert got.word_ids == expected.word_ids
        for index in range(len(expected) + 1):
            assert got.token_to_word(index) == expected.token_to_word(index)
        for place in range(12):
            assert got.char_to_token(place) == expected.char_to_token(place)
            assert got.char_to_word(place) == expected.char_to_word(place)
        for word in range(len(words) + 1):
            assert got.word_to_tokens(word) == expected.word_to_tokens(word)
            assert got.word_to_chars(word) == expected.word_to_chars(word)


@few
@given(st.lists(TEXTS, max_size=6))
def test_batches_are_those_of_the_reference(texts: list[str]) -> None:
    for name in FILES:
        ours, reference = hugging_face(name)
        for add_special_tokens in (True, False):
            expected = reference.encode_batch(texts, add_special_tokens=add_special_tokens)
            for got in (ours.encode_batch, ours.encode_batch_fast):
                for one, other in zip(got(texts, add_special_tokens=add_special_tokens), expected, strict=True):
                    check_encoding(one, other)
        ids = [encoding.ids for encoding in expected]
        for skip in (True, False):
            assert ours.decode_batch(ids, skip_special_tokens=skip) == reference.decode_batch(
                ids, skip_special_tokens=skip
            )
        assert [ours.decode(row) for row in ids] == [reference.decode(row) for row in ids]


@pytest.mark.parametrize("name", FILES)
def test_the_vocabulary_is_that_of_the_reference(name: str) -> None:
    ours, reference = hugging_face(name)
    assert ours.get_vocab() == reference.get_vocab()
    assert ours.get_vocab_size() == reference.get_vocab_size()
    assert ours.num_special_tokens_to_add() == reference.num_special_tokens_to_add(False)
    for id in (0, 256, 10**8):
        assert ours.id_to_token(id) == reference.id_to_token(id)
    for token in ("a", "Ġ", "no such token", "<think>"):
        assert ours.token_to_id(token) == reference.token_to_id(token)


@slow
@example(" ª")  # a token of a whole character and the beginning of another
@given(TEXTS)
def test_a_stream_is_that_of_the_reference(text: str) -> None:
    for ours, reference in map(hugging_face, FILES):
        ids = reference.encode(text.replace("\ufffd", "")).ids
        for skip in (True, False):
            for first in {0, len(ids) // 2}:
                if "\ufffd" in reference.decode(ids[:first]) + reference.decode(ids[first:]):
                    continue  # cut inside a character, where the reference's stream gives text of the prompt
                stream = DecodeStream(ids[:first], skip_special_tokens=skip)
                twin = tokenizers.decoders.DecodeStream(ids[:first], skip_special_tokens=skip)
                for id in ids[first:]:
                    assert stream.step(ours, id) == twin.step(reference, id)


def test_a_stream_takes_several_ids_and_goes_on_behind_a_true_replacement_character() -> None:
    ours, _ = hugging_face("deepseek-v3.2")
    ids = ours.encode("a\ufffdb", add_special_tokens=False).ids
    assert DecodeStream().step(ours, ids) == "a\ufffdb"
    assert DecodeStream().step(ours, ours.encode("a\ufffd").ids) == "a\ufffd"
    assert DecodeStream().step(ours, []) is None
    first, *rest = (ours.token_to_id(character) for character in "ĠðŁĺĢ")  # a space and the bytes of U+1F600
    stream = DecodeStream()
    assert [stream.step(ours, [first, *rest[:1]]), *(stream.step(ours, id) for id in rest[1:])] == [
        None,
        None,
        None,
        " 😀",
    ]
    with pytest.raises(ValueError, match="ids: expected"):
        stream.step(ours, -1)


def test_what_is_not_exact_is_not_there() -> None:
    ours, _ = hugging_face("deepseek-v3.2")
    templated, _ = hugging_face("with a template")
    encoding = ours.encode("some words")
    for call, instead in (
        (lambda: ours.encode("a", "b"), "one by one"),
        (lambda: ours.encode_batch([("a", "b")]), "one by one"),
        (lambda: encoding.word_ids, "offsets"),
        (lambda: encoding.char_to_word(0), "offsets"),
        (lambda: encoding.word_to_tokens(0), "offsets"),
        (lambda: templated.encode("a").type_ids, "encode without them"),
        (lambda: encoding.pad(9), "where a batch is built"),
        (lambda: encoding.truncate(1), "truncate_to"),
        (lambda: ours.get_vocab(with_added_tokens=False), "added_tokens"),
        (lambda: ours.get_vocab_size(with_added_tokens=False), "added_tokens"),
        (lambda: ours.num_special_tokens_to_add(True), "one by one"),
        (lambda: ours.enable_truncation(8), "truncate_to"),
        (lambda: ours.enable_padding(length=8), "encode_batch_flat"),
        (lambda: ours.add_tokens(["x"]), "the file"),
        (lambda: ours.add_special_tokens(["x"]), "the file"),
        (lambda: ours.get_added_tokens_decoder(), "special_tokens"),
    ):
        with pytest.raises(NotImplementedError, match=instead):
            call()
    assert ours.no_truncation() is ours.no_padding() is ours.truncation is ours.padding is None


@pytest.mark.parametrize("sequence", [3, b"ab", None, ["a"], [1, "a", "b"]])
def test_what_is_no_text_is_refused(sequence: Any) -> None:
    for face in hugging_face("deepseek-v3.2"):
        with pytest.raises(TypeError):
            face.encode(sequence)
    for face in hugging_face("deepseek-v3.2"):
        with pytest.raises(TypeError):
            face.encode([sequence, 3], is_pretokenized=True)


def test_files_are_read_as_the_reference_reads_them() -> None:
    text = document("with a template")
    with temporary(text.encode()) as path:
        faces = [HuggingFaceTokenizer.from_file(path), HuggingFaceTokenizer.from_buffer(text.encode())]
    for face in faces:
        assert face.encode("hello").ids == hugging_face("with a template")[1].encode("hello").ids


# tiktoken


@functools.cache
def cl100k() -> tuple[TiktokenEncoding, tiktoken.Encoding]:
    reference = tiktoken.Encoding(
        "cl100k", pat_str=CL100K_PATTERN, mergeable_ranks=cl100k_ranks(), special_tokens=CL100K_SPECIAL
    )
    with temporary(unpacked("cl100k_base.tiktoken")) as path:
        tokenizer = Tokenizer.from_tiktoken(path, CL100K_PATTERN, CL100K_SPECIAL)
    return TiktokenEncoding(tokenizer, "cl100k"), reference


@functools.cache
def qwen3() -> tuple[TiktokenEncoding, tiktoken.Encoding]:
    """tiktoken's own object of a tokenizer.json: the ranks are the ids, the one split its pattern."""
    face = TiktokenEncoding(Tokenizer.from_str(real("qwen3")), "qwen3")
    described = json.loads(real("qwen3"))
    ranks = {face._tokenizer.decode_bytes([id]): id for id in described["model"]["vocab"].values()}
    pattern = described["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    special = {token["content"]: token["id"] for token in described["added_tokens"]}
    return face, tiktoken.Encoding("qwen3", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def outcome(call: Any, *args: Any, **kwargs: Any) -> Any:
    """What a call returns, or the type of what it raises."""
    try:
        result = call(*args, **kwargs)
    except (ValueError, KeyError) as error:
        return type(error)
    return result.tolist() if isinstance(result, np.ndarray) else result


SOME = frozenset({"<|endoftext|>", "<|im_end|>", "<|not a token|>"})


@slow
@given(TEXTS)
def test_ids_are_tiktokens(text: str) -> None:
    text = unicodedata.normalize("NFC", text)  # which qwen3's file does, and tiktoken does not
    for ours, reference in (cl100k(), qwen3()):
        for allowed in (set(), "all", SOME):
            for disallowed in ("all", (), SOME, ["hello"]):
                policy: Any = {"allowed_special": allowed, "disallowed_special": disallowed}
                expected = outcome(reference.encode, text, **policy)
                assert outcome(ours.encode, text, **policy) == expected
                assert outcome(ours.encode_to_numpy, text, **policy) == expected
        assert ours.encode_ordinary(text) == reference.encode_ordinary(text)
        ids = reference.encode(text, allowed_special="all")
        assert ours.decode_with_offsets(ids) == reference.decode_with_offsets(ids)
        assert ours.decode_tokens_bytes(ids) == reference.decode_tokens_bytes(ids)


@few
@given(st.lists(TEXTS, max_size=5))
def test_batches_are_tiktokens(texts: list[str]) -> None:
    ours, reference = cl100k()
    for policy in ({}, {"disallowed_special": ()}, {"allowed_special": "all"}, {"allowed_special": SOME}):
        kwargs: Any = {**policy, "num_threads": 2}
        expected = outcome(reference.encode_batch, texts, **kwargs)
        assert outcome(ours.encode_batch, texts, **kwargs) == expected
    ids = ours.encode_ordinary_batch(texts, num_threads=2)
    assert ids == reference.encode_ordinary_batch(texts)
    assert ours.decode_batch(ids, num_threads=2) == reference.decode_batch(ids)
    assert ours.decode_bytes_batch(ids, num_threads=2) == reference.decode_bytes_batch(ids)


@slow
@given(st.lists(st.integers(0, 100_280), max_size=12))
def test_decoding_is_tiktokens(ids: list[int]) -> None:
    ours, reference = cl100k()
    for method in ("decode", "decode_bytes", "decode_tokens_bytes", "decode_with_offsets"):
        assert outcome(getattr(ours, method), ids) == outcome(getattr(reference, method), ids), method
    for errors in ("strict", "ignore", "backslashreplace"):
        assert outcome(ours.decode, ids, errors) == outcome(reference.decode, ids, errors)
        assert outcome(ours.decode_batch, [ids], errors=errors) == outcome(reference.decode_batch, [ids], errors=errors)
    assert outcome(ours.decode_batch, [ids]) == outcome(reference.decode_batch, [ids])
    for id in ids:
        for method in ("decode_single_token_bytes", "is_special_token"):
            assert outcome(getattr(ours, method), id) == outcome(getattr(reference, method), id)


@slow
@given(st.binary(max_size=4) | TEXTS | st.sampled_from([b"\xff", "hello", *CL100K_SPECIAL]))
def test_single_tokens_are_tiktokens(token: bytes | str) -> None:
    ours, reference = cl100k()
    assert outcome(ours.encode_single_token, token) == outcome(reference.encode_single_token, token)


@pytest.mark.parametrize("pair", [cl100k, qwen3])
def test_the_vocabulary_is_tiktokens(pair: Any) -> None:
    ours, reference = pair()
    for name in ("name", "n_vocab", "max_token_value", "eot_token", "special_tokens_set"):
        assert getattr(ours, name) == getattr(reference, name), name
    assert ours.token_byte_values() == reference.token_byte_values()
    assert repr(ours) == repr(reference)


def test_surrogates_become_what_they_become_in_tiktoken() -> None:
    ours, reference = cl100k()
    for text in ("a\ud83d\ude00b", "a\ud83d", "\ude00\ud83d"):
        assert ours.encode(text) == reference.encode(text)
        assert ours.encode_ordinary(text) == reference.encode_ordinary(text)


def test_a_disallowed_token_is_named() -> None:
    ours, _ = cl100k()
    with pytest.raises(ValueError, match=r"got '<\|endoftext\|>'.*disallowed_special=\(\)"):
        ours.encode("a<|endoftext|>")
    with pytest.raises(NotImplementedError, match="encode_with_unstable"):
        ours.encode_with_unstable("a")
    deepseek = TiktokenEncoding(Tokenizer.from_str(real("deepseek-v3.2")))
    assert deepseek.name == "heedful"
    with pytest.raises(ValueError, match="<｜User｜>"):
        deepseek.encode("<｜User｜>hi")
    with pytest.raises(KeyError):
        _ = deepseek.eot_token


# Reached from the tokenizer


def test_the_tokenizer_gives_its_faces() -> None:
    tokenizer = Tokenizer.from_str(document("with a template"))
    assert tokenizer.as_hf().encode("hello").ids == tokenizer.encode(
        "hello", add_special_tokens=True, allowed_special="all"
    )
    assert tokenizer.as_tiktoken().name == "heedful"
    assert tokenizer.as_tiktoken("mine").name == "mine"
    assert tokenizer.as_tiktoken("mine").encode("hello") == tokenizer.encode("hello")


def test_faces_pickle() -> None:
    tokenizer = Tokenizer.from_str(document("with a template"))
    for face in (tokenizer.as_hf(), tokenizer.as_tiktoken("mine")):
        before = face.encode("hello")
        copy = pickle.loads(pickle.dumps(face))
        assert getattr(copy.encode("hello"), "ids", None) == getattr(before, "ids", None)
        assert type(copy) is type(face)


def test_importing_the_package_imports_no_face() -> None:
    code = "import sys, heedful; print(*(m for m in sys.modules if m.startswith('heedful.compat')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
