"""The interface between the ingresses and the gatekeeper: value types and the protocol, implemented by
`deployments/gatekeeper.py`.

The gatekeeper is a single process. It tracks every request from admission to its end, enforces quotas, keeps the ledger
and notifies the ingresses of cancelled requests. It is involved at the start and end of a request, never in its audio
path.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from musicgen.types import FinishReason
from musicgen_serving.types import GenerationStatus


@dataclass(frozen=True, slots=True)
class Tenant:
    """The caller. Set by `tenancy` from an API key."""

    name: str
    tenant_class: str
    weight: float
    priority: int
    max_duration_s: float | None
    models: frozenset[str] | None
    """None: all."""


@dataclass(frozen=True, slots=True)
class AdmissionRequest:
    """A request for admission. Set by the service."""

    request_id: str
    tenant: str
    model: str
    audio_s: float
    """Total over all pieces."""
    idempotency_key: str | None = None
    fingerprint: str = ""
    num_pieces: int = 1


@dataclass(frozen=True, slots=True)
class Ticket:
    """Proof of admission; the request must be settled once. Set by the gatekeeper."""

    request_id: str
    tenant: str
    tenant_class: str
    weight: float
    priority: int
    quoted_wait_s: float
    """Estimated seconds until decoding starts."""
    serial: str = ""
    """Unique id of this admission; request ids may be reused."""
    paid_s: float = 0.0
    """Seconds of its audio already billed to earlier attempts with the same idempotency key."""
    idempotency_key: str | None = None
    fingerprint: str = ""


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of an admitted request: everything a gatekeeper needs that did not admit it. Set by the service."""

    ticket: Ticket
    model: str
    audio_s: float
    """Requested, total over all pieces."""
    done_s: float
    """Delivered."""
    made_s: float
    """Generated, delivered or not: from the beginning of each piece to its current position."""
    num_pieces: int = 1

    @property
    def billed_s(self) -> float:
        """Seconds to charge to the quota at this point: generated and not billed before."""
        return max(0.0, min(self.made_s, self.audio_s) - self.ticket.paid_s)


@dataclass(frozen=True, slots=True)
class Stop:
    """Tells an ingress to stop a request. Set by the gatekeeper."""

    serial: str
    """Of its ticket."""
    superseded: bool = False
    """A retry takes over; otherwise it was cancelled."""


@dataclass(frozen=True, slots=True)
class Settlement:
    """How an admitted request ended. Set by the service; idempotent per ticket."""

    progress: Progress
    """Final progress; whatever was charged beyond its `billed_s` is refunded."""
    reason: FinishReason
    time_to_first_audio_s: float | None
    total_s: float
    num_failovers: int
    error_code: str | None = None

    @property
    def request_id(self) -> str:
        return self.progress.ticket.request_id


class Gatekeeper(Protocol):
    """Exceptions keep their type, whichever process the gatekeeper runs in."""

    async def authenticate(self, api_key: str | None) -> Tenant:
        """Raises: UnauthenticatedError."""

    async def takes_requests(self) -> bool:
        """False: the service is shutting down."""

    async def admit(self, request: AdmissionRequest) -> Ticket:
        """Admit one request.

        Raises:
            QuotaExceededError: a quota is exhausted; with `retry_after_s`. No quota is charged.
            OverloadedError: the wait would exceed `max_wait_s`, with `retry_after_s`; or the service is shutting down.
            ConflictError: the id is in use, or the idempotency key was used for a different request.
        """

    async def settle(self, settlement: Settlement) -> None:
        """Settle an ended request: quota, slot, ledger entry. It may have been admitted by an earlier gatekeeper."""

    async def report(self, edge: str, running: list[Progress]) -> list[Stop]:
        """Report the progress of an ingress's requests, about once a second; returns those to stop.

        Requests of an ingress that stops reporting are settled as cancelled. Unknown requests are adopted: the
        gatekeeper may have been replaced.
        """

    async def wait_cancelled(self, edge: str) -> list[Stop]:
        """Long-poll, for a few seconds at most, for requests that this ingress must stop."""

    async def cancel(self, tenant: str, request_id: str) -> GenerationStatus:
        """Cancel a request, wherever it runs. No effect if it has already ended.

        Raises: NotFoundError: no such request of this tenant.
        """

    async def status(self, tenant: str, request_id: str) -> GenerationStatus:
        """Raises: NotFoundError: no running or recently finished request of this tenant has this id."""
