"""Paged attention: tiles of 16 queries of one row and head against splits of 256 positions.

Algorithm. A split yields (m, w, o) of the online softmax in base 2 (Milakov & Gimelshein 2018); splits are
merged in ascending order. Decode (one query per row) runs the splits in parallel and merges them in a second
kernel; a step with longer rows runs them sequentially in one kernel. Both call the same two functions,
`_attend_split` and `_merge`, with the same tile shapes and without fused multiply-add contraction, and a
masked position changes neither m, w nor o, so a query's result depends only on that query and its row.

Scores are computed in the query's dtype if that is 16 bits wide and the pages have that dtype or int8; all other
combinations are computed in float32. The softmax is always float32.
"""

# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..pages import PAGE_LEN, SPLIT_LEN, PagedKV
from .runtime import (
    VARYING,
    find_row,
    find_tile_row,
    interpreted,
    launch,
    narrow,
    power_of_2,
    require_no_float64,
    require_plain,
)

_TILE_Q = 16
_TILE_T = 64
_LOG2_E = 1.4426950408889634
WEIGHT_FACTOR = tl.constexpr(64.0)
"""Softmax weights times int8 value scales are multiplied by this before rounding to 16 bits, so that small ones stay in
float16's normal range; the scale of any value representable in float16 still fits.
"""
_TRITON_DTYPE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _multiply(a, b, dtype: tl.constexpr, EMULATE: tl.constexpr):
    """a [I, J] · b [J, L] in float32, with operands rounded to dtype. The interpreter has no bfloat16 product, so the
    rounded operands are widened there; products of two bfloat16 numbers are exact in float32.
    """
    if EMULATE and dtype == tl.bfloat16:
        wide_a = to_float(narrow(a.to(tl.float32), dtype, EMULATE))
        wide_b = to_float(narrow(b.to(tl.float32), dtype, EMULATE))
        return tl.dot(wide_a, wide_b, input_precision="ieee")
    return tl.dot(a.to(dtype), b.to(dtype), input_precision="ieee", out_dtype=tl.float32)


