"""The waiting queue: FIFO within a tenant; the least-served tenant goes next."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Collection, Iterator
from heapq import heapify, heappop, heappush

from musicgen.engine.fairness import VirtualCounters
from musicgen.engine.sequence import Sequence

_Lane = tuple[int, str]
"""Priority and tenant."""


class WaitingQueue:
    """One FIFO lane per priority and tenant.

    Args:
        counters: service received by each tenant; returning tenants are lifted here.
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
        """The next sequence in turn. Sequences in `seen` (by `id`) have been tried; lanes with fewer go first."""
        best: Sequence | None = None
        best_turn: tuple[int, int, float, float] | None = None
        for (priority, tenant), lane in self._lanes.items():
            num_seen, head = next(((i, s) for i, (key, s) in enumerate(lane.items()) if key not in seen), (0, None))
            if head is None:
                continue
            turn = (priority, num_seen, self._counters[tenant], head.times.arrived)
            if best_turn is None or turn < best_turn:
                best, best_turn = head, turn
        return best

    def in_turn(self, before: Sequence) -> Iterator[Sequence]:
        """All sequences that would precede `before` (not in the queue yet), in turn, without further arrivals.

        Simulates the charges to the counters along the way.
        """
        request = before.request
        lanes = {key: deque(lane.values()) for key, lane in self._lanes.items()}
        tenants = {tenant for _, tenant in lanes}
        counters = {tenant: self._counters[tenant] for tenant in tenants}
        if request.tenant not in tenants:
            counters[request.tenant] = self._counters.lifted(request.tenant, tenants)
        lanes.setdefault((request.priority, request.tenant), deque()).append(before)
        turns = [(key[0], counters[key[1]], lane[0].times.arrived, key) for key, lane in lanes.items()]
        heapify(turns)
        while turns:
            priority, counter, _, key = heappop(turns)
            tenant = key[1]
            if counter == counters[tenant]:  # otherwise it has been charged since, through a lane of another priority
                sequence = lanes[key].popleft()
                if sequence is before:
                    return
                yield sequence
                counters[tenant] += sequence.cost / sequence.request.weight
            if lanes[key]:
                heappush(turns, (priority, counters[tenant], lanes[key][0].times.arrived, key))

    def all(self) -> list[Sequence]:
        return [sequence for lane in self._lanes.values() for sequence in lane.values()]
