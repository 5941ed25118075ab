"""Who goes first in a step that does not hold all, or need not: listeners near to silence. Knows lengths and clocks."""

from __future__ import annotations

from collections.abc import Iterable

from musicgen.engine.fairness import Places
from musicgen.engine.sequence import Sequence
from musicgen.engine.step_times import StepTimes

SLACK_S = 0.1
"""Whoever could be passed for less than so long is not passed."""
PLAYER_BUFFER_S = 0.2
"""What a player is taken to hold back before it plays. An engine that keeps up may use it up, but only that of streams
whose tenant asks for more than its share: their first chunks are too short to leave them any other slack."""
PATIENCE_S = 1.0
"""For so long after its admission whoever nobody hears yet can be passed."""
WORTH = 0.8
"""Some are passed only if the step takes no more than this part of one with all of them."""
MAX_HURRIED = 12
"""Steps in a row in which somebody is passed whose listener is silent."""


class Turns:
    """The order of a step.

    Args:
        max_rows: that one step can decode.
        places: who asks for how many.
        frame_rate_hz: for playback deadlines.
    """

    def __init__(self, max_rows: int, places: Places, frame_rate_hz: float) -> None:
        self._max_rows, self._places, self._frame_s = max_rows, places, 1 / frame_rate_hz
        self._num_hurried = 0

    def need(self, sequence: Sequence) -> tuple[int, float]:
        """Sorts by priority, then by when the listener needs the next frame.

        Before the first sound that is at once. Where nobody listens, it is as if somebody had from the first step.
        """
        times = sequence.times
        began = times.first_chunk if sequence.request.chunks is not None else times.decoding
        if began is None:
            return sequence.request.priority, times.arrived
        heard = sequence.num_frames - sequence.request.codes.num_known_frames
        return sequence.request.priority, began + heard * self._frame_s

    def fill(self, sequences: Iterable[Sequence]) -> list[Sequence]:
        """Those that a step holds, the first ones first."""
        chosen, rows_left = [], self._max_rows
        for sequence in sequences:
            if sequence.num_rows <= rows_left:
                chosen.append(sequence)
                rows_left -= sequence.num_rows
        return chosen

    def hurried(self, running: list[Sequence], now: float, times: StepTimes) -> list[Sequence]:
        """Those who go before the others: of tenants that ask for no more than their share while others do, whoever
        hears nothing yet, and, where steps with all are slower than playback, whoever would fall silent; beside them
        whoever else would. Nobody, if there are none of the first, or if a step without the others is hardly shorter.

        Who is silent already can wait like one who hears nothing, but not in every step.
        """
        if not self._places.some_flood:
            return []
        step_s = self._step_s(running, times) or times.mean_s
        unheard: list[Sequence] = []
        heard: list[Sequence] = []
        needy: list[Sequence] = []
        passes_silent = False
        most = min((s.request.priority for s in running), default=0)
        buffer_s = PLAYER_BUFFER_S if step_s <= self._frame_s else 0.0
        for sequence in running:
            is_preferred = self._is_preferred(sequence, most)
            slack_s = self._slack_s(sequence, now, times.mean_s) + (0.0 if is_preferred else buffer_s)
            if is_preferred and sequence.times.first_chunk is None:
                unheard.append(sequence)
            elif is_preferred and slack_s < SLACK_S and step_s > self._frame_s:
                heard.append(sequence)
            elif slack_s < 0:
                passes_silent = True
            elif slack_s < SLACK_S:
                needy.append(sequence)
        first = [*unheard, *heard, *needy]
        keeps_up = (self._step_s(heard, times) or 0.0) <= self._frame_s  # else they fall silent all the same
        is_useful = bool(unheard or (heard and keeps_up)) and self._is_worth(first, step_s, times)
        if not is_useful or self._num_hurried == MAX_HURRIED:
            self._num_hurried = 0
            return []
        self._num_hurried += passes_silent
        return first

    def _is_preferred(self, sequence: Sequence, most: int) -> bool:
        """Whether somebody listens, whose tenant asks for no more than its share. `most`: the priority of the first."""
        request = sequence.request
        return request.priority == most and self._places.is_modest(request.tenant) and self._is_listened_to(sequence)

    def _is_worth(self, some: list[Sequence], step_s: float, times: StepTimes) -> bool:
        alone_s = self._step_s(some, times)
        return alone_s is None or alone_s <= WORTH * step_s

    def _step_s(self, sequences: list[Sequence], times: StepTimes) -> float | None:
        return times.of(sum(s.num_rows for s in sequences))

    def _slack_s(self, sequence: Sequence, now: float, step_s: float) -> float:
        """For how long a sequence can be passed: until its listener would fall silent, because the next chunk still
        takes its steps. Where nobody listens yet, as long as it keeps ahead of one who listens from `PATIENCE_S` on."""
        times, codes = sequence.times, sequence.request.codes
        assert times.admitted is not None
        if times.first_chunk is None or not self._is_listened_to(sequence):
            num_made = sequence.num_frames - codes.num_known_frames
            return times.admitted + PATIENCE_S + num_made * self._frame_s - now
        num_left = min(sequence.due_frames, codes.num_frames) - sequence.num_frames
        silent_at = times.first_chunk + (sequence.num_sent_frames - codes.num_known_frames) * self._frame_s
        return silent_at - num_left * step_s - now

    def _is_listened_to(self, sequence: Sequence) -> bool:
        """Whether somebody is likely to listen while it is made: its first chunk is no longer than a second."""
        chunks = sequence.request.chunks
        return chunks is not None and chunks.first_frames * self._frame_s <= 1
