"""The layers against transformers' own, and the two forms of MLA against each other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
from heedful.config import ModelConfig, RopeConfig
from heedful.models import DSAForCausalLM, load_model
from heedful.nn import FullSequenceAttention, MoE, RotaryEmbedding, Router, apply_rope
from heedful.nn import moe as moe_module
from heedful.nn.attention import select, selection_mask


@pytest.fixture(scope="module", params=sorted(oracle.CONFIGS))
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[object, DSAForCausalLM]:
    directory = tmp_path_factory.mktemp(request.param)
    theirs = oracle.save(request.param, directory)
    config = ModelConfig.from_file(directory)
    return theirs, load_model(directory, config, torch.float32, torch.device("cpu"))


def tokens(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 199, (1, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_full_sequence_sparse_attention_gives_transformers_logits(models: tuple[object, DSAForCausalLM]) -> None:
    theirs, ours = models
    ids = tokens(120)
    attention = FullSequenceAttention("sparse", index_topk=ours.config.index_topk)
    logits = ours(ids, torch.arange(120)[None], attention)
    torch.testing.assert_close(logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)  # type: ignore[operator]


@torch.no_grad()
def test_dense_and_sparse_agree_while_everything_is_selected(models: tuple[object, DSAForCausalLM]) -> None:
    _, ours = models
    ids, positions = tokens(24), torch.arange(24)[None]
    dense = ours(ids, positions, FullSequenceAttention("dense"))
    sparse = ours(ids, positions, FullSequenceAttention("sparse", index_topk=24))
    torch.testing.assert_close(dense, sparse, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_absorbed_and_expanded_forms_of_mla_give_the_same_values(models: tuple[object, DSAForCausalLM]) -> None:
    mla = models[1].model.layers[0].self_attn
    x = torch.randn(1, 40, 64, generator=torch.Generator().manual_seed(1))
    rope = models[1].model.rotary_emb(torch.arange(40)[None])
    projection = mla.project(x, rope)
    expanded, _ = FullSequenceAttention("dense")(0, mla, projection, None, None)
    rows = torch.cat((projection.latent, projection.k_pe), dim=-1)
    logits = torch.einsum("bthd,bsd->bhts", mla.absorb_query(projection), rows) * mla.scale
    logits = logits.masked_fill(torch.ones(40, 40).triu(1).bool(), float("-inf"))
    attended = torch.einsum("bhts,bsc->bthc", logits.softmax(-1), projection.latent)
    torch.testing.assert_close(mla.expand_value(attended), expanded, rtol=1e-4, atol=1e-5)


def test_the_language_model_loss_reaches_everything_but_the_indexer(models: tuple[object, DSAForCausalLM]) -> None:
    ours = models[1]
    ours.requires_grad_(True)
    try:
        attention = FullSequenceAttention("sparse", index_topk=8)
        ours(tokens(40), torch.arange(40)[None], attention).logsumexp(-1).sum().backward()
        for name, parameter in ours.named_parameters():
            assert (parameter.grad is None) == ("indexer" in name), name
    finally:
        ours.zero_grad(set_to_none=True)
        ours.requires_grad_(False)


@given(shift=st.integers(0, 5000), interleaved=st.booleans(), yarn=st.booleans())
def test_rope_makes_dot_products_depend_on_distance_alone(shift: int, interleaved: bool, yarn: bool) -> None:
    settings = {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64} if yarn else {}
    embedding = RotaryEmbedding(RopeConfig(theta=10000.0, **settings), 8)  # type: ignore[arg-type]
    q, k = torch.randn(2, 1, 1, 12, generator=torch.Generator().manual_seed(3)).double()

    def dot(query_position: int, key_position: int) -> torch.Tensor:
        embedding.inv_freq = embedding.inv_freq.double()
        rotated = [
            apply_rope(x, embedding(torch.tensor([position])), interleaved=interleaved)
            for x, position in ((q, query_position), (k, key_position))
        ]
        return (rotated[0] * rotated[1]).sum()

    torch.testing.assert_close(dot(40 + shift, 3 + shift), dot(40, 3), rtol=2e-3, atol=2e-3)


@given(position=st.integers(0, 200_000), interleaved=st.booleans(), seed=st.integers(0, 99))
def test_rope_of_bfloat16_is_rounded_once(position: int, interleaved: bool, seed: int) -> None:
    """As in the reference code: cos and sin keep float32, and only the result is rounded."""
    x = torch.randn(1, 2, 12, generator=torch.Generator().manual_seed(seed)).bfloat16()
    rope = RotaryEmbedding(RopeConfig(theta=10000.0), 8)(torch.tensor([position]))
    actual = apply_rope(x, rope, interleaved=interleaved)
    exact = apply_rope(x.double(), tuple(part.double() for part in rope), interleaved=interleaved)  # type: ignore[arg-type]
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.double(), exact, rtol=2**-8 * 1.001, atol=1e-7)


def test_experts_are_summed_in_float32() -> None:
    torch.manual_seed(0)
    router = Router(hidden_size=64, n_experts=16, top_k=16)
    moe = MoE(hidden_size=64, intermediate_size=32, n_experts=16, n_shared_experts=1, router=router).bfloat16()
    x = torch.randn(50, 64).bfloat16()
    with torch.no_grad():
        routing = moe.gate(x)
        exact = sum(
            torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, moe.experts.down_proj[expert]).double()
            * routing.weights.gather(-1, (routing.experts == expert).int().argmax(-1, keepdim=True)).double()
            for expert in range(16)
            for gate, up in [torch.nn.functional.linear(x, moe.experts.gate_up_proj[expert]).chunk(2, dim=-1)]
        )
        actual = moe.experts(x, routing)
    torch.testing.assert_close(actual.double(), exact, rtol=2**-8 * 1.001, atol=1e-6)


@settings(max_examples=30)
@given(
    experts_per_group=st.integers(2, 4),
    n_group=st.integers(1, 4),
    topk_group=st.integers(1, 4),
    top_k=st.integers(1, 4),
    tokens=st.integers(0, 9),
    seed=st.integers(0, 1000),
)
def test_moe_equals_a_loop_over_tokens(
    experts_per_group: int, n_group: int, topk_group: int, top_k: int, tokens: int, seed: int
) -> None:
    topk_group = min(topk_group, n_group)
    top_k = min(top_k, topk_group * experts_per_group)
    torch.manual_seed(seed)
    router = Router(
        hidden_size=6,
        n_experts=n_group * experts_per_group,
        top_k=top_k,
        n_group=n_group,
        topk_group=topk_group,
        routed_scaling_factor=2.5,
    )
    router.e_score_correction_bias.normal_(std=0.1)
    moe = MoE(
        hidden_size=6, intermediate_size=5, n_experts=n_group * experts_per_group, n_shared_experts=1, router=router
    )
    x = torch.randn(tokens, 6)
    with torch.no_grad():
        actual = moe(x)
        for row, y in zip(x, actual, strict=True):
            scores = (router.weight @ row).sigmoid()
            choice = (scores + router.e_score_correction_bias).view(n_group, -1)
            groups = choice.topk(2, dim=-1).values.sum(-1).topk(topk_group).indices.tolist()
            allowed = [g * experts_per_group + e for g in groups for e in range(experts_per_group)]
            chosen = sorted(allowed, key=lambda e: -float(choice.flatten()[e]))[:top_k]
            total = sum(float(scores[e]) for e in chosen)
            expected = moe.shared_experts(row)
            for e in chosen:
                gate, up = (moe.experts.gate_up_proj[e] @ row).chunk(2)
                part = moe.experts.down_proj[e] @ (torch.nn.functional.silu(gate) * up)
                expected = expected + part * float(scores[e]) / total * 2.5
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(experts=st.integers(1, 9), top_k=st.integers(1, 4), tokens=st.integers(1, 12), seed=st.integers(0, 1000))
def test_the_ways_to_run_experts_without_waiting_for_a_device_give_the_same(
    experts: int, top_k: int, tokens: int, seed: int
) -> None:
    torch.manual_seed(seed)
    router = Router(hidden_size=16, n_experts=experts, top_k=min(top_k, experts))
    moe = MoE(hidden_size=16, intermediate_size=8, n_experts=experts, n_shared_experts=1, router=router)
    x = torch.randn(tokens, 16)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(moe_module, "TOKENS_AT_A_TIME", 5)
        routing = router(x)
        expected = moe.experts._by_expert(x, routing)
        torch.testing.assert_close(moe.experts._grouped(x, routing), expected, rtol=1e-4, atol=1e-5)
        if moe_module.HAS_TRITON:
            torch.testing.assert_close(moe.experts._by_kernel(x, routing), expected, rtol=1e-4, atol=1e-5)


@given(
    data=st.lists(
        st.lists(st.sampled_from([0.0, 1.0, 2.0, float("-inf")]), min_size=7, max_size=7), min_size=1, max_size=5
    ),
    k=st.integers(1, 9),
)
def test_select_takes_the_highest_and_the_lowest_position_on_ties(data: list[list[float]], k: int) -> None:
    selection = select(torch.tensor(data), k)
    mask = selection_mask(selection, 7)
    for row, chosen, seen in zip(data, selection.tolist(), mask.tolist(), strict=True):
        order = sorted((s for s in range(7) if row[s] != float("-inf")), key=lambda s: (-row[s], s))[:k]
        assert chosen == order + [-1] * (min(k, 7) - len(order))
        assert [s for s in range(7) if seen[s]] == sorted(order)
