"""Lightning-indexer scores and top-k selection (DeepSeek-V3.2-Exp report; `heedful.ops.reference`).

Products are as exact as in float32 whatever the dtypes: narrower arithmetic is used for numbers that it holds. They are
fastest where both are int8 (AVX-512 VNNI), then where both are bfloat16, FP8 or int8 (AVX-512 BF16). CUDA tensors are
computed by the Triton kernels of `heedful.kernels`.

| operator | arguments | result |
|---|---|---|
| index_scores | q [T, Hi, Di], k [S, Di], weights [T, Hi] | float32 [T, S] |
| top_k | scores [T, S] | int32 [T, k] |
| index_top_k | as index_scores | int32 [T, k] |
"""

from __future__ import annotations

from typing import Any

import numpy as np

from heedful import _core
from heedful._arrays import FLOATS, A, Arguments, View, integer
from heedful.ops import reference
from heedful.ops.pages import Batch, page_rows, paged_arguments, storage
from heedful.ops.reference import PAGE

_NUMBERS = (*FLOATS, "float8_e4m3fn", "int8")


def index_scores(
    q: A, k: A, weights: A, *, q_positions: Any = None, k_scale: A | None = None, backend: str = "auto"
) -> A:
    """Index scores: I[t, s] = sum_j weights[t, j] relu(q[t, j] . k[s]), times k_scale[s] if there is one.

    Args:
        q: [T, Hi, Di] float32, bfloat16, float16, float8_e4m3fn or int8 (scales of q belong in `weights`).
        k: [S, Di], the same dtypes; one key head is shared by all index heads.
        weights: [T, Hi] float32.
        q_positions: [T] integers, the position of each query; default S - T + arange(T).
        k_scale: [S] float32, finite.
        backend: "auto", "cpu", "triton" or "reference".

    Returns:
        float32 [T, S], -inf where s > position.

    Raises:
        ValueError: an argument of another shape, dtype or value; it is named.
    """
    call = Arguments(backend)
    views = _index_arguments(call, q, k, weights, q_positions, k_scale)
    if call.triton:
        from heedful.kernels import index_scores as kernel

        with call.launching():
            scores = kernel.index_scores(*_tensors(views), ends=_ends(call, views), k_scale=_data(views[4]))
        return call.give(scores, "float32")
    if call.reference:
        return call.give(reference.index_scores(*_values(*views)), "float32")
    out = np.empty((call.size("T"), call.size("S")), np.float32)
    _run(views, None, out)
    return call.give(out, "float32")


def index_top_k(
    q: A,
    k: A,
    weights: A,
    top_k: int,
    *,
    q_positions: Any = None,
    k_scale: A | None = None,
    sorted: bool = True,
    backend: str = "auto",
) -> A:
    """The `top_k` best keys of each query: `top_k(index_scores(...), top_k)` without holding [T, S].

    Arguments as `index_scores` and `top_k`. Returns int32 [T, top_k]; raises ValueError as they do.
    """
    call = Arguments(backend)
    views = _index_arguments(call, q, k, weights, q_positions, k_scale)
    count = integer("top_k", top_k, 1)
    if call.triton:
        from heedful.kernels import index_top_k as kernel

        with call.launching():
            ends, scale = _ends(call, views), _data(views[4])
            chosen = kernel.index_top_k(*_tensors(views), count, ends=ends, k_scale=scale, sorted=bool(sorted))
        return call.give(chosen, "int32")
    if call.reference:
        scores = reference.index_scores(*_values(*views)).astype(np.float32)
        return call.give(reference.top_k(scores, count, sorted_=sorted), "int32")
    out = np.empty((call.size("T"), count), np.int32)
    _run(views, bool(sorted), out)
    return call.give(out, "int32")


