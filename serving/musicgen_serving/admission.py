"""What the edges ask of the gatekeeper, and its answers. Values and the protocol; `deployments/gatekeeper.py` does it.

The gatekeeper is one process: it knows every request of the service from admission to its end, counts allowances, keeps
the ledger, and tells the edges which requests somebody else has cancelled. It is on the way in and out of a request,
never on the way of its audio.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from musicgen.types import FinishReason
from musicgen_serving.types import GenerationStatus


@dataclass(frozen=True, slots=True)
class Tenant:
    """Who calls. Set by `tenancy` from an API key."""

    name: str
    tenant_class: str
    weight: float
    priority: int
    max_duration_s: float | None
    models: frozenset[str] | None
    """None: all."""


@dataclass(frozen=True, slots=True)
class AdmissionRequest:
    """Set by the service."""

    request_id: str
    tenant: str
    model: str
    audio_s: float
    """Of all pieces together."""
    idempotency_key: str | None = None
    fingerprint: str = ""
    num_pieces: int = 1


@dataclass(frozen=True, slots=True)
class Ticket:
    """A request is admitted; it must be settled once. Set by the gatekeeper."""

    request_id: str
    tenant: str
    tenant_class: str
    weight: float
    priority: int
    quoted_wait_s: float
    """Seconds until decoding starts, as the backlog says."""
    serial: str = ""
    """Of this admission: request ids come again, serials do not."""
    paid_s: float = 0.0
    """Seconds of its audio that were billed when it was asked for before, with the same idempotency key."""
    idempotency_key: str | None = None
    fingerprint: str = ""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far an admitted request is: all that a gatekeeper must know which did not admit it. Set by the service."""

    ticket: Ticket
    model: str
    audio_s: float
    """Asked for, all pieces together."""
    done_s: float
    """Given out."""
    made_s: float
    """Made, whether it was given out or not: of each piece from its beginning to where it stands."""
    num_pieces: int = 1

    @property
    def billed_s(self) -> float:
        """Seconds that count against the allowance, if it stays at this: what was made and is not billed yet."""
        return max(0.0, min(self.made_s, self.audio_s) - self.ticket.paid_s)


@dataclass(frozen=True, slots=True)
class Settlement:
    """How an admitted request ended. Set by the service; a second one for the same ticket changes nothing."""

    progress: Progress
    """Where it ended; what was taken from the allowance beyond its `billed_s` is given back."""
    reason: FinishReason
    time_to_first_audio_s: float | None
    total_s: float
    num_failovers: int
    error_code: str | None = None

    @property
    def request_id(self) -> str:
        return self.progress.ticket.request_id


class Gatekeeper(Protocol):
    """Errors are raised as themselves, whatever process the gatekeeper runs in."""

    async def authenticate(self, api_key: str | None) -> Tenant:
        """Raises: UnauthenticatedError."""

    async def takes_requests(self) -> bool:
        """False: the service is about to stop."""

    async def admit(self, request: AdmissionRequest) -> Ticket:
        """Take one request in.

        Raises:
            QuotaExceededError: an allowance is used up; with `retry_after_s`. Nothing is taken from any allowance.
            OverloadedError: it would wait longer than `max_wait_s`; with `retry_after_s`. Or the service stops soon.
            ConflictError: its id is in use, or its idempotency key was used for another request.
        """

    async def settle(self, settlement: Settlement) -> None:
        """A request has ended: its allowance, slot, ledger line; also one that an earlier gatekeeper admitted."""

    async def report(self, edge: str, running: list[Progress]) -> list[str]:
        """What an edge's requests are doing, about once a second; returns ids of those that somebody has cancelled.

        Requests of an edge that reports no more are settled as cancelled; those the gatekeeper does not know (it was
        replaced) are taken over.
        """

    async def wait_cancelled(self, edge: str) -> list[str]:
        """Wait (up to some seconds) until requests of this edge are cancelled; returns their ids."""

    async def cancel(self, tenant: str, request_id: str) -> GenerationStatus:
        """Cancel a request, wherever it runs; one that has ended stays as it is.

        Raises: NotFoundError: no such request of this tenant.
        """

    async def status(self, tenant: str, request_id: str) -> GenerationStatus:
        """Raises: NotFoundError: no such request of this tenant, or it ended long ago."""
