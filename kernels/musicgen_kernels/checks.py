"""Argument validation shared by all operations: shape, dtype, device, contiguity. Never reads tensor contents."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import KernelArgumentError

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def describe(value: object) -> str:
    """A one-line description of a value, for error messages."""
    if isinstance(value, Tensor):
        name = str(value.dtype).removeprefix("torch.")
        return f"{name} {list(value.shape)} on {value.device}"
    return f"{type(value).__name__} {value!r}"


def check_tensor(
    argument: str,
    value: object,
    shape: Sequence[int | None],
    dtypes: Sequence[torch.dtype],
    *,
    device: torch.device | None = None,
    contiguous: bool = True,
) -> Tensor:
    """Return `value` if it is a tensor of the given shape (None: any size), dtype and device.

    Raises:
        KernelArgumentError: otherwise.
    """
    if not isinstance(value, Tensor):
        raise KernelArgumentError(argument, "a tensor", describe(value))
    actual = value.shape
    if actual != shape and not _fits(actual, shape):  # fast path for equal shapes: a step has some twenty checks
        wanted = "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"
        raise KernelArgumentError(argument, f"shape {wanted}", describe(value))
    if value.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise KernelArgumentError(argument, f"dtype {names}", describe(value))
    if device is not None and value.device != device:
        raise KernelArgumentError(argument, f"a tensor on {device}", describe(value))
    if contiguous and not value.is_contiguous():
        raise KernelArgumentError(
            argument, "a contiguous tensor", f"strides {list(value.stride())}", "call .contiguous()"
        )
    return value


def _fits(actual: Sequence[int], shape: Sequence[int | None]) -> bool:
    fits = len(actual) == len(shape)
    for wanted, size in zip(shape, actual, strict=False):  # a loop is faster than all() for so few
        if wanted is not None and wanted != size:
            fits = False
    return fits


def result_dtype(x: Tensor, wanted: torch.dtype | None) -> torch.dtype:
    """The result dtype for `x`: x's own, or `wanted` if given.

    Raises:
        KernelArgumentError: a conversion from or to float64, or not a floating-point dtype.
    """
    if wanted is None or wanted == x.dtype:
        return x.dtype
    if wanted not in FLOATS or torch.float64 in (wanted, x.dtype):
        got = f"{wanted} for {x.dtype}"
        raise KernelArgumentError("out_dtype", "float32, bfloat16 or float16, for one of these", got)
    return wanted
