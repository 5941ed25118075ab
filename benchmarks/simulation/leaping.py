"""The engine's scheduler, with the ability to take many identical steps at once. Independent of clocks and step times.

Between events, a step decodes one position of every running row and nothing else, so k such steps can be computed
without k calls. `quiet_steps` returns how many such steps follow; `leap` takes them, and leaves pages, rows and
counters in the same state as that many calls of `schedule` and of the core's bookkeeping.
"""

from __future__ import annotations

import sys

from musicgen_kernels import PAGE_LEN

from musicgen.engine.kv_cache import num_pages_for
from musicgen.engine.scheduler import Scheduler
from musicgen.engine.sequence import Phase

UNLIMITED = sys.maxsize


class LeapingScheduler(Scheduler):
    """`Scheduler` with additional methods; overrides nothing."""

    def quiet_steps(self) -> int:
        """Number of upcoming steps in which every running sequence decodes one position, barring arrivals, departures
        and ends; and, while `some_modest`, provided that no step is slower than playback."""
        if self.pages.has_copies or self._round or not self.running:
            return 0
        if any(s.phase is not Phase.DECODE for s in self.running):
            return 0
        if sum(len(s.rows) for s in self.running) > self.config.max_step_rows:
            return 0
        if self.places.some_flood and any(s.times.first_chunk is None for s in self.running):
            return 0  # sequences without first audio may take precedence
        return max(0, self._steps_to_retry - 1) if self.waiting else UNLIMITED

    @property
    def some_modest(self) -> bool:
        """Whether some running sequence belongs to a tenant within its share while others flood."""
        return any(self.places.is_modest(s.request.tenant) for s in self.running)

    def pages_after(self) -> list[int]:
        """`[16]` pages allocated by the running rows in quiet step j (and again in steps j + 16, j + 32 …)."""
        taken = [0] * PAGE_LEN
        for sequence in self.running:
            for row in sequence.rows:
                taken[len(row.pages) * PAGE_LEN - row.num_computed] += 1
        return taken

    def leap(self, num_steps: int) -> None:
        """Execute `num_steps` quiet steps."""
        self._steps_to_retry -= num_steps
        self._num_steps += num_steps
        for sequence in self.running:
            for row in sequence.rows:
                row.num_computed += num_steps
                num_new = num_pages_for(row.num_computed) - len(row.pages)
                if num_new:
                    row.pages += self.allocator.allocate(num_new)
