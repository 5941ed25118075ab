"""Kernels of a MusicGen step: paged attention, delayed-codebook sampling, packed linears, norms, embeddings.

One public signature per operation, with several backends (see `backend`). This package is independent of models,
requests, text and audio.
"""

from __future__ import annotations

from .attention import append_paged_kv, cross_attention, paged_attention
from .errors import BackendUnavailableError, KernelArgumentError, KernelError
from .linear import linear
from .norm import embed_codes, layer_norm, sinusoid_table
from .packing import PackedLinear, pack_linear, unpack_header
from .pages import PAGE_LEN, SPLIT_LEN, KVStore, PagedKV, new_kv_store, page_bytes
from .sampling import UNKNOWN_CODE, SampleBatch, delayed_sample_step, prepare_sample_step

__all__ = [
    "PAGE_LEN",
    "SPLIT_LEN",
    "UNKNOWN_CODE",
    "BackendUnavailableError",
    "KVStore",
    "KernelArgumentError",
    "KernelError",
    "PackedLinear",
    "PagedKV",
    "SampleBatch",
    "append_paged_kv",
    "cross_attention",
    "delayed_sample_step",
    "embed_codes",
    "layer_norm",
    "linear",
    "new_kv_store",
    "pack_linear",
    "page_bytes",
    "paged_attention",
    "prepare_sample_step",
    "sinusoid_table",
    "unpack_header",
]
