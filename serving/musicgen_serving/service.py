"""What the edges see of the service: one protocol, so that HTTP and gRPC are thin and tested without Ray.

`generation.py` implements it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from musicgen_serving.admission import Tenant
from musicgen_serving.settings import LimitSettings
from musicgen_serving.types import GenerationEvent, GenerationRequest, GenerationStatus, ModelInfo


@dataclass(frozen=True, slots=True)
class Readiness:
    """Whether requests can be taken."""

    ready: bool
    details: dict[str, str]
    """`gatekeeper` and each model → `ready`, or what it waits for; `edge` if that is it. Never names machines."""


class MusicService(Protocol):
    """Errors are those of `errors.py`; `errors.report` says how each looks outside."""

    @property
    def limits(self) -> LimitSettings: ...

    async def authenticate(self, api_key: str | None) -> Tenant:
        """Raises: UnauthenticatedError."""

    def count_refusal(self, code: str, tenant: Tenant | None = None) -> None:
        """An edge has refused a request before `generate` could: with the error `code`, as in `errors.report`. What
        `authenticate` and `generate` refuse they count themselves."""

    def generate(
        self, tenant: Tenant, request: GenerationRequest
    ) -> AbstractAsyncContextManager[AsyncIterator[GenerationEvent]]:
        """Make music. Leaving the context cancels what is not finished.

        Entering admits nothing yet; the first `anext` does. The iterator gives `Started`, then `PieceAudio` of all
        pieces (each piece's in order), then one `GenerationEnd`, and stops. A request that is refused raises from the
        first `anext` instead; after `Started` nothing is raised, failures are in `GenerationEnd`.

        Raises:
            InvalidRequestError, ForbiddenError, NotFoundError, QuotaExceededError, OverloadedError, ConflictError, ...:
                from the first `anext`.
        """

    async def cancel(self, tenant: Tenant, request_id: str) -> GenerationStatus:
        """Raises: NotFoundError."""

    async def status(self, tenant: Tenant, request_id: str) -> GenerationStatus:
        """Raises: NotFoundError."""

    async def models(self, tenant: Tenant) -> list[ModelInfo]:
        """The models that the tenant may use and that can be reached, the default first."""

    async def model(self, tenant: Tenant, name: str | None) -> ModelInfo:
        """One model; None: the tenant's default. Asks no other model, which may be gone.

        Raises: NotFoundError, ForbiddenError, ReplicaLostError.
        """

    async def readiness(self) -> Readiness:
        """Whether requests are taken, and at least one model can make them: others may be gone meanwhile."""
