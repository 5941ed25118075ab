"""The running requests of this ingress replica: reports them to the gatekeeper, stops them on its request, and settles
each exactly once."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from musicgen.config import ModelConfig
from musicgen.errors import MusicGenError, RequestCancelledError
from musicgen.types import FinishReason
from musicgen_serving import errors
from musicgen_serving.admission import AdmissionRequest, Gatekeeper, Progress, Settlement, Stop, Ticket
from musicgen_serving.errors import SupersededError
from musicgen_serving.generation_task import GenerationTask
from musicgen_serving.request_metrics import RequestTimer
from musicgen_serving.types import GenerationEnd, GenerationRequest, PieceAudio, PieceReport

logger = logging.getLogger(__name__)

T = TypeVar("T")

REPORT_S = 1.0
"""Interval of reports to the gatekeeper."""
RETRY_S = 0.5
"""Retry interval while the gatekeeper is unreachable."""
SETTLE_ATTEMPTS = 60
SETTLE_WAIT_S = 1.0
"""Maximum time for which the end of a request waits for its settlement."""
CLOSE_S = 10.0
"""Maximum time for which a stopping replica waits for pending settlements."""


@dataclass(slots=True, eq=False)
class Running:
    """A request of this replica, from admission to settlement. Mutated by its own generator only."""

    request: GenerationRequest
    ticket: Ticket
    config: ModelConfig
    task: GenerationTask
    timer: RequestTimer
    reports: dict[int, PieceReport] = field(default_factory=dict)
    num_given: dict[int, int] = field(default_factory=dict)
    """Delivered samples per channel, by piece."""
    reason: FinishReason = FinishReason.CANCELLED
    """The default until it ends otherwise, because a consumer that leaves cancels it."""
    error: BaseException | None = None
    settled: bool = False

    def give(self, audio: PieceAudio) -> PieceAudio:
        """Record audio that is delivered to the caller."""
        num_new = audio.samples.shape[-1]
        self.num_given[audio.piece] = self.num_given.get(audio.piece, 0) + num_new
        last = audio.sample_offset + num_new == self.num_samples
        self.timer.audio(audio.piece, num_new / self.config.sample_rate, last=last)
        return audio

    @property
    def num_samples(self) -> int:
        """Samples per channel of each piece."""
        return self.config.num_frames(self.request.duration_s) * self.config.codec.hop_length

    @property
    def done_s(self) -> float:
        """Seconds of audio delivered, total over all pieces."""
        return sum(self.num_given.values()) / self.config.sample_rate

    def progress(self) -> Progress:
        """Progress report for the gatekeeper."""
        request = self.request
        return Progress(self.ticket, request.model, request.audio_s, self.done_s, self.task.made_s, len(request.pieces))

    def end(self) -> GenerationEnd:
        """The terminal event."""
        reports = tuple(self.reports[piece] for piece in sorted(self.reports))
        return GenerationEnd(self.request.request_id, self.reason, reports, self.progress().billed_s, self.error)


class RunningRequests:
    """All running requests of one ingress replica."""

    def __init__(self, gatekeeper: Gatekeeper) -> None:
        self._gatekeeper = gatekeeper
        self._edge = uuid.uuid4().hex
        self._running: set[Running] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._loops: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Start reporting and listening for cancellations."""
        if not self._loops:
            self._loops = [asyncio.create_task(self._report_forever()), asyncio.create_task(self._listen_forever())]

    async def close(self) -> None:
        """Stop all requests and reporting; wait up to `CLOSE_S` until everything is settled."""
        for running in list(self._running):
            running.task.stop(RequestCancelledError("the service is shutting down"))
        for loop in self._loops:
            loop.cancel()
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_S):
                while self._tasks or any(not running.settled for running in self._running):
                    await asyncio.wait([*self._tasks, asyncio.create_task(asyncio.sleep(0.05))])
        await asyncio.gather(*self._loops, return_exceptions=True)

    def cancel(self, tenant: str, request_id: str) -> None:
        """Stop a tenant's request, if it runs here."""
        for running in self._running:
            if (running.ticket.tenant, running.ticket.request_id) == (tenant, request_id):
                running.task.stop(RequestCancelledError("the request was cancelled"))

    def _obey(self, stop: Stop) -> None:
        for running in self._running:
            if running.ticket.serial == stop.serial:
                running.task.stop(
                    SupersededError("a retry of this request took over")
                    if stop.superseded
                    else RequestCancelledError("the request was cancelled")
                )

    async def admit(self, request: AdmissionRequest) -> Ticket:
        """Get a ticket from the gatekeeper. If the client disconnects meanwhile, the ticket is settled on arrival.

        Raises: as `Gatekeeper.admit`.
        """
        admission = self._spawn(self._gatekeeper.admit(request))
        try:
            return await asyncio.shield(admission)
        except asyncio.CancelledError:
            self._spawn(self._give_back(request, admission))
            raise

    async def _give_back(self, request: AdmissionRequest, admission: asyncio.Task[Ticket]) -> None:
        with suppress(MusicGenError):
            progress = Progress(await admission, request.model, request.audio_s, 0.0, 0.0, request.num_pieces)
            code = errors.report(RequestCancelledError("")).code
            await self._settle(Settlement(progress, FinishReason.CANCELLED, None, 0.0, 0, code))

    @asynccontextmanager
    async def holding(self, running: Running) -> AsyncIterator[None]:
        """Keeps the request registered while in this context, and settles it on exit."""
        self._running.add(running)
        try:
            yield
        finally:
            self._running.discard(running)
            running.task.stop(RequestCancelledError("the client disconnected"))
            self._settle_soon(running)

    async def settle(self, running: Running) -> None:
        """Settle now. Returns when done, or after `SETTLE_WAIT_S`; settlement then continues in the background, also if
        the caller is cancelled. An unreachable gatekeeper must not delay the end of a finished stream."""
        task = self._settle_soon(running)
        if task is not None:
            await asyncio.wait({task}, timeout=SETTLE_WAIT_S)

    def _settle_soon(self, running: Running) -> asyncio.Task[None] | None:
        if running.settled:
            return None
        running.settled = True
        end = running.end()
        code = None if running.error is None else errors.report(running.error).code
        running.timer.ended(end, running.done_s, code, running.config.frame_rate_hz)
        settlement = Settlement(
            running.progress(),
            running.reason,
            running.timer.first_audio_s,
            running.timer.total_s,
            sum(report.num_failovers for report in end.pieces),
            code,
        )
        return self._spawn(self._settle(settlement))

    async def _settle(self, settlement: Settlement) -> None:
        for _ in range(SETTLE_ATTEMPTS):
            try:
                await self._gatekeeper.settle(settlement)
            except MusicGenError:
                await asyncio.sleep(RETRY_S)
            else:
                return
        logger.error("request %s: could not be settled: gatekeeper unreachable", settlement.request_id)

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run work that continues when the request it belongs to is cancelled."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _report_forever(self) -> None:
        async def report() -> None:
            # Requests being settled are not reported: a new gatekeeper would consider them running.
            progress = [running.progress() for running in self._running if not running.settled]
            for stop in await self._gatekeeper.report(self._edge, progress):
                self._obey(stop)

        while True:
            await _outlived(report)
            await asyncio.sleep(REPORT_S)

    async def _listen_forever(self) -> None:
        async def listen() -> None:
            for stop in await self._gatekeeper.wait_cancelled(self._edge):
                self._obey(stop)

        while True:
            if not await _outlived(listen):
                await asyncio.sleep(RETRY_S)


async def _outlived(talk: Callable[[], Awaitable[None]]) -> bool:
    """Talk to the gatekeeper; returns whether it succeeded. Swallows all errors: if a loop ended, all requests of this
    replica would eventually be cancelled."""
    try:
        await talk()
    except MusicGenError as error:
        logger.warning("gatekeeper: %s", error)
    except Exception:
        logger.exception("gatekeeper: unexpected error")
    else:
        return True
    return False
