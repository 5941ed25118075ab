"""Who goes first in a step that does not hold all, or need not: listeners near to silence. Knows lengths and clocks."""

from __future__ import annotations

from collections.abc import Iterable

from musicgen.engine.fairness import Places
from musicgen.engine.sequence import Sequence

IN_HAND_S = 0.5
"""Whoever has so much sound in hand can wait for a listener that has none."""


class Turns:
    """The order of a step.

    Args:
        max_rows: that one step can decode.
        places: who runs how many.
        frame_rate_hz: for playback deadlines.
    """

    def __init__(self, max_rows: int, places: Places, frame_rate_hz: float) -> None:
        self._max_rows, self._places, self._frame_rate_hz = max_rows, places, frame_rate_hz

    def need(self, sequence: Sequence) -> tuple[int, float]:
        """Sorts by priority, then by when the listener needs the next frame.

        Before the first sound that is at once. Where nobody listens, it is as if somebody had from the first step.
        """
        times = sequence.times
        began = times.first_chunk if sequence.request.chunks is not None else times.decoding
        if began is None:
            return sequence.request.priority, times.arrived
        heard = sequence.num_frames - sequence.request.codes.num_known_frames
        return sequence.request.priority, began + heard / self._frame_rate_hz

    def fill(self, sequences: Iterable[Sequence]) -> list[Sequence]:
        """Those that a step holds, the first ones first."""
        chosen, rows_left = [], self._max_rows
        for sequence in sequences:
            if sequence.num_rows <= rows_left:
                chosen.append(sequence)
                rows_left -= sequence.num_rows
        return chosen

    def hurried(self, everyone: list[Sequence], now: float) -> list[Sequence]:
        """Those that wait for their first sound, of tenants that have no more than their share, and whoever else
        would soon be silent; nobody, if none waits so."""
        if not self._places.some_exceed:
            return []
        most = min((s.request.priority for s in everyone), default=0)
        hurried: list[Sequence] = []
        needy: list[Sequence] = []
        for sequence in everyone:
            request = sequence.request
            if not self._is_listened_to(sequence):
                continue
            if sequence.times.first_chunk is not None:
                if self.need(sequence)[1] < now + IN_HAND_S:
                    needy.append(sequence)
            elif request.priority == most and self._places.has_room(request.tenant, request.weight):
                hurried.append(sequence)
        return self.fill([*hurried, *needy]) if hurried else []

    def _is_listened_to(self, sequence: Sequence) -> bool:
        """Whether somebody is likely to listen while it is made: its first chunk is no longer than a second."""
        chunks = sequence.request.chunks
        return chunks is not None and chunks.first_frames <= self._frame_rate_hz
