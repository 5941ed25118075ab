"""One generation as an ASGI response: opens the service's context, watches for disconnects, drops stalled readers.

Owns when the context is exited: at the end, on disconnect, or when the server cancels the handler. A `Delivery`
(whole.py, streams.py, sse.py) decides what is sent. The status line waits for the first audio.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from musicgen.audio_encode import changed_sampling, generation_metadata
from musicgen.errors import MusicGenError, RequestCancelledError
from musicgen.types import FinishReason
from musicgen_serving import delay_points
from musicgen_serving.admission import Tenant
from musicgen_serving.budget import Share
from musicgen_serving.concurrency import ended
from musicgen_serving.http_api.errors import ConnectionCutError
from musicgen_serving.http_api.middleware import SHARE
from musicgen_serving.service import MusicService
from musicgen_serving.types import GenerationEnd, GenerationEvent, GenerationRequest, PieceAudio, Started

_MAX_SEND_BYTES = 65536
"""With larger messages, a slow but active reader could hit the stall timeout."""


@dataclass(frozen=True, slots=True)
class Wish:
    """Requested form of the response. Set by `generations`."""

    response_format: str
    as_json: bool = False
    loudness_lufs: float | None = None
    license: str = ""
    """Of the model's weights, for the metadata of files."""


class Sender:
    """The sending side of one response; the client must accept each message within `stall_s`.

    Args:
        share: the request's share of this ingress replica's memory budget.
    """

    def __init__(self, send: Send, stall_s: float, share: Share | None = None) -> None:
        self._send, self._stall_s, self._share = send, stall_s, share

    def hold(self, num_bytes: int) -> None:
        """Reserve memory until everything is sent. Raises: OverloadedError: the budget is exhausted."""
        if self._share is not None:
            self._share.take(num_bytes)

    async def start(self, headers: Mapping[str, str]) -> None:
        """Status 200 and the headers."""
        encoded = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": 200, "headers": encoded})

    async def write(self, data: bytes, *, last: bool = False) -> None:
        """Raises: ConnectionCutError: the client has stopped reading."""
        for start in range(0, max(1, len(data)), _MAX_SEND_BYTES):
            part = data[start : start + _MAX_SEND_BYTES]
            more = not last or start + _MAX_SEND_BYTES < len(data)
            if not part and more:
                continue
            await delay_points.pause(delay_points.EDGE_SEND)
            message = {"type": "http.response.body", "body": part, "more_body": more}
            try:
                async with asyncio.timeout(self._stall_s):
                    await self._send(message)
            except TimeoutError:
                raise ConnectionCutError(f"the client read no data for {self._stall_s:g} s") from None


class Delivery(Protocol):
    """Turns the events of one generation into one response.

    Before `Sender.start`, raises errors that become HTTP errors; afterwards only ConnectionCutError, which closes the
    connection.
    """

    async def deliver(self, events: AsyncIterator[GenerationEvent], out: Sender) -> None: ...


class GenerationResponse(Response):
    """Runs a generation while its response is sent."""

    def __init__(self, service: MusicService, tenant: Tenant, request: GenerationRequest, delivery: Delivery) -> None:
        super().__init__()
        self._service, self._tenant, self._request, self._delivery = service, tenant, request, delivery

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = asyncio.create_task(_disconnected(receive))
        work = asyncio.create_task(self._run(send, scope.get(SHARE)))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:  # also when the server cancels this handler, e.g. at the end of a drain
            await ended(work, gone)
        if not work.cancelled():
            work.result()  # re-raises its exception

    async def _run(self, send: Send, share: Share | None) -> None:
        out = Sender(send, self._service.limits.reader_stall_s, share)
        try:
            async with self._service.generate(self._tenant, self._request) as events:
                await self._delivery.deliver(events, out)
        except OSError as error:  # some servers raise it from `send` after a disconnect
            raise ClientDisconnect from error


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def next_started(events: AsyncIterator[GenerationEvent]) -> Started:
    """The first event. Raises: the error with which the service rejected the request."""
    started = await _next(events)
    if not isinstance(started, Started):
        raise MusicGenError(f"expected Started first, got {type(started).__name__}")
    return started


async def next_audio(events: AsyncIterator[GenerationEvent]) -> PieceAudio:
    """The first audio. Raises: the error if the request ended before it."""
    event = await _next(events)
    if isinstance(event, PieceAudio):
        return event
    raise error_of(event)


async def _next(events: AsyncIterator[GenerationEvent]) -> GenerationEvent:
    try:
        return await events.__anext__()
    except StopAsyncIteration:
        raise MusicGenError("the event stream ended without a terminal event") from None


def error_of(event: GenerationEvent | None) -> MusicGenError:
    """Why a request did not finish, as an error that is safe to show to the client."""
    if isinstance(event, GenerationEnd):
        if isinstance(event.error, MusicGenError):
            return event.error
        if event.reason is FinishReason.CANCELLED:
            return RequestCancelledError("the request was cancelled")
    failure = MusicGenError(f"expected a finished generation, got {type(event).__name__}")
    failure.__cause__ = event.error if isinstance(event, GenerationEnd) else None
    return failure


class PieceOrder:
    """Checks that each piece's audio is contiguous and complete."""

    def __init__(self, request: GenerationRequest, started: Started) -> None:
        self._next = [request.first_sample] * len(request.pieces)
        self._num_samples = started.num_samples

    def take(self, audio: PieceAudio) -> None:
        """Raises: MusicGenError: samples are missing or duplicated."""
        expected = self._next[audio.piece]
        end = expected + audio.samples.shape[-1]
        if audio.sample_offset != expected or end > self._num_samples:
            raise MusicGenError(f"expected sample {expected} of piece {audio.piece}, got {audio.sample_offset}")
        self._next[audio.piece] = end

    def check_complete(self) -> None:
        """Raises: MusicGenError: a piece is incomplete."""
        if any(position != self._num_samples for position in self._next):
            raise MusicGenError(f"expected {self._num_samples} samples of each piece, got {self._next}")


def common_headers(request: GenerationRequest, started: Started, media_type: str, sample_rate: int) -> dict[str, str]:
    """Headers of every audio response."""
    return {
        "Content-Type": media_type,
        "Cache-Control": "no-store",
        "X-Model": started.model,
        "X-Seed": ",".join(map(str, started.seeds)),
        "X-Sample-Rate": str(sample_rate),
        "X-Channels": str(started.channels),
        "X-Num-Samples": str(started.num_samples),
        "X-First-Sample": str(request.first_sample),
    }


def file_metadata(request: GenerationRequest, started: Started, piece: int, wish: Wish) -> dict[str, str]:
    """Tags of an audio file; never the prompt."""
    settings = changed_sampling(request.sampling)
    return generation_metadata(started.model, started.seeds[piece], settings=settings, license=wish.license)
