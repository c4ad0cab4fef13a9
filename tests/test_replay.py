"""Replaying traces: every request finishes, nothing leaks, prefixes are found; the cost model against plain loops."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heedful import SchedulerConfig
from heedful.cli import main
from heedful.config import ModelConfig
from heedful.replay import CostModel, Hardware, ReplayResult, TraceRequest, read_trace, replay

TRACES = Path(__file__).parent / "data" / "traces"
COST = CostModel.of(ModelConfig.from_dict({"model_type": "deepseek_v32"}), Hardware())


def run(trace: list[TraceRequest], num_blocks: int = 16_384, check_every: int = 0, **options: object) -> ReplayResult:
    return replay(trace, SchedulerConfig(num_blocks, hash_seed=0, **options), COST, check_every=check_every)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["mooncake_conversation.jsonl", "mooncake_synthetic.jsonl", "azure_2023_code.csv"])
@pytest.mark.parametrize("tier", [{}, {"num_latent_blocks": 2048, "hot_rows": 65_536}])
def test_every_request_of_a_trace_finishes(name: str, tier: dict[str, int]) -> None:
    trace = read_trace(TRACES / name, 150)
    result = run(trace, num_blocks=4096, check_every=50, **tier)
    assert (result.finished, result.refused) == (len(trace), 0)
    assert result.prompt_tokens == sum(request.prompt_tokens for request in trace)
    assert result.output_tokens == sum(request.output_tokens for request in trace)
    assert len(result.ttft) == len(trace)
    assert min(result.ttft) > 0
    assert result.elapsed >= trace[-1].arrival


@pytest.mark.parametrize("eviction", ["lru", "reuse"])
def test_prefixes_are_found_one_request_after_the_other(eviction: str) -> None:
    """An endless cache finds what the ids say: full blocks that an earlier request began with too."""
    trace = read_trace(TRACES / "mooncake_synthetic.jsonl")
    apart = [TraceRequest(1e4 * i, r.prompt_tokens, 1, r.hash_ids) for i, r in enumerate(trace)]
    seen: dict[int, int] = {}
    expected = 0
    for request in apart:
        last = request.prompt_tokens - 1  # the last token is computed in any case
        found = 0
        for block, name in enumerate(request.hash_ids):
            cached = min(seen.get(name, 0), last - 512 * block)
            found += cached // 64 * 64
            if cached < 512:
                break
        expected += found
        for block, name in enumerate(request.hash_ids):
            seen[name] = max(seen.get(name, 0), min(512, request.prompt_tokens - 512 * block))
    result = run(apart, num_blocks=60_000, eviction=eviction)
    assert expected > 0
    assert abs(result.cached_tokens - expected) <= 0.002 * result.prompt_tokens


def test_a_small_cache_preempts_and_finishes_all_the_same() -> None:
    trace = [TraceRequest(0.0, 700, 600, (2 * i, 2 * i + 1)) for i in range(24)]
    result = run(trace, num_blocks=120, check_every=10)
    assert result.finished == 24
    assert result.preemptions > 0


def test_rows_kept_over_preemptions_are_not_computed_again() -> None:
    trace = [TraceRequest(0.0, 700, 600, (2 * i, 2 * i + 1)) for i in range(24)]
    limits = {
        "num_latent_blocks": 416,
        "num_swap_blocks": 300,
        "hot_rows": 65_536,
        "max_num_seqs": 24,
        "enable_prefix_caching": False,
    }
    kept, anew = (run(trace, 300, 10, preemption=preemption, **limits) for preemption in ("auto", "recompute"))
    assert kept.finished == anew.finished == 24
    assert kept.preemptions == kept.stats["swaps"] > 0
    assert anew.stats["swaps"] == 0
    # Each token is computed once; the last one of a request is not computed.
    assert kept.stats["scheduled_tokens"] == 24 * (700 + 600 - 1) < anew.stats["scheduled_tokens"]


def test_what_does_not_fit_is_refused_and_the_rest_runs() -> None:
    trace = [TraceRequest(0.0, 100_000, 5, tuple(range(196))), TraceRequest(1.0, 100, 5, (7,))]
    result = run(trace, num_blocks=100)
    assert (result.finished, result.refused) == (1, 1)
    assert result.refusal is not None


def test_faster_arrivals_shorten_the_run() -> None:
    trace = [TraceRequest(10.0 * i, 600, 3, (2 * i, 2 * i + 1)) for i in range(5)]
    config = SchedulerConfig(1000)
    assert replay(trace, config, COST, speed=10.0).elapsed < replay(trace, config, COST).elapsed / 5
    for speed in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="speed: expected a positive number"):
            replay(trace, config, COST, speed=speed)


def test_series_stay_short() -> None:
    result = run([TraceRequest(0.0, 10, 9000, (1,))])
    columns = result.series.columns()
    assert 1000 < len(columns["time"]) < 4096
    assert {len(column) for column in columns.values()} == {len(columns["time"])}
    assert all(a < b for a, b in itertools.pairwise(columns["time"]))


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 300), st.integers(0, 5000)), min_size=1, max_size=5), st.integers(0, 10**9))
def test_the_cost_model_is_its_formulas(sequences: list[tuple[int, int]], fetched: int) -> None:
    queries = np.array([count for count, _ in sequences], dtype=np.int32)
    lengths = np.array([before + count for count, before in sequences], dtype=np.int32)
    tokens = int(queries.sum())
    keys = [before + j + 1 for count, before in sequences for j in range(count)]
    flops = 2 * tokens * COST.active_parameters + 2 * 64 * 128 * 61 * sum(keys)
    flops += 2 * 128 * (2 * 512 + 64) * 61 * sum(min(2048, count) for count in keys)
    touched = 1 - (1 - 8 / 256) ** tokens
    read = COST.always_bytes + COST.expert_bytes * touched + 132 * 61 * int(lengths.sum())
    read += 656 * 61 * sum(min(length, count * 2048) for count, length in zip(queries, lengths, strict=True))
    machine = COST.hardware
    expected = machine.step_overhead + max(read / machine.memory_bandwidth, flops / machine.compute)
    found = COST.seconds(queries, lengths, fetched)
    assert found == pytest.approx(expected + fetched / machine.host_bandwidth, rel=1e-9)


def test_the_default_model_has_its_published_size() -> None:
    assert COST.always_bytes + COST.expert_bytes == pytest.approx(671e9, rel=0.01)
    assert COST.active_parameters == pytest.approx(37e9, rel=0.03)
    assert (COST.latent_bytes, COST.index_bytes) == (656 * 61, 132 * 61)


@pytest.mark.parametrize("name", ["memory_bandwidth", "compute", "host_bandwidth", "step_overhead"])
def test_impossible_machines_are_refused(name: str) -> None:
    for value in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            Hardware(**{name: value})


def test_the_command_prints_a_summary(capsys: pytest.CaptureFixture[str]) -> None:
    trace = str(TRACES / "mooncake_conversation.jsonl")
    assert main(["bench", "replay", "--trace", trace, "--limit", "40", "--quiet"]) == 0
    out, err = capsys.readouterr()
    for part in (
        "40 finished, 0 refused",
        "found in the cache (reuse)",
        "time to first token  p50",
        "schedule + update",
    ):
        assert part in out
    assert err == ""


def test_the_command_prints_json_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    trace, picture = str(TRACES / "azure_2023_code.csv"), tmp_path / "replay.svg"
    assert main(["bench", "replay", "--trace", trace, "--limit", "20", "--json", "--plot", str(picture)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["finished"], report["cached_tokens"]) == (20, 0)
    assert set(report["ttft"]) == {"p50", "p90", "p99", "max"}
    assert len(report["series"]["time"]) == report["steps"]
    assert picture.read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kv-cache-tokens", "10"], "--kv-cache-tokens: expected at least a block of 64 tokens, got 10"),
        (["--block-size", "0"], "--block-size: expected at least 1, got 0"),
        (["--check-every", "-1"], "--check-every: expected 0 or more, got -1"),
        (["--limit", "0"], "limit: expected at least 1, got 0"),
        (["--speed", "nan"], "speed: expected a positive number, got nan"),
        (["--compute", "-3"], "compute: expected a positive number"),
        (["--weight-bytes", "0"], "weight_bytes: expected a positive number, got 0.0"),
        (["--plot", "picture.exe"], "--plot: expected a file name that ends in .png, .svg, .pdf"),
        (["--plot", "nowhere/picture.png"], "--plot: there is no directory 'nowhere'"),
    ],
)
def test_wrong_options_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "replay", "--trace", str(TRACES / "azure_2023_code.csv"), *arguments]) == 1
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert message in err


def test_a_bad_trace_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"timestamp": 0}\n')
    assert main(["bench", "replay", "--trace", str(trace)]) == 1
    assert capsys.readouterr().err == f"heedful: error: {trace}, line 1: input_length: missing\n"
    assert main(["bench", "replay", "--trace", str(tmp_path / "absent")]) == 1
    assert "No such file" in capsys.readouterr().err
