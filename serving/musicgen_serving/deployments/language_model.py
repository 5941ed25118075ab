"""The language model: the asyncio engine behind a streaming method.

Independent of text, audio and clients. A stream starts with `Accepted` and ends with `EndOfRequest`; while idle it
yields `Alive` heartbeats, so that the consumer can tell a long queue from a dead replica.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

import torch

from musicgen.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from musicgen.engine.async_engine import AsyncEngine
from musicgen.engine.core import EngineCore
from musicgen.types import (
    CodesRequest,
    Conditioning,
    EndOfRequest,
    EngineEvent,
    EngineRequest,
    SamplingParams,
    Window,
)
from musicgen.weights import open_checkpoint
from musicgen_serving import delay_points
from musicgen_serving.deployments.counting_runner import CountingRunner
from musicgen_serving.settings import ModelSettings

ALIVE_S = 1.0
"""Heartbeat interval of a stream."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """The engine has accepted the request."""

    quoted_start_s: float


@dataclass(frozen=True, slots=True)
class Alive:
    """Heartbeat: no event, but the replica is alive."""


LanguageModelEvent = Accepted | Alive | EngineEvent


@dataclass(frozen=True, slots=True)
class ModelCard:
    """Properties of a model that callers need. Set by its replica."""

    config: ModelConfig
    weights: str


@dataclass(frozen=True, slots=True)
class Load:
    """Load of a replica."""

    num_running: int
    num_waiting: int
    queued_frames: float
    """Frames yet to be decoded by waiting and running requests; guidance rows count separately."""
    pages_held: int
    pages_total: int
    step_s: float
    num_steps: int
    """Since the replica started."""
    num_accepted: int
    num_finished: int
    num_cancelled: int
    num_failed: int


class LanguageModel:
    """One engine. Loads the model on construction.

    Raises:
        InvalidRequestError, WeightsError: the configured model cannot be loaded.
    """

    def __init__(self, settings: ModelSettings) -> None:
        checkpoint = open_checkpoint(settings.checkpoint, settings.device)
        lm, packed = checkpoint.language_model()
        config = engine_config(settings)
        self._runner = CountingRunner(lm, config, weights=packed, release=True)
        self._engine = AsyncEngine(EngineCore(lm, config, runner=self._runner))
        self.card = ModelCard(checkpoint.config, config.resolved(lm.device.type).weights or "float32")

    async def describe(self) -> ModelCard:
        return self.card

    async def warm_up(self) -> None:
        """Run a short request through the engine, so that the first caller does not pay for lazy initialization."""
        config = self.card.config
        text = torch.ones(1, config.text_dim)  # zeros stand for no text
        known = torch.zeros(config.decoder.num_codebooks, 4, dtype=torch.int32)  # so that a text model prefills too
        codes = CodesRequest(((Window(0, 8), Conditioning(text, None)),), SamplingParams(seed=0), known)
        async for _ in self.generate(EngineRequest("warm-up", codes)):
            pass

    async def generate(self, request: EngineRequest) -> AsyncGenerator[LanguageModelEvent, None]:
        """The events of one request; closing the iterator early cancels it.

        Raises:
            InvalidRequestError, OverloadedError, EngineDeadError: before the first event; nothing was submitted.
        """
        await delay_points.pause(delay_points.LM_ACCEPT)
        async with await self._engine.submit(request) as stream:
            yield Accepted(stream.quoted_start_s)
            event: EngineEvent | None = None
            while not isinstance(event, EndOfRequest):
                event = await stream.next_event(ALIVE_S)
                yield Alive() if event is None else event

    async def renew(self, request_ids: Sequence[str]) -> None:
        """Renew the leases of those of the requests that run here."""
        for request_id in request_ids:
            self._engine.renew(request_id)

    async def abort(self, request_ids: Sequence[str]) -> None:
        """Cancel those of the requests that run here."""
        for request_id in request_ids:
            self._engine.abort(request_id)

    async def load(self) -> Load:
        """Load of this replica."""
        stats = await self._engine.stats()
        return Load(
            stats.num_running,
            stats.num_waiting,
            stats.waiting_frames + stats.running_frames,
            stats.pages_held,
            stats.pages_total,
            stats.step_s,
            self._runner.num_steps,
            stats.num_accepted,
            stats.num_finished,
            stats.num_cancelled,
            stats.num_failed,
        )

    def check_health(self) -> None:
        """Raises: EngineDeadError: the engine thread has failed; the replica must be replaced."""
        self._engine.check_health()

    async def close(self) -> None:
        await self._engine.close()


def engine_config(settings: ModelSettings) -> EngineConfig:
    """The engine configuration for a model's settings."""
    return EngineConfig(
        cache=CacheConfig(settings.kv_dtype, settings.kv_memory_bytes, settings.kv_memory_share),
        scheduler=SchedulerConfig(
            max_requests=settings.max_requests,
            max_rows=3 * settings.max_requests,
            max_step_rows=settings.max_step_rows,
            prefill_tokens=settings.prefill_tokens,
            max_waiting=settings.max_waiting,
        ),
        weights=settings.weights,
        num_threads=settings.num_threads,
    )
