"""Attention of each query over chosen rows on the GPU, and over every row up to its position (the dense baseline).

A program holds the heads of one query that share a key head (MQA: all of them read the same rows), gathers its keys a
tile at a time and keeps the softmax online: maximum, sum and values in registers, in float32. The tile that was read
for the logits is the tile of values. Where queries are few, the keys are cut too (`split`). Formulas:
`heedful.ops.reference`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from heedful.kernels import tuning
from heedful.kernels.attention_tiles import Tiles, operand_type, tile_candidates
from heedful.kernels.compilation import Compilation, Launch
from heedful.kernels.dequantize import dequantize_pages, is_worth_it
from heedful.kernels.rows import (
    PAGE,
    Rows,
    latent_rows_reference,
    padded,
    read_part,
    times_scales,
    unit_stride,
)
from heedful.kernels.slots import Batch, check_sequences, sequence_of_query, slots_of
from heedful.kernels.split import choose_splits, plan_merge
from heedful.kernels.target import Target

LOG2E = 1.4426950408889634
MOST_ROWS = 2**31 - 4096
"""Rows that a call reads from: the end of the last tile must not overflow."""

# -- kernel ------------------------------------------------------------------------------------------------------------


@triton.jit
def last_valid(indices, low, high, S, WIDTH: tl.constexpr):
    """One more than the last place in [low, high) whose index names a row; `low` if none does."""
    end = low
    for first in range(low, high, WIDTH):
        at = first + tl.arange(0, WIDTH)
        index = tl.load(indices + at, mask=at < high, other=-1)
        end = tl.maximum(end, tl.max(tl.where((index >= 0) & (index < S), at + 1, 0), axis=0))
    return end


@triton.jit
def weigh(logits, there, m, total):
    """A tile of the online softmax, of logits [BH, BK] in base 2 whose columns count where `there` [BK] says so.

    The new maximum [BH] and sum [BH], the factor of the sums so far [BH], and weights [BH, BK].
    """
    logits = tl.where(there[None, :], logits, float("-inf"))
    top = tl.maximum(m, tl.max(logits, axis=1))
    base = tl.where(top == float("-inf"), 0.0, top)  # until a key is seen: no -inf - -inf
    kept = tl.exp2(m - base)
    p = tl.exp2(logits - base[:, None])
    return top, total * kept + tl.sum(p, axis=1), kept, p


@triton.jit(do_not_specialize=["T", "num_seqs"])
def _attention_kernel(
    q, kc, kr, ks, v, indices, topk_length, sink, positions, tables, seq_lens, query_start_loc, out, lse, largest,
    q_row, q_head, kc_head, v_head, indices_row, table_row, T, S, K, num_seqs, chunk, scale,
    kc_row: tl.constexpr, kr_row: tl.constexpr, ks_row: tl.constexpr, v_row: tl.constexpr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, C: tl.constexpr, R: tl.constexpr, DV: tl.constexpr,
    CP: tl.constexpr, RP: tl.constexpr, VP: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr, DOT: tl.constexpr,
    PAGED: tl.constexpr, SPLIT: tl.constexpr, BYTES: tl.constexpr, WHOLE: tl.constexpr,
    STAGES: tl.constexpr, BRANCHES: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """Attention of some heads of one query over a chunk of its keys; S rows, K indices, logits in base 2."""
    # BRANCHES and TURNED: see `Tiles`. The conditions of the former always hold, and no jump is left of them.
    BLOCKS: tl.constexpr = (GROUP + BH - 1) // BH
    KEY_HEADS: tl.constexpr = HEADS // GROUP
    place = tl.program_id(0)
    block, group = place % BLOCKS, (place // BLOCKS) % KEY_HEADS
    t = place // (BLOCKS * KEY_HEADS)
    if PAGED:
        b = sequence_of_query(t, query_start_loc, num_seqs, 256)
        tables += b.to(tl.int64) * table_row
        blocks = S // 64
        S = tl.minimum(K, tl.load(seq_lens + b))  # K: what the table has room for
    low = tl.program_id(1) * chunk
    if indices is None:
        if PAGED:
            end = S - tl.load(query_start_loc + b + 1) + t + 1
        elif positions is None:
            end = S - T + t + 1
        else:
            end = tl.maximum(tl.minimum(tl.load(positions + t), S - 1), -1).to(tl.int32) + 1
        high = tl.minimum(tl.minimum(end, S), low + chunk)
    else:
        indices += t.to(tl.int64) * indices_row
        high = tl.minimum(K, low + chunk)
        if topk_length is not None:
            high = tl.maximum(tl.minimum(high, tl.load(topk_length + t)), 0).to(tl.int32)
        high = last_valid(indices, low, high, S, 1024)

    within = block * BH + tl.arange(0, BH)
    mine = within < GROUP
    head = group * GROUP + within
    m = tl.full([BH], float("-inf"), tl.float32)
    total = tl.zeros([BH], tl.float32)
    acc = tl.zeros([BH, VP], tl.float32)
    if low < high:
        q += t.to(tl.int64) * q_row
        kc += group.to(tl.int64) * kc_head
        qc = read_part(q, head.to(tl.int64), q_head, mine, C, CP, False).to(DOT)
        if R > 0:
            qr = read_part(q + C, head.to(tl.int64), q_head, mine, R, RP, False).to(DOT)
        rows = (tl.zeros([BK], tl.int32) + S).to(tl.uint32, bitcast=True)
        for first in tl.range(low, high, BK, num_stages=STAGES):
            at, start = first + tl.arange(0, BK), 0
            if indices is not None:
                if WHOLE:
                    index = tl.load(indices + at)
                else:
                    index = tl.load(indices + at, mask=at < high, other=-1)
                slot = index.to(tl.int64)
            else:
                index = tl.where(at < high, at, -1)
                slot = index.to(tl.int64)
                if PAGED:  # BK divides the page
                    page = tl.load(tables + first // 64)
                    index = tl.where((page >= 0) & (page < blocks), index, -1)
                    start, slot = page.to(tl.int64) * 64 + first % 64, tl.arange(0, BK).to(tl.int64)
            there = index.to(tl.uint32, bitcast=True) < rows  # neither negative nor too large
            keys = read_part(kc + start * kc_row, slot, kc_row, there, C, CP, False)
            if ks is not None:
                keys = times_scales(keys, ks + start * ks_row, slot, ks_row, there, C, CP, BK, BYTES)
            keys = keys.to(DOT)
            if R > 0:
                if ks is None:
                    rest = read_part(kc + start * kc_row + C, slot, kc_row, there, R, RP, False).to(DOT)
                else:
                    rest = read_part(kr + start * kr_row, slot, kr_row, there, R, RP, BYTES).to(DOT)
            if TURNED:
                logits = tl.dot(keys, tl.trans(qc), input_precision="ieee")
                if R > 0:
                    logits = tl.dot(rest, tl.trans(qr), logits, input_precision="ieee")
                logits = tl.trans(logits) * scale
            elif R > 0:
                logits = tl.dot(qr, tl.trans(rest), input_precision="ieee")
                if BRANCHES > 0:
                    logits = tl.dot(qc, tl.trans(keys), input_precision="ieee") * scale + logits * scale
                else:
                    logits = tl.dot(qc, tl.trans(keys), logits, input_precision="ieee") * scale
            else:
                logits = tl.dot(qc, tl.trans(keys), input_precision="ieee") * scale
            if BRANCHES > 0:
                kept, p = m, logits
                if first < high:
                    m, total, kept, p = weigh(logits, there, m, total)
            else:
                m, total, kept, p = weigh(logits, there, m, total)
            if v is None:
                values = keys
            else:
                values = read_part(v + group.to(tl.int64) * v_head, slot, v_row, there, DV, VP, False).to(DOT)
            if BRANCHES > 1:
                if high > first:
                    acc = tl.dot(p.to(DOT), values, acc * kept[:, None], input_precision="ieee")
            else:
                acc = tl.dot(p.to(DOT), values, acc * kept[:, None], input_precision="ieee")

    log = m + tl.log2(total)
    row = (t.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * HEADS + head
    columns = tl.arange(0, VP)
    mask = mine[:, None] & (columns < DV)[None, :]
    if largest is not None:
        tl.store(largest + row, m * 0.6931471805599453, mask=mine)
    to = out + row[:, None] * DV + columns[None, :]
    if SPLIT:  # in base 2, without the sink; what holds no key is told by its lse alone
        tl.store(lse + row, log, mask=mine)
        if low < high:
            tl.store(to, acc * (1.0 / tl.where(total == 0.0, 1.0, total))[:, None], mask=mask)
    else:
        tl.store(lse + row, log * 0.6931471805599453, mask=mine)
        if sink is not None:
            added = tl.load(sink + head, mask=mine, other=0.0) * 1.4426950408889634
            total += tl.where(total == 0.0, 0.0, tl.exp2(added - m))
        acc *= (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
        tl.store(to, acc.to(out.dtype.element_ty), mask=mask)


# -- launchers ---------------------------------------------------------------------------------------------------------


def sparse_attention(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor | None,
    *,
    scale: float,
    value_dim: int | None = None,
    v: torch.Tensor | None = None,
    sink: torch.Tensor | None = None,
    topk_length: torch.Tensor | None = None,
    q_positions: torch.Tensor | None = None,
    max_logits: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over contiguous rows.

    Args:
        q: [T, H, Dk] float32, bfloat16 or float16.
        kv: [S, Dk] or [S, Hkv, Dk], the same dtypes.
        indices: [T, K] int32; negative ones and those >= S are skipped. None: every key up to the query's position.
        scale: factor of the logits.
        value_dim: Dv, where values are the first Dv numbers of kv; default Dk.
        v: values apart, [S, Dv] or [S, Hkv, Dv].
        sink: [H] float32; exp(sink) is added to the denominator alone.
        topk_length: [T] integers: only the first of a query's indices count.
        q_positions: [T] integers, default S - T + arange(T); for `indices` None.
        max_logits: [T, H] float32 that the largest logits are written to, -inf for a query without a key.

    Returns:
        out [T, H, Dv] in q's dtype; lse [T, H] float32, natural logarithm, without the sink. A query without a key has
        out 0 and lse -inf.
    """
    rows = Rows.contiguous(kv, kv.shape[-1] if value_dim is None else value_dim, v)
    return _attend(q, rows, indices, scale, sink, topk_length, q_positions, None, max_logits)


