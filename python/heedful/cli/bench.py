"""`heedful bench`: measures that need no model. `bench replay` runs a request trace through the real scheduler."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heedful.cli.report import HelpFormatter, print_json, print_section

if TYPE_CHECKING:
    from heedful import SchedulerConfig
    from heedful.replay import CostModel, ReplayResult

_PLOT_SUFFIXES = (".png", ".svg", ".pdf")

_DESCRIPTION = """\
Run a request trace through the real scheduler, with a simulated executor: nothing is computed, so an hour of traffic of
a large model takes minutes on a laptop. Formats: Mooncake's JSON lines (timestamp, input_length, output_length,
hash_ids) and Azure's CSV (TIMESTAMP,ContextTokens,GeneratedTokens).

How long a step takes is a roofline: weights and cache rows read over the memory bandwidth, or products, index scores
and attention over the compute rate, whichever is longer, and what is fetched from the host over its link; the formulas
stand in heedful/replay/cost.py. Times are simulated; only the scheduler's own are measured."""

_EPILOG = """\
Example: heedful bench replay --trace conversation_trace.jsonl --limit 1000 --plot replay.png"""


def add_parser(subparsers: Any) -> None:
    """Adds the command to the `heedful` parser."""
    parser = subparsers.add_parser("bench", help="replay request traces", description="Measures that need no model.")
    benches = parser.add_subparsers(title="benches", dest="bench", metavar="BENCH", required=True)
    replay = benches.add_parser(
        "replay",
        help="run a request trace through the scheduler",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=HelpFormatter,
    )
    replay.add_argument("--trace", type=Path, required=True, metavar="FILE", help="the trace")
    replay.add_argument("--limit", type=int, metavar="N", help="take the first N requests (default: all)")
    replay.add_argument("--speed", type=float, default=1.0, metavar="X", help="let requests arrive X times faster")
    replay.add_argument("--check-every", type=int, default=0, metavar="N", help="check the scheduler each N steps")
    output = replay.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print JSON, the state over time included")
    output.add_argument("--plot", type=Path, metavar="FILE", help="draw the state over time (.png, .svg or .pdf)")
    output.add_argument("--quiet", action="store_true", help="no progress")
    scheduler = replay.add_argument_group("scheduler")
    scheduler.add_argument("--kv-cache-tokens", type=int, default=2**20, metavar="N", help="tokens the caches hold")
    scheduler.add_argument("--block-size", type=int, default=64, metavar="N", help="tokens of a block")
    scheduler.add_argument("--max-batched-tokens", type=int, default=8192, metavar="N", help="tokens of a step")
    scheduler.add_argument("--max-num-seqs", type=int, default=256, metavar="N", help="requests that run at once")
    scheduler.add_argument(
        "--policy",
        choices=("fcfs", "priority", "longest_prefix", "fair", "deadline"),
        default="fcfs",
        help="who goes first",
    )
    scheduler.add_argument("--eviction", choices=("lru", "reuse"), default="reuse", help="which cached block goes")
    scheduler.add_argument("--no-prefix-caching", action="store_true", help="compute every prompt whole")
    tier = replay.add_argument_group("host tier")
    tier.add_argument(
        "--latent-tokens",
        type=int,
        metavar="N",
        help="latent rows that device memory holds; the rest lie in host memory (default: all on the device)",
    )
    tier.add_argument("--hot-rows", type=int, default=0, metavar="N", help="device rows that keep what was fetched")
    tier.add_argument(
        "--preemption",
        choices=("auto", "recompute", "swap"),
        default="auto",
        help="rows of a request that gives its blocks away: computed anew, kept on the host, or what costs less",
    )
    tier.add_argument(
        "--swap-tokens", type=int, metavar="N", help="rows kept for such requests (default: a quarter of the caches')"
    )
    model = replay.add_argument_group("model and machine")
    model.add_argument("--model", type=Path, metavar="PATH", help="config.json (default: DeepSeek-V3.2's sizes)")
    model.add_argument(
        "--kv-cache-dtype", choices=("float32", "bfloat16", "fp8"), default="fp8", help="of the caches' rows"
    )
    model.add_argument("--weight-bytes", type=float, default=1.0, metavar="X", help="bytes of a weight")
    model.add_argument("--memory-bandwidth", type=float, default=13.4, metavar="TB/s", help="of the device memory")
    model.add_argument("--compute", type=float, default=7900.0, metavar="TFLOP/s", help="of matrix products")
    model.add_argument("--host-bandwidth", type=float, default=200.0, metavar="GB/s", help="of the link to the host")
    model.add_argument("--step-overhead", type=float, default=2.0, metavar="MS", help="added to each step")
    replay.set_defaults(run=run_replay)


def run_replay(args: argparse.Namespace) -> int:
    """Runs `bench replay`."""
    from heedful.replay import read_trace, replay

    plot = _plotter(args.plot)
    config, cost = _scheduler_config(args), _cost_model(args)
    trace = read_trace(args.trace, args.limit)
    with _Progress(len(trace), quiet=args.quiet) as progress:
        result = replay(
            trace, config, cost, speed=args.speed, check_every=args.check_every, on_progress=progress.update
        )
    if args.json:
        print_json(result.as_dict())
    else:
        _print(args, config, result)
    if plot is not None:
        plot(result, args.plot, args.trace.name)
    return 0


