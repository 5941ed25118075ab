"""Streaming layers of EnCodec's SEANet decoder, which process their input in pieces.

A layer is its weights plus a pure function of (input, tail) that returns the output and the tail for the next piece. A
tail holds the last inputs that later outputs still need, so its size is fixed. Because the convolutions look ahead, a
layer's output lags its input by its right padding until the last piece catches up.

Time is the outermost axis, `[n, B, C]`: a shifted window of any batch is then one contiguous matrix, so every
convolution is a few matrix products without copies. Independent of codes, streams and checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from musicgen.config import PadMode

_MIN_OUTPUTS = 24
"""Products with fewer columns are slow."""


@dataclass(frozen=True, slots=True)
class Piece:
    """The position of a piece in its signal: padding is added only at the signal's ends."""

    first: bool
    last: bool


def pad_time(x: Tensor, left: int, right: int, mode: PadMode) -> Tensor:
    """Pad `[n, B, C]` in time as EnCodec does.

    Reflection needs more samples than it adds; shorter signals are first extended with just enough zeros, which are
    removed afterwards. Source: EnCodec (Défossez et al. 2022), the padding of its convolutions.
    """
    if left == 0 and right == 0:
        return x
    num_zeros = max(0, max(left, right) - x.shape[0] + 1) if mode == "reflect" else 0
    if num_zeros:
        x = F.pad(x, (0, 0, 0, 0, 0, num_zeros))
    if mode == "reflect":
        before, after = x[1 : left + 1].flip(0), x[-right - 1 : -1].flip(0)
    elif mode == "replicate":
        before, after = x[:1].expand(left, -1, -1), x[-1:].expand(right, -1, -1)
    else:
        before, after = x.new_zeros(left, *x.shape[1:]), x.new_zeros(right, *x.shape[1:])
    padded = torch.cat((before, x, after))
    return padded[: padded.shape[0] - num_zeros]


def extend(x: Tensor, tail: Tensor, piece: Piece, left: int, right: int, mode: PadMode) -> tuple[Tensor, Tensor]:
    """Prepend the tail of the preceding piece, and add padding at the ends of the signal.

    Args:
        x: `[n, B, C]` the new input.
        tail: `[left + right, B, C]` the tail previously returned; ignored for a first piece.
    Returns:
        The extended piece, and the next tail, a view of it.
    """
    joined = x if piece.first or tail.shape[0] == 0 else torch.cat((tail, x))
    joined = pad_time(joined, left if piece.first else 0, right if piece.last else 0, mode)
    return joined, joined[max(0, joined.shape[0] - (left + right)) :]


def elu(x: Tensor) -> Tensor:
    """max(x, exp(min(x, 0)) − 1), which is the ELU because exp(x) ≥ 1 + x.

    Several times faster on a CPU than torch's, whose expm1 is slow; the error is below 1e-7.
    """
    negative = x.clamp(max=0).exp_().sub_(1)
    return torch.maximum(x, negative, out=negative)


class StreamConv(nn.Module):
    """A convolution of stride 1 that preserves the signal's length."""

    def __init__(self, in_dim: int, out_dim: int, kernel_size: int, dilation: int, pad_mode: PadMode) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(kernel_size, in_dim, out_dim), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(out_dim), requires_grad=False)
        self.dilation = dilation
        self.pad_mode: PadMode = pad_mode
        self.tail_len = (kernel_size - 1) * dilation
        self.pad_right = self.tail_len // 2
        self.pad_left = self.tail_len - self.pad_right
        self.tail_shape = (self.tail_len, in_dim)
        steps = _MIN_OUTPUTS // out_dim
        fits = dilation == 1 and kernel_size > 2 and self.tail_len <= steps <= kernel_size + 1
        self.steps_per_row = steps if fits else 1
        """See `_convolve_thin`. More would be mostly zeros; fewer than the tail would need more than two products."""

    def extend(self, x: Tensor, tail: Tensor, piece: Piece) -> tuple[Tensor, Tensor]:
        return extend(x, tail, piece, self.pad_left, self.pad_right, self.pad_mode)

    def convolve(self, extended: Tensor) -> Tensor:
        """`[n + tail_len, B, in_dim]` → `[n, B, out_dim]`, no padding."""
        num_taps, in_dim, out_dim = self.weight.shape
        num_out, batch = extended.shape[0] - self.tail_len, extended.shape[1]
        if batch == 1 and self.steps_per_row > 1:
            return self._convolve_thin(extended, num_out)
        rows = extended.reshape(-1, in_dim)
        stride = self.dilation * batch
        out = torch.addmm(self.bias, rows[: num_out * batch], self.weight[0])
        for tap in range(1, num_taps):
            out.addmm_(rows[tap * stride : tap * stride + num_out * batch], self.weight[tap])
        return out.view(num_out, batch, out_dim)

    def _convolve_thin(self, extended: Tensor, num_out: int) -> Tensor:
        """Like `convolve`, for one signal with few outputs: several time steps form one row of the product, with a
        banded weight that holds each output's taps and zeros elsewhere."""
        _, in_dim, out_dim = self.weight.shape
        steps = self.steps_per_row
        if missing := -num_out % steps:  # at a signal's ends
            extended = F.pad(extended, (0, 0, 0, 0, 0, missing))
        rows = extended.flatten().unfold(0, (steps + self.tail_len) * in_dim, steps * in_dim)
        own, beyond = rows.tensor_split([steps * in_dim], dim=1)  # overlapping rows would be copied
        # Repeating the taps with a period shortened by one shifts them by one place per output.
        taps = F.pad(self.weight, (0, 0, 0, 0, 0, steps)).repeat(steps, 1, 1)[:-steps]
        weight = taps.view(steps, -1, in_dim, out_dim).permute(1, 2, 0, 3).flatten(2)
        out = torch.addmm(self.bias.repeat(steps), own, weight[:steps].flatten(0, 1))
        out.addmm_(beyond, weight[steps:].flatten(0, 1))
        return out.view(-1, 1, out_dim)[:num_out]

    def forward(self, x: Tensor, tail: Tensor, piece: Piece) -> tuple[Tensor, Tensor]:
        extended, tail = self.extend(x, tail, piece)
        return self.convolve(extended), tail


