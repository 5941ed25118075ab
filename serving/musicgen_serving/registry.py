"""Every request the gatekeeper knows: those that run, and for a while those that ended.

Owns ids, idempotency keys and what is remembered. Knows no allowance, no queue and no edge's wishes.
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


@dataclass(slots=True, eq=False)
class Record:
    """One request. Mutated by the gatekeeper only."""

    ticket: Ticket
    model: str
    audio_s: float
    admitted_at: float
    seen_at: float
    """When it was admitted or an edge last reported it."""
    charge: Charge = ()
    admitted: bool = False
    """False while its allowances are being taken."""
    done_s: float = 0.0
    made_s: float = 0.0
    edge: str | None = None
    """Who runs it; None until somebody reports it."""
    suspect_since: float | None = None
    """When its edge was first found silent."""
    cancelled: bool = False
    """Somebody wants its end."""
    told: set[str] = field(default_factory=set)
    """Edges that were told so by a long poll."""
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    reason: FinishReason | None = None
    error_code: str | None = None
    ended_at: float = 0.0

    @property
    def request_id(self) -> str:
        return self.ticket.request_id

    @property
    def key(self) -> tuple[str, str] | None:
        """Idempotency keys are each tenant's own."""
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
    """Values that were noted lately; the oldest is forgotten first."""

    def __init__(self, remember_s: float, max_remembered: int) -> None:
        self._remember_s, self._max_remembered = remember_s, max_remembered
        self._noted: dict[object, tuple[float, V]] = {}
        """In the order of their times."""

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
        self._ends = _Lately[bool](remember_s, max_remembered)
        """Of the serials of those that ended, whether the gatekeeper ended them."""
        self._paid = _Lately[float](remember_s, max_remembered)
        """Seconds billed so far, by tenant, idempotency key and fingerprint."""
        self._num_running: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Record]:
        """Those that run, in the order of admission; may be changed meanwhile."""
        return iter(list(self._running.values()))

    def running(self, request_id: str) -> Record | None:
        return self._running.get(request_id)

    def ended_here(self, serial: str) -> bool | None:
        """Of an admission that has ended: whether the gatekeeper ended it, so that its edge may not know. None: it has
        not ended, or long ago."""
        return self._ends.get(serial)

    def paid_s(self, tenant: str, key: str | None, fingerprint: str) -> float:
        """Seconds that were billed for the same request when it was asked for before."""
        return 0.0 if key is None else self._paid.get((tenant, key, fingerprint)) or 0.0

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
        if same_key is not None and same_key.ticket.fingerprint != fingerprint:
            raise ConflictError(
                "expected the same request as before with this idempotency key, got a different one; use a new key"
            )
        if same_id is None or same_id.reason is not None:
            same_id = None
        elif not fingerprint or same_id.ticket.fingerprint != fingerprint:
            raise ConflictError("expected a new request id, got one that runs for a different request; choose another")
        found = same_id or (same_key if same_key is not None and same_key.reason is None else None)
        if found is not None and not found.admitted:
            raise ConflictError("the same request is being admitted at this moment; retry in a second")
        return found

    def add(self, record: Record) -> None:
        """A request begins. Its id must not be running; an earlier one of the same id is forgotten."""
        assert record.request_id not in self._running
        self._forget_ended(record.request_id)
        self._running[record.request_id] = record
        self._num_running[record.ticket.tenant] += 1
        if record.key is not None:
            holder = self._keys.get(record.key)
            if holder is None or holder.reason is not None:  # else it is a repeat, and this one was taken over later
                self._keys[record.key] = record

    def withdraw(self, record: Record) -> None:
        """A request was not admitted after all: nothing is remembered."""
        self._stop(record)
        self._drop_key(record)

    def end(self, record: Record, settlement: Settlement, now: float, *, here: bool) -> None:
        """A request has ended, one of these or one that was never added; it is remembered for a while.

        Args:
            here: the gatekeeper ended it, its edge did not.
        """
        ticket, running = record.ticket, self._running.get(record.request_id)
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
            self._forget_ended(record.request_id)
            self._ended[record.request_id] = record
            if record.key is not None:
                self._keys.setdefault(record.key, record)
        record.ended.set()
        self.forget(now)

    def forget(self, now: float) -> None:
        """Forget those that ended long ago, and those too many."""
        self._ends.forget(now)
        self._paid.forget(now)
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

    def _forget_ended(self, request_id: str) -> None:
        former = self._ended.pop(request_id, None)
        if former is not None:
            self._drop_key(former)

    def _drop_key(self, record: Record) -> None:
        if record.key is not None and self._keys.get(record.key) is record:
            del self._keys[record.key]
