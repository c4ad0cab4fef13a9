"""`heedful inspect`: what a checkpoint holds, what it costs to run, and whether it is whole.

Only config.json and the headers of the safetensors files are read, so it is quick for any size and needs no torch.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from heedful.cli.report import bytes_text, count_text, print_json, print_section
from heedful.config import ModelConfig
from heedful.engine.cache_layout import bytes_per_token, cache_layout, supported_cache_dtypes
from heedful.weights import Checkpoint, find_sources, tensor_shapes

# Which part of the model a tensor belongs to: the first that its name contains.
_PARTS = (
    (".indexer.", "indexer"),
    (".self_attn.", "attention"),
    (".shared_experts.", "shared experts"),
    (".experts.", "experts"),
    (".mlp.gate.", "router"),
    (".mlp.", "dense MLP"),
    ("norm.", "norms"),
    ("", "embeddings"),
)


def add_parser(subparsers: Any) -> None:
    """Adds the command to the `heedful` parser."""
    parser = subparsers.add_parser(
        "inspect",
        help="show what a checkpoint holds and check that it is whole",
        description="Show a checkpoint's configuration, parameters and cache sizes, and check its tensors against "
        "the configuration. The exit status is 1 when a problem is found.",
    )
    parser.add_argument(
        "model", nargs="?", type=Path, help="checkpoint directory, or a config.json (default: the built-in model)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    path = args.model
    if path is None:
        from heedful import builtin

        path = builtin.path()
    report = describe(path)
    if args.json:
        print_json(report)
    else:
        _print(report)
    return 1 if report["problems"] else 0


def describe(path: Path) -> dict[str, Any]:
    """The facts about a checkpoint, as JSON has them.

    Args:
        path: its directory; or a config.json alone, and then there is nothing about files.

    Raises:
        FileNotFoundError, ValueError: there is no configuration that can be served.
    """
    config = ModelConfig.from_file(path)
    report: dict[str, Any] = {
        "path": str(path),
        "config": dataclasses.asdict(config),
        "parameters": _parameters(config),
        "cache": {dtype: _cache(config, dtype) for dtype in supported_cache_dtypes(config)},
        "files": {},
        "dtypes": {},
        "problems": [],
    }
    if path.is_dir():
        try:
            checkpoint = Checkpoint(path)
            report["files"], report["dtypes"] = _files(checkpoint), _dtypes(checkpoint)
            find_sources(checkpoint, config)
        except (ValueError, OSError) as error:
            report["problems"].append(str(error))
    return report


def _parameters(config: ModelConfig) -> dict[str, Any]:
    """Parameters by part; of the routed experts, a token goes through num_experts_per_tok of n_routed_experts."""
    parts: Counter[str] = Counter()
    for name, shape in tensor_shapes(config).items():
        parts[next(part for mark, part in _PARTS if mark in name)] += math.prod(shape)
    total = parts.total()
    idle = parts["experts"] // config.n_routed_experts * (config.n_routed_experts - config.num_experts_per_tok)
    order = [part for _, part in _PARTS if parts[part]]
    return {"total": total, "active_per_token": total - idle, "parts": {part: parts[part] for part in order}}


def _cache(config: ModelConfig, kv_cache_dtype: Any) -> dict[str, int]:
    layout = cache_layout(config, kv_cache_dtype)
    token = bytes_per_token(config, kv_cache_dtype)
    return {
        "latent_bytes_per_layer": layout.latent_width * layout.itemsize,
        "index_bytes_per_layer": layout.index_width * layout.itemsize,
        "bytes_per_token": token,
        "bytes_at_max_context": token * config.max_position_embeddings,
    }


def _files(checkpoint: Checkpoint) -> dict[str, int]:
    files = sorted({info.file for info in checkpoint.tensors.values()})
    return {file.name: file.stat().st_size for file in files}


def _dtypes(checkpoint: Checkpoint) -> dict[str, dict[str, int]]:
    tensors, sizes = Counter[str](), Counter[str]()
    for info in checkpoint.tensors.values():
        tensors[info.dtype] += 1
        sizes[info.dtype] += info.nbytes
    return {dtype: {"tensors": tensors[dtype], "bytes": size} for dtype, size in sizes.most_common()}


def _print(report: dict[str, Any]) -> None:
    config, parameters = report["config"], report["parameters"]
    print_section(report["path"], _config_rows(config))
    total = parameters["total"]
    rows = {part: f"{count_text(n):>10}  {n / total:6.1%}" for part, n in parameters["parts"].items()}
    rows["total"] = f"{count_text(total):>10}"
    rows["active per token"] = f"{count_text(parameters['active_per_token']):>10}"
    print_section("Parameters", rows)
    print_section(
        f"Cache (per layer: latent + index key; all layers; at {config['max_position_embeddings']:,} tokens)",
        {
            dtype: f"{cache['latent_bytes_per_layer']:,} + {cache['index_bytes_per_layer']:,} bytes; "
            f"{cache['bytes_per_token']:,} bytes a token; {bytes_text(cache['bytes_at_max_context'])}"
            for dtype, cache in report["cache"].items()
        },
    )
    if report["files"]:
        rows = {
            dtype: f"{values['tensors']:,} tensors, {bytes_text(values['bytes'])}"
            for dtype, values in report["dtypes"].items()
        }
        files = report["files"]
        print_section(f"Weights ({len(files)} files, {bytes_text(sum(files.values()))})", rows)
    if report["problems"]:
        print("Problems")
        for problem in report["problems"]:
            print(f"  {problem}")
    elif report["files"]:
        print("No problems: every tensor is there, of the shape and dtype it must have.")


def _config_rows(config: dict[str, Any]) -> dict[str, str]:
    mlp, indexer = config["mlp_layer_types"], config["indexer_types"]
    rows = {
        "model_type": config["model_type"],
        "vocab_size": f"{config['vocab_size']:,}",
        "hidden_size": f"{config['hidden_size']:,}",
        "layers": f"{len(mlp)}",
        "attention": f"{config['num_attention_heads']} heads, nope {config['qk_nope_head_dim']} + "
        f"rope {config['qk_rope_head_dim']}, v {config['v_head_dim']}",
        "latents": f"query {config['q_lora_rank']:,}, key and value {config['kv_lora_rank']}",
        "indexer": f"{config['index_n_heads']} heads x {config['index_head_dim']}, "
        f"top {config['index_topk']:,} keys, {_kinds(indexer, 'full', 'shared')}",
        "MLP": _kinds(mlp, "dense", "sparse"),
    }
    if "dense" in mlp:
        rows["dense MLP"] = f"width {config['intermediate_size']:,}"
    if "sparse" in mlp:
        rows["MoE"] = (
            f"{config['num_experts_per_tok']} of {config['n_routed_experts']} experts of width "
            f"{config['moe_intermediate_size']:,} + {config['n_shared_experts']} shared; "
            f"{config['topk_group']} of {config['n_group']} groups"
        )
    rope = config["rope"]
    yarn = f", YaRN x{rope['factor']:g} of {rope['original_max_position_embeddings']:,}"
    rows["RoPE"] = f"theta {rope['theta']:g}" + (yarn if rope["type"] == "yarn" else "")
    rows["context"] = f"{config['max_position_embeddings']:,} tokens"
    block = config["weight_block_size"]
    rows["dtype"] = config["dtype"] + (f", FP8 in blocks of {block[0]} x {block[1]}" if block else "")
    return rows


def _kinds(types: Iterable[str], first: str, second: str) -> str:
    """("dense", "dense", "sparse") -> "2 dense (layers 0-1), 1 sparse"."""
    numbers = [number for number, kind in enumerate(types) if kind == first]
    others = sum(kind == second for kind in types)
    if not numbers or not others:
        return f"every layer {first if numbers else second}"
    where = f"layer{'s' if len(numbers) > 1 else ''} {_ranges(numbers)}"
    return f"{len(numbers)} {first} ({where}), {others} {second}"


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 6] -> "0-2, 6"."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)
