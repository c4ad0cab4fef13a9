"""`benches/gpu_all.py` as far as it runs without a GPU: all of it, small; what fails, hangs or is killed on the way;
timing, graphs and far addresses with stand-ins for the device."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
TESTS = Path(__file__).parent
BENCHES = TESTS.parent / "benches"


@pytest.fixture(autouse=True)
def _benches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHES))


def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(BENCHES / "gpu_all.py"), *arguments]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=clean | environment, text=True, **pipes)


def run(*arguments: str, **environment: str) -> tuple[int, str, str]:
    process = start(*arguments, **environment)
    out, error = process.communicate(timeout=300)
    return process.returncode, out, error


def test_help_says_what_it_does() -> None:
    status, out, _ = run("--help")
    assert status == 0
    assert "--dry" in out
    assert "Exit status" in out


def test_without_a_gpu_it_says_so() -> None:
    status, out, error = run(CUDA_VISIBLE_DEVICES="")
    assert (status, out) == (2, "")
    assert "torch sees no GPU" in error
    status, _, error = run(TRITON_INTERPRET="1")
    assert status == 2
    assert "TRITON_INTERPRET is set" in error


def test_everything_runs_small(tmp_path: Path) -> None:
    from gpu_all import CASES

    status, out, error = run("--dry", "--results", str(tmp_path), "--commit", "abc", OMP_NUM_THREADS="1")
    assert status == 0, out + error
    assert "10 of 10 checks passed" in out
    record = json.loads((tmp_path / "none.json").read_text())
    assert record["machine"]["commit"] == "abc"
    assert record["errors"] == record["left_out"] == []
    assert len(record["rows"]) == 20
    assert all(row["seconds"] > 0 and math.isfinite(row["seconds"]) for row in record["rows"])
    assert {point["phase"] for point in record["points"]} == {"prefill", "decode"}
    assert set(record["crossover"]) == {"prefill", "decode"}
    assert set(record["peers"]) == {"flash_mla", "deep_gemm", "tilelang"}
    if "no plot" not in out:
        assert "</svg>" in (tmp_path / "none.svg").read_text()
    assert not list(tmp_path.glob("*.part"))
    assert set(CASES) == {case.__name__ for case in __import__("gpu_cases").CASES} | {"dense_and_sparse"}


def test_a_killed_run_leaves_a_whole_record(tmp_path: Path) -> None:
    process = start("--dry", "--results", str(tmp_path), OMP_NUM_THREADS="1")
    path, until, checks = tmp_path / "none.json", time.monotonic() + 120, 0
    while checks < 2 and time.monotonic() < until:
        time.sleep(0.05)
        checks = len(json.loads(path.read_text())["checks"]) if path.exists() else 0
    process.send_signal(signal.SIGKILL)
    process.communicate()
    record = json.loads(path.read_text())
    assert len(record["checks"]) >= 2
    assert record["ceilings"]


def test_a_run_ends_in_time_and_says_what_it_left_out(tmp_path: Path) -> None:
    began = time.monotonic()
    status, out, _ = run("--dry", "--seconds", "6", "--results", str(tmp_path), OMP_NUM_THREADS="1")
    assert status == 1
    assert time.monotonic() - began < 40
    assert "left out: case engine_decode: out of time" in out
    assert json.loads(next(tmp_path.glob("*.json")).read_text())["left_out"]


def worker(options: dict[str, Any] | None = None) -> Any:
    from gpu_worker import Worker

    environment = {"PYTHONPATH": str(TESTS), "GPU_BENCH_VARIABLE": "set"}
    return Worker("gpu_bench_items:runner", options or {}, environment)


def events(one: Any, item: Any, seconds: float = 30.0) -> list[Any]:
    return list(one.run(item, seconds))


def test_what_goes_wrong_in_an_item_stops_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TESTS))
    one = worker()
    try:
        first, done = events(one, ("fine", None))
        assert first == ("result", {"count": 1, "variable": "set"})
        assert done[0] == "done"
        assert events(one, ("fine", None))[0][1]["count"] == 2  # the same process
        before, error = events(one, ("raise", "some reason"))
        assert before == ("result", "before")
        assert error[1]["error"] == "ValueError: some reason"
        assert "gpu_bench_items.py" in error[1]["traceback"]
        assert events(one, ("fine", None))[0][1]["count"] == 1  # a new one
        ((kind, value),) = events(one, ("exit", 7))
        assert (kind, value["error"]) == ("error", "the process ended with code 7")
        ((kind, value),) = events(one, ("hang", None), seconds=0.5)
        assert (kind, value["error"]) == ("error", "out of time")
        assert events(one, ("fine", None))[0][1]["count"] == 1
    finally:
        one.close()
    ((kind, value),) = events(worker({"broken": True}), ("fine", None))
    assert (kind, value["error"]) == ("error", "RuntimeError: no device")


def test_items_run_side_by_side(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from gpu_worker import run_in_parallel

    monkeypatch.syspath_prepend(str(TESTS))
    items: list[Any] = [("write", str(tmp_path / "file")) for _ in range(4)]
    items[1:1] = [("raise", "reason"), ("exit", 1)]
    errors = run_in_parallel(worker, items, 3, 20.0, time.monotonic() + 60)
    assert errors == {("raise", "reason"): "ValueError: reason", ("exit", 1): "the process ended with code 1"}
    assert (tmp_path / "file").read_text() == "xxxx"
    assert run_in_parallel(worker, items, 2, 20.0, time.monotonic() - 1).keys() == set(items)


def test_cases_of_a_failed_check_say_so(capsys: pytest.CaptureFixture[str]) -> None:
    from gpu_all import CHECKS_OF, Run, _arguments
    from gpu_cases import CASES
    from gpu_checks import CHECKS, GPU_CHECKS, check_engine

    checks = {check.__name__ for check in (*CHECKS, *GPU_CHECKS, check_engine)}
    assert set(CHECKS_OF) == {case.__name__ for case in CASES}
    assert checks.issuperset(name for names in CHECKS_OF.values() for name in names)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["gpu_all.py", "--dry", "--no-write"])
        one = Run(_arguments())
    left = {"name": "far", "error": 0.0, "bound": 0.0, "detail": "", "left_out": True, "passed": True}
    one._take(("check", "check_far_rows"), "result", left)
    bad = {"name": "top_k", "error": 1.0, "bound": 0.0, "detail": "", "left_out": False, "passed": False}
    one._take(("check", "check_top_k"), "result", bad)
    row = {"case": "a row", "seconds": 1.0, "goal": "fast", "met": True, "note": "so"}
    for name in ("top_k", "index_prefill"):
        one._take(("case", name), "result", dict(row))
    one._take(("case", "top_k"), "error", {"error": "why", "traceback": "where"})
    wrong, right = one.record["rows"]
    assert (wrong["wrong"], "met" in wrong) == ("check_top_k", False)
    assert ("wrong" in right, right["met"]) == (False, True)
    assert one.record["errors"] == [{"item": "case top_k", "error": "why", "traceback": "where"}]
    out = capsys.readouterr().out
    assert "FAILED top_k" in out
    assert "left   far" in out
    assert "WRONG: check_top_k failed" in out
    assert "goal fast: met" in out


def test_compiling_runs_everything_once_but_far_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_all

    monkeypatch.setattr(sys, "argv", ["gpu_all.py", "--no-write", "--tune"])
    one = gpu_all.Run(gpu_all._arguments())
    taken: list[Any] = []

    def stand_in(make: Any, items: Any, *rest: Any) -> dict[Any, str]:
        taken.extend(items)
        return {("case", "top_k"): "reason"}

    monkeypatch.setattr(gpu_all, "run_in_parallel", stand_in)
    one._compile()
    kinds = [kind for kind, _ in taken]
    assert kinds == sorted(kinds, key=("tune", "case", "curve", "check").index)
    assert ("curve", 131072) in taken
    assert not any("far" in str(name) for _, name in taken)
    assert one.record["compiling"]["errors"] == {"case top_k": "reason"}
    order = [kind for kind, _ in one.items]
    assert order.index("check") < order.index("tune") < order.index("case")


class Event:
    """Stands in for `torch.cuda.Event`, on the host's clock."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, other: Event) -> float:
        return 1e3 * (other.at - self.at)


