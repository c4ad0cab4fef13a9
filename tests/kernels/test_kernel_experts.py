"""Routed experts by one kernel, against the reference: any counts, any widths, experts without rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heedful.kernels.experts import experts, experts_reference, tiles_for

TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def draw(
    device: torch.device, dtype: torch.dtype, N: int, E: int, top_k: int, D: int, inner: int, seed: int
) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    x, gate_up, down = (
        torch.randn(shape, generator=generator) / shape[-1] ** 0.5
        for shape in ((N, D), (E, 2 * inner, D), (E, D, inner))
    )
    # Some experts are far more likely than others.
    likely = torch.rand((N, E), generator=generator) * torch.linspace(0.1, 1, E)
    chosen = likely.topk(top_k, dim=-1).indices
    return tuple(t.to(device) for t in ((5 * x).to(dtype), chosen, gate_up.to(dtype), down.to(dtype)))


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(list(TOLERANCES)),
    st.integers(0, 40),
    st.integers(1, 9),
    st.integers(1, 4),
    st.integers(1, 80),
    st.integers(1, 140),
    st.integers(0, 2**32),
)
def test_it_is_the_reference(
    device: torch.device, dtype: torch.dtype, N: int, E: int, top_k: int, D: int, inner: int, seed: int
) -> None:
    arguments = draw(device, dtype, N, E, min(top_k, E), D, inner, seed)
    got, want = experts(*arguments), experts_reference(*arguments)
    assert (got.dtype, got.shape) == (dtype, want.shape)
    torch.testing.assert_close(got.double(), want, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


@pytest.mark.parametrize("N", [1, 100, 700])
def test_tiles_of_every_size_hold_all_rows(device: torch.device, N: int) -> None:
    """One expert gets most rows: more tiles than the average has."""
    x, chosen, gate_up, down = draw(device, torch.float16, N, 5, 2, 24, 16, N)
    chosen[:, 0], chosen[:, 1] = 3, torch.where(chosen[:, 1] == 3, 0, chosen[:, 1])
    want = experts_reference(x, chosen, gate_up, down)
    torch.testing.assert_close(experts(x, chosen, gate_up, down).double(), want, rtol=4e-3, atol=4e-3)


def test_tiles_follow_the_rows_of_an_expert() -> None:
    sizes = [tiles_for(rows, 256, torch.bfloat16, True).BM for rows in (8, 4096, 8192, 16384, 10**6)]
    assert sizes == [16, 16, 32, 64, 128]


def test_rows_that_are_strided_are_read(device: torch.device) -> None:
    x, chosen, gate_up, down = draw(device, torch.float32, 6, 3, 2, 40, 8, 1)
    wide = torch.cat([x, x], 1)[:, :40]
    torch.testing.assert_close(experts(wide, chosen, gate_up, down), experts(x, chosen, gate_up, down))
