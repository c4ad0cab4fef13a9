"""A checkpoint's tensors: which there must be, where they are, and reading them one at a time.

`tensor_shapes` is the single list of names and shapes. Files may hold experts packed or one by one, weights in
float32, float16, bfloat16 or FP8 with a scale for each block; what comes out is always packed, in one dtype. torch
is imported when tensors are read.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heedful.config import ModelConfig
from heedful.safetensors_header import TensorInfo, read_header, shown

if TYPE_CHECKING:
    import torch

INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_FILE = "model.safetensors"
MAX_INDEX_BYTES = 64 * 2**20
"""A larger index file is refused unread: those of published models take a fifth of it."""

DEFAULT_BLOCK = (128, 128)
"""Rows and columns that share a scale where an FP8 checkpoint's configuration does not say."""

_FLOAT_DTYPES = ("F32", "F16", "BF16")
_SHOWN = 10  # names listed in one message at most
_MAX_MISSING = 10_000  # a file this far from its configuration is not searched further


class Checkpoint:
    """The tensors of a checkpoint directory, single-file or sharded. Only headers are read.

    Args:
        directory: holds model.safetensors, or model.safetensors.index.json and its shards.

    Raises:
        FileNotFoundError: there are no weights, or a shard is missing.
        ValueError: the index or a header is damaged; the message names the file and the tensor.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self.tensors: dict[str, TensorInfo] = {}
        """What and where each tensor is, by its name in the files."""
        index, file = self.directory / INDEX_FILE, self.directory / WEIGHTS_FILE
        if file.is_file():  # before the index, as in transformers
            self.tensors = read_header(file)
            return
        if not index.is_file():
            raise FileNotFoundError(f"{self.directory}: neither {WEIGHTS_FILE} nor {INDEX_FILE} is there")
        weight_map = _read_weight_map(index)
        headers = {shard: read_header(self.directory / shard) for shard in sorted(set(weight_map.values()))}
        for name, shard in weight_map.items():
            if name not in headers[shard]:
                raise ValueError(f"{INDEX_FILE}: tensor {shown(name)} is not in {shard}, where the index puts it")
            self.tensors[name] = headers[shard][name]
        for shard, header in headers.items():
            if stray := [name for name in header if weight_map.get(name) != shard]:
                raise ValueError(f"{shard}: tensors the index does not put there: {_listed(stray)}")


def _read_weight_map(index: Path) -> dict[str, str]:
    if (size := index.stat().st_size) > MAX_INDEX_BYTES:
        raise ValueError(f"{INDEX_FILE}: expected at most {MAX_INDEX_BYTES} bytes, got {size}")
    try:
        values = json.loads(index.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{INDEX_FILE}: expected JSON: {error}") from error
    weight_map = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{INDEX_FILE}: weight_map: expected an object of tensor names and files")
    found: set[str] = set()
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not re.fullmatch(r"[\w.-]+\.safetensors", shard):
            raise ValueError(
                f"{INDEX_FILE}: tensor {shown(name)}: expected a safetensors file name, got {shown(shard)}"
            )
        if shard not in found and not (index.parent / shard).is_file():
            raise FileNotFoundError(f"{INDEX_FILE}: tensor {shown(name)}: no file {shard} in {index.parent}")
        found.add(shard)
    return weight_map


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's tensors, routed experts packed: the keys of `DSAForCausalLM.state_dict()`."""
    hidden = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        parts = {
            "input_layernorm.weight": (hidden,),
            **{f"self_attn.{name}": shape for name, shape in _attention_shapes(config, layer).items()},
            "post_attention_layernorm.weight": (hidden,),
            **{f"mlp.{name}": shape for name, shape in _feed_forward_shapes(config, layer).items()},
        }
        shapes.update((prefix + name, shape) for name, shape in parts.items())
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def _attention_shapes(config: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
    hidden, heads = config.hidden_size, config.num_attention_heads
    nope, rope, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "q_a_proj.weight": (config.q_lora_rank, hidden),
        "q_a_layernorm.weight": (config.q_lora_rank,),
        "q_b_proj.weight": (heads * (nope + rope), config.q_lora_rank),
        "kv_a_proj_with_mqa.weight": (config.kv_lora_rank + rope, hidden),
        "kv_a_layernorm.weight": (config.kv_lora_rank,),
        "kv_b_proj.weight": (heads * (nope + value), config.kv_lora_rank),
        "o_proj.weight": (hidden, heads * value),
    }
    if config.attention_bias:
        for name in ("q_a_proj", "kv_a_proj_with_mqa", "o_proj"):
            shapes[f"{name}.bias"] = shapes[f"{name}.weight"][:1]
    if config.indexer_types[layer] == "full":
        shapes |= {
            "indexer.wq_b.weight": (config.index_n_heads * config.index_head_dim, config.q_lora_rank),
            "indexer.wk.weight": (config.index_head_dim, hidden),
            "indexer.k_norm.weight": (config.index_head_dim,),
            "indexer.k_norm.bias": (config.index_head_dim,),
            "indexer.weights_proj.weight": (config.index_n_heads, hidden),
        }
    return shapes


