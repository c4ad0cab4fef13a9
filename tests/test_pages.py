"""Paged caches: the FP8 codec against torch's, rows that come back, and paged operators against contiguous ones."""

# ruff: noqa: E501 -- the tables of bad calls read best one call a line

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heedful import ops
from heedful.ops import reference

quick = settings(deadline=None, max_examples=50)


def test_every_e4m3_code_has_torchs_value() -> None:
    torch = pytest.importorskip("torch")
    codes = np.arange(256, dtype=np.uint8)
    want = torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy()
    for got in (ops.dequantize_fp8(codes, np.ones(2, np.float32)), reference.e4m3_values()):
        np.testing.assert_array_equal(got.astype(np.float32), want)


def test_codes_of_random_floats_are_torchs() -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    # All exponents from far below the subnormals up, and every tie between two codes. The scale is made 1 by a last 448.
    ladder = reference.e4m3_values()[:127].astype(np.float32)
    ties = (ladder[1:] + ladder[:-1]) / 2
    floats = rng.standard_normal(100_000) * 2.0 ** rng.integers(-14, 8, 100_000)
    x = np.concatenate([ties, -ties, ladder, np.clip(floats, -448, 448)]).astype(np.float32)
    x = np.append(x, np.float32(448))
    codes, scales = ops.quantize_fp8(x, group_size=len(x))
    assert scales.tolist() == [1.0]
    want = torch.from_numpy(x).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    np.testing.assert_array_equal(codes, want)
    np.testing.assert_array_equal(reference.e4m3_codes(x), want)


@quick
@given(st.integers(0, 5), st.integers(1, 300), st.integers(1, 200), st.floats(1e-6, 1e6), st.integers(0, 2**32))
def test_quantisation_equals_the_reference(N: int, D: int, group: int, size: float, seed: int) -> None:
    x = (np.random.default_rng(seed).standard_normal((N, D)) * size).astype(np.float32)
    codes, scales = ops.quantize_fp8(x, group_size=group)
    want_codes, want_scales = ops.quantize_fp8(x, group_size=group, backend="reference")
    np.testing.assert_array_equal(codes, want_codes)
    np.testing.assert_array_equal(scales, want_scales)
    back = ops.dequantize_fp8(codes, scales, group_size=group)
    np.testing.assert_allclose(back, reference.dequantize_fp8(codes, scales, group), rtol=1e-6)
    # Half a step of 3 mantissa bits, or half the smallest step at the group's scale.
    step = np.repeat(scales, group, axis=1)[:, :D] / 1024
    assert (np.abs(back - x) <= np.maximum(np.abs(x) / 16, step) * 1.001).all()


def test_special_values_do_not_spoil_their_group() -> None:
    x = np.array([[1.0, np.nan, np.inf, -np.inf, -2.0, 0.0]], np.float32)
    codes, scales = ops.quantize_fp8(x)
    assert scales.tolist() == [[np.float32(2.0) / np.float32(448)]]
    np.testing.assert_allclose(ops.dequantize_fp8(codes, scales)[0], [1.0, np.nan, 2.0, -2.0, -2.0, 0.0], rtol=0.04)


@quick
@given(st.integers(0, 5), st.integers(0, 200), st.floats(1e-6, 1e6), st.integers(0, 2**32))
def test_int8_codes_equal_the_reference(N: int, D: int, size: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((N, D)) * size).astype(np.float32)
    x[rng.random((N, D)) < 0.01] = rng.choice([np.inf, -np.inf, np.nan])
    codes, scales = ops.quantize_int8(x)
    want_codes, want_scales = ops.quantize_int8(x, backend="reference")
    np.testing.assert_array_equal(scales, want_scales)
    np.testing.assert_array_equal(codes, want_codes)
    finite = np.isfinite(x) & np.isfinite(scales)[:, None]
    step = np.broadcast_to(scales[:, None], x.shape)
    assert (np.abs(codes * step - x)[finite] <= step[finite] * 0.5001).all()


