"""Order of work within a step, by playback deadline, and which streams it may defer. Uses lengths and clocks only."""

from __future__ import annotations

from collections.abc import Iterable

from musicgen.engine.fairness import Places
from musicgen.engine.sequence import Sequence
from musicgen.engine.step_times import StepTimes

SLACK_S = 0.1
"""A stream closer than this to an underrun is not deferred."""
PLAYER_BUFFER_S = 0.2
"""Buffer assumed at a player. Streams that are not preferred may use it up while the engine keeps up with playback:
first chunks are so short that a young stream has no other slack."""
PATIENCE_S = 1.0
"""A sequence without a first chunk, or without a listener, can be deferred for this long after its admission."""
MAX_STEP_RATIO = 0.8
"""Deferring is worthwhile if the step then takes at most this fraction of the full step's time."""
MAX_EXPEDITED_STEPS = 12
"""Steps in a row that may defer a stream whose player has already underrun."""


class Turns:
    """The order of work in a step.

    Args:
        max_rows: capacity of a decode step.
        places: demand per tenant.
        frame_rate_hz: for playback deadlines.
    """

    def __init__(self, max_rows: int, places: Places, frame_rate_hz: float) -> None:
        self._max_rows, self._places, self._frame_s = max_rows, places, 1 / frame_rate_hz
        self._num_expedited = 0

    def need(self, sequence: Sequence) -> tuple[int, float]:
        """Sort key: priority, then the time at which the listener needs the next frame.

        Before the first audio that is immediately. A request that is not streamed is treated as if playback had started
        with its first decode step.
        """
        times = sequence.times
        began = times.first_chunk if sequence.request.chunks is not None else times.decoding
        if began is None:
            return sequence.request.priority, times.arrived
        heard = sequence.num_frames - sequence.request.codes.num_known_frames
        return sequence.request.priority, began + heard * self._frame_s

    def fill(self, sequences: Iterable[Sequence]) -> list[Sequence]:
        """As many of `sequences`, in order, as fit in a step."""
        chosen, rows_left = [], self._max_rows
        for sequence in sequences:
            if sequence.num_rows <= rows_left:
                chosen.append(sequence)
                rows_left -= sequence.num_rows
        return chosen

    def expedited(self, running: list[Sequence], now: float, times: StepTimes) -> list[Sequence]:
        """The sequences to advance alone in the next step; empty if all should advance.

        While some tenant is over its share, streams of tenants within theirs are expedited until their first audio,
        and, where full steps are slower than playback, while close to an underrun. Other streams close to an underrun
        advance with them. A stream that has underrun already can be deferred too, but not in every step.
        """
        if not self._places.some_flood:
            return []
        step_s = self._step_s(running, times) or times.mean_s
        unstarted: list[Sequence] = []
        late: list[Sequence] = []
        at_risk: list[Sequence] = []
        defers_underrun = False
        most = min((s.request.priority for s in running), default=0)
        buffer_s = PLAYER_BUFFER_S if step_s <= self._frame_s else 0.0
        for sequence in running:
            is_preferred = self._is_preferred(sequence, most)
            slack_s = self._slack_s(sequence, now, times.mean_s) + (0.0 if is_preferred else buffer_s)
            if is_preferred and sequence.times.first_chunk is None:
                unstarted.append(sequence)
            elif is_preferred and slack_s < SLACK_S and step_s > self._frame_s:
                late.append(sequence)
            elif slack_s < 0:
                defers_underrun = True
            elif slack_s < SLACK_S:
                at_risk.append(sequence)
        first = [*unstarted, *late, *at_risk]
        keeps_up = (self._step_s(late, times) or 0.0) <= self._frame_s  # else they underrun all the same
        is_useful = bool(unstarted or (late and keeps_up)) and self._is_worth(first, step_s, times)
        if not is_useful or self._num_expedited == MAX_EXPEDITED_STEPS:
            self._num_expedited = 0
            return []
        self._num_expedited += defers_underrun
        return first

    def _is_preferred(self, sequence: Sequence, most: int) -> bool:
        """Whether it is played while generated, at the highest priority `most`, for a tenant within its share."""
        request = sequence.request
        return request.priority == most and self._places.is_modest(request.tenant) and self._is_listened_to(sequence)

    def _is_worth(self, some: list[Sequence], step_s: float, times: StepTimes) -> bool:
        alone_s = self._step_s(some, times)
        return alone_s is None or alone_s <= MAX_STEP_RATIO * step_s

    def _step_s(self, sequences: list[Sequence], times: StepTimes) -> float | None:
        return times.of(sum(s.num_rows for s in sequences))

    def _slack_s(self, sequence: Sequence, now: float, step_s: float) -> float:
        """How long a sequence can be deferred before its player underruns, given the steps its next chunk still takes.
        Without a listener yet, as if playback started `PATIENCE_S` after admission."""
        times, codes = sequence.times, sequence.request.codes
        assert times.admitted is not None
        if times.first_chunk is None or not self._is_listened_to(sequence):
            num_generated = sequence.num_frames - codes.num_known_frames
            return times.admitted + PATIENCE_S + num_generated * self._frame_s - now
        num_left = min(sequence.due_frames, codes.num_frames) - sequence.num_frames
        underrun_at = times.first_chunk + (sequence.num_sent_frames - codes.num_known_frames) * self._frame_s
        return underrun_at - num_left * step_s - now

    def _is_listened_to(self, sequence: Sequence) -> bool:
        """Whether it is likely played while it is generated: its first chunk is at most a second long."""
        chunks = sequence.request.chunks
        return chunks is not None and chunks.first_frames * self._frame_s <= 1
