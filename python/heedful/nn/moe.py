"""Mixture of experts with DeepSeek's routing without an auxiliary loss ("noaux_tc").

Experts are chosen by sigmoid score plus a learned bias, within the best groups; they are weighed by the score alone.
DeepSeek-V3 report, section 2.1.2.
"""

import importlib.util
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from heedful.nn.mlp import MLP

TOKENS_AT_A_TIME = 1024
"""Whose experts' results are summed together."""

HAS_TRITON = importlib.util.find_spec("triton") is not None


class Routing(NamedTuple):
    """Which experts a token goes to."""

    experts: torch.Tensor
    """[N, top_k] int64."""
    weights: torch.Tensor
    """[N, top_k] float32."""


class Router(nn.Module):
    """Chooses experts for each token.

    Args:
        hidden_size: D.
        n_experts: E, a multiple of n_group.
        top_k: experts a token goes to.
        n_group: groups the experts are divided into.
        topk_group: groups a token may choose from.
        norm_topk_prob: divide the chosen weights by their sum.
        routed_scaling_factor: multiplies the weights at last.
    """

    e_score_correction_bias: torch.Tensor

    def __init__(
        self,
        *,
        hidden_size: int,
        n_experts: int,
        top_k: int,
        n_group: int = 1,
        topk_group: int = 1,
        norm_topk_prob: bool = True,
        routed_scaling_factor: float = 1.0,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_experts, hidden_size))
        nn.init.normal_(self.weight, std=hidden_size**-0.5)
        self.register_buffer("e_score_correction_bias", torch.zeros(n_experts))
        self.top_k = top_k
        self.n_group = n_group
        self.topk_group = topk_group
        self.norm_topk_prob = norm_topk_prob
        self.routed_scaling_factor = routed_scaling_factor

    def forward(self, x: torch.Tensor) -> Routing:
        """x [N, D] -> experts and their weights, [N, top_k] each."""
        scores = F.linear(x.float(), self.weight.float()).sigmoid()  # [N, E]
        choice = scores + self.e_score_correction_bias
        if self.topk_group < self.n_group:
            grouped = choice.unflatten(-1, (self.n_group, -1))
            group_score = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
            kept = torch.zeros_like(group_score, dtype=torch.bool)
            kept.scatter_(-1, group_score.topk(self.topk_group, dim=-1).indices, True)
            choice = grouped.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(-2)
        experts = choice.topk(self.top_k, dim=-1).indices
        weights = scores.gather(-1, experts)
        if self.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return Routing(experts, weights * self.routed_scaling_factor)


class Experts(nn.Module):
    """The routed experts, their weights packed in two tensors (gate above up).

    Args:
        hidden_size: D.
        intermediate_size: I of one expert.
        n_experts: E.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, n_experts: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(n_experts, 2 * intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(n_experts, hidden_size, intermediate_size))
        nn.init.normal_(self.gate_up_proj, std=hidden_size**-0.5)
        nn.init.normal_(self.down_proj, std=intermediate_size**-0.5)

    def forward(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """x [N, D] -> the weighed sum of each token's experts [N, D], summed in float32."""
        if x.device.type != "cuda" or torch.is_grad_enabled():
            return self._by_expert(x, routing)
        if self._can_group(x):
            return self._grouped(x, routing)
        return self._by_kernel(x, routing) if HAS_TRITON else self._by_expert(x, routing)

    def _can_group(self, x: torch.Tensor) -> bool:
        """Whether one kernel multiplies all experts' groups: bfloat16 rows of whole 16 bytes, on Hopper and Blackwell.

        Elsewhere torch's grouped product is a loop that waits for the device.
        """
        aligned = all(size % 8 == 0 for size in (*self.gate_up_proj.shape[1:], *self.down_proj.shape[1:]))
        served = torch.version.hip is None and torch.cuda.get_device_capability(x.device)[0] in (9, 10)
        return x.dtype == torch.bfloat16 and aligned and served and hasattr(F, "grouped_mm")

    def _grouped(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """All experts in two grouped products. It does not wait for the device, so that a CUDA graph can hold it."""
        top_k = routing.experts.shape[-1]
        chosen = routing.experts.flatten()
        order = chosen.argsort(stable=True)
        counts = torch.zeros(len(self.gate_up_proj), dtype=torch.int32, device=x.device)
        counts.scatter_add_(0, chosen, torch.ones_like(chosen, dtype=torch.int32))
        ends = counts.cumsum(0).to(torch.int32)
        gate, up = F.grouped_mm(x[order // top_k], self.gate_up_proj.transpose(-2, -1), offs=ends).chunk(2, dim=-1)
        y = F.grouped_mm(F.silu(gate) * up, self.down_proj.transpose(-2, -1), offs=ends)
        # Each row to its place, then a sum in a fixed order: atomic additions would not repeat.
        placed = torch.empty_like(y)
        placed[order] = y
        return _weighed(placed, routing).to(x.dtype)

    def _by_kernel(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """All experts in two launches of a Triton kernel, on any GPU. It does not wait for the device either."""
        from heedful.kernels.experts import experts

        return _weighed(experts(x, routing.experts, self.gate_up_proj, self.down_proj), routing).to(x.dtype)

    def _by_expert(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """Tokens grouped by expert: each expert that is hit runs two matrix products and the others cost nothing.

        Differentiable. On a GPU it waits for the counts."""
        top_k = routing.experts.shape[-1]
        order = routing.experts.flatten().argsort(stable=True)
        counts = routing.experts.flatten().bincount(minlength=self.gate_up_proj.shape[0]).tolist()
        out = torch.zeros_like(x, dtype=torch.float32)
        start = 0
        for expert, count in enumerate(counts):
            if count == 0:
                continue
            slots = order[start : start + count]
            start += count
            tokens = slots // top_k
            gate, up = F.linear(x[tokens], self.gate_up_proj[expert]).chunk(2, dim=-1)
            y = F.linear(F.silu(gate) * up, self.down_proj[expert])
            out = out.index_add(0, tokens, y * routing.weights.flatten()[slots, None])
        return out.to(x.dtype)


def _weighed(y: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Experts' results [N * top_k, D] -> the weighed sum of each token's [N, D] float32, some tokens at a time: a long
    prompt's results in float32 would take as much memory as the rest of the layer."""
    y = y.view(*routing.experts.shape, -1)
    parts = zip(y.split(TOKENS_AT_A_TIME), routing.weights.split(TOKENS_AT_A_TIME), strict=True)
    return torch.cat([(part * weights[..., None]).sum(1) for part, weights in parts])


class MoE(nn.Module):
    """Routed experts plus the shared ones that every token goes through.

    Args:
        hidden_size: D.
        intermediate_size: I of one expert; the shared block is n_shared_experts times as wide.
        n_experts: E.
        n_shared_experts: number of experts in the shared block.
        router: see `Router`.
    """

    def __init__(
        self, *, hidden_size: int, intermediate_size: int, n_experts: int, n_shared_experts: int, router: Router
    ) -> None:
        super().__init__()
        self.gate = router
        self.experts = Experts(hidden_size, intermediate_size, n_experts)
        self.shared_experts = MLP(hidden_size, intermediate_size * n_shared_experts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., D] -> [..., D]."""
        flat = x.flatten(0, -2)
        return self.experts(flat, self.gate(flat)).view_as(x) + self.shared_experts(x)
