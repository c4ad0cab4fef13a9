"""From logits to token ids. Each row is drawn by itself, so a request's tokens do not depend on what runs beside it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch

from heedful.engine.outputs import Logprob, TokenLogprobs
from heedful.engine.sampling_params import SamplingParams


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
    """Draws one token a row.

    Args:
        logits: [n, V] float32; not changed.
        states: one for each row.

    Returns:
        int32 [n] token ids.

    Raises:
        FloatingPointError: a row's logits are NaN or all -inf.
    """
    best = logits.amax(-1)
    if not bool(best.isfinite().all()):
        row = int((~best.isfinite()).nonzero()[0])
        raise FloatingPointError(f"logits: expected finite numbers, row {row} has a maximum of {float(best[row])}")
    rows = logits.cpu().numpy()
    return np.array([_sample_row(row, state) for row, state in zip(rows, states, strict=True)], dtype=np.int32)


def _sample_row(logits: np.ndarray, state: SamplingState) -> int:
    params = state.params
    if params.has_penalties:
        logits = _penalize(logits, state)
    if params.temperature == 0.0:
        return int(logits.argmax())
    scaled = (logits.astype(np.float64) - logits.max()) / params.temperature
    if params.top_k == 0 and params.top_p == 1.0 and params.min_p == 0.0:
        return _draw(np.exp(scaled), state)
    kept = _kept_tokens(scaled, params)
    return int(kept[_draw(np.exp(scaled[kept]), state)])


def _kept_tokens(scaled: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Ids that min_p, top_k and top_p leave, the most likely first (the lowest id on ties); never empty."""
    order = np.argsort(-scaled, kind="stable")
    if params.min_p > 0.0:
        order = order[: max(1, int((scaled >= np.log(params.min_p)).sum()))]
    if params.top_k > 0:
        order = order[: params.top_k]
    if params.top_p < 1.0:
        probs = np.exp(scaled[order])
        before = np.cumsum(probs) - probs
        order = order[: max(1, int((before < params.top_p * probs.sum()).sum()))]
    return order


def _draw(weights: np.ndarray, state: SamplingState) -> int:
    """An index with probability weights / sum(weights), by the inverse of the cumulative sum."""
    cumulative = np.cumsum(weights)
    place = int(np.searchsorted(cumulative, state.uniform() * cumulative[-1], side="right"))
    return min(place, int(weights.nonzero()[0][-1]))


def _penalize(logits: np.ndarray, state: SamplingState) -> np.ndarray:
    """Logits after the repetition, frequency and presence penalties, in a new array."""
    params = state.params
    logits = logits.copy()
    generated = np.fromiter(state.output_counts, dtype=np.int64, count=len(state.output_counts))
    if params.repetition_penalty != 1.0:
        seen = np.union1d(generated, np.asarray(state.prompt_token_ids, dtype=np.int64))
        values = logits[seen]
        penalty = params.repetition_penalty
        logits[seen] = np.where(values > 0, values / penalty, values * penalty)
    counts = np.fromiter(state.output_counts.values(), dtype=np.float32, count=len(state.output_counts))
    logits[generated] -= params.frequency_penalty * counts + params.presence_penalty
    return logits


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
    wanted = torch.as_tensor(token_ids, dtype=torch.int64, device=logits.device)[:, None]
    own = log_probs.gather(-1, wanted)
    ranks = ((log_probs > own).sum(-1) + 1).tolist()
    best = log_probs.topk(min(top, log_probs.shape[-1]), dim=-1)
    rows = zip(
        wanted[:, 0].tolist(), own[:, 0].tolist(), ranks, best.indices.tolist(), best.values.tolist(), strict=True
    )
    result = []
    for token_id, logprob, rank, best_ids, best_logprobs in rows:
        entry = {token_id: Logprob(logprob, rank)}
        for place, (other, other_logprob) in enumerate(zip(best_ids, best_logprobs, strict=True), start=1):
            entry.setdefault(other, Logprob(other_logprob, place))
        result.append(entry)
    return result
