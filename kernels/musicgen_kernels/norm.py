"""Layer normalisation and the input embedding. Both allocate only their result."""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import implementation
from .checks import FLOATS, check_tensor, result_dtype
from .errors import KernelArgumentError

_INT = (torch.int32,)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """(h − mean(h)) / √(var(h) + eps) · weight + bias, with h = x, or h = residual + x if a residual is given.

    Two passes (mean, then the variance around it), in at least fp32.

    Args:
        x: [M, dim] float32 (also bfloat16, float16 on GPUs), contiguous.
        weight, bias: [dim] float32.
        residual: [M, dim] float32, contiguous; **mutated** to residual + x.
        eps: added to the variance.
        out: [M, dim] of the result's dtype to write to; may be x.
        out_dtype: the result's dtype, float32 or 16 bits wide; None: x's.
        backend: backend name; None selects one automatically.

    Returns:
        [M, dim] of `out_dtype`.

    Raises:
        KernelArgumentError: wrong shape, dtype, device or layout.
        BackendUnavailableError: the requested backend cannot run here.
    """
    rows, dim = check_tensor("x", x, (None, None), FLOATS).shape
    parameter = (torch.float64,) if x.dtype == torch.float64 else (torch.float32,)
    check_tensor("weight", weight, (dim,), parameter, device=x.device)
    check_tensor("bias", bias, (dim,), parameter, device=x.device)
    if residual is not None:
        check_tensor("residual", residual, (rows, dim), parameter, device=x.device)
    dtype = result_dtype(x, out_dtype)
    if out is None:
        out = torch.empty((rows, dim), dtype=dtype, device=x.device)
    check_tensor("out", out, (rows, dim), (dtype,), device=x.device)
    implementation("layer_norm", x.device, x.dtype, backend)(x, weight, bias, residual, eps, out)
    return out


def sinusoid_table(
    num_positions: int,
    dim: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """concat[cos, sin] of position / 10000^(i/(dim/2 − 1)), i = 0 … dim/2 − 1 (audiocraft
    `create_sin_embedding`).

    Computed in float64, so that distant positions are as accurate as near ones, then rounded to `dtype`.

    Args:
        num_positions: positions 0 … num_positions − 1.
        dim: even, at least 4.

    Returns:
        [num_positions, dim] of `dtype`.

    Raises:
        KernelArgumentError: an odd or too small dim.
    """
    if dim < 4 or dim % 2:
        raise KernelArgumentError("dim", "an even number of at least 4", str(dim))
    exponents = torch.arange(dim // 2, dtype=torch.float64) / (dim // 2 - 1)
    phases = torch.arange(num_positions, dtype=torch.float64)[:, None] / 10000.0**exponents
    return torch.cat([phases.cos(), phases.sin()], dim=1).to(device=device, dtype=dtype)


def embed_codes(
    codes: Tensor,
    tables: Tensor,
    positions: Tensor,
    sinusoids: Tensor,
    *,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Σ_k tables[k, codes[·, k]] + sinusoids[position]: the model's input for positions that hold codes.

    The sum runs over k in ascending order from tables[0]; the sinusoid is added last.

    Args:
        codes: [N, K] int32, each in [0, num_codes]; `num_codes` is the special token.
        tables: [K, num_codes + 1, dim] float32 (also bfloat16, float16, float64), contiguous.
        positions: [N] int32 ≥ 0, counted from the row's first position, including the prefix.
        sinusoids: [max_positions, dim] float32 of `sinusoid_table` (float64 for float64 tables).
        out: [N, dim] of the sinusoids' dtype to write to.
        backend: backend name; None selects one automatically.

    Returns:
        [N, dim] of the sinusoids' dtype.

    Raises:
        KernelArgumentError: wrong shape, dtype, device or layout; on the CPU also a code or position out of
            range.
        BackendUnavailableError: the requested backend cannot run here.
    """
    num_codebooks, _, dim = check_tensor("tables", tables, (None, None, None), FLOATS).shape
    tokens = check_tensor("codes", codes, (None, num_codebooks), _INT, device=tables.device).shape[0]
    check_tensor("positions", positions, (tokens,), _INT, device=tables.device)
    result = torch.float64 if tables.dtype == torch.float64 else torch.float32
    check_tensor("sinusoids", sinusoids, (None, dim), (result,), device=tables.device)
    if out is None:
        out = torch.empty(tokens, dim, dtype=result, device=tables.device)
    check_tensor("out", out, (tokens, dim), (result,), device=tables.device)
    run = implementation("embed_codes", tables.device, tables.dtype, backend)
    run(codes, tables, positions, sinusoids, out)
    return out
