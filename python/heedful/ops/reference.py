"""The operators in float64 NumPy, as short as their formulas: read this file first.

T queries, S keys, H heads, Hi index heads, Di index head dim, C + R = Dk latent width, K chosen keys; see the
operators themselves (`heedful.ops`) for shapes and dtypes. Indexer and attention: DeepSeek-V3.2-Exp report.
e4m3fn: Micikevicius et al. 2022.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

PAGE = 64  # tokens of a page
GROUP = 128  # values that share an FP8 scale


def positions_of(q_positions: Array | None, T: int, S: int) -> Array:
    """Positions of the queries: by default they are the last tokens of the sequence."""
    return S - T + np.arange(T) if q_positions is None else np.asarray(q_positions)


def index_scores(
    q: Array, k: Array, weights: Array, q_positions: Array | None = None, k_scale: Array | None = None
) -> Array:
    """I[t, s] = sum_j w[t, j] relu(q[t, j] . k[s]) (* k_scale[s]), -inf where s > position(t)."""
    (T, _, _), S = q.shape, len(k)
    scores = np.zeros((T, S))
    for t in range(T):
        logits = q[t].astype(np.float64) @ k.astype(np.float64).T  # [Hi, S]
        scores[t] = weights[t].astype(np.float64) @ np.maximum(logits, 0)
    if k_scale is not None:
        scores = scores * k_scale
    visible = np.arange(S)[None, :] <= positions_of(q_positions, T, S)[:, None]
    return np.where(visible, scores, -np.inf)


def top_k(scores: Array, k: int, lengths: Array | None = None, sorted_: bool = True) -> Array:
    """Positions of the k best: highest first, on ties the lowest; NaN comes last, -inf never; then -1.

    The same in rising order unless `sorted_`.
    """
    out = np.full((len(scores), k), -1, np.int32)
    for t, row in enumerate(np.asarray(scores, np.float64)):
        row = row[: None if lengths is None else lengths[t]]
        best = sorted(
            np.flatnonzero(row != -np.inf),
            key=lambda s: (np.isnan(row[s]), -row[s] if row[s] == row[s] else 0, s),
        )[:k]
        out[t, : len(best)] = best if sorted_ else np.sort(best)
    return out


def index_top_k(
    q: Array,
    k: Array,
    weights: Array,
    top_k_: int,
    q_positions: Array | None = None,
    k_scale: Array | None = None,
) -> Array:
    """The two calls above, one after the other."""
    return top_k(index_scores(q, k, weights, q_positions, k_scale), top_k_)


def sparse_attention(
    q: Array,
    kv: Array,
    indices: Array,
    scale: float,
    value_dim: int | None = None,
    v: Array | None = None,
    sink: Array | None = None,
) -> tuple[Array, Array]:
    """Softmax attention of q [T, H, Dk] over the chosen rows of kv [S, Hkv, Dk]; lse is without the sink."""
    (T, H, _), (S, Hkv, _) = q.shape, kv.shape
    values = kv[..., :value_dim] if v is None else v
    out, lse = np.zeros((T, H, values.shape[-1])), np.full((T, H), -np.inf)
    for t in range(T):
        chosen = [s for s in indices[t] if 0 <= s < S]
        for h in range(H if chosen else 0):
            logits = scale * (kv[chosen, h // (H // Hkv)].astype(np.float64) @ q[t, h].astype(np.float64))
            top = logits.max()
            weights = np.exp(logits - top)
            denominator = weights.sum() + (0 if sink is None else np.exp(sink[h] - top))
            out[t, h] = weights / denominator @ values[chosen, h // (H // Hkv)]
            lse[t, h] = top + np.log(weights.sum())
    return out, lse


def dense_attention(
    q: Array,
    kv: Array,
    scale: float,
    q_positions: Array | None = None,
    value_dim: int | None = None,
    v: Array | None = None,
    sink: Array | None = None,
) -> tuple[Array, Array]:
    """Sparse attention that chooses every key up to the query's position."""
    T, S = len(q), len(kv)
    keys = np.arange(S)[None, :]
    every = np.where(keys <= positions_of(q_positions, T, S)[:, None], keys, -1)
    return sparse_attention(q, kv, every, scale, value_dim, v, sink)


def hadamard(x: Array) -> Array:
    """x H / sqrt(D), H the Sylvester matrix: H[i, j] = (-1)^popcount(i & j)."""
    D = x.shape[-1]
    signs = [[(-1.0) ** bin(i & j).count("1") for j in range(D)] for i in range(D)]
    return x.astype(np.float64) @ np.array(signs).reshape(D, D) / np.sqrt(D)


