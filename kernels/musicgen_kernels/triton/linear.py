"""Matrix product with packed weights in "rows" order: one program per tile of 16 rows of x and tile of outputs.

A program runs over all of K in ascending blocks whose length depends only on K and the group, and a tile has 16 rows
for any M, so a row of the result is bit-identical in any batch. A vendor library would choose its order by M.

Quantised weights are scaled in float32, in effect in float16 if x is: the compiler rounds the scale to float16 first,
which is exact for magnitudes from 2^-17 to 65504. Products are computed in x's dtype if x is 16 bits wide and the
weight is quantised or has that dtype; all other combinations are computed in float32.
"""

# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..errors import KernelArgumentError
from ..packing import PackedLinear
from .attention import _multiply
from .runtime import VARYING, interpreted, launch, narrow, require_no_float64

_TILE_M = 16
_TILE_N = 16
_BLOCKS_K = (128, 64, 32)
_VIEW = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8, "int4": torch.uint8}
_TRITON_DTYPE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _nibble_minus_8(nibble):
    """nibble − 8 in float16, exact. float16 numbers from 1024 on are 1 apart, so a nibble in the low bits of 1024.0
    (0x6400) adds itself: no conversion from integers is needed.
    """
    return (nibble | 0x6400).to(tl.float16, bitcast=True) - 1032.0


@triton.jit
def _scaled(codes, scales, outputs, first, stride, there, GROUP: tl.constexpr, BLOCK_K: tl.constexpr):
    """Codes [N, J] of BLOCK_K inputs from `first` on, times their groups' scales."""
    if GROUP >= BLOCK_K:
        scale = tl.load(scales + outputs * stride + first // GROUP, mask=there, other=0.0).to(tl.float32)
        return codes * scale[:, None]
    else:  # noqa: RET505 - code after the return would be compiled for long groups too, with no group in a block
        GROUPS: tl.constexpr = BLOCK_K // GROUP
        at = outputs[:, None] * stride + first // GROUP + tl.arange(0, GROUPS)[None, :]
        scale = tl.load(scales + at, mask=there[:, None], other=0.0).to(tl.float32)
        grouped = tl.reshape(codes, (codes.shape[0], GROUPS, codes.shape[1] // GROUPS))
        return tl.reshape(grouped * scale[:, :, None], codes.shape)


@triton.jit(do_not_specialize=VARYING)
def _linear(
    x,
    codes,
    scales,
    bias,
    residual,
    out,
    num_rows,
    out_features,
    in_features,
    IS_INT4: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GELU: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EMULATE: tl.constexpr,
):
    rows = (tl.program_id(1) * TILE_M + tl.arange(0, TILE_M)).to(tl.int64)
    outputs = (tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)).to(tl.int64)
    rows_inside, outputs_inside = rows < num_rows, outputs < out_features
    total = tl.zeros((TILE_M, TILE_N), tl.float32)
    for first in range(0, in_features, BLOCK_K):
        inputs = first + tl.arange(0, BLOCK_K)
        x_at = x + rows[:, None] * in_features + inputs[None, :]
        x_tile = tl.load(x_at, mask=rows_inside[:, None], other=0.0)
        if IS_INT4:
            packed = first // 2 + tl.arange(0, BLOCK_K // 2)
            w_at = codes + outputs[:, None] * (in_features // 2) + packed[None, :]
            pair = tl.load(w_at, mask=outputs_inside[:, None], other=0).to(tl.int16)
            stride = in_features // GROUP
            low = _scaled(
                _nibble_minus_8(pair & 15),
                scales, outputs, first, stride, outputs_inside, GROUP, BLOCK_K,
            )  # fmt: skip
            high = _scaled(
                _nibble_minus_8(pair >> 4),
                scales, outputs, first, stride, outputs_inside, GROUP, BLOCK_K,
            )  # fmt: skip
            even, odd = tl.split(tl.reshape(x_tile, (TILE_M, BLOCK_K // 2, 2)))
            total += _multiply(even, tl.trans(narrow(low, DOT_DTYPE, EMULATE)), DOT_DTYPE, EMULATE)
            total += _multiply(odd, tl.trans(narrow(high, DOT_DTYPE, EMULATE)), DOT_DTYPE, EMULATE)
        else:
            w_at = codes + outputs[:, None] * in_features + inputs[None, :]
            w = tl.load(w_at, mask=outputs_inside[:, None], other=0)
            if GROUP > 0:
                stride = in_features // GROUP
                w = _scaled(w.to(tl.float32), scales, outputs, first, stride, outputs_inside, GROUP, BLOCK_K)
            total += _multiply(x_tile, tl.trans(w), DOT_DTYPE, EMULATE)
    if HAS_BIAS:
        total += tl.load(bias + outputs, mask=outputs_inside, other=0.0)[None, :]
    if GELU:
        total = 0.5 * total * (1.0 + tl.erf(total * 0.7071067811865476))
    inside = rows_inside[:, None] & outputs_inside[None, :]
    at = rows[:, None] * out_features + outputs[None, :]
    if HAS_RESIDUAL:
        total += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, narrow(total, out.dtype.element_ty, EMULATE), mask=inside)


def _block_k(in_features: int, group_len: int) -> int:
    """The block length of K. Depends only on K and the group, and so does the order of the sum."""
    for block in _BLOCKS_K:
        whole_groups = not group_len or group_len % block == 0 or block % group_len == 0
        if in_features % block == 0 and whole_groups:
            return block
    raise KernelArgumentError("weight", "in_features and group_len multiples of 32", f"{in_features}")


def _num_warps(weight: PackedLinear, narrow_product: bool) -> int:
    """Warps of a program: the fewer, the less is dequantised twice, for all of them need the whole tile of weights.

    docs/performance.md has the instruction counts.
    """
    if not narrow_product:
        return 8  # float32 products hold more in registers
    if weight.group_len == 0:
        return 4
    return 2 if weight.kind == "int8" else 1


def linear(
    x: Tensor, weight: PackedLinear, bias: Tensor | None, gelu: bool, residual: Tensor | None, out: Tensor
) -> None:
    """See `musicgen_kernels.linear.linear`."""
    require_no_float64("x", x)
    if weight.order != "rows":
        raise KernelArgumentError("weight.order", "'rows' on GPU backends", repr(weight.order), "pack it in that order")
    codes = weight.codes.view(_VIEW[weight.kind])
    narrow_product = x.dtype != torch.float32 and (weight.group_len > 0 or codes.dtype == x.dtype)
    launch(
        _linear,
        (-(-weight.out_features // _TILE_N), -(-x.shape[0] // _TILE_M)),
        x,
        x,
        codes,
        weight.scales if weight.group_len else x,
        x if bias is None else bias,
        x if residual is None else residual,
        out,
        x.shape[0],
        weight.out_features,
        weight.in_features,
        IS_INT4=weight.kind == "int4",
        GROUP=weight.group_len,
        HAS_BIAS=bias is not None,
        GELU=gelu,
        HAS_RESIDUAL=residual is not None,
        DOT_DTYPE=_TRITON_DTYPE[x.dtype] if narrow_product else tl.float32,
        TILE_M=_TILE_M,
        TILE_N=_TILE_N,
        BLOCK_K=_block_k(weight.in_features, weight.group_len),
        EMULATE=interpreted(),
        num_warps=_num_warps(weight, narrow_product),
        num_stages=8 if narrow_product else 3,  # few programs for a narrow matrix, so each keeps many bytes in flight
        enable_fp_fusion=False,
    )
