"""The loop: schedule a step, run the model, sample, update. Everything here happens once a step, not once a token.

`LLMEngine` is synchronous; whoever drives it calls `step` until nothing is left. Names follow vLLM.
"""

from __future__ import annotations

import operator
import reprlib
import time
from collections.abc import Sequence

import numpy as np
import torch

from heedful import Scheduler, SchedulerConfig, Step, Tokenizer
from heedful.engine.outputs import RequestOutput, TokenLogprobs
from heedful.engine.placement import to_device
from heedful.engine.request import Completion, Request
from heedful.engine.runner import ModelRunner
from heedful.engine.sampler import SamplingState, sample, token_logprobs
from heedful.engine.sampling_params import SamplingParams

PROMPT_LOGPROB_ROWS = 256
"""Rows of logits held at once while a prompt's log-probabilities are computed."""


class LLMEngine:
    """Serves requests with continuous batching.

    Args:
        runner: the model and its caches.
        scheduler_config: block pool, token budget and limits.
        tokenizer: None serves token ids only.
        eos_token_ids: ids that end a text unless a request ignores them.
        seed: from which requests without a seed of their own get one.
    """

    def __init__(
        self,
        runner: ModelRunner,
        scheduler_config: SchedulerConfig,
        tokenizer: Tokenizer | None,
        eos_token_ids: Sequence[int],
        seed: int = 0,
    ) -> None:
        self.runner = runner
        self.tokenizer = tokenizer
        self.scheduler = Scheduler(scheduler_config)
        self._eos_token_ids = tuple(eos_token_ids)
        self._seeds = np.random.SeedSequence(seed)
        self._requests: dict[str, Request] = {}
        self._completions: dict[str, tuple[Request, Completion]] = {}  # by the scheduler's name

    def add_request(
        self,
        request_id: str,
        prompt: str | Sequence[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> None:
        """Queues a request.

        Args:
            request_id: a name not in use.
            prompt: text, or token ids.
            params: sampling parameters.
            priority: lower runs earlier, where the scheduler's policy is "priority".
            cache_salt: cached rows are reused among requests of the same salt alone; None shares with all without one.

        Raises:
            ValueError: the prompt is empty, too long or holds ids outside the vocabulary, or the name is in use.
            TypeError: an argument has another type. In both cases nothing is queued.
        """
        token_ids = self._checked_token_ids(prompt, params)
        if request_id in self._requests:
            raise ValueError(f"request_id: {request_id!r} is in use")
        seed = params.seed
        if seed is None:
            seed = int(self._seeds.spawn(1)[0].generate_state(1, np.uint64)[0])
        stream = None
        if self.tokenizer is not None:
            # The prompt may end inside a character: then the answer begins by completing it.
            stream = self.tokenizer.stream(skip_special_tokens=True, prompt_ids=token_ids, stop=params.stop)
        completions = [
            Completion(
                f"{request_id}/{index}",
                SamplingState(params, seed, index, token_ids),
                None if stream is None else stream.copy(),
            )
            for index in range(params.n)
        ]
        stop_ids = (*params.stop_token_ids, *(() if params.ignore_eos else self._eos_token_ids))
        self.scheduler.add(
            completions[0].scheduler_id,
            token_ids,
            max_tokens=params.max_tokens,
            priority=priority,
            stop_token_ids=stop_ids,
            fork_ids=[completion.scheduler_id for completion in completions[1:]],
            cache_salt=cache_salt,
            # A reused row gives no logits.
            skip_cache=params.prompt_logprobs is not None,
        )
        text = prompt if isinstance(prompt, str) else None
        request = Request(request_id, text, token_ids, params, completions, time.perf_counter())
        self._requests[request_id] = request
        self._completions.update((c.scheduler_id, (request, c)) for c in completions)

    def abort_request(self, request_id: str) -> RequestOutput | None:
        """Ends a request now and frees its blocks; its state so far, or None if there is no such request."""
        request = self._requests.get(request_id)
        if request is None:
            return None
        for completion in request.completions:
            if not completion.finished:
                self.scheduler.abort(completion.scheduler_id)
                completion.abort()
        return self._retire(request)

    def has_unfinished_requests(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._requests)

    def step(self) -> list[RequestOutput]:
        """Computes one step: the requests that got on, whether by a part of their prompt or by a token.

        Raises:
            Exception: whatever the model raised. The requests of the step are ended as "abort", the others go on.
        """
        step = self.scheduler.schedule()
        if step is None:
            if self._requests:
                raise RuntimeError(f"scheduler: nothing can run although requests wait: {self.scheduler.stats()}")
            return []
        for scheduler_id in step.preempted:
            metrics = self._completions[scheduler_id][0].metrics
            metrics.preemptions += 1
            metrics.swaps += scheduler_id in step.swapped
        try:
            hidden = self.runner.run(step, self.scheduler.plan_fetch)
            self._report_prompt_logprobs(step, hidden)
            sampled, logprobs = self._sample(step, hidden)
        except BaseException:
            self._abandon(step)
            raise
        finished = dict(self.scheduler.update(sampled))
        self._count(step)
        now = time.perf_counter()
        for row, (request, completion) in enumerate(self._sampled_completions(step)):
            scheduler_id = completion.scheduler_id
            completion.append(int(sampled[row]), logprobs.get(row), finished.get(scheduler_id))
            request.metrics.output_tokens += 1
            request.metrics.first_token_time = request.metrics.first_token_time or now
            if completion.finished and scheduler_id not in finished:  # a stop string
                self.scheduler.abort(scheduler_id)
        ran = {self._completions[scheduler_id][0].request_id: None for scheduler_id in step.request_ids}
        requests = [self._requests[request_id] for request_id in ran]
        return [self._retire(request) if request.finished else request.output() for request in requests]

    def _checked_token_ids(self, prompt: str | Sequence[int], params: SamplingParams) -> list[int]:
        if not isinstance(params, SamplingParams):
            raise TypeError(f"params: expected SamplingParams, got {type(params).__name__}")
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError("prompt: text was given, but this model has no tokenizer; give token ids")
            token_ids = self.tokenizer.encode(prompt, add_special_tokens=True, allowed_special="all")
        else:
            try:
                token_ids = [operator.index(token_id) for token_id in prompt]
            except TypeError as error:
                raise TypeError(f"prompt: expected text or token ids, got {reprlib.repr(prompt)}") from error
        vocab_size = self.runner.model.config.vocab_size
        if not token_ids:
            raise ValueError("prompt: expected at least one token, got an empty prompt")
        bad = next((token_id for token_id in token_ids if not 0 <= token_id < vocab_size), None)
        if bad is not None:
            raise ValueError(f"prompt: token id {bad} is outside the vocabulary of {vocab_size}")
        max_model_len = self.scheduler.config.max_model_len
        if max_model_len is not None and len(token_ids) >= max_model_len:
            raise ValueError(
                f"prompt: {len(token_ids)} tokens leave no room to generate: max_model_len is {max_model_len}"
            )
        return token_ids

    def _sampled_completions(self, step: Step) -> list[tuple[Request, Completion]]:
        """Whose token each sample row gives."""
        owners = (self._completions[step.request_ids[place]][0] for place in step.sample_request)
        return [(owner, owner.completions[branch]) for owner, branch in zip(owners, step.sample_branch, strict=True)]

    def _sample(self, step: Step, hidden: torch.Tensor) -> tuple[np.ndarray, dict[int, TokenLogprobs]]:
        """The token of each sample row, and the log-probabilities of the rows that asked for them."""
        if len(step.sample_rows) == 0:
            return np.empty(0, dtype=np.int32), {}
        states = [completion.state for _, completion in self._sampled_completions(step)]
        logits = self.runner.logits(hidden, step.sample_rows)
        sampled = sample(logits, states)
        wanted = [row for row, state in enumerate(states) if state.params.logprobs is not None]
        if not wanted:
            return sampled, {}
        top = max(states[row].params.logprobs or 0 for row in wanted)
        rows = to_device(torch.tensor(wanted), logits.device)
        reported = token_logprobs(logits[rows], sampled[wanted], top)
        return sampled, {
            row: self._finish_logprobs(entry, states[row].params.logprobs or 0)
            for row, entry in zip(wanted, reported, strict=True)
        }

    def _report_prompt_logprobs(self, step: Step, hidden: torch.Tensor) -> None:
        for place, scheduler_id in enumerate(step.request_ids):
            request, completion = self._completions[scheduler_id]
            if request.prompt_logprobs is None or completion.output.index != 0:
                continue
            start, end = step.query_start_loc[place : place + 2]
            positions = step.positions[start:end]
            rows = request.prompt_rows_to_report(positions)
            for first in range(0, len(rows), PROMPT_LOGPROB_ROWS):
                part = rows[first : first + PROMPT_LOGPROB_ROWS]
                logits = self.runner.logits(hidden, start + part)
                next_ids = np.array([request.prompt_token_ids[p + 1] for p in positions[part]])
                top = request.params.prompt_logprobs or 0
                request.prompt_logprobs.extend(
                    self._finish_logprobs(entry, top) for entry in token_logprobs(logits, next_ids, top)
                )

    def _finish_logprobs(self, entry: TokenLogprobs, top: int) -> TokenLogprobs:
        """The row's own token and the `top` best, with their texts."""
        own = next(iter(entry))
        kept = {token_id: value for token_id, value in entry.items() if token_id == own or value.rank <= top}
        if self.tokenizer is not None:
            for token_id, value in kept.items():
                if token_id < self.tokenizer.vocab_size:
                    value.decoded_token = self.tokenizer.decode([token_id])
        return kept

    def _count(self, step: Step) -> None:
        visible = step.positions + 1
        read = visible
        if self.runner.attention == "sparse":
            read = np.minimum(visible, self.runner.model.config.index_topk)
        starts = step.query_start_loc[:-1]
        sums = (np.diff(step.query_start_loc), np.add.reduceat(visible, starts), np.add.reduceat(read, starts))
        for scheduler_id, first, computed, seen, kept in zip(
            step.request_ids, step.positions[starts], *sums, strict=True
        ):
            metrics = self._completions[scheduler_id][0].metrics
            if metrics.computed_tokens == 0:
                metrics.cached_tokens = int(first)
            metrics.computed_tokens += int(computed)
            metrics.keys_visible += int(seen)
            metrics.keys_read += int(kept)

    def _retire(self, request: Request) -> RequestOutput:
        """Forgets a finished request."""
        request.metrics.finished_time = time.perf_counter()
        del self._requests[request.request_id]
        for completion in request.completions:
            del self._completions[completion.scheduler_id]
        return request.output()

    def _abandon(self, step: Step) -> None:
        """After a failed step: ends its requests, so that the next one starts from a sound state."""
        for scheduler_id in step.request_ids:
            if scheduler_id in self._completions:
                self.abort_request(self._completions[scheduler_id][0].request_id)
        self.scheduler.abandon()
