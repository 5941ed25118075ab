"""Who is admitted, and what each step computes. Knows pages, lengths and clocks; neither tensors nor sampling.

Admission: a request is admitted when, letting everyone advance together to the end, pages and rows always suffice.
So nothing is ever taken back for want of memory. A request that does not fit yet holds up only those that would
delay it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from musicgen_kernels import PAGE_LEN

from musicgen.config import SchedulerConfig
from musicgen.engine.fairness import VirtualCounters
from musicgen.engine.forecast import Capacity, Demand, Forecast
from musicgen.engine.kv_cache import PageAllocator, PageKey, num_pages_for
from musicgen.engine.queue import WaitingQueue
from musicgen.engine.sequence import Phase, Row, Sequence

MAX_BACKFILL = 8
"""Requests behind one that does not fit yet that are tried at a time."""
MAX_QUOTED = 64
"""Waiting requests that a quoted start looks through."""
RETRY_STEPS = 16
"""Admission is tried again after so many steps, even if nothing began or ended."""


@dataclass(frozen=True, slots=True, eq=False)
class RowChunk:
    """Positions `start` … `start + num_new` − 1 of one row, to be computed in this step."""

    sequence: Sequence
    row: Row
    start: int
    num_new: int


@dataclass(frozen=True, slots=True, eq=False)
class ScheduledBatch:
    """One step. The rows of a deciding sequence are adjacent, and each one's last position gets logits."""

    chunks: list[RowChunk] = field(default_factory=list)
    deciding: list[Sequence] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    """Pages (from, to) to be copied before anything is computed."""

    @property
    def num_tokens(self) -> int:
        return sum(chunk.num_new for chunk in self.chunks)


