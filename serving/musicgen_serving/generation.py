"""The service behind both edges: admits a request, makes it, settles it. Implements `service.MusicService`.

Owns the life of a request in this replica: exactly one settlement, whatever happens. Knows no transport.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, contextmanager

from musicgen.config import ModelConfig
from musicgen.errors import InvalidRequestError, MusicGenError, RequestCancelledError
from musicgen.types import FinishReason
from musicgen_serving import errors
from musicgen_serving.admission import AdmissionRequest, Gatekeeper, Tenant
from musicgen_serving.concurrency import together
from musicgen_serving.deployments.language_model import ModelCard
from musicgen_serving.errors import DeadlineExceededError, ForbiddenError, NotFoundError
from musicgen_serving.maker import Maker
from musicgen_serving.patience import insist
from musicgen_serving.pipeline import PieceStarted, Pipeline, Prepared, check_fits
from musicgen_serving.register import Register, Running
from musicgen_serving.service import Readiness
from musicgen_serving.settings import LimitSettings, ModelSettings, ServeSettings
from musicgen_serving.spokes import LostError
from musicgen_serving.types import (
    GenerationEvent,
    GenerationRequest,
    GenerationStatus,
    ModelInfo,
    PieceAudio,
    PieceReport,
    Started,
)
from musicgen_serving.watch import Watch

logger = logging.getLogger(__name__)

READY = "ready"
READINESS_S = 1.0
"""For how long a look at the parts counts."""
READINESS_WAIT_S = 2.0
"""A part that takes longer to answer is not ready."""


class GenerationService:
    """One replica's share of the service.

    Args:
        pipelines: by the served model's name.
        watch: what is counted and timed.
    """

    def __init__(
        self, settings: ServeSettings, pipelines: Mapping[str, Pipeline], gatekeeper: Gatekeeper, watch: Watch
    ) -> None:
        self._settings, self._pipelines, self._gatekeeper, self._watch = settings, pipelines, gatekeeper, watch
        self._register = Register(gatekeeper)
        self._cards: dict[str, ModelCard] = {}
        self._readiness = Readiness(False, dict.fromkeys(pipelines, "not reached"))
        self._look_again_at = 0.0

    @property
    def limits(self) -> LimitSettings:
        return self._settings.limits

    async def start(self) -> None:
        """Begin to report to the gatekeeper."""
        self._register.start()

    async def close(self) -> None:
        """Stop what is under way here."""
        await self._register.close()

    async def authenticate(self, api_key: str | None) -> Tenant:
        return await self._gatekeeper.authenticate(api_key)

    async def cancel(self, tenant: Tenant, request_id: str) -> GenerationStatus:
        self._register.stop(request_id, tenant.name)  # if it is here, it need not wait for the gatekeeper's message
        return await self._gatekeeper.cancel(tenant.name, request_id)

    async def status(self, tenant: Tenant, request_id: str) -> GenerationStatus:
        return await self._gatekeeper.status(tenant.name, request_id)

    async def models(self, tenant: Tenant) -> list[ModelInfo]:
        allowed = [m for m in self._settings.models if tenant.models is None or m.name in tenant.models]
        return [_info(model, await self._card(model.name), self._settings, tenant) for model in allowed]

    async def readiness(self) -> Readiness:
        now = asyncio.get_running_loop().time()
        if now >= self._look_again_at:  # probes of both protocols come often
            self._look_again_at = now + READINESS_S
            states = await together(*(self._state(name) for name in self._pipelines))
            details = dict(zip(self._pipelines, states, strict=True))
            self._readiness = Readiness(all(state == READY for state in states), details)
        return self._readiness

    async def _state(self, model: str) -> str:
        try:
            async with asyncio.timeout(READINESS_WAIT_S):
                await self._pipelines[model].spokes.check()
        except (LostError, MusicGenError, TimeoutError):
            return "not reached"
        return READY

    @asynccontextmanager
    async def generate(
        self, tenant: Tenant, request: GenerationRequest
    ) -> AsyncIterator[AsyncIterator[GenerationEvent]]:
        async with aclosing(self._generate(tenant, request)) as events:
            yield events

    async def _generate(self, tenant: Tenant, request: GenerationRequest) -> AsyncGenerator[GenerationEvent, None]:
        try:
            config = await self._checked(tenant, request)
            ticket = await self._register.admit(_admission(tenant, request))
        except MusicGenError as error:
            self._watch.rejected(request.model, tenant.tenant_class, errors.report(error).code)
            raise
        self._log_admitted(tenant, request)
        watch = self._watch.admitted(
            request.request_id, request.model, tenant.tenant_class, is_stream=request.chunks is not None
        )
        maker = Maker(self._pipelines[request.model], request, ticket, config)
        running = Running(request, ticket, config, maker, watch)
        async with self._register.holding(running):
            async for event in self._events(running):
                yield event

    async def _events(self, running: Running) -> AsyncGenerator[GenerationEvent, None]:
        """What the caller gets of an admitted request. Fills in how it went as it goes."""
        request, maker = running.request, running.maker
        has_started = False
        try:
            with _deadline(maker, request.deadline_s):
                async with aclosing(self._made(running)) as events:
                    async for event in events:
                        has_started = True
                        yield event
            running.reason = FinishReason.FINISHED
        except Exception as error:
            stopped = isinstance(error, (RequestCancelledError, DeadlineExceededError))
            running.reason = FinishReason.CANCELLED if stopped else FinishReason.FAILED
            running.error = error
            if not isinstance(error, MusicGenError):
                logger.exception("failed", extra={"request_id": request.request_id})
            if not has_started:
                raise
        await self._register.settle(running)
        yield running.end()

    async def _made(self, running: Running) -> AsyncGenerator[Started | PieceAudio, None]:
        """`Started`, then the audio of all pieces; their reports are kept in `running`."""
        held: list[PieceAudio] = []
        quotes: list[float] = []
        prepared: Prepared | None = None
        num_pieces = len(running.request.pieces)
        async with aclosing(running.maker.events()) as events:
            async for event in events:
                if isinstance(event, Prepared):
                    prepared = event
                elif isinstance(event, PieceStarted):
                    quotes.append(event.quoted_start_s)
                    if len(quotes) == num_pieces:
                        assert prepared is not None
                        yield _started(running.request, prepared, max(quotes))
                        for audio in held:
                            yield running.give(audio)
                elif isinstance(event, PieceAudio):
                    if len(quotes) == num_pieces:
                        yield running.give(event)
                    else:
                        held.append(event)
                else:
                    assert isinstance(event, PieceReport)
                    running.reports[event.piece] = event

    def _log_admitted(self, tenant: Tenant, request: GenerationRequest) -> None:
        fields: dict[str, object] = {
            "request_id": request.request_id,
            "model": request.model,
            "tenant_class": tenant.tenant_class,
            "audio_s": request.audio_s,
        }
        if self._settings.observability.log_prompts:
            fields["prompts"] = [piece.prompt for piece in request.pieces]
        logger.info("admitted", extra=fields)

    async def _checked(self, tenant: Tenant, request: GenerationRequest) -> ModelConfig:
        """The model's shapes, if the tenant may have what it asks for."""
        if request.model not in self._pipelines:
            raise NotFoundError(
                f"model: expected one of {', '.join(self._pipelines)}, got {request.model!r}; GET /v1/models lists them"
            )
        if tenant.models is not None and request.model not in tenant.models:
            raise ForbiddenError(f"model: {request.model!r} is not among those that this key may use")
        longest_s = _longest_s(self._settings.limits, tenant)
        if request.duration_s > longest_s:
            got = f"{request.duration_s:g} s"
            raise InvalidRequestError(f"at most {longest_s:g} s", got, "ask for less", param="duration_s")
        config = (await self._card(request.model)).config
        check_fits(request, config)
        return config

    async def _card(self, model: str) -> ModelCard:
        """What is known of a model; asked for once.

        Raises: ReplicaLostError: no replica answers.
        """
        if model not in self._cards:
            describe = self._pipelines[model].spokes.describe
            self._cards[model], _ = await insist(self._settings.failover, f"model {model}", describe)
        return self._cards[model]


