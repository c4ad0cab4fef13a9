"""attn_implementation="heedful" in transformers gives the logits of "eager": prefill, padded batches, with a cache."""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import Any

import pytest
import torch
import transformers

import heedful.integrations.transformers as integration
import oracle
from heedful import ops

NAMES = ["deepseek_v32", "glm_moe_dsa"]


@pytest.fixture(scope="module", params=NAMES)
def models(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """The same random model twice: "eager" and "heedful"."""
    eager = oracle.build(request.param)
    ours = copy.deepcopy(eager)
    ours.set_attn_implementation("heedful")
    return eager, ours


@pytest.fixture
def operator_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the keys that the operator was given, call by call."""
    calls: list[tuple[int, ...]] = []

    def counted(q: Any, kv: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(tuple(kv.shape))
        return original(q, kv, *args, **kwargs)

    original = ops.sparse_attention
    monkeypatch.setattr(ops, "sparse_attention", counted)
    return calls


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, 199, (batch, length), generator=torch.Generator().manual_seed(seed))


def assert_same(ours: torch.Tensor, eager: torch.Tensor) -> None:
    torch.testing.assert_close(ours.log_softmax(-1), eager.log_softmax(-1), atol=2e-4, rtol=2e-4)


@torch.no_grad()
def test_prefill(models: tuple[Any, Any], operator_calls: list[tuple[int, ...]]) -> None:
    eager, ours = models
    ids = tokens(2, 90)
    assert_same(ours(ids).logits, eager(ids).logits)
    # Latent rows of 32 + 8 numbers, not keys of each head; once a layer.
    assert operator_calls == [(180, 40)] * 4


@torch.no_grad()
def test_selection_some_queries_at_a_time(models: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    eager, ours = models
    ids, shapes = tokens(1, 70), []

    def counted(q: Any, k: Any, *args: Any, **kwargs: Any) -> Any:
        shapes.append((len(q), len(k)))
        return original(q, k, *args, **kwargs)

    original = ops.index_scores
    monkeypatch.setattr(ops, "index_scores", counted)
    monkeypatch.setattr(integration, "_SCORES_BYTES", 30 * 70 * 4)
    assert_same(ours(ids).logits, eager(ids).logits)
    layers = sum(layer.self_attn.indexer is not None for layer in ours.model.layers)
    assert shapes == [(30, 70), (30, 70), (10, 70)] * layers


@torch.no_grad()
def test_registering_twice_changes_nothing() -> None:
    from transformers.models.deepseek_v32 import modeling_deepseek_v32 as modeling

    before = modeling.DeepseekV32Attention.expand_kv, modeling.DeepseekV32Indexer.forward
    integration.register()
    assert (modeling.DeepseekV32Attention.expand_kv, modeling.DeepseekV32Indexer.forward) == before


def test_releases_without_the_models_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integration, "_MODELS", (("transformers.models.nothing", "Nothing", "rotate"),))
    with pytest.raises(
        ImportError, match=r"expected 5.17 or newer, but transformers 5.* has no transformers.models.no"
    ):
        integration.register()


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["heedful", "sdpa"])
def test_indexers_take_the_cache_by_either_name(models: tuple[Any, Any], implementation: str) -> None:
    ours = copy.deepcopy(models[1])
    ours.set_attn_implementation(implementation)
    indexer = ours.model.layers[0].self_attn.indexer
    config = ours.config
    width = config.qk_rope_head_dim
    hidden, angles = torch.randn(1, 9, config.hidden_size), (torch.ones(1, 9, width), torch.zeros(1, 9, width))
    mask = torch.ones(9, 9, dtype=torch.bool).tril()[None]
    if implementation == "sdpa":
        mask = torch.zeros(1, 9, 9).masked_fill(~mask, torch.finfo(torch.float32).min)
    chosen = []
    for name in ("cache", "past_key_values"):
        if name not in inspect.signature(type(indexer).forward).parameters and name == "cache":
            continue  # before 5.24
        cache = transformers.DynamicCache(config=config)
        resid = torch.ones(1, 9, config.q_lora_rank)
        chosen.append(indexer(hidden, resid, angles, mask, torch.arange(9)[None], **{name: cache}))
    assert all(torch.equal(one.sort(-1).values, chosen[0].sort(-1).values) for one in chosen)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch(models: tuple[Any, Any], side: str) -> None:
    eager, ours = models
    ids, mask = tokens(3, 70), torch.ones(3, 70, dtype=torch.long)
    for row, count in ((1, 25), (2, 60)):
        mask[row, slice(None, count) if side == "left" else slice(-count, None)] = 0
    got, want = ours(ids, attention_mask=mask).logits, eager(ids, attention_mask=mask).logits
    assert got.isfinite().all()
    assert_same(got[mask.bool()], want[mask.bool()])


@torch.no_grad()
def test_decoding_with_a_cache(models: tuple[Any, Any], operator_calls: list[tuple[int, ...]]) -> None:
    eager, ours = models
    ids = tokens(2, 60)
    whole = eager(ids).logits
    out = ours(ids[:, :50], use_cache=True)
    assert_same(out.logits, whole[:, :50])
    name = "cache" if "cache" in out else "past_key_values"  # before 5.24
    for place in range(50, 60):
        out = ours(ids[:, place : place + 1], use_cache=True, **{name: out[name]})
        assert_same(out.logits[:, 0], whole[:, place])
    assert operator_calls[-1] == (120, 40)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_gives_the_tokens_of_eager(models: tuple[Any, Any], cache: str) -> None:
    eager, ours = models
    ids, mask = tokens(2, 40, seed=1), torch.ones(2, 40, dtype=torch.long)
    mask[1, :15] = 0
    options: dict[str, Any] = {
        "attention_mask": mask, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0,
        "cache_implementation": cache, "disable_compile": True,
    }  # fmt: skip
    got, want = ours.generate(ids, **options), eager.generate(ids, **options)
    assert got.tolist() == want.tolist()


def test_gradients_are_those_of_eager(models: tuple[Any, Any], operator_calls: list[tuple[int, ...]]) -> None:
    ids = tokens(1, 50)
    grads = []
    for model in models:
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[1].items():
        torch.testing.assert_close(grad, grads[0][name], atol=1e-4, rtol=1e-3)
    assert operator_calls == []  # it has no backward


@torch.no_grad()
def test_where_latents_are_not_handed_over_each_head_reads_its_own_keys(
    models: tuple[Any, Any], operator_calls: list[tuple[int, ...]]
) -> None:
    eager, ours = models
    ours = copy.deepcopy(ours)

    class Adapted(torch.nn.Linear):
        """A kv_b_proj that is more than its weight."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    for module in ours.modules():
        if hasattr(module, "kv_b_proj"):
            module.kv_b_proj.__class__ = Adapted
    ids = tokens(2, 45)
    assert_same(ours(ids).logits, eager(ids).logits)
    assert operator_calls == [(90, 4, 24)] * 4


@torch.no_grad()
def test_other_implementations_stay_what_they_were(models: tuple[Any, Any]) -> None:
    eager, ours = models
    ids = tokens(1, 40)
    sdpa = copy.deepcopy(ours)
    sdpa.set_attn_implementation("sdpa")
    assert_same(sdpa(ids).logits, eager(ids).logits)


@torch.no_grad()
def test_bfloat16() -> None:
    """As near to float32 as eager is, in a model without choices of keys or experts that rounding could turn."""
    model = oracle.build("deepseek_v32", index_topk=64, first_k_dense_replace=4)
    ids = tokens(1, 60)
    exact = model(ids).logits
    model = model.bfloat16()
    eager = model(ids).logits.float()
    model.set_attn_implementation("heedful")
    ours = model(ids).logits.float()
    assert (ours - exact).abs().mean() < 1.5 * (eager - exact).abs().mean() < 0.1 * exact.abs().mean()


def test_a_model_without_an_indexer_is_refused() -> None:
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config).eval()
    model.set_attn_implementation("heedful")
    with torch.no_grad(), pytest.raises(ValueError, match="expected a model with a lightning indexer"):
        model(torch.zeros(1, 4, dtype=torch.long))


def test_other_devices_fall_back_with_one_warning() -> None:
    query = torch.empty(1, 2, 3, 4, device="meta")
    integration._warn_of_device.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert integration._must_fall_back(query)
        assert integration._must_fall_back(query)
    assert [str(w.message) for w in caught] == ["heedful has no kernels for meta: attention is torch's, with a mask"]
