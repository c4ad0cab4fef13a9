"""The best k keys of each query, scored and selected in one kernel: the matrix of scores [T, S] is never held.

A program scores a chunk of keys for a tile of queries (`score_tiles`), writes the scores to a small place of its own,
which stays in the nearest caches, and takes them in, query by query, against each query's rising threshold (`consume`).
So the matrix unit sees the tight loop of `index_scores`, selection sees whole blocks of a row as in `top_k`, and the
result is theirs. Memory besides the result: programs * BT * (BLOCK + 2 CAP + 4) words. Few queries over many keys share
the keys out, and merge. What outlives a block of keys (candidates, how many, the threshold) lies in memory, because the
product leaves few registers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from heedful.kernels import tuning
from heedful.kernels.compilation import Compilation, Launch
from heedful.kernels.index_scores import load_queries, load_weights, score_tiles, tile_of_queries, visible_tiles
from heedful.kernels.index_scores import plan as plan_scores
from heedful.kernels.scoring import (
    Scoring,
    Tiles,
    example,
    example_paged,
    operand_type,
    scoring_arguments,
    tiles_for,
)
from heedful.kernels.target import Target
from heedful.kernels.top_k import MAX_K, candidates, consume, emit, load_block, select, sizes_for, sort, top_k

SCORES_BYTES = 1 << 26
"""Up to this many bytes the scores of a call are written as a matrix and selected from, which is quicker: of a decode
step, say, whose few rows would keep few programs of the fused kernel busy."""

# -- kernel ------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["T", "S", "num_seqs", "table_width", "table_stride", "num_tiles", "parts"])
def _index_top_k_kernel(
    q, weights, keys, scales, starts, ends, tables, seq_lens, query_start_loc, T, S, num_seqs, num_blocks, stride_t,
    stride_h, weight_stride, page_stride, scale_stride, table_stride, table_width, out, out_values, scratch, num_tiles,
    k, parts, part, out_stride, KEY_STRIDE: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, BT: tl.constexpr,
    BS: tl.constexpr, HP: tl.constexpr, DP: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    PAGED: tl.constexpr, ONCE: tl.constexpr, STAGES: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Tiles of queries in turn, each over `parts` parts of the keys.

    One place holds all that a program keeps, so that one address serves: of each query its candidates, a block of
    scores, and four words (how many candidates, the threshold, two to keep the rest aligned).
    """
    pools = scratch + tl.program_id(0).to(tl.int64) * (BT * (2 * CAP + BLOCK + 4))
    scores = pools + BT * 2 * CAP
    states = scores + BT * BLOCK
    for unit in range(tl.program_id(0), num_tiles * parts, tl.num_programs(0)):
        tile = num_tiles - 1 - unit // parts  # causal queries that see most come first
        first, count, start, end, b = tile_of_queries(
            tile, T, S, starts, ends, query_start_loc, seq_lens, table_width, num_seqs, BT, PAGED
        )
        if count > 0:
            from_ = unit % parts * part
            low, high = visible_tiles(start, end, from_, tl.minimum(from_ + part, S), S, BS)
            columns = load_queries(q, first, count, stride_t, stride_h, HEADS, DIM, BT, HP, DP, DOT, ONCE)
            for t in range(0, count):
                tl.store(states + t * 4, 0.0)
                tl.store(states + t * 4 + 1, float("-inf"))
            origin = low if PAGED else 0  # see `score_tiles`
            for done in range(low - origin, high - origin + BLOCK, BLOCK):  # once more behind the last keys
                begin = origin + done
                stop = tl.minimum(begin + BLOCK, high)
                w = load_weights(weights, first, count, weight_stride, HEADS, BT, HP)  # not kept while selecting
                score_tiles(
                    begin, stop, scores - begin, BLOCK, columns, w, start, end, count, S, keys, scales,
                    tables + b.to(tl.int64) * table_stride if PAGED else None, num_blocks, page_stride, scale_stride,
                    KEY_STRIDE, HEADS, DIM, BT, BS, HP, DP, DOT, PRECISION, PAGED, ONCE, STAGES, False,
                )  # fmt: skip
                tl.debug_barrier()  # scores were written by other threads
                for t in range(0, count):
                    fill = tl.load(states + t * 4).to(tl.int32, bitcast=True)
                    threshold = tl.load(states + t * 4 + 1)
                    x, s = load_block(scores + t * BLOCK, None, 0, stop - begin, BLOCK)
                    fill, threshold = consume(
                        x, begin + s, pools + t * (2 * CAP), fill, threshold, k, begin >= high, CAP, BLOCK
                    )
                    tl.debug_barrier()  # all have read before one writes
                    tl.store(states + t * 4, fill.to(tl.float32, bitcast=True))
                    tl.store(states + t * 4 + 1, threshold)
                tl.debug_barrier()  # before they are written over
            for t in range(0, count):
                fill = tl.load(states + t * 4).to(tl.int32, bitcast=True)
                to = (first + t).to(tl.int64) * out_stride + unit % parts * k
                to_values = None if out_values is None else out_values + to
                emit(pools + t * (2 * CAP), fill, k, out + to, to_values, CAP, BLOCK)


