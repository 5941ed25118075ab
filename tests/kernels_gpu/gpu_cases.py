"""Cases for the GPU kernels, whatever runs them: Triton's interpreter, the host build of the CUDA sources, or
a GPU. A case is made on the CPU from a seed; `to` moves it.

Pages are shuffled, every slot past a row's length and every page nobody owns is poisoned with NaN (int8: with
the extreme code and a NaN scale), and the tables' unused entries hold a page number far out of range.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from musicgen_kernels import PAGE_LEN, PagedKV, SampleBatch
from torch import Tensor

NOWHERE = 2**30


@dataclass(frozen=True, slots=True)
class AttentionCase:
    """Arguments of `append_paged_kv` and `paged_attention`, and the plain keys and values behind them."""

    query: Tensor
    keys: Tensor
    values: Tensor
    cache: PagedKV
    page_table: Tensor
    query_offsets: Tensor
    kv_lens: Tensor

    @property
    def arguments(self) -> tuple[PagedKV, Tensor, Tensor, Tensor]:
        """What follows the query."""
        return self.cache, self.page_table, self.query_offsets, self.kv_lens

    def to(self, device: torch.device | str) -> AttentionCase:
        """The same case elsewhere. A copy also on the same device."""

        def move(t: Tensor) -> Tensor:
            return t.to(device, copy=True)

        c = self.cache
        scales = [None if s is None else move(s) for s in (c.k_scales, c.v_scales)]
        cache = PagedKV(move(c.k), move(c.v), scales[0], scales[1], "plain")
        rest = (self.page_table, self.query_offsets, self.kv_lens)
        return AttentionCase(move(self.query), move(self.keys), move(self.values), cache, *map(move, rest))


def attention_case(
    kv_lens: list[int],
    num_new: list[int],
    *,
    heads: int = 2,
    dim: int = 64,
    query_dtype: torch.dtype = torch.float32,
    kv_dtype: torch.dtype = torch.float32,
    seed: int = 0,
    shared_pages: int = 0,
    strided: bool = False,
    filled: bool = True,
) -> AttentionCase:
    """A step of rows of those lengths, of which the last num_new are the step's own.

    Args:
        shared_pages: that many first pages are the same for all rows (rows at least that long).
        strided: the queries, keys and values are views of one [N, 3, H, D] tensor.
        filled: False leaves the slots of the new positions poisoned, for `append_paged_kv`.
    """
    generator = torch.Generator().manual_seed(seed)
    num_tokens = sum(num_new)
    fused = torch.randn(num_tokens, 3, heads, dim, generator=generator).to(query_dtype)
    query, keys, values = (fused[:, i] if strided else fused[:, i].contiguous() for i in range(3))
    counts = [-(-n // PAGE_LEN) for n in kv_lens]
    num_pages = sum(counts) + 3
    max_pages = max([*counts, 1]) + 1
    order = torch.randperm(num_pages, generator=generator).tolist()
    table = torch.full((len(kv_lens), max_pages), NOWHERE, dtype=torch.int32)
    used = torch.zeros(num_pages, PAGE_LEN, dtype=torch.bool)
    for b, (length, count) in enumerate(zip(kv_lens, counts, strict=True)):
        own = [int(table[0, i]) if b and i < shared_pages else order.pop() for i in range(count)]
        table[b, :count] = torch.tensor(own, dtype=torch.int32)
        last = length if filled else length - num_new[b]
        for p in range(last):
            used[own[p // PAGE_LEN], p % PAGE_LEN] = True
    cache = _pages(num_pages, heads, dim, kv_dtype, used, generator)
    offsets = torch.tensor([0, *torch.tensor(num_new).cumsum(0).tolist()], dtype=torch.int32)
    return AttentionCase(query, keys, values, cache, table, offsets, torch.tensor(kv_lens, dtype=torch.int32))


def _pages(
    num_pages: int, heads: int, dim: int, dtype: torch.dtype, used: Tensor, generator: torch.Generator
) -> PagedKV:
    """Random pages, NaN where `used` [num_pages, 16] is False."""
    shape = (num_pages, heads, PAGE_LEN, dim)
    unused = ~used[:, None, :].expand(shape[:3])
    tensors, scales = [], []
    for _ in range(2):
        if dtype == torch.int8:
            codes = torch.randint(-127, 128, shape, generator=generator).to(torch.int8)
            scale = (torch.rand(shape[:3], generator=generator) + 0.5) / 80
            tensors.append(codes.masked_fill(unused[..., None], -128))
            scales.append(scale.masked_fill(unused, torch.nan))
        else:
            plain = torch.randn(shape, generator=generator).to(dtype)
            tensors.append(plain.masked_fill(unused[..., None], torch.nan))
    return PagedKV(tensors[0], tensors[1], *(scales or (None, None)), "plain")


def only_rows(case: AttentionCase, rows: list[int], page_seed: int) -> AttentionCase:
    """The same rows in other slots and with other page numbers: a new table and moved pages."""
    offsets = case.query_offsets.tolist()
    tokens = [t for b in rows for t in range(offsets[b], offsets[b + 1])]
    counts = [offsets[b + 1] - offsets[b] for b in rows]
    num_pages = case.cache.k.shape[0]
    moved = torch.randperm(num_pages, generator=torch.Generator().manual_seed(page_seed))
    table = case.page_table[rows].clone()
    real = table < num_pages
    table[real] = moved[table[real].long()].to(torch.int32)
    c = case.cache

    def move(pages: Tensor) -> Tensor:
        result = torch.empty_like(pages)
        result[moved] = pages
        return result

    scales = [None if s is None else move(s) for s in (c.k_scales, c.v_scales)]
    return AttentionCase(
        case.query[tokens],
        case.keys[tokens],
        case.values[tokens],
        PagedKV(move(c.k), move(c.v), scales[0], scales[1], "plain"),
        table,
        torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32),
        case.kv_lens[rows],
    )


def decode_steps(case: AttentionCase) -> AttentionCase:
    """The same queries, each as a row of its own of one query: what decoding them one by one would ask."""
    offsets, lens = case.query_offsets.tolist(), case.kv_lens.tolist()
    rows, lengths = [], []
    for b, length in enumerate(lens):
        count = offsets[b + 1] - offsets[b]
        rows += [b] * count
        lengths += [length - count + j + 1 for j in range(count)]
    return replace(
        case,
        page_table=case.page_table[rows],
        query_offsets=torch.arange(len(rows) + 1, dtype=torch.int32),
        kv_lens=torch.tensor(lengths, dtype=torch.int32),
    )


def float64_case(case: AttentionCase, dtype: torch.dtype = torch.float64) -> AttentionCase:
    """The case over dequantised pages with queries and pages of `dtype`."""
    c = case.cache
    pages = PagedKV(c.keys().to(dtype), c.values().to(dtype), None, None, "plain")
    return replace(case, query=case.query.to(dtype), cache=pages)


def plain_torch_attention(case: AttentionCase, *, causal: bool) -> Tensor:
    """Attention with every intermediate in the query's dtype: the error that this dtype itself brings."""
    wide = float64_case(case, case.query.dtype)
    offsets, lens = case.query_offsets.tolist(), case.kv_lens.tolist()
    out = torch.zeros_like(case.query)
    for b, length in enumerate(lens):
        count = offsets[b + 1] - offsets[b]
        if not count or not length:
            continue
        ids = case.page_table[b, : -(-length // PAGE_LEN)].long()
        k, v = (p[ids].transpose(1, 2).flatten(0, 1)[:length] for p in (wide.cache.k, wide.cache.v))
        q = case.query[offsets[b] : offsets[b + 1]] * case.query.shape[-1] ** -0.5
        scores = torch.einsum("nhd,thd->nht", q, k)
        if causal:
            positions = torch.arange(length - count, length)
            scores = scores.masked_fill((torch.arange(length) > positions[:, None])[:, None], -torch.inf)
        out[offsets[b] : offsets[b + 1]] = torch.einsum("nht,thd->nhd", scores.softmax(-1), v)
    return out


@dataclass(frozen=True, slots=True)
class SamplingCase:
    """Arguments of `delayed_sample_step`."""

    logits: Tensor
    batch: SampleBatch
    delays: Tensor
    sequences: Tensor

    def to(self, device: torch.device | str) -> SamplingCase:
        """The same case elsewhere. A copy also on the same device."""
        fields = {name: getattr(self.batch, name).to(device, copy=True) for name in SampleBatch.__slots__}
        moved = [t.to(device, copy=True) for t in (self.logits, self.delays, self.sequences)]
        return SamplingCase(moved[0], SampleBatch(**fields), moved[1], moved[2])


@dataclass(frozen=True, slots=True)
class Request:
    """One request of a sampling case; the fields of `SampleBatch`."""

    rows: int = 2
    step: int = 6
    num_frames: int = 30
    seed: int = 1
    guidance: float = 3.0
    beta: float = 2.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.0


def sampling_case(
    requests: list[Request], num_codes: int, *, seed: int = 0, codebooks: int = 4, logits: Tensor | None = None
) -> SamplingCase:
    """Requests over random logits (3 standard deviations wide), slots in reverse with one unused between."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(r.rows for r in requests)
    if logits is None:
        logits = 3 * torch.randn(total, codebooks, num_codes, generator=generator)
    offsets = [0]
    for r in requests:
        offsets.append(offsets[-1] + r.rows)
    count = len(requests)

    def ints(values: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype)

    batch = SampleBatch(
        ints(offsets),
        ints([2 * (count - 1 - i) for i in range(count)]),
        ints([r.step for r in requests]),
        ints([r.num_frames for r in requests]),
        ints([r.seed for r in requests], torch.int64),
        torch.tensor([r.guidance for r in requests]),
        torch.tensor([r.beta for r in requests]),
        torch.tensor([r.temperature for r in requests]),
        ints([r.top_k for r in requests]),
        torch.tensor([r.top_p for r in requests]),
    )
    max_steps = max(r.step for r in requests) + 2
    sequences = torch.full((2 * count, codebooks, max_steps), -1, dtype=torch.int32)
    return SamplingCase(logits, batch, torch.arange(codebooks, dtype=torch.int32), sequences)
