"""How large the caches are: how many tokens, how many of their latent rows on the device, and whether memory holds it.

Without a host tier a block takes its bytes on the device. With one (`TierSize`) the device holds the index keys of
every block and a fixed number of latent rows; the host holds latent rows of every block, and both kinds of rows of
the preempted requests that it keeps.
"""

from __future__ import annotations

from dataclasses import dataclass

from heedful.config import ModelConfig
from heedful.engine.cache_layout import (
    BLOCK_SIZE,
    KVCacheDtype,
    index_bytes_per_token,
    latent_bytes_per_token,
)
from heedful.engine.placement import HOST_MEMORY_SHARE, Placement

HOT_SHARE = 4
"""Without a wish, a layer keeps one fetched row for so many rows in pages."""

SWAP_SHARE = 4
"""The host tier keeps one block of preempted requests for so many blocks of the pool."""


@dataclass(frozen=True)
class TierSize:
    """Latent rows on the device, for each layer, where the host's memory holds the others.

    Args:
        pages: blocks of rows that are written, or were lately.
        hot_blocks: blocks of single rows fetched from the host and kept while they are used.
    """

    pages: int
    hot_blocks: int

    @property
    def hot_rows(self) -> int:
        """Fetched rows that are kept."""
        return self.hot_blocks * BLOCK_SIZE

    @property
    def blocks(self) -> int:
        """Blocks of latent rows on the device in all."""
        return self.pages + self.hot_blocks


def tier_size(
    device_latent_tokens: int | None,
    hot_rows: int | None,
    *,
    selected: int,
    max_batched_tokens: int,
    max_num_seqs: int,
) -> TierSize | None:
    """The tier that a user's options mean; None for none.

    Args:
        device_latent_tokens: tokens whose latent rows the device holds in pages; None for all, without a tier.
        hot_rows: single rows beside them; None for a quarter as many, or as many as a query selects.
        selected: keys that a query reads at most: they must be on the device together.
        max_batched_tokens: tokens of a step.
        max_num_seqs: sequences of a step.

    Raises:
        ValueError: an option is too small; the message names it.
    """
    if device_latent_tokens is None:
        if hot_rows is not None:
            raise ValueError(f"hot_rows: expected None without device_latent_tokens, got {hot_rows}")
        return None
    # The scheduler's own rule (SchedulerConfig.num_latent_blocks), which it would tell in its own names.
    seqs = min(max_num_seqs, max_batched_tokens)
    least = 2 * (-(-max_batched_tokens // BLOCK_SIZE) + 3 * seqs)
    pages = -(-device_latent_tokens // BLOCK_SIZE)
    if pages < least:
        raise ValueError(
            f"device_latent_tokens: expected at least {least * BLOCK_SIZE} with max_batched_tokens "
            f"{max_batched_tokens} and max_num_seqs {max_num_seqs} (lower these for fewer), got {device_latent_tokens}"
        )
    if hot_rows is None:
        hot_rows = max(selected, pages * BLOCK_SIZE // HOT_SHARE)
    if hot_rows < selected:
        raise ValueError(f"hot_rows: expected at least the {selected} keys that a query selects, got {hot_rows}")
    return TierSize(pages, -(-hot_rows // BLOCK_SIZE))


def swap_blocks(num_blocks: int) -> int:
    """Blocks of preempted requests that the host tier keeps: at least one."""
    return max(1, num_blocks // SWAP_SHARE)


def cache_bytes(
    config: ModelConfig, kv_cache_dtype: KVCacheDtype, num_blocks: int, tier: TierSize | None
) -> tuple[int, int]:
    """Bytes of the caches on the device, and in the host tier."""
    latent = BLOCK_SIZE * latent_bytes_per_token(config, kv_cache_dtype)
    index = BLOCK_SIZE * index_bytes_per_token(config, kv_cache_dtype)
    if tier is None:
        return num_blocks * (latent + index), 0
    kept = swap_blocks(num_blocks)
    return num_blocks * index + tier.blocks * latent, num_blocks * latent + kept * (latent + index)


def blocks_that_fit(
    config: ModelConfig, kv_cache_dtype: KVCacheDtype, most: int, tier: TierSize | None, placement: Placement
) -> int:
    """Blocks of the pool: as many as `most`, or as a share of the free memory holds.

    Raises:
        ValueError: the system does not tell its free memory.
        MemoryError: not one block fits.
    """
    free = placement.available_memory()
    host_free = 0 if tier is None else placement.available_host_memory()
    if free is None or host_free is None:
        raise ValueError("kv_cache_tokens: expected a number: this system does not tell its free memory")

    def fits(num_blocks: int) -> bool:
        device, host = _by_memory(cache_bytes(config, kv_cache_dtype, num_blocks, tier), placement)
        return device <= free * placement.memory_share and host <= host_free * HOST_MEMORY_SHARE

    if not fits(1):
        beside = "" if tier is None else " beside the latent rows of device_latent_tokens and hot_rows"
        raise MemoryError(f"kv_cache_tokens: {free} free bytes hold no block of {BLOCK_SIZE} tokens{beside}")
    low, high = 1, most + 1  # `low` fits, `high` does not or is not wanted
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def check_fits(
    config: ModelConfig, kv_cache_dtype: KVCacheDtype, num_blocks: int, tier: TierSize | None, placement: Placement
) -> None:
    """Refuses caches larger than all memory: the system gives cache pages when they are first written, too late.

    Raises:
        MemoryError: they are.
    """
    device, host = _by_memory(cache_bytes(config, kv_cache_dtype, num_blocks, tier), placement)
    where = f"{placement.device}" if placement.is_gpu else "this machine"
    for size, total, what in (
        (device, placement.total_memory(), where),
        (host, placement.total_host_memory(), "this machine"),
    ):
        if total is not None and size > total:
            raise MemoryError(f"kv_cache_tokens: the caches would take {size} bytes, {what} has {total}")


def _by_memory(sizes: tuple[int, int], placement: Placement) -> tuple[int, int]:
    """Bytes on the device and on the host, which are one memory where the device is the CPU."""
    return sizes if placement.is_gpu else (sum(sizes), 0)
