"""asyncio interface of the engine; the only code that bridges its thread and an event loop.

One hop from the engine's thread to the loop per step and request, and one queue per request. Leaving a stream early
cancels its request.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from musicgen.engine.core import EngineCore, EngineStats
from musicgen.engine.thread import Done, EngineThread
from musicgen.errors import EngineDeadError
from musicgen.types import EndOfRequest, EngineEvent, EngineRequest


class AsyncEngine:
    """An engine on its own thread, used from one event loop.

    Args:
        core: owned by this engine from now on.
    """

    def __init__(self, core: EngineCore) -> None:
        self._thread = EngineThread(core)

    async def submit(self, request: EngineRequest) -> AsyncStream:
        """Add a request; use its stream in an `async with`, which cancels the request on early exit.

        Raises:
            InvalidRequestError, OverloadedError, EngineDeadError: see `EngineCore.add`.
        """
        loop = asyncio.get_running_loop()
        accepted: asyncio.Future[object] = loop.create_future()

        def listen(events: list[EngineEvent]) -> None:
            _call_soon(loop, stream.put, events)

        stream = AsyncStream(request.request_id, lambda: self._thread.abort(request.request_id, listen))
        self._thread.submit(request, listen, _resolver(loop, accepted))
        try:
            quoted_s = await accepted
        except asyncio.CancelledError:
            stream.abort()
            raise
        assert isinstance(quoted_s, float)
        stream.quoted_start_s = quoted_s
        return stream

    def abort(self, request_id: str) -> None:
        """Cancel a request by its id; no effect if it has ended."""
        self._thread.abort(request_id)

    def renew(self, request_id: str) -> None:
        """Renew the lease of a request."""
        self._thread.renew(request_id)

    async def stats(self) -> EngineStats:
        """Engine statistics."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[object] = loop.create_future()
        self._thread.stats(_resolver(loop, answer))
        stats = await answer
        assert isinstance(stats, EngineStats)
        return stats

    def check_health(self) -> None:
        """Raises: EngineDeadError: the engine's thread has failed."""
        if self._thread.failure is not None:
            raise EngineDeadError(self._thread.failure)

    async def close(self) -> None:
        """Cancel all requests and stop the thread."""
        await asyncio.to_thread(self._thread.close)


class AsyncStream:
    """The events of one request, in order, the terminal one last."""

    def __init__(self, request_id: str, abort: Callable[[], None]) -> None:
        self.request_id = request_id
        self.quoted_start_s = 0.0
        self.abort = abort
        """Cancel the request; no effect if it has ended."""
        self._events: asyncio.Queue[EngineEvent] = asyncio.Queue()
        self._ended = False
        self._next: asyncio.Task[EngineEvent] | None = None

    def put(self, events: list[EngineEvent]) -> None:
        """Called on the loop's thread."""
        for event in events:
            self._events.put_nowait(event)

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._next is not None:
            self._next.cancel()
        if not self._ended:
            self.abort()

    async def next_event(self, timeout_s: float | None = None) -> EngineEvent | None:
        """The next event, or None after `timeout_s` without one. Cancelling the wait loses no event."""
        if self._next is None:
            self._next = asyncio.ensure_future(self._events.get())
        done, _ = await asyncio.wait({self._next}, timeout=timeout_s)
        if not done:
            return None
        event, self._next = self._next.result(), None
        self._ended = isinstance(event, EndOfRequest)
        return event

    async def __aiter__(self) -> AsyncIterator[EngineEvent]:
        while not self._ended:
            event = await self.next_event()
            assert event is not None
            yield event


def _resolver(loop: asyncio.AbstractEventLoop, future: asyncio.Future[object]) -> Done:
    """A function for the engine's thread that resolves a future of the loop."""

    def resolve(result: object, error: BaseException | None) -> None:
        if future.cancelled():
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    def done(result: object, error: BaseException | None) -> None:
        _call_soon(loop, resolve, result, error)

    return done


def _call_soon(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *args: object) -> None:
    """Call on the loop's thread; does nothing if the loop is closed."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(function, *args)
