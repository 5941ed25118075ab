"""Admission control and batch composition. Works with pages, lengths and clocks, not with tensors or sampling.

Admission: a request is admitted if pages and rows suffice for all requests advancing together to their ends, so no
request is ever preempted for lack of memory. A request that does not fit yet blocks only those that would delay it.
There are more slots than `max_requests`: while other tenants are over their share of slots, a tenant below its own need
not wait for a request to end.

Each step preserves this invariant: either all sequences advance, or some do and the forecast still fits, or a *round*
starts, in which all take turns until each has advanced by one step. While a tenant is over its share, streams of other
tenants that have not received their first audio go before all work that can be deferred.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from musicgen.config import SchedulerConfig
from musicgen.engine.batch import RowChunk, ScheduledBatch
from musicgen.engine.fairness import Places, VirtualCounters
from musicgen.engine.forecast import Capacity, Demand, Forecast
from musicgen.engine.kv_cache import PageAllocator
from musicgen.engine.page_tables import PageTables
from musicgen.engine.queue import WaitingQueue
from musicgen.engine.sequence import Phase, Sequence
from musicgen.engine.step_times import StepTimes
from musicgen.engine.turns import Turns

MAX_BACKFILL = 8
"""Requests tried at a time behind one that does not fit yet."""
MAX_QUOTED = 64
"""Waiting requests considered when estimating a start."""
MAX_SLIP_STEPS = 64
"""If the start of the first request in turn slips by more steps than this, only requests owed a slot overtake it."""
MAX_OWED_SLIP_STEPS = 512
"""If it slips by more steps than this, no request overtakes it."""
RETRY_STEPS = 16
"""Admission is retried after this many steps, even if no request started or ended."""


@dataclass(frozen=True, slots=True, eq=False)
class _Prefill:
    """The part of a sequence's prefill computed in one step."""

    sequence: Sequence
    num_new: tuple[int, ...]
    """Positions of each row."""
    is_ready: bool
    """Its first decode step can run in the same step."""


