"""Sampling parameters out of range are refused by name."""

from __future__ import annotations

import pytest

from heedful import SamplingParams


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("temperature", -0.1, ValueError),
        ("temperature", float("nan"), ValueError),
        ("temperature", float("inf"), ValueError),
        ("temperature", "hot", TypeError),
        ("top_p", 0.0, ValueError),
        ("top_p", 1.1, ValueError),
        ("min_p", -0.1, ValueError),
        ("min_p", 1.1, ValueError),
        ("top_k", -1, ValueError),
        ("top_k", 1.5, TypeError),
        ("max_tokens", 0, ValueError),
        ("max_tokens", True, TypeError),
        ("n", 0, ValueError),
        ("logprobs", -1, ValueError),
        ("prompt_logprobs", -1, ValueError),
        ("seed", -1, ValueError),
        ("seed", 2**64, ValueError),
        ("stop", "", ValueError),
        ("stop", ("a", ""), ValueError),
        ("stop", (1,), ValueError),
        ("stop_token_ids", (-1,), ValueError),
        ("stop_token_ids", ("a",), TypeError),
        ("presence_penalty", 2.1, ValueError),
        ("frequency_penalty", -2.1, ValueError),
        ("repetition_penalty", 0.0, ValueError),
    ],
)
def test_a_value_out_of_range_is_named(name: str, value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"^{name}: expected"):
        SamplingParams(**{name: value})  # type: ignore[arg-type]


def test_one_stop_string_is_a_list_of_one() -> None:
    assert SamplingParams(stop="END").stop == ("END",)
