"""A completion's text: stop strings, held-back text, stop tokens, abort."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from heedful import SamplingParams
from heedful.engine.request import Completion
from heedful.engine.sampler import SamplingState

PIECES = ["a", "b", "ab", "ba", "", "aa", "c"]


class PieceStream:
    def push(self, token_id: int) -> str:
        return PIECES[token_id]

    def flush(self) -> str:
        return ""


class PieceTokenizer:
    """Decodes each id to a fixed piece."""

    def stream(self, *, skip_special_tokens: bool) -> PieceStream:
        return PieceStream()


def completion(**params: object) -> Completion:
    state = SamplingState(SamplingParams(**params), 0, 0, [0])  # type: ignore[arg-type]
    return Completion("r/0", state, PieceTokenizer())  # type: ignore[arg-type]


ids = st.lists(st.integers(0, len(PIECES) - 1), min_size=1, max_size=12)
stops = st.lists(st.text("abc", min_size=1, max_size=4), max_size=3)


@given(ids=ids, stop=stops)
def test_text_ends_at_the_first_token_that_completes_a_stop_string(ids: list[int], stop: list[str]) -> None:
    one = completion(stop=stop)
    shown = ""
    for count, token_id in enumerate(ids, start=1):
        last = count == len(ids)
        one.append(token_id, None, "length" if last else None)
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
    one = completion(stop_token_ids=[6])
    one.append(0, None, None)
    one.append(6, None, "stop")
    assert one.output.token_ids == [0, 6]
    assert one.output.text == "a"
    assert one.output.stop_reason == 6


def test_the_end_of_sequence_has_no_stop_reason() -> None:
    one = completion()
    one.append(6, None, "stop")
    assert (one.output.finish_reason, one.output.stop_reason, one.output.text) == ("stop", None, "")


def test_abort_gives_the_text_so_far_with_what_was_held_back() -> None:
    one = completion(stop="bbbb")
    one.append(0, None, None)
    assert one.output.text == ""
    one.abort()
    assert (one.output.finish_reason, one.output.text) == ("abort", "a")
    one.abort()
    assert one.output.finish_reason == "abort"