@triton.jit
def to_float(x):
    """bfloat16 → float32 by integer arithmetic."""
    return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _attend_split(
    q,
    limits,
    start,
    end,
    table,
    head,
    num_heads,
    k_pages,
    v_pages,
    k_scales,
    v_scales,
    scale_log2,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE_T: tl.constexpr,
    SPLIT: tl.constexpr,
    PAGE: tl.constexpr,
    IS_INT8: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """(m, w, o) of a tile of queries over positions start … min(start + SPLIT, end) − 1.

    A query sees positions ≤ its limit. m is in base 2.
    """
    TILE_Q: tl.constexpr = q.shape[0]
    channels = tl.arange(0, BLOCK_D)
    m = tl.full((TILE_Q,), float("-inf"), tl.float32)
    w = tl.zeros((TILE_Q,), tl.float32)
    o = tl.zeros((TILE_Q, BLOCK_D), tl.float32)
    for first in range(start, tl.minimum(start + SPLIT, end), TILE_T):
        positions = first + tl.arange(0, TILE_T)
        there = positions < end
        page = tl.load(table + positions // PAGE, mask=there, other=0).to(tl.int64)
        slot = (page * num_heads + head) * PAGE + positions % PAGE
        at = slot[:, None] * D + channels[None, :]
        inside = there[:, None] & (channels < D)[None, :]
        k = tl.load(k_pages + at, mask=inside, other=0.0)
        scores = _multiply(q, tl.trans(k), DOT_DTYPE, EMULATE) * scale_log2
        if IS_INT8:
            scores *= tl.load(k_scales + slot, mask=there, other=0.0)[None, :]
        scores = tl.where(positions[None, :] <= limits[:, None], scores, float("-inf"))
        m_new = tl.maximum(m, tl.max(scores, axis=1))
        origin = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(scores - origin[:, None])
        decay = tl.exp2(m - origin)
        w = w * decay + tl.sum(p, axis=1)
        if IS_INT8:
            p *= tl.load(v_scales + slot, mask=there, other=0.0)[None, :] * WEIGHT_FACTOR
        v = tl.load(v_pages + at, mask=inside, other=0.0)
        mixed = _multiply(p, v, DOT_DTYPE, EMULATE)
        if IS_INT8:
            mixed *= 1.0 / WEIGHT_FACTOR
        o = o * decay[:, None] + mixed
        m = m_new
    return m, w, o


@triton.jit
def _merge(m1, w1, o1, m2, w2, o2):
    """The (m, w, o) of two disjoint sets of positions together; an empty set has m = −∞."""
    m = tl.maximum(m1, m2)
    origin = tl.where(m == float("-inf"), 0.0, m)
    a, b = tl.exp2(m1 - origin), tl.exp2(m2 - origin)
    return m, w1 * a + w2 * b, o1 * a[:, None] + o2 * b[:, None]


@triton.jit
def _finish(w, o):
    return tl.where(w == 0.0, 0.0, tl.div_rn(1.0, tl.where(w == 0.0, 1.0, w)))[:, None] * o


@triton.jit
def _query_tile(query, first, count, head, token_stride, head_stride, D: tl.constexpr, BLOCK_D, TILE_Q):
    rows = tl.arange(0, TILE_Q)
    channels = tl.arange(0, BLOCK_D)
    tokens = (first + rows).to(tl.int64)
    inside = (rows < count)[:, None] & (channels < D)[None, :]
    at = tokens[:, None] * token_stride + head * head_stride + channels[None, :]
    return tl.load(query + at, mask=inside, other=0.0)


@triton.jit(do_not_specialize=VARYING)
def _decode(
    query,
    k_pages,
    v_pages,
    k_scales,
    v_scales,
    page_table,
    query_offsets,
    kv_lens,
    states,
    sums,
    token_stride,
    head_stride,
    num_rows,
    max_pages,
    num_heads,
    num_splits,
    scale_log2,
    CAUSAL: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_T: tl.constexpr,
    SPLIT: tl.constexpr,
    PAGE: tl.constexpr,
    IS_INT8: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """One split of one query and head → states [N, H, splits, 2] and sums [N, H, splits, D]."""
    token, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = find_row(query_offsets, num_rows, token)
    end = tl.load(kv_lens + row)
    if CAUSAL:
        end += token + 1 - tl.load(query_offsets + row + 1)
    start = split * SPLIT
    if start < end:
        q = _query_tile(query, token, 1, head, token_stride, head_stride, D, BLOCK_D, TILE_Q)
        limits = tl.zeros((TILE_Q,), tl.int32) + (end - 1)
        table = page_table + row.to(tl.int64) * max_pages
        m, w, o = _attend_split(
            q, limits, start, end, table, head, num_heads, k_pages, v_pages, k_scales, v_scales, scale_log2,
            D, BLOCK_D, TILE_T, SPLIT, PAGE, IS_INT8, DOT_DTYPE, EMULATE,
        )  # fmt: skip
        at = (token.to(tl.int64) * num_heads + head) * num_splits + split
        rows = tl.arange(0, TILE_Q)
        channels = tl.arange(0, BLOCK_D)
        tl.store(states + at * 2 + rows, m, mask=rows == 0)
        tl.store(states + at * 2 + 1 + rows, w, mask=rows == 0)
        inside = (rows == 0)[:, None] & (channels < D)[None, :]
        tl.store(sums + at * D + rows[:, None] + channels[None, :], o, mask=inside)


@triton.jit(do_not_specialize=VARYING)
def _merge_splits(
    states,
    sums,
    query_offsets,
    kv_lens,
    out,
    num_rows,
    num_heads,
    num_splits,
    CAUSAL: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """The splits of one query and head, in ascending order → out [N, H, D]."""
    token, head = tl.program_id(0), tl.program_id(1)
    row = find_row(query_offsets, num_rows, token)
    end = tl.load(kv_lens + row)
    if CAUSAL:
        end += token + 1 - tl.load(query_offsets + row + 1)
    one = tl.arange(0, 1)
    channels = tl.arange(0, BLOCK_D)
    m = tl.full((1,), float("-inf"), tl.float32)
    w = tl.zeros((1,), tl.float32)
    o = tl.zeros((1, BLOCK_D), tl.float32)
    base = (token.to(tl.int64) * num_heads + head) * num_splits
    for split in range(tl.cdiv(end, SPLIT)):
        at = base + split
        o_at = sums + at * D + one[:, None] + channels[None, :]
        o_split = tl.load(o_at, mask=(channels < D)[None, :], other=0.0)
        m_split, w_split = tl.load(states + at * 2 + one), tl.load(states + at * 2 + 1 + one)
        m, w, o = _merge(m, w, o, m_split, w_split, o_split)
    y = narrow(_finish(w, o), out.dtype.element_ty, EMULATE)
    at = (token.to(tl.int64) * num_heads + head) * D
    tl.store(out + at + one[:, None] + channels[None, :], y, mask=(channels < D)[None, :])


@triton.jit(do_not_specialize=VARYING)
def _prefill(
    query,
    k_pages,
    v_pages,
    k_scales,
    v_scales,
    page_table,
    query_offsets,
    kv_lens,
    out,
    token_stride,
    head_stride,
    num_rows,
    max_pages,
    num_heads,
    scale_log2,
    CAUSAL: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_T: tl.constexpr,
    SPLIT: tl.constexpr,
    PAGE: tl.constexpr,
    IS_INT8: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """All splits of one tile of queries of a row, and one head → out [N, H, D]."""
    tile, head = tl.program_id(0), tl.program_id(1)
    row = find_tile_row(query_offsets, num_rows, tile, TILE_Q)
    begin, finish = tl.load(query_offsets + row), tl.load(query_offsets + row + 1)
    first = begin + (tile - begin // TILE_Q - row) * TILE_Q
    if first < finish:
        count = tl.minimum(finish - first, TILE_Q)
        rows = tl.arange(0, TILE_Q)
        end = tl.load(kv_lens + row)
        limits = tl.zeros((TILE_Q,), tl.int32) + (end - 1)
        if CAUSAL:
            limits += first + 1 - finish + tl.minimum(rows, count - 1)
            end += first + count - finish
        q = _query_tile(query, first, count, head, token_stride, head_stride, D, BLOCK_D, TILE_Q)
        table = page_table + row.to(tl.int64) * max_pages
        m = tl.full((TILE_Q,), float("-inf"), tl.float32)
        w = tl.zeros((TILE_Q,), tl.float32)
        o = tl.zeros((TILE_Q, BLOCK_D), tl.float32)
        for start in range(0, end, SPLIT):
            m_split, w_split, o_split = _attend_split(
                q, limits, start, end, table, head, num_heads, k_pages, v_pages, k_scales, v_scales,
                scale_log2, D, BLOCK_D, TILE_T, SPLIT, PAGE, IS_INT8, DOT_DTYPE, EMULATE,
            )  # fmt: skip
            m, w, o = _merge(m, w, o, m_split, w_split, o_split)
        y = narrow(_finish(w, o), out.dtype.element_ty, EMULATE)
        channels = tl.arange(0, BLOCK_D)
        at = ((first + rows).to(tl.int64)[:, None] * num_heads + head) * D + channels[None, :]
        tl.store(out + at, y, mask=(rows < count)[:, None] & (channels < D)[None, :])


def _constants(query: Tensor, cache: PagedKV, causal: bool) -> dict[str, Any]:
    dim, is_int8 = query.shape[2], cache.k.dtype == torch.int8
    narrow_pages = query.dtype != torch.float32 and (is_int8 or cache.k.dtype == query.dtype)
    return {
        "CAUSAL": causal,
        "D": dim,
        "BLOCK_D": power_of_2(dim),
        "TILE_Q": _TILE_Q,
        "TILE_T": _TILE_T,
        "SPLIT": SPLIT_LEN,
        "PAGE": PAGE_LEN,
        "IS_INT8": is_int8,
        "DOT_DTYPE": _TRITON_DTYPE[query.dtype] if narrow_pages else tl.float32,
        "EMULATE": interpreted(),
        # float32 products run on scalar units and need more registers than tensor cores.
        "num_warps": 4 if narrow_pages else 8,
        "num_stages": 2,
        "enable_fp_fusion": False,
        "maxnreg": 168 if narrow_pages else 255,
    }


def _attention(
    query: Tensor,
    cache: PagedKV,
    page_table: Tensor,
    query_offsets: Tensor,
    kv_lens: Tensor,
    scale: float,
    out: Tensor,
    causal: bool,
) -> None:
    require_plain(cache)
    require_no_float64("query", query)
    num_tokens, num_heads, dim = query.shape
    num_rows, max_pages = page_table.shape
    k_scales = kv_lens if cache.k_scales is None else cache.k_scales
    v_scales = kv_lens if cache.v_scales is None else cache.v_scales
    pages = (cache.k, cache.v, k_scales, v_scales, page_table, query_offsets, kv_lens)
    strides = (query.stride(0), query.stride(1), num_rows, max_pages, num_heads)
    constants = _constants(query, cache, causal)
    if num_tokens > num_rows:
        num_tiles = num_tokens // _TILE_Q + num_rows
        grid: tuple[int, ...] = (num_tiles, num_heads)
        launch(_prefill, grid, query, query, *pages, out, *strides, scale * _LOG2_E, **constants)
        return
    num_splits = -(-max_pages * PAGE_LEN // SPLIT_LEN)
    states = torch.empty(num_tokens, num_heads, num_splits, 2, dtype=torch.float32, device=query.device)
    sums = torch.empty(num_tokens, num_heads, num_splits, dim, dtype=torch.float32, device=query.device)
    grid = (num_tokens, num_heads, num_splits)
    launch(_decode, grid, query, query, *pages, states, sums, *strides, num_splits, scale * _LOG2_E, **constants)
    kept = {key: constants[key] for key in ("CAUSAL", "D", "BLOCK_D", "SPLIT", "EMULATE", "enable_fp_fusion")}
    sizes = (num_rows, num_heads, num_splits)
    launch(_merge_splits, grid[:2], query, states, sums, query_offsets, kv_lens, out, *sizes, **kept, num_warps=1)


def paged_attention(
    query: Tensor,
    cache: PagedKV,
    page_table: Tensor,
    query_offsets: Tensor,
    kv_lens: Tensor,
    scale: float,
    out: Tensor,
) -> None:
    """See `musicgen_kernels.attention.paged_attention`."""
    _attention(query, cache, page_table, query_offsets, kv_lens, scale, out, True)


def cross_attention(
    query: Tensor,
    cache: PagedKV,
    page_table: Tensor,
    query_offsets: Tensor,
    kv_lens: Tensor,
    scale: float,
    out: Tensor,
) -> None:
    """See `musicgen_kernels.attention.cross_attention`."""
    _attention(query, cache, page_table, query_offsets, kv_lens, scale, out, False)
