"""`LLM` on the built-in model: text in and out, what a request may ask for, and what happens when it asks wrongly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import heedful
from heedful import LLM, RequestOutput, SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
TEXTS = ["The", "The first thing to know about this", "A file", "If the value is not", "1 2 3"]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(kv_cache_tokens=8192, max_batched_tokens=512)


def generate(llm: LLM, prompts: Any, params: Any = GREEDY) -> list[RequestOutput]:
    return llm.generate(prompts, params, progress=False)


def words(llm: LLM, count: int) -> list[int]:
    """A prompt of real text, `count` tokens long."""
    assert llm.tokenizer is not None
    text = "The value of the first argument is the name of the file that is to be read. " * (count // 8 + 1)
    return llm.tokenizer.encode(text)[:count]


def test_text_is_the_decoded_ids_and_metrics_add_up(llm: LLM) -> None:
    (output,) = generate(llm, TEXTS[1])
    completion, metrics = output.outputs[0], output.metrics
    assert llm.tokenizer is not None
    assert output.prompt == TEXTS[1]
    assert output.prompt_token_ids == llm.tokenizer.encode(TEXTS[1], add_special_tokens=True)
    assert completion.text == llm.tokenizer.decode(completion.token_ids)
    assert (completion.finish_reason, len(completion.token_ids)) == ("length", 12)
    length = len(output.prompt_token_ids)
    assert (metrics.prompt_tokens, metrics.output_tokens) == (length, 12)
    computed = length + 11  # the last token is never computed
    assert metrics.computed_tokens == computed
    assert metrics.keys_visible == metrics.keys_read == computed * (computed + 1) // 2
    assert metrics.arrival_time <= (metrics.first_token_time or 0) <= (metrics.finished_time or 0)


def test_sparse_attention_reads_index_topk_keys_of_a_long_prompt(llm: LLM) -> None:
    (output,) = generate(llm, words(llm, 700))
    k, metrics = llm.config.index_topk, output.metrics
    assert metrics.keys_read == sum(min(p + 1, k) for p in range(metrics.computed_tokens))
    assert metrics.share_of_keys_read is not None
    assert metrics.share_of_keys_read < 0.5


@pytest.mark.parametrize("attention", ["sparse", "dense"])
@pytest.mark.parametrize("kv_cache_dtype", ["float32", "bfloat16", "fp8"])
def test_every_cache_format_speaks_the_same_language(attention: Any, kv_cache_dtype: Any) -> None:
    """Formats round differently, so tokens may differ; the prompt's log-probabilities stay close."""
    params = SamplingParams(temperature=0.0, max_tokens=2, prompt_logprobs=0)
    options = {"dtype": "float32", "kv_cache_tokens": 1024, "max_batched_tokens": 300}
    exact = LLM(kv_cache_dtype="float32", attention=attention, **options)
    other = LLM(kv_cache_dtype=kv_cache_dtype, attention=attention, **options)
    prompt = words(exact, 600)
    totals = []
    for one in (exact, other):
        (output,) = generate(one, prompt, params)
        entries = (output.prompt_logprobs or [])[1:]
        totals.append([e[i].logprob for e, i in zip(entries, prompt[1:], strict=True) if e is not None])
    difference = torch.tensor(totals[0]) - torch.tensor(totals[1])
    assert difference.abs().mean() < {"float32": 1e-6, "bfloat16": 0.03, "fp8": 0.15}[kv_cache_dtype]


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.permutations(range(len(TEXTS))), count=st.integers(1, len(TEXTS)), temperature=st.sampled_from([0, 1]))
def test_tokens_of_a_request_do_not_depend_on_what_else_is_in_the_batch(
    llm: LLM, order: list[int], count: int, temperature: int
) -> None:
    batch = order[:count]
    params = {i: SamplingParams(temperature=float(temperature), max_tokens=6, seed=i) for i in batch}
    together = generate(llm, [TEXTS[i] for i in batch], [params[i] for i in batch])
    for i, output in zip(batch, together, strict=True):
        assert output.outputs[0].token_ids == generate(llm, TEXTS[i], params[i])[0].outputs[0].token_ids


