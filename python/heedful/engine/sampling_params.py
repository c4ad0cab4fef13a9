"""How a request's tokens are chosen: the parameters of vLLM, with the same names and meanings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_UNBOUNDED = float("inf")


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of one request.

    Penalties are applied first, then temperature, min_p, top_k and top_p, in vLLM's order.

    Args:
        temperature: divides the logits; 0 takes the most likely token (the lowest id on ties).
        top_p: keep the smallest set of tokens whose probability reaches this; in (0, 1].
        top_k: keep this many most likely tokens; 0 keeps all.
        min_p: drop tokens less likely than this share of the most likely one; in [0, 1].
        max_tokens: tokens to generate at most; at least 1.
        stop: strings that end the text; they are not part of it.
        stop_token_ids: ids that end the text, beside the model's own end of sequence.
        seed: makes this request's draws repeatable whatever runs beside it. None draws from the engine's seed.
        n: completions of this prompt.
        logprobs: report the log-probability of each generated token and of this many best ones; None reports none.
        prompt_logprobs: the same for the prompt's tokens.
        presence_penalty: subtracted from the logits of tokens already generated; in [-2, 2].
        frequency_penalty: the same for each time they were generated; in [-2, 2].
        repetition_penalty: divides positive and multiplies negative logits of tokens seen in prompt or output; above 0.
        ignore_eos: do not stop at the model's end of sequence.

    Raises:
        ValueError: a value is outside its range; the message names it.
        TypeError: a value is of another type than its default.

    Example:
        >>> SamplingParams(temperature=0.0, max_tokens=16).temperature
        0.0
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int = 256
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    seed: int | None = None
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if not all(isinstance(text, str) and text for text in stop):
            raise ValueError(f"stop: expected non-empty strings, got {stop!r}")
        object.__setattr__(self, "stop", stop)
        stop_ids = tuple(self.stop_token_ids)
        for token_id in stop_ids:
            _check_int("stop_token_ids", token_id, 0)
        object.__setattr__(self, "stop_token_ids", stop_ids)
        _check_float("temperature", self.temperature, 0.0, _UNBOUNDED)
        _check_float("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _check_float("min_p", self.min_p, 0.0, 1.0)
        _check_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_float("repetition_penalty", self.repetition_penalty, 0.0, _UNBOUNDED, open_low=True)
        _check_int("top_k", self.top_k, 0)
        _check_int("max_tokens", self.max_tokens, 1)
        _check_int("n", self.n, 1)
        for name in ("logprobs", "prompt_logprobs"):
            if (value := getattr(self, name)) is not None:
                _check_int(name, value, 0)
        if self.seed is not None:
            _check_int("seed", self.seed, 0, 2**64 - 1)

    @property
    def has_penalties(self) -> bool:
        """Whether any penalty changes the logits."""
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0.0, 0.0, 1.0)


def _check_int(name: str, value: object, low: int, high: int | None = None) -> None:
    expected = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected {expected}, got {value!r}")
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name}: expected {expected}, got {value}")


def _check_float(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> None:
    bracket = "(" if open_low else "["
    expected = f"a finite number in {bracket}{low:g}, {high:g}]"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected {expected}, got {value!r}")
    if not math.isfinite(value) or value > high or value < low or (open_low and value == low):
        raise ValueError(f"{name}: expected {expected}, got {value}")
