"""Whose turn it is: weighted fair shares between tenants, of decode frames and of places.

Every tenant has a virtual counter of the frames it was served, guidance rows counted apart and divided by its
weight. The tenant with the smallest counter goes next. A tenant that comes back after a pause starts at the smallest
counter of those that wait, or, if nobody does, at that of the tenant that was served last: a pause earns no credit.

Source: Sheng et al. 2024, "Fairness in Serving Large Language Models" (virtual token counter). Here a request is
charged when it is admitted, because its length is known; what it was not served is given back when it is cancelled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from musicgen.config import BURST


class VirtualCounters:
    """The counters of all tenants."""

    def __init__(self) -> None:
        self._served: dict[str, float] = {}
        self._last: str | None = None
        """The tenant that was served last."""

    def __getitem__(self, tenant: str) -> float:
        return self._served.get(tenant, 0.0)

    def lift(self, tenant: str, waiting: Collection[str]) -> None:
        """A tenant without waiting requests brings one: its counter is raised."""
        self._served[tenant] = self.lifted(tenant, waiting)

    def lifted(self, tenant: str, waiting: Collection[str]) -> float:
        """What `lift` would make of the tenant's counter."""
        floor = min((self[other] for other in waiting if other != tenant), default=None)
        if floor is None:
            floor = 0.0 if self._last is None else self[self._last]
        return max(self[tenant], floor)

    def charge(self, tenant: str, num_frames: float, weight: float) -> None:
        """Count frames as served; negative to give them back."""
        self._served[tenant] = self[tenant] + num_frames / weight
        if num_frames > 0:
            self._last = tenant


def burst(share: float) -> float:
    """How many requests a tenant may ask for, of so large a share of places, before it counts as one that floods."""
    return max(1.0, BURST * share)


class Places:
    """How many requests each tenant runs and asks for, and how many of all places are its share by weight.

    Shares are among the tenants that ask; one that is alone is left half, because another may come. Whoever asks for
    more than its share *floods*.
    """

    def __init__(self, num_places: int) -> None:
        self._num_places = num_places
        self._asked: Counter[str] = Counter()
        """Running and waiting."""
        self._running: Counter[str] = Counter()
        self._weights: dict[str, float] = {}
        self._total = 0.0
        """Of the weights."""
        self._flooding: set[str] = set()
        self._is_stale = False

    def ask(self, tenant: str, weight: float) -> None:
        """A request has come."""
        self._asked[tenant] += 1
        self._weights[tenant] = weight
        self._is_stale = True

    def take(self, tenant: str) -> None:
        """One of those that asked runs."""
        self._running[tenant] += 1

    def leave(self, tenant: str, *, ran: bool) -> None:
        """A request has ended."""
        self._asked[tenant] -= 1
        self._running[tenant] -= ran
        if not self._asked[tenant]:
            del self._asked[tenant], self._running[tenant], self._weights[tenant]
        self._is_stale = True

    @property
    def some_flood(self) -> bool:
        """Whether there are several tenants, and one of them floods."""
        return len(self._weights) > 1 and bool(self._who_floods())

    def is_modest(self, tenant: str) -> bool:
        """Whether others flood, and the tenant does not."""
        return self.some_flood and tenant not in self._who_floods()

    def is_owed(self, tenant: str, weight: float) -> bool:
        """Whether others flood, and the tenant has less than its share of places, or, if it does not flood itself, runs
        less than it may ask for."""
        flooding = self._who_floods()
        if not flooding - {tenant}:
            return False
        share = self._share(tenant, weight)
        return self._running[tenant] + 1 <= (share if tenant in flooding else burst(share))

    def _share(self, tenant: str, weight: float) -> float:
        others = self._total - self._weights.get(tenant, 0.0)
        return self._num_places * weight / (weight + (others or weight))

    def _who_floods(self) -> set[str]:
        if self._is_stale:
            self._is_stale = False
            self._total = sum(self._weights.values())
            self._flooding = {
                tenant for tenant, num in self._asked.items() if num > burst(self._share(tenant, self._weights[tenant]))
            }
        return self._flooding
