"""What a request gives back, in the shape vLLM's users know."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Logprob:
    """Log-probability of one token under the model, before penalties and temperature."""

    logprob: float
    """Natural logarithm of the probability."""
    rank: int
    """1 for the most likely token."""
    decoded_token: str | None = None
    """The token's text alone; None without a tokenizer."""


TokenLogprobs = dict[int, Logprob]
"""The token itself and the best ones at its place, by token id."""


@dataclass(slots=True)
class CompletionOutput:
    """One completion of a prompt."""

    index: int
    """Which of the n completions this is."""
    text: str = ""
    """Decoded text; a stop string and what follows it are cut off."""
    token_ids: list[int] = field(default_factory=list)
    """Generated ids, a stop token included."""
    finish_reason: str | None = None
    """"stop", "length" or "abort"; None while running."""
    stop_reason: int | str | None = None
    """The stop string or stop token id that ended it; None for the end of sequence and for "length"."""
    cumulative_logprob: float | None = None
    """Sum of the generated tokens' log-probabilities; None when logprobs were not asked for."""
    logprobs: list[TokenLogprobs] | None = None
    """One entry for each generated token; None when not asked for."""


@dataclass(slots=True)
class RequestMetrics:
    """Times in seconds on the clock of `time.perf_counter`, and counts, of one request."""

    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None
    prompt_tokens: int = 0
    output_tokens: int = 0
    """Generated tokens over all completions."""
    computed_tokens: int = 0
    """Tokens whose cache rows have been computed, over all completions and repeats."""
    cached_tokens: int = 0
    """Prompt tokens whose cache rows were there when the request began, and were not computed."""
    keys_visible: int = 0
    """Keys that dense attention would have read, summed over this request's computed tokens (one layer)."""
    keys_read: int = 0
    """Keys that attention did read, summed likewise."""
    preemptions: int = 0
    """Times this request gave its blocks away and was computed anew, or went on with rows kept on the host."""
    swaps: int = 0
    """How many of these its rows were kept on the host."""

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from arrival to the first generated token."""
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time

    @property
    def prefill_tokens_per_second(self) -> float | None:
        """Prompt tokens over the time to the first token, waiting included."""
        seconds = self.time_to_first_token
        return self.prompt_tokens / seconds if seconds else None

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Generated tokens after the first, over the time they took."""
        if self.first_token_time is None or self.finished_time is None or self.output_tokens < 2:
            return None
        return (self.output_tokens - 1) / max(self.finished_time - self.first_token_time, 1e-9)

    @property
    def share_of_keys_read(self) -> float | None:
        """keys_read / keys_visible: 1 for dense attention."""
        return self.keys_read / self.keys_visible if self.keys_visible else None


@dataclass(slots=True)
class RequestOutput:
    """A request's state: final from `LLM.generate`, so far from `LLMEngine.step`."""

    request_id: str
    prompt: str | None
    """The prompt's text; None when token ids were given."""
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    """None for the first token, then one entry each; None when not asked for."""