@contextmanager
def _deadline(maker: Maker, deadline_s: float | None) -> Iterator[None]:
    """Stop `maker` if the context lasts longer."""
    if deadline_s is None:
        yield
        return
    reason = DeadlineExceededError(f"the deadline of {deadline_s:g} s passed")
    timer = asyncio.get_running_loop().call_later(deadline_s, maker.stop, reason)
    try:
        yield
    finally:
        timer.cancel()


def _admission(tenant: Tenant, request: GenerationRequest) -> AdmissionRequest:
    return AdmissionRequest(
        request.request_id,
        tenant.name,
        request.model,
        request.audio_s,
        request.idempotency_key,
        request.fingerprint,
        len(request.pieces),
    )


def _started(request: GenerationRequest, prepared: Prepared, quoted_start_s: float) -> Started:
    config = prepared.config
    return Started(
        request.request_id,
        request.model,
        tuple(piece.seed for piece in request.pieces),
        config.sample_rate,
        config.audio_channels,
        prepared.num_samples,
        quoted_start_s,
    )


def _longest_s(limits: LimitSettings, tenant: Tenant) -> float:
    return limits.max_duration_s if tenant.max_duration_s is None else min(limits.max_duration_s, tenant.max_duration_s)


def _info(model: ModelSettings, card: ModelCard, settings: ServeSettings, tenant: Tenant) -> ModelInfo:
    config = card.config
    return ModelInfo(
        model.name,
        config.license,
        config.sample_rate,
        config.audio_channels,
        config.chroma is not None,
        _longest_s(settings.limits, tenant),
        config.max_duration_s,
        card.weights,
    )
