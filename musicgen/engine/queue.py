"""The waiting requests: first come, first served within a tenant; the tenant served least goes next."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection

from musicgen.engine.fairness import VirtualCounters
from musicgen.engine.sequence import Sequence

_Lane = tuple[int, str]
"""Priority and tenant."""


class WaitingQueue:
    """A lane for each priority of each tenant.

    Args:
        counters: what each tenant has been served; a tenant that comes back is lifted here.
    """

    def __init__(self, counters: VirtualCounters) -> None:
        self._counters = counters
        self._lanes: dict[_Lane, OrderedDict[int, Sequence]] = {}
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def add(self, sequence: Sequence) -> None:
        tenant = sequence.request.tenant
        tenants = {other for _, other in self._lanes}
        if tenant not in tenants:
            self._counters.lift(tenant, tenants)
        lane = self._lanes.setdefault((sequence.request.priority, tenant), OrderedDict())
        lane[id(sequence)] = sequence
        self._size += 1

    def remove(self, sequence: Sequence) -> None:
        key = (sequence.request.priority, sequence.request.tenant)
        del self._lanes[key][id(sequence)]
        self._size -= 1
        if not self._lanes[key]:
            del self._lanes[key]

    def next(self, seen: Collection[int] = ()) -> Sequence | None:
        """Whose turn it is, those in `seen` (by `id`) left out."""
        best: Sequence | None = None
        best_turn: tuple[int, float, float] | None = None
        for (priority, tenant), lane in self._lanes.items():
            head = next((s for key, s in lane.items() if key not in seen), None)
            if head is None:
                continue
            turn = (priority, self._counters[tenant], head.times.arrived)
            if best_turn is None or turn < best_turn:
                best, best_turn = head, turn
        return best

    def in_turn(self, before: Sequence) -> list[Sequence]:
        """Everyone who would go before `before` (not in the queue yet), if its tenant is served no sooner."""
        counter = self._counters[before.request.tenant]
        ahead = [
            s
            for (priority, tenant), lane in self._lanes.items()
            if priority < before.request.priority
            or (priority == before.request.priority and self._counters[tenant] <= counter)
            for s in lane.values()
        ]
        return sorted(ahead, key=lambda s: (s.request.priority, self._counters[s.request.tenant], s.times.arrived))

    def all(self) -> list[Sequence]:
        return [sequence for lane in self._lanes.values() for sequence in lane.values()]
