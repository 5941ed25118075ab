"""A `MusicService` for the tests of the edges: tones instead of music, and faults where a test wants them."""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import torch
from musicgen_serving.admission import Tenant
from musicgen_serving.errors import ConflictError, NotFoundError, UnauthenticatedError
from musicgen_serving.service import Readiness
from musicgen_serving.settings import LimitSettings
from musicgen_serving.types import (
    GenerationEnd,
    GenerationEvent,
    GenerationRequest,
    GenerationStatus,
    ModelInfo,
    PieceAudio,
    PieceReport,
    Started,
)
from torch import Tensor

from musicgen.errors import InvalidRequestError
from musicgen.types import FinishReason

SAMPLE_RATE = 32000
API_KEY = "key-of-tests"
TENANT = Tenant("tests", "default", 1.0, 0, None, None)
MODEL = ModelInfo("demo", "MIT", SAMPLE_RATE, 1, True, 120.0, 30.0, "float32")


def tone(seed: int, num_samples: int, channels: int = 1) -> Tensor:
    """`[C, N]` float32, another one for each seed: what the fake service makes."""
    time_s = torch.arange(num_samples, dtype=torch.float64) / SAMPLE_RATE
    frequencies = torch.tensor([220.0 + seed % 997 + 50 * channel for channel in range(channels)])
    return (0.5 * torch.sin(2 * math.pi * frequencies[:, None] * time_s)).float()


@dataclass
class FakeService:
    """Keeps what it was asked; every list grows in the order of the events."""

    limits: LimitSettings = field(default_factory=LimitSettings)
    keys: tuple[str, ...] | None = None
    """None: open to everyone."""
    channels: int = 1
    chunk_s: float = 0.25
    chunk_delay_s: float = 0.0
    start_delay_s: float = 0.0
    """Before `Started`: the request waits."""
    audio_delay_s: float = 0.0
    """Between `Started` and the first audio."""
    refusal: BaseException | None = None
    """Raised instead of `Started`."""
    failure: BaseException | None = None
    """In the `GenerationEnd`, after `num_chunks_before_failure` chunks."""
    num_chunks_before_failure: int = 0
    ready: bool = True
    requests: list[GenerationRequest] = field(default_factory=list)
    entered: int = 0
    left: int = 0
    left_by: list[str] = field(default_factory=list)
    """`end`, or the name of the error that left the context."""
    num_given: int = 0
    """Chunks handed to the edge."""
    cancelled: list[str] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)
    """Codes, and the class of the tenant or nothing, of what the edges refused themselves."""

    def count_refusal(self, code: str, tenant: Tenant | None = None) -> None:
        self.refused.append((code, tenant.tenant_class if tenant else ""))

    async def authenticate(self, api_key: str | None) -> Tenant:
        if self.keys is not None and api_key not in self.keys:
            raise UnauthenticatedError("expected a known API key, got none or another")
        return TENANT

    @asynccontextmanager
    async def generate(
        self, tenant: Tenant, request: GenerationRequest
    ) -> AsyncIterator[AsyncIterator[GenerationEvent]]:
        assert tenant is TENANT
        self.requests.append(request)
        self.entered += 1
        reason = "end"
        try:
            yield self._events(request)
        except BaseException as error:
            reason = type(error).__name__
            raise
        finally:
            self.left += 1
            self.left_by.append(reason)

    async def _events(self, request: GenerationRequest) -> AsyncIterator[GenerationEvent]:
        await asyncio.sleep(self.start_delay_s)
        if self.refusal is not None:
            raise self.refusal
        if request.model != MODEL.name:
            raise NotFoundError(f"expected a served model, got {request.model!r}", param="model")
        num_samples = round(request.duration_s * SAMPLE_RATE)
        if request.first_sample >= num_samples:
            raise InvalidRequestError(f"a sample below {num_samples}", "another", param="first_sample")
        seeds = tuple(piece.seed for piece in request.pieces)
        yield Started(request.request_id, request.model, seeds, SAMPLE_RATE, self.channels, num_samples, 0.5)
        await asyncio.sleep(self.audio_delay_s)
        num_chunks = 0
        reports = []
        for index, seed in enumerate(seeds):
            whole = tone(seed, num_samples, self.channels)
            for start, end in self._cuts(request, num_samples):
                if self.failure is not None and num_chunks == self.num_chunks_before_failure:
                    yield GenerationEnd(request.request_id, FinishReason.FAILED, (), 0.0, self.failure)
                    return
                self.num_given += 1
                yield PieceAudio(index, whole[:, start:end], start)
                num_chunks += 1
                await asyncio.sleep(self.chunk_delay_s)
            reports.append(_report(index, whole[:, request.first_sample :]))
        yield GenerationEnd(request.request_id, FinishReason.FINISHED, tuple(reports), request.audio_s)

    def _cuts(self, request: GenerationRequest, num_samples: int) -> list[tuple[int, int]]:
        step = num_samples if request.chunks is None else round(self.chunk_s * SAMPLE_RATE)
        starts = range(request.first_sample, num_samples, step)
        return [(start, min(start + step, num_samples)) for start in starts]

    async def cancel(self, tenant: Tenant, request_id: str) -> GenerationStatus:
        status = await self.status(tenant, request_id)
        self.cancelled.append(request_id)
        return replace(status, state=FinishReason.CANCELLED.value, error="cancelled by its caller")

    async def status(self, tenant: Tenant, request_id: str) -> GenerationStatus:
        if request_id == "conflict":
            raise ConflictError("expected an id that is not in use")
        for request in self.requests:
            if request.request_id == request_id:
                return GenerationStatus(request_id, request.model, "running", request.audio_s, 0.5, 2.0)
        raise NotFoundError("expected the id of a request, got an unknown one")

    async def models(self, tenant: Tenant) -> list[ModelInfo]:
        return [MODEL]

    async def model(self, tenant: Tenant, name: str | None) -> ModelInfo:
        return replace(MODEL, name=name or MODEL.name)

    async def readiness(self) -> Readiness:
        return Readiness(self.ready, {"demo": "ready" if self.ready else "warms up"})


def _report(piece: int, given: Tensor) -> PieceReport:
    content = given.T.contiguous().numpy().astype("<f4").tobytes()
    num_frames = math.ceil(given.shape[-1] / 640)
    checksum = hashlib.sha256(content).hexdigest()
    return PieceReport(piece, given.shape[-1], checksum, num_frames, 0.1, 0.2, 0.3, 1)