# -- launchers ---------------------------------------------------------------------------------------------------------


def index_top_k(
    q: torch.Tensor,
    k: torch.Tensor,
    weights: torch.Tensor,
    count: int,
    *,
    starts: torch.Tensor | None = None,
    ends: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    sorted: bool = True,
) -> torch.Tensor:
    """The `count` best keys of each query: `top_k(index_scores(...), count)`, arguments as there.

    Returns:
        int32 [T, count]: positions in k, then -1. Beyond MAX_K of them, and where they take at most SCORES_BYTES, all
        scores are held.
    """
    return _run(Scoring.contiguous(q, k, weights, starts, ends, k_scale), count, sorted, q.device)


def index_top_k_paged(
    q: torch.Tensor,
    weights: torch.Tensor,
    count: int,
    *,
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    max_seq_len: int,
    sorted: bool = True,
) -> torch.Tensor:
    """`index_top_k` of a ragged batch over keys in pages: `top_k(index_scores_paged(...), count)`, arguments as there.

    Returns:
        int32 [N, count]: positions in each query's own sequence, then -1.
    """
    scoring = Scoring.paged(q, weights, cache, block_tables, seq_lens, query_start_loc, max_seq_len)
    return _run(scoring, count, sorted, q.device)


def _run(scoring: Scoring, count: int, sorted: bool, device: torch.device) -> torch.Tensor:
    target = Target.of(device)
    if count > MAX_K or scoring.T * scoring.S * 4 <= SCORES_BYTES:
        scores = torch.empty((scoring.T, scoring.S), device=device)
        plan_scores(scoring, scores, target).run()
        return top_k(scores, count, sorted=sorted)
    out = torch.empty((scoring.T, count), dtype=torch.int32, device=device)
    for launch in plan(scoring, count, sorted, out, target):
        launch.run()
    return out


@dataclass(frozen=True)
class Sizes:
    """The tile that is scored; BLOCK (keys scored before they are taken in: at least a tile) and CAP as in `top_k`;
    blocks that share a multiprocessor."""

    tiles: Tiles
    BLOCK: int
    CAP: int
    blocks: int = 2


