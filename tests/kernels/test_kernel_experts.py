"""Routed experts by one kernel, against the reference: any counts, any widths, experts without rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heedful.kernels.experts import experts, experts_reference, tiles_for

ROUNDING = {torch.float32: 0.0, torch.float16: 2**-11, torch.bfloat16: 2**-8}
"""Half a unit in the last place, of silu(gate) * up and of the result; sums are float32."""


def assert_close(got: torch.Tensor, want: torch.Tensor, arguments: tuple[torch.Tensor, ...]) -> None:
    """As close as roundings of what is between allow: products with magnitudes tell how far they carry."""
    x, chosen, gate_up, down = arguments
    gate, up = torch.einsum("nd,nkid->nki", x.double(), gate_up[chosen].double()).chunk(2, dim=-1)
    hidden = torch.nn.functional.silu(gate) * up
    spread = torch.einsum("nki,nkdi->nkd", hidden.abs(), down[chosen].double().abs())
    allowed = ROUNDING[x.dtype] * (spread + want.abs()) + 1e-5 * (1 + spread)
    assert ((got.double() - want).abs() <= allowed).all()


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
    st.sampled_from(list(ROUNDING)),
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
    assert_close(got, want, arguments)


@pytest.mark.parametrize("N", [1, 100, 700])
def test_tiles_of_every_size_hold_all_rows(device: torch.device, N: int) -> None:
    """One expert gets most rows: more tiles than the average has."""
    x, chosen, gate_up, down = draw(device, torch.float16, N, 5, 2, 24, 16, N)
    chosen[:, 0], chosen[:, 1] = 3, torch.where(chosen[:, 1] == 3, 0, chosen[:, 1])
    arguments = x, chosen, gate_up, down
    assert_close(experts(*arguments), experts_reference(*arguments), arguments)


def test_tiles_follow_the_rows_of_an_expert() -> None:
    sizes = [tiles_for(rows, 256, torch.bfloat16, True).BM for rows in (8, 4096, 8192, 16384, 10**6)]
    assert sizes == [16, 16, 32, 64, 128]


def test_rows_that_are_strided_are_read(device: torch.device) -> None:
    x, chosen, gate_up, down = draw(device, torch.float32, 6, 3, 2, 40, 8, 1)
    wide = torch.cat([x, x], 1)[:, :40]
    torch.testing.assert_close(experts(wide, chosen, gate_up, down), experts(x, chosen, gate_up, down))
