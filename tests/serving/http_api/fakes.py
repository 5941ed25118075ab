"""A music service without models: its audio follows from the seed alone, and it fails, waits and counts as told."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from musicgen_serving.admission import Tenant
from musicgen_serving.errors import NotFoundError, UnauthenticatedError
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

RATE = 32000
KEY = "key-of-ada"
MODELS = [
    ModelInfo("demo", "MIT", RATE, 1, True, 120.0, 30.0, "float32"),
    ModelInfo("stereo", "CC-BY-NC 4.0", RATE, 2, False, 120.0, 30.0, "int8"),
]


def samples_of(seed: int, num_samples: int, channels: int = 1) -> Tensor:
    """`[C, N]` float32, some of it beyond [−1, 1]."""
    generator = np.random.default_rng(seed)
    return torch.from_numpy(generator.uniform(-1.1, 1.1, (channels, num_samples)).astype(np.float32))


def checksum(samples: Tensor) -> str:
    return hashlib.sha256(samples.numpy().T.astype("<f4").tobytes()).hexdigest()


@dataclass
class FakeService:
    """What goes wrong is set by the test; what happened is counted."""

    limits: LimitSettings = field(default_factory=lambda: LimitSettings(max_file_bytes=200_000, reader_stall_s=0.4))
    refuse: BaseException | None = None
    """Raised instead of the first event."""
    fail_after: int | None = None
    """Chunks of the first piece after which the request ends with `error`."""
    error: BaseException | None = None
    reason: FinishReason = FinishReason.FAILED
    raise_in_stream: BaseException | None = None
    """Raised after the first chunk: a service that breaks its promise."""
    wait_at: str = ""
    """`admission`, `first_audio` or `second_chunk`: wait there, for ever unless `go_on` is set."""
    chunk: int = 5000
    endless: bool = False
    skip_chunk: bool = False
    offset_error: int = 0
    """Added to where the second chunk says it begins."""
    ready: bool = True
    is_open: bool = True
    requests: list[GenerationRequest] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)
    """Codes, and the class of the tenant or nothing, of what the edge refused itself."""
    num_left: int = 0
    """Contexts that were left."""
    num_cut_short: int = 0
    """Contexts that were left before the terminal event: what cancels."""
    num_chunks: int = 0
    cancelled: list[str] = field(default_factory=list)
    at_wait: asyncio.Event = field(default_factory=asyncio.Event)
    go_on: asyncio.Event = field(default_factory=asyncio.Event)
    """Ends the wait."""

    async def authenticate(self, api_key: str | None) -> Tenant:
        if not self.is_open and api_key != KEY:
            raise UnauthenticatedError("expected a known API key")
        return Tenant("ada", "default", 1.0, 0, None, None)

    async def models(self, tenant: Tenant) -> list[ModelInfo]:
        return MODELS

    async def model(self, tenant: Tenant, name: str | None) -> ModelInfo:
        for model in MODELS:
            if name in (None, model.name):
                return model
        raise NotFoundError("model: expected a served one", param="model")

    def count_refusal(self, code: str, tenant: Tenant | None = None) -> None:
        self.refused.append((code, tenant.tenant_class if tenant else ""))

    async def readiness(self) -> Readiness:
        return Readiness(self.ready, {"demo/language_model": "ready" if self.ready else "warming"})

    async def status(self, tenant: Tenant, request_id: str) -> GenerationStatus:
        if request_id not in [request.request_id for request in self.requests]:
            raise NotFoundError("expected the id of a generation of yours")
        state = "cancelled" if request_id in self.cancelled else "running"
        return GenerationStatus(request_id, "demo", state, 10.0, 2.5, 3.0)

    async def cancel(self, tenant: Tenant, request_id: str) -> GenerationStatus:
        await self.status(tenant, request_id)
        self.cancelled.append(request_id)
        return await self.status(tenant, request_id)

    @asynccontextmanager
    async def generate(
        self, tenant: Tenant, request: GenerationRequest
    ) -> AsyncGenerator[AsyncIterator[GenerationEvent], None]:
        self.requests.append(request)
        ended: list[bool] = []
        try:
            yield self._events(request, ended)
        finally:
            self.num_left += 1
            self.num_cut_short += not ended

    async def _pause(self, place: str) -> None:
        if self.wait_at == place:
            self.at_wait.set()
            await self.go_on.wait()

    async def _events(self, request: GenerationRequest, ended: list[bool]) -> AsyncGenerator[GenerationEvent, None]:
        await self._pause("admission")
        if self.refuse is not None:
            raise self.refuse
        model = next((info for info in MODELS if info.name == request.model), None)
        if model is None:
            raise NotFoundError("expected a served model")
        total = round(request.duration_s * RATE)
        if request.first_sample >= total:
            raise InvalidRequestError(f"a sample below {total}", "another", param="first_sample")
        seeds = tuple(piece.seed for piece in request.pieces)
        yield Started(request.request_id, model.name, seeds, RATE, model.channels, total, 0.25)
        await self._pause("first_audio")
        whole = [samples_of(seed, total, model.channels) for seed in seeds]
        step = self.chunk if request.chunks is not None else max(1, total)
        for number, start in enumerate(range(request.first_sample, total, step)):
            if self.fail_after == number:
                ended.append(True)
                yield GenerationEnd(request.request_id, self.reason, (), 0.0, self.error)
                return
            if number == 1:
                await self._pause("second_chunk")
                if self.raise_in_stream is not None:
                    raise self.raise_in_stream
                if self.skip_chunk:
                    continue
            for piece, samples in enumerate(whole):
                self.num_chunks += 1
                offset = start + (self.offset_error if number == 1 else 0)
                yield PieceAudio(piece, samples[:, start : min(total, start + step)], offset)
        reports = tuple(
            PieceReport(index, part.shape[-1], checksum(part), 50, 0.1, 0.2, 0.3, 0)
            for index, part in reversed(list(enumerate(samples[:, request.first_sample :] for samples in whole)))
        )
        ended.append(True)
        yield GenerationEnd(request.request_id, FinishReason.FINISHED, reports, request.audio_s)
