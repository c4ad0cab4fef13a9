"""Tables of measurements: kept, found again, bounded; a damaged one changes nothing but speed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import triton

from heedful.kernels import index_scores, index_top_k, top_k, tuning
from heedful.kernels.compilation import Launch
from heedful.kernels.scoring import Scoring
from heedful.kernels.target import Target, check_triton
from heedful.kernels.top_k import Sizes

KEY = tuning.bucket(3, 200, torch.float32)
CANDIDATES = [Sizes(64, 128), Sizes(16, 64), Sizes(32, 64)]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder for each test."""
    monkeypatch.setenv("HEEDFUL_CACHE_DIR", str(tmp_path))
    tuning.forget()
    return tmp_path


@pytest.fixture
def target(device: torch.device) -> Target:
    return Target.of(device)


def times(monkeypatch: pytest.MonkeyPatch, *seconds: float | Exception) -> None:
    """Makes the candidates take so long, or fail, one after another."""
    left = list(seconds)

    def measured(launches: object) -> float:
        taken = left.pop(0)
        if isinstance(taken, Exception):
            raise taken
        return taken

    monkeypatch.setattr(tuning, "_seconds", measured)


def measure(target: Target) -> Sizes:
    return tuning.measure("kernel", KEY, target, CANDIDATES, lambda sizes: [])


def choose(target: Target) -> Sizes:
    return tuning.choose("kernel", KEY, target, lambda: CANDIDATES)


def test_the_default_holds_until_something_is_measured(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose(target) == CANDIDATES[0]
    times(monkeypatch, 3.0, 2.0, 1.0)
    assert measure(target) == CANDIDATES[2]
    assert choose(target) == CANDIDATES[2]
    tuning.forget()  # as another process would
    assert choose(target) == CANDIDATES[2]
    assert tuning.choose("other", KEY, target, lambda: CANDIDATES) == CANDIDATES[0]
    assert tuning.choose("kernel", tuning.bucket(5), target, lambda: CANDIDATES) == CANDIDATES[0]


def test_candidates_that_do_not_run_are_passed_over(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    times(monkeypatch, RuntimeError("out of resource"), 2.0, 3.0)
    assert measure(target) == CANDIDATES[1]
    times(monkeypatch, *[RuntimeError("out of resource")] * 3)
    with pytest.raises(RuntimeError, match="none of 3 configurations"):
        measure(target)


@pytest.mark.parametrize(
    "content", ["", "[1, 2]", "{", "[" * 100_000, '{"kernel 4 256 float32": {"BLOCK": 2048}}', "\x00"]
)
def test_a_damaged_table_is_no_table(
    target: Target, folder: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    times(monkeypatch, 3.0, 2.0, 1.0)
    measure(target)
    (file,) = folder.rglob("*.json")
    file.write_text(content)
    tuning.forget()
    assert choose(target) == CANDIDATES[0]
    times(monkeypatch, 3.0, 2.0, 4.0)
    assert measure(target) == CANDIDATES[1]
    tuning.forget()
    assert choose(target) == CANDIDATES[1]


def test_tables_are_bounded(target: Target, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "MAX_ENTRIES", 3)
    for n in range(5):
        times(monkeypatch, 3.0, 2.0, 1.0)
        tuning.measure("kernel", (n,), target, CANDIDATES, lambda sizes: [])
    (file,) = folder.rglob("*.json")
    assert list(json.loads(file.read_text())) == ["kernel 2", "kernel 3", "kernel 4"]


def test_a_folder_that_cannot_be_written_costs_nothing(
    target: Target, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "file").write_text("")
    monkeypatch.setenv("HEEDFUL_CACHE_DIR", str(folder / "file"))
    times(monkeypatch, 3.0, 2.0, 1.0)
    assert measure(target) == CANDIDATES[2]
    assert choose(target) == CANDIDATES[2]


def test_the_folder_is_the_users_unless_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HEEDFUL_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert tuning.cache_folder() == tmp_path / "xdg" / "heedful"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tuning.cache_folder() == tmp_path / ".cache" / "heedful"


def test_operators_warm_up_and_give_the_same_afterwards(device: torch.device, folder: Path) -> None:
    rng = np.random.default_rng(0)
    q, k, weights = (
        torch.from_numpy(rng.standard_normal(s, np.float32)).to(device) for s in ((2, 2, 16), (90, 16), (2, 2))
    )
    scores, chosen = index_scores.index_scores(q, k, weights), index_top_k.index_top_k(q, k, weights, 5, sorted=False)
    scoring = Scoring.contiguous(q, k, weights, None, None, None)
    assert isinstance(top_k.warm_up(scores, 5), Sizes)
    index_scores.warm_up(scoring)
    index_top_k.warm_up(scoring, 5)
    (file,) = folder.rglob("*.json")
    assert len(json.loads(file.read_text())) == 3
    torch.testing.assert_close(index_scores.index_scores(q, k, weights), scores)
    assert torch.equal(index_top_k.index_top_k(q, k, weights, 5, sorted=False), chosen)


def test_no_launch_measures(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> float:
        raise AssertionError("a launch was timed")

    monkeypatch.setattr(tuning, "_seconds", refuse)
    runs = []
    monkeypatch.setattr(Launch, "run", lambda launch: runs.append(launch))
    top_k.top_k(torch.zeros((2, 50), device=device), 3, sorted=False)
    assert len(runs) == 1


def test_older_releases_of_triton_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(triton, "knobs")
    with pytest.raises(ImportError, match=r"expected Triton 3.4 or newer \(torch 2.8 or newer\), found \d"):
        check_triton()