class Graph:
    """Stands in for `torch.cuda.CUDAGraph`: replays nothing, after a millisecond."""

    replays = 0

    def replay(self) -> None:
        Graph.replays += 1
        time.sleep(1e-3)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Any:
    """torch.cuda with stand-ins, for code that would talk to a device."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    properties = SimpleNamespace(L2_cache_size=1000, name="a card", major=9, minor=0, multi_processor_count=4)
    properties.total_memory = 2**30

    @contextlib.contextmanager
    def nothing(*args: Any) -> Iterator[None]:
        yield

    stand_ins: dict[str, Any] = {
        "Event": Event,
        "CUDAGraph": Graph,
        "Stream": lambda device: stream,
        "current_stream": lambda device: stream,
        "stream": nothing,
        "graph": nothing,
        "synchronize": lambda device=None: None,
        "set_sync_debug_mode": lambda mode: None,
        "mem_get_info": lambda device: (10**6, 10**6),
        "get_device_properties": lambda device: properties,
    }
    for name, value in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return stand_ins


def test_timing_counts_calls_and_rotates_inputs(cuda: Any) -> None:
    from gpu_timing import Once, Timer

    timer = Timer(torch.device("cuda"))
    made: list[int] = []

    def make(seed: int) -> Any:
        made.append(seed)
        return lambda: time.sleep(1e-3)

    calls = timer.rotated(make, 100.0)
    assert made == list(range(21))  # twice 1000 bytes, and one more
    assert len(timer.rotated(make, 1.0)) == 64
    assert len(timer.rotated(make, 1e6)) == 1  # for want of memory
    assert 0.5e-3 < timer.median(calls, 0.05) < 20e-3
    used: list[int] = []
    three = [lambda i=i: used.append(i) for i in range(3)]
    timer.median(three, 0.01)
    assert {used.count(i) > 3 for i in range(3)} == {True}
    Graph.replays = 0
    seconds = timer.replayed([lambda: None] * 10, 0.05)
    assert 0.5e-4 < seconds < 20e-4
    assert Graph.replays >= 10
    once: list[int] = []
    assert Once(torch.device("cuda")).replayed([lambda: once.append(1), lambda: once.append(2)]) == 1.0
    assert once == [1]


def test_devices_have_a_number(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu_items import device_of

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    assert [device_of(name).index for name in ("cuda", "cuda:1", "cpu")] == [2, 1, None]


def test_the_machine_is_named(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_timing

    answer = "580.1, 1980 MHz, 2619 MHz, 120.5 W, 700.00 W, 40"
    monkeypatch.setattr(gpu_timing, "_output", lambda *command: answer if command[0] == "nvidia-smi" else "")
    found = gpu_timing.machine(torch.device("cuda"), "abc")
    assert (found["device"], found["architecture"], found["commit"]) == ("a card", "sm_90", "abc")
    assert (found["driver_version"], found["power.limit"]) == ("580.1", "700.00 W")
    monkeypatch.setattr(gpu_timing, "_output", lambda *command: "unknown")
    assert gpu_timing.state() == {"nvidia-smi": "unknown"}
    found = gpu_timing.machine(torch.device("cpu"), None)
    assert (found["commit"], found["changed_files"]) == ("unknown", None)
    monkeypatch.setattr(gpu_timing, "_output", lambda *command: "M one" if "status" in command else "abc")
    found = gpu_timing.machine(torch.device("cpu"), None)
    assert (found["commit"], found["changed_files"]) == ("abc", 1)


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's attention says which of its kernels it cannot run
def test_cases_at_full_size_on_a_card_that_holds_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    import fake_gpu
    import gpu_cases
    import gpu_curve
    from gpu_items import UNKNOWN
    from gpu_timing import HostClock

    class Bench(gpu_cases.Bench):
        """Without random numbers."""

        def normal(self, seed: int, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
            return torch.empty(shape, device=self.device, dtype=dtype or self.numbers)

        def integers(self, seed: int, high: int, *shape: int) -> torch.Tensor:
            return torch.empty(shape, device=self.device, dtype=torch.int64)

        def sequences(self, count: int, tokens: int) -> torch.Tensor:
            return torch.empty((count, tokens // 64), device=self.device, dtype=torch.int32)

    rows: dict[str, list[Any]] = {}
    with fake_gpu.fake_gpu(monkeypatch) as launches:
        bench = Bench(HostClock(fake_gpu.DEVICE), gpu_cases.FULL, UNKNOWN)
        for case in gpu_cases.CASES[:-1]:  # the last is the engine's
            before = len(launches)
            rows[case.__name__] = [row.record(UNKNOWN) for row in case(bench)]
            assert len(launches) > before
        points = [point for context in gpu_cases.FULL.contexts for point in gpu_curve.curve(bench, context)]
        before = len(launches)
        steps = gpu_cases.tuning_steps(bench)
        for step in steps.values():
            step()
        assert len(launches) > before + 3 * len(steps)  # several candidates each
    assert [len(found) for found in rows.values()] == [2, 1, 3, 3, 2, 4, 1, 3]
    assert rows["sparse_prefill"][0]["flops"] == 2 * 4096 * 128 * 2048 * 1088
    assert rows["index_prefill"][0]["flops"] == 2 * 4096 * 64 * 128 * 131072
    assert rows["sparse_decode"][1]["bytes"] == 64 * 2048 * 656 + 2 * 64 * 128 * 1088
    ways = {(point.phase, point.way) for point in points}
    assert {("prefill", "sparse"), ("decode", "sparse"), ("decode", "dense, absorbed (torch)")} <= ways
    assert {point.context for point in points} == set(gpu_cases.FULL.contexts)


def test_checks_of_the_device_with_stand_ins(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the addresses and the graph: they run on the CPU's operators, at small sizes."""
    import gpu_checks

    inputs = gpu_checks.Inputs(gpu_checks.FULL, torch.device("cpu"), "auto")
    for check in (gpu_checks.check_far_rows, gpu_checks.check_far_scores, gpu_checks.check_far_pages):
        result = check(inputs)
        assert result.left_out
        assert "needs" in result.detail
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**40, 2**40))
    monkeypatch.setattr(gpu_checks, "FAR", 2**17)
    for check in (gpu_checks.check_far_rows, gpu_checks.check_far_scores, gpu_checks.check_far_pages):
        result = check(inputs)
        assert result.passed, result
        assert not result.left_out
    placed = gpu_checks.decode_arguments(torch.device("cpu"))
    assert torch.equal(gpu_checks.decode_step(placed), gpu_checks.decode_step(placed))
    assert not gpu_checks.check_graph(inputs).passed  # a graph that replays nothing is found out