def test_engine_seed_decides_requests_without_their_own() -> None:
    def tokens(seed: int) -> list[list[int]]:
        llm = LLM(kv_cache_tokens=512, seed=seed)
        outputs = generate(llm, [TEXTS[0], TEXTS[0]], SamplingParams(max_tokens=8))
        return [output.outputs[0].token_ids for output in outputs]

    first, again, other = tokens(1), tokens(1), tokens(2)
    assert first == again != other
    assert first[0] != first[1]


def test_n_completions_differ_and_the_first_is_that_of_n_1(llm: LLM) -> None:
    params = {"max_tokens": 10, "seed": 3}
    (several,) = generate(llm, TEXTS[0], SamplingParams(n=3, **params))
    (one,) = generate(llm, TEXTS[0], SamplingParams(**params))
    assert [completion.index for completion in several.outputs] == [0, 1, 2]
    assert len({tuple(completion.token_ids) for completion in several.outputs}) == 3
    assert several.outputs[0].token_ids == one.outputs[0].token_ids
    assert several.metrics.output_tokens == sum(len(completion.token_ids) for completion in several.outputs)


def test_stop_string_cuts_the_text_and_frees_the_blocks(llm: LLM) -> None:
    (free,) = generate(llm, TEXTS[1])
    text = free.outputs[0].text
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    (output,) = generate(llm, TEXTS[1], SamplingParams(temperature=0.0, max_tokens=12, stop=stop))
    completion = output.outputs[0]
    assert completion.text == text[: text.find(stop)]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
    assert_idle(llm)


def test_stop_token_ends_the_output(llm: LLM) -> None:
    (free,) = generate(llm, TEXTS[1])
    stop = free.outputs[0].token_ids[3]
    (output,) = generate(llm, TEXTS[1], SamplingParams(temperature=0.0, max_tokens=12, stop_token_ids=[stop]))
    expected = free.outputs[0].token_ids
    assert output.outputs[0].token_ids == expected[: expected.index(stop) + 1]
    assert output.outputs[0].finish_reason == "stop"


def test_logprobs_name_the_token_and_the_best_ones(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, seed=1, max_tokens=5, logprobs=3, prompt_logprobs=2)
    (output,) = generate(llm, TEXTS[1], params)
    completion = output.outputs[0]
    assert completion.logprobs is not None
    assert output.prompt_logprobs is not None
    assert len(completion.logprobs) == 5
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
    for token_id, entry in zip(completion.token_ids, completion.logprobs, strict=True):
        assert token_id in entry
        assert {value.rank for value in entry.values()} >= {1, 2, 3}
        assert all(value.decoded_token is not None for value in entry.values())
    total = sum(e[i].logprob for i, e in zip(completion.token_ids, completion.logprobs, strict=True))
    assert completion.cumulative_logprob == pytest.approx(total)


def test_prompts_come_as_text_ids_or_dicts(llm: LLM) -> None:
    ids = words(llm, 5)
    by_ids = generate(llm, ids)
    assert [o.outputs for o in generate(llm, {"prompt_token_ids": ids})] == [o.outputs for o in by_ids]
    assert [o.outputs for o in generate(llm, [ids])] == [o.outputs for o in by_ids]
    assert len(generate(llm, [TEXTS[0], ids, {"prompt_token_ids": ids}])) == 3
    assert generate(llm, []) == []


def assert_idle(llm: LLM) -> None:
    """Nothing runs, every block is free, and the engine still serves."""
    stats = llm.engine.scheduler.stats()
    assert (stats["running"], stats["waiting"], stats["used_blocks"]) == (0, 0, 0)
    llm.engine.scheduler.check_invariants()
    assert len(generate(llm, TEXTS[0])[0].outputs[0].token_ids) == 12


