"""What a machine tells about its memory, under a root folder of our own."""

from __future__ import annotations

from pathlib import Path

import pytest

from heedful.memory import available_memory, total_memory

GIB = 2**30
MEMINFO = f"MemTotal: {16 * GIB // 1024} kB\nMemFree: 1 kB\nMemAvailable: {10 * GIB // 1024} kB\n"


def files(root: Path, **contents: str) -> Path:
    for name, content in contents.items():
        file = root / name.replace("__", "/").replace("DOT", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    return root


V1, V2 = "sys__fs__cgroup__memory__memoryDOT", "sys__fs__cgroup__memoryDOT"


def version_2(limit: str) -> dict[str, str]:
    stat = f"anon 5\nactive_file {GIB}\ninactive_file {GIB}\n"
    return {f"{V2}max": limit, f"{V2}current": str(3 * GIB), f"{V2}stat": stat}


def version_1(limit: str) -> dict[str, str]:
    stat = f"cache 5\nactive_file 0\ninactive_file {GIB}\n"
    return {f"{V1}limit_in_bytes": limit, f"{V1}usage_in_bytes": str(2 * GIB), f"{V1}stat": stat}


@pytest.mark.parametrize(
    ("groups", "total", "available"),
    [
        pytest.param({}, 16 * GIB, 10 * GIB, id="no_group"),
        pytest.param(version_2("max\n"), 16 * GIB, 10 * GIB, id="no_limit"),
        pytest.param(version_2(f"{4 * GIB}\n"), 4 * GIB, 3 * GIB, id="limit_less_what_is_taken_but_for_file_pages"),
        pytest.param(version_2(f"{64 * GIB}"), 16 * GIB, 10 * GIB, id="limit_above_the_machine"),
        pytest.param(version_2(str(GIB // 2)), GIB // 2, 0, id="over_the_limit"),
        pytest.param(version_1(str(6 * GIB)), 6 * GIB, 5 * GIB, id="version_1"),
        pytest.param(version_1("9223372036854771712"), 16 * GIB, 10 * GIB, id="version_1_without_a_limit"),
        pytest.param({f"{V2}max": "1"}, 16 * GIB, 10 * GIB, id="files_missing"),
        pytest.param({**version_2("1"), f"{V2}stat": "nonsense"}, 16 * GIB, 10 * GIB, id="files_unreadable"),
    ],
)
def test_the_lower_of_machine_and_container_counts(
    groups: dict[str, str], total: int, available: int, tmp_path: Path
) -> None:
    root = files(tmp_path, proc__meminfo=MEMINFO, **groups)
    assert (total_memory(root), available_memory(root)) == (total, available)


def test_this_machine_tells_something_sensible() -> None:
    total, available = total_memory(), available_memory()
    assert total is not None
    assert available is not None
    assert 2**26 < total < 2**50
    assert 0 < available <= total


def test_a_system_without_these_names_tells_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(name: str) -> int:
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr("os.sysconf", unknown)
    assert total_memory(tmp_path) is None
    assert available_memory(tmp_path) is None