def test_the_check_of_a_coded_prefill_turns_rows_into_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    import gpu_checks
    from heedful.kernels import dequantize, sparse_attention

    queries: list[int] = []
    whole = dequantize.is_worth_it

    def watched(q: torch.Tensor, *rest: Any) -> bool:
        worth = whole(q, *rest)
        queries.extend([len(q)] * worth)
        return worth

    monkeypatch.setattr(sparse_attention, "is_worth_it", watched)
    small = gpu_checks.Inputs(replace(gpu_checks.SMALL, T=80), torch.device("cpu"), "triton")
    small.dtype = torch.bfloat16
    result = gpu_checks.check_coded_prefill(small)
    assert result.passed, result
    assert queries == [80]
    full = gpu_checks.FULL
    assert full.T * full.K >= dequantize.READS * 2 * -(-full.S // 64) * 64


def test_crossovers_and_rows() -> None:
    from gpu_cases import Row
    from gpu_curve import crossovers

    names = "phase", "context", "way", "seconds_per_token"
    points = [dict(zip(names, ("decode", *values), strict=True)) for values in (
        (2048, "sparse", 1.0), (2048, "dense", 2.0), (4096, "sparse", 2.0), (4096, "dense", 1.0), (8192, "sparse", 2.0),
        (8192, "dense", 2.5), (8192, "other", 9.0), (16384, "sparse", 2.0), (32768, "sparse", 2.0),
        (32768, "other", 3.0),
    )]  # fmt: skip
    assert crossovers(points) == {"prefill": "not reached", "decode": "8192 tokens"}
    ceilings = {"bfloat16_flops": 100.0, "copy_bytes_per_second": 10.0}
    record = Row("case", 4.0, flops=200.0, bytes=30.0, peer="them", peer_seconds=6.0, met=False).record(ceilings)
    assert record["fraction_of_limit"] == 0.75
    assert record["times_faster_than_peer"] == 1.5
    assert record["share_of_copy"] == 0.75
    assert record["met"] is False
    assert not {"met", "fraction_of_limit", "note"} & Row("case", 4.0).record(ceilings).keys()


def test_the_record_has_one_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import gpu_all

    monkeypatch.setattr(sys, "argv", ["gpu_all.py", "--dry", "--results", str(tmp_path)])
    one = gpu_all.Run(gpu_all._arguments())
    one._write()
    one._take(("machine", None), "result", {"machine": {"device": "NVIDIA H100 80GB"}})
    one._take(("machine", None), "result", {"ceilings": {"copy_bytes_per_second": 3e12}})
    one._finish(("machine", None))
    assert [path.name for path in tmp_path.iterdir()] == ["nvidia-h100-80gb.json"]
    assert json.loads((tmp_path / "nvidia-h100-80gb.json").read_text())["ceilings"] == {"copy_bytes_per_second": 3e12}


def test_rows_are_not_judged_by_ceilings_that_nobody_measured() -> None:
    from gpu_items import Options, runner

    case = ("case", "index_prefill")
    ceilings = {"copy_bytes_per_second": 1e12, "bfloat16_flops": 1e15}
    (judged,) = runner(Options(device="cpu", dry=True, ceilings=ceilings))(case)
    assert {"fraction_of_limit", "goal", "met"} <= judged.keys()
    (row,) = runner(Options(device="cpu", dry=True, ceilings={"copy_bytes_per_second": 1e12}))(case)
    assert not {"fraction_of_limit", "goal", "met"} & row.keys()
    assert row["note"] == "not measured: bfloat16_flops"


def test_a_plot_names_the_crossover(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from gpu_curve import plot

    point = {"phase": "decode", "way": "sparse", "context": 4096, "seconds_per_token": 1e-6}
    record = {"points": [point, point | {"context": 8192}], "machine": {"device": "a card"}}
    plot(record | {"crossover": {"prefill": "not reached", "decode": "8192 tokens"}}, tmp_path / "curve.svg")
    assert "sparse is quicker from: 8192 tokens" in (tmp_path / "curve.svg").read_text()
