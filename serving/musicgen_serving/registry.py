"""Every request the gatekeeper knows: those that run, and for a while those that ended.

Owns ids, idempotency keys and what is remembered. Knows no allowance, no queue and no edge's wishes.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from musicgen.types import FinishReason
from musicgen_serving.admission import Ticket
from musicgen_serving.errors import ConflictError, NotFoundError
from musicgen_serving.quotas import Charge
from musicgen_serving.types import GenerationStatus


@dataclass(slots=True, eq=False)
class Record:
    """One request. Mutated by the gatekeeper only."""

    ticket: Ticket
    model: str
    audio_s: float
    admitted_at: float
    seen_at: float
    """When it was admitted or an edge last reported it."""
    idempotency_key: str | None = None
    fingerprint: str = ""
    charge: Charge = ()
    admitted: bool = False
    """False while its allowances are being taken."""
    reused: bool = False
    """Another request had the same id before."""
    done_s: float = 0.0
    edge: str | None = None
    """Who runs it; None until somebody reports it."""
    former_edges: frozenset[str | None] = frozenset()
    """Who ran earlier requests of the same id and may not know that they were ended; None: an edge nobody knows."""
    suspect_since: float | None = None
    """When its edge was first found silent."""
    cancelled: bool = False
    """Somebody wants its end."""
    told: set[str] = field(default_factory=set)
    """Edges that were told so by a long poll."""
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    ended_here: bool = False
    """The gatekeeper ended it, its edge did not: the edge may still run it."""
    reason: FinishReason | None = None
    error_code: str | None = None
    ended_at: float = 0.0

    @property
    def request_id(self) -> str:
        return self.ticket.request_id

    @property
    def key(self) -> tuple[str, str] | None:
        """Idempotency keys are each tenant's own."""
        return None if self.idempotency_key is None else (self.ticket.tenant, self.idempotency_key)

    def status(self, now: float) -> GenerationStatus:
        return GenerationStatus(
            request_id=self.request_id,
            model=self.model,
            state="running" if self.reason is None else self.reason.value,
            audio_s=self.audio_s,
            done_s=self.done_s,
            age_s=now - self.admitted_at,
            error=self.error_code,
        )


class Registry:
    """The records.

    Args:
        remember_s: seconds for which a request that ended is remembered, at most.
        max_remembered: how many of them, at most; the oldest end is forgotten first.
    """

    def __init__(self, remember_s: float, max_remembered: int) -> None:
        self._remember_s, self._max_remembered = remember_s, max_remembered
        self._running: dict[str, Record] = {}
        self._ended: dict[str, Record] = {}
        """In the order of their ends."""
        self._keys: dict[tuple[str, str], Record] = {}
        """The newest of each idempotency key."""
        self._num_running: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Record]:
        """Those that run, in the order of admission; may be changed meanwhile."""
        return iter(list(self._running.values()))

    def running(self, request_id: str) -> Record | None:
        return self._running.get(request_id)

    def ended(self, request_id: str) -> Record | None:
        """A request that ended and is remembered."""
        return self._ended.get(request_id)

    def num_running(self, tenant: str) -> int:
        return self._num_running[tenant]

    def num_remembered(self) -> int:
        return len(self._ended)

    def find(self, tenant: str, request_id: str) -> Record:
        """A tenant's request.

        Raises:
            NotFoundError: no such request, or another tenant's: the answer is the same.
        """
        record = self._running.get(request_id) or self._ended.get(request_id)
        if record is None or record.ticket.tenant != tenant:
            raise NotFoundError("expected the id of a request of yours that runs or ended lately, got another")
        return record

    def holder(self, tenant: str, request_id: str, key: str | None, fingerprint: str) -> Record | None:
        """The running request whose place a repeat of the same request takes; None: there is none.

        Raises:
            ConflictError: the id is in use, or the key was used, for something else; or the first is being admitted
                at this moment.
        """
        same_id = self._running.get(request_id) or self._ended.get(request_id)
        if same_id is not None and same_id.ticket.tenant != tenant:
            raise ConflictError("expected a new request id, got one that is in use; choose another")
        same_key = None if key is None else self._keys.get((tenant, key))
        if same_key is not None and same_key.fingerprint != fingerprint:
            raise ConflictError(
                "expected the same request as before with this idempotency key, got a different one; use a new key"
            )
        if same_id is None or same_id.reason is not None:
            same_id = None
        elif not fingerprint or same_id.fingerprint != fingerprint:
            raise ConflictError("expected a new request id, got one that runs for a different request; choose another")
        found = same_id or (same_key if same_key is not None and same_key.reason is None else None)
        if found is not None and not found.admitted:
            raise ConflictError("the same request is being admitted at this moment; retry in a second")
        return found

    def add(self, record: Record) -> None:
        """A request begins. Its id must not be running. Sets what it knows of an earlier one with the same id."""
        assert record.request_id not in self._running
        former = self._ended.pop(record.request_id, None)
        if former is not None:
            self._drop_key(former)
            record.reused = True
            record.former_edges = former.former_edges | ({former.edge} if former.ended_here else set())
        self._running[record.request_id] = record
        self._num_running[record.ticket.tenant] += 1
        if record.key is not None:
            self._keys[record.key] = record

    def withdraw(self, record: Record) -> None:
        """A request was not admitted after all: nothing is remembered."""
        self._stop(record)
        self._drop_key(record)

    def end(self, record: Record, reason: FinishReason, error_code: str | None, now: float) -> None:
        """A running request has ended; it is remembered for a while."""
        self._stop(record)
        record.reason, record.error_code, record.ended_at = reason, error_code, now
        self._ended[record.request_id] = record
        record.ended.set()
        self.forget(now)

    def forget(self, now: float) -> None:
        """Forget those that ended long ago, and those too many."""
        while self._ended:
            oldest = next(iter(self._ended.values()))
            if len(self._ended) <= self._max_remembered and now - oldest.ended_at <= self._remember_s:
                return
            del self._ended[oldest.request_id]
            self._drop_key(oldest)

    def _stop(self, record: Record) -> None:
        del self._running[record.request_id]
        self._num_running[record.ticket.tenant] -= 1
        if not self._num_running[record.ticket.tenant]:
            del self._num_running[record.ticket.tenant]

    def _drop_key(self, record: Record) -> None:
        if record.key is not None and self._keys.get(record.key) is record:
            del self._keys[record.key]
