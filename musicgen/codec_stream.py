"""Codes to audio for any number of streams, mono and stereo, each at its own place in its piece.

A stream is nothing but a value, `StreamState`, that travels with each call, so any process with the same codec can
decode any stream's next codes. The sum of the pieces is what a whole decode gives. Owns the order of stereo codebooks
and the batching of streams; knows no requests, no schedule and no transport.
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
        InvalidRequestError: codebooks that cannot be shared out.
    """
    if codes.ndim != 3 or codes.shape[1] == 0 or codes.shape[1] % audio_channels:
        expected = f"codes [B, K, T] with a multiple of {audio_channels} codebooks"
        raise InvalidRequestError(expected, str(list(codes.shape)), param="codes")
    batch, num_codebooks, num_frames = codes.shape
    grouped = codes.reshape(batch, num_codebooks // audio_channels, audio_channels, num_frames)
    return grouped.transpose(1, 2).flatten(0, 1)


def decode_audio(decoder: EncodecDecoder, codes: Tensor, audio_channels: int) -> Tensor:
    """Decode whole pieces of one length: `[B, C · K, T]` codes → `[B, C, T · hop_length]` float32 samples.

    What a stream of the same codes gives, to the bit if that has as many threads (see `decode_on_grid`).

    Raises:
        InvalidRequestError: codes of a wrong shape or range.
    """
    codec = StreamingCodec(decoder, audio_channels)
    return torch.stack([decode_on_grid(codec, StreamPiece(c, codec.initial_state(), last=True))[0] for c in codes])


GRID = ChunkPolicy()
"""The cells in which a piece is decoded: small ones first, so that a stream can begin early."""


def grid_floor(num_frames: int) -> int:
    """The last boundary of the grid up to which `num_frames` frames suffice."""
    boundary = cell = 0
    while True:
        cell = GRID.next_frames(cell)
        if cell == GRID.max_frames:  # from here on all cells are equal
            return boundary + max(0, num_frames - boundary) // cell * cell
        if boundary + cell > num_frames:
            return boundary
        boundary += cell


class GridBuffer:
    """The codes of one stream that wait for the next boundary.

    Args:
        num_frames: of the whole piece.
    """

    def __init__(self, num_codebooks: int, num_frames: int) -> None:
        self._num_frames = num_frames
        self._waiting = torch.empty(num_codebooks, 0, dtype=torch.int32)

    def add(self, codes: Tensor) -> None:
        """The next codes `[K, T]` of the stream."""
        self._waiting = torch.cat((self._waiting, codes), dim=-1)

    def take(self, state: StreamState) -> StreamPiece | None:
        """What can be decoded after `state` for `decode_on_grid`; None: nothing yet."""
        num_there = state.num_frames + self._waiting.shape[-1]
        last = num_there == self._num_frames
        num_ready = self._waiting.shape[-1] if last else grid_floor(num_there) - state.num_frames
        if num_ready == 0:
            return None
        ready, self._waiting = self._waiting[:, :num_ready], self._waiting[:, num_ready:]
        return StreamPiece(ready, state, last)


def decode_on_grid(codec: StreamingCodec, piece: StreamPiece) -> tuple[Tensor, StreamState]:
    """Decode the next codes of one stream cell by cell, so that rounding does not depend on how they were cut.

    Float sums come out differently in passes of different lengths or batches; with every frame in its own cell of a
    grid that depends on its place in the piece alone, a piece has one audio: streamed, whole, or taken up by another
    process (with as many threads).

    Args:
        piece: begins at a boundary, and ends at one unless it is the last.
    Raises:
        InvalidRequestError: as `StreamingCodec.decode`, or codes off the grid.
    """
    samples, state = [], piece.state
    for codes, last in grid_cells(piece):
        out, state = codec.decode(codes, state, last=last)
        samples.append(out)
    return torch.cat(samples, dim=-1), state


def grid_cells(piece: StreamPiece) -> Iterator[tuple[Tensor, bool]]:
    """The codes of each cell, and whether nothing follows it. Raises: InvalidRequestError: codes off the grid."""
    start, end = piece.state.num_frames, piece.state.num_frames + piece.codes.shape[-1]
    if grid_floor(start) != start or not (piece.last or grid_floor(end) == end):
        raise InvalidRequestError("codes between boundaries of the grid", f"frames {start} to {end}", param="codes")
    inside = itertools.takewhile(lambda boundary: boundary < end, _boundaries(start))
    for first, after in itertools.pairwise([start, *inside, end]):
        yield piece.codes[:, first - start : after - start], piece.last and after == end


def _boundaries(after: int) -> Iterator[int]:
    """Those of the grid beyond a frame, without end."""
    boundary = cell = 0
    while True:
        cell = GRID.next_frames(cell)
        boundary += cell
        if boundary > after:
            yield boundary


@dataclass(frozen=True, slots=True, eq=False)
class StreamState:
    """Everything a stream is between two calls. Of fixed size; set by `StreamingCodec`, opaque to others."""

    values: Tensor
    """`[C, state_size]` float32, see `DecoderState`."""
    num_frames: int
    """Frames taken in so far."""
    num_samples: int
    """Samples given out so far, a channel: where the next ones belong."""
    finished: bool

    def to_bytes(self) -> bytes:
        """For a wire or a file; the inverse of `from_bytes`."""
        channels, size = self.values.shape
        header = _HEADER.pack(_MAGIC, _VERSION, self.finished, channels, size, self.num_frames, self.num_samples)
        return header + self.values.detach().cpu().numpy().astype("<f4").tobytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> StreamState:
        """Raises: InvalidRequestError: not what `to_bytes` gave."""
        if len(data) >= _HEADER.size:
            magic, version, finished, channels, size, num_frames, num_samples = _HEADER.unpack_from(data)
            whole = len(data) == _HEADER.size + 4 * channels * size
            if magic == _MAGIC and version == _VERSION and finished in (0, 1) and whole:
                values = np.frombuffer(data, "<f4", offset=_HEADER.size).astype(np.float32)
                return cls(torch.from_numpy(values).view(channels, size), num_frames, num_samples, bool(finished))
        expected = f"a codec stream state of version {_VERSION}"
        raise InvalidRequestError(expected, f"{len(data)} other bytes", param="state")


@dataclass(frozen=True, slots=True, eq=False)
class StreamPiece:
    """The next codes of one stream. Set by the caller."""

    codes: Tensor
    """`[C · K, T]` integers, T ≥ 0; stereo in the order 1L 1R 2L 2R."""
    state: StreamState
    last: bool
    """No codes follow: give out what is held back."""


class StreamingCodec:
    """Decodes streams piece by piece. Holds no stream's state.

    After T frames a stream has given at least (T − `lookahead_frames`) · hop_length samples a channel, and at its end
    all T · hop_length.
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
        """Decode the next codes of several streams. Those with as many new frames share a pass.

        Returns:
            For each, the next samples `[C, N]` float32 (N may be 0), and its new state; the given ones are not changed.
        Raises:
            InvalidRequestError: codes or a state that do not fit the codec, or a finished stream; nothing is decoded.
        """
        groups: dict[tuple[int, int, bool], list[int]] = defaultdict(list)
        for index, piece in enumerate(pieces):
            self._check(piece, f"pieces[{index}]")
            # Past its beginning a stream's age makes no difference to how it is decoded.
            age = min(piece.state.num_frames, self.decoder.min_first_frames)
            groups[age, piece.codes.shape[-1], piece.last].append(index)
        results: list[tuple[Tensor, StreamState]] = [(torch.empty(0), piece.state) for piece in pieces]
        for (age, _, last), indices in groups.items():
            for index, result in zip(indices, self._decode_group([pieces[i] for i in indices], age, last), strict=True):
                results[index] = result
        return results

    def _decode_group(self, pieces: Sequence[StreamPiece], age: int, last: bool) -> list[tuple[Tensor, StreamState]]:
        """Pieces of one age and length, as one batch."""
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
            hint = "a stream must stay with one model"
            got = str(list(piece.state.values.shape))
            raise InvalidRequestError(f"a state [{channels}, {size}]", got, hint, param=f"{name}.state")
        if piece.state.finished:
            raise InvalidRequestError("a stream that goes on", "a finished one", param=f"{name}.state")
        self.decoder.check_codes(split_channels(piece.codes[None], channels))
