"""From logits to token ids. Each row is drawn by itself, so a request's tokens do not depend on what runs beside it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch

from heedful.engine.outputs import Logprob, TokenLogprobs
from heedful.engine.placement import to_device
from heedful.engine.sampling_params import SamplingParams

ROWS_AT_A_TIME = 64
"""Rows drawn at a time: float64 copies of a vocabulary are large."""


@dataclass(slots=True)
class SamplingState:
    """What sampling needs to know of one completion.

    Args:
        params: the request's parameters.
        seed: key of the request's random draws.
        index: which of the request's completions this is.
        prompt_token_ids: the prompt, which the repetition penalty counts.
    """

    params: SamplingParams
    seed: int
    index: int
    prompt_token_ids: list[int]
    output_counts: Counter[int] = field(default_factory=Counter)
    """How often each token was generated."""
    _prompt_ids: np.ndarray | None = None

    @property
    def prompt_ids(self) -> np.ndarray:
        """The distinct ids of the prompt, rising; found when they are first asked for, not for each token."""
        if self._prompt_ids is None:
            self._prompt_ids = np.unique(np.asarray(self.prompt_token_ids, np.int64))
        return self._prompt_ids

    def uniform(self) -> float:
        """This draw's number in [0, 1): a function of seed, completion and place alone (Philox, counter-based).

        Computing a request anew after a preemption therefore repeats its draws, and batching cannot change them.
        """
        place = self.output_counts.total()
        # Arrays, because NumPy makes floats of a list that holds an integer of 2^63 or more beside a small one.
        key, counter = np.array([self.seed, self.index], np.uint64), np.array([place, 0, 0, 0], np.uint64)
        bits = np.random.Philox(key=key, counter=counter)
        return float(np.random.Generator(bits).random())


def sample(logits: torch.Tensor, states: list[SamplingState]) -> np.ndarray:
    """Draws one token a row, where the logits are; only the tokens leave the device.

    Args:
        logits: [n, V] float32; not changed.
        states: one for each row.

    Returns:
        int32 [n] token ids.

    Raises:
        FloatingPointError: a row's logits are NaN or all -inf.
    """
    best = logits.amax(-1)
    if any(state.params.has_penalties for state in states):
        logits = _penalize(logits, states)
    tokens = logits.argmax(-1)
    drawn = [row for row, state in enumerate(states) if state.params.temperature > 0.0]
    for filtered in (False, True):
        rows = [row for row in drawn if _has_filters(states[row].params) is filtered]
        for first in range(0, len(rows), ROWS_AT_A_TIME):
            part = rows[first : first + ROWS_AT_A_TIME]
            where = to_device(torch.tensor(part), logits.device)
            tokens[where] = _draw(logits[where], [states[row] for row in part], filtered)
    # One transfer carries both, because each waits for the device.
    result = torch.stack((tokens.double(), best.double())).cpu().numpy()
    if not np.isfinite(result[1]).all():
        row = int((~np.isfinite(result[1])).nonzero()[0][0])
        raise FloatingPointError(f"logits: expected finite numbers, row {row} has a maximum of {result[1, row]}")
    return result[0].astype(np.int32)


def _has_filters(params: SamplingParams) -> bool:
    return (params.top_k, params.top_p, params.min_p) != (0, 1.0, 0.0)


def _draw(logits: torch.Tensor, states: list[SamplingState], filtered: bool) -> torch.Tensor:
    """int64 [n] token ids of rows with a temperature, in float64 by the inverse of the cumulative sum."""
    values = [
        (state.uniform(), state.params.temperature, state.params.top_p, state.params.min_p, state.params.top_k)
        for state in states
    ]
    columns = to_device(torch.tensor(values, dtype=torch.float64), logits.device).T[..., None]
    uniform, temperature, top_p, min_p, top_k = columns
    scaled = (logits.double() - logits.amax(-1, keepdim=True)) / temperature
    if not filtered:
        return _inverse(scaled.exp(), uniform)[:, 0]
    # The most likely first, the lowest id on ties: what min_p, top_k and top_p leave is a prefix, never empty.
    scaled, order = scaled.sort(dim=-1, descending=True, stable=True)
    place = torch.arange(scaled.shape[-1], device=logits.device)
    kept = (scaled >= min_p.log()) & ((place < top_k) | (top_k == 0)) | (place == 0)
    weights = scaled.exp().where(kept, 0.0)
    before = weights.cumsum(-1) - weights
    kept = (before < top_p * weights.sum(-1, keepdim=True)) | (top_p >= 1.0) | (place == 0)
    return order.gather(-1, _inverse(weights.where(kept, 0.0), uniform))[:, 0]


def _inverse(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Indices [n, 1] with probability weights / sum(weights), never one of weight 0."""
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1:].contiguous()
    last = torch.searchsorted(cumulative, total).clamp_max_(weights.shape[-1] - 1)  # sums of NaN are past the end
    return torch.minimum(torch.searchsorted(cumulative, uniform * total, right=True), last)


