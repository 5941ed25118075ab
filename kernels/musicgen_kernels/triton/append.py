"""Writes new keys and values to the pages: one program per token and eight heads."""

# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..pages import PAGE_LEN, PagedKV
from .runtime import (
    VARYING,
    find_row,
    interpreted,
    launch,
    narrow,
    power_of_2,
    require_no_float64,
    require_plain,
)

_HEADS = 8
_MAGIC = tl.constexpr(12582912.0)  # 1.5 · 2²³: adding and subtracting it rounds |x| < 2²² to nearest even


@triton.jit
def _store(source, pages, scales, at, scale_at, inside, heads_inside, IS_INT8: tl.constexpr, EMULATE: tl.constexpr):
    """Store one token's [heads, D] block, quantised if the pages are int8."""
    x = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    if IS_INT8:
        scale = tl.div_rn(tl.max(tl.abs(x), axis=1), 127.0)
        tl.store(scales + scale_at, scale, mask=heads_inside)
        steps = tl.div_rn(x, tl.where(scale == 0.0, 1.0, scale)[:, None])
        whole = tl.minimum(tl.maximum((steps + _MAGIC) - _MAGIC, -127.0), 127.0)  # subnormal scales are imprecise
        tl.store(pages + at, whole.to(tl.int8), mask=inside)
    else:
        tl.store(pages + at, narrow(x, pages.dtype.element_ty, EMULATE), mask=inside)


@triton.jit(do_not_specialize=VARYING)
def _append(
    keys,
    values,
    k_pages,
    v_pages,
    k_scales,
    v_scales,
    page_table,
    query_offsets,
    kv_lens,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    num_rows,
    max_pages,
    num_heads,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PAGE: tl.constexpr,
    IS_INT8: tl.constexpr,
    EMULATE: tl.constexpr,
):
    token = tl.program_id(0)
    row = find_row(query_offsets, num_rows, token)
    position = tl.load(kv_lens + row) - tl.load(query_offsets + row + 1) + token
    there = position >= 0  # negative if a row has more tokens than positions
    page = tl.load(page_table + row.to(tl.int64) * max_pages + position // PAGE, mask=there, other=0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    channels = tl.arange(0, BLOCK_D)
    heads_inside = (heads < num_heads) & there
    inside = heads_inside[:, None] & (channels < D)[None, :]
    scale_at = (page * num_heads + heads) * PAGE + position % PAGE
    at = scale_at[:, None] * D + channels[None, :]
    wide = token.to(tl.int64)
    k_from = keys + wide * k_token_stride + heads[:, None] * k_head_stride + channels[None, :]
    v_from = values + wide * v_token_stride + heads[:, None] * v_head_stride + channels[None, :]
    _store(k_from, k_pages, k_scales, at, scale_at, inside, heads_inside, IS_INT8, EMULATE)
    _store(v_from, v_pages, v_scales, at, scale_at, inside, heads_inside, IS_INT8, EMULATE)


def append_paged_kv(
    keys: Tensor, values: Tensor, cache: PagedKV, page_table: Tensor, query_offsets: Tensor, kv_lens: Tensor
) -> None:
    """See `musicgen_kernels.attention.append_paged_kv`."""
    require_plain(cache)
    require_no_float64("keys", keys)
    num_tokens, num_heads, dim = keys.shape
    num_rows, max_pages = page_table.shape
    launch(
        _append,
        (num_tokens, -(-num_heads // _HEADS)),
        keys,
        keys,
        values,
        cache.k,
        cache.v,
        kv_lens if cache.k_scales is None else cache.k_scales,
        kv_lens if cache.v_scales is None else cache.v_scales,
        page_table,
        query_offsets,
        kv_lens,
        keys.stride(0),
        keys.stride(1),
        values.stride(0),
        values.stride(1),
        num_rows,
        max_pages,
        num_heads,
        D=dim,
        BLOCK_D=power_of_2(dim),
        BLOCK_H=_HEADS,
        PAGE=PAGE_LEN,
        IS_INT8=cache.k.dtype == torch.int8,
        EMULATE=interpreted(),
        num_warps=1,
    )
