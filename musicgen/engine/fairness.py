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


class VirtualCounters:
    """The counters of all tenants."""

    def __init__(self) -> None:
        self._served: dict[str, float] = {}
        self._last: str | None = None
        """The tenant that was served last."""

    def __getitem__(self, tenant: str) -> float:
        return self._served.get(tenant, 0.0)

    def knows_others(self, tenant: str) -> bool:
        """Whether any other tenant has come so far; requests without one, such as a warm-up, are nobody's."""
        return any(other not in ("", tenant) for other in self._served)

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


class Places:
    """How many requests each tenant runs, and how many of all places are its by weight.

    Shares are among the tenants that run; one that runs alone is left half, because another may come.
    """

    def __init__(self, num_places: int) -> None:
        self._num_places = num_places
        self._held: Counter[str] = Counter()
        self._weights: dict[str, float] = {}
        self.some_exceed = False
        """Whether several tenants run, and one of them has more than its share."""

    def take(self, tenant: str, weight: float) -> None:
        self._held[tenant] += 1
        self._weights[tenant] = weight
        self._look()

    def give_back(self, tenant: str) -> None:
        self._held[tenant] -= 1
        if not self._held[tenant]:
            del self._held[tenant], self._weights[tenant]
        self._look()

    def has_room(self, tenant: str, weight: float, num_more: int = 0) -> bool:
        """Whether the tenant has no more than its share, with `num_more` requests beside those that it runs."""
        others = sum(of_other for other, of_other in self._weights.items() if other != tenant)
        share = self._num_places * weight / (weight + (others or weight))
        return self._held[tenant] + num_more <= max(1.0, share)

    def _look(self) -> None:
        running = self._weights.items()
        self.some_exceed = len(running) > 1 and not all(self.has_room(tenant, weight) for tenant, weight in running)
