"""Streaming codec decoder: codes to audio for any number of mono or stereo streams at different positions.

Decoding is stateless: a stream's `StreamState` is passed with each call, so any process with the same codec can decode
its next codes. The concatenated output equals a whole decode. Owns the order of stereo codebooks and the batching of
streams; independent of requests, scheduling and transport.
"""

from __future__ import annotations

import itertools
import struct
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from musicgen.errors import InvalidRequestError
from musicgen.models.encodec import DecoderState, EncodecDecoder
from musicgen.types import ChunkPolicy

_HEADER = struct.Struct("<4sBBHIQQ")
_MAGIC, _VERSION = b"MGCS", 1


def split_channels(codes: Tensor, audio_channels: int) -> Tensor:
    """`[B, C · K, T]` codes in the order 1L 1R 2L 2R ... → `[B · C, K, T]`, the channels of an item next to each other.

    Raises:
        InvalidRequestError: the number of codebooks is not a multiple of the channels.
    """
    if codes.ndim != 3 or codes.shape[1] == 0 or codes.shape[1] % audio_channels:
        expected = f"codes [B, K, T] with a multiple of {audio_channels} codebooks"
        raise InvalidRequestError(expected, str(list(codes.shape)), param="codes")
    batch, num_codebooks, num_frames = codes.shape
    grouped = codes.reshape(batch, num_codebooks // audio_channels, audio_channels, num_frames)
    return grouped.transpose(1, 2).flatten(0, 1)


def decode_audio(decoder: EncodecDecoder, codes: Tensor, audio_channels: int) -> Tensor:
    """Decode whole pieces of one length: `[B, C · K, T]` codes → `[B, C, T · hop_length]` float32 samples.

    Equal to streaming the same codes, bit-identical with the same number of threads (see `decode_on_grid`).

    Raises:
        InvalidRequestError: codes of the wrong shape or out of range.
    """
    codec = StreamingCodec(decoder, audio_channels)
    return torch.stack([decode_on_grid(codec, StreamPiece(c, codec.initial_state(), last=True))[0] for c in codes])


GRID = ChunkPolicy()
"""Sizes of the cells in which a piece is decoded: small ones first, so that a stream starts early."""


def grid_floor(num_frames: int) -> int:
    """The last grid boundary at or below `num_frames`."""
    boundary = cell = 0
    while True:
        cell = GRID.next_frames(cell)
        if cell == GRID.max_frames:  # all later cells have this size
            return boundary + max(0, num_frames - boundary) // cell * cell
        if boundary + cell > num_frames:
            return boundary
        boundary += cell


class GridBuffer:
    """Buffers the codes of one stream until the next grid boundary.

    Args:
        num_frames: length of the whole piece.
    """

    def __init__(self, num_codebooks: int, num_frames: int) -> None:
        self._num_frames = num_frames
        self._waiting = torch.empty(num_codebooks, 0, dtype=torch.int32)

    def add(self, codes: Tensor) -> None:
        """Append the next codes `[K, T]` of the stream."""
        self._waiting = torch.cat((self._waiting, codes), dim=-1)

    def take(self, state: StreamState) -> StreamPiece | None:
        """The codes after `state` that `decode_on_grid` can decode now; None: none yet."""
        num_there = state.num_frames + self._waiting.shape[-1]
        last = num_there == self._num_frames
        num_ready = self._waiting.shape[-1] if last else grid_floor(num_there) - state.num_frames
        if num_ready == 0:
            return None
        ready, self._waiting = self._waiting[:, :num_ready], self._waiting[:, num_ready:]
        return StreamPiece(ready, state, last)


def decode_on_grid(codec: StreamingCodec, piece: StreamPiece) -> tuple[Tensor, StreamState]:
    """Decode the next codes of one stream cell by cell, so that rounding does not depend on chunk boundaries.

    Float sums differ between passes of different lengths or batch sizes. On a fixed grid of cells, the audio of a piece
    is the same whether streamed, decoded whole or resumed by another process (with the same number of threads).

    Args:
        piece: starts at a grid boundary, and ends at one unless it is the last.
    Raises:
        InvalidRequestError: see `StreamingCodec.decode`; or codes not aligned to the grid.
    """
    samples, state = [], piece.state
    for codes, last in grid_cells(piece):
        out, state = codec.decode(codes, state, last=last)
        samples.append(out)
    return torch.cat(samples, dim=-1), state


def grid_cells(piece: StreamPiece) -> Iterator[tuple[Tensor, bool]]:
    """The codes of each cell, and whether it is the last. Raises: InvalidRequestError: not aligned to the grid."""
    start, end = piece.state.num_frames, piece.state.num_frames + piece.codes.shape[-1]
    if grid_floor(start) != start or not (piece.last or grid_floor(end) == end):
        raise InvalidRequestError("codes aligned to the grid", f"frames {start} to {end}", param="codes")
    inside = itertools.takewhile(lambda boundary: boundary < end, _boundaries(start))
    for first, after in itertools.pairwise([start, *inside, end]):
        yield piece.codes[:, first - start : after - start], piece.last and after == end


def _boundaries(after: int) -> Iterator[int]:
    """All grid boundaries beyond a frame (infinite)."""
    boundary = cell = 0
    while True:
        cell = GRID.next_frames(cell)
        boundary += cell
        if boundary > after:
            yield boundary


@dataclass(frozen=True, slots=True, eq=False)
class StreamState:
    """The complete state of a stream between two calls. Of fixed size and opaque to callers."""

    values: Tensor
    """`[C, state_size]` float32, see `DecoderState`."""
    num_frames: int
    """Frames consumed so far."""
    num_samples: int
    """Samples per channel returned so far, i.e. the offset of the next ones."""
    finished: bool

    def to_bytes(self) -> bytes:
        """Serialise; the inverse of `from_bytes`."""
        channels, size = self.values.shape
        header = _HEADER.pack(_MAGIC, _VERSION, self.finished, channels, size, self.num_frames, self.num_samples)
        return header + self.values.detach().cpu().numpy().astype("<f4").tobytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> StreamState:
        """Deserialise. Raises: InvalidRequestError: not the output of `to_bytes`."""
        if len(data) >= _HEADER.size:
            magic, version, finished, channels, size, num_frames, num_samples = _HEADER.unpack_from(data)
            whole = len(data) == _HEADER.size + 4 * channels * size
            if magic == _MAGIC and version == _VERSION and finished in (0, 1) and whole:
                values = np.frombuffer(data, "<f4", offset=_HEADER.size).astype(np.float32)
                return cls(torch.from_numpy(values).view(channels, size), num_frames, num_samples, bool(finished))
        expected = f"a codec stream state of version {_VERSION}"
        raise InvalidRequestError(expected, f"{len(data)} unrecognised bytes", param="state")


@dataclass(frozen=True, slots=True, eq=False)
class StreamPiece:
    """The next codes of one stream."""

    codes: Tensor
    """`[C · K, T]` integers, T ≥ 0; stereo in the order 1L 1R 2L 2R."""
    state: StreamState
    last: bool
    """No codes follow: flush the buffered samples."""


class StreamingCodec:
    """Decodes streams incrementally, without holding their state.

    After T frames a stream has returned at least (T − `lookahead_frames`) · hop_length samples per channel, and all
    T · hop_length at its end.
    """

    def __init__(self, decoder: EncodecDecoder, audio_channels: int) -> None:
        self.decoder, self.audio_channels = decoder, audio_channels

    @property
    def lookahead_frames(self) -> int:
        return self.decoder.lookahead_frames

    def initial_state(self) -> StreamState:
        state = self.decoder.initial_state(self.audio_channels)
        return StreamState(state.values, num_frames=0, num_samples=0, finished=False)

    def decode(self, codes: Tensor, state: StreamState, *, last: bool) -> tuple[Tensor, StreamState]:
        """Decode the next codes of one stream; see `StreamPiece` and `decode_batch`."""
        return self.decode_batch([StreamPiece(codes, state, last)])[0]

    def decode_batch(self, pieces: Sequence[StreamPiece]) -> list[tuple[Tensor, StreamState]]:
        """Decode the next codes of several streams. Streams with the same number of new frames share a pass.

        Returns:
            For each, the next samples `[C, N]` float32 (N may be 0) and its new state; the inputs are not modified.
        Raises:
            InvalidRequestError: codes or state do not match the codec, or the stream is finished; nothing is decoded.
        """
        groups: dict[tuple[int, int, bool], list[int]] = defaultdict(list)
        for index, piece in enumerate(pieces):
            self._check(piece, f"pieces[{index}]")
            # Beyond the first frames, decoding does not depend on a stream's age.
            age = min(piece.state.num_frames, self.decoder.min_first_frames)
            groups[age, piece.codes.shape[-1], piece.last].append(index)
        results: list[tuple[Tensor, StreamState]] = [(torch.empty(0), piece.state) for piece in pieces]
        for (age, _, last), indices in groups.items():
            for index, result in zip(indices, self._decode_group([pieces[i] for i in indices], age, last), strict=True):
                results[index] = result
        return results

    def _decode_group(self, pieces: Sequence[StreamPiece], age: int, last: bool) -> list[tuple[Tensor, StreamState]]:
        """Decode pieces of equal age and length as one batch."""
        device = self.decoder.codebooks.device
        values = torch.cat([piece.state.values.to(device) for piece in pieces])
        codes = split_channels(torch.stack([piece.codes.to(device) for piece in pieces]), self.audio_channels)
        out, after = self.decoder.decode(codes, DecoderState(values, age, 0), last=last)
        samples = out.view(len(pieces), self.audio_channels, out.shape[-1])
        new_values = after.values.view(len(pieces), self.audio_channels, -1)
        return [
            (
                samples[i],
                StreamState(
                    new_values[i],
                    piece.state.num_frames + piece.codes.shape[-1],
                    piece.state.num_samples + samples.shape[-1],
                    last,
                ),
            )
            for i, piece in enumerate(pieces)
        ]

    def _check(self, piece: StreamPiece, name: str) -> None:
        channels, size = self.audio_channels, self.decoder.state_size
        num_codebooks = channels * self.decoder.config.num_codebooks
        if piece.codes.ndim != 2 or piece.codes.shape[0] != num_codebooks:
            raise InvalidRequestError(
                f"codes [{num_codebooks}, T]", str(list(piece.codes.shape)), param=f"{name}.codes"
            )
        if tuple(piece.state.values.shape) != (channels, size):
            hint = "decode a stream with one model only"
            got = str(list(piece.state.values.shape))
            raise InvalidRequestError(f"a state [{channels}, {size}]", got, hint, param=f"{name}.state")
        if piece.state.finished:
            raise InvalidRequestError("an unfinished stream", "a finished one", param=f"{name}.state")
        self.decoder.check_codes(split_channels(piece.codes[None], channels))
