"""Packed linear, layer norm and embedding in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ..packing import PackedLinear


def linear(
    x: Tensor, weight: PackedLinear, bias: Tensor | None, gelu: bool, residual: Tensor | None, out: Tensor
) -> None:
    """See `musicgen_kernels.linear.linear`; the weight is dequantised, x is not quantised."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x.to(wide) @ weight.dequantise().to(wide).T
    if bias is not None:
        y = y + bias
    if gelu:
        y = functional.gelu(y)
    if residual is not None:
        y = residual.to(wide) + y
    out.copy_(y)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float, out: Tensor) -> None:
    """See `musicgen_kernels.norm.layer_norm`."""
    h = x.to(weight.dtype)
    if residual is not None:
        residual += h
        h = residual
    centred = h - h.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    out.copy_(centred * torch.rsqrt(variance + eps) * weight + bias)


def embed_codes(codes: Tensor, tables: Tensor, positions: Tensor, sinusoids: Tensor, out: Tensor) -> None:
    """See `musicgen_kernels.norm.embed_codes`."""
    total = tables[0, codes[:, 0].long()].to(out.dtype)
    for k in range(1, tables.shape[0]):
        total = total + tables[k, codes[:, k].long()].to(out.dtype)
    out.copy_(total + sinusoids[positions.long()])