def fused_sizes(scoring: Scoring, k: int, dot: torch.dtype, target: Target) -> Sizes:
    """The sizes that are taken unless a table of measurements says otherwise: those of both halves. On Hopper the tile
    has half the queries, so that its product and what selection needs fit in the registers of two blocks."""
    tiles, selection = tiles_for(scoring, dot, target), sizes_for(k)
    if target.hopper and tiles.BT > 1 and tiles.BT * tiles.HP > 128:
        tiles = replace(tiles, BT=tiles.BT // 2)
    if target.backend == "cuda" and tiles.max_registers is None:
        tiles = replace(tiles, max_registers=255)  # else the assembler may take 128 and spill
    return Sizes(tiles, selection.BLOCK, selection.CAP)


def size_candidates(scoring: Scoring, k: int, dot: torch.dtype, target: Target) -> list[Sizes]:
    """What a warm-up tries: the default first, then one block a multiprocessor with all its registers, and the whole
    tile of `index_scores`."""
    default = fused_sizes(scoring, k, dot, target)
    whole = replace(default, tiles=tiles_for(scoring, dot, target))
    free = [replace(sizes, blocks=1, tiles=replace(sizes.tiles, max_registers=None)) for sizes in (default, whole)]
    return [default, whole, *free]


def warm_up(scoring: Scoring, k: int) -> Sizes:
    """Measures the candidates on the tensors of `scoring`, for shapes of its bucket."""
    device = scoring.arguments["q"].device
    target, out = Target.of(device), torch.empty((scoring.T, k), dtype=torch.int32, device=device)
    candidates = size_candidates(scoring, k, operand_type(scoring.q_dtype, scoring.k_dtype, target), target)
    key = (*scoring.bucket, str(k))
    return tuning.measure(
        "index_top_k", key, target, candidates, lambda sizes: plan(scoring, k, False, out, target, sizes)
    )


def plan(
    scoring: Scoring,
    k: int,
    sorted: bool,
    out: torch.Tensor,
    target: Target,
    sizes: Sizes | None = None,
    parts: int | None = None,
) -> list[Launch]:
    """The launches that write the selection to `out` [T, k]: of parts of the keys, merging them, in order of score."""
    dot = operand_type(scoring.q_dtype, scoring.k_dtype, target)
    if sizes is None:
        key = (*scoring.bucket, str(k))
        sizes = tuning.choose("index_top_k", key, target, lambda: size_candidates(scoring, k, dot, target))
    num_tiles, slots = scoring.tiles(sizes.tiles.BT), sizes.blocks * target.num_sms
    if parts is None:
        parts = min(math.isqrt(scoring.S // k), slots // max(1, num_tiles))
    part = max(1, -(-scoring.S // (max(1, parts) * sizes.BLOCK))) * sizes.BLOCK
    parts = max(1, -(-scoring.S // part))
    values, positions = candidates(scoring.T, parts * k, out.device) if parts > 1 or sorted else (None, out)
    programs = min(num_tiles * parts, slots)
    arguments = scoring_arguments(scoring, dot, sizes.tiles, target)
    arguments |= {"out": positions, "out_values": values}
    arguments["scratch"] = torch.empty((programs, sizes.tiles.BT, 2 * sizes.CAP + sizes.BLOCK + 4), device=out.device)
    arguments |= {"num_tiles": num_tiles, "k": k, "parts": parts, "part": part, "out_stride": positions.stride(0)}
    arguments |= {"CAP": sizes.CAP, "BLOCK": sizes.BLOCK}
    tiles = sizes.tiles
    first = Launch(_index_top_k_kernel, (programs,), arguments, tiles.num_warps, tiles.stages, tiles.max_registers)
    if values is None:
        return [first]
    if parts == 1:
        return [first, sort(values, positions, out)]
    return [first, *select(values, positions, None, k, sorted, out, sizes_for(k), target)]


# -- compilations ------------------------------------------------------------------------------------------------------


def compilations(target: Target) -> list[Compilation]:
    """2048 of 131072 for 4096 queries, contiguous and in pages."""
    found = []
    for dtype in (torch.float8_e4m3fn, torch.bfloat16):
        name, out = str(dtype)[6:], torch.empty((4096, 2048), dtype=torch.int32, device="meta")
        launch = plan(example(4096, 131072, 64, dtype, dtype), 2048, False, out, target)[0]
        found.append(Compilation(f"prefill, {name}, 64 heads", launch, main=True, wgmma=True))
        launch = plan(example_paged(4, 1024, 64, dtype, dtype), 2048, False, out, target)[0]
        found.append(Compilation(f"prefill over pages, {name}, 64 heads", launch, main=True, wgmma=True))
    return found
