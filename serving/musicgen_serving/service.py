"""The service interface used by both ingresses, which keeps HTTP and gRPC thin and testable without Ray.

Implemented by `generation.py`.
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
    """Whether requests can be served."""

    ready: bool
    details: dict[str, str]
    """`gatekeeper` and each model → `ready`, or what it is waiting for; `edge` if this ingress is the reason. Never
    names machines."""


class MusicService(Protocol):
    """Raises the exceptions of `errors.py`; `errors.report` maps them to their public form."""

    @property
    def limits(self) -> LimitSettings: ...

    async def authenticate(self, api_key: str | None) -> Tenant:
        """Raises: UnauthenticatedError."""

    def count_refusal(self, code: str, tenant: Tenant | None = None) -> None:
        """Count a request that an ingress has rejected before `generate`, with the error `code` of `errors.report`.
        Rejections by `authenticate` and `generate` are counted there."""

    def generate(
        self, tenant: Tenant, request: GenerationRequest
    ) -> AbstractAsyncContextManager[AsyncIterator[GenerationEvent]]:
        """Generate music. Exiting the context cancels whatever is unfinished.

        Admission happens at the first `anext`, not on entering the context. The iterator yields `Started`, then
        `PieceAudio` of all pieces (in order within a piece), then one `GenerationEnd`. A rejected request raises from
        the first `anext`; after `Started` nothing is raised, failures are reported in `GenerationEnd`.

        Raises:
            InvalidRequestError, NotFoundError, QuotaExceededError, OverloadedError, ConflictError, ...:
                from the first `anext`.
        """

    async def cancel(self, tenant: Tenant, request_id: str) -> GenerationStatus:
        """Raises: NotFoundError."""

    async def status(self, tenant: Tenant, request_id: str) -> GenerationStatus:
        """Raises: NotFoundError."""

    async def models(self, tenant: Tenant) -> list[ModelInfo]:
        """The models available to the tenant whose replicas respond, the default first."""

    async def model(self, tenant: Tenant, name: str | None) -> ModelInfo:
        """One model; None: the tenant's default. Does not depend on other models being available.

        Raises: NotFoundError, ReplicaLostError.
        """

    async def readiness(self) -> Readiness:
        """Ready if requests are admitted and at least one model is available."""
