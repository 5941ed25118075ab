"""The language model of one replica: the asyncio engine behind a streaming method.

Knows nothing of text, audio or clients. A stream begins with `Accepted` and ends with `EndOfRequest`; when nothing
happens for a while it gives an `Alive`, so that whoever listens can tell a long queue from a dead replica.
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
"""A stream is never silent for longer."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """The engine has taken the request."""

    quoted_start_s: float


@dataclass(frozen=True, slots=True)
class Alive:
    """Nothing to tell, but the replica lives."""


LanguageModelEvent = Accepted | Alive | EngineEvent


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What callers must know of a model. Set by its replica."""

    config: ModelConfig
    weights: str


@dataclass(frozen=True, slots=True)
class Load:
    """How busy a replica is."""

    num_running: int
    num_waiting: int
    queued_frames: float
    """Frames still to be decoded, of waiting and running requests; guidance rows counted apart."""
    pages_held: int
    pages_total: int
    step_s: float
    num_steps: int
    """Since the replica was made."""
    num_accepted: int
    num_finished: int
    num_cancelled: int
    num_failed: int


class LanguageModel:
    """One engine. Loads and warms up when made.

    Raises:
        InvalidRequestError, WeightsError: the settings' model cannot be loaded.
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
        """Run a short request through everything, so that the first caller does not pay for first times."""
        config = self.card.config
        text = torch.zeros(1, config.text_dim)
        codes = CodesRequest(((Window(0, 8), Conditioning(text, None)),), SamplingParams(seed=0))
        async for _ in self.generate(EngineRequest("warm-up", codes)):
            pass

    async def generate(self, request: EngineRequest) -> AsyncGenerator[LanguageModelEvent, None]:
        """The events of one request; leaving the iterator early cancels it.

        Raises:
            InvalidRequestError, OverloadedError, EngineDeadError: before the first event; nothing was admitted.
        """
        await delay_points.pause(delay_points.LM_ACCEPT)
        async with await self._engine.submit(request) as stream:
            yield Accepted(stream.quoted_start_s)
            event: EngineEvent | None = None
            while not isinstance(event, EndOfRequest):
                event = await stream.next_event(ALIVE_S)
                yield Alive() if event is None else event

    async def renew(self, request_ids: Sequence[str]) -> None:
        """Renew the leases of those requests that run here."""
        for request_id in request_ids:
            self._engine.renew(request_id)

    async def abort(self, request_ids: Sequence[str]) -> None:
        """Cancel those requests that run here."""
        for request_id in request_ids:
            self._engine.abort(request_id)

    async def load(self) -> Load:
        """How busy this replica is."""
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
        """Raises: EngineDeadError: the engine's thread has failed; the replica must be replaced."""
        self._engine.check_health()

    async def close(self) -> None:
        await self._engine.close()


def engine_config(settings: ModelSettings) -> EngineConfig:
    """The engine's part of a model's settings."""
    return EngineConfig(
        cache=CacheConfig(settings.kv_dtype, settings.kv_memory_bytes, settings.kv_memory_share),
        scheduler=SchedulerConfig(
            max_requests=settings.max_requests,
            max_rows=3 * settings.max_requests,
            max_step_rows=settings.max_step_rows,
            max_waiting=settings.max_waiting,
        ),
        weights=settings.weights,
        num_threads=settings.num_threads,
    )