def _feed_forward_shapes(config: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
    hidden = config.hidden_size

    def gated(prefix: str, width: int) -> dict[str, tuple[int, ...]]:
        return {
            f"{prefix}gate_proj.weight": (width, hidden),
            f"{prefix}up_proj.weight": (width, hidden),
            f"{prefix}down_proj.weight": (hidden, width),
        }

    if config.mlp_layer_types[layer] == "dense":
        return gated("", config.intermediate_size)
    experts, width = config.n_routed_experts, config.moe_intermediate_size
    return {
        "gate.weight": (experts, hidden),
        "gate.e_score_correction_bias": (experts,),
        "experts.gate_up_proj": (experts, 2 * width, hidden),
        "experts.down_proj": (experts, hidden, width),
        **gated("shared_experts.", width * config.n_shared_experts),
    }


def keep_float32(name: str) -> bool:
    """Whether a tensor stays float32 in a model of any dtype: norms, the router's bias, the indexer's head weights."""
    return "norm" in name or name.endswith(("e_score_correction_bias", "weights_proj.weight"))


def read_state(
    checkpoint: Checkpoint, config: ModelConfig, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, torch.Tensor]]:
    """Reads a model's tensors one at a time, under the names of `tensor_shapes`. All are looked for at once.

    Args:
        checkpoint: the files.
        config: their configuration.
        dtype: of every tensor that `keep_float32` does not name.
        device: where tensors go.

    Returns:
        Names and tensors; each is read when the iterator comes to it.

    Raises:
        ValueError: a tensor is missing, unknown, misshaped, of a dtype that cannot be read, or not finite. Only the
            last is found while iterating.
    """
    return _read(checkpoint, config, find_sources(checkpoint, config), dtype, device)


def _read(
    checkpoint: Checkpoint,
    config: ModelConfig,
    sources: dict[str, list[str]],
    dtype: torch.dtype,
    device: torch.device,
) -> Iterator[tuple[str, torch.Tensor]]:
    import torch
    from safetensors import SafetensorError, safe_open

    shapes = tensor_shapes(config)
    with ExitStack() as stack:
        opened: dict[Path, Any] = {}

        def read(name: str, wanted: torch.dtype) -> torch.Tensor:
            info = checkpoint.tensors[name]
            try:
                if info.file not in opened:
                    opened[info.file] = stack.enter_context(safe_open(info.file, framework="pt", device=str(device)))
                tensor = opened[info.file].get_tensor(name)
            except SafetensorError as error:
                raise ValueError(f"{info.file.name}: tensor {shown(name)}: {error}") from error
            if info.dtype == "F8_E4M3":
                scale = read(f"{name}_scale_inv", torch.float32)
                tensor = dequantize_blocks(tensor, scale, config.weight_block_size)
            tensor = tensor.to(wanted)
            if not bool(tensor.isfinite().all()):  # after the conversion, which may overflow
                raise ValueError(
                    f"{info.file.name}: tensor {shown(name)}: expected finite numbers in {wanted}, got NaN or infinity"
                )
            return tensor

        for name, parts in sources.items():
            wanted = torch.float32 if keep_float32(name) else dtype
            if parts == [name]:
                yield name, read(name, wanted)
                continue
            # One by one into their place: the packed tensor and one expert are all that is held.
            packed = torch.empty(shapes[name], dtype=wanted, device=device)
            rows = packed.view(len(parts), -1, packed.shape[-1])
            for row, part in zip(rows, parts, strict=True):
                row.copy_(read(part, wanted))
            yield name, packed


def dequantize_blocks(
    weight: torch.Tensor, scale_inv: torch.Tensor, block_size: tuple[int, int] | None
) -> torch.Tensor:
    """w = w_fp8 * scale, one scale for each block.

    Args:
        weight: [rows, columns] float8_e4m3fn.
        scale_inv: [ceil(rows / block rows), ceil(columns / block columns)] float32.
        block_size: rows and columns of a block.

    Returns:
        [rows, columns] float32.
    """
    import torch

    rows, columns = block_size or DEFAULT_BLOCK
    column_block = torch.arange(weight.shape[1], device=weight.device) // columns
    scales = scale_inv.float()[:, column_block]  # [row blocks, columns]: far smaller than the weight
    values = weight.float()
    for block, part in enumerate(values.split(rows)):
        part *= scales[block]
    return values


