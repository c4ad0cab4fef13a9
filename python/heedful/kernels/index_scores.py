"""Index scores I[t, s] = sum_j weights[t, j] relu(q[t, j] . k[s]) (times the key's scale) on the GPU.

A program holds the heads of BT queries, as columns, in shared memory, and streams tiles of keys past them, as rows. So
a key is read once for all of them, and the sum over heads is over columns of the product, of which a thread holds many:
relu, weights and sum happen in registers. The same tile of code (`score_tiles`) serves `index_top_k`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from heedful.kernels import tuning
from heedful.kernels.compilation import Compilation, Launch
from heedful.kernels.e4m3 import e4m3_to_float16
from heedful.kernels.scoring import (
    PAGE,
    Scoring,
    Tiles,
    example,
    example_paged,
    index_pages,
    operand_type,
    scoring_arguments,
    tile_candidates,
)
from heedful.kernels.target import Target

MOST_CHUNKS = 65535
"""Of the keys: a grid's second dimension."""

# -- kernels -----------------------------------------------------------------------------------------------------------


@triton.jit
def as_operand(x, DOT: tl.constexpr, ONCE: tl.constexpr):
    """Numbers, or e4m3fn codes as bytes, in the type that is multiplied.

    The compiler would convert to 16 bits where the matrix unit takes its operands: queries again for each tile, and
    keys in each of the warps that hold the same ones. With ONCE, it moves nothing across an instruction that does
    nothing (CUDA's, hence the condition).
    """
    if x.dtype == tl.uint8:
        numbers = e4m3_to_float16(x).to(DOT)
    else:
        numbers = x.to(DOT)
    if ONCE and x.dtype != DOT:
        numbers = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [numbers], numbers.dtype, is_pure=False, pack=2)
    return numbers


