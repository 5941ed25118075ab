"""EnCodec's decoder: codes to samples, whole or incrementally, through one code path.

A whole decode is a loop over pieces, so the results are the same. The state of a stream between pieces is one value of
fixed size, `DecoderState`. Each row is one mono signal; stereo and streams of different ages are handled in
`codec_stream.py`, checkpoints in `weights/codec.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from musicgen.config import CodecConfig
from musicgen.errors import InvalidRequestError
from musicgen.models.seanet import Piece, StreamConv, StreamResidual, StreamUpsample, elu

_WHOLE_PIECE_FRAMES = 250
"""Frames per piece in a whole decode, to bound its memory."""
_UPSAMPLED_FRAMES = 25
"""Approximate frames upsampled at a time, so that the widest activation (4 MB for MusicGen) stays in cache."""
_FUSED_LSTM_SIZE = 8000
"""torch's LSTM reorders all weights at each call; ours costs more per frame. torch's is faster only from
width² / this many frames on: 5 for the demo model (width 192), 131 for Meta's (1024)."""

_LayerState = tuple[Tensor, Tensor]
"""`[B, D]` the hidden state and the cell of a layer of the LSTM."""


@dataclass(frozen=True, slots=True, eq=False)
class DecoderState:
    """Decoder state of B signals of the same age. Immutable: decoding returns a new one."""

    values: Tensor
    """`[B, state_size]` float32: LSTM states and convolution tails, in the order of `EncodecDecoder.state_shapes`."""
    num_frames: int
    """Frames consumed so far."""
    num_samples: int
    """Samples returned so far; lags `num_frames` by up to the look-ahead."""


