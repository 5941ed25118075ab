"""The service behind both ingresses: admits, generates and settles requests. Implements `service.MusicService`.

Owns the lifecycle of a request in this replica: exactly one settlement, whatever happens. Independent of transports.
"""

from __future__ import annotations

import asyncio
import logging
import unicodedata
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, contextmanager

from musicgen.config import ModelConfig
from musicgen.errors import DeadlineTooShortError, MusicGenError, RequestCancelledError
from musicgen.inputs import check_prompt_length
from musicgen.models.t5 import MAX_TEXT_TOKENS
from musicgen.types import FinishReason
from musicgen_serving import errors
from musicgen_serving.admission import AdmissionRequest, Gatekeeper, Tenant
from musicgen_serving.checks import longest_piece_s
from musicgen_serving.components import LostError
from musicgen_serving.concurrency import together
from musicgen_serving.deployments.language_model import ModelCard
from musicgen_serving.errors import DeadlineExceededError, NotFoundError
from musicgen_serving.failover import call_with_failover
from musicgen_serving.generation_task import GenerationTask
from musicgen_serving.pipeline import PieceStarted, Pipeline, Prepared, check_fits
from musicgen_serving.recordings import length_s, naming
from musicgen_serving.request_metrics import RequestMetrics
from musicgen_serving.running_requests import Running, RunningRequests
from musicgen_serving.service import Readiness
from musicgen_serving.settings import LimitSettings, ModelSettings, ServeSettings
from musicgen_serving.types import (
    GenerationEvent,
    GenerationRequest,
    GenerationStatus,
    ModelInfo,
    PieceAudio,
    PieceReport,
    Started,
)

logger = logging.getLogger(__name__)

READY, NOT_REACHED = "ready", "not reached"
READINESS_S = 1.0
"""How long a readiness check is cached."""
READINESS_WAIT_S = 2.0
"""A component that takes longer to respond is not ready."""
INPUTS_WAIT_S = 2.0
"""Timeout of the input checks of a request."""
GATEKEEPER, EDGE = "gatekeeper", "edge"


