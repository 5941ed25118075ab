"""Generates the pieces of one request concurrently, one task each, and merges their events into one stream.

A request can be stopped from outside at any time, with an error that its consumer then receives. The buffer is small,
so a slow consumer applies backpressure to the pieces. Independent of admission.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing

from musicgen.config import ModelConfig
from musicgen.errors import MusicGenError
from musicgen_serving import tracing
from musicgen_serving.admission import Ticket
from musicgen_serving.concurrency import ended, together
from musicgen_serving.pipeline import PieceEvent, Pipeline, Prepared
from musicgen_serving.types import GenerationRequest

EVENTS_A_PIECE = 2
"""Buffered events per piece."""


class GenerationTask:
    """Starts generating on construction.

    Args:
        ends_at: deadline in event-loop time.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        request: GenerationRequest,
        ticket: Ticket,
        config: ModelConfig,
        ends_at: float | None = None,
    ) -> None:
        self._pipeline, self._request, self._ticket, self._config = pipeline, request, ticket, config
        self._ends_at = ends_at
        self._waiting: deque[Prepared | PieceEvent] = deque()
        self._room = asyncio.Semaphore(EVENTS_A_PIECE * len(request.pieces))
        self._news = asyncio.Event()
        self._reason: MusicGenError | None = None
        self._num_frames: dict[int, int] = {}
        """Generated frames, by piece."""
        self._task = asyncio.create_task(self._make())
        self._task.add_done_callback(lambda _: self._news.set())

    @property
    def made_s(self) -> float:
        """Seconds of audio generated, total over all pieces, including audio not consumed yet."""
        return sum(self._num_frames.values()) / self._config.frame_rate_hz

    def stop(self, reason: MusicGenError) -> None:
        """Stop generating; the consumer receives `reason`. Only the first call has an effect."""
        if self._reason is None and not self._task.done():
            self._reason = reason
            self._task.cancel()
            self._news.set()  # if the task misses the cancellation, the consumer repeats it

    async def events(self) -> AsyncGenerator[Prepared | PieceEvent, None]:
        """`Prepared`, then the events of all pieces. Closing early stops everything.

        Raises:
            MusicGenError: as `Pipeline.prepare` and `Pipeline.run`, or the reason passed to `stop`.
        """
        try:
            while True:
                await self._news.wait()
                self._news.clear()
                while self._waiting and self._reason is None:
                    self._room.release()
                    yield self._waiting.popleft()
                if self._reason is not None:
                    raise self._reason
                if self._task.done():
                    self._task.result()
                    return
        finally:
            await ended(self._task)

    async def _put(self, event: Prepared | PieceEvent) -> None:
        await self._room.acquire()
        self._waiting.append(event)
        self._news.set()

    async def _make(self) -> None:
        request = self._request
        with tracing.span("generate", request.trace_parent, request_id=request.request_id, model=request.model):
            prepared = await self._pipeline.prepare(request, self._config)
            await self._put(prepared)
            await together(*(self._make_piece(prepared, piece) for piece in range(len(request.pieces))))

    async def _make_piece(self, prepared: Prepared, piece: int) -> None:
        def made(num_frames: int) -> None:
            self._num_frames[piece] = num_frames

        events = self._pipeline.run(prepared, piece, self._request, self._ticket, made, self._ends_at)
        async with aclosing(events):
            async for event in events:
                await self._put(event)
