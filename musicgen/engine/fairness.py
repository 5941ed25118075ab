"""Weighted fair sharing between tenants, of decode frames and of slots.

Every tenant has a virtual counter of the frames it was served, counted once per guidance row and divided by its weight.
The tenant with the smallest counter goes next. A tenant that returns after a pause starts at the smallest counter of
the waiting tenants, or, if none wait, at that of the tenant served last: idling earns no credit.

Source: Sheng et al. 2024, "Fairness in Serving Large Language Models" (virtual token counter). Unlike there, a request
is charged on admission, because its length is known; the unserved part is refunded when it is cancelled.
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
        """The tenant served last."""

    def __getitem__(self, tenant: str) -> float:
        return self._served.get(tenant, 0.0)

    def lift(self, tenant: str, waiting: Collection[str]) -> None:
        """Raise the counter of a tenant that had no waiting requests and submits one."""
        self._served[tenant] = self.lifted(tenant, waiting)

    def lifted(self, tenant: str, waiting: Collection[str]) -> float:
        """The tenant's counter after `lift`."""
        floor = min((self[other] for other in waiting if other != tenant), default=None)
        if floor is None:
            floor = 0.0 if self._last is None else self[self._last]
        return max(self[tenant], floor)

    def charge(self, tenant: str, num_frames: float, weight: float) -> None:
        """Count frames as served; negative to refund them."""
        self._served[tenant] = self[tenant] + num_frames / weight
        if num_frames > 0:
            self._last = tenant


def burst(share: float) -> float:
    """The demand up to which a tenant with this share of slots does not count as over its share."""
    return max(1.0, BURST * share)


class Places:
    """Running requests and demand (running plus waiting) of each tenant, and its share of the slots by weight.

    Shares are computed among the tenants with demand; a single tenant gets half, because another may arrive. A tenant
    *floods* if its demand exceeds `burst` of its share.
    """

    def __init__(self, num_places: int) -> None:
        self._num_places = num_places
        self._asked: Counter[str] = Counter()
        """Running and waiting."""
        self._running: Counter[str] = Counter()
        self._weights: dict[str, float] = {}
        self._total = 0.0
        """Sum of the weights."""
        self._flooding: set[str] = set()
        self._is_stale = False

    def ask(self, tenant: str, weight: float) -> None:
        """Record a new request."""
        self._asked[tenant] += 1
        self._weights[tenant] = weight
        self._is_stale = True

    def take(self, tenant: str) -> None:
        """Record that a waiting request has started."""
        self._running[tenant] += 1

    def leave(self, tenant: str, *, ran: bool) -> None:
        """Record that a request has ended."""
        self._asked[tenant] -= 1
        self._running[tenant] -= ran
        if not self._asked[tenant]:
            del self._asked[tenant], self._running[tenant], self._weights[tenant]
        self._is_stale = True

    @property
    def some_flood(self) -> bool:
        """Whether there are several tenants and at least one floods."""
        return len(self._weights) > 1 and bool(self._who_floods())

    def is_modest(self, tenant: str) -> bool:
        """Whether other tenants flood and this one does not."""
        return self.some_flood and tenant not in self._who_floods()

    def is_owed(self, tenant: str, weight: float) -> bool:
        """Whether other tenants flood and this one runs fewer requests than its share (than `burst` of its share if it
        does not flood itself)."""
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
