"""The codes of one piece, with failover between language-model replicas.

Keeps the codes received so far; when a replica is lost, another one resumes after them. Independent of audio.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from musicgen.errors import OverloadedError
from musicgen.types import CodeChunk, CodesRequest, EndOfRequest, EngineRequest, FinishReason, Usage
from musicgen_serving.components import BrokenError, Components, LostError
from musicgen_serving.deployments.language_model import Accepted, Alive, LanguageModelEvent
from musicgen_serving.failover import Failover
from musicgen_serving.settings import FailoverSettings


@dataclass(frozen=True, slots=True)
class CodesStarted:
    """A language model has accepted the piece; the first event, sent once."""

    quoted_start_s: float


@dataclass(frozen=True, slots=True)
class CodesEnd:
    """All codes have been received; the last event."""

    num_frames: int
    """New frames, excluding the known ones."""
    queue_s: float
    prefill_s: float
    decode_s: float
    num_failovers: int


CodesEvent = CodesStarted | Tensor | CodesEnd
"""A tensor holds the next codes `[K, T]`, excluding known ones."""


class CodeStream:
    """One piece's codes.

    Args:
        request: for the first attempt; later ones have a numbered id and more known codes.
        made: called with the number of frames whenever codes arrive.
    """

    def __init__(
        self,
        components: Components,
        request: EngineRequest,
        settings: FailoverSettings,
        made: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._components, self._request, self._settings, self._tell_made = components, request, settings, made
        self._failover = Failover(settings, f"request {request.request_id}: language model")
        known = request.codes.known_codes
        self._made: list[Tensor] = [] if known is None else [known]
        self._num_made = request.codes.num_known_frames
        self._started = False
        self._usages: list[Usage] = []

    async def events(self) -> AsyncGenerator[CodesEvent, None]:
        """`CodesStarted`, codes, `CodesEnd`.

        Raises:
            InvalidRequestError, OverloadedError: rejected; before the first event.
            ReplicaLostError: attempts exhausted. InternalError: engines fail in the same way.
        """
        while self._num_made < self._request.codes.num_frames:
            try:
                async for event in self._attempt():
                    yield event
            except (LostError, TimeoutError) as error:
                await self._failover.lost(error)
            except OverloadedError as error:
                if not self._started:
                    raise
                await self._failover.lost(error)
        yield self._end()

    async def _attempt(self) -> AsyncIterator[CodesStarted | Tensor]:
        async with self._components.generate(self._next_request()) as events:
            async for event in _timed(events, self._settings):
                if isinstance(event, Accepted):
                    if not self._started:
                        self._started = True
                        yield CodesStarted(event.quoted_start_s)
                elif isinstance(event, CodeChunk):
                    if event.frame_offset != self._num_made:
                        raise LostError(f"expected frame {self._num_made}, got {event.frame_offset}")
                    self._made.append(event.codes)
                    self._num_made += event.codes.shape[-1]
                    self._tell_made(self._num_made)
                    self._failover.progress()
                    yield event.codes
                elif isinstance(event, EndOfRequest):
                    self._usages.append(event.usage)
                    if event.reason is not FinishReason.FINISHED:
                        text = event.error or f"the engine {event.reason.value} it"
                        raise BrokenError(text) if event.reason is FinishReason.FAILED else LostError(text)
                    return
        raise LostError("the stream ended early")

    def _next_request(self) -> EngineRequest:
        """The same piece from its current position. The deadline is only checked at the first attempt."""
        attempt = self._failover.num_failures
        if attempt == 0:
            return self._request
        codes: CodesRequest = self._request.codes
        if self._made:
            codes = replace(codes, known_codes=torch.cat(self._made, dim=-1))
        name = f"{self._request.request_id}/{attempt}"
        return replace(self._request, request_id=name, codes=codes, deadline_s=None)

    def _end(self) -> CodesEnd:
        num_new = self._request.codes.num_frames - self._request.codes.num_known_frames
        return CodesEnd(
            num_new,
            sum(usage.queue_s for usage in self._usages),
            sum(usage.prefill_s for usage in self._usages),
            sum(usage.decode_s for usage in self._usages),
            self._failover.num_failures,
        )


async def _timed(
    events: AsyncIterator[LanguageModelEvent], settings: FailoverSettings
) -> AsyncIterator[LanguageModelEvent]:
    """The events without heartbeats. Raises: TimeoutError: heartbeat timeout."""
    limit_s = settings.first_answer_s
    while True:
        try:
            async with asyncio.timeout(limit_s):
                event = await anext(events)
        except StopAsyncIteration:
            return
        limit_s = settings.silence_s
        if not isinstance(event, Alive):
            yield event
