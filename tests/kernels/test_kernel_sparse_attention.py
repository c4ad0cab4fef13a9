"""Sparse and dense attention of the Triton kernels against float64: drawn shapes, dtypes, pages, holes and parts.

In the interpreter every dtype is loaded as it is and multiplied in float32 (it multiplies bfloat16 wrongly), so what is
left of an error is the rounding of float32 and of the output. Products in 16 bits are left to the compiled kernels
(test_kernel_compiled.py) and to a GPU.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st

from heedful import ops
from heedful.kernels import slots as slots_kernel
from heedful.kernels import sparse_attention as kernels
from heedful.kernels import split as split_kernel
from heedful.kernels import tuning
from heedful.kernels.attention_tiles import operand_type, tile_candidates, tiles_for
from heedful.kernels.rows import Rows
from heedful.kernels.target import Target
from heedful.ops import reference

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Sums in float32 of averages below 5; then one rounding to the output's dtype, on a GPU also those of the products.
ERRORS = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# NumPy's, in the interpreter: log2(0) of a query without a key, an infinite sink, inf - inf of NaN that is asked for.
pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|overflow|invalid value):RuntimeWarning")
some = settings(deadline=None, max_examples=40)
few = settings(deadline=None, max_examples=25)


def on(device: torch.device, arguments: dict[str, Any]) -> dict[str, Any]:
    """The same arguments on a device, strides kept."""
    return {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}


def near(got: tuple[torch.Tensor, torch.Tensor], want: tuple[Any, Any], dtype: torch.dtype) -> None:
    """Equal up to rounding; -inf and NaN in the same places."""
    assert got[0].dtype == dtype
    assert got[1].dtype == torch.float32
    out, lse = (np.asarray(x, np.float64) for x in want)
    error, largest = ERRORS[dtype], np.abs(out[np.isfinite(out)]).max(initial=1.0)
    np.testing.assert_allclose(got[0].double().cpu().numpy(), out, rtol=error, atol=error * largest)
    error = ERRORS[torch.float32 if triton.knobs.runtime.interpret else dtype]
    np.testing.assert_allclose(got[1].double().cpu().numpy(), lse, rtol=error, atol=error)


@st.composite
def inputs(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of `sparse_attention` but for the indices; strides are not always those of a contiguous tensor."""
    T, S, Hkv, group, Dk = (draw(st.integers(*b)) for b in ((0, 5), (0, 200), (1, 3), (1, 20), (1, 70)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]

    def normal(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(shape, np.float32))

    found: dict[str, Any] = {
        "q": normal(T, Hkv * group, Dk).to(dtype),
        "kv": normal(S, Hkv, Dk).to(draw(st.sampled_from([dtype, torch.float32]))),
        "scale": draw(st.sampled_from([0.0, 0.3, -1.0])),
    }
    if Hkv == 1 and draw(st.booleans()):
        found["kv"] = found["kv"][:, 0]
    form = draw(st.sampled_from(["prefix", "whole", "apart"]))
    if form == "prefix":
        found["value_dim"] = draw(st.integers(1, Dk))
    if form == "apart":
        found["v"] = normal(*found["kv"].shape[:-1], draw(st.integers(1, 40))).to(found["kv"].dtype)
    if draw(st.booleans()):
        found["q"] = found["q"].transpose(0, 1).contiguous().transpose(0, 1)
        wide = torch.full((*found["kv"].shape[:-1], Dk + 3), torch.nan, dtype=found["kv"].dtype)
        wide[..., :Dk] = found["kv"]
        found["kv"] = wide[..., :Dk]
    if draw(st.booleans()):
        found["sink"] = torch.from_numpy(
            rng.choice([-np.inf, -1.0, 0.0, 2.0, 90.0, np.inf], Hkv * group).astype(np.float32)
        )
    return found


def want_of(given_: dict[str, Any], indices: Any, positions: Any = None) -> tuple[np.ndarray, np.ndarray]:
    """The project's float64 reference."""
    arrays = {name: x.double().numpy() if isinstance(x, torch.Tensor) else x for name, x in given_.items()}
    for name in ("kv", "v"):
        if name in arrays and arrays[name].ndim == 2:
            arrays[name] = arrays[name][:, None]
    with np.errstate(over="ignore"):
        if indices is None:
            return reference.dense_attention(**arrays, q_positions=positions)
        return reference.sparse_attention(**arrays, indices=indices)


@some
@given(inputs(), st.sampled_from([0, 1, 31, 32, 33, 70]), st.booleans(), st.integers(0, 2**32))
def test_sparse_attention_equals_the_reference(
    device: torch.device, arguments: dict[str, Any], K: int, shortened: bool, seed: int
) -> None:
    T, S = len(arguments["q"]), len(arguments["kv"])
    rng = np.random.default_rng(seed)
    indices = rng.integers(-S // 2 - 1, S + 5, (T, K)).astype(np.int32)
    lengths = rng.integers(-1, K + 3, T).astype(np.int32) if shortened else np.full(T, K)
    extra = {"topk_length": torch.from_numpy(lengths)} if shortened else {}
    got = kernels.sparse_attention(**on(device, {**arguments, **extra, "indices": torch.from_numpy(indices)}))
    counted = np.where(np.arange(K) < lengths[:, None], indices, -1)
    near(got, want_of(arguments, counted), arguments["q"].dtype)


@some
@given(inputs(), st.integers(-3, 60), st.booleans())
def test_dense_attention_equals_the_reference(
    device: torch.device, arguments: dict[str, Any], shift: int, default: bool
) -> None:
    positions = None if default else np.arange(len(arguments["q"])) * 7 + shift
    given_ = arguments if default else {**arguments, "q_positions": torch.from_numpy(positions)}
    got = kernels.sparse_attention(**on(device, given_), indices=None)
    near(got, want_of(arguments, None, positions), arguments["q"].dtype)


@st.composite
def batches(draw: st.DrawFn) -> dict[str, Any]:
    """A ragged batch over shuffled pages, some sequences empty, entries of tables beyond the pages unusable."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    boundary = st.sampled_from([0, 1, 63, 64, 65, 127, 128, 129])
    lens = draw(st.lists(boundary | st.integers(0, 150), min_size=1, max_size=4))
    next_n = draw(st.sampled_from([1, 1, 2, 3]))
    counts = [min(S, draw(st.integers(0, next_n))) for S in lens]
    C, R = draw(st.sampled_from([(16, 8), (12, 4), (40, 0), (9, 3), (130, 6), (256, 16)]))
    pages = [-(-S // 64) for S in lens]
    num_blocks = sum(pages) + 2
    order = list(rng.permutation(num_blocks))
    tables = np.full((len(lens), max(pages) + 1), 2**30, np.int32)
    for b, count in enumerate(pages):
        tables[b, :count] = [order.pop() for _ in range(count)]
    N, H = sum(counts), draw(st.integers(1, 20))
    kind = draw(st.sampled_from(["float32", "bfloat16", "fp8"]))
    latent = torch.from_numpy(rng.standard_normal((num_blocks * 64, C + R), np.float32) * 2)
    if kind == "fp8":
        cache = torch.zeros((num_blocks, 64, C + 4 * -(-C // 128) + 2 * R), dtype=torch.uint8)
        ops.write_latent_cache(latent, cache, np.arange(num_blocks * 64), value_dim=C)
    else:
        cache = latent.to(DTYPES[kind]).view(num_blocks, 64, C + R)
    return {
        "q": torch.from_numpy(rng.standard_normal((N, H, C + R), np.float32)).to(
            DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
        ),
        "scale": 0.2,
        "value_dim": C,
        "cache": cache,
        "block_tables": torch.from_numpy(tables),
        "seq_lens": torch.tensor(lens, dtype=torch.int32),
        "query_start_loc": torch.from_numpy(np.cumsum([0, *counts]).astype(np.int32)),
    }


@some
@given(batches(), st.sampled_from([0, 5, 64, 100]), st.booleans(), st.integers(0, 2**32))
def test_pages_hold_the_same_rows(
    device: torch.device, arguments: dict[str, Any], K: int, shortened: bool, seed: int
) -> None:
    rng, N = np.random.default_rng(seed), len(arguments["q"])
    longest = int(arguments["seq_lens"].max())
    indices = torch.from_numpy(rng.integers(-longest // 2 - 1, longest + 5, (N, K)).astype(np.int32))
    extra: dict[str, Any] = {"sink": torch.from_numpy(rng.standard_normal(arguments["q"].shape[1], np.float32))}
    if shortened:
        extra["topk_length"] = torch.from_numpy(rng.integers(0, K + 1, N).astype(np.int32))
    got = kernels.sparse_attention_paged(**on(device, {**arguments, **extra, "indices": indices}))
    want = kernels.sparse_attention_paged_reference(**arguments, **extra, indices=indices)
    near(got, want, arguments["q"].dtype)


@few
@given(batches())
def test_every_row_of_the_pages_is_the_dense_baseline(device: torch.device, arguments: dict[str, Any]) -> None:
    got = kernels.sparse_attention_paged(**on(device, arguments), indices=None)
    near(got, kernels.sparse_attention_paged_reference(**arguments, indices=None), arguments["q"].dtype)
    want = ops.dense_attention_paged(**{**arguments, "q": arguments["q"].float()}, backend="reference")
    near(got, want, arguments["q"].dtype)


@few
@given(batches(), st.integers(0, 2**32))
def test_an_index_may_be_a_slot(device: torch.device, arguments: dict[str, Any], seed: int) -> None:
    slots = len(arguments["cache"]) * 64
    rng = np.random.default_rng(seed)
    chosen = rng.integers(-9, slots + 9, (len(arguments["q"]), 40)).astype(np.int32)
    given_ = {name: arguments[name] for name in ("q", "scale", "value_dim", "cache")}
    given_ |= {"indices": torch.from_numpy(chosen), "block_tables": None}
    got = kernels.sparse_attention_paged(**on(device, given_))
    near(got, kernels.sparse_attention_paged_reference(**given_), arguments["q"].dtype)


@few
@given(batches(), st.sampled_from([1, 33, 1030]), st.booleans(), st.integers(0, 2**32))
def test_slots_of_positions(
    device: torch.device, arguments: dict[str, Any], K: int, shortened: bool, seed: int
) -> None:
    rng, N = np.random.default_rng(seed), len(arguments["q"])
    indices = torch.from_numpy(rng.integers(-20, 170, (N, K)).astype(np.int32))
    batch = tuple(arguments[name] for name in ("block_tables", "seq_lens", "query_start_loc"))
    lengths = torch.from_numpy(rng.integers(-1, K + 3, N)) if shortened else None
    got = slots_kernel.slots_of(
        indices.to(device), tuple(x.to(device) for x in batch), 9, None if lengths is None else lengths.to(device)
    )
    assert torch.equal(got.cpu(), slots_kernel.slots_reference(indices, batch, 9, lengths))


def within(x: torch.Tensor, filler: float) -> torch.Tensor:
    """The same numbers with others before and behind them, which a read outside the tensor would find."""
    around = torch.full((len(x) + 128, *x.shape[1:]), filler, dtype=x.dtype, device=x.device)
    around[64:-64] = x
    return around[64:-64]


def damaged(rng: np.random.Generator, device: torch.device) -> dict[str, Any]:
    """A batch of 3 sequences over 4 blocks: entries of tables that are no blocks, the last sequence longer than its
    table, which a sound one follows in memory. No number in it may be read that is not in the cache."""
    cache = within(torch.from_numpy(rng.standard_normal((4, 64, 40), np.float32)).to(device), torch.nan)
    tables = torch.tensor([[0, 4, 2**26 + 1], [-1, 3, -(2**31)], [2, 1, 2**31 - 1]], dtype=torch.int32, device=device)
    return {
        "q": torch.from_numpy(rng.standard_normal((6, 3, 40), np.float32)).to(device),
        "scale": 0.2,
        "value_dim": 32,
        "cache": cache,
        "block_tables": within(tables, 1),
        "seq_lens": torch.tensor([192, 150, 999], dtype=torch.int32, device=device),
        "query_start_loc": torch.tensor([0, 2, 4, 6], dtype=torch.int32, device=device),
    }


def kept(given_: dict[str, Any], indices: torch.Tensor) -> torch.Tensor:
    """Slots of the positions that are in a table and in a block of the cache, -1 of the others."""
    b = torch.arange(3).repeat_interleave(2)[:, None]
    seen = (indices >= 0) & (indices < given_["seq_lens"].cpu()[b]) & (indices < 192)
    block = given_["block_tables"].cpu()[b, indices.clamp(0, 191).long() // 64].long()
    return (block * 64 + indices % 64).where(seen & (block >= 0) & (block < 4), -1).int()


def test_blocks_outside_the_cache_and_positions_outside_the_table_are_skipped(device: torch.device) -> None:
    rng = np.random.default_rng(4)
    given_ = damaged(rng, device)
    indices = torch.from_numpy(rng.integers(-9, 1100, (6, 160)).astype(np.int32))
    indices[:, :80] %= 192
    got = kernels.sparse_attention_paged(**given_, indices=indices.to(device))
    want = {name: given_[name].cpu() for name in ("q", "cache")} | {"scale": 0.2, "value_dim": 32, "block_tables": None}
    slots = kept(given_, indices)
    assert (slots < 0).any()
    assert (slots >= 0).any(1).all()
    near(got, kernels.sparse_attention_paged_reference(**want, indices=slots), torch.float32)


@pytest.mark.parametrize("splits", [1, 3])
def test_dense_attention_skips_them_too(device: torch.device, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "choose_splits", lambda *_: (splits, 192 // splits))
    given_ = damaged(np.random.default_rng(4), device)
    got = kernels.sparse_attention_paged(**given_, indices=None)
    want = {name: given_[name].cpu() for name in ("q", "cache")} | {"scale": 0.2, "value_dim": 32, "block_tables": None}
    # A sequence counts as long as its table: its two queries see all but the last position, and all.
    ends = torch.tensor([191, 192, 149, 150, 191, 192])
    slots = kept(given_, torch.arange(192).where(torch.arange(192) < ends[:, None], -1))
    near(got, kernels.sparse_attention_paged_reference(**want, indices=slots), torch.float32)


def test_lengths_and_positions_of_64_bits_do_not_wrap(device: torch.device) -> None:
    rng = np.random.default_rng(4)
    q, kv = (torch.from_numpy(rng.standard_normal(s, np.float32)).to(device) for s in ((2, 2, 16), (40, 16)))
    far = torch.tensor([2**32 + 5, -(2**32) + 5], device=device)
    indices = torch.from_numpy(rng.integers(0, 40, (2, 20)).astype(np.int32)).to(device)
    want = kernels.sparse_attention(q, kv, indices, scale=0.2)
    got = kernels.sparse_attention(q, kv, indices, scale=0.2, topk_length=far)
    assert torch.equal(got[0][0], want[0][0])
    assert not got[0][1].any()
    assert torch.isneginf(got[1][1]).all()
    want = kernels.sparse_attention(q, kv, None, scale=0.2, q_positions=torch.tensor([39, 39], device=device))
    got = kernels.sparse_attention(q, kv, None, scale=0.2, q_positions=far)
    assert torch.equal(got[0][0], want[0][0])
    assert not got[0][1].any()
    batch = tuple(torch.tensor(x, dtype=torch.int32, device=device) for x in ([[0], [0]], [40, 40], [0, 1, 2]))
    assert torch.equal(slots_kernel.slots_of(indices, batch, 1, far)[0], indices[0])
    assert (slots_kernel.slots_of(indices, batch, 1, far)[1] == -1).all()


def test_queries_without_a_sequence_are_refused(device: torch.device) -> None:
    given_ = damaged(np.random.default_rng(4), device)
    given_ |= {"block_tables": given_["block_tables"][:0], "seq_lens": given_["seq_lens"][:0]}
    for indices in (None, torch.zeros((6, 4), dtype=torch.int32, device=device)):
        with pytest.raises(ValueError, match="seq_lens: expected at least one sequence for 6 queries, got none"):
            kernels.sparse_attention_paged(**given_, indices=indices)


def test_more_rows_than_32_bits_number_are_refused() -> None:
    kv = torch.empty((2**31, 1), device="meta")
    with pytest.raises(ValueError, match=r"kv: expected at most 2147479552 rows, which 32 bits number, got 2147483648"):
        kernels.plan(torch.empty((1, 1, 1), device="meta"), Rows.contiguous(kv, 1, None), None, 1.0, None, None, None,
                     None, Target.cuda(90))  # fmt: skip


@pytest.mark.parametrize(("branches", "turned"), [(0, False), (1, False), (2, False), (0, True), (2, True)])
@pytest.mark.parametrize("K", [96, 75])
@pytest.mark.parametrize("R", [0, 16])
def test_how_products_are_shared_out_changes_nothing(
    device: torch.device, branches: int, turned: bool, K: int, R: int
) -> None:
    rng = np.random.default_rng(8)
    shapes = (3, 40, 48 + R), (300, 48 + R)
    q, kv = (torch.from_numpy(rng.standard_normal(s, np.float32)).to(device, torch.bfloat16) for s in shapes)
    indices = torch.from_numpy(rng.integers(-90, 310, (3, K)).astype(np.int32)).to(device)
    indices[2] = -1
    target = Target.of(device)
    rows = Rows.contiguous(kv, 48, None)
    tiles = tiles_for(40, rows, operand_type(q.dtype, kv.dtype, target), True, target)
    tiles = replace(tiles, branches=branches, turned=turned)
    launches = kernels.plan(q, rows, indices, 0.2, None, None, None, None, target, tiles)
    for launch in launches:
        launch.run()
    want = kernels.sparse_attention_reference(q.cpu(), kv.cpu(), indices.cpu(), scale=0.2, value_dim=48)
    near((launches[-1].arguments["out"], launches[-1].arguments["lse"]), want, torch.bfloat16)


def test_a_row_without_keys_is_zero_with_lse_minus_infinity(device: torch.device) -> None:
    q, kv = torch.ones((3, 2, 4), device=device), torch.ones((5, 4), device=device)
    indices = torch.tensor([[-1, 5], [0, -1], [7, 2**31 - 1]], dtype=torch.int32, device=device)
    for sink in (None, torch.zeros(2, device=device)):
        out, lse = kernels.sparse_attention(q, kv, indices, scale=1.0, sink=sink)
        assert out[[0, 2]].tolist() == np.zeros((2, 2, 4)).tolist()
        assert torch.isneginf(lse[[0, 2]]).all()
        assert torch.isfinite(lse[1]).all()
        assert (out[1] > 0).all()


@pytest.mark.parametrize("splits", [1, 3])
def test_what_nobody_chose_leaves_no_trace_and_what_is_chosen_does(
    device: torch.device, splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "choose_splits", lambda *_: (splits, -(-96 // splits)))
    rng = np.random.default_rng(1)
    q, kv = (torch.from_numpy(rng.standard_normal(s, np.float32)).to(device) for s in ((3, 4, 40), (300, 40)))
    indices = torch.from_numpy(rng.permutation(290)[: 3 * 96].reshape(3, 96).astype(np.int32)).to(device)
    clean = kernels.sparse_attention(q, kv, indices, scale=0.2, value_dim=32)
    kv[290:] = torch.nan
    kv[295] = torch.inf
    spoilt = kernels.sparse_attention(q, kv, indices, scale=0.2, value_dim=32)
    assert torch.equal(clean[0], spoilt[0])
    assert torch.equal(clean[1], spoilt[1])
    indices[1, 50] = 290
    spoilt = kernels.sparse_attention(q, kv, indices, scale=0.2, value_dim=32)
    assert torch.isnan(spoilt[0][1]).all()
    assert torch.isnan(spoilt[1][1]).all()
    assert torch.equal(clean[0][[0, 2]], spoilt[0][[0, 2]])


def test_large_logits_neither_overflow_nor_vanish(device: torch.device) -> None:
    q, kv = np.full((1, 1, 2), 1e3, np.float32), np.array([[1e3, 1e3], [1e3, 1e3 - 1], [-1e3, -1e3]], np.float32)
    got = kernels.sparse_attention(torch.from_numpy(q).to(device), torch.from_numpy(kv).to(device), None, scale=1.0)
    want = reference.dense_attention(q, kv[:, None], 1.0)
    np.testing.assert_allclose(got[0].cpu(), want[0], rtol=1e-6)
    np.testing.assert_allclose(got[1].cpu(), want[1], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "fp8"])
@pytest.mark.parametrize("splits", [1, 2])
def test_the_published_sizes(device: torch.device, dtype: str, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "choose_splits", lambda *_: (splits, 128 // splits))
    rng = np.random.default_rng(5)
    latent = torch.from_numpy(rng.standard_normal((256, 576), np.float32))
    cache = latent.to(torch.bfloat16).view(4, 64, 576)
    if dtype == "fp8":
        cache = torch.zeros((4, 64, 656), dtype=torch.uint8)
        ops.write_latent_cache(latent, cache, np.arange(256), value_dim=512)
    indices = torch.from_numpy(rng.permutation(256)[:256].reshape(2, 128).astype(np.int32))
    q = torch.from_numpy(rng.standard_normal((2, 128, 576), np.float32)).to(torch.bfloat16)
    arguments = {"q": q, "indices": indices, "cache": cache, "scale": 576**-0.5, "value_dim": 512}
    arguments["block_tables"] = None
    got = kernels.sparse_attention_paged(**on(device, arguments))
    near(got, kernels.sparse_attention_paged_reference(**arguments), torch.bfloat16)


@few
@given(st.integers(0, 3), st.integers(1, 9), st.integers(1, 5), st.integers(1, 40), st.integers(0, 2**32))
def test_parts_are_put_together(device: torch.device, T: int, splits: int, H: int, D: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    parts = torch.from_numpy(rng.standard_normal((T, splits, H, D), np.float32))
    lse = torch.from_numpy(rng.choice([-np.inf, 0.0, -3.0, 200.0], (T, splits, H)).astype(np.float32))
    parts[lse == -torch.inf] = torch.nan  # not written, hence not to be read
    sink = torch.from_numpy(rng.standard_normal(H, np.float32)) if seed % 2 else None
    launch = split_kernel.plan_merge(
        *(None if x is None else x.to(device) for x in (parts, lse, sink)), dtype=torch.float32
    )
    launch.run()
    got = launch.arguments["out"], launch.arguments["lse"]
    near(got, split_kernel.merge_reference(parts, lse, sink), torch.float32)


@given(st.integers(0, 5000), st.integers(0, 5000), st.sampled_from([16, 32, 64]), st.integers(1, 170))
def test_every_key_is_in_one_part(programs: int, length: int, tile: int, num_sms: int) -> None:
    splits, chunk = split_kernel.choose_splits(programs, length, tile, num_sms)
    assert 1 <= splits <= split_kernel.MOST
    assert chunk % tile == 0
    assert (splits - 1) * chunk < max(length, 1) <= splits * chunk or length == 0


def test_few_queries_are_cut_and_many_are_not() -> None:
    assert split_kernel.choose_splits(2, 2048, 64, 132)[0] >= 16
    assert split_kernel.choose_splits(8192, 2048, 64, 132) == (1, 2048)


@given(
    st.integers(1, 512), st.integers(0, 256), st.integers(1, 128), st.sampled_from([80, 86, 89, 90, 120]), st.booleans()
)
def test_sizes_fit_the_card(C: int, R: int, group: int, capability: int, codes: bool) -> None:
    target = Target.cuda(capability)
    cache = torch.empty((1, 64, C + 4 * -(-C // 128) + 2 * R if codes else C + R), device="meta")
    cache = cache.to(torch.uint8 if codes else torch.bfloat16)
    tiles = tiles_for(group, Rows.pages(cache, C + R, C), torch.bfloat16, True, target)
    assert 16 <= tiles.BH <= 64
    assert 16 <= tiles.BK <= 64
    assert tiles.stages >= 1
    assert tiles.branches == (2 if capability == 90 and group > 32 else 0)
    assert not tiles.turned or (capability == 80 and tiles.BH == 64 and not codes)


def test_rows_too_wide_for_the_card_are_refused() -> None:
    rows = Rows.contiguous(torch.empty((9, 4096), device="meta"), 4096, None)
    with pytest.raises(ValueError, match=r"kv: rows of 4096 numbers do not fit the shared memory of sm_86"):
        tiles_for(1, rows, torch.float32, True, Target.cuda(86))


def test_pages_of_another_layout_are_refused(device: torch.device) -> None:
    cache = torch.zeros((2, 64, 32), device=device).transpose(0, 1)
    with pytest.raises(ValueError, match="cache: expected a contiguous tensor"):
        Rows.pages(cache, 32, 32)


def test_without_fp8_numbers_codes_come_as_bytes(device: torch.device) -> None:
    rng = np.random.default_rng(2)
    latent = torch.from_numpy(rng.standard_normal((128, 144), np.float32))
    cache = torch.zeros((2, 64, 128 + 4 + 32), dtype=torch.uint8)
    ops.write_latent_cache(latent, cache, np.arange(128), value_dim=128)
    q = torch.from_numpy(rng.standard_normal((2, 3, 144), np.float32))
    indices = torch.from_numpy(rng.integers(0, 128, (2, 40)).astype(np.int32))
    rows = Rows.pages(cache.to(device), 144, 128)
    target = replace(Target.of(device), fp8_dot=False)
    launches = kernels.plan(q.to(device), rows, indices.to(device), 0.1, None, None, None, None, target)
    assert launches[0].arguments["kc"].dtype == torch.uint8
    for launch in launches:
        launch.run()
    got = launches[-1].arguments["out"], launches[-1].arguments["lse"]
    given_ = {"q": q, "indices": indices, "scale": 0.1, "value_dim": 128, "cache": cache, "block_tables": None}
    near(got, kernels.sparse_attention_paged_reference(**given_), torch.float32)


def test_every_candidate_of_a_warm_up_gives_the_result(
    device: torch.device, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEEDFUL_CACHE_DIR", str(tmp_path))
    tuning.forget()
    rng = np.random.default_rng(9)
    q, kv = (torch.from_numpy(rng.standard_normal(s, np.float32)).to(device) for s in ((2, 5, 40), (300, 40)))
    indices = torch.from_numpy(rng.integers(-1, 300, (2, 90)).astype(np.int32)).to(device)
    want = kernels.sparse_attention_reference(q, kv, indices, scale=40**-0.5, value_dim=32)
    rows, target = Rows.contiguous(kv, 32, None), Target.of(device)
    candidates = tile_candidates(5, rows, torch.float32, True, target)
    assert candidates[0] == tiles_for(5, rows, torch.float32, True, target)
    for tiles in candidates:
        launches = kernels.plan(q, rows, indices, 40**-0.5, None, None, None, None, target, tiles=tiles)
        for launch in launches:
            launch.run()
        near((launches[-1].arguments["out"], launches[-1].arguments["lse"]), [x.cpu() for x in want], torch.float32)
    best = kernels.warm_up(q, rows, indices)
    launch = kernels.plan(q, rows, indices, 1.0, None, None, None, None, target)[0]
    assert (launch.arguments["BH"], launch.arguments["BK"]) == (best.BH, best.BK)
    tuning.forget()
