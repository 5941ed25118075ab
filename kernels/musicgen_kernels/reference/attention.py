"""Paged attention in plain PyTorch: gather a row's pages, then dense softmax in at least the query's precision."""

from __future__ import annotations

import torch
from torch import Tensor

from ..pages import PAGE_LEN, PagedKV, keys_from_plain, values_from_plain


def append_paged_kv(
    keys: Tensor, values: Tensor, cache: PagedKV, page_table: Tensor, query_offsets: Tensor, kv_lens: Tensor
) -> None:
    """See `musicgen_kernels.attention.append_paged_kv`."""
    offsets, lens = query_offsets.tolist(), kv_lens.tolist()
    pages, slots, tokens = [], [], []
    for b, length in enumerate(lens):
        count = offsets[b + 1] - offsets[b]
        for j in range(count):
            position = length - count + j
            if position < 0:
                continue
            pages.append(int(page_table[b, position // PAGE_LEN]))
            slots.append(position % PAGE_LEN)
            tokens.append(offsets[b] + j)
    for page in sorted(set(pages)):
        chosen = [i for i, p in enumerate(pages) if p == page]
        where = torch.tensor([slots[i] for i in chosen], device=keys.device)
        which = torch.tensor([tokens[i] for i in chosen], device=keys.device)
        one = _one_page(cache, page)
        _write(cache.k, cache.k_scales, page, one.k, where, keys[which], True, cache)
        _write(cache.v, cache.v_scales, page, one.v, where, values[which], False, cache)


def _one_page(cache: PagedKV, page: int) -> PagedKV:
    """A copy of one page in plain layout, not dequantised."""
    raw = PagedKV(cache.k[page : page + 1], cache.v[page : page + 1], None, None, cache.layout)
    return PagedKV(raw.keys()[0], raw.values()[0], None, None, "plain")


def _write(
    store: Tensor,
    scales: Tensor | None,
    page: int,
    plain: Tensor,
    slots: Tensor,
    new: Tensor,
    is_keys: bool,
    cache: PagedKV,
) -> None:
    """Write new [n, H, D] to slots of a plain page [H, 16, D], then store the page in the cache's layout."""
    if scales is not None:
        scale = new.float().abs().amax(-1) / 127
        divisor = torch.where(scale == 0, torch.ones_like(scale), scale)
        scales[page][:, slots] = scale.T
        new = (new.float() / divisor[..., None]).round()
    plain[:, slots] = new.transpose(0, 1).to(store.dtype)
    arrange = keys_from_plain if is_keys else values_from_plain
    store[page] = arrange(plain[None], cache.layout)[0]


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
    _attention(query, cache, page_table, query_offsets, kv_lens, scale, out, causal=True)


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
    _attention(query, cache, page_table, query_offsets, kv_lens, scale, out, causal=False)


def _attention(
    query: Tensor,
    cache: PagedKV,
    page_table: Tensor,
    query_offsets: Tensor,
    kv_lens: Tensor,
    scale: float,
    out: Tensor,
    *,
    causal: bool,
) -> None:
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    offsets, lens = query_offsets.tolist(), kv_lens.tolist()
    for b, length in enumerate(lens):
        first, last = offsets[b], offsets[b + 1]
        if first == last:
            continue
        if length == 0:
            out[first:last] = 0
            continue
        keys, values = _gather(cache, page_table[b], length)
        scores = torch.einsum("nhd,thd->nht", query[first:last].to(wide), keys.to(wide)) * scale
        if causal:
            positions = torch.arange(length - (last - first), length, device=query.device)
            future = torch.arange(length, device=query.device) > positions[:, None]
            scores = scores.masked_fill(future[:, None], -torch.inf)
        mixed = torch.einsum("nht,thd->nhd", scores.softmax(-1), values.to(wide))
        out[first:last] = mixed.to(out.dtype)


def _gather(cache: PagedKV, table: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Keys and values of a row, [length, H, D] each."""
    ids = table[: (length + PAGE_LEN - 1) // PAGE_LEN].long()
    chosen = PagedKV(
        cache.k[ids],
        cache.v[ids],
        None if cache.k_scales is None else cache.k_scales[ids],
        None if cache.v_scales is None else cache.v_scales[ids],
        cache.layout,
    )
    keys, values = (pages.transpose(1, 2).flatten(0, 1)[:length] for pages in (chosen.keys(), chosen.values()))
    return keys, values
