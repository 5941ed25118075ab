"""Packed weights: formats of quantised or reordered matrices, packing and unpacking.

A packed matrix is one uint8 tensor: a 64-byte header that describes the contents, then codes, then scales. Kinds:

    fp32   the weight itself
    bf16   rounded to nearest even
    int8   q in [−127, 127], weight ≈ q · s
    int4   q in [0, 15],     weight ≈ (q − 8) · s

with one bfloat16 scale s for each output row and group of consecutive inputs. Orders of the elements:

    "rows"   codes [N, K] (int4: byte j of a row holds input 2j in its low, 2j+1 in its high half),
             scales [N, K/group]
    "tiles"  the CPU's: 16 output rows side by side. fp32 [N/16, K, 16]; bf16 [N/16, K/2, 16, 2];
             int8 [N/16, K/4, 16, 4]; int4 [N/16, K/32, 4, 16, 4], where byte (q, row, i) of a block of 32
             inputs holds input 4q+i in its low and input 16+4q+i in its high half; scales [N/16, K/group, 16]
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .checks import check_tensor, describe
from .errors import KernelArgumentError

Kind = Literal["fp32", "bf16", "int8", "int4"]
Order = Literal["rows", "tiles"]

KINDS: tuple[Kind, ...] = ("fp32", "bf16", "int8", "int4")
ORDERS: tuple[Order, ...] = ("rows", "tiles")
TILE = 16
DEFAULT_GROUP = {"fp32": 0, "bf16": 0, "int8": 128, "int4": 32}
HEADER = struct.Struct("<4sHBBIIIIQ32x")  # magic, version, kind, order, N, K, group, 0, offset of the scales
MAGIC = b"MGKW"
VERSION = 1
_BITS = {"fp32": 32, "bf16": 16, "int8": 8, "int4": 4}


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """A weight matrix [N, K] in one tensor, and its description from the header.

    Attributes:
        data: [num_bytes] uint8, contiguous: header, codes, scales.
        kind: "fp32", "bf16", "int8" or "int4".
        order: "rows" or "tiles".
        out_features: N.
        in_features: K.
        group_len: inputs that share a scale; 0 for fp32 and bf16.
    """

    data: Tensor
    kind: Kind
    order: Order
    out_features: int
    in_features: int
    group_len: int

    @property
    def codes(self) -> Tensor:
        """The codes as uint8 bytes, a view."""
        return self.data[HEADER.size : self.scales_offset]

    @property
    def scales(self) -> Tensor:
        """The scales as bfloat16, a view: [N, K/group] for "rows", [N/16, K/group, 16] for "tiles"; else
        empty.
        """
        flat = self.data[self.scales_offset :].view(torch.bfloat16)
        if not self.group_len:
            return flat
        groups = self.in_features // self.group_len
        if self.order == "rows":
            return flat.view(self.out_features, groups)
        return flat.view(self.out_features // TILE, groups, TILE)

    @property
    def scales_offset(self) -> int:
        """Offset of the scales in `data`, in bytes."""
        return _scales_offset(self.kind, self.out_features, self.in_features)

    def dequantise(self) -> Tensor:
        """The matrix represented, [N, K] float32. A copy."""
        codes = _codes_to_rows(self)
        if not self.group_len:
            return codes.float()
        scales = self.scales
        if self.order == "tiles":
            scales = scales.transpose(1, 2).reshape(self.out_features, -1)
        zero = 8 if self.kind == "int4" else 0
        grouped = codes.float().view(self.out_features, -1, self.group_len) - zero
        return (grouped * scales.float()[..., None]).view(self.out_features, self.in_features)


def pack_linear(
    weight: Tensor, kind: Kind, *, group_len: int | None = None, order: Order | None = None
) -> PackedLinear:
    """Quantise and reorder a weight matrix.

    Args:
        weight: [N, K] of any float dtype; N a multiple of 16, K of 32 (and of the group).
        kind: "fp32", "bf16", "int8" or "int4".
        group_len: inputs that share a scale, a multiple of 32; None: 128 for int8 (32 where 128 does not
            divide K), 32 for int4. Ignored for fp32 and bf16.
        order: None: "tiles" for a weight on the CPU, "rows" elsewhere.

    Returns:
        The packed matrix, on the weight's device.

    Raises:
        KernelArgumentError: an unsupported shape, kind, group or order, or non-finite weights.
    """
    check_tensor("weight", weight, (None, None), (*_FLOAT_DTYPES,), contiguous=False)
    n, k = weight.shape
    chosen: Order = order or ("tiles" if weight.device.type == "cpu" else "rows")
    if kind not in KINDS or chosen not in ORDERS:
        raise KernelArgumentError("kind, order", f"{KINDS} and {ORDERS}", f"{kind!r} and {chosen!r}")
    if n == 0 or k == 0 or n % TILE or k % 32:
        raise KernelArgumentError("weight", "[multiple of 16, multiple of 32]", describe(weight))
    group = _group_len(kind, k, group_len)
    full = weight.detach().float()
    if not bool(torch.isfinite(full).all()):
        raise KernelArgumentError("weight", "finite values", "infinity or NaN")
    codes, scales = _quantise(full, kind, group)
    payload = [_header(kind, chosen, n, k, group).to(weight.device), _codes_from_rows(codes, kind, chosen)]
    if scales is not None:
        tiled = scales if chosen == "rows" else scales.view(n // TILE, TILE, -1).transpose(1, 2)
        payload.append(tiled.contiguous().view(torch.uint8).flatten())
    return PackedLinear(torch.cat(payload), kind, chosen, n, k, group)


def packed_bytes(out_features: int, in_features: int, kind: Kind) -> int:
    """Size of the result of `pack_linear` with the default group, in any order."""
    return _num_bytes(kind, out_features, in_features, _group_len(kind, in_features, None))


def unpack_header(data: Tensor) -> PackedLinear:
    """The packed matrix in a stored uint8 tensor.

    Raises:
        KernelArgumentError: not a packed matrix, an unsupported version, or truncated data.
    """
    check_tensor("data", data, (None,), (torch.uint8,))
    if data.numel() < HEADER.size:
        raise KernelArgumentError("data", f"at least {HEADER.size} bytes", f"{data.numel()}")
    fields = HEADER.unpack(bytes(data[: HEADER.size].cpu().numpy()))
    magic, version, kind, order, n, k, group, _, offset = fields
    if magic != MAGIC or version != VERSION or kind >= len(KINDS) or order >= len(ORDERS):
        got = f"{magic!r} version {version}"
        raise KernelArgumentError("data", f"packed weights of version {VERSION}", got, "pack the weight again")
    packed = PackedLinear(data, KINDS[kind], ORDERS[order], n, k, group)
    expected = _num_bytes(packed.kind, n, k, group)
    if offset != packed.scales_offset or data.numel() != expected:
        raise KernelArgumentError("data", f"{expected} bytes for [{n}, {k}]", f"{data.numel()} bytes")
    return packed


_FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _group_len(kind: Kind, k: int, group_len: int | None) -> int:
    if kind in ("fp32", "bf16"):
        return 0
    if group_len is None:
        group_len = DEFAULT_GROUP[kind] if k % DEFAULT_GROUP[kind] == 0 else 32
    if group_len < 32 or group_len % 32 or k % group_len:
        raise KernelArgumentError("group_len", f"a multiple of 32 that divides {k}", str(group_len))
    return group_len


def _scales_offset(kind: Kind, n: int, k: int) -> int:
    return HEADER.size + n * k * _BITS[kind] // 8


def _num_bytes(kind: Kind, n: int, k: int, group: int) -> int:
    return _scales_offset(kind, n, k) + (2 * n * (k // group) if group else 0)


def _header(kind: Kind, order: Order, n: int, k: int, group: int) -> Tensor:
    offset = _scales_offset(kind, n, k)
    raw = HEADER.pack(MAGIC, VERSION, KINDS.index(kind), ORDERS.index(order), n, k, group, 0, offset)
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)


def _quantise(weight: Tensor, kind: Kind, group: int) -> tuple[Tensor, Tensor | None]:
    """Codes [N, K] (float32, bfloat16, int8 or uint8) and scales [N, K/group] bfloat16."""
    if kind == "fp32":
        return weight, None
    if kind == "bf16":
        return weight.bfloat16(), None
    grouped = weight.view(weight.shape[0], -1, group)
    if kind == "int8":
        scales = _round_up_bf16(grouped.abs().amax(-1) / 127)
        codes = (grouped / _nonzero(scales)).round().clamp(-127, 127).to(torch.int8)
        return codes.view(weight.shape), scales
    # The element of largest magnitude gets code 0 (−8 steps), so that all 16 levels are used.
    low, high = grouped.amin(-1), grouped.amax(-1)
    signed = torch.where(low.abs() >= high.abs(), low, high)
    scales = (signed / -8).bfloat16()
    codes = ((grouped / _nonzero(scales)).round() + 8).clamp(0, 15).to(torch.uint8)
    return codes.view(weight.shape), scales


def _nonzero(scales: Tensor) -> Tensor:
    wide = scales.float()
    return torch.where(wide == 0, torch.ones_like(wide), wide)[..., None]


def _round_up_bf16(x: Tensor) -> Tensor:
    """The smallest bfloat16 that is not below x ≥ 0, so that |weight| / scale never exceeds the largest
    code.
    """
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0xFFFF) >> 16 << 16).view(torch.float32).bfloat16()


def _codes_from_rows(codes: Tensor, kind: Kind, order: Order) -> Tensor:
    n, k = codes.shape
    if order == "rows":
        if kind == "int4":
            codes = codes[:, 0::2] | codes[:, 1::2] << 4
    elif kind == "fp32":
        codes = codes.view(n // TILE, TILE, k).transpose(1, 2)
    elif kind in ("bf16", "int8"):
        run = 2 if kind == "bf16" else 4
        codes = codes.view(n // TILE, TILE, k // run, run).transpose(1, 2)
    else:
        blocks = codes.view(n // TILE, TILE, k // 32, 2, 4, 4).permute(0, 2, 3, 4, 1, 5)
        codes = blocks[:, :, 0] | blocks[:, :, 1] << 4
    return codes.contiguous().view(torch.uint8).flatten()


def _codes_to_rows(packed: PackedLinear) -> Tensor:
    """The codes as [N, K] of float32, bfloat16, int8 or uint8."""
    n, k, raw = packed.out_features, packed.in_features, packed.codes
    tiles = n // TILE
    if packed.kind == "int4":
        if packed.order == "rows":
            return torch.stack([raw & 15, raw >> 4], dim=-1).view(n, k)
        halves = torch.stack([raw & 15, raw >> 4]).view(2, tiles, k // 32, 4, TILE, 4)
        return halves.permute(1, 4, 2, 0, 3, 5).reshape(n, k)
    dtype, run = {"fp32": (torch.float32, 1), "bf16": (torch.bfloat16, 2), "int8": (torch.int8, 4)}[packed.kind]
    codes = raw.view(dtype)
    if packed.order == "rows":
        return codes.view(n, k)
    return codes.view(tiles, k // run, TILE, run).transpose(1, 2).reshape(n, k)