@pytest.mark.parametrize(
    ("prompt", "params", "error", "message"),
    [
        ("", GREEDY, ValueError, r"prompts\[0\]: .*empty"),
        ([[]], GREEDY, ValueError, r"prompts\[0\]: .*empty"),
        (["fine", ""], GREEDY, ValueError, r"prompts\[1\]: .*empty"),
        ([[5, 10**9]], GREEDY, ValueError, r"prompts\[0\]: .*1000000000 is outside the vocabulary"),
        ([[5, -1]], GREEDY, ValueError, r"prompts\[0\]: .*-1 is outside the vocabulary"),
        ([[5] * 100_000], GREEDY, ValueError, r"prompts\[0\]: .*100000 tokens.*max_model_len is \d+"),
        (["a", "b"], [GREEDY], ValueError, r"sampling_params: expected one or 2, got 1"),
        ("a", {"max_tokens": 3}, TypeError, r"SamplingParams"),
        ([3.5], GREEDY, TypeError, r"prompts\[0\]: prompt: expected text or token ids, got 3.5"),
        ([[5, 3.5]], GREEDY, TypeError, r"prompts\[0\]: prompt: expected text or token ids"),
        ("\ud800", GREEDY, ValueError, r"prompts\[0\]"),
    ],
)
def test_bad_input_is_refused_and_the_engine_goes_on(
    llm: LLM, prompt: Any, params: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        generate(llm, prompt, params)
    assert_idle(llm)


def test_a_failing_step_ends_its_requests_and_the_engine_goes_on(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.runner, "run", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            generate(llm, TEXTS)
    assert_idle(llm)


def test_an_aborted_request_gives_what_it_has_and_its_blocks_back(llm: LLM) -> None:
    engine = llm.engine
    engine.add_request("one", TEXTS[0], SamplingParams(temperature=0.0, max_tokens=50, n=2))
    engine.add_request("two", TEXTS[1], GREEDY)
    for _ in range(4):
        engine.step()
    output = engine.abort_request("one")
    assert output is not None
    assert output.finished
    assert [completion.finish_reason for completion in output.outputs] == ["abort", "abort"]
    assert engine.abort_request("one") is None
    while engine.has_unfinished_requests():
        (last,) = engine.step()
    assert last.outputs[0].token_ids == generate(llm, TEXTS[1])[0].outputs[0].token_ids
    assert_idle(llm)


def test_a_request_name_in_use_is_refused(llm: LLM) -> None:
    llm.engine.add_request("twice", TEXTS[0], GREEDY)
    with pytest.raises(ValueError, match="request_id: 'twice' is in use"):
        llm.engine.add_request("twice", TEXTS[0], GREEDY)
    llm.engine.abort_request("twice")
    assert_idle(llm)


def test_output_ends_at_max_model_len() -> None:
    llm = LLM(kv_cache_tokens=512, max_model_len=100)
    (output,) = generate(llm, words(llm, 90), SamplingParams(max_tokens=50, ignore_eos=True))
    assert (len(output.outputs[0].token_ids), output.outputs[0].finish_reason) == (10, "length")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "device: expected one of auto, cpu, cuda, cuda:N, got 'tpu'"),
        ({"dtype": "int8"}, "dtype: expected one of"),
        ({"kv_cache_dtype": "int4"}, "kv_cache_dtype: expected one of"),
        ({"attention": "linear"}, "attention: expected one of"),
        ({"kv_cache_tokens": 0}, "kv_cache_tokens: expected a positive integer, got 0"),
        ({"max_model_len": -5}, "max_model_len: expected a positive integer, got -5"),
        ({"max_model_len": 10**9}, "max_model_len: expected at most the model's"),
        ({"max_batched_tokens": 0}, "max_batched_tokens: expected a positive integer, got 0"),
        ({"max_num_seqs": True}, "max_num_seqs: expected a positive integer, got True"),
    ],
)
def test_engine_options_out_of_range_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLM(**options)


def test_a_missing_directory_is_named() -> None:
    with pytest.raises(FileNotFoundError, match="no/such/model"):
        LLM("no/such/model")


def test_names_of_the_package_are_listed_and_there() -> None:
    assert set(heedful.__all__) <= set(dir(heedful))
    for name in heedful.__all__:
        assert getattr(heedful, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = heedful.nothing  # type: ignore[attr-defined]
