"""All requests known to the gatekeeper: running ones and, for a while, those that have ended.

Owns request ids, idempotency keys and retention. Independent of quotas, queues and ingresses.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from musicgen.types import FinishReason
from musicgen_serving.admission import Settlement, Ticket
from musicgen_serving.errors import ConflictError, NotFoundError
from musicgen_serving.quotas import Charge
from musicgen_serving.types import GenerationStatus

V = TypeVar("V")
RequestKey = tuple[str, str]
"""Tenant and request id: ids are chosen by clients, so each tenant has its own."""


@dataclass(slots=True, eq=False)
class Record:
    """One request. Mutated by the gatekeeper only."""

    ticket: Ticket
    model: str
    audio_s: float
    admitted_at: float
    seen_at: float
    """Time of admission or of the last report from an ingress."""
    charge: Charge = ()
    admitted: bool = False
    """False while its quota is being charged."""
    done_s: float = 0.0
    made_s: float = 0.0
    edge: str | None = None
    """The ingress that runs it; None until one reports it."""
    suspect_since: float | None = None
    """When its ingress was first found to have stopped reporting."""
    cancelled: bool = False
    """Its cancellation has been requested."""
    told: set[str] = field(default_factory=set)
    """Ingresses notified of the cancellation by a long poll."""
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    reason: FinishReason | None = None
    error_code: str | None = None
    ended_at: float = 0.0

    @property
    def request_id(self) -> str:
        return self.ticket.request_id

    @property
    def request_key(self) -> RequestKey:
        return self.ticket.tenant, self.ticket.request_id

    @property
    def key(self) -> tuple[str, str] | None:
        """Idempotency keys are scoped to a tenant."""
        key = self.ticket.idempotency_key
        return None if key is None else (self.ticket.tenant, key)

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


class _Lately(Generic[V]):
    """Recently noted values; the oldest are evicted first."""

    def __init__(self, remember_s: float, max_remembered: int) -> None:
        self._remember_s, self._max_remembered = remember_s, max_remembered
        self._noted: dict[object, tuple[float, V]] = {}
        """Ordered by time."""

    def get(self, key: object) -> V | None:
        found = self._noted.get(key)
        return None if found is None else found[1]

    def note(self, key: object, value: V, now: float) -> None:
        self._noted.pop(key, None)
        self._noted[key] = now, value
        self.forget(now)

    def forget(self, now: float) -> None:
        while self._noted:
            oldest, (noted_at, _) = next(iter(self._noted.items()))
            if len(self._noted) <= self._max_remembered and now - noted_at <= self._remember_s:
                return
            del self._noted[oldest]


class Registry:
    """The records.

    Args:
        remember_s: maximum retention of an ended request, in seconds.
        max_remembered: maximum number of them; those that ended first are evicted first.
    """

    def __init__(self, remember_s: float, max_remembered: int) -> None:
        self._remember_s, self._max_remembered = remember_s, max_remembered
        self._running: dict[RequestKey, Record] = {}
        self._ended: dict[RequestKey, Record] = {}
        """Ordered by end time."""
        self._keys: dict[tuple[str, str], Record] = {}
        """The latest request of each idempotency key."""
        self._ends = _Lately[bool](remember_s, max_remembered)
        """By serial of an ended request: whether the gatekeeper ended it."""
        self._paid = _Lately[float](remember_s, max_remembered)
        """Seconds billed so far, by tenant, idempotency key and fingerprint."""
        self._num_running: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Record]:
        """Running requests in admission order; a snapshot, so the registry may change during iteration."""
        return iter(list(self._running.values()))

    def running(self, ticket: Ticket) -> Record | None:
        """The running request with the ticket's tenant and id; its serial may be another one."""
        return self._running.get((ticket.tenant, ticket.request_id))

    def ended_here(self, serial: str) -> bool | None:
        """For an ended request: whether the gatekeeper ended it, so that its ingress may not know. None: it has not
        ended, or ended long ago."""
        return self._ends.get(serial)

    def paid_s(self, tenant: str, key: str | None, fingerprint: str) -> float:
        """Seconds already billed for earlier attempts of the same request."""
        return 0.0 if key is None else self._paid.get((tenant, key, fingerprint)) or 0.0

    def num_running(self, tenant: str) -> int:
        return self._num_running[tenant]

    def find(self, tenant: str, request_id: str) -> Record:
        """A tenant's request.

        Raises:
            NotFoundError: no such request.
        """
        record = self._running.get((tenant, request_id)) or self._ended.get((tenant, request_id))
        if record is None:
            raise NotFoundError("no running or recently finished request has this id")
        return record

    def holder(self, tenant: str, request_id: str, key: str | None, fingerprint: str) -> Record | None:
        """The running request that a retry of the same request supersedes; None: there is none.

        Raises:
            ConflictError: the id is in use, or the key was used, for a different request; or the original is just being
                admitted.
        """
        same_id = self._running.get((tenant, request_id))
        same_key = None if key is None else self._keys.get((tenant, key))
        if same_key is not None and same_key.ticket.fingerprint != fingerprint:
            raise ConflictError("the idempotency key was used for a different request; use a new key")
        if same_id is not None and (not fingerprint or same_id.ticket.fingerprint != fingerprint):
            raise ConflictError("the request id is in use by a different running request; choose another")
        found = same_id or (same_key if same_key is not None and same_key.reason is None else None)
        if found is not None and not found.admitted:
            raise ConflictError("the same request is currently being admitted; retry in a second")
        return found

    def add(self, record: Record) -> None:
        """Add a running request. Its id must not be running; an ended request with the same id is forgotten."""
        assert record.request_key not in self._running
        self._forget_ended(record.request_key)
        self._running[record.request_key] = record
        self._num_running[record.ticket.tenant] += 1
        if record.key is not None:
            holder = self._keys.get(record.key)
            if holder is None or holder.reason is not None:  # else a retry whose holder was superseded later
                self._keys[record.key] = record

    def withdraw(self, record: Record) -> None:
        """Remove a request that was not admitted after all; nothing is retained."""
        self._stop(record)
        self._drop_key(record)

    def end(self, record: Record, settlement: Settlement, now: float, *, here: bool) -> None:
        """Record the end of a request, whether or not it was added here; it is retained for a while.

        Args:
            here: ended by the gatekeeper, not by its ingress.
        """
        ticket, running = record.ticket, self.running(record.ticket)
        if running is record:
            self._stop(record)
        record.done_s = max(record.done_s, settlement.progress.done_s)
        record.reason, record.error_code, record.ended_at = settlement.reason, settlement.error_code, now
        self._ends.note(ticket.serial, here, now)
        if ticket.idempotency_key is not None:
            paid_s = ticket.paid_s + settlement.progress.billed_s
            same = (ticket.tenant, ticket.idempotency_key, ticket.fingerprint)
            self._paid.note(same, max(paid_s, self.paid_s(*same)), now)
        if running is None or running is record:
            self._forget_ended(record.request_key)
            self._ended[record.request_key] = record
            if record.key is not None:
                self._keys.setdefault(record.key, record)
        record.ended.set()
        self.forget(now)

    def forget(self, now: float) -> None:
        """Evict ended requests beyond the retention time or count."""
        self._ends.forget(now)
        self._paid.forget(now)
        while self._ended:
            oldest = next(iter(self._ended.values()))
            if len(self._ended) <= self._max_remembered and now - oldest.ended_at <= self._remember_s:
                return
            del self._ended[oldest.request_key]
            self._drop_key(oldest)

    def _stop(self, record: Record) -> None:
        del self._running[record.request_key]
        self._num_running[record.ticket.tenant] -= 1
        if not self._num_running[record.ticket.tenant]:
            del self._num_running[record.ticket.tenant]

    def _forget_ended(self, request_key: RequestKey) -> None:
        former = self._ended.pop(request_key, None)
        if former is not None:
            self._drop_key(former)

    def _drop_key(self, record: Record) -> None:
        if record.key is not None and self._keys.get(record.key) is record:
            del self._keys[record.key]