def _penalize(logits: torch.Tensor, states: list[SamplingState]) -> torch.Tensor:
    """Logits after the repetition, frequency and presence penalties, in a new tensor."""
    logits = logits.clone()
    repeated: list[np.ndarray] = []  # rows, tokens and factors
    generated: list[np.ndarray] = []  # rows, tokens and what is subtracted
    for row, state in enumerate(states):
        params = state.params
        if not params.has_penalties:
            continue
        tokens = np.fromiter(state.output_counts.keys(), np.int64)
        counts = np.fromiter(state.output_counts.values(), np.int64)
        if params.repetition_penalty != 1.0:
            seen = np.union1d(state.prompt_ids, tokens)
            repeated.append(_entries(row, seen, params.repetition_penalty))
        generated.append(_entries(row, tokens, params.frequency_penalty * counts + params.presence_penalty))
    for entries, change in ((repeated, _weaken), (generated, torch.sub)):
        if entries:
            together = torch.from_numpy(np.concatenate(entries, axis=1))
            rows, places, amounts = to_device(together, logits.device)
            where = (rows.long(), places.long())
            logits[where] = change(logits[where], amounts.float())
    return logits


def _entries(row: int, tokens: np.ndarray, amounts: np.ndarray | float) -> np.ndarray:
    """float64 [3, n]: a row's number, tokens, and an amount for each."""
    return np.stack(np.broadcast_arrays(np.float64(row), tokens, amounts))


def _weaken(values: torch.Tensor, penalty: torch.Tensor) -> torch.Tensor:
    return torch.where(values > 0, values / penalty, values * penalty)


def token_logprobs(logits: torch.Tensor, token_ids: np.ndarray, top: int) -> list[TokenLogprobs]:
    """Log-probabilities of given tokens and of the best ones at their places.

    Args:
        logits: [n, V] float32, before penalties and temperature.
        token_ids: int [n], the token whose log-probability is wanted in each row.
        top: how many of the best tokens to report beside it.

    Returns:
        For each row a dict from token id to `Logprob`, the row's own token first.
    """
    log_probs = logits.log_softmax(-1)
    wanted = to_device(torch.from_numpy(np.asarray(token_ids, np.int64)), logits.device)[:, None]
    own = log_probs.gather(-1, wanted)
    ranks = (log_probs > own).sum(-1, keepdim=True) + 1
    best = log_probs.topk(min(top, log_probs.shape[-1]), dim=-1)
    # One transfer carries all of it, because each waits for the device; float64 holds ids and float32 exactly.
    found = torch.cat([part.double() for part in (own, ranks, best.values, best.indices)], dim=-1).tolist()
    result = []
    for token_id, (logprob, rank, *rest) in zip(token_ids, found, strict=True):
        entry = {int(token_id): Logprob(logprob, int(rank))}
        best_logprobs, best_ids = rest[: len(rest) // 2], rest[len(rest) // 2 :]
        for place, (other, other_logprob) in enumerate(zip(best_ids, best_logprobs, strict=True), start=1):
            entry.setdefault(int(other), Logprob(other_logprob, place))
        result.append(entry)
    return result