def sparse_attention_paged(
    q: torch.Tensor,
    indices: torch.Tensor | None,
    *,
    scale: float,
    value_dim: int,
    cache: torch.Tensor,
    block_tables: torch.Tensor | None,
    seq_lens: torch.Tensor | None = None,
    query_start_loc: torch.Tensor | None = None,
    sink: torch.Tensor | None = None,
    topk_length: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the latent rows of a paged cache.

    Args:
        q: [N, H, C + R] float32, bfloat16 or float16; the queries of a sequence are its last tokens.
        indices: [N, K] int32, positions in the query's sequence; those outside it are skipped. None: every key up to
            the query's position.
        scale: factor of the logits.
        value_dim: C.
        cache: [num_blocks, 64, C + R] float32, bfloat16 or float16, or uint8 rows of C e4m3 codes, a float32 scale for
            each 128 of them and R bfloat16 numbers.
        block_tables: [B, M] int32; entries beyond a sequence's pages are not read. None: an index is a slot, block * 64
            + offset, and `seq_lens` and `query_start_loc` are not looked at.
        seq_lens: [B] int32, with this step's tokens.
        query_start_loc: [B + 1] int32.
        sink, topk_length: as in `sparse_attention`.

    Returns:
        As `sparse_attention`.
    """
    rows = Rows.pages(cache, q.shape[-1], value_dim)
    batch = None
    if block_tables is not None:
        assert seq_lens is not None
        assert query_start_loc is not None
        batch = (block_tables, seq_lens.contiguous(), query_start_loc.contiguous())
        if indices is not None:
            if is_worth_it(q, rows, indices.shape[1], block_tables):
                kv, batch = dequantize_pages(rows, batch)
                rows = Rows.contiguous(kv, value_dim, None)
            indices, topk_length, batch = slots_of(indices, batch, rows.S // PAGE, topk_length), None, None
        else:
            check_sequences(len(q), batch[1])
    return _attend(q, rows, indices, scale, sink, topk_length, None, batch)


def _attend(
    q: torch.Tensor,
    rows: Rows,
    indices: torch.Tensor | None,
    scale: float,
    sink: torch.Tensor | None,
    topk_length: torch.Tensor | None,
    q_positions: torch.Tensor | None,
    batch: Batch | None,
    max_logits: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    largest = max_logits is not None
    target = Target.of(q)
    launches = plan(q, rows, indices, scale, sink, topk_length, q_positions, batch, target, largest=largest)
    for launch in launches:
        launch.run()
    if max_logits is not None:
        found = launches[0].arguments["largest"]  # of parts, if keys are in parts
        max_logits.copy_(found if found.ndim == 2 else found.amax(1))
    return launches[-1].arguments["out"], launches[-1].arguments["lse"]


def warm_up(q: torch.Tensor, rows: Rows, indices: torch.Tensor) -> Tiles:
    """Measures the candidates on queries [T, H, Dk] over chosen rows [T, K], for shapes of their bucket."""
    target, group = Target.of(q), q.shape[1] // rows.heads
    dot = operand_type(q.dtype, rows.dtype, target)
    return tuning.measure(
        "sparse_attention",
        _bucket(q, rows, indices),
        target,
        tile_candidates(group, rows, dot, True, target),
        lambda tiles: plan(q, rows, indices, q.shape[-1] ** -0.5, None, None, None, None, target, tiles),
    )


def _bucket(q: torch.Tensor, rows: Rows, indices: torch.Tensor | None) -> tuple[int | str, ...]:
    """Shapes that are served by the same tiles."""
    widths = f"{q.shape[1]}/{rows.heads}", f"{rows.C}+{rows.R}/{rows.DV}"
    form = f"{'apart' if rows.apart else 'prefix'}-{rows.bytes}"
    K = 0 if indices is None else indices.shape[1]
    return tuning.bucket(q.shape[0], *widths, K, q.dtype, rows.dtype, form)


_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def plan(
    q: torch.Tensor,
    rows: Rows,
    indices: torch.Tensor | None,
    scale: float,
    sink: torch.Tensor | None,
    topk_length: torch.Tensor | None,
    q_positions: torch.Tensor | None,
    batch: Batch | None,
    target: Target,
    tiles: Tiles | None = None,
    largest: bool = False,
) -> list[Launch]:
    """The launches, of which the last writes out [T, H, Dv] and lse [T, H]: one, or with keys in parts two.

    Raises:
        ValueError: more than `MOST_ROWS` rows, or rows too wide for the target.
    """
    if rows.S > MOST_ROWS:
        raise ValueError(f"kv: expected at most {MOST_ROWS} rows, which 32 bits number, got {rows.S}")
    q = unit_stride(q)
    T, H, _ = q.shape
    group = H // rows.heads
    dot = operand_type(q.dtype, rows.dtype, target)
    if tiles is None:
        tiles = tuning.choose(
            "sparse_attention",
            _bucket(q, rows, indices),
            target,
            lambda: tile_candidates(group, rows, dot, indices is not None, target),
        )
    programs = T * rows.heads * -(-group // tiles.BH)
    tables, seq_lens, query_start_loc = batch if batch else (None, None, None)
    tables = None if tables is None else unit_stride(tables)
    visible = rows.S if tables is None else min(rows.S, tables.shape[1] * PAGE)
    length = visible if indices is None else indices.shape[1]
    splits, chunk = choose_splits(programs, length, tiles.BK, target.num_sms)
    lead = (T, splits, H) if splits > 1 else (T, H)
    out = torch.empty((*lead, rows.DV), dtype=torch.float32 if splits > 1 else q.dtype, device=q.device)
    lse = torch.empty(lead, dtype=torch.float32, device=q.device)
    arguments = dict(rows.arguments)
    if rows.dtype == torch.uint8 and target.fp8_dot:
        arguments["kc"] = arguments["kc"].view(torch.float8_e4m3fn)
    if indices is not None:
        indices = unit_stride(indices)
    arguments |= {"q": q, "q_row": q.stride(0), "q_head": q.stride(1), "scale": scale * LOG2E, "out": out, "lse": lse}
    arguments |= {"largest": torch.empty_like(lse) if largest else None}
    arguments |= {"indices": indices, "indices_row": 0 if indices is None else indices.stride(0)}
    arguments |= {"topk_length": None if indices is None or topk_length is None else topk_length.contiguous()}
    arguments |= {"sink": None if sink is None else sink.contiguous()}
    arguments |= {"positions": None if q_positions is None else q_positions.contiguous(), "tables": tables}
    arguments |= {"seq_lens": seq_lens, "query_start_loc": query_start_loc}
    arguments |= {"table_row": 0 if tables is None else tables.stride(0), "T": T, "S": rows.S}
    arguments |= {"K": length, "num_seqs": 0 if seq_lens is None else seq_lens.shape[0], "chunk": chunk}
    arguments |= {"HEADS": H, "GROUP": group, "C": rows.C, "R": rows.R, "DV": rows.DV, "CP": padded(rows.C)}
    arguments |= {"RP": padded(rows.R), "VP": padded(rows.DV), "BH": tiles.BH, "BK": tiles.BK, "DOT": _TYPES[dot]}
    arguments |= {
        "PAGED": tables is not None,
        "SPLIT": splits > 1,
        "BYTES": rows.bytes,
        "STAGES": tiles.stages,
        "BRANCHES": tiles.branches,
        "TURNED": tiles.turned,
        # Of coded rows it would cost more registers than there are.
        "WHOLE": arguments["ks"] is None and topk_length is None and length % tiles.BK == 0,
    }
    launch = Launch(_attention_kernel, (programs, splits), arguments, tiles.num_warps, tiles.stages)
    return [launch] if splits == 1 else [launch, plan_merge(out, lse, sink, q.dtype)]


# -- reference ---------------------------------------------------------------------------------------------------------


def sparse_attention_reference(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor | None,
    *,
    scale: float,
    value_dim: int | None = None,
    v: torch.Tensor | None = None,
    sink: torch.Tensor | None = None,
    topk_length: torch.Tensor | None = None,
    q_positions: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`sparse_attention` in float64, a query at a time."""
    (T, H, _), S = q.shape, kv.shape[0]
    keys = (kv if kv.ndim == 3 else kv[:, None]).double()
    values = keys[..., :value_dim] if v is None else (v if v.ndim == 3 else v[:, None]).double()
    keys, values = (x.repeat_interleave(H // x.shape[1], 1) for x in (keys, values))
    out = torch.zeros((T, H, values.shape[-1]), dtype=torch.float64, device=q.device)
    lse = torch.full((T, H), -torch.inf, dtype=torch.float64, device=q.device)
    for t in range(T):
        if indices is None:
            position = S - T + t if q_positions is None else int(q_positions[t])
            chosen = torch.arange(max(0, min(position + 1, S)), device=q.device)
        else:
            chosen = indices[t, : None if topk_length is None else max(0, int(topk_length[t]))].long()
            chosen = chosen[(chosen >= 0) & (chosen < S)]
        if not len(chosen):
            continue
        logits = scale * torch.einsum("hd,khd->hk", q[t].double(), keys[chosen])
        lse[t] = logits.logsumexp(1)
        total = lse[t] if sink is None else torch.logaddexp(lse[t], sink.double())
        out[t] = torch.einsum("hk,khd->hd", (logits - total[:, None]).exp(), values[chosen])
    return out, lse


def sparse_attention_paged_reference(
    q: torch.Tensor,
    indices: torch.Tensor | None,
    *,
    scale: float,
    value_dim: int,
    cache: torch.Tensor,
    block_tables: torch.Tensor | None,
    seq_lens: torch.Tensor | None = None,
    query_start_loc: torch.Tensor | None = None,
    sink: torch.Tensor | None = None,
    topk_length: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`sparse_attention_paged` in float64, a sequence at a time."""
    rows = latent_rows_reference(cache, value_dim)
    common: dict[str, Any] = {"scale": scale, "value_dim": value_dim, "sink": sink}
    if block_tables is None:
        return sparse_attention_reference(q, rows, indices, topk_length=topk_length, **common)
    assert seq_lens is not None
    assert query_start_loc is not None
    out = torch.zeros((*q.shape[:2], value_dim), dtype=torch.float64, device=q.device)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.float64, device=q.device)
    starts = query_start_loc.tolist()
    for b, S in enumerate(seq_lens.tolist()):
        part = slice(starts[b], starts[b + 1])
        position = torch.arange(S, device=q.device)
        kv = rows[block_tables[b].long()[position // PAGE] * PAGE + position % PAGE]
        chosen = None if indices is None else indices[part]
        lengths = None if topk_length is None else topk_length[part]
        out[part], lse[part] = sparse_attention_reference(q[part], kv, chosen, topk_length=lengths, **common)
    return out, lse


# -- compilations ------------------------------------------------------------------------------------------------------


def compilations(target: Target) -> list[Compilation]:
    """Prefill of 4096 queries and decode of 64 and 1 with the sizes of DeepSeek-V3.2; other forms and dtypes."""
    found = []
    for name, T, H, Dk, Dv, rows, form in _COMPILED:
        launch = example(T, H, Dk, Dv, rows, form, target)
        wgmma = rows != torch.float32 and H >= 64 and form != "apart"
        found.append(Compilation(f"{name}, {H} heads, {Dk}/{Dv}, {str(rows)[6:]}", launch, True, wgmma))
    return found


_COMPILED = (
    ("prefill", 4096, 128, 576, 512, torch.bfloat16, "rows"),
    ("prefill, pages", 4096, 128, 576, 512, torch.bfloat16, "slots"),
    ("prefill, pages", 4096, 128, 576, 512, torch.uint8, "slots"),
    ("decode of 64", 64, 128, 576, 512, torch.uint8, "slots"),
    ("decode of 64", 64, 128, 576, 512, torch.bfloat16, "slots"),
    ("decode of 1", 1, 128, 576, 512, torch.uint8, "slots"),
    ("decode of 1", 1, 128, 576, 512, torch.bfloat16, "slots"),
    ("decode of 64", 64, 64, 576, 512, torch.uint8, "slots"),
    ("decode of 64", 64, 64, 576, 512, torch.bfloat16, "slots"),
    ("decode of 64", 64, 16, 576, 512, torch.uint8, "slots"),
    ("decode of 64", 64, 16, 576, 512, torch.bfloat16, "slots"),
    ("prefill", 4096, 64, 512, 512, torch.bfloat16, "rows"),
    ("prefill", 4096, 128, 576, 512, torch.float16, "rows"),
    ("dense", 4096, 128, 576, 512, torch.bfloat16, "dense"),
    ("dense, pages", 64, 128, 576, 512, torch.bfloat16, "dense pages"),
    ("dense, pages", 64, 128, 576, 512, torch.uint8, "dense pages"),
    ("prefill, a key a head", 4096, 128, 192, 128, torch.bfloat16, "apart"),
    ("prefill", 4096, 128, 576, 512, torch.float32, "rows"),
    ("sinks and lengths", 64, 12, 40, 30, torch.float16, "rows"),
    ("sinks and lengths", 64, 12, 18, 13, torch.uint8, "slots"),
    ("sinks and positions", 64, 12, 40, 40, torch.bfloat16, "dense"),
)


def example(T: int, H: int, Dk: int, Dv: int, dtype: torch.dtype, form: str, target: Target) -> Launch:
    """The launch for 2048 keys of each of T queries, without memory; of 12 heads, with everything optional."""

    def empty(*shape: int, of: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    number = torch.bfloat16 if dtype == torch.uint8 else dtype
    q, indices = empty(T, H, Dk, of=number), None if "dense" in form else empty(T, 2048)
    batch = (empty(T, 2048), empty(T), empty(T + 1)) if form == "dense pages" else None
    if form == "apart":
        rows = Rows.contiguous(empty(131072, H, Dk, of=dtype), Dk, empty(131072, H, Dv, of=dtype))
    elif form in ("rows", "dense"):
        rows = Rows.contiguous(empty(131072, Dk, of=dtype), Dv, None)
    else:
        width = Dv + 4 * -(-Dv // 128) + 2 * (Dk - Dv) if dtype == torch.uint8 else Dk
        rows = Rows.pages(empty(4096, PAGE, width, of=dtype), Dk, Dv)
    sink = lengths = positions = None
    if H == 12:
        sink, lengths = empty(H, of=torch.float32), empty(T, of=torch.int64)
        positions = None if form != "dense" else lengths
    return plan(q, rows, indices, Dk**-0.5, sink, lengths, positions, batch, target)[0]
