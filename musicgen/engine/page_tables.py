"""The pages of each row: what it shares with others, what it allocates, and what it lets others find.

The scheduler decides who gets pages; how a row comes by them is here. Knows nothing of time or turns.
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
    """Of the pages that a sequence holds: those that nobody else holds, now and when it ends."""

    num_private: int
    num_freed: int


class PageTables:
    """Takes pages for sequences and gives them back.

    Args:
        allocator: only used through here while sequences run.
    """

    def __init__(self, allocator: PageAllocator) -> None:
        self.allocator = allocator
        self._copies: list[tuple[int, int]] = []

    @property
    def has_copies(self) -> bool:
        """Whether pages wait to be copied before the next step."""
        return bool(self._copies)

    def take_copies(self) -> list[tuple[int, int]]:
        """Pages (from, to) to be copied, in this order, before anything is computed."""
        copies, self._copies = self._copies, []
        return copies

    def share_prefix(self, sequence: Sequence) -> None:
        """Hold the full pages of the prefill that others have computed."""
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
        """The pages of the prefill that are not shared.

        A part page at the end of an equal prefill is copied instead of computed again: it cannot be shared, because
        its holder and this sequence both go on writing to it.
        """
        for row in sequence.rows:
            row.pages += self.allocator.allocate(num_pages_for(sequence.prefill_len) - len(row.pages))
        num_full = sequence.prefill_len // PAGE_LEN
        for row in sequence.rows:
            is_only_part_missing = row.num_published == num_full < len(row.keys)
            source = self.allocator.find(row.keys[num_full]) if is_only_part_missing else None
            if source is not None:
                # Nobody holds the source meanwhile: copies are made, in this order, before a step writes anything.
                self.allocator.touch(source)
                self._copies.append((source, row.pages[num_full]))
                row.num_computed = sequence.prefill_len

    def num_pages_for_step(self, sequence: Sequence) -> int:
        """Pages that one more decode step needs."""
        return sum(_is_full(sequence, row) for row in sequence.rows)

    def allocate_step(self, sequence: Sequence) -> None:
        """The pages that one more decode step needs."""
        for row in sequence.rows:
            if _is_full(sequence, row):
                row.pages += self.allocator.allocate(1)

    def publish(self, sequence: Sequence, row: Row) -> None:
        """Let others find the pages of the prefill that are computed by now."""
        while row.num_published < len(row.keys):
            end = min((row.num_published + 1) * PAGE_LEN, sequence.prefill_len)
            if row.num_computed < end:
                return
            self.allocator.publish(row.pages[row.num_published], row.keys[row.num_published])
            row.num_published += 1

    def release(self, sequence: Sequence) -> None:
        """Give up all pages; the rows are as if nothing had been computed."""
        for row in sequence.rows:
            self.allocator.release(reversed(row.pages))  # what is kept loses its ends before its beginnings
            row.pages, row.num_computed, row.num_published = [], 0, 0

    def is_being_computed(self, sequence: Sequence, running: Iterable[Sequence]) -> bool:
        """Whether one of `running` is just computing what `sequence` could share."""
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
        """What each sequence holds alone, by `id`; of those that share a page, the last to end frees it.

        Only pages of a prefill can be shared: the others are counted, not looked at.
        """
        seen: set[int] = set()
        holdings = {}
        for sequence in sorted(sequences, key=lambda s: s.num_steps_left, reverse=True):
            # Rows may share among themselves.
            shareable = Counter(page for row in sequence.rows for page in row.pages[: len(row.keys)])
            num_own = sum(max(len(row.pages) - len(row.keys), 0) for row in sequence.rows)
            num_alone = sum(self.allocator.num_holders(page) == count for page, count in shareable.items())
            num_seen = len(seen)
            seen.update(shareable)
            holdings[id(sequence)] = Holding(num_own + num_alone, num_own + len(seen) - num_seen)
        return holdings


def _is_full(sequence: Sequence, row: Row) -> bool:
    """Whether the next position of a row that has its prefill needs another page."""
    return max(row.num_computed, sequence.prefill_len) == len(row.pages) * PAGE_LEN
