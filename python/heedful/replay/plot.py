"""A picture of a replay: running and waiting requests, cache use and hit share over time. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path

from heedful.replay.result import ReplayResult


def plot(result: ReplayResult, path: str | Path, title: str) -> None:
    """Draws a replay into a file.

    Args:
        result: the replay.
        path: the file; its suffix (.png, .svg, .pdf) says the format.
        title: stands above it.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: a suffix that matplotlib cannot write.
    """
    from matplotlib.figure import Figure

    series = result.series.columns()
    figure = Figure(figsize=(9, 7), layout="constrained")
    requests, waiting, shares = figure.subplots(3, 1, sharex=True)
    requests.plot(series["time"], series["running"], color="C0", label="running")
    waiting.plot(series["time"], series["waiting"], color="C1", label="waiting")
    shares.plot(series["time"], [100 * share for share in series["used_share"]], color="C2", label="blocks in use")
    shares.plot(series["time"], [100 * share for share in series["hit_share"]], color="C3", label="prompt tokens found")
    for axes, label in ((requests, "requests"), (waiting, "requests"), (shares, "%")):
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(loc="upper left")
    shares.set_xlabel("simulated seconds")
    figure.suptitle(title)
    figure.savefig(path)