@triton.jit
def sequence_of(tile, query_start_loc, num_seqs, BT: tl.constexpr):
    """The sequence of a tile, and the tile's place in it.

    Tiles of sequence b are numbered from query_start_loc[b] // BT + b: at least as many as it has, some of them empty,
    and found without a prefix sum over the batch.
    """
    low, high = 0, num_seqs
    while low < high:
        middle = (low + high) // 2
        if tl.load(query_start_loc + middle) // BT + middle <= tile:
            low = middle + 1
        else:
            high = middle
    b = tl.maximum(low - 1, 0)  # not before the first, whatever the numbers are
    return b, tile - (tl.load(query_start_loc + b) // BT + b)


@triton.jit
def tile_of_queries(
    tile, T, S, starts, ends, query_start_loc, seq_lens, table_width, num_seqs, BT: tl.constexpr, PAGED: tl.constexpr
):  # fmt: skip
    """First row of a tile, how many rows it has, the visible keys [start, end) of each [BT], and the sequence.

    Nobody has looked at the numbers: rows are some of the T that are there, a sequence has no more keys than its table
    has entries for, and a range is cut to 0, ..., S before it is narrowed to 32 bits.
    """
    places = tl.arange(0, BT)
    if PAGED:
        b, place = sequence_of(tile, query_start_loc, num_seqs, BT)
        first = tl.load(query_start_loc + b) + place * BT
        rest = tl.maximum(tl.minimum(tl.load(query_start_loc + b + 1), T), 0) - first
        rest = tl.where(first < 0, 0, rest)
        start = tl.zeros([BT], tl.int32)
        end = tl.maximum(tl.minimum(tl.load(seq_lens + b), table_width * 64), 0) - rest + 1 + places
    else:
        b = 0
        first, rest = tile * BT, T - tile * BT
        start, end = tl.zeros([BT], tl.int32), tl.zeros([BT], tl.int32) + S
        if starts is not None:
            found = tl.load(starts + first + places, mask=places < rest, other=0)
            start = tl.maximum(tl.minimum(found, S), 0).to(tl.int32)
        if ends is not None:
            found = tl.load(ends + first + places, mask=places < rest, other=0)
            end = tl.maximum(tl.minimum(found, S), 0).to(tl.int32)
    end = tl.where(places < rest, tl.maximum(tl.minimum(end, S), start), start)
    return first, tl.minimum(rest, BT), start, end, b


@triton.jit
def visible_tiles(start, end, from_, to, S, BS: tl.constexpr):
    """Whole tiles of the keys from_, ..., to - 1 that some query of a tile sees: [low, high), empty if low = high."""
    low = tl.min(tl.where(start < end, start, S), axis=0) // BS * BS
    low = tl.minimum(tl.maximum(low, from_), to)
    return low, tl.maximum(tl.minimum(tl.cdiv(tl.max(end, axis=0), BS) * BS, to), low)


@triton.jit
def load_queries(
    q, first, count, stride_t, stride_h,
    HEADS: tl.constexpr, DIM: tl.constexpr, BT: tl.constexpr, HP: tl.constexpr, DP: tl.constexpr, DOT: tl.constexpr,
    ONCE: tl.constexpr,
):  # fmt: skip
    """The heads of a tile of queries as columns, [DP, BT * HP]; zeros beyond them."""
    places, dims = tl.arange(0, BT * HP), tl.arange(0, DP)
    row, head = first.to(tl.int64) + places // HP, places % HP
    there = (places // HP < count) & (head < HEADS)
    at = row[:, None] * stride_t + head.to(tl.int64)[:, None] * stride_h + dims[None, :]
    x = tl.load(q + at, mask=there[:, None] & (dims < DIM)[None, :], other=0.0)
    return tl.trans(as_operand(x, DOT, ONCE))


@triton.jit
def load_weights(weights, first, count, stride, HEADS: tl.constexpr, BT: tl.constexpr, HP: tl.constexpr):
    """The weights of a tile of queries [BT * HP]; zeros beyond them."""
    places = tl.arange(0, BT * HP)
    row, head = first.to(tl.int64) + places // HP, places % HP
    return tl.load(weights + row * stride + head, mask=(places // HP < count) & (head < HEADS), other=0.0)


@triton.jit
def score_tiles(
    low, high, out, out_stride, columns, w, start, end, count, S, keys, scales, table, num_blocks, page_stride,
    scale_stride, KEY_STRIDE: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr,
    HP: tl.constexpr, DP: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, PAGED: tl.constexpr,
    ONCE: tl.constexpr, STAGES: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Writes the scores of keys low, ..., high - 1 (`low` a multiple of BS) to out[row, key], -inf where not visible.

    Keys from `high` to the end of the last tile are written too. BOUNDED: `out` ends with its `count` rows and S keys.
    Keys of a page that is none of the cache's are not visible, and not read.
    """
    dims, offsets, places = tl.arange(0, DP), tl.arange(0, BS), tl.arange(0, BT)
    real = tl.arange(0, BT * HP) % HP < HEADS
    rows = out + places.to(tl.int64) * out_stride
    at = offsets[:, None] * KEY_STRIDE + dims[None, :]  # constants apart, so a thread computes one address of a tile
    # From 0 on: of a variable that counts from a number that a loop has found (`sequence_of`) Triton 3.9 knows nothing,
    # so no alignment of addresses that it leads to; keys would be read by the byte, none ahead.
    origin = low if PAGED else 0
    for done in tl.range(low - origin, high - origin, BS, num_stages=STAGES):
        first = origin + done
        s = first + offsets
        if PAGED:  # rows of a page beyond the sequence exist; what they hold is not seen
            page = tl.load(table + first // 64)
            there = page.to(tl.uint32) < num_blocks
            at_key = tl.where(there, first, -BS) + offsets
            page = tl.where(there, page, 0).to(tl.int64)
            tile_keys = keys + (page * page_stride + first % 64 * KEY_STRIDE)
            mask = tl.full([BS, 1], 1, tl.int1)
        else:
            at_key = s
            tile_keys = keys + tl.cast(first, tl.int64) * KEY_STRIDE
            mask = (s < S)[:, None]
        if DP != DIM:
            mask = mask & (dims < DIM)[None, :]
        tile = as_operand(tl.load(tile_keys + at, mask=mask, other=0.0), DOT, ONCE)  # [BS, DP]
        if DOT == tl.int8:
            z = tl.dot(tile, columns, out_dtype=tl.int32).to(tl.float32)
        else:
            z = tl.dot(tile, columns, input_precision=PRECISION)
        z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL) * w[None, :]
        if HP != HEADS:  # a key of infinities times the padding's zeros
            z = tl.where(real[None, :], z, 0.0)
        score = tl.sum(tl.reshape(z, [BS, BT, HP]), axis=2)  # [BS, BT]
        if scales is not None:
            if PAGED:
                scale = tl.load(scales + (page * scale_stride + first % 64) + offsets)
            else:
                scale = tl.load(scales + s, mask=s < S, other=0.0)
            score *= scale[:, None]
        seen = (at_key[:, None] >= start[None, :]) & (at_key[:, None] < end[None, :])
        score = tl.where(seen, score, float("-inf"))
        if BOUNDED:
            tl.store(rows[None, :] + s[:, None], score, mask=(places < count)[None, :] & (s < S)[:, None])
        else:
            tl.store(rows[None, :] + s[:, None], score)


@triton.jit
def _fill(low, high, out, out_stride, count, S, BT: tl.constexpr, WIDTH: tl.constexpr):
    """Writes -inf for keys low, ..., high - 1."""
    places, offsets = tl.arange(0, BT), tl.arange(0, WIDTH)
    for first in range(low, high, WIDTH):
        s = first + offsets
        to = out + places[:, None].to(tl.int64) * out_stride + s[None, :]
        mask = (places < count)[:, None] & (s < tl.minimum(S, high))[None, :]
        tl.store(to, tl.full([BT, WIDTH], float("-inf"), tl.float32), mask=mask)


@triton.jit(do_not_specialize=["T", "S", "num_seqs", "table_width", "table_stride"])
def _index_scores_kernel(
    q, weights, keys, scales, out, starts, ends, tables, seq_lens, query_start_loc, T, S, num_seqs, num_blocks,
    stride_t, stride_h, weight_stride, page_stride, scale_stride, table_stride, table_width, out_stride, chunk,
    KEY_STRIDE: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr,
    HP: tl.constexpr, DP: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, PAGED: tl.constexpr,
    ONCE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Scores of a tile of queries over a chunk of the keys."""
    first, count, start, end, b = tile_of_queries(
        tl.program_id(0), T, S, starts, ends, query_start_loc, seq_lens, table_width, num_seqs, BT, PAGED
    )
    if count > 0:
        from_, to = tl.program_id(1) * chunk, tl.minimum(tl.program_id(1) * chunk + chunk, S)
        low, high = visible_tiles(start, end, from_, to, S, BS)
        out += first.to(tl.int64) * out_stride
        _fill(from_, low, out, out_stride, count, S, BT, 256)
        if low < high:
            columns = load_queries(q, first, count, stride_t, stride_h, HEADS, DIM, BT, HP, DP, DOT, ONCE)
            w = load_weights(weights, first, count, weight_stride, HEADS, BT, HP)
            score_tiles(
                low, high, out, out_stride, columns, w, start, end, count, S, keys, scales,
                tables + b.to(tl.int64) * table_stride if PAGED else None, num_blocks, page_stride, scale_stride,
                KEY_STRIDE, HEADS, DIM, BT, BS, HP, DP, DOT, PRECISION, PAGED, ONCE, STAGES, True,
            )  # fmt: skip
        _fill(high, to, out, out_stride, count, S, BT, 256)


# -- launchers ---------------------------------------------------------------------------------------------------------


def index_scores(
    q: torch.Tensor,
    k: torch.Tensor,
    weights: torch.Tensor,
    *,
    starts: torch.Tensor | None = None,
    ends: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Index scores over contiguous keys.

    Args:
        q: [T, Hi, Di] float32, bfloat16, float16, float8_e4m3fn or int8 (scales of q belong in `weights`).
        k: [S, Di], the same dtypes.
        weights: [T, Hi] float32.
        starts, ends: [T] integers: query t sees keys starts[t] <= s < ends[t]; default all.
        k_scale: [S] float32.

    Returns:
        float32 [T, S], -inf where a key is not visible.
    """
    out = torch.empty((q.shape[0], k.shape[0]), dtype=torch.float32, device=q.device)
    plan(Scoring.contiguous(q, k, weights, starts, ends, k_scale), out, Target.of(q)).run()
    return out


def index_scores_paged(
    q: torch.Tensor,
    weights: torch.Tensor,
    *,
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    max_seq_len: int,
) -> torch.Tensor:
    """Index scores of a ragged batch over keys in pages.

    Args:
        q: [N, Hi, Di], the dtypes of `index_scores`; the queries of a sequence are its last tokens.
        weights: [N, Hi] float32.
        cache: [num_blocks, 64, Di] float32, bfloat16 or float16, or uint8 (e4m3fn codes) or int8 of
            [num_blocks, 64 * (Di + 4)] or [num_blocks, 64, Di + 4]: in each page all codes, then 64 float32 scales.
        block_tables: [B, M] int32; entries beyond a sequence's pages are not read.
        seq_lens: [B] int32.
        query_start_loc: [B + 1] int32.
        max_seq_len: at least the largest of seq_lens.

    Returns:
        float32 [N, max_seq_len], -inf where a key is not visible.
    """
    out = torch.empty((q.shape[0], max_seq_len), dtype=torch.float32, device=q.device)
    scoring = Scoring.paged(q, weights, cache, block_tables, seq_lens, query_start_loc, max_seq_len)
    plan(scoring, out, Target.of(q)).run()
    return out


def warm_up(scoring: Scoring) -> Tiles:
    """Measures the candidates on the tensors of `scoring`, for shapes of its bucket."""
    device = scoring.arguments["q"].device
    target, out = Target.of(device), torch.empty((scoring.T, scoring.S), device=device)
    candidates = tile_candidates(scoring, operand_type(scoring.q_dtype, scoring.k_dtype, target), target)
    return tuning.measure(
        "index_scores", scoring.bucket, target, candidates, lambda tiles: [plan(scoring, out, target, tiles)]
    )


def plan(scoring: Scoring, out: torch.Tensor, target: Target, tiles: Tiles | None = None) -> Launch:
    """The launch that writes the scores to `out` [T, S]."""
    dot = operand_type(scoring.q_dtype, scoring.k_dtype, target)
    if tiles is None:
        tiles = tuning.choose("index_scores", scoring.bucket, target, lambda: tile_candidates(scoring, dot, target))
    num_tiles = scoring.tiles(tiles.BT)
    # Enough programs to fill the device several times, each with enough keys to be worth reading its queries.
    wanted = -(-8 * target.num_sms // max(1, num_tiles))
    # No program needs more keys than make its queries a thirtieth of what it reads.
    chunk = min(max(-(-scoring.S // wanted), 512), max(32 * tiles.BT * tiles.HP, 512))
    chunk = max(chunk, -(-scoring.S // MOST_CHUNKS))
    chunk = -(-chunk // 256) * 256
    arguments = scoring_arguments(scoring, dot, tiles, target)
    arguments |= {"out": out, "out_stride": out.stride(0), "chunk": chunk}
    grid = (num_tiles, -(-scoring.S // chunk))
    return Launch(_index_scores_kernel, grid, arguments, tiles.num_warps, tiles.stages, tiles.max_registers)


# -- reference ---------------------------------------------------------------------------------------------------------


def index_scores_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    weights: torch.Tensor,
    *,
    starts: torch.Tensor | None = None,
    ends: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """`index_scores` in float64, a query at a time: float64 [T, S]."""
    (T, _, _), S = q.shape, k.shape[0]
    out = torch.full((T, S), -torch.inf, dtype=torch.float64, device=q.device)
    keys, at = k.double(), torch.arange(S, device=q.device)
    for t in range(T):
        score = weights[t].double() @ (q[t].double() @ keys.T).relu()
        score = score if k_scale is None else score * k_scale
        seen = (at >= (0 if starts is None else starts[t])) & (at < (S if ends is None else ends[t]))
        out[t] = torch.where(seen, score, -torch.inf)
    return out


def index_scores_paged_reference(
    q: torch.Tensor,
    weights: torch.Tensor,
    *,
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    max_seq_len: int,
) -> torch.Tensor:
    """`index_scores_paged` in float64, a sequence at a time: float64 [N, max_seq_len]."""
    out = torch.full((q.shape[0], max_seq_len), -torch.inf, dtype=torch.float64, device=q.device)
    keys, scales = index_pages(cache, q.shape[2])
    for b, S in enumerate(seq_lens.tolist()):
        first, last = query_start_loc[b : b + 2].tolist()
        pages = block_tables[b, : -(-S // PAGE)].long()
        k = keys[pages].flatten(0, 1)[:S]
        ends = S - (last - first) + 1 + torch.arange(last - first, device=q.device)
        scale = None if scales is None else scales[pages].flatten()[:S]
        out[first:last, :S] = index_scores_reference(q[first:last], k, weights[first:last], ends=ends, k_scale=scale)
    return out


# -- compilations ------------------------------------------------------------------------------------------------------


def compilations(target: Target) -> list[Compilation]:
    """Prefill of 4096 queries and decode of 64 sequences, with the heads of DeepSeek-V3.2 (64) and of GLM-5 (32)."""
    found = []
    for q_dtype, k_dtype, heads in _COMPILED:
        name = f"{str(q_dtype)[6:]} x {str(k_dtype)[6:]}, {heads} heads"
        wgmma = q_dtype != torch.float32
        main = heads == 64 and q_dtype == k_dtype and wgmma
        prefill = example(4096, 131072, heads, q_dtype, k_dtype)
        launch = plan(prefill, torch.empty(4096, 131072, device="meta"), target)
        found.append(Compilation(f"prefill, {name}", launch, main, wgmma))
        decode = example_paged(64, 1, heads, q_dtype, k_dtype)
        launch = plan(decode, torch.empty(64, 131072, device="meta"), target)
        found.append(Compilation(f"decode, {name}", launch, main, wgmma))
    return found


_COMPILED = (
    (torch.float8_e4m3fn, torch.float8_e4m3fn, 64),
    (torch.bfloat16, torch.bfloat16, 64),
    (torch.float8_e4m3fn, torch.float8_e4m3fn, 32),
    (torch.bfloat16, torch.float8_e4m3fn, 64),
    (torch.int8, torch.int8, 64),
    (torch.float32, torch.float32, 64),
)
