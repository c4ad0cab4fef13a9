"""`LLM`: a model, its caches and an engine behind one call."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch
from tqdm import tqdm

from heedful import SchedulerConfig, Tokenizer
from heedful.config import ModelConfig
from heedful.engine.cache_layout import BLOCK_SIZE, KVCacheDtype, supported_cache_dtypes
from heedful.engine.cache_sizes import blocks_that_fit, check_fits, swap_blocks, tier_size
from heedful.engine.caches import KVCaches
from heedful.engine.engine import LLMEngine
from heedful.engine.graphs import CudaRecorder
from heedful.engine.host_tier import HostTier
from heedful.engine.outputs import RequestOutput
from heedful.engine.paged_attention import AttentionMode
from heedful.engine.placement import Placement
from heedful.engine.runner import ModelRunner
from heedful.engine.sampling_params import SamplingParams
from heedful.engine.tuning import shapes_of, tune
from heedful.memory import total_memory
from heedful.models import load_model
from heedful.weights import tensor_shapes

FLOAT32_SHARE = 0.25
"""Share of all memory that bfloat16 weights may take as float32 where that is quicker."""

_MAX_OPTION = 2**31 - 1


class TokensPrompt(TypedDict):
    """A prompt as token ids."""

    prompt_token_ids: list[int]


Prompt = str | Sequence[int] | TokensPrompt


class LLM:
    """Loads a DSA checkpoint and generates from it.

    Args:
        model: directory with config.json, safetensors and (for text) tokenizer.json; None takes the built-in model.
        device: "auto", "cpu", "cuda" or "cuda:N"; auto is the first GPU if torch sees one and Triton is there.
        dtype: "float32", "bfloat16" or "auto": the checkpoint's own, but float32 where the CPU has no bfloat16 products
            (AVX2 alone) and float32 weights take at most a quarter of the memory.
        kv_cache_dtype: "float32", "bfloat16", "fp8" or "auto", the model's dtype.
        kv_cache_tokens: tokens the caches hold; None takes what fits in a share of the free memory.
        max_model_len: longest prompt and output together; None takes the model's trained context.
        device_latent_tokens: tokens whose latent rows the device holds in pages, at least twice what a step writes; the
            host's memory holds those of all others (and keeps the rows of preempted requests), so that long contexts
            take only index keys of the device. Selected rows are fetched; decoding steps are not recorded as graphs
            then. None keeps every row on the device. Not with attention="dense", which reads every row.
        hot_rows: with device_latent_tokens, fetched rows that the device keeps for each layer; None for a quarter of
            device_latent_tokens, but as many as a query selects.
        max_batched_tokens: tokens computed in one step; longer prompts are computed in chunks of it.
        max_num_seqs: completions that run at the same time.
        enable_prefix_caching: keep the cache rows of ended requests for others that begin alike.
        attention: "sparse", or "dense" for the baseline that reads every key.
        seed: from which requests without a seed of their own draw one.
        backend: "auto", "cpu" (compiled operators, on the CPU) or "triton" (kernels, on a GPU; on the CPU under
            TRITON_INTERPRET=1, slowly, to test them).
        enforce_eager: on a GPU, launch decoding steps kernel by kernel rather than as CUDA graphs, which are recorded
            while the model is loaded.
        tune_kernels: measure the kernels' configurations for this model's shapes while it is loaded, with Triton's
            backend; the tables are kept on disk, so later starts need not.

    Raises:
        ValueError: an argument, the configuration or a tensor is not what it must be; the message names it.
        FileNotFoundError: the directory or a file in it is missing.
        MemoryError: the caches do not fit.

    Example:
        >>> from heedful import LLM, SamplingParams
        >>> llm = LLM()  # doctest: +SKIP
        >>> llm.generate("The cat", SamplingParams(max_tokens=8))[0].outputs[0].text  # doctest: +SKIP
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        device: str = "auto",
        dtype: Literal["auto", "float32", "bfloat16"] = "auto",
        kv_cache_dtype: Literal["auto", "float32", "bfloat16", "fp8"] = "auto",
        kv_cache_tokens: int | None = None,
        device_latent_tokens: int | None = None,
        hot_rows: int | None = None,
        max_model_len: int | None = None,
        max_batched_tokens: int = 8192,
        max_num_seqs: int = 256,
        enable_prefix_caching: bool = True,
        attention: AttentionMode = "sparse",
        seed: int = 0,
        backend: Literal["auto", "cpu", "triton"] = "auto",
        enforce_eager: bool = False,
        tune_kernels: bool = False,
    ) -> None:
        placement = Placement.choose(device, backend)
        _check_choice("dtype", dtype, ("auto", "float32", "bfloat16"))
        _check_choice("kv_cache_dtype", kv_cache_dtype, ("auto", "float32", "bfloat16", "fp8"))
        _check_choice("attention", attention, ("sparse", "dense"))
        for name, value in (
            ("kv_cache_tokens", kv_cache_tokens),
            ("device_latent_tokens", device_latent_tokens),
            ("hot_rows", hot_rows),
            ("max_model_len", max_model_len),
            ("max_batched_tokens", max_batched_tokens),
            ("max_num_seqs", max_num_seqs),
        ):
            _check_positive(name, value)
        if attention == "dense" and device_latent_tokens is not None:
            raise ValueError(
                f"device_latent_tokens: expected None with attention='dense', which reads every row, "
                f"got {device_latent_tokens}"
            )
        path = _model_path(model)
        self.config = ModelConfig.from_file(path)
        self.device = placement.device
        self.dtype = _model_dtype(self.config, dtype, placement)
        cache_dtype = _cache_dtype(self.config, self.dtype, kv_cache_dtype)
        max_model_len = _model_len(self.config, max_model_len)
        tier = tier_size(
            device_latent_tokens,
            hot_rows,
            selected=min(self.config.index_topk, max_model_len),
            max_batched_tokens=max_batched_tokens,
            max_num_seqs=max_num_seqs,
        )
        network = load_model(path, self.config, self.dtype, placement.device)
        if kv_cache_tokens is None:
            most = -(-max_model_len * max_num_seqs // BLOCK_SIZE)
            num_blocks = blocks_that_fit(self.config, cache_dtype, most, tier, placement)
        else:
            num_blocks = -(-kv_cache_tokens // BLOCK_SIZE)
        check_fits(self.config, cache_dtype, num_blocks, tier, placement)
        self.tokenizer = Tokenizer.from_pretrained(path) if (path / "tokenizer.json").is_file() else None
        max_model_len = min(max_model_len, num_blocks * BLOCK_SIZE)
        limits = SchedulerConfig(
            num_blocks=num_blocks,
            block_size=BLOCK_SIZE,
            max_batched_tokens=max_batched_tokens,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            enable_prefix_caching=enable_prefix_caching,
            num_latent_blocks=None if tier is None else tier.pages,
            hot_rows=0 if tier is None else tier.hot_rows,
            num_swap_blocks=None if tier is None else swap_blocks(num_blocks),
        )
        self.caches = KVCaches(self.config, num_blocks, cache_dtype, placement, None if tier is None else tier.blocks)
        self.host_tier = None if tier is None else HostTier(self.caches, limits, placement)
        runner = ModelRunner(network, self.caches, attention, placement.backend, self.host_tier)
        if tune_kernels and placement.backend == "triton":
            shapes = shapes_of(max_num_seqs, max_batched_tokens, max_model_len)
            for _ in tqdm(tune(runner, shapes), total=len(shapes), desc="Measuring", unit="shape", leave=False):
                pass
        if placement.is_gpu:
            runner.warm_up(min(max_batched_tokens, max_model_len))
        if placement.is_gpu and not enforce_eager and tier is None:
            graphs = runner.record_decoding(
                CudaRecorder(placement.device), max_num_seqs=max_num_seqs, max_model_len=max_model_len
            )
            count = len(graphs.batches) * len(graphs.contexts)
            for _ in tqdm(graphs.warm_up(), total=count, desc="Recording", unit="graph", leave=False):
                pass
        self.engine = LLMEngine(
            runner,
            limits,
            self.tokenizer,
            self.config.eos_token_ids,
            seed,
        )
        self._request_numbers = itertools.count()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = True,
    ) -> list[RequestOutput]:
        """Completes prompts, all in one batch.

        Args:
            prompts: text, token ids, {"prompt_token_ids": ids}, or a list of these.
            sampling_params: for all prompts, or one for each; None takes the defaults.
            progress: show a bar on standard error.

        Returns:
            One finished output for each prompt, in their order.

        Raises:
            ValueError: a prompt is empty, too long or not of this vocabulary, or the lists differ in length; the
                message names the prompt by its number, and nothing was started.
            TypeError: a prompt or its parameters have another type; likewise.
        """
        wanted = _as_list(prompts)
        params = _as_params(sampling_params, len(wanted))
        ids = [f"request-{next(self._request_numbers)}" for _ in wanted]
        results: dict[str, RequestOutput] = {}
        with tqdm(total=len(ids), desc="Generating", unit="prompt", disable=not progress, leave=False) as bar:
            try:
                for number, request_id in enumerate(ids):
                    try:
                        self.engine.add_request(request_id, wanted[number], params[number])
                    except (ValueError, TypeError) as error:
                        kind = TypeError if isinstance(error, TypeError) else ValueError
                        raise kind(f"prompts[{number}]: {error}") from error
                while len(results) < len(ids):
                    for output in self.engine.step():
                        if output.finished:
                            results[output.request_id] = output
                            bar.update()
            finally:
                for request_id in ids:
                    self.engine.abort_request(request_id)
        return [results[request_id] for request_id in ids]


def _model_path(model: str | os.PathLike[str] | None) -> Path:
    if model is None:
        from heedful import builtin

        return builtin.path()
    path = Path(model)
    if not path.is_dir():
        raise FileNotFoundError(f"model: expected a directory with config.json and safetensors, {path} is none")
    return path


def _model_dtype(config: ModelConfig, dtype: str, placement: Placement) -> torch.dtype:
    if dtype == "auto":
        widened = config.dtype == "float32" or (not placement.is_gpu and _float32_is_quicker(config))
        dtype = "float32" if widened else "bfloat16"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]