class Scheduler:
    """Waiting and running sequences.

    Args:
        allocator: owns the pages; only the scheduler takes and releases them.
        frame_rate_hz: for playback deadlines.
    """

    def __init__(self, config: SchedulerConfig, allocator: PageAllocator, frame_rate_hz: float) -> None:
        self.config, self.allocator = config, allocator
        self.capacity = Capacity(allocator.num_pages, config.max_rows)
        self.counters = VirtualCounters()
        self.waiting = WaitingQueue(self.counters)
        self.running: list[Sequence] = []
        self._frame_rate_hz = frame_rate_hz
        self._free_slots = list(range(config.max_requests))[::-1]
        self._copies: list[tuple[int, int]] = []
        self._round: set[int] = set()
        self._steps_to_retry = 0

    # --- coming and going ---

    def add(self, sequence: Sequence) -> None:
        self.waiting.add(sequence)
        self._steps_to_retry = 0

    def remove(self, sequence: Sequence) -> None:
        """End a sequence, waiting or running: its pages and slot are free afterwards."""
        if sequence.phase is Phase.WAITING:
            self.waiting.remove(sequence)
        elif sequence.phase is not Phase.ENDED:
            self.counters.charge(sequence.request.tenant, -sequence.cost, sequence.request.weight)
            self.release_rows(sequence)
            self.running.remove(sequence)
            self._free_slots.append(sequence.slot)
        sequence.phase = Phase.ENDED
        self._steps_to_retry = 0

    def release_rows(self, sequence: Sequence) -> None:
        for row in sequence.rows:
            self.allocator.release(row.pages)
            row.pages = []

    def began_decoding(self, sequence: Sequence) -> None:
        """Its prefill is complete, and what it published may be what another waits for."""
        sequence.phase = Phase.DECODE
        self._steps_to_retry = 0

    def copied(self, batch: ScheduledBatch) -> None:
        """The batch's copies are made: let go of the pages they were made from."""
        self.allocator.release(source for source, _ in batch.copies)

    def open_window(self, sequence: Sequence) -> None:
        """Take the pages of a running sequence's new window; the admission has counted on them."""
        for row in sequence.rows:
            self._share_prefix(sequence, row)
        self._allocate_prefill(sequence)
        sequence.phase = Phase.PREFILL

    # --- forecasts ---

    def fits_alone(self, sequence: Sequence) -> bool:
        """Whether the sequence could ever be admitted."""
        return Forecast(self.capacity, 0, [sequence.demand()]).fits()

    def steps_to_start(self, sequence: Sequence) -> int:
        """Decode steps until a sequence about to be added could begin, everyone before it in turn considered."""
        ahead = self.waiting.in_turn(before=sequence)
        demands = self._demands()
        quoted, rest = ahead[:MAX_QUOTED], ahead[MAX_QUOTED:]
        start = 0
        for other in [*quoted, sequence]:
            demand = other.demand()
            found = Forecast(self.capacity, self.allocator.num_held, demands).earliest_start(demand)
            start = found or 0
            demands.append(demand.at(start))
        return start + int(sum(other.cost for other in rest) / self.capacity.num_rows)

    def _demands(self) -> list[Demand]:
        return [sequence.demand(self._num_private(sequence)) for sequence in self.running]

    def _num_private(self, sequence: Sequence) -> int:
        num_holders = self.allocator.num_holders
        return sum(num_holders(page) == 1 for row in sequence.rows for page in row.pages)

    # --- one step ---

    def schedule(self, now: float) -> ScheduledBatch:
        """Decide what the next step computes. Page tables are ready for it afterwards."""
        self._steps_to_retry -= 1
        if self.waiting and self._steps_to_retry <= 0 and not self._round:
            self._admit(now)
            self._steps_to_retry = RETRY_STEPS
        batch = ScheduledBatch(copies=self._copies)
        self._copies = []
        decoding = [s for s in self.running if s.phase is Phase.DECODE]
        prefilling = [s for s in self.running if s.phase is Phase.PREFILL]
        for sequence in self._who_decodes(decoding, bool(prefilling), now):
            self._add_decode(sequence, batch)
        budget = self.config.prefill_tokens if decoding else self.config.idle_prefill_tokens
        for sequence in sorted(prefilling, key=lambda s: (s.request.priority, self._playback_due(s))):
            budget -= self._add_prefill(sequence, budget, batch)
        return batch

    def _who_decodes(self, decoding: list[Sequence], is_prefilling: bool, now: float) -> list[Sequence]:
        """Everyone, if the step holds all; else those whose listeners are nearest to silence.

        Letting some advance without the others is done only while the forecast still fits afterwards. When it
        would not, everyone takes turns until all have advanced by one step.
        """
        holds_all = sum(s.num_rows for s in decoding) <= self.config.max_step_rows
        if holds_all and not is_prefilling:
            self._round.clear()
            return decoding
        by_need = sorted(decoding, key=lambda s: (s.request.priority, self._playback_due(s)))
        chosen = self._fill(by_need)
        if self._is_safe_after(chosen):
            self._round.clear()
            return chosen
        if is_prefilling:
            return []  # the forecast counts on these to be as far as the others: they catch up first
        self._round &= {id(s) for s in decoding}
        if not self._round:
            self._round = {id(s) for s in decoding}
        chosen = self._fill(s for s in by_need if id(s) in self._round)
        self._round -= {id(s) for s in chosen}
        return chosen

    def _fill(self, sequences: Iterable[Sequence]) -> list[Sequence]:
        chosen, rows_left = [], self.config.max_step_rows
        for sequence in sequences:
            if sequence.num_rows <= rows_left:
                chosen.append(sequence)
                rows_left -= sequence.num_rows
        return chosen

    def _is_safe_after(self, chosen: list[Sequence]) -> bool:
        """Whether the forecast fits after `chosen` have advanced by one step."""
        if sum(s.demand().most_pages for s in self.running) <= self.capacity.num_pages:
            return True
        demands, num_new = [], 0
        advanced = set(map(id, chosen))
        for sequence in self.running:
            demand = sequence.demand(self._num_private(sequence))
            if id(sequence) in advanced:
                pages = sum(row.num_computed == len(row.pages) * PAGE_LEN for row in sequence.rows)
                num_new += pages
                demand = replace(
                    demand,
                    length=demand.length + demand.growth,
                    num_steps=demand.num_steps - 1,
                    num_held=demand.num_held + pages,
                    num_private=demand.num_private + pages,
                )
            demands.append(demand)
        return Forecast(self.capacity, self.allocator.num_held + num_new, demands).fits()

    def _playback_due(self, sequence: Sequence) -> float:
        """When the listener needs the next frame."""
        if sequence.times.first_chunk is None:
            return sequence.times.arrived
        heard = sequence.num_frames - sequence.request.codes.num_known_frames
        return sequence.times.first_chunk + heard / self._frame_rate_hz

    def _add_decode(self, sequence: Sequence, batch: ScheduledBatch) -> None:
        for row in sequence.rows:
            if row.num_computed == len(row.pages) * PAGE_LEN:
                row.pages += self.allocator.allocate(1)
            batch.chunks.append(RowChunk(sequence, row, row.num_computed, 1))
        batch.deciding.append(sequence)

    def _add_prefill(self, sequence: Sequence, budget: int, batch: ScheduledBatch) -> int:
        """Add chunks of the rows that are behind, within `budget`; returns the positions used.

        When they catch up and the budget allows, the first decode step is joined on.
        """
        chunks, left = [], budget
        for row in sequence.rows:
            num_new = min(left, sequence.prefill_len - row.num_computed)
            left -= num_new
            chunks.append(RowChunk(sequence, row, row.num_computed, num_new))
        catches_up = all(c.start + c.num_new == sequence.prefill_len for c in chunks)
        if catches_up and (left >= len(chunks) or left == budget):
            chunks = [RowChunk(c.sequence, c.row, c.start, c.num_new + 1) for c in chunks]
            for row in sequence.rows:
                if sequence.prefill_len == len(row.pages) * PAGE_LEN:
                    row.pages += self.allocator.allocate(1)
            batch.deciding.append(sequence)
            left -= len(chunks)
        batch.chunks.extend(chunk for chunk in chunks if chunk.num_new > 0)
        return budget - left

    # --- admission ---

    def _admit(self, now: float) -> None:
        """Admit in turn; behind one that does not fit yet, only those that do not delay it."""
        reserved: Demand | None = None
        num_tried = 0
        for sequence in self._candidates():
            if not self._free_slots or num_tried > MAX_BACKFILL:
                return
            if self._waits_for_prefix(sequence):
                continue
            if self._take(sequence, reserved, now):
                continue
            num_tried += 1
            if reserved is None:
                demand = sequence.demand()
                forecast = Forecast(self.capacity, self.allocator.num_held, self._demands())
                reserved = demand.at(forecast.earliest_start(demand) or 0)

    def _candidates(self) -> Iterator[Sequence]:
        """Waiting sequences in turn; the order follows the counters as they change."""
        seen: set[int] = set()
        while (sequence := self.waiting.next(seen)) is not None:
            seen.add(id(sequence))
            yield sequence

    def _take(self, sequence: Sequence, reserved: Demand | None, now: float) -> bool:
        """Admit `sequence` if it fits beside those that run and the one that is `reserved` for."""
        if not self._take_prefill_pages(sequence, reserved):
            return False
        self.waiting.remove(sequence)
        self.counters.charge(sequence.request.tenant, sequence.cost, sequence.request.weight)
        sequence.slot = self._free_slots.pop()
        sequence.phase = Phase.PREFILL
        sequence.times.admitted = now
        self.running.append(sequence)
        return True

    def _take_prefill_pages(self, sequence: Sequence, reserved: Demand | None) -> bool:
        """Share what others have computed, allocate the rest; all or nothing."""
        others = self._demands()
        for row in sequence.rows:
            self._share_prefix(sequence, row)
        mine = sequence.demand(self._num_private(sequence))
        more = [mine] if reserved is None else [mine, reserved]
        if not Forecast(self.capacity, self.allocator.num_held, others).fits(*more):
            for row in sequence.rows:
                self.allocator.release(row.pages)
                row.pages, row.num_computed, row.num_published = [], 0, 0
            return False
        self._allocate_prefill(sequence)
        return True

    def _share_prefix(self, sequence: Sequence, row: Row) -> None:
        """Hold the full pages of the prefill that others have computed."""
        for key in row.keys[: sequence.prefill_len // PAGE_LEN]:
            page = self.allocator.find(key)
            if page is None:
                return
            self.allocator.share(page)
            row.pages.append(page)
            row.num_computed += PAGE_LEN
            row.num_published += 1

    def _allocate_prefill(self, sequence: Sequence) -> None:
        """The pages of the prefill that are not shared.

        A part page at the end of an equal prefill is copied instead of computed again: it cannot be shared, because
        its holder and this sequence both go on writing to it.
        """
        for row in sequence.rows:
            row.pages += self.allocator.allocate(num_pages_for(sequence.prefill_len) - len(row.pages))
        spare = self.allocator.num_available - sum(s.num_rows for s in self.running) - sequence.num_rows
        for row in sequence.rows:
            num_full = sequence.prefill_len // PAGE_LEN
            is_only_part_missing = row.num_published == num_full < len(row.keys)
            source = self.allocator.find(row.keys[num_full]) if is_only_part_missing else None
            if source is not None and spare > 0:
                self.allocator.share(source)  # until it is copied
                spare -= 1
                self._copies.append((source, row.pages[num_full]))
                row.num_computed = sequence.prefill_len

    def _waits_for_prefix(self, sequence: Sequence) -> bool:
        """Whether a running sequence is just computing what this one could share."""
        pending = {
            key
            for other in self.running
            if other.phase is Phase.PREFILL
            for row in other.rows
            for key in row.keys[row.num_published :]
        }
        return bool(pending) and any(self._first_missing(row) in pending for row in sequence.rows)

    def _first_missing(self, row: Row) -> PageKey | None:
        return next((key for key in row.keys if self.allocator.find(key) is None), None)

    def publish(self, sequence: Sequence, row: Row) -> None:
        """Let others find the pages of the prefill that are computed by now."""
        while row.num_published < len(row.keys):
            end = min((row.num_published + 1) * PAGE_LEN, sequence.prefill_len)
            if row.num_computed < end:
                return
            self.allocator.publish(row.pages[row.num_published], row.keys[row.num_published])
            row.num_published += 1
