"""Matrix product with packed weights and fused epilogues. For the weight formats see `packing`."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .backend import implementation
from .checks import FLOATS, check_tensor, result_dtype
from .errors import KernelArgumentError
from .packing import PackedLinear, unpack_header

Activation = Literal["none", "gelu"]


def linear(
    x: Tensor,
    weight: PackedLinear,
    bias: Tensor | None = None,
    *,
    activation: Activation = "none",
    residual: Tensor | None = None,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """residual + act(x Wᵀ + bias), accumulated in fp32; gelu is exact, ½h(1 + erf(h/√2)).

    The order of the sum over K is fixed, so a row of the result is bit-identical whatever the other rows are.
    For int8 and int4 weights the CPU backend rounds each row of x to 8 bits in blocks of 32 inputs (scale
    max|x|/127); the reference and GPU backends do not. The resulting normalised squared error is below 1e-4
    (Gaussian inputs).

    Args:
        x: [M, K] float32 (also bfloat16, float16 on GPUs), contiguous.
        weight: [N, K], packed in an order that the backend reads ("tiles" or "rows" on the reference, "tiles"
            on the CPU, "rows" on GPUs).
        bias: [N] float32 or None.
        activation: "none" or "gelu".
        residual: [M, N] of the result's dtype, contiguous, or None.
        out: [M, N] of the result's dtype to write to; may be `residual` itself.
        out_dtype: the result's dtype, float32 or 16 bits wide; None: x's. On GPUs a 16-bit x uses tensor cores, while
            the residual stream stays in float32.
        backend: backend name; None selects one automatically.

    Returns:
        [M, N] of `out_dtype`.

    Raises:
        KernelArgumentError: wrong shape, dtype, device or layout, or a header that does not match the
            description.
        BackendUnavailableError: the requested backend cannot run here.
    """
    check_packed(weight, x.device)
    rows = check_tensor("x", x, (None, weight.in_features), FLOATS).shape[0]
    shape = (rows, weight.out_features)
    if bias is not None:
        wanted = torch.float64 if x.dtype == torch.float64 else torch.float32
        check_tensor("bias", bias, (weight.out_features,), (wanted,), device=x.device)
    if activation not in ("none", "gelu"):
        raise KernelArgumentError("activation", "'none' or 'gelu'", repr(activation))
    dtype = result_dtype(x, out_dtype)
    if residual is not None:
        check_tensor("residual", residual, shape, (dtype,), device=x.device)
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=x.device)
    check_tensor("out", out, shape, (dtype,), device=x.device)
    run = implementation("linear", x.device, x.dtype, backend)
    run(x, weight, bias, activation == "gelu", residual, out)
    return out


def check_packed(weight: PackedLinear, device: torch.device) -> None:
    """Check that the size and device of a packed weight match its description, and on the CPU also its header.

    Raises:
        KernelArgumentError: they do not.
    """
    if not isinstance(weight, PackedLinear):
        raise KernelArgumentError("weight", "a PackedLinear", type(weight).__name__, "use pack_linear")
    check_tensor("weight.data", weight.data, (None,), (torch.uint8,), device=device)
    if device.type != "cpu":
        return
    if unpack_header(weight.data) != weight:
        raise KernelArgumentError("weight", "a description that matches the header", "a different one")
