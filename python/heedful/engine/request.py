"""A request while it is served: its completions, their text, and what is measured on the way."""

from __future__ import annotations

import numpy as np

from heedful import TokenStream
from heedful.engine.outputs import CompletionOutput, RequestMetrics, RequestOutput, TokenLogprobs
from heedful.engine.sampler import SamplingState
from heedful.engine.sampling_params import SamplingParams


class Completion:
    """One of a request's n completions: sampled ids in, text out.

    Args:
        scheduler_id: the scheduler's name for it.
        state: what the sampler needs.
        stream: decodes behind the prompt and looks for the stop strings; None leaves the text empty.
    """

    def __init__(self, scheduler_id: str, state: SamplingState, stream: TokenStream | None) -> None:
        params = state.params
        self.scheduler_id = scheduler_id
        self.state = state
        self.output = CompletionOutput(index=state.index)
        if params.logprobs is not None:
            self.output.logprobs = []
            self.output.cumulative_logprob = 0.0
        self._stream = stream

    @property
    def finished(self) -> bool:
        """Whether nothing more will come."""
        return self.output.finish_reason is not None

    def append(self, token_id: int, logprobs: TokenLogprobs | None, finish_reason: str | None) -> None:
        """Takes one sampled token and the scheduler's verdict on it; a stop string may end the completion here."""
        output = self.output
        output.token_ids.append(token_id)
        self.state.output_counts[token_id] += 1
        if output.logprobs is not None and output.cumulative_logprob is not None and logprobs is not None:
            output.logprobs.append(logprobs)
            output.cumulative_logprob += logprobs[token_id].logprob
        if finish_reason == "stop" and token_id in self.state.params.stop_token_ids:
            output.stop_reason = token_id
        if self._stream is not None:
            if finish_reason != "stop":  # the token that stops a text is an id of its output but no part of its text
                output.text += self._stream.push(token_id)
            if finish_reason is not None:
                output.text += self._stream.flush()
            if (stop := self._stream.stopped) is not None:
                output.stop_reason = stop
                finish_reason = "stop"
        output.finish_reason = finish_reason

    def abort(self) -> None:
        """Ends the completion as it is."""
        if not self.finished:
            if self._stream is not None:
                self.output.text += self._stream.flush()
                self.output.stop_reason = self._stream.stopped
            self.output.finish_reason = "abort"


class Request:
    """A prompt and its completions.

    Args:
        request_id: the caller's name for it.
        prompt: the text, if text was given.
        prompt_token_ids: at least one id.
        params: sampling parameters.
        completions: one for each of params.n.
        arrival_time: seconds on the clock of `time.perf_counter`.
    """

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        prompt_token_ids: list[int],
        params: SamplingParams,
        completions: list[Completion],
        arrival_time: float,
    ) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.prompt_token_ids = prompt_token_ids
        self.params = params
        self.completions = completions
        self.metrics = RequestMetrics(arrival_time, prompt_tokens=len(prompt_token_ids))
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None if params.prompt_logprobs is None else [None]

    @property
    def finished(self) -> bool:
        """Whether every completion is."""
        return all(completion.finished for completion in self.completions)

    def prompt_rows_to_report(self, positions: np.ndarray) -> np.ndarray:
        """Which of these computed positions tell the log-probability of a prompt token not reported yet.

        The row at position p speaks of the token at p + 1. Rows computed anew after a preemption are reported once.
        """
        if self.prompt_logprobs is None:
            return np.empty(0, dtype=np.int64)
        reported = len(self.prompt_logprobs)
        return np.flatnonzero((positions + 1 >= reported) & (positions + 1 < len(self.prompt_token_ids)))

    def output(self) -> RequestOutput:
        """The request as it stands. The completions' objects are shared, not copied."""
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=[completion.output for completion in self.completions],
            finished=self.finished,
            metrics=self.metrics,
            prompt_logprobs=self.prompt_logprobs,
        )