def top_k(scores: A, k: int, *, lengths: Any = None, sorted: bool = True, backend: str = "auto") -> A:
    """Positions of the k highest scores of each row; ties go to the lowest position.

    -inf marks a masked entry: it is never selected, nor is a position at or beyond `lengths[t]`. NaN ranks
    below every number but is selectable. Places left over hold -1.

    Args:
        scores: [T, S] float32, bfloat16 or float16.
        k: at least 1.
        lengths: [T] integers from 0 to S: scores of each row that count; default all.
        sorted: True: highest first. False: in rising order of position, which is quicker, and kinder to what reads
            the rows afterwards.
        backend: "auto", "cpu", "triton" or "reference".

    Returns:
        int32 [T, k].

    Raises:
        ValueError: an argument of another shape, dtype or value; it is named.
    """
    call = Arguments(backend)
    view = call.take("scores", scores, FLOATS, "T, S")
    count = integer("k", k, 1)
    limits = None if lengths is None else call.integers("lengths", lengths, "T", np.int64)
    if call.triton:
        from heedful.kernels import top_k as kernel

        with call.launching():
            chosen = kernel.top_k(view.data, count, lengths=limits, sorted=bool(sorted))
        return call.give(chosen, "int32")
    if call.reference:
        return call.give(reference.top_k(view.float64(), count, limits, sorted), "int32")
    out = np.empty((call.size("T"), count), np.int32)
    _core.top_k(view.data, limits, bool(sorted), out)
    return call.give(out, "int32")


def index_scores_paged(
    q: A,
    weights: A,
    *,
    cache: A,
    block_tables: Any,
    seq_lens: Any,
    query_start_loc: Any,
    max_seq_len: int | None = None,
    backend: str = "auto",
) -> A:
    """`index_scores` of a ragged batch whose keys lie in pages.

    Args:
        q: [N, Hi, Di], the queries of B sequences one after another; those of a sequence are its last tokens.
        weights: [N, Hi] float32.
        cache: [num_blocks, 64, Di] float32 or bfloat16, or uint8 [num_blocks, 64 * (Di + 4)] (or
            [num_blocks, 64, Di + 4]): in each page 64 rows of e4m3 codes, then 64 float32 scales; or int8 of
            the same shapes, with int8 codes.
        block_tables: [B, M] int32; entries beyond a sequence's pages are not read.
        seq_lens: [B] int32, keys of each sequence including this step's tokens.
        query_start_loc: [B + 1] int32, first row of each sequence in q, then N.
        max_seq_len: columns of the result, at least max(seq_lens) and by default that; a CUDA device must be waited
            for where it is not given.
        backend: "auto", "cpu", "triton" or "reference".

    Returns:
        float32 [N, max_seq_len], -inf where a key is not visible.

    Raises:
        ValueError: an argument of another shape, dtype or value, a needed block outside the
            cache; it is named.
    """
    call = Arguments(backend)
    q_, w, pages, batch = _paged_arguments(call, q, weights, cache, block_tables, seq_lens, query_start_loc)
    columns = _columns(call, batch, max_seq_len)
    if call.triton:
        from heedful.kernels import index_scores as kernel

        with call.launching():
            found = kernel.index_scores_paged(q_.data, w.data, max_seq_len=columns, **_pages(pages, batch))
        return call.give(found, "float32")
    if call.reference:
        scores = _reference_paged(q_, w, pages, batch)
    else:
        scores = np.empty((call.size("N"), batch[1].max(initial=0)), np.float32)
        _core.index_paged(q_.data, w.data, pages.data, *batch, None, scores)
    beyond = columns - scores.shape[1]
    return call.give(np.pad(scores, ((0, 0), (0, beyond)), constant_values=-np.inf) if beyond else scores, "float32")


