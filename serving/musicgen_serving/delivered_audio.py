"""Delivered audio of one piece: position and checksum. Independent of codec and transport."""

from __future__ import annotations

import hashlib

from torch import Tensor

from musicgen_serving.code_stream import CodesEnd
from musicgen_serving.types import PieceAudio, PieceReport


class DeliveredAudio:
    """Delivered audio of one piece."""

    def __init__(self, num_samples: int, first_sample: int) -> None:
        self._num_samples, self._first = num_samples, first_sample
        self._position = 0
        self._num_given = 0
        self._hash = hashlib.sha256()

    def take(self, piece: int, samples: Tensor) -> PieceAudio | None:
        """The part of the next `[C, N]` samples to deliver; None: nothing."""
        skipped = min(max(self._first - self._position, 0), samples.shape[-1])
        offset = self._position + skipped
        self._position += samples.shape[-1]
        wanted = samples[:, skipped:]
        if wanted.shape[-1] == 0:
            return None
        self._hash.update(wanted.T.contiguous().numpy().astype("<f4").tobytes())
        self._num_given += wanted.shape[-1]
        return PieceAudio(piece, wanted, offset)

    def report(self, piece: int, end: CodesEnd, num_failovers: int) -> PieceReport:
        assert self._position == self._num_samples
        return PieceReport(
            piece,
            self._num_given,
            self._hash.hexdigest(),
            end.num_frames,
            end.queue_s,
            end.prefill_s,
            end.decode_s,
            end.num_failovers + num_failovers,
        )
