"""Paged attention: append, causal attention, attention over fixed pages. Does not allocate pages.

The same operations serve decode (one query per row) and prefill (many). A *row* is one sequence of positions; a
request with guidance has two or three. The queries of a step are ragged: those of row b are
`query_offsets[b] … query_offsets[b+1]−1`, the last positions of the row's `kv_lens[b]`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import implementation
from .checks import FLOATS, check_tensor
from .errors import KernelArgumentError
from .pages import KV_DTYPES, PAGE_LEN, PagedKV

_INT = (torch.int32,)


def append_paged_kv(
    keys: Tensor,
    values: Tensor,
    cache: PagedKV,
    page_table: Tensor,
    query_offsets: Tensor,
    kv_lens: Tensor,
    *,
    backend: str | None = None,
) -> None:
    """Write the keys and values of a step's new positions to the pages.

    Token j of row b (j counted from query_offsets[b], n of them) goes to position p = kv_lens[b] − n + j:
    page page_table[b, p div 16], slot p mod 16. int8: scale = max|x|/127 over the head's D values (0 if all
    are 0), then round-half-even(x/scale). Rows that share a page must not both append to it. A token whose position
    would be negative is not written (the CPU backend rejects it).

    Args:
        keys: [N, H, D] float32 (also bfloat16, float16 on GPUs); the last axis contiguous.
        values: as keys.
        cache: the layer's pages; **mutated**.
        page_table: [B, max_pages] int32; entries beyond a row's last page are not read.
        query_offsets: [B+1] int32, ascending from 0 to N.
        kv_lens: [B] int32, each row's length in positions, including the new ones.
        backend: backend name; None selects one automatically.

    Raises:
        KernelArgumentError: wrong shape, dtype, device or layout; on the CPU also a page or length out of
            range.
        BackendUnavailableError: the requested backend cannot run here.
    """
    _check_metadata(keys, "keys", cache, page_table, query_offsets, kv_lens)
    check_tensor("values", values, keys.shape, (keys.dtype,), device=keys.device, contiguous=False)
    run = implementation("append_paged_kv", keys.device, cache.k.dtype, backend, keys.shape[-1])
    run(keys, values, cache, page_table, query_offsets, kv_lens)


def paged_attention(
    query: Tensor,
    cache: PagedKV,
    page_table: Tensor,
    query_offsets: Tensor,
    kv_lens: Tensor,
    *,
    scale: float | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Causal softmax attention of each query over its row's pages: softmax(scale · q·Kᵀ) V.

    Query j of row b, at position p = kv_lens[b] − n + j, sees positions 0 … p. State is fp32 (Milakov &
    Gimelshein 2018, online softmax), and positions are combined in splits of 256, so a query's result is bit-identical
    in prefill and decode, in any batch and for any page numbers.

    Args:
        query: [N, H, D] float32 (also bfloat16, float16 on GPUs); the last axis contiguous.
        cache: the layer's pages, already appended to.
        page_table: [B, max_pages] int32.
        query_offsets: [B+1] int32; rows may have no queries.
        kv_lens: [B] int32 ≥ the row's number of queries.
        scale: multiplies the scores; None: 1/√D.
        out: [N, H, D] of the query's dtype to write to, contiguous.
        backend: backend name; None selects one automatically.

    Returns:
        [N, H, D] of the query's dtype.

    Raises:
        KernelArgumentError, BackendUnavailableError: see `append_paged_kv`.
    """
    _check_metadata(query, "query", cache, page_table, query_offsets, kv_lens)
    out = _output(query, out)
    run = implementation("paged_attention", query.device, cache.k.dtype, backend, query.shape[-1])
    run(query, cache, page_table, query_offsets, kv_lens, _scale(query, scale), out)
    return out


def cross_attention(
    query: Tensor,
    cache: PagedKV,
    page_table: Tensor,
    query_offsets: Tensor,
    kv_lens: Tensor,
    *,
    scale: float | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Softmax attention of each query over all kv_lens[b] positions of its row, which are constant.

    Arguments, result and errors as in `paged_attention`, without the causal mask; a row of length 0 yields zeros
    (as attention over all-zero keys and values would).
    """
    _check_metadata(query, "query", cache, page_table, query_offsets, kv_lens)
    out = _output(query, out)
    run = implementation("cross_attention", query.device, cache.k.dtype, backend, query.shape[-1])
    run(query, cache, page_table, query_offsets, kv_lens, _scale(query, scale), out)
    return out


def _scale(query: Tensor, scale: float | None) -> float:
    return query.shape[-1] ** -0.5 if scale is None else float(scale)


def _output(query: Tensor, out: Tensor | None) -> Tensor:
    if out is None:
        return torch.empty(query.shape, dtype=query.dtype, device=query.device)
    return check_tensor("out", out, query.shape, (query.dtype,), device=query.device)


def _check_metadata(
    tokens: Tensor, name: str, cache: PagedKV, page_table: Tensor, query_offsets: Tensor, kv_lens: Tensor
) -> None:
    """Check everything that can be checked without reading the tensors."""
    check_tensor(name, tokens, (None, None, None), FLOATS, contiguous=False)
    if tokens.stride(-1) != 1 and tokens.shape[-1] != 1:
        raise KernelArgumentError(name, "a contiguous last axis", f"strides {list(tokens.stride())}")
    _, heads, dim = tokens.shape
    device = tokens.device
    pages = check_tensor("cache.k", cache.k, (None, heads, PAGE_LEN, dim), KV_DTYPES, device=device)
    shape, dtype = pages.shape, pages.dtype
    check_tensor("cache.v", cache.v, shape, (dtype,), device=device)
    for label, scales in (("cache.k_scales", cache.k_scales), ("cache.v_scales", cache.v_scales)):
        if dtype == torch.int8:
            check_tensor(label, scales, (shape[0], heads, PAGE_LEN), (torch.float32,), device=device)
        elif scales is not None:
            raise KernelArgumentError(label, f"None for {dtype} pages", "a tensor")
    if cache.layout not in ("plain", "cpu"):
        raise KernelArgumentError("cache.layout", "'plain' or 'cpu'", repr(cache.layout))
    rows = check_tensor("page_table", page_table, (None, None), _INT, device=device).shape[0]
    check_tensor("query_offsets", query_offsets, (rows + 1,), _INT, device=device)
    check_tensor("kv_lens", kv_lens, (rows,), _INT, device=device)
