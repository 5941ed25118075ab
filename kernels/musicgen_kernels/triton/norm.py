"""Layer norm (one program per row) and the input embedding (one program per token and block of channels)."""

# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .runtime import interpreted, launch, narrow, power_of_2, require_no_float64

_EMBED_BLOCK = 512


@triton.jit
def _layer_norm(
    x,
    weight,
    bias,
    residual,
    out,
    eps,
    dim,
    BLOCK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    EMULATE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < dim
    h = tl.load(x + row * dim + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        h += tl.load(residual + row * dim + columns, mask=inside, other=0.0)
        tl.store(residual + row * dim + columns, h, mask=inside)
    mean = tl.sum(h, axis=0) / dim
    centred = tl.where(inside, h - mean, 0.0)
    centred -= tl.where(inside, tl.sum(centred, axis=0) / dim, 0.0)  # remove the rounding error of the mean
    variance = tl.sum(centred * centred, axis=0) / dim
    y = centred * tl.rsqrt(variance + eps)
    y = y * tl.load(weight + columns, mask=inside, other=0.0) + tl.load(bias + columns, mask=inside, other=0.0)
    tl.store(out + row * dim + columns, narrow(y, out.dtype.element_ty, EMULATE), mask=inside)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float, out: Tensor) -> None:
    """See `musicgen_kernels.norm.layer_norm`."""
    require_no_float64("x", x)
    rows, dim = x.shape
    block = power_of_2(dim)
    launch(
        _layer_norm,
        (rows,),
        x,
        x,
        weight,
        bias,
        x if residual is None else residual,
        out,
        eps,
        dim,
        BLOCK=block,
        HAS_RESIDUAL=residual is not None,
        EMULATE=interpreted(),
        num_warps=4 if block <= 2048 else 8,
    )


@triton.jit
def _embed_codes(
    codes,
    tables,
    positions,
    sinusoids,
    out,
    num_entries,
    dim,
    NUM_CODEBOOKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < dim
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for k in tl.static_range(NUM_CODEBOOKS):
        code = tl.load(codes + token * NUM_CODEBOOKS + k).to(tl.int64)
        entry = (k * num_entries + code) * dim
        value = tl.load(tables + entry + columns, mask=inside, other=0.0).to(tl.float32)
        total = value if k == 0 else total + value
    position = tl.load(positions + token).to(tl.int64)
    total += tl.load(sinusoids + position * dim + columns, mask=inside, other=0.0)
    tl.store(out + token * dim + columns, total, mask=inside)


def embed_codes(codes: Tensor, tables: Tensor, positions: Tensor, sinusoids: Tensor, out: Tensor) -> None:
    """See `musicgen_kernels.norm.embed_codes`."""
    require_no_float64("tables", tables)
    num_codebooks, num_entries, dim = tables.shape
    block = min(power_of_2(dim), _EMBED_BLOCK)
    launch(
        _embed_codes,
        (codes.shape[0], -(-dim // block)),
        tables,
        codes,
        tables,
        positions,
        sinusoids,
        out,
        num_entries,
        dim,
        NUM_CODEBOOKS=num_codebooks,
        BLOCK=block,
        num_warps=4,
    )
