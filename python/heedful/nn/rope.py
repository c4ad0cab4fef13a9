"""Rotary position embedding with YaRN, in the two layouts DSA models mix.

The main attention rotates interleaved pairs (2i, 2i+1); the indexer of DeepSeek-V3.2 rotates half-split pairs
(i, i + R/2), that of GLM-5 interleaved ones. Getting the indexer's layout wrong raises no error and silently
spoils the selection. Frequencies: YaRN, arXiv 2309.00071; the correction range as in the public DeepSeek
reference code.
"""

import math

import torch
from torch import nn

from heedful.config import RopeConfig

Rope = tuple[torch.Tensor, torch.Tensor]
"""cos and sin, each [..., R / 2] float32."""


def rope_frequencies(rope: RopeConfig, dim: int) -> tuple[torch.Tensor, float]:
    """Angular frequency of each rotated pair, and the factor that cos and sin are multiplied by.

    Args:
        rope: the model's RoPE settings.
        dim: R, the number of rotated dimensions (even).

    Returns:
        inv_freq [R / 2] float32 and the attention factor (1 when mscale equals mscale_all_dim).
    """
    period = rope.theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if rope.type == "default":
        return 1.0 / period, 1.0
    low, high = _yarn_correction_range(rope, dim)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    inv_freq = ramp / (rope.factor * period) + (1 - ramp) / period
    return inv_freq, _yarn_attention_factor(rope)


def _yarn_correction_range(rope: RopeConfig, dim: int) -> tuple[float, float]:
    """First and last pair of the ramp between kept and stretched frequencies."""

    def pair_that_turns(rotations: float) -> float:
        original = rope.original_max_position_embeddings
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    return low, high + 0.001 if low == high else high


def _yarn_attention_factor(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return yarn_mscale(rope.factor, rope.mscale) / yarn_mscale(rope.factor, rope.mscale_all_dim)
    return yarn_mscale(rope.factor, 1.0)


def yarn_mscale(factor: float, mscale: float) -> float:
    """m = 0.1 * mscale * ln(factor) + 1: how YaRN sharpens attention for a context stretched by `factor`."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


class RotaryEmbedding(nn.Module):
    """cos and sin for a set of positions.

    Args:
        rope: the model's RoPE settings.
        dim: R, the number of rotated dimensions.
    """

    inv_freq: torch.Tensor

    def __init__(self, rope: RopeConfig, dim: int) -> None:
        super().__init__()
        inv_freq, self.attention_factor = rope_frequencies(rope, dim)
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def forward(self, positions: torch.Tensor) -> Rope:
        """positions [...] of any integer dtype -> cos, sin [..., R / 2] float32."""
        angle = positions[..., None].float() * self.inv_freq
        return angle.cos() * self.attention_factor, angle.sin() * self.attention_factor


def apply_rope(x: torch.Tensor, rope: Rope, *, interleaved: bool) -> torch.Tensor:
    """Rotates the first R dimensions of x; the rest passes through. Computed in float32 or wider, rounded once.

    Args:
        x: [..., heads, width] with width >= R.
        rope: cos and sin [..., R / 2], without the heads dimension.
        interleaved: pairs (2i, 2i+1) when true, (i, i + R/2) when false.

    Returns:
        A tensor of x's shape and dtype. The layout of the pairs is kept.
    """
    cos, sin = (part.unsqueeze(-2) for part in rope)  # float32: products of x with them are at least that wide
    dim = 2 * cos.shape[-1]
    rotated, passed = x[..., :dim], x[..., dim:]
    if interleaved:
        a, b = rotated[..., 0::2], rotated[..., 1::2]
        rotated = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = rotated.chunk(2, dim=-1)
        rotated = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    rotated = rotated.to(x.dtype)
    return torch.cat((rotated, passed), dim=-1) if passed.shape[-1] else rotated
