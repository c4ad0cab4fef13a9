"""A completion's text: stop strings, held-back text, stop tokens, abort."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from heedful import SamplingParams, Tokenizer
from heedful.engine.request import Completion
from heedful.engine.sampler import SamplingState
from tokenizer_files import added, byte_characters, small

PIECES = ["a", "b", "ab", "ba", "", "aa", "c", "\N{REPLACEMENT CHARACTER}"]
NAMES = ["a", "b", "ab", "ba", "<skipped>", "aa", "c", byte_characters()[0xFF]]  # the byte 0xFF is no UTF-8


def pieces() -> Tokenizer:
    """A tokenizer with these pieces among its tokens, the empty one as a special token."""
    vocab = {token: id for id, token in enumerate([*byte_characters(), "ab", "ba", "aa"])}
    model = {"vocab": vocab, "merges": ["a b", "b a", "a a"]}
    document = small(model=model, added_tokens=[added(len(vocab), "<skipped>", special=True)])
    return Tokenizer.from_str(json.dumps(document))


TOKENIZER = pieces()
TOKENS = [TOKENIZER.token_to_id(name) for name in NAMES]


def token(piece: int) -> int:
    found = TOKENS[piece]
    assert found is not None
    return found


def completion(prompt: bytes = b"x", **params: object) -> Completion:
    chosen = SamplingParams(**params)  # type: ignore[arg-type]
    prompt_ids = list(prompt)  # the first 256 tokens are the bytes
    stream = TOKENIZER.stream(skip_special_tokens=True, prompt_ids=prompt_ids, stop=chosen.stop)
    return Completion("r/0", SamplingState(chosen, 0, 0, prompt_ids), stream)


ids = st.lists(st.integers(0, len(PIECES) - 1), min_size=1, max_size=12)
stops = st.lists(st.text("abc\N{REPLACEMENT CHARACTER}", min_size=1, max_size=4), max_size=3)


@given(ids=ids, stop=stops)
def test_text_ends_at_the_first_token_that_completes_a_stop_string(ids: list[int], stop: list[str]) -> None:
    one = completion(stop=stop)
    shown = ""
    for count, token_id in enumerate(ids, start=1):
        last = count == len(ids)
        one.append(token(token_id), None, "length" if last else None)
        assert one.output.text.startswith(shown)  # what was shown is never taken back
        shown = one.output.text
        whole = "".join(PIECES[i] for i in ids[:count])
        found = [whole.find(s) for s in stop if s in whole]
        if found:
            assert one.output.finish_reason == "stop"
            assert one.output.stop_reason in stop
            assert one.output.text == whole[: min(found)]
            return
        assert one.finished == last
    assert one.output.text == whole
    assert one.output.finish_reason == "length"


def test_a_stop_token_is_an_id_of_the_output_but_not_of_its_text() -> None:
    one = completion(stop_token_ids=[token(6)])
    one.append(token(0), None, None)
    one.append(token(6), None, "stop")
    assert one.output.token_ids == [token(0), token(6)]
    assert one.output.text == "a"
    assert one.output.stop_reason == token(6)


def test_the_end_of_sequence_has_no_stop_reason() -> None:
    one = completion()
    one.append(token(6), None, "stop")
    assert (one.output.finish_reason, one.output.stop_reason, one.output.text) == ("stop", None, "")


def test_abort_gives_the_text_so_far_with_what_was_held_back() -> None:
    one = completion(stop="bbbb")
    one.append(token(3), None, None)
    one.append(token(1), None, None)
    one.append(token(2), None, None)
    assert one.output.text == "baba"  # the last b may begin "bbbb"
    one.abort()
    assert (one.output.finish_reason, one.output.stop_reason, one.output.text) == ("abort", None, "babab")
    one.abort()
    assert one.output.finish_reason == "abort"


def test_a_character_that_the_prompt_began_is_completed_in_the_text() -> None:
    first, second = "é".encode()
    one = completion(b"caf" + bytes([first]))
    one.append(second, None, None)
    assert one.output.text == "é"
    one = completion(b"caf" + bytes([first]), stop="é")
    one.append(second, None, None)
    assert (one.output.finish_reason, one.output.stop_reason, one.output.text) == ("stop", "é", "")