def e4m3_values() -> Array:
    """The values of the 256 codes of e4m3fn: sign, 4 exponent bits (bias 7), 3 mantissa bits; 0x7f is NaN."""
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    value = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10))
    value[[0x7F, 0xFF]] = np.nan
    return np.where(code < 128, value, -value)


def e4m3_codes(x: Array) -> Array:
    """Nearest code, ties to the even one; beyond 448 saturates."""
    ladder = e4m3_values()[:127]
    middle = (ladder[1:] + ladder[:-1]) / 2
    size = np.abs(x)
    low, high = np.searchsorted(middle, size, "left"), np.searchsorted(middle, size, "right")
    code = np.where(low % 2 == 0, low, high)  # on a tie they are neighbours
    code = np.where(np.isnan(x), 0x7F, code)
    return (code + np.where(np.signbit(x), 128, 0)).astype(np.uint8)


def quantize_fp8(x: Array, group_size: int = GROUP) -> tuple[Array, Array]:
    """codes = x / scale, scale = max(amax, 1e-4) / 448 of each group of the last dimension, in float32
    arithmetic.
    """
    x = np.asarray(x, np.float32)
    starts = range(0, x.shape[-1], group_size)
    codes, scales = np.zeros(x.shape, np.uint8), np.zeros((*x.shape[:-1], len(starts)), np.float32)
    for g, start in enumerate(starts):
        group = x[..., start : start + group_size]
        finite = np.where(np.isfinite(group), np.abs(group), 0)
        scales[..., g] = np.maximum(finite.max(-1), np.float32(1e-4)) / np.float32(448)
        with np.errstate(invalid="ignore"):
            codes[..., start : start + group_size] = e4m3_codes(group / scales[..., g, None])
    return codes, scales


def quantize_int8(x: Array) -> tuple[Array, Array]:
    """codes = round(x / scale), scale = max(amax, 1e-4) / 127 of each row, in float32 arithmetic; a NaN in a row is
    told by its scale.
    """
    x = np.asarray(x, np.float32)
    amax = np.where(np.isfinite(x), np.abs(x), 0).max(-1, initial=0)
    scales = np.maximum(amax, np.float32(1e-4)) / np.float32(127)
    with np.errstate(invalid="ignore"):
        codes = np.rint(np.clip(np.nan_to_num(x / scales[..., None], nan=0, posinf=127, neginf=-127), -127, 127))
    return codes.astype(np.int8), np.where(np.isnan(x).any(-1), np.float32(np.nan), scales)


def dequantize_fp8(codes: Array, scales: Array, group_size: int = GROUP) -> Array:
    """Value of each code times the scale of its group."""
    return e4m3_values()[codes] * np.repeat(scales, group_size, axis=-1)[..., : codes.shape[-1]]


def read_latent_cache(cache: Array, slots: Array, value_dim: int) -> Array:
    """Rows of a latent cache: plain numbers, or bytes of codes, scales and bfloat16 rotary values."""
    rows = cache.reshape(-1, cache.shape[-1])[slots]
    if cache.dtype != np.uint8:
        return rows.astype(np.float64)
    scales_end = value_dim + 4 * -(-value_dim // GROUP)
    scales = np.ascontiguousarray(rows[:, value_dim:scales_end]).view("<f4")
    rope = np.ascontiguousarray(rows[:, scales_end:]).view("<u2").astype(np.uint32) << 16
    return np.concatenate([dequantize_fp8(rows[:, :value_dim], scales), rope.view(np.float32)], axis=1)


def read_index_cache(cache: Array, slots: Array, dim: int) -> Array:
    """Keys of an index cache: plain numbers, or pages of 64 rows of codes followed by 64 scales."""
    if cache.dtype not in (np.uint8, np.int8):
        return cache.reshape(-1, dim)[slots].astype(np.float64)
    pages = cache.reshape(len(cache), -1)
    codes = pages[:, : PAGE * dim].reshape(-1, dim)
    scales = np.ascontiguousarray(pages[:, PAGE * dim :]).view("<f4").reshape(-1, 1)
    values = codes[slots] if cache.dtype == np.int8 else e4m3_values()[codes[slots]]
    return values * scales[slots].astype(np.float64)


def sequences(block_tables: Array, seq_lens: Array, query_start_loc: Array) -> Iterator[tuple[slice, Array]]:
    """Rows of q and slots of the keys of each sequence of a ragged batch."""
    for b, S in enumerate(seq_lens):
        positions = np.arange(S)
        slots = block_tables[b, positions // PAGE].astype(np.int64) * PAGE + positions % PAGE
        yield slice(query_start_loc[b], query_start_loc[b + 1]), slots
