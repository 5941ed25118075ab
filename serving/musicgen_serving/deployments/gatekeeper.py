"""The gatekeeper: admission, quotas, request registry, ledger. Implements `admission.Gatekeeper`.

One process, one event loop. Owns the accounting of a request from admission to settlement; independent of audio,
transports and Ray. State that must stay consistent (registry, backlog, ledger) changes atomically, without an await in
between; only quotas may be counted elsewhere.

**Retries take over.** Clients retry because their connection broke, so a retry of a running request (same tenant and
fingerprint, and the same idempotency key or request id) is not an error: the older request is cancelled and the newer
one admitted. It waits until the older one is settled, so that no id runs twice and the older one's quota has been
refunded; if the older one's ingress has not reported for `takeover_s`, or does not settle within that time, the
gatekeeper settles it itself. The newest retry wins. The same key or running id with a different fingerprint is a
conflict.

**Billing** covers what was generated, delivered or not, from the beginning of each piece to its position at the end. A
retry with the same idempotency key and fingerprint, within the retention time, is billed only for what exceeds the
amount billed before, so neither resuming after a lost connection nor repeating a finished request is charged twice. It
still counts as a request.

**Lost ingress.** Its requests stop being reported. After `edge_silence_s`, confirmed again `GRACE_S` later, they are
settled as cancelled with what they had generated. The confirmation is needed because a gatekeeper that was itself
stalled has a backlog of reports to process first. Tickets that never reached their ingress end in the same way.

**Gatekeeper restart.** The new gatekeeper learns of running requests from the ingresses' reports, and of those that
have ended in the meantime from their settlements; each gets its ledger entry. It does not know what they were charged,
nor what was billed for earlier requests, so nothing is refunded for them. Each admission has a unique serial, so that a
late report or settlement is never attributed to another request with the same id.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
import uuid
from collections import Counter
from collections.abc import Callable

from musicgen.errors import MusicGenError, OverloadedError, QuotaExceededError
from musicgen.types import FinishReason
from musicgen_serving.admission import AdmissionRequest, Progress, Settlement, Stop, Tenant, Ticket
from musicgen_serving.backlog import MAX_RETRY_S, MIN_RETRY_S, Backlog
from musicgen_serving.errors import NotFoundError, UnauthenticatedError, report
from musicgen_serving.ledger import Counts, Ledger, UsageLine
from musicgen_serving.quotas import Quotas
from musicgen_serving.registry import Record, Registry
from musicgen_serving.settings import ServeSettings, TenantSettings
from musicgen_serving.tenancy import LiveTenancy, hash_key
from musicgen_serving.types import GenerationStatus

log = logging.getLogger(__name__)

SWEEP_S = 1.0
"""Minimum interval between checks for lost ingresses; checks run as part of other calls."""
GRACE_S = 2.0
EDGE_LOST, SUPERSEDED = "edge_lost", "superseded"
"""Ledger error codes of requests that the gatekeeper settled itself."""


class LocalGatekeeper:
    """The gatekeeper, in this process.

    Args:
        takeover_s: maximum wait of a retry for the end of the request that it supersedes.
        cancel_wait_s: maximum wait of `cancel` for the request to end.
        poll_s: maximum wait of `wait_cancelled`.
        remember_s, max_remembered: retention time and count of ended requests.
        clock: seconds, monotonic.
        wall_clock: seconds since the epoch, for quotas and the usage file.

    Raises:
        InvalidRequestError: invalid tenants, quota storage or usage file.
    """

    def __init__(
        self,
        settings: ServeSettings,
        *,
        takeover_s: float = 1.5,
        cancel_wait_s: float = 1.0,
        poll_s: float = 5.0,
        remember_s: float = 600.0,
        max_remembered: int = 10_000,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._edge_silence_s, self._takeover_s = settings.failover.edge_silence_s, takeover_s
        self._cancel_wait_s, self._poll_s = cancel_wait_s, poll_s
        self._clock, self._wall_clock = clock, wall_clock
        self.tenants = LiveTenancy(settings.access)
        """The owner must poll its `look` for the tenants file to be reloaded."""
        self._quotas = Quotas(settings.access.limits_storage, wall_clock)
        self._ledger = Ledger(settings.access.usage_file)
        self._registry = Registry(remember_s, max_remembered)
        self._backlogs = {
            model.name: Backlog(
                num_replicas=model.language_model.min_replicas,
                num_slots=model.max_requests,
                initial_speed=settings.admission.initial_speed,
                max_wait_s=settings.admission.max_wait_s,
                clock=clock,
            )
            for model in settings.models
        }
        self._news = asyncio.Event()
        """Set, and replaced, when a request is to be cancelled."""
        self._swept_at = clock()
        self._draining = False

    async def authenticate(self, api_key: str | None) -> Tenant:
        """See `admission.Gatekeeper`."""
        return await self.find_tenant(hash_key(api_key) if api_key else None)

    async def find_tenant(self, key_sha256: str | None) -> Tenant:
        """The tenant of a hashed key; plain keys never leave the ingress. Raises: UnauthenticatedError."""
        try:
            return self.tenants.now.find(key_sha256)
        except UnauthenticatedError as error:
            self._ledger.reject("", "", report(error).code)
            raise

    async def takes_requests(self) -> bool:
        """See `admission.Gatekeeper`."""
        return not self._draining

    async def drain(self) -> int:
        """Stop admission. Returns the number of requests still running."""
        self._draining = True
        return (await self.counts()).running

    async def admit(self, request: AdmissionRequest) -> Ticket:
        """See `admission.Gatekeeper`. A retry of a running request supersedes it."""
        tenant = self.tenants.now.settings_of(request.tenant)
        model = request.model if request.model in self._backlogs else ""
        try:
            if self._draining:
                raise OverloadedError("the service is shutting down; retry later")
            if not model:
                raise NotFoundError("unknown model; list the models to see what is available")
            return await self._admit(request, tenant)
        except MusicGenError as error:
            self._ledger.reject(tenant.tenant_class, model, report(error).code)
            raise

    async def _admit(self, request: AdmissionRequest, tenant: TenantSettings) -> Ticket:
        called_at = self._clock()
        await self._sweep()
        key, fingerprint = request.idempotency_key, request.fingerprint
        while (holder := self._registry.holder(tenant.name, request.request_id, key, fingerprint)) is not None:
            await self._take_over(holder)
        self._check_concurrent(tenant)
        backlog = self._backlogs[request.model]
        wait_s = backlog.check(tenant.name, tenant.weight, tenant.priority)
        ticket = Ticket(
            request.request_id,
            tenant.name,
            tenant.tenant_class,
            tenant.weight,
            tenant.priority,
            quoted_wait_s=wait_s,
            serial=uuid.uuid4().hex,
            paid_s=min(request.audio_s, self._registry.paid_s(tenant.name, key, fingerprint)),
            idempotency_key=key,
            fingerprint=fingerprint,
        )
        record = Record(ticket, request.model, request.audio_s, called_at, self._clock())
        # Registered before its quota is charged: concurrent admissions must see it.
        self._registry.add(record)
        backlog.add(ticket.serial, tenant.name, tenant.weight, tenant.priority, request.audio_s, request.num_pieces)
        try:
            record.charge = await self._quotas.take(tenant, request.audio_s - ticket.paid_s)
        except BaseException:
            self._registry.withdraw(record)
            backlog.withdraw(ticket.serial)
            raise
        record.admitted, record.seen_at = True, self._clock()
        self._ledger.admit(tenant.tenant_class, request.model)
        return ticket

    def _check_concurrent(self, tenant: TenantSettings) -> None:
        """Raises: QuotaExceededError: concurrency limit reached; retry when the first request is expected to end."""
        limit = tenant.max_concurrent
        if limit is None or self._registry.num_running(tenant.name) < limit:
            return
        ends = (
            self._backlogs[record.model].end_s(record.ticket.serial)
            for record in self._registry
            if record.ticket.tenant == tenant.name
        )
        retry_after_s = min(MAX_RETRY_S, max(MIN_RETRY_S, min(ends)))
        raise QuotaExceededError(
            f"limit of {limit} concurrent requests reached; retry in {math.ceil(retry_after_s)} s",
            retry_after_s=retry_after_s,
        )

    async def _take_over(self, record: Record) -> None:
        """End a running request, so that its retry can start."""
        if not record.cancelled:
            record.error_code = SUPERSEDED
        self._want_end(record)
        if self._clock() - record.seen_at <= self._takeover_s:
            await _wait(record.ended, self._takeover_s)
        if record.reason is None:
            await self._end_here(record, SUPERSEDED)

    async def settle(self, settlement: Settlement) -> None:
        """See `admission.Gatekeeper`."""
        progress = settlement.progress
        ticket, record = progress.ticket, self._registry.running(progress.ticket)
        if self._registry.ended_here(ticket.serial) is not None:
            return
        if record is not None and record.ticket.serial == ticket.serial:
            await self._end(record, settlement)
            return
        log.warning("request %s: settled, but admitted by an earlier gatekeeper", ticket.request_id)
        began_at = self._clock() - settlement.total_s
        record = Record(ticket, progress.model, progress.audio_s, began_at, began_at, admitted=True)
        self._ledger.admit(ticket.tenant_class, progress.model)
        self._note_end(record, settlement, here=False)

    async def report(self, edge: str, running: list[Progress]) -> list[Stop]:
        """See `admission.Gatekeeper`."""
        now = self._clock()
        unwanted = [self._stop(progress.ticket) for progress in running if not self._note(edge, progress, now)]
        await self._sweep()
        return unwanted

    def _note(self, edge: str, progress: Progress, now: float) -> bool:
        """Record the progress of one request; returns whether it should continue."""
        ticket = progress.ticket
        record, ended_here = self._registry.running(ticket), self._registry.ended_here(ticket.serial)
        if ended_here is False:
            return True  # a stale report
        if ended_here or (record is not None and record.ticket.serial != ticket.serial):
            return False
        if record is None:
            record = self._adopt(edge, progress, now)
            if record is None:
                return True
        record.edge, record.seen_at, record.suspect_since = edge, now, None
        record.done_s = max(record.done_s, progress.done_s)
        record.made_s = max(record.made_s, progress.made_s)
        self._backlogs[record.model].progress(ticket.serial, record.done_s)
        return not record.cancelled

    def _stop(self, ticket: Ticket) -> Stop:
        try:
            record = self._registry.find(ticket.tenant, ticket.request_id)
        except NotFoundError:
            return Stop(ticket.serial)
        is_retry = record.ticket.serial != ticket.serial
        return Stop(ticket.serial, superseded=is_retry or record.error_code == SUPERSEDED)

    def _adopt(self, edge: str, progress: Progress, now: float) -> Record | None:
        """Adopt a request that an earlier gatekeeper admitted; None: its model is no longer served."""
        ticket, backlog = progress.ticket, self._backlogs.get(progress.model)
        if backlog is None:
            log.warning("request %s: its model is no longer served", ticket.request_id)
            return None
        record = Record(ticket, progress.model, progress.audio_s, now, now, admitted=True, edge=edge)
        self._registry.add(record)
        backlog.add(ticket.serial, ticket.tenant, ticket.weight, ticket.priority, progress.audio_s, progress.num_pieces)
        backlog.progress(ticket.serial, progress.done_s, counts=False)
        self._ledger.admit(ticket.tenant_class, progress.model)
        return record

    async def wait_cancelled(self, edge: str) -> list[Stop]:
        """See `admission.Gatekeeper`. A request not reported by any ingress yet is sent to all; others ignore it."""
        until = self._clock() + self._poll_s
        while True:
            found = [r for r in self._registry if r.cancelled and r.edge in (None, edge) and edge not in r.told]
            left_s = until - self._clock()
            if found or left_s <= 0:
                for record in found:
                    record.told.add(edge)
                return [self._stop(record.ticket) for record in found]
            if not await _wait(self._news, left_s):
                return []

    async def cancel(self, tenant: str, request_id: str) -> GenerationStatus:
        """See `admission.Gatekeeper`. Waits briefly for the end, so that the status is usually `cancelled`."""
        record = self._registry.find(tenant, request_id)
        if record.reason is None:
            self._want_end(record)
            await _wait(record.ended, self._cancel_wait_s)
        return record.status(self._clock())

    async def status(self, tenant: str, request_id: str) -> GenerationStatus:
        """See `admission.Gatekeeper`."""
        await self._sweep()
        return self._registry.find(tenant, request_id).status(self._clock())

    async def set_capacity(self, model: str, num_replicas: int) -> None:
        """Update the number of a model's language-model replicas that accept requests."""
        self._backlogs[model].set_capacity(num_replicas)

    async def counts(self) -> Counts:
        """Counters, and the load of each model."""
        await self._sweep()
        return self._ledger.counts({name: backlog.load() for name, backlog in self._backlogs.items()})

    def close(self) -> None:
        """Close the usage file; nothing may be settled afterwards."""
        self._ledger.close()

    async def check(self) -> None:
        """Raises: RuntimeError: admitted = finished + cancelled + failed + running does not hold."""
        running = [record for record in self._registry if record.admitted]
        self._ledger.check(Counter((record.ticket.tenant_class, record.model) for record in running))

    def _want_end(self, record: Record) -> None:
        """Notify the ingresses that a request is to be cancelled."""
        if not record.cancelled:
            record.cancelled = True
            self._news.set()
            self._news = asyncio.Event()

    async def _sweep(self) -> None:
        """Settle requests that are no longer reported by any ingress. Cheap: runs at most once per `SWEEP_S`."""
        now = self._clock()
        if now - self._swept_at < SWEEP_S:
            return
        self._swept_at = now
        self._registry.forget(now)
        for record in self._registry:
            if not record.admitted or now - record.seen_at <= self._edge_silence_s:
                continue
            if record.suspect_since is None:
                record.suspect_since = now
            elif now - record.suspect_since >= GRACE_S and record.reason is None:
                log.warning("request %s: its ingress is lost; settled as cancelled", record.request_id)
                await self._end_here(record, EDGE_LOST)

    async def _end_here(self, record: Record, error_code: str) -> None:
        """End a request on behalf of its ingress; billed for the last known progress."""
        total_s = self._clock() - record.admitted_at
        progress = Progress(record.ticket, record.model, record.audio_s, record.done_s, record.made_s)
        settlement = Settlement(progress, FinishReason.CANCELLED, None, total_s, 0, error_code)
        await self._end(record, settlement, here=True)

    async def _end(self, record: Record, settlement: Settlement, *, here: bool = False) -> None:
        """End a request that was admitted or adopted here, exactly once."""
        self._note_end(record, settlement, here=here)
        self._backlogs[record.model].remove(record.ticket.serial, record.done_s)
        taken_s = math.ceil(record.audio_s - record.ticket.paid_s)
        await self._quotas.give_back(record.charge, taken_s - math.ceil(settlement.progress.billed_s))

    def _note_end(self, record: Record, settlement: Settlement, *, here: bool) -> None:
        self._registry.end(record, settlement, self._clock(), here=here)
        self._ledger.end(UsageLine.of(settlement), self._wall_clock())


async def _wait(event: asyncio.Event, seconds: float) -> bool:
    """Wait for an event with a timeout; returns whether it was set."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return False
    return True
