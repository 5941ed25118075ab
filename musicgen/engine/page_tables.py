"""Page tables of the rows: sharing, allocation and publication of pages.

The scheduler decides which sequences get pages; this module assigns them. Independent of time and scheduling order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from musicgen_kernels import PAGE_LEN

from musicgen.engine.kv_cache import PageAllocator, num_pages_for
from musicgen.engine.sequence import Phase, Row, Sequence


@dataclass(frozen=True, slots=True)
class Holding:
    """Counts of the pages that only one sequence holds, now and at its end."""

    num_private: int
    num_freed: int


class PageTables:
    """Allocates and releases the pages of sequences.

    Args:
        allocator: used exclusively through this object while sequences run.
    """

    def __init__(self, allocator: PageAllocator) -> None:
        self.allocator = allocator
        self._copies: list[tuple[int, int]] = []

    @property
    def has_copies(self) -> bool:
        """Whether page copies are pending for the next step."""
        return bool(self._copies)

    def take_copies(self) -> list[tuple[int, int]]:
        """Take the pending page copies (from, to), to be made in this order before the computation."""
        copies, self._copies = self._copies, []
        return copies

    def share_prefix(self, sequence: Sequence) -> None:
        """Share the full prefill pages that other sequences have computed."""
        for row in sequence.rows:
            for key in row.keys[: sequence.prefill_len // PAGE_LEN]:
                page = self.allocator.find(key)
                if page is None:
                    break
                self.allocator.share(page)
                row.pages.append(page)
                row.num_computed += PAGE_LEN
                row.num_published += 1

    def allocate_prefill(self, sequence: Sequence) -> None:
        """Allocate the prefill pages that are not shared.

        A partial last page of an equal prefill is copied rather than recomputed: it cannot be shared, because both
        its holder and this sequence will write to it.
        """
        for row in sequence.rows:
            row.pages += self.allocator.allocate(num_pages_for(sequence.prefill_len) - len(row.pages))
        num_full = sequence.prefill_len // PAGE_LEN
        for row in sequence.rows:
            is_only_part_missing = row.num_published == num_full < len(row.keys)
            source = self.allocator.find(row.keys[num_full]) if is_only_part_missing else None
            if source is not None:
                # The source needs no holder: copies are made, in order, before the step writes anything.
                self.allocator.touch(source)
                self._copies.append((source, row.pages[num_full]))
                row.num_computed = sequence.prefill_len

    def num_pages_for_step(self, sequence: Sequence) -> int:
        """Number of new pages for the next decode step."""
        return sum(_is_full(sequence, row) for row in sequence.rows)

    def allocate_step(self, sequence: Sequence) -> None:
        """Allocate the new pages for the next decode step."""
        for row in sequence.rows:
            if _is_full(sequence, row):
                row.pages += self.allocator.allocate(1)

    def publish(self, sequence: Sequence, row: Row) -> None:
        """Publish the prefill pages computed so far for sharing."""
        while row.num_published < len(row.keys):
            end = min((row.num_published + 1) * PAGE_LEN, sequence.prefill_len)
            if row.num_computed < end:
                return
            self.allocator.publish(row.pages[row.num_published], row.keys[row.num_published])
            row.num_published += 1

    def release(self, sequence: Sequence) -> None:
        """Release all pages and reset the rows to their initial state."""
        for row in sequence.rows:
            self.allocator.release(reversed(row.pages))  # evict the ends of kept prefixes first
            row.pages, row.num_computed, row.num_published = [], 0, 0

    def is_being_computed(self, sequence: Sequence, running: Iterable[Sequence]) -> bool:
        """Whether one of `running` is currently computing pages that `sequence` could share."""
        pending = {
            key
            for other in running
            if other.phase is Phase.PREFILL
            for row in other.rows
            for key in row.keys[row.num_published :]
        }
        find = self.allocator.find
        missing = (next((key for key in row.keys if find(key) is None), None) for row in sequence.rows)
        return bool(pending) and any(key in pending for key in missing)

    def holdings(self, sequences: Iterable[Sequence]) -> dict[int, Holding]:
        """The holdings of each sequence, by `id`; a shared page is freed by the last of its holders to end.

        Only prefill pages can be shared: the others are counted without inspecting them.
        """
        seen: set[int] = set()
        holdings = {}
        for sequence in sorted(sequences, key=lambda s: s.num_steps_left, reverse=True):
            # Rows of one sequence may share pages.
            shareable = Counter(page for row in sequence.rows for page in row.pages[: len(row.keys)])
            num_own = sum(max(len(row.pages) - len(row.keys), 0) for row in sequence.rows)
            num_alone = sum(self.allocator.num_holders(page) == count for page, count in shareable.items())
            num_seen = len(seen)
            seen.update(shareable)
            holdings[id(sequence)] = Holding(num_own + num_alone, num_own + len(seen) - num_seen)
        return holdings


def _is_full(sequence: Sequence, row: Row) -> bool:
    """Whether the next position of a row past its prefill needs a new page."""
    return max(row.num_computed, sequence.prefill_len) == len(row.pages) * PAGE_LEN