class GenerationService:
    """One replica's share of the service.

    Args:
        pipelines: by the served model's name.
        metrics: receives the metrics.
    """

    def __init__(
        self,
        settings: ServeSettings,
        pipelines: Mapping[str, Pipeline],
        gatekeeper: Gatekeeper,
        metrics: RequestMetrics,
    ) -> None:
        self._settings, self._pipelines, self._gatekeeper, self._metrics = settings, pipelines, gatekeeper, metrics
        self._running = RunningRequests(gatekeeper)
        self._cards: dict[str, ModelCard] = {}
        self._readiness = Readiness(False, dict.fromkeys((GATEKEEPER, *pipelines), NOT_REACHED))
        self._look_again_at = 0.0
        self._leaving = False

    @property
    def limits(self) -> LimitSettings:
        return self._settings.limits

    async def start(self) -> None:
        """Start reporting to the gatekeeper."""
        self._running.start()

    def leave(self) -> None:
        """Report not-ready from now on, so that load balancers move away; requests are still accepted."""
        self._leaving = True

    async def close(self) -> None:
        """Stop all running requests of this replica."""
        await self._running.close()

    async def authenticate(self, api_key: str | None) -> Tenant:
        try:
            return await self._gatekeeper.authenticate(api_key)
        except MusicGenError as error:
            self.count_refusal(errors.report(error).code)
            raise

    def count_refusal(self, code: str, tenant: Tenant | None = None) -> None:
        self._metrics.rejected("", "" if tenant is None else tenant.tenant_class, code)

    async def cancel(self, tenant: Tenant, request_id: str) -> GenerationStatus:
        self._running.cancel(tenant.name, request_id)  # if it runs here, stop it without waiting for the gatekeeper
        return await self._gatekeeper.cancel(tenant.name, request_id)

    async def status(self, tenant: Tenant, request_id: str) -> GenerationStatus:
        return await self._gatekeeper.status(tenant.name, request_id)

    async def models(self, tenant: Tenant) -> list[ModelInfo]:
        looks = [self._info_if_reached(model, tenant) for model in self._settings.models if _is_allowed(model, tenant)]
        return [info for info in await together(*looks) if info is not None]

    async def model(self, tenant: Tenant, name: str | None) -> ModelInfo:
        model = self._allowed_model(tenant, name)
        return _info(model, await self._card(model.name), self._settings, tenant)

    def _allowed_model(self, tenant: Tenant, name: str | None) -> ModelSettings:
        """Raises: NotFoundError: not served, or not to this tenant; the two are indistinguishable."""
        models = [model for model in self._settings.models if _is_allowed(model, tenant)]
        if not models:
            raise NotFoundError("model: no served model is available to this API key", param="model")
        for model in models:
            if name in (None, model.name):
                return model
        names = ", ".join(model.name for model in models)
        raise NotFoundError(f"model: expected one of {names}, got {name!r}", param="model")

    async def _info_if_reached(self, model: ModelSettings, tenant: Tenant) -> ModelInfo | None:
        if model.name not in self._cards:
            try:
                async with asyncio.timeout(READINESS_WAIT_S):
                    self._cards[model.name] = await self._pipelines[model.name].components.describe()
            except (LostError, TimeoutError):
                return None
        return _info(model, self._cards[model.name], self._settings, tenant)

    async def readiness(self) -> Readiness:
        if self._leaving:
            return Readiness(False, {EDGE: "leaving"})
        now = asyncio.get_running_loop().time()
        if now >= self._look_again_at:  # health probes are frequent
            self._look_again_at = now + READINESS_S
            looks = (self._gatekeeper_state(), *(self._state(name) for name in self._pipelines))
            keeper, *states = await together(*(_looked(look) for look in looks))
            details = {GATEKEEPER: keeper, **dict(zip(self._pipelines, states, strict=True))}
            self._readiness = Readiness(keeper == READY and READY in states, details)
        return self._readiness

    async def _gatekeeper_state(self) -> str:
        return READY if await self._gatekeeper.takes_requests() else "draining"

    async def _state(self, model: str) -> str:
        await self._pipelines[model].components.check()
        return READY

    @asynccontextmanager
    async def generate(
        self, tenant: Tenant, request: GenerationRequest
    ) -> AsyncIterator[AsyncIterator[GenerationEvent]]:
        async with aclosing(self._generate(tenant, request)) as events:
            yield events

    async def _generate(self, tenant: Tenant, request: GenerationRequest) -> AsyncGenerator[GenerationEvent, None]:
        ends_at = _ends_at(request.deadline_s)
        try:
            async with _until(ends_at, request):
                config = await self._checked(tenant, request)
                ticket = await self._running.admit(_admission(tenant, request))
        except MusicGenError as error:
            model = request.model if request.model in self._pipelines else ""  # unknown names must not become labels
            self._metrics.rejected(model, tenant.tenant_class, errors.report(error).code)
            raise
        self._log_admitted(tenant, request)
        timer = self._metrics.admitted(
            request.request_id, request.model, tenant.tenant_class, is_stream=request.chunks is not None
        )
        task = GenerationTask(self._pipelines[request.model], request, ticket, config, ends_at)
        running = Running(request, ticket, config, task, timer)
        async with self._running.holding(running):
            async for event in self._events(running, ends_at):
                yield event

    async def _events(self, running: Running, ends_at: float | None) -> AsyncGenerator[GenerationEvent, None]:
        """The events of an admitted request for its caller. Records the outcome in `running`."""
        request, task = running.request, running.task
        has_started = False
        try:
            with _stopping(task, ends_at, request):
                async with aclosing(self._made(running)) as events:
                    async for event in events:
                        has_started = True
                        yield event
            running.reason = FinishReason.FINISHED
        except Exception as error:
            stopped = isinstance(error, (RequestCancelledError, DeadlineExceededError, DeadlineTooShortError))
            running.reason = FinishReason.CANCELLED if stopped else FinishReason.FAILED
            running.error = error
            if not isinstance(error, MusicGenError):
                logger.exception("failed", extra={"request_id": request.request_id})
            if not has_started:
                raise
        await self._running.settle(running)
        yield running.end()

    async def _made(self, running: Running) -> AsyncGenerator[Started | PieceAudio, None]:
        """`Started`, then the audio of all pieces; their reports are kept in `running`."""
        held: list[PieceAudio] = []
        quotes: list[float] = []
        prepared: Prepared | None = None
        num_pieces = len(running.request.pieces)
        async with aclosing(running.task.events()) as events:
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
        """Validate the request; returns the model's configuration."""
        config = (await self._card(self._allowed_model(tenant, request.model).name)).config
        check_fits(request, config)
        await self._check_inputs(request, config)
        return config

    async def _check_inputs(self, request: GenerationRequest, config: ModelConfig) -> None:
        """Reject inputs that are cheaply found invalid before admission, so that they neither take a slot nor count as
        failed. Other problems (a damaged recording) surface during generation, as do these if a component does not
        respond."""
        if request.prompt_audio is not None:
            prompt_s = await asyncio.to_thread(length_s, request.prompt_audio)
            if prompt_s is not None:
                with naming("prompt_audio"):
                    check_prompt_length(prompt_s, config, request.duration_s)
        components = self._pipelines[request.model].components
        long = {piece.prompt for piece in request.pieces if piece.prompt and _may_be_too_long(piece.prompt)}
        checks = [components.check_prompt(prompt) for prompt in long]
        if request.stems:
            checks.append(components.check_stems())
        try:
            async with asyncio.timeout(INPUTS_WAIT_S):
                await together(*checks)
        except (LostError, TimeoutError) as error:
            logger.warning("request %s: input checks skipped: %s", request.request_id, type(error).__name__)

    async def _card(self, model: str) -> ModelCard:
        """The model's properties; queried once.

        Raises: ReplicaLostError: no replica responds.
        """
        if model not in self._cards:
            describe = self._pipelines[model].components.describe
            self._cards[model], _ = await call_with_failover(self._settings.failover, f"model {model}", describe)
        return self._cards[model]