def index_top_k_paged(
    q: A,
    weights: A,
    top_k: int,
    *,
    cache: A,
    block_tables: Any,
    seq_lens: Any,
    query_start_loc: Any,
    max_seq_len: int | None = None,
    sorted: bool = True,
    backend: str = "auto",
) -> A:
    """`index_top_k` of a ragged batch whose keys lie in pages; arguments as `index_scores_paged` and `top_k`.

    `max_seq_len` bounds the work that a CUDA device is given; by default the block tables' width does.

    Returns:
        int32 [N, top_k]: positions in each query's own sequence, then -1.

    Raises:
        ValueError: as `index_scores_paged`.
    """
    call = Arguments(backend)
    q_, w, pages, batch = _paged_arguments(call, q, weights, cache, block_tables, seq_lens, query_start_loc)
    count = integer("top_k", top_k, 1)
    if call.triton:
        from heedful.kernels import index_top_k as kernel

        widest = max(1, PAGE * batch[0].shape[1])
        longest = widest if max_seq_len is None else min(integer("max_seq_len", max_seq_len, 1), widest)
        with call.launching():
            chosen = kernel.index_top_k_paged(
                q_.data, w.data, count, max_seq_len=longest, sorted=bool(sorted), **_pages(pages, batch)
            )
        return call.give(chosen, "int32")
    if call.reference:
        scores = _reference_paged(q_, w, pages, batch).astype(np.float32)
        return call.give(reference.top_k(scores, count, sorted_=sorted), "int32")
    out = np.empty((call.size("N"), count), np.int32)
    _core.index_paged(q_.data, w.data, pages.data, *batch, bool(sorted), out)
    return call.give(out, "int32")


_Views = tuple[View, View, View, Any, "View | None"]


def _index_arguments(call: Arguments, q: Any, k: Any, weights: Any, q_positions: Any, k_scale: Any) -> _Views:
    return (
        call.take("q", q, _NUMBERS, "T, Hi, Di"),
        call.take("k", k, _NUMBERS, "S, Di"),
        call.take("weights", weights, ("float32",), "T, Hi"),
        None if q_positions is None else call.integers("q_positions", q_positions, "T", np.int64),
        None if k_scale is None else call.take("k_scale", k_scale, ("float32",), "S"),
    )


def _values(q: View, k: View, weights: View, positions: Any, scale: View | None) -> tuple[Any, ...]:
    return q.float64(), k.float64(), weights.float64(), positions, None if scale is None else scale.float64()


def _data(view: View | None) -> Any:
    return None if view is None else view.data


def _tensors(views: _Views) -> tuple[Any, Any, Any]:
    return views[0].data, views[1].data, views[2].data


def _ends(call: Arguments, views: _Views) -> Any:
    """int32 [T] for the kernels: one past the last key that each query sees, in 0..S."""
    import torch

    T, S = call.size("T"), call.size("S")
    if views[3] is None:
        return torch.arange(S - T + 1, S + 1, dtype=torch.int32, device=views[0].data.device).clamp_(0, S)
    return views[3].clamp(-1, S - 1).add_(1).to(torch.int32)


def _columns(call: Arguments, batch: Batch, max_seq_len: Any) -> int:
    if max_seq_len is not None and call.triton and call.host(batch[1]) is None:
        return integer("max_seq_len", max_seq_len, 0)
    longest = int(batch[1].max()) if len(batch[1]) else 0
    return longest if max_seq_len is None else integer("max_seq_len", max_seq_len, longest)


def _pages(pages: View, batch: Batch) -> dict[str, Any]:
    """Pages and batch as the kernels take them."""
    return {"cache": page_rows(pages), "block_tables": batch[0], "seq_lens": batch[1], "query_start_loc": batch[2]}


def _run(views: _Views, sorted: bool | None, out: np.ndarray[Any, Any]) -> None:
    q, k, weights, positions, scale = views
    _core.index(q.data, k.data, weights.data, positions, _data(scale), sorted, out)


def _paged_arguments(
    call: Arguments, q: Any, weights: Any, cache: Any, block_tables: Any, seq_lens: Any, query_start_loc: Any
) -> tuple[View, View, View, Batch]:
    q_ = call.take("q", q, _NUMBERS, "N, Hi, Di")
    w = call.take("weights", weights, ("float32",), "N, Hi")
    pages = storage(call, cache, call.size("Di"), None)
    return q_, w, pages, paged_arguments(call, pages, block_tables, seq_lens, query_start_loc)


def _reference_paged(q: View, weights: View, pages: View, batch: Batch) -> np.ndarray[Any, Any]:
    out = np.full((q.shape[0], batch[1].max(initial=0)), -np.inf)
    values = pages.data if pages.dtype in ("uint8", "int8") else pages.float64()
    for rows, slots in reference.sequences(*batch):
        k = reference.read_index_cache(values, slots, q.shape[2])
        out[rows, : len(slots)] = reference.index_scores(q.float64()[rows], k, weights.float64()[rows])
    return out
