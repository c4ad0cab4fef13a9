"""`heedful generate`: continue one prompt, streaming."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from heedful.cli.report import HelpFormatter

if TYPE_CHECKING:
    from heedful import LLM, RequestOutput, SamplingParams

MAX_PROMPT_BYTES = 64 * 2**20
"""A longer prompt is refused: no context holds it."""


MAX_THREADS = 1024


def add_parser(subparsers: Any) -> None:
    """Adds the command to the `heedful` parser."""
    parser = subparsers.add_parser(
        "generate",
        help="continue a prompt",
        description="Continue a prompt, printing the text as it comes. The measures go to standard error.",
        epilog="Example: heedful generate 'The first thing to know is' --max-tokens 50 --temperature 0.7",
        formatter_class=HelpFormatter,
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("prompt", nargs="?", help="the prompt; without it and --file, standard input is read")
    source.add_argument("--file", type=Path, metavar="PATH", help="read the prompt from a UTF-8 text file")
    model = parser.add_argument_group("model")
    model.add_argument("--model", metavar="DIR", help="checkpoint directory (default: the small built-in model)")
    model.add_argument(
        "--device", default="auto", metavar="NAME", help="cpu, cuda or cuda:N; auto is the first GPU if there is one"
    )
    model.add_argument("--attention", choices=("sparse", "dense"), default="sparse", help="dense reads every key")
    model.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of weights and activations; auto is the checkpoint's own",
    )
    model.add_argument(
        "--kv-cache-dtype",
        choices=("auto", "float32", "bfloat16", "fp8"),
        default="auto",
        help="of the caches' rows; auto is that of the weights",
    )
    model.add_argument("--kv-cache-tokens", type=int, metavar="N", help="tokens the caches hold (default: what fits)")
    model.add_argument(
        "--device-latent-tokens",
        type=int,
        metavar="N",
        help="tokens whose latent rows stay on the device; the host's memory holds the others (default: all of them)",
    )
    model.add_argument(
        "--max-model-len", type=int, metavar="N", help="longest prompt and output (default: the model's)"
    )
    model.add_argument("--max-batched-tokens", type=int, default=2048, metavar="N", help="tokens computed in one step")
    model.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--max-tokens", type=int, default=256, metavar="N", help="tokens to generate at most")
    sampling.add_argument("--temperature", type=float, default=1.0, metavar="X", help="0 takes the most likely token")
    sampling.add_argument(
        "--top-p", type=float, default=1.0, metavar="X", help="keep the most likely tokens up to this sum"
    )
    sampling.add_argument("--top-k", type=int, default=0, metavar="N", help="keep this many tokens; 0 keeps all")
    sampling.add_argument(
        "--min-p", type=float, default=0.0, metavar="X", help="drop tokens less likely than this share of the best"
    )
    sampling.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="X", help="above 1 discourages repetition"
    )
    sampling.add_argument("--seed", type=int, default=0, metavar="N", help="makes the draws repeatable")
    sampling.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end at this text; may be repeated"
    )
    sampling.add_argument("--ignore-eos", action="store_true", help="do not stop at the end of sequence")
    parser.add_argument("--quiet", action="store_true", help="print the text alone")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    prompt = _read_prompt(args)
    import torch

    import heedful

    if args.threads is not None:
        if not 1 <= args.threads <= MAX_THREADS:
            raise ValueError(f"--threads: expected 1 to {MAX_THREADS}, got {args.threads}")
        heedful.set_num_threads(args.threads)
        torch.set_num_threads(args.threads)
    params = heedful.SamplingParams(
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        max_tokens=args.max_tokens,
        stop=args.stop,
        seed=args.seed,
        repetition_penalty=args.repetition_penalty,
        ignore_eos=args.ignore_eos,
    )
    llm = heedful.LLM(
        args.model,
        device=args.device,
        dtype=args.dtype,
        kv_cache_dtype=args.kv_cache_dtype,
        kv_cache_tokens=args.kv_cache_tokens,
        device_latent_tokens=args.device_latent_tokens,
        max_model_len=args.max_model_len,
        max_batched_tokens=args.max_batched_tokens,
        max_num_seqs=1,
        attention=args.attention,
    )
    output = _stream(llm, prompt, params, progress=not args.quiet)
    if not args.quiet:
        _print_measures(llm, output)
    return 0


def _read_prompt(args: argparse.Namespace) -> str:
    if args.file is not None:
        with args.file.open("rb") as stream:
            return _text(f"--file: {args.file}", stream)
    if args.prompt is not None:
        try:
            args.prompt.encode()
        except UnicodeEncodeError as error:  # bytes of the command line that are no text
            raise ValueError(f"prompt: expected UTF-8 text: {error}") from error
        return args.prompt
    if sys.stdin.isatty():
        print("Type a prompt, then Ctrl-D:", file=sys.stderr)
    return _text("standard input", sys.stdin.buffer)


def _text(name: str, stream: BinaryIO) -> str:
    """All of a stream, as it is: line ends stay."""
    content = stream.read(MAX_PROMPT_BYTES + 1)
    if len(content) > MAX_PROMPT_BYTES:
        raise ValueError(f"{name}: expected at most {MAX_PROMPT_BYTES} bytes")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: expected UTF-8 text: {error}") from error


def _stream(llm: LLM, prompt: str, params: SamplingParams, *, progress: bool) -> RequestOutput:
    """Prints the continuation as it comes; the final output."""
    from tqdm import tqdm

    engine = llm.engine
    engine.add_request("prompt", prompt, params)
    printed = 0
    bar: tqdm | None = None
    while True:
        (output,) = engine.step()
        if progress and bar is None:
            bar = tqdm(total=len(output.prompt_token_ids), desc="Reading", unit="token", leave=False, disable=None)
        if bar is not None and output.metrics.first_token_time is None:
            bar.update(output.metrics.computed_tokens - bar.n)
        elif bar is not None:
            bar.close()
        text = output.outputs[0].text
        print(text[printed:], end="", flush=True)
        printed = len(text)
        if output.finished:
            print(flush=True)
            return output


def _print_measures(llm: LLM, output: RequestOutput) -> None:
    metrics, completion, caches, tier = output.metrics, output.outputs[0], llm.caches, llm.host_tier
    stats = llm.engine.scheduler.stats()
    latent = _cache_row(caches.latent_bytes, caches.num_blocks, stats["peak_used_blocks"])
    if tier is not None:
        latent = (
            f"{caches.latent_bytes / 2**20:,.2f} MiB on the device, {tier.bytes / 2**20:,.1f} MiB on the host; "
            f"{stats['fetched_rows']:,} rows fetched, {stats['stored_blocks']:,} blocks stored"
        )

    def rate(value: float | None) -> str:
        return "-" if value is None else f"{value:,.1f} tokens/s"

    rows = {
        "prompt": f"{metrics.prompt_tokens:,} tokens",
        "generated": f"{metrics.output_tokens:,} tokens, ended by {completion.finish_reason}",
        "time to first token": f"{metrics.time_to_first_token or 0:.2f} s",
        "prefill": rate(metrics.prefill_tokens_per_second),
        "decode": rate(metrics.decode_tokens_per_second),
        "share of keys read": f"{metrics.share_of_keys_read or 0:.1%} (index_topk {llm.config.index_topk})",
        "latent cache": latent,
        "index-key cache": _cache_row(caches.index_bytes, caches.num_blocks, stats["peak_used_blocks"]),
    }
    print(file=sys.stderr)
    for name, value in rows.items():
        print(f"{name + ':':<21}{value}", file=sys.stderr)


def _cache_row(total: int, num_blocks: int, used_blocks: int) -> str:
    used = total // num_blocks * used_blocks
    return f"{used / 2**20:,.2f} MiB used of {total / 2**20:,.1f} MiB"
