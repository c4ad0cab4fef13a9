"""The engine on the built-in model against transformers on the same checkpoint: prefill and decode.

One request at a time, float32 on both sides, in one process. The ratio is transformers' time over ours.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import transformers

from heedful import LLM, SamplingParams, builtin

DECODED = 32
"""Tokens decoded in a run."""

Peer = Callable[[list[int]], tuple[float, float]]
"""From a prompt to seconds of prefill and of one decoded token."""


def ours(llm: LLM, prompt: list[int]) -> tuple[float, float]:
    """Seconds of prefill and of one decoded token."""
    params = SamplingParams(temperature=0.0, max_tokens=DECODED + 1, ignore_eos=True)
    metrics = llm.generate(prompt, params, progress=False)[0].metrics
    assert metrics.decode_tokens_per_second is not None
    return metrics.time_to_first_token or 0.0, 1 / metrics.decode_tokens_per_second


@torch.inference_mode()
def theirs(model: transformers.PreTrainedModel, prompt: list[int]) -> tuple[float, float]:
    """The same of transformers, with its own cache."""
    start = time.perf_counter()
    out = model(input_ids=torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
    prefill = time.perf_counter()
    for _ in range(DECODED):
        token = out.logits[:, -1:].argmax(-1)
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
    return prefill - start, (time.perf_counter() - prefill) / DECODED


def median(run: Peer, prompt: list[int], repeats: int) -> tuple[float, float]:
    """Medians of each of the two times, after one run that is not counted."""
    run(prompt)
    runs = [run(prompt) for _ in range(repeats)]
    return statistics.median(r[0] for r in runs), statistics.median(r[1] for r in runs)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 2048, 8000], help="prompt lengths in tokens")
    parser.add_argument("--repeats", type=int, default=3, help="counted runs of each cell")
    args = parser.parse_args()
    options = {"dtype": "float32", "kv_cache_tokens": max(args.contexts) + 2 * DECODED}
    peers: dict[str, Peer] = {}
    for attention in ("sparse", "dense"):
        llm = LLM(attention=attention, **options)
        peers[f"heedful {attention}"] = lambda prompt, llm=llm: ours(llm, prompt)
    model = transformers.DeepseekV32ForCausalLM.from_pretrained(builtin.path(), dtype=torch.float32).eval()
    peers["transformers"] = lambda prompt: theirs(model, prompt)
    text = builtin.path().joinpath("tokenizer.json").read_text(encoding="utf-8")  # any long text will do
    tokens = llm.tokenizer.encode(text[: 20 * max(args.contexts)]) if llm.tokenizer else []

    print(f"built-in model, float32, {torch.get_num_threads()} threads, medians of {args.repeats}\n")
    print(f"{'context':>8} {'':<15} {'prefill tok/s':>14} {'ratio':>7} {'decode ms/tok':>14} {'ratio':>7}")
    for context in args.contexts:
        times = {name: median(run, tokens[:context], args.repeats) for name, run in peers.items()}
        base = times["transformers"]
        for name, (prefill, decode) in times.items():
            print(
                f"{context:>8} {name:<15} {context / prefill:>14,.0f} {base[0] / prefill:>6.1f}x"
                f" {1000 * decode:>14.2f} {base[1] / decode:>6.1f}x",
                flush=True,
            )


if __name__ == "__main__":
    main()