async def _looked(look: Awaitable[str]) -> str:
    try:
        async with asyncio.timeout(READINESS_WAIT_S):
            return await look
    except (LostError, MusicGenError, TimeoutError):
        return NOT_REACHED


def _ends_at(deadline_s: float | None) -> float | None:
    """A deadline in event-loop time."""
    return None if deadline_s is None else asyncio.get_running_loop().time() + deadline_s


@asynccontextmanager
async def _until(ends_at: float | None, request: GenerationRequest) -> AsyncIterator[None]:
    """Raises: DeadlineExceededError: the deadline passes within the context."""
    try:
        async with asyncio.timeout_at(ends_at):
            yield
    except TimeoutError:
        raise _too_late(request) from None


@contextmanager
def _stopping(task: GenerationTask, ends_at: float | None, request: GenerationRequest) -> Iterator[None]:
    """Stop `task` when the deadline passes within the context."""
    if ends_at is None:
        yield
        return
    timer = asyncio.get_running_loop().call_at(ends_at, task.stop, _too_late(request))
    try:
        yield
    finally:
        timer.cancel()


def _too_late(request: GenerationRequest) -> DeadlineExceededError:
    return DeadlineExceededError(f"the deadline of {request.deadline_s:g} s passed")


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


def _may_be_too_long(prompt: str) -> bool:
    """Whether the prompt needs checking: every T5 token covers at least one character of the normalized text, and two
    tokens are added."""
    return len(unicodedata.normalize("NFKC", prompt)) + 2 > MAX_TEXT_TOKENS


def _is_allowed(model: ModelSettings, tenant: Tenant) -> bool:
    return tenant.models is None or model.name in tenant.models


def _info(model: ModelSettings, card: ModelCard, settings: ServeSettings, tenant: Tenant) -> ModelInfo:
    config = card.config
    return ModelInfo(
        model.name,
        config.license,
        config.sample_rate,
        config.audio_channels,
        config.chroma is not None,
        longest_piece_s(tenant, settings.limits),
        config.max_duration_s,
        card.weights,
    )