def _plotter(path: Path | None) -> Callable[..., None] | None:
    """What draws, found before the work is done."""
    if path is None:
        return None
    if path.suffix.lower() not in _PLOT_SUFFIXES:
        raise ValueError(f"--plot: expected a file name that ends in {', '.join(_PLOT_SUFFIXES)}, got {str(path)!r}")
    if not path.parent.is_dir():
        raise ValueError(f"--plot: there is no directory {str(path.parent)!r}")
    import matplotlib  # noqa: F401

    from heedful.replay.plot import plot

    return plot


def _scheduler_config(args: argparse.Namespace) -> SchedulerConfig:
    from heedful import SchedulerConfig

    if args.block_size < 1:
        raise ValueError(f"--block-size: expected at least 1, got {args.block_size}")
    if args.check_every < 0:
        raise ValueError(f"--check-every: expected 0 or more, got {args.check_every}")
    return SchedulerConfig(
        num_blocks=_blocks("--kv-cache-tokens", args.kv_cache_tokens, args.block_size),
        block_size=args.block_size,
        max_batched_tokens=args.max_batched_tokens,
        max_num_seqs=args.max_num_seqs,
        policy=args.policy,
        enable_prefix_caching=not args.no_prefix_caching,
        eviction=args.eviction,
        hash_seed=0,
        num_latent_blocks=(
            None if args.latent_tokens is None else _blocks("--latent-tokens", args.latent_tokens, args.block_size)
        ),
        hot_rows=args.hot_rows,
        preemption=args.preemption,
        num_swap_blocks=(
            None if args.swap_tokens is None else _blocks("--swap-tokens", args.swap_tokens, args.block_size)
        ),
    )


def _blocks(option: str, tokens: int, block_size: int) -> int:
    if tokens < block_size:
        raise ValueError(f"{option}: expected at least a block of {block_size} tokens, got {tokens}")
    return tokens // block_size


def _cost_model(args: argparse.Namespace) -> CostModel:
    from heedful.config import ModelConfig
    from heedful.replay import CostModel, Hardware

    default = {"model_type": "deepseek_v32"}
    config = ModelConfig.from_dict(default) if args.model is None else ModelConfig.from_file(args.model)
    hardware = Hardware(
        memory_bandwidth=args.memory_bandwidth * 1e12,
        compute=args.compute * 1e12,
        host_bandwidth=args.host_bandwidth * 1e9,
        step_overhead=args.step_overhead * 1e-3,
    )
    return CostModel.of(config, hardware, args.kv_cache_dtype, args.weight_bytes)


class _Progress:
    """A bar where tqdm is installed, else a line for each tenth."""

    def __init__(self, total: int, *, quiet: bool) -> None:
        self._total, self._quiet, self._bar, self._tenth = total, quiet, None, 0

    def __enter__(self) -> _Progress:
        if not self._quiet:
            try:
                from tqdm import tqdm

                self._bar = tqdm(total=self._total, desc="Replaying", unit="request", leave=False, disable=None)
            except ModuleNotFoundError:
                pass
        return self

    def update(self, ended: int) -> None:
        """So many requests have ended."""
        if self._bar is not None:
            if ended != self._bar.n:
                self._bar.update(ended - self._bar.n)
        elif not self._quiet and ended * 10 // self._total > self._tenth:
            self._tenth = ended * 10 // self._total
            print(f"Replaying: {self._tenth * 10} %", file=sys.stderr)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


def _print(args: argparse.Namespace, config: SchedulerConfig, result: ReplayResult) -> None:
    from heedful.replay.result import percentiles

    stats = result.stats
    outcome = {
        "requests": f"{result.requests:,}: {result.finished:,} finished, {result.refused:,} refused",
        "time": f"{result.elapsed:,.1f} s simulated, {result.steps:,} steps",
        "prompt": f"{result.prompt_tokens:,} tokens, {result.hit_share:.1%} found in the cache ({config.eviction})",
        "generated": f"{result.output_tokens:,} tokens, {result.throughput:,.0f} tokens/s",
        "preemptions": f"{result.preemptions:,}, rows kept over {stats['swaps']:,} of them",
        "running at most": f"{result.peak_running:,}",
        "blocks in use at most": f"{stats['peak_used_blocks']:,} of {config.num_blocks:,}",
    }
    if result.refusal is not None:
        outcome["first refusal"] = result.refusal
    print_section(args.trace.name, outcome)
    latencies = {"time to first token": (result.ttft, 1.0, "s"), "time per token": (result.tpot, 1e3, "ms")}
    print_section(
        "Latency (simulated)", {name: _row(percentiles(v), f, unit) for name, (v, f, unit) in latencies.items()}
    )
    print_section("Scheduler (measured)", {"schedule + update": _row(percentiles(result.step_seconds), 1e6, "µs")})


def _row(values: dict[str, float] | None, factor: float, unit: str) -> str:
    if values is None:
        return "-"
    return ", ".join(f"{name} {value * factor:,.1f}" for name, value in values.items()) + f" {unit}"
