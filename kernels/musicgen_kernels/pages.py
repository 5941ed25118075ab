"""The paged KV store: memory layout, allocation and reading back. Independent of page ownership.

A page holds PAGE_LEN positions of one layer, for all heads, with keys and values in separate tensors. A tensor of pages
always has the shape [num_pages, H, 16, D]; the order of the 16·D elements of a head's page depends on `layout`:

    "plain"  keys and values [16 positions, D]                                   (CUDA, Triton, reference)
    "cpu"    float keys [D, 16 positions], float values [16 positions, D];
             int8 keys [D/2, 16 positions, 2], int8 values [8 pairs of positions, D, 2]

The CPU layouts put 16 positions next to each other, so that a score is a vertical sum (no reduction across lanes), and
int8 pairs next to each other, so that 16-bit multiply-add instructions can use them directly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .errors import KernelArgumentError
from .isa import zero_bytes

PAGE_LEN = 16
SPLIT_LEN = 256
"""Attention always combines positions in splits of this length, so that results do not depend on the batch."""

KV_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
Layout = Literal["plain", "cpu"]


@dataclass(frozen=True, slots=True)
class PagedKV:
    """The pages of one layer. The tensors are mutated by `append_paged_kv`.

    Attributes:
        k: [num_pages, H, 16, D] float32, bfloat16, float16 or int8, in the order given by `layout`.
        v: as k.
        k_scales: [num_pages, H, 16] float32 if k is int8 (key = k · scale, one per position and head), else None.
        v_scales: as k_scales.
        layout: "plain" or "cpu".
    """

    k: Tensor
    v: Tensor
    k_scales: Tensor | None
    v_scales: Tensor | None
    layout: Layout

    def keys(self) -> Tensor:
        """All keys in plain order, [num_pages, H, 16, D], int8 dequantised to float32. A copy."""
        return _dequantise(_keys_to_plain(self.k, self.layout), self.k_scales)

    def values(self) -> Tensor:
        """All values in plain order, [num_pages, H, 16, D], int8 dequantised to float32. A copy."""
        return _dequantise(_values_to_plain(self.v, self.layout), self.v_scales)


@dataclass(frozen=True, slots=True)
class KVStore:
    """The pages of all layers of a model: the tensors of `PagedKV` with a leading layer axis, contiguous.

    Attributes:
        k, v: [num_layers, num_pages, H, 16, D].
        k_scales, v_scales: [num_layers, num_pages, H, 16] float32, or None.
        layout: "plain" or "cpu".
    """

    k: Tensor
    v: Tensor
    k_scales: Tensor | None
    v_scales: Tensor | None
    layout: Layout

    def layer(self, index: int) -> PagedKV:
        """The pages of one layer, as views."""
        scales = (None, None)
        if self.k_scales is not None and self.v_scales is not None:
            return PagedKV(self.k[index], self.v[index], self.k_scales[index], self.v_scales[index], self.layout)
        return PagedKV(self.k[index], self.v[index], *scales, self.layout)

    @property
    def num_bytes(self) -> int:
        """Memory held, in bytes."""
        return sum(t.nbytes for t in (self.k, self.v, self.k_scales, self.v_scales) if t is not None)


def page_bytes(num_layers: int, num_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of one page over all layers, including keys, values and scales."""
    element = torch.empty(0, dtype=dtype).element_size()
    scale = 4 if dtype == torch.int8 else 0
    return 2 * num_layers * num_heads * PAGE_LEN * (head_dim * element + scale)


def new_kv_store(
    num_layers: int,
    num_pages: int,
    num_heads: int,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float16,
    *,
    device: torch.device | str = "cpu",
    layout: Layout | None = None,
) -> KVStore:
    """Allocate zero-initialised pages for a model; on the CPU, memory is committed when a page is first written.
    `layout` None: "cpu" on the CPU, "plain" elsewhere.

    Raises:
        KernelArgumentError: unsupported size or dtype.
    """
    if dtype not in KV_DTYPES:
        raise KernelArgumentError("dtype", "float32, bfloat16, float16 or int8", str(dtype))
    if min(num_layers, num_pages, num_heads) < 1 or head_dim < 16 or head_dim % 16:
        got = f"{num_layers} layers, {num_pages} pages, {num_heads} heads of {head_dim}"
        raise KernelArgumentError("sizes", "at least 1 of each, head_dim a multiple of 16", got)
    place = torch.device(device)
    chosen: Layout = layout or ("cpu" if place.type == "cpu" else "plain")
    shape = (num_layers, num_pages, num_heads, PAGE_LEN, head_dim)

    def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if place.type != "cpu":
            return torch.zeros(shape, dtype=dtype, device=place)
        return zero_bytes(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)

    def scales() -> Tensor | None:
        return zeros(shape[:-1], torch.float32) if dtype == torch.int8 else None

    return KVStore(zeros(shape, dtype), zeros(shape, dtype), scales(), scales(), chosen)


def _keys_to_plain(pages: Tensor, layout: Layout) -> Tensor:
    num_pages, heads, page_len, dim = pages.shape
    if layout == "plain":
        return pages.clone()
    if pages.dtype == torch.int8:
        pairs = pages.reshape(num_pages, heads, dim // 2, page_len, 2)
        return pairs.permute(0, 1, 3, 2, 4).reshape(pages.shape)
    return pages.reshape(num_pages, heads, dim, page_len).transpose(2, 3).contiguous()


def _values_to_plain(pages: Tensor, layout: Layout) -> Tensor:
    num_pages, heads, page_len, dim = pages.shape
    if layout == "plain" or pages.dtype != torch.int8:
        return pages.clone()
    pairs = pages.reshape(num_pages, heads, page_len // 2, dim, 2)
    return pairs.permute(0, 1, 2, 4, 3).reshape(pages.shape)


def keys_from_plain(plain: Tensor, layout: Layout) -> Tensor:
    """Plain keys [num_pages, H, 16, D] in the order of `layout`; the inverse of `PagedKV.keys`. A copy."""
    num_pages, heads, page_len, dim = plain.shape
    if layout == "plain":
        return plain.clone()
    if plain.dtype == torch.int8:
        pairs = plain.reshape(num_pages, heads, page_len, dim // 2, 2).permute(0, 1, 3, 2, 4)
        return pairs.reshape(plain.shape)
    return plain.transpose(2, 3).reshape(plain.shape)


def values_from_plain(plain: Tensor, layout: Layout) -> Tensor:
    """Plain values [num_pages, H, 16, D] in the order of `layout`. A copy."""
    num_pages, heads, page_len, dim = plain.shape
    if layout == "plain" or plain.dtype != torch.int8:
        return plain.clone()
    pairs = plain.reshape(num_pages, heads, page_len // 2, 2, dim).permute(0, 1, 2, 4, 3)
    return pairs.reshape(plain.shape)


def _dequantise(plain: Tensor, scales: Tensor | None) -> Tensor:
    if scales is None:
        return plain
    return plain.float() * scales[..., None]
