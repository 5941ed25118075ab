"""Helpers shared by the Triton operations: launching on the caller's device, powers of two, row search."""

# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import contextlib
import os
from contextlib import AbstractContextManager
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..errors import KernelArgumentError
from ..pages import PagedKV

VARYING = ["num_rows", "num_splits", "max_steps"]
"""Arguments that change from step to step. By default Triton specialises kernels for integers that are 1 or a multiple
of 16, and would recompile in the middle of a step; specialisation is disabled for these.
"""


def interpreted() -> bool:
    """Whether Triton runs kernels on the CPU in its interpreter (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def launch(kernel: Any, grid: tuple[int, ...], near: Tensor, *args: object, **meta: object) -> None:
    """Launch a kernel on the current stream of `near`'s device, unless the grid is empty. `meta` holds the compile-time
    constants and options.
    """
    if min(grid) == 0:
        return
    with _device(near):
        kernel[grid](*args, **meta)


def _device(near: Tensor) -> AbstractContextManager[object]:
    if near.device.type == "cuda" and near.device.index != torch.cuda.current_device():
        return torch.cuda.device(near.device)
    return contextlib.nullcontext()


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def require_plain(cache: PagedKV) -> None:
    """Require pages in plain layout.

    Raises:
        KernelArgumentError: another layout.
    """
    if cache.layout != "plain":
        raise KernelArgumentError("cache.layout", "'plain' on GPU backends", repr(cache.layout))


def require_no_float64(argument: str, tensor: Tensor) -> None:
    """Reject float64, which only the reference supports.

    Raises:
        KernelArgumentError: it is float64.
    """
    if tensor.dtype == torch.float64:
        raise KernelArgumentError(argument, "float32, bfloat16 or float16", "float64", "use the reference")


@triton.jit
def find_row(offsets, num_rows, token):
    """The row that owns a token: the largest b < num_rows with offsets[b] ≤ token."""
    low = token * 0
    high = low + num_rows - 1
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(offsets + middle) <= token:
            low = middle
        else:
            high = middle - 1
    return low


@triton.jit
def find_tile_row(offsets, num_rows, tile, TILE_LEN: tl.constexpr):
    """The row that owns a tile of queries, where row b's tiles begin at number offsets[b] // TILE_LEN + b.

    These numbers leave gaps but never overlap, and need no preceding pass over the rows.
    """
    low = tile * 0
    high = low + num_rows - 1
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(offsets + middle) // TILE_LEN + middle <= tile:
            low = middle
        else:
            high = middle - 1
    return low


@triton.jit
def to_bfloat16(x):
    """float32 → bfloat16, nearest even, by integer arithmetic: the interpreter's own conversion truncates.

    NaN keeps a quiet bit, so that it stays NaN.
    """
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    quiet = (bits >> 16) | 0x40
    return tl.where(x == x, rounded, quiet).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def narrow(x, dtype: tl.constexpr, EMULATE: tl.constexpr):
    """float32 → dtype, nearest even. EMULATE: in the interpreter."""
    if EMULATE and dtype == tl.bfloat16:
        return to_bfloat16(x)
    return x.to(dtype)
