"""KV cache sizing: the longest row, the number of pages, and their allocation."""

from __future__ import annotations

import torch
from musicgen_kernels import PAGE_LEN, KVStore, new_kv_store, page_bytes

from musicgen.config import EngineConfig, ModelConfig
from musicgen.engine.host_memory import available_bytes
from musicgen.engine.kv_cache import num_pages_for
from musicgen.errors import InvalidRequestError
from musicgen.models.t5 import MAX_TEXT_TOKENS


def max_row_len(config: ModelConfig) -> int:
    """Positions of the longest row: the longest prefix plus one window, rounded up to whole pages."""
    prefix_len = 0 if config.chroma is None else config.chroma.num_frames + MAX_TEXT_TOKENS
    num_positions = prefix_len + config.delay_pattern.num_steps(config.num_frames(config.max_duration_s))
    return num_pages_for(num_positions) * PAGE_LEN


def num_pages(model: ModelConfig, config: EngineConfig, device: torch.device) -> int:
    """Number of pages within the budget; without one, within a share of free memory, and at most what rows can fill.

    Args:
        config: resolved.
    Raises:
        InvalidRequestError: the budget is smaller than one page.
    """
    decoder = model.decoder
    size = page_bytes(decoder.num_layers, decoder.num_heads, decoder.head_dim, _kv_dtype(config))
    budget = config.cache.memory_bytes
    if budget is None:
        is_gpu = device.type == "cuda"
        free = torch.cuda.mem_get_info(device)[0] if is_gpu else available_bytes()
        most = config.scheduler.max_rows * num_pages_for(max_row_len(model))
        budget = min(int(free * config.cache.memory_share), most * size)
    if budget < size:
        raise InvalidRequestError(f"at least {size} bytes (one page)", str(budget), param="memory_bytes")
    return budget // size


def new_pages(model: ModelConfig, config: EngineConfig, count: int, device: torch.device) -> KVStore:
    """Allocate `count` pages, plus one for padding rows if decode steps are padded."""
    decoder = model.decoder
    sizes = (decoder.num_layers, count + bool(config.cuda_graphs), decoder.num_heads, decoder.head_dim)
    return new_kv_store(*sizes, _kv_dtype(config), device=device)


def _kv_dtype(config: EngineConfig) -> torch.dtype:
    assert config.cache.dtype is not None
    dtype: torch.dtype = getattr(torch, config.cache.dtype)
    return dtype
