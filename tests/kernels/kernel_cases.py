"""What several kernel tests share: the case matrix, guarded memory, the rule by which an error is judged."""

from __future__ import annotations

import ctypes
import mmap
from dataclasses import dataclass

import torch
from musicgen_kernels import PAGE_LEN, KVStore, SampleBatch, new_kv_store
from torch import Tensor

LENGTHS = (1, 15, 16, 17, 255, 256, 257, 1770)
ROW_COUNTS = (1, 2, 3, 7, 16)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def assert_as_good_as_torch(result: Tensor, exact: Tensor, torch_result: Tensor) -> None:
    """The error against float64 is at most twice PyTorch's in the same dtype, plus 1e-5."""
    error = (result.double() - exact).abs().max().item()
    peer = (torch_result.double() - exact).abs().max().item()
    assert error <= 2 * peer + 1e-5, f"error {error:.3g}, PyTorch's {peer:.3g}"


def normalised_mse(result: Tensor, exact: Tensor) -> float:
    return ((result.double() - exact.double()).square().sum() / exact.double().square().sum()).item()


def guarded(tensor: Tensor) -> Tensor:
    """A copy whose last byte lies directly before a page that may not be touched: one byte too far is a crash."""
    size = tensor.nbytes
    length = (size + mmap.PAGESIZE - 1) // mmap.PAGESIZE * mmap.PAGESIZE
    region = mmap.mmap(-1, length + mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(region))
    libc = ctypes.CDLL(None, use_errno=True)
    forbidden = ctypes.c_void_p(address + length)
    assert libc.mprotect(forbidden, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    copy = torch.frombuffer(region, dtype=torch.uint8, count=size, offset=length - size).view(tensor.dtype)
    copy = copy.view(tensor.shape)
    copy.copy_(tensor)
    return copy


@dataclass
class PagedRows:
    """Rows of the given lengths over shuffled pages, everything unused poisoned."""

    store: KVStore
    page_table: Tensor
    lens: list[int]

    @property
    def kv_lens(self) -> Tensor:
        return ints(*self.lens)

    def offsets(self, counts: list[int]) -> Tensor:
        return ints(0, *torch.tensor(counts).cumsum(0).tolist())


def paged_rows(lens: list[int], heads: int, dtype: torch.dtype, *, seed: int = 0, head_dim: int = 64) -> PagedRows:
    """Pages for those rows in random order; unused slots are NaN (int8: 127 with NaN scales), unused table entries
    point far outside."""
    counts = [(length + PAGE_LEN - 1) // PAGE_LEN for length in lens]
    generator = torch.Generator().manual_seed(seed)
    store = new_kv_store(1, sum(counts) + 3, heads, head_dim, dtype, layout="cpu")
    poison(store)
    order = torch.randperm(sum(counts) + 3, generator=generator).tolist()
    table = torch.full((len(lens), max([*counts, 1]) + 1), 2**30, dtype=torch.int32)
    for row, count in enumerate(counts):
        for page in range(count):
            table[row, page] = order.pop()
    return PagedRows(store, table, lens)


def poison(store: KVStore) -> None:
    for pages, scales in ((store.k, store.k_scales), (store.v, store.v_scales)):
        if scales is None:
            pages.fill_(torch.nan)
        else:
            pages.fill_(127)
            scales.fill_(torch.nan)


def sample_batch(
    num_requests: int,
    rows: int = 1,
    *,
    step: int = 10,
    num_frames: int = 100,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 0.0,
    seed: int = 0,
) -> SampleBatch:
    """Equal requests with seeds of their own."""

    def floats(value: float) -> Tensor:
        return torch.full((num_requests,), value)

    return SampleBatch(
        row_offsets=torch.arange(num_requests + 1, dtype=torch.int32) * rows,
        slots=torch.arange(num_requests, dtype=torch.int32),
        steps=torch.full((num_requests,), step, dtype=torch.int32),
        num_frames=torch.full((num_requests,), num_frames, dtype=torch.int32),
        seeds=(torch.arange(num_requests) + seed * 1_000_003) * 0x1E3779B97F4A7C15,
        guidance=floats(3.0),
        guidance_beta=floats(2.0),
        temperature=floats(temperature),
        top_k=torch.full((num_requests,), top_k, dtype=torch.int32),
        top_p=floats(top_p),
    )
