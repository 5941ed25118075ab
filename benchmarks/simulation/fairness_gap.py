"""Measures how evenly tenants with waiting requests are served. Passive observer.

Over any interval in which two tenants both have requests waiting, the frames admitted for each (counting guidance rows
separately, divided by its weight) should stay close: within twice the most expensive request for a virtual token
counter (Sheng et al. 2024, theorem 4.4). The gap is the maximum over all such intervals and pairs.
"""

from __future__ import annotations

from itertools import combinations


class FairnessGap:
    """Fairness gap of one replica. Notified of every request that is queued, started or removed."""

    def __init__(self) -> None:
        self._num_waiting: dict[str, int] = {}
        self._served: dict[str, float] = {}
        self._began: dict[tuple[str, str], float] = {}
        """For each waiting pair: the lead of the first over the second at the start of the interval."""
        self.widest = 0.0
        self.dearest = 0.0

    def came(self, tenant: str) -> None:
        self._num_waiting[tenant] = self._num_waiting.get(tenant, 0) + 1
        if self._num_waiting[tenant] == 1:
            for pair in combinations(sorted(t for t, n in self._num_waiting.items() if n), 2):
                if tenant in pair:
                    self._began[pair] = self._lead(pair)

    def began(self, tenant: str, frames: float) -> None:
        """A waiting request of `frames` weighted frames was admitted."""
        self._served[tenant] = self._served.get(tenant, 0.0) + frames
        self.dearest = max(self.dearest, frames)
        for pair, before in self._began.items():
            if tenant in pair:
                self.widest = max(self.widest, abs(self._lead(pair) - before))
        self.left(tenant)

    def left(self, tenant: str) -> None:
        """A request is no longer waiting."""
        self._num_waiting[tenant] -= 1
        if not self._num_waiting[tenant]:
            self._began = {pair: lead for pair, lead in self._began.items() if tenant not in pair}

    def _lead(self, pair: tuple[str, str]) -> float:
        return self._served.get(pair[0], 0.0) - self._served.get(pair[1], 0.0)