def empty_cache(kind: str, blocks: int, dim: int, value_dim: int | None) -> Any:
    if kind == "fp8" and value_dim is not None:
        row = value_dim + 4 * -(-value_dim // 128) + 2 * (dim - value_dim)
        return np.zeros((blocks, 64, row), np.uint8)
    if kind in ("fp8", "int8"):
        return np.zeros((blocks, 64 * (dim + 4)), np.uint8 if kind == "fp8" else np.int8)
    return np.zeros((blocks, 64, dim), np.float32)


@quick
@given(
    st.sampled_from(["float32", "fp8"]),
    st.integers(1, 260),
    st.integers(0, 70),
    st.lists(st.integers(-1, 191), unique_by=lambda s: s if s >= 0 else object(), max_size=40),
    st.integers(0, 2**32),
)
def test_latent_rows_come_back_from_their_slots(kind: str, C: int, R: int, slots: list[int], seed: int) -> None:
    rows = np.random.default_rng(seed).standard_normal((len(slots), C + R), np.float32)
    cache = empty_cache(kind, 3, C + R, C)
    ops.write_latent_cache(rows, cache, slots, value_dim=C)
    want = np.zeros((192, C + R))
    for row, slot in zip(rows, slots, strict=True):
        if slot >= 0:
            want[slot] = row
    everything = np.arange(192)
    got = ops.read_latent_cache(cache, everything, value_dim=C, rope_dim=R)
    np.testing.assert_allclose(got, reference.read_latent_cache(cache, everything, C), rtol=1e-6)
    if kind == "float32":
        np.testing.assert_array_equal(got, want)
    else:
        codes, scales = reference.quantize_fp8(want[:, :C])
        np.testing.assert_allclose(got[:, :C], reference.dequantize_fp8(codes, scales), rtol=1e-6)
        np.testing.assert_allclose(got[:, C:], want[:, C:], rtol=2**-8)  # bfloat16


@quick
@given(
    st.sampled_from(["float32", "fp8", "int8"]),
    st.integers(1, 128),
    st.lists(st.integers(0, 127), unique=True, max_size=40),
    st.integers(0, 2**32),
)
def test_index_keys_come_back_from_their_slots(kind: str, Di: int, slots: list[int], seed: int) -> None:
    keys = np.random.default_rng(seed).standard_normal((len(slots), Di), np.float32)
    cache = empty_cache(kind, 2, Di, None)
    ops.write_index_cache(keys, cache, slots)
    got = ops.read_index_cache(cache, slots, dim=Di)
    np.testing.assert_allclose(got, reference.read_index_cache(cache, np.array(slots, int), Di), rtol=1e-6)
    if kind == "int8":
        codes, scales = reference.quantize_int8(keys)
        want = codes * scales[:, None]
    else:
        codes, scales = reference.quantize_fp8(keys)
        want = keys if kind == "float32" else reference.dequantize_fp8(codes, scales)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    untouched = np.setdiff1d(np.arange(128), slots)
    assert not ops.read_index_cache(cache, untouched, dim=Di).any()


def test_published_byte_layouts() -> None:
    """656 bytes a latent row (512 codes, 4 scales, 64 bfloat16) and 132 an index key, scales after all codes."""
    rng = np.random.default_rng(1)
    latent, key = rng.standard_normal((1, 576), np.float32), rng.standard_normal((1, 128), np.float32)
    cache = np.zeros((2, 64, 656), np.uint8)
    ops.write_latent_cache(latent, cache, [64 + 5], value_dim=512)
    row = cache[1, 5]
    codes, scales = reference.quantize_fp8(latent[:, :512])
    np.testing.assert_array_equal(row[:512], codes[0])
    np.testing.assert_array_equal(row[512:528].view("<f4"), scales[0])
    high = row[528:].view("<u2").astype(np.uint32) << 16
    np.testing.assert_allclose(high.view(np.float32), latent[0, 512:], rtol=2**-8)
    pages = np.zeros((2, 64, 132), np.uint8)
    ops.write_index_cache(key, pages, [64 + 5])
    page = pages[1].reshape(-1)
    codes, scales = reference.quantize_fp8(key)
    np.testing.assert_array_equal(page[5 * 128 : 6 * 128], codes[0])
    np.testing.assert_array_equal(page[64 * 128 :].view("<f4")[5], scales[0, 0])
    assert np.count_nonzero(page[64 * 128 :].view("<f4")) == 1


class Batch:
    """A ragged batch: sequences of (queries, earlier keys), their pages in random order, tables padded with -1."""

    def __init__(self, shape: list[tuple[int, int]], seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.counts = [n for n, _ in shape]
        self.lens = np.array([n + before for n, before in shape], np.int32)
        pages = -(-self.lens // 64)
        self.blocks = int(pages.sum()) + 2
        order = rng.permutation(self.blocks)
        self.tables = np.full((len(shape), int(pages.max(initial=0)) + 1), -1, np.int32)
        for b, n in enumerate(pages):
            self.tables[b, :n], order = order[:n], order[n:]
        self.starts = np.cumsum([0, *self.counts]).astype(np.int32)
        self.N = int(self.starts[-1])
        self.arguments = {"block_tables": self.tables, "seq_lens": self.lens, "query_start_loc": self.starts}
        self.parts = list(reference.sequences(self.tables, self.lens, self.starts))


BATCHES = st.lists(st.tuples(st.integers(0, 4), st.sampled_from([0, 1, 59, 60, 64, 127, 200])), max_size=5)


@quick
@given(BATCHES, st.sampled_from(["float32", "fp8"]), st.integers(0, 2**32))
def test_paged_attention_is_contiguous_attention_of_each_sequence(
    shape: list[tuple[int, int]], kind: str, seed: int
) -> None:
    batch, rng = Batch(shape, seed), np.random.default_rng(seed)
    C, R, H, K = 150, 10, 3, 40
    cache = empty_cache(kind, batch.blocks, C + R, C)
    ops.write_latent_cache(
        rng.standard_normal((64 * batch.blocks, C + R), np.float32),
        cache,
        range(64 * batch.blocks),
        value_dim=C,
    )
    q = rng.standard_normal((batch.N, H, C + R), np.float32)
    indices = rng.integers(-1, 220, (batch.N, K)).astype(np.int32)
    options = {"scale": 0.1, "value_dim": C, "sink": rng.standard_normal(H).astype(np.float32)}
    sparse = ops.sparse_attention_paged(q, indices, cache=cache, **batch.arguments, **options)
    dense = ops.dense_attention_paged(q, cache=cache, **batch.arguments, **options)
    for rows, slots in batch.parts:
        kv = ops.read_latent_cache(cache, slots, value_dim=C, rope_dim=R)
        pairs = [
            (sparse, ops.sparse_attention(q[rows], kv, indices[rows], **options)),
            (dense, ops.dense_attention(q[rows], kv, **options)),
        ]
        for paged, contiguous in pairs:
            np.testing.assert_array_equal(paged[0][rows], contiguous[0])
            np.testing.assert_array_equal(paged[1][rows], contiguous[1])
    for got, name in ((sparse, "sparse"), (dense, "dense")):
        chosen = (indices,) if name == "sparse" else ()
        operator = getattr(ops, f"{name}_attention_paged")
        want = operator(q, *chosen, cache=cache, **batch.arguments, **options, backend="reference")
        np.testing.assert_allclose(got[0], want[0], atol=1e-5)
        np.testing.assert_allclose(got[1], want[1], rtol=1e-5, atol=1e-5)


@quick
@given(
    BATCHES,
    st.sampled_from(["float32", "fp8", "int8"]),
    st.sampled_from([np.float32, np.int8]),
    st.integers(1, 300),
    st.integers(0, 2**32),
)
def test_paged_selection_is_contiguous_selection_of_each_sequence(
    shape: list[tuple[int, int]], kind: str, query: type, k: int, seed: int
) -> None:
    batch, rng = Batch(shape, seed), np.random.default_rng(seed)
    Hi, Di = 5, 24
    cache = empty_cache(kind, batch.blocks, Di, None)
    ops.write_index_cache(
        rng.integers(-2, 3, (64 * batch.blocks, Di)).astype(np.float32), cache, range(64 * batch.blocks)
    )
    q = rng.integers(-2, 3, (batch.N, Hi, Di)).astype(query)
    weights = rng.integers(-2, 3, (batch.N, Hi)).astype(np.float32)
    scores = ops.index_scores_paged(q, weights, cache=cache, **batch.arguments)
    chosen = ops.index_top_k_paged(q, weights, k, cache=cache, **batch.arguments)
    assert scores.shape == (batch.N, batch.lens.max(initial=0))
    np.testing.assert_array_equal(chosen, ops.top_k(scores, k))
    for rows, slots in batch.parts:
        assert np.isneginf(scores[rows, len(slots) :]).all()
        if kind != "float32":  # the codes and the scale apart, as the pages hold them
            pages = cache.reshape(batch.blocks, -1)
            codes = pages[:, : 64 * Di].reshape(-1, Di)[slots]
            scale = np.ascontiguousarray(pages[:, 64 * Di :]).view("<f4").reshape(-1)[slots]
            values = codes if kind == "int8" else reference.e4m3_values()[codes].astype(np.float32)
            keys = {"k": values, "k_scale": scale}
        else:
            keys = {"k": ops.read_index_cache(cache, slots, dim=Di)}
        alone = ops.index_scores(q[rows], weights=weights[rows], **keys)
        np.testing.assert_array_equal(scores[rows, : len(slots)], alone)
    want = ops.index_scores_paged(q, weights, cache=cache, **batch.arguments, backend="reference")
    np.testing.assert_allclose(scores, want, rtol=1e-5, atol=1e-5)
    if kind == "float32":
        reference_choice = ops.index_top_k_paged(q, weights, k, cache=cache, **batch.arguments, backend="reference")
        np.testing.assert_array_equal(chosen, reference_choice)


def paged_call(**changes: Any) -> Any:
    """A sound call, but for `changes`."""
    arguments: dict[str, Any] = {
        "cache": np.zeros((3, 64, 8), np.float32),
        "block_tables": np.array([[1, -1], [2, 0]], np.int32),
        "seq_lens": np.array([64, 100], np.int32),
        "query_start_loc": np.array([0, 1, 3], np.int32),
        "scale": 1.0,
        "value_dim": 6,
    }
    return ops.dense_attention_paged(np.ones((3, 2, 8), np.float32), **(arguments | changes))


def test_the_sound_call_is_sound() -> None:
    assert paged_call()[0].shape == (3, 2, 6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_tables": [[1, -1], [2]]}, "block_tables: expected integers [B, M], got a ragged sequence"),
        ({"block_tables": [[1.0, -1.0], [2.0, 0.0]]}, "block_tables: expected int32 or int64 [B, M], got float64 [2, 2]"),
        ({"block_tables": np.array([[3, -1], [2, 0]])}, "block_tables: expected a block from 0 to 3 - 1 in entry 0 of sequence 0"),
        ({"block_tables": np.array([[1, -1], [2, -1]])}, "block_tables: expected a block from 0 to 3 - 1 in entry 1 of sequence 1"),
        ({"seq_lens": np.array([64, 129])}, "seq_lens: expected 2 (queries) to 128 (block table) keys for sequence 1, got 129"),
        ({"seq_lens": np.array([0, 100])}, "seq_lens: expected 1 (queries) to 128 (block table) keys for sequence 0, got 0"),
        ({"seq_lens": np.array([-5, 100])}, "seq_lens: expected 1 (queries)"),
        ({"seq_lens": np.array([64, 2**40])}, "seq_lens: expected values that fit int32"),
        ({"seq_lens": np.array([64])}, "seq_lens: expected int32 or int64 [B=2], got int64 [1]"),
        ({"query_start_loc": np.array([0, 1, 4])}, "query_start_loc: expected rising values from 0 to 3"),
        ({"query_start_loc": np.array([1, 1, 3])}, "query_start_loc: expected rising values from 0 to 3"),
        ({"query_start_loc": np.array([0, 4, 3])}, "query_start_loc: expected rising values from 0 to 3"),
        ({"query_start_loc": np.array([0, 3])}, "query_start_loc: expected int32 or int64 [B+1=3], got int64 [2]"),
        ({"cache": np.zeros((3, 64, 7), np.float32)}, "cache: expected float32 or bfloat16 or uint8 [num_blocks, 64, 8], got float32 [3, 64, 7]"),
        ({"cache": np.zeros((3, 32, 8), np.float32)}, "cache: expected"),
        ({"cache": np.zeros((3, 64, 8))}, "cache: expected"),
        ({"cache": np.zeros((3, 64, 8), np.uint8)}, "cache: expected float32 or bfloat16 or uint8 [num_blocks, 64, 14]"),
        ({"cache": np.zeros((3, 64, 16), np.float32)[:, :, ::2]}, "cache: expected a C-contiguous array"),
        ({"value_dim": 9}, "value_dim: expected an integer from 1 to 8, got 9"),
        ({"value_dim": 0}, "value_dim: expected an integer from 1 to 8, got 0"),
        ({"scale": float("nan")}, "scale: expected a finite number, got nan"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_bad_batches_are_refused_by_name(changes: dict[str, Any], message: str, backend: str) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        paged_call(**changes, backend=backend)
    assert message in str(raised.value)


def test_a_sink_of_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="sink: expected numbers, got NaN"):
        paged_call(sink=np.array([0, np.nan], np.float32))


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ([0, 128], "slot_mapping: expected -1 or a slot below 128, got 128"),
        ([0, -2], "slot_mapping: expected -1 or a slot below 128, got -2"),
        ([7, 7], "slot_mapping: expected each slot once, got slot 7 for rows 0 and 1"),
        ([7], "slot_mapping: expected int32 or int64 [N=2], got int64 [1]"),
    ],
)
def test_bad_slots_are_refused_and_nothing_is_written(slots: list[int], message: str) -> None:
    cache = np.zeros((2, 64, 4), np.float32)
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        ops.write_index_cache(np.ones((2, 4), np.float32), cache, slots)
    assert message in str(raised.value)
    assert not cache.any()


def test_a_read_only_cache_is_refused() -> None:
    cache = np.zeros((2, 64, 4), np.float32)
    cache.flags.writeable = False
    with pytest.raises(ValueError, match=r"cache: .*not writeable"):
        ops.write_index_cache(np.ones((1, 4), np.float32), cache, [0])


def test_int8_is_no_format_of_latent_rows() -> None:
    with pytest.raises(ValueError, match="cache: expected float32 or bfloat16 or uint8"):
        ops.write_latent_cache(np.ones((1, 4), np.float32), np.zeros((1, 64, 8), np.int8), [0], value_dim=4)


@pytest.mark.parametrize("slot", [-1, 128])
def test_reading_outside_the_cache_is_refused(slot: int) -> None:
    with pytest.raises(ValueError, match="slots: expected slots from 0 to 128 - 1"):
        ops.read_index_cache(np.zeros((2, 64, 4), np.float32), [slot], dim=4)