def find_sources(checkpoint: Checkpoint, config: ModelConfig) -> dict[str, list[str]]:
    """Which tensors of the files make up each tensor of the model, in order; checks names, shapes and dtypes.

    Raises:
        ValueError: as for `read_state`.
    """
    tensors = checkpoint.tensors
    expected = tensor_shapes(config)
    sources: dict[str, list[str]] = {}
    part_shapes: dict[str, tuple[int, ...]] = {}
    missing: list[str] = []
    for name, shape in expected.items():
        parts = _expert_parts(name, config) if name not in tensors else [name]
        part_shape = shape if parts == [name] else _expert_shape(name, config)
        sources[name] = parts
        part_shapes.update(dict.fromkeys(parts, part_shape))
        missing += [part for part in parts if part not in tensors]
        if len(missing) > _MAX_MISSING:
            break
    if missing:
        raise ValueError(f"missing tensors: {_listed(missing)}")
    for name, shape in part_shapes.items():
        if tensors[name].shape != shape:
            raise _error(tensors[name], name, f"shape {list(shape)}", list(tensors[name].shape))
    scales = _check_dtypes(tensors, part_shapes, config)
    extra = [
        name for name in tensors if name not in part_shapes and name not in scales and not _is_skipped(name, config)
    ]
    if extra:
        raise ValueError(f"unknown tensors: {_listed(extra)}")
    return sources


def _check_dtypes(tensors: dict[str, TensorInfo], wanted: dict[str, tuple[int, ...]], config: ModelConfig) -> set[str]:
    """Names of the scales that the FP8 tensors need, once dtypes and the scales' shapes are found right."""
    scales = set()
    for name, shape in wanted.items():
        dtype = tensors[name].dtype
        if dtype in _FLOAT_DTYPES:
            continue
        if dtype != "F8_E4M3" or len(shape) != 2:
            allowed = ", ".join(_FLOAT_DTYPES) + (" or F8_E4M3" if len(shape) == 2 else "")
            raise _error(tensors[name], name, f"dtype {allowed}", dtype)
        scale = f"{name}_scale_inv"
        if scale not in tensors:
            raise ValueError(f"missing tensors: {shown(scale)}, the scale of an FP8 tensor")
        rows, columns = config.weight_block_size or DEFAULT_BLOCK
        expected = (-(-shape[0] // rows), -(-shape[1] // columns))
        if tensors[scale].shape != expected:
            raise _error(tensors[scale], scale, f"shape {list(expected)}", list(tensors[scale].shape))
        if tensors[scale].dtype not in _FLOAT_DTYPES:
            raise _error(tensors[scale], scale, f"dtype {', '.join(_FLOAT_DTYPES)}", tensors[scale].dtype)
        scales.add(scale)
    return scales


def _expert_parts(name: str, config: ModelConfig) -> list[str]:
    """The tensors of single experts that a packed one is made of; the name itself for any other tensor."""
    prefix, found, kind = name.rpartition(".experts.")
    if not found:
        return [name]
    projections = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
    return [
        f"{prefix}.experts.{expert}.{projection}.weight"
        for expert in range(config.n_routed_experts)
        for projection in projections
    ]


def _expert_shape(name: str, config: ModelConfig) -> tuple[int, int]:
    hidden, width = config.hidden_size, config.moe_intermediate_size
    return (width, hidden) if name.endswith("gate_up_proj") else (hidden, width)


def _is_skipped(name: str, config: ModelConfig) -> bool:
    """Tensors a checkpoint may hold and this model does not use: the MTP layers behind the last, RoPE's buffers."""
    if name.endswith("rotary_emb.inv_freq"):
        return True
    if config.tie_word_embeddings and name == "lm_head.weight":
        return True
    layer = re.match(r"model\.layers\.(\d{1,9})\.", name)
    return layer is not None and 0 <= int(layer[1]) - config.num_hidden_layers < config.num_nextn_predict_layers


def _listed(names: list[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(map(shown, names[:_SHOWN])) + (f" and {rest} more" if rest > 0 else "")


def _error(info: TensorInfo, name: str, expected: str, got: object) -> ValueError:
    return ValueError(f"{info.file.name}: tensor {shown(name)}: expected {expected}, got {shown(got)}")