class StreamUpsample(nn.Module):
    """A transposed convolution of stride `ratio` and kernel `2 · ratio`.

    Output block q (`ratio` samples) needs only inputs q and q − 1, so it is two products with the two halves of the
    kernel; the output's first `ratio − ratio // 2` samples belong to the padding that EnCodec cuts off.
    """

    def __init__(self, in_dim: int, out_dim: int, ratio: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, in_dim, ratio * out_dim), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(out_dim), requires_grad=False)
        self.ratio = ratio
        self.trim_right = ratio // 2
        self.trim_left = ratio - self.trim_right
        self.tail_shape = (1, in_dim)

    def forward(self, x: Tensor, tail: Tensor, piece: Piece) -> tuple[Tensor, Tensor]:
        """`[n, B, in_dim]` → `[n · ratio, B, out_dim]`, fewer or more at the signal's ends. `weight[0]` applies to the
        current input, `weight[1]` to the previous one."""
        extended, _ = extend(x, tail, piece, 1, 1, "constant")
        batch, in_dim, out_dim = extended.shape[1], extended.shape[2], self.bias.shape[0]
        rows = extended.reshape(-1, in_dim)
        out = torch.addmm(self.bias.repeat(self.ratio), rows[batch:], self.weight[0])
        out.addmm_(rows[:-batch], self.weight[1])
        blocks = out.view(-1, batch, self.ratio, out_dim).transpose(1, 2).reshape(-1, batch, out_dim)
        end = blocks.shape[0] - (self.trim_right if piece.last else 0)
        return blocks[self.trim_left if piece.first else 0 : end], extended[-1:]


class StreamResidual(nn.Module):
    """ELU, convolution, ELU, pointwise convolution, plus the input (optionally through a pointwise convolution)."""

    def __init__(
        self, dim: int, hidden_dim: int, kernel_size: int, dilation: int, pad_mode: PadMode, conv_shortcut: bool
    ) -> None:
        super().__init__()
        self.conv = StreamConv(dim, hidden_dim, kernel_size, dilation, pad_mode)
        self.project = StreamConv(hidden_dim, dim, 1, 1, pad_mode)
        self.shortcut = StreamConv(dim, dim, 1, 1, pad_mode) if conv_shortcut else None
        self.tail_shape = self.conv.tail_shape

    def forward(self, x: Tensor, tail: Tensor, piece: Piece) -> tuple[Tensor, Tensor]:
        """`[n, B, dim]` → `[n, B, dim]`, fewer or more at the signal's ends. The tail is taken before the ELU, so that
        it serves both branches (padding commutes with the ELU, which maps 0 to 0)."""
        extended, tail = self.conv.extend(x, tail, piece)
        hidden = self.conv.convolve(elu(extended))
        out = self.project.convolve(elu(hidden))
        skip = extended[self.conv.pad_left : extended.shape[0] - self.conv.pad_right]
        out += skip if self.shortcut is None else self.shortcut.convolve(skip)
        return out, tail