def _float32_is_quicker(config: ModelConfig) -> bool:
    """Whether the CPU has no bfloat16 products (torch's are then several times slower) and float32 weights fit well."""
    if torch.backends.cpu.get_cpu_capability() != "AVX2":
        return False
    weights = 4 * sum(math.prod(shape) for shape in tensor_shapes(config).values())
    memory = total_memory()
    return memory is not None and weights <= FLOAT32_SHARE * memory


def _cache_dtype(
    config: ModelConfig, dtype: torch.dtype, kv_cache_dtype: Literal["auto", "float32", "bfloat16", "fp8"]
) -> KVCacheDtype:
    if kv_cache_dtype == "auto":
        return "float32" if dtype == torch.float32 else "bfloat16"
    if kv_cache_dtype not in supported_cache_dtypes(config):
        raise ValueError(
            f"kv_cache_dtype: fp8 needs an index_head_dim that is a power of two of at most 128, "
            f"this model's is {config.index_head_dim}"
        )
    return kv_cache_dtype


def _model_len(config: ModelConfig, max_model_len: int | None) -> int:
    if max_model_len is None:
        return config.max_position_embeddings
    if max_model_len > config.max_position_embeddings:
        raise ValueError(
            f"max_model_len: expected at most the model's {config.max_position_embeddings}, got {max_model_len}"
        )
    return max_model_len


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[str | Sequence[int]]:
    given: Any = prompts
    single = isinstance(given, (str, dict)) or (len(given) > 0 and isinstance(given[0], Integral))
    items = [given] if single else list(given)
    return [item["prompt_token_ids"] if isinstance(item, dict) else item for item in items]


def _as_params(
    sampling_params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> Sequence[SamplingParams]:
    if sampling_params is None or isinstance(sampling_params, SamplingParams):
        return [sampling_params or SamplingParams()] * count
    if not isinstance(sampling_params, (list, tuple)):
        raise TypeError(f"sampling_params: expected SamplingParams or a list of them, got {sampling_params!r}")
    if len(sampling_params) != count:
        raise ValueError(f"sampling_params: expected one or {count}, got {len(sampling_params)}")
    return sampling_params


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def _check_positive(name: str, value: int | None) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: expected a positive integer, got {value!r}")
    if value > _MAX_OPTION:
        raise ValueError(f"{name}: expected at most {_MAX_OPTION}, got {value}")