class EncodecDecoder(nn.Module):
    """The quantiser's codebooks and the SEANet decoder, in float32.

    Source: EnCodec (Défossez et al. 2022), section 3; the non-causal, weight-normalised form that MusicGen uses, with
    the normalisation folded into the weights.
    """

    codebooks: Tensor

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.num_filters * 2 ** len(config.upsampling_ratios)
        books = torch.zeros(config.num_codebooks, config.codebook_size, config.codebook_dim)
        self.register_buffer("codebooks", books)
        self.conv_in = StreamConv(config.hidden_size, dim, config.kernel_size, 1, config.pad_mode)
        self.lstm = nn.LSTM(dim, dim, config.num_lstm_layers)
        self.upsamples = nn.ModuleList()
        self.residuals = nn.ModuleList()
        for ratio in config.upsampling_ratios:
            self.upsamples.append(StreamUpsample(dim, dim // 2, ratio))
            dim //= 2
            self.residuals.append(nn.ModuleList(_residual(config, dim, j) for j in range(config.num_residual_layers)))
        self.conv_out = StreamConv(dim, 1, config.last_kernel_size, 1, config.pad_mode)
        self.min_first_frames = _min_first_frames(self)
        self.state_shapes = _state_shapes(self)
        self.state_size = sum(math.prod(shape) for shape in self.state_shapes)
        self.requires_grad_(False)

    @property
    def stages(self) -> list[tuple[StreamUpsample, list[StreamResidual]]]:
        """The layers between the LSTM and the last convolution, in order."""
        return [
            (cast(StreamUpsample, upsample), [cast(StreamResidual, r) for r in cast(nn.ModuleList, residuals)])
            for upsample, residuals in zip(self.upsamples, self.residuals, strict=True)
        ]

    @property
    def lookahead_frames(self) -> int:
        """Frames that must follow frame t before its last sample is known."""
        return self.min_first_frames

    def initial_state(self, batch_size: int) -> DecoderState:
        values = torch.zeros(batch_size, self.state_size, device=self.codebooks.device)
        return DecoderState(values, num_frames=0, num_samples=0)

    @torch.no_grad()
    def decode(self, codes: Tensor, state: DecoderState, *, last: bool) -> tuple[Tensor, DecoderState]:
        """Decode the next frames of B signals.

        Args:
            codes: `[B, K, T]` integers in [0, codebook_size), T ≥ 0, K ≤ the codec's codebooks.
            state: after the preceding frames; not modified.
            last: True if no frame follows: flushes the buffered samples.
        Returns:
            `[B, N]` float32, the next samples of each signal: all that the frames so far determine, and with `last` all
            remaining ones, so that T frames yield T · hop_length samples in total.
        Raises:
            InvalidRequestError: codes of the wrong shape or out of range.
        """
        self.check_codes(codes)
        latents = self._dequantise(codes)
        tails = self._unpack(state.values)
        first = state.num_frames < self.min_first_frames
        if first:
            latents = torch.cat((tails[0][: state.num_frames], latents))
        num_frames = state.num_frames + codes.shape[-1]
        if (first and num_frames < self.min_first_frames and not last) or (not last and latents.shape[0] == 0):
            if first:
                tails[0] = F.pad(latents, (0, 0, 0, 0, 0, tails[0].shape[0] - num_frames))
            samples = latents.new_zeros(codes.shape[0], 0)
        elif num_frames == 0:
            samples = latents.new_zeros(codes.shape[0], 0)
        else:
            samples, tails = self._synthesise(latents, tails, Piece(first, last))
        after = DecoderState(self._pack(tails), num_frames, state.num_samples + samples.shape[-1])
        return samples, after

    def decode_whole(self, codes: Tensor) -> Tensor:
        """`[B, K, T]` codes → `[B, T · hop_length]` float32 samples.

        Raises:
            InvalidRequestError: see `decode`.
        """
        num_frames = codes.shape[-1]
        samples = torch.empty(codes.shape[0], num_frames * self.config.hop_length, device=self.codebooks.device)
        state = self.initial_state(codes.shape[0])
        for start in range(0, num_frames, _WHOLE_PIECE_FRAMES):
            piece = codes[..., start : start + _WHOLE_PIECE_FRAMES]
            offset = state.num_samples
            out, state = self.decode(piece, state, last=start + _WHOLE_PIECE_FRAMES >= num_frames)
            samples[:, offset : state.num_samples] = out
        return samples

    def check_codes(self, codes: Tensor) -> None:
        """Raises: InvalidRequestError: not `[B, K, T]` integers, or out of range; see `decode`."""
        num_codebooks, codebook_size, _ = self.codebooks.shape
        if codes.ndim != 3 or not 1 <= codes.shape[1] <= num_codebooks or codes.is_floating_point():
            expected = f"integers [B, K, T] with K ≤ {num_codebooks}"
            raise InvalidRequestError(expected, f"{codes.dtype} {list(codes.shape)}", param="codes")
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < codebook_size:
            got = f"values from {int(codes.min())} to {int(codes.max())}"
            raise InvalidRequestError(f"codes in [0, {codebook_size})", got, param="codes")

    def _dequantise(self, codes: Tensor) -> Tensor:
        """`[B, K, T]` codes → `[T, B, codebook_dim]`: the sum of the chosen entries."""
        by_time = codes.to(self.codebooks.device).permute(1, 2, 0)
        latents = self.codebooks[0][by_time[0]]
        for k in range(1, codes.shape[1]):
            latents += self.codebooks[k][by_time[k]]
        return latents

    def _synthesise(self, x: Tensor, tails: list[Tensor], piece: Piece) -> tuple[Tensor, list[Tensor]]:
        """`[n, B, codebook_dim]` latents → `[B, N]` samples and the next tails."""
        x, conv_tail = self.conv_in(x, tails[0][: self.conv_in.tail_len], piece)
        x, hidden, cell = self._recur(x, tails[1], tails[2])
        rest, out = tails[3:], []
        num_parts = max(
            1, round(x.shape[0] / _UPSAMPLED_FRAMES)
        )  # of equal size: a small remainder costs nearly as much
        size = max(-(-x.shape[0] // num_parts), self.min_first_frames)
        for start in range(0, x.shape[0], size):
            part = Piece(piece.first and start == 0, piece.last and start + size >= x.shape[0])
            samples, rest = self._upsample(x[start : start + size], rest, part)
            out.append(samples)
        return torch.cat(out, dim=1), [conv_tail, hidden, cell, *rest]

    def _recur(self, x: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The LSTM with its skip connection: `[n, B, D]` and two `[layers, B, D]` → the same."""
        if x.is_cuda or x.shape[0] * _FUSED_LSTM_SIZE >= x.shape[2] ** 2:
            y, (hidden, cell) = self.lstm(x, (hidden.contiguous(), cell.contiguous()))
            return x + y, hidden, cell
        y, states = x, []
        for before, weights in zip(zip(hidden, cell, strict=True), self.lstm.all_weights, strict=True):
            y, after = _recur_layer(y, before, weights)
            states.append(after)
        return x + y, torch.stack([h for h, _ in states]), torch.stack([c for _, c in states])

    def _upsample(self, x: Tensor, tails: list[Tensor], piece: Piece) -> tuple[Tensor, list[Tensor]]:
        """`[n, B, D]` → `[B, N]` samples and the next tails of the layers after the LSTM."""
        after: list[Tensor] = []
        pending = iter(tails)

        def run(layer: StreamConv | StreamUpsample | StreamResidual, x: Tensor) -> Tensor:
            result: tuple[Tensor, Tensor] = layer(x, next(pending), piece)
            after.append(result[1])
            return result[0]

        for upsample, residuals in self.stages:
            x = run(upsample, elu(x))
            for residual in residuals:
                x = run(residual, x)
        x = run(self.conv_out, elu(x))
        return x.squeeze(-1).t(), after

    def _unpack(self, values: Tensor) -> list[Tensor]:
        """`[B, state_size]` → the tails, each `[len, B, C]`, views."""
        tails, start = [], 0
        for length, dim in self.state_shapes:
            part = values[:, start : start + length * dim]
            tails.append(part.reshape(-1, length, dim).transpose(0, 1))
            start += length * dim
        return tails

    def _pack(self, tails: list[Tensor]) -> Tensor:
        """The inverse of `_unpack`; a tail shorter than its slot (after a last piece) is padded."""
        parts = []
        for tail, (length, _) in zip(tails, self.state_shapes, strict=True):
            filled = F.pad(tail, (0, 0, 0, 0, 0, length - tail.shape[0]))
            parts.append(filled.transpose(0, 1).flatten(1))
        return torch.cat(parts, dim=-1)


def _recur_layer(x: Tensor, state: _LayerState, weights: Sequence[Tensor]) -> tuple[Tensor, _LayerState]:
    """One layer of the LSTM, frame by frame: `[n, B, D]` and two `[B, D]` → the same.

    Each gate is a separate product: a single one with so few rows would run on one thread, four run in parallel.
    """
    num_frames, batch, dim = x.shape
    hidden, cell = state
    from_input, from_hidden = (w.view(4, dim, dim).transpose(1, 2) for w in weights[:2])
    bias = (weights[2] + weights[3]).view(4, 1, dim)
    inputs = torch.baddbmm(bias, x.reshape(-1, dim).expand(4, -1, -1), from_input)
    out = []
    for sums in inputs.view(4, num_frames, batch, dim).unbind(1):
        gates = torch.baddbmm(sums, hidden.expand(4, -1, -1), from_hidden)
        new = gates[2].tanh()
        take, keep, _, give = gates.sigmoid_().unbind(0)
        cell = torch.addcmul(new.mul_(take), keep, cell)
        hidden = cell.tanh().mul_(give)
        out.append(hidden)
    return torch.stack(out), (hidden, cell)


def _residual(config: CodecConfig, dim: int, index: int) -> StreamResidual:
    dilation = config.dilation_growth_rate**index
    hidden, kernel = dim // config.compress, config.residual_kernel_size
    return StreamResidual(dim, hidden, kernel, dilation, config.pad_mode, config.conv_shortcut)


def _min_first_frames(decoder: EncodecDecoder) -> int:
    """Minimum frames of a first piece, so that every layer has enough input for reflection and produces output."""
    num_frames = 1
    while not _gives_samples(decoder, num_frames):
        num_frames += 1
    return num_frames


def _gives_samples(decoder: EncodecDecoder, length: int) -> bool:
    def shortened(length: int, conv: StreamConv) -> int:
        return length - conv.pad_right if length > max(conv.pad_left, conv.pad_right) else 0

    length = shortened(length, decoder.conv_in)
    for upsample, residuals in decoder.stages:
        length = length * upsample.ratio - upsample.trim_left if length else 0
        for residual in residuals:
            length = shortened(length, residual.conv)
    return shortened(length, decoder.conv_out) > 0


def _state_shapes(decoder: EncodecDecoder) -> list[tuple[int, int]]:
    """(length, channels) of each tail in layer order. The first also buffers frames until there are enough to start."""
    length, dim = decoder.conv_in.tail_shape
    shapes = [(max(length, decoder.min_first_frames - 1), dim)]
    shapes += [(decoder.lstm.num_layers, decoder.lstm.hidden_size)] * 2
    for upsample, residuals in decoder.stages:
        shapes.append(upsample.tail_shape)
        shapes += [residual.tail_shape for residual in residuals]
    return [*shapes, decoder.conv_out.tail_shape]
