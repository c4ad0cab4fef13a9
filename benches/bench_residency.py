"""Concurrent long requests at one budget of device memory: all rows on the device, and latent rows in a host tier.

Requests of 128K prompt tokens arrive at once, and the replay's simulated executor runs them through the real
scheduler. With the tier, index keys (132 of 788 bytes a token and layer in FP8) stay on the device; what they leave of
the budget is pages and rows that were fetched. More requests at once is what the tier is for; what it costs is the
traffic over the host link, which the times show.

Then requests whose answers outgrow the blocks: preempted ones have their rows computed anew, or kept on the host.
"""

from __future__ import annotations

import argparse

from heedful import SchedulerConfig
from heedful.config import ModelConfig
from heedful.replay import CostModel, Hardware, ReplayResult, TraceRequest, replay

BLOCK = 64
BATCHED = 8192


def run(trace: list[TraceRequest], cost: CostModel, budget: float, tier: bool, hot_rows: int) -> ReplayResult:
    """Replays the trace within a budget of device bytes."""
    whole, keys, latent = cost.latent_bytes + cost.index_bytes, cost.index_bytes, cost.latent_bytes
    if not tier:
        config = SchedulerConfig(int(budget / (BLOCK * whole)), BLOCK, BATCHED, len(trace), enable_prefix_caching=False)
    else:
        pages = 2 * (BATCHED // BLOCK + 3 * len(trace))  # the fewest that the scheduler takes
        left = budget - pages * BLOCK * latent - hot_rows * latent
        blocks = int(left / (BLOCK * keys))
        config = SchedulerConfig(
            blocks, BLOCK, BATCHED, len(trace), enable_prefix_caching=False, num_latent_blocks=pages, hot_rows=hot_rows
        )
    return replay(trace, config, cost)


def outgrow(cost: CostModel, requests: int, prompt: int, output: int, preemption: str) -> ReplayResult:
    """Replays requests that all begin, with blocks for half of their answers."""
    trace = [TraceRequest(0.0, prompt, output, tuple(range(i * prompt, (i + 1) * prompt))) for i in range(requests)]
    blocks = requests * (prompt + output // 2) // BLOCK
    pages = 2 * (BATCHED // BLOCK + 3 * requests)
    config = SchedulerConfig(
        blocks,
        BLOCK,
        BATCHED,
        requests,
        watermark=0.0,
        enable_prefix_caching=False,
        num_latent_blocks=pages,
        hot_rows=65_536,
        preemption=preemption,  # type: ignore[arg-type]
    )
    return replay(trace, config, cost)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, default=131_072, help="tokens of a prompt")
    parser.add_argument("--output", type=int, default=900, help="tokens of an answer")
    parser.add_argument("--requests", type=int, default=45, help="how many arrive at once")
    parser.add_argument("--fits", type=float, default=8.1, help="requests that the budget holds without the tier")
    parser.add_argument("--hot-rows", type=int, default=65_536, help="fetched rows that the device keeps, a layer")
    args = parser.parse_args()
    cost = CostModel.of(ModelConfig.from_dict({"model_type": "deepseek_v32"}), Hardware())
    ids = -(-args.prompt // 512)
    trace = [
        TraceRequest(0.0, args.prompt, args.output, tuple(range(i * ids, (i + 1) * ids))) for i in range(args.requests)
    ]
    budget = args.fits * (args.prompt + args.output) * (cost.latent_bytes + cost.index_bytes)
    bound = (cost.latent_bytes + cost.index_bytes) / cost.index_bytes
    print(
        f"{args.requests} requests of {args.prompt:,} + {args.output:,} tokens, {budget / 2**30:,.1f} GiB for caches\n"
    )
    titles = f"{'at once':>8} {'finished':>9} {'time':>10} {'tokens/s':>9} {'fetched rows':>14} {'stored':>9}"
    print(f"{'host tier':<10} {titles}")
    results = {name: run(trace, cost, budget, name == "on", args.hot_rows) for name in ("off", "on")}
    for name, result in results.items():
        print(
            f"{name:<10} {result.peak_running:>8} {result.finished:>9} {result.elapsed:>8,.0f} s"
            f" {result.throughput:>9,.0f} {result.stats['fetched_rows']:>14,} {result.stats['stored_blocks']:>9,}"
        )
    ratio = results["on"].peak_running / results["off"].peak_running
    print(f"\nat once: {ratio:.2f} times (bound {bound:.2f})")
    print("\n32 requests of 16,384 + 1,536 tokens, blocks for half of the answers\n")
    print(f"{'preemption':<10} {'preempted':>10} {'rows kept':>10} {'time':>10} {'computed tokens':>16}")
    for preemption in ("recompute", "auto"):
        result = outgrow(cost, 32, 16_384, 1536, preemption)
        print(
            f"{preemption:<10} {result.preemptions:>10} {result.stats['swaps']:>10} {result.elapsed:>8,.1f} s"
            f" {result.stats['scheduled_tokens']:>16,}"
        )


if __name__ == "__main__":
    main()