class Scheduler:
    """Waiting and running sequences.

    Args:
        config: resolved.
        allocator: owns the pages; only the scheduler allocates and releases them.
        frame_rate_hz: for playback deadlines.
    """

    def __init__(self, config: SchedulerConfig, allocator: PageAllocator, frame_rate_hz: float) -> None:
        self.config, self.allocator, self.pages = config, allocator, PageTables(allocator)
        assert config.prefill_tokens is not None
        assert config.idle_prefill_tokens is not None
        self._prefill_tokens, self._idle_prefill_tokens = config.prefill_tokens, config.idle_prefill_tokens
        self.capacity = Capacity(allocator.num_pages, config.max_rows, config.max_requests)
        self.whole_capacity = Capacity(allocator.num_pages, config.num_rows, config.num_slots)
        """Including the slots reserved for tenants below their share."""
        self.counters, self.places = VirtualCounters(), Places(config.max_requests)
        self.waiting = WaitingQueue(self.counters)
        self.running: list[Sequence] = []
        self._turns = Turns(config.max_step_rows, self.places, frame_rate_hz)
        self._free_slots = list(range(config.num_slots))[::-1]
        self._round: set[int] = set()
        self._steps_to_retry = 0
        self._num_steps = 0

    # --- adding and removing ---

    def add(self, sequence: Sequence) -> None:
        self.waiting.add(sequence)
        self.places.ask(sequence.request.tenant, sequence.request.weight)
        self._steps_to_retry = 0

    def remove(self, sequence: Sequence) -> None:
        """End a waiting or running sequence and free its pages and slot."""
        if sequence.phase is Phase.ENDED:
            return
        self.places.leave(sequence.request.tenant, ran=sequence.phase is not Phase.WAITING)
        if sequence.phase is Phase.WAITING:
            self.waiting.remove(sequence)
        else:
            self.counters.charge(sequence.request.tenant, -sequence.cost, sequence.request.weight)
            self.pages.release(sequence)
            self.running.remove(sequence)
            self._free_slots.append(sequence.slot)
        sequence.phase = Phase.ENDED
        self._steps_to_retry = 0

    def began_decoding(self, sequence: Sequence) -> None:
        """Called when a prefill is complete; other sequences may be waiting for the pages it published."""
        sequence.phase = Phase.DECODE
        self._steps_to_retry = 0

    def open_window(self, sequence: Sequence) -> None:
        """Allocate the pages of a running sequence's next window, which admission has accounted for."""
        self.pages.share_prefix(sequence)
        self.pages.allocate_prefill(sequence)
        sequence.phase = Phase.PREFILL

    # --- forecasts ---

    def fits_alone(self, sequence: Sequence) -> bool:
        """Whether the sequence could ever be admitted."""
        return Forecast(0, [sequence.demand()]).fits(self.capacity)

    def steps_to_start(self, sequence: Sequence) -> int:
        """Estimated decode steps until a sequence about to be added could start, after all that precede it in turn. A
        sequence that is owed a slot starts at once if one is free."""
        forecast = Forecast(self.allocator.num_held, self._demands().values())
        if self._is_owed(sequence) and forecast.earliest_start(sequence.demand(), self.whole_capacity) == 0:
            return 0
        ahead = self.waiting.in_turn(before=sequence)
        start = 0
        for other in [*itertools.islice(ahead, MAX_QUOTED), sequence]:
            demand = other.demand()
            start = forecast.earliest_start(demand, self._room_for(other)) or 0
            forecast.add(demand.at(start))
        return start + int(sum(other.cost for other in ahead) / self.capacity.num_rows)

    def _demands(self, *more: Sequence) -> dict[int, Demand]:
        """The demands of all running sequences and `more`, by `id`."""
        sequences = [*self.running, *more]
        holdings = self.pages.holdings(sequences)
        demands = {}
        for sequence in sequences:
            holding = holdings[id(sequence)]
            demands[id(sequence)] = sequence.demand(holding.num_private, holding.num_freed)
        return demands

    # --- one step ---

    def schedule(self, now: float, step_times: StepTimes) -> ScheduledBatch:
        """Compose the next step and prepare the page tables for it.

        Args:
            step_times: measured step times.
        """
        self._steps_to_retry -= 1
        if self.waiting and self._steps_to_retry <= 0 and not self._round:
            self._admit(now)
            self._steps_to_retry = RETRY_STEPS
        expedited = [] if self._round else self._turns.expedited(self.running, now, step_times)
        if expedited:
            decoding, prefills, ready = self._who_could(expedited)
            chosen = self._turns.fill([*ready, *decoding])
            if self._is_safe_after(chosen):
                return self._new_batch(chosen, prefills)
        decoding, prefills, ready = self._who_could(self.running)
        chosen = self._who_advances(decoding, ready, len(ready) < len(prefills))
        if decoding and not chosen:  # decoding waits for sequences in prefill, which get the whole step
            prefills = self._prefill(self.running, self._idle_prefill_tokens)
        return self._new_batch(chosen, prefills)

    def _who_could(self, sequences: list[Sequence]) -> tuple[list[Sequence], list[_Prefill], list[Sequence]]:
        """Of `sequences`: those in decode, the prefills of this step, and the sequences that finish theirs with it."""
        decoding = [s for s in sequences if s.phase is Phase.DECODE]
        budget = self._prefill_tokens if decoding else self._idle_prefill_tokens
        prefills = self._prefill(sequences, budget)
        return decoding, prefills, [p.sequence for p in prefills if p.is_ready]

    def _new_batch(self, chosen: list[Sequence], prefills: list[_Prefill]) -> ScheduledBatch:
        """The batch in which `chosen` decide a step; allocates pages for the positions that they feed."""
        batch = ScheduledBatch(deciding=chosen)
        behind = {id(prefill.sequence): prefill for prefill in prefills}
        for sequence in chosen:
            self.pages.allocate_step(sequence)
            prefill = behind.pop(id(sequence), None)
            for index, row in enumerate(sequence.rows):
                num_new = 1 if prefill is None else prefill.num_new[index] + 1
                batch.chunks.append(RowChunk(sequence, row, row.num_computed, num_new))
        for prefill in behind.values():
            for row, num_new in zip(prefill.sequence.rows, prefill.num_new, strict=True):
                if num_new:
                    batch.chunks.append(RowChunk(prefill.sequence, row, row.num_computed, num_new))
        if batch.chunks:
            batch.copies.extend(self.pages.take_copies())
            self._num_steps += 1
        return batch

    def _prefill(self, sequences: list[Sequence], budget: int) -> list[_Prefill]:
        """Distribute `budget` prefill positions, earliest playback deadline first.

        A sequence is ready for its first decode step if it has nothing left to prefill, or if the budget also covers
        that step.
        """
        prefills = []
        prefilling = [s for s in sequences if s.phase is Phase.PREFILL]
        for sequence in sorted(prefilling, key=self._turns.need):
            behind = [sequence.prefill_len - row.num_computed for row in sequence.rows]
            num_new = []
            for missing in behind:
                num_new.append(min(budget, missing))
                budget -= num_new[-1]
            is_ready = not any(behind) or (num_new == behind and budget >= sequence.num_rows)
            if is_ready:
                budget = max(budget - sequence.num_rows, 0)
            prefills.append(_Prefill(sequence, tuple(num_new), is_ready))
        return prefills

    def _who_advances(self, decoding: list[Sequence], ready: list[Sequence], some_behind: bool) -> list[Sequence]:
        """All sequences, if none is behind and all fit in the step; otherwise those with the earliest deadlines.

        Args:
            ready: sequences whose prefill ends with this step, so that they can decode in it.
            some_behind: whether others are still in prefill.
        """
        everyone = decoding + ready
        self._round &= {id(s) for s in everyone}
        if not self._round:
            if not some_behind and sum(s.num_rows for s in everyone) <= self.config.max_step_rows:
                return everyone
            for candidates in (everyone, decoding):
                chosen = self._turns.fill(sorted(candidates, key=self._turns.need))
                if chosen and self._is_safe_after(chosen):
                    return chosen
            if some_behind:
                return []  # the forecast assumes that all advance together: sequences behind catch up first
            self._round = {id(s) for s in everyone}
        chosen = self._turns.fill(sorted((s for s in everyone if id(s) in self._round), key=self._turns.need))
        self._round -= {id(s) for s in chosen}
        return chosen

    def _is_safe_after(self, chosen: list[Sequence]) -> bool:
        """Whether the forecast fits after `chosen` have advanced by one step."""
        if sum(s.demand().most_pages for s in self.running) <= self.capacity.num_pages:
            return True
        demands, num_new = self._demands(), 0
        for sequence in chosen:
            demand = demands[id(sequence)]
            pages = self.pages.num_pages_for_step(sequence)
            num_new += pages
            demands[id(sequence)] = replace(
                demand,
                length=demand.length + demand.growth,
                num_steps=demand.num_steps - 1,
                num_held=demand.num_held + pages,
                num_freed=demand.num_freed + pages,
            )
        return Forecast(self.allocator.num_held + num_new, demands.values()).fits(self.whole_capacity)

    # --- admission ---

    def _admit(self, now: float) -> None:
        """Admit in turn; behind a request that does not fit yet, only requests that do not delay it (backfill).

        Durations are known except for how prefills are split over steps. So that a stream of small requests cannot
        starve a large one, backfill stops when its start has slipped by `MAX_SLIP_STEPS`, or by `MAX_OWED_SLIP_STEPS`
        for requests that are owed a slot.
        """
        first: Sequence | None = None
        reserved: Demand | None = None
        num_tried = slip = 0
        for sequence in self._candidates():
            if not self._free_slots or num_tried > MAX_BACKFILL:
                return
            if len(self.running) < self._room_for(sequence).num_requests:  # otherwise it cannot fit
                if first is not None and reserved is None:
                    reserved, slip = self._reserve(first)
                    if slip > MAX_OWED_SLIP_STEPS:
                        return
                waits = self.pages.is_being_computed(sequence, self.running)
                waits |= slip > MAX_SLIP_STEPS and not self._is_owed(sequence)
                if not waits and self._take(sequence, reserved, now):
                    continue
            num_tried += 1
            first = first or sequence

    def _reserve(self, sequence: Sequence) -> tuple[Demand, int]:
        """The future demand of the first request in turn, and by how many steps its start has slipped."""
        demand = sequence.demand()
        forecast = Forecast(self.allocator.num_held, self._demands().values())
        reserved = demand.at(forecast.earliest_start(demand, self._room_for(sequence)) or 0)
        start = self._num_steps + reserved.start
        sequence.promised_step = min(start, sequence.promised_step or start)
        return reserved, start - sequence.promised_step

    def _room_for(self, sequence: Sequence) -> Capacity:
        """The capacity available to a sequence: more slots if it is owed one."""
        return self.whole_capacity if self._is_owed(sequence) else self.capacity

    def _is_owed(self, sequence: Sequence) -> bool:
        return self.places.is_owed(sequence.request.tenant, sequence.request.weight)

    def _candidates(self) -> Iterator[Sequence]:
        """Waiting sequences in turn, re-evaluated as the counters change."""
        seen: set[int] = set()
        while (sequence := self.waiting.next(seen)) is not None:
            seen.add(id(sequence))
            yield sequence

    def _take(self, sequence: Sequence, reserved: Demand | None, now: float) -> bool:
        """Admit `sequence` if it fits together with the running sequences and the `reserved` demand."""
        if not self._take_prefill_pages(sequence, reserved):
            return False
        self.waiting.remove(sequence)
        self.counters.charge(sequence.request.tenant, sequence.cost, sequence.request.weight)
        self.places.take(sequence.request.tenant)
        sequence.slot = self._free_slots.pop()
        sequence.phase = Phase.PREFILL
        sequence.times.admitted = now
        self.running.append(sequence)
        return True

    def _take_prefill_pages(self, sequence: Sequence, reserved: Demand | None) -> bool:
        """Share the pages that others have computed and allocate the rest, all or nothing."""
        self.pages.share_prefix(sequence)
        demands = [*self._demands(sequence).values(), *([] if reserved is None else [reserved])]
        if not Forecast(self.allocator.num_held, demands).fits(self._room_for(sequence)):
            self.pages.release(sequence)
            return False
        self.pages.allocate_prefill(sequence)
        return True
