"""Runs the engine on its own thread: calls in through one queue, events out to each request's listener.

The only code that accesses an `EngineCore` while the thread runs. Listeners are called on the engine's thread and must
not block; `async_engine` and the API forward events to their own threads.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from musicgen.engine.core import EngineCore, EngineStats
from musicgen.errors import EngineDeadError
from musicgen.types import EndOfRequest, EngineEvent, EngineRequest

logger = logging.getLogger(__name__)

Listener = Callable[[list[EngineEvent]], None]
"""Receives the events of its request in one step, in order."""
Done = Callable[[object, BaseException | None], None]
"""Receives the outcome of a call: a result or an error."""


@dataclass(frozen=True, slots=True, eq=False)
class _Call:
    """A call to execute on the engine's thread, and the callback for its outcome."""

    action: Callable[[], object]
    done: Done


class EngineThread:
    """Runs an engine until `close`. All methods are thread-safe.

    Args:
        core: owned by this thread from now on.
    """

    def __init__(self, core: EngineCore, name: str = "musicgen-engine") -> None:
        self._core = core
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._listeners: dict[str, Listener] = {}
        self._failure: str | None = None
        self._closed = False
        self._lock = threading.Lock()
        """Held while a call is enqueued or the last ones are drained, so that every call gets an answer."""
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def failure(self) -> str | None:
        """Why the engine failed; None if it has not."""
        return self._failure

    def submit(self, request: EngineRequest, listener: Listener, done: Done) -> None:
        """Add a request. Calls `done(quoted_start_s, None)` or `done(None, error)` on the engine's thread, before any
        event."""

        def add() -> float:
            quoted_s = self._core.add(request)
            self._listeners[request.request_id] = listener
            return quoted_s

        self._call(add, done)

    def abort(self, request_id: str, listener: Listener | None = None) -> None:
        """Cancel a request; no effect if it has ended, or never started.

        Args:
            listener: only if the request is this listener's; its id may be in use for another one by now.
        """

        def abort() -> None:
            if listener is None or self._listeners.get(request_id) is listener:
                self._core.abort(request_id)

        self._call(abort)

    def renew(self, request_id: str) -> None:
        """Renew the lease of a request."""
        self._call(lambda: self._core.renew(request_id))

    def stats(self, done: Done) -> None:
        """Pass an `EngineStats` to `done`."""
        self._call(self._core.stats, done)

    def close(self, timeout_s: float | None = 60.0) -> None:
        """Cancel all requests, notify all listeners, stop the thread. A step that hangs is logged after `timeout_s`."""
        with self._lock:
            if not self._closed:
                self._calls.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                logger.error("the engine has not stopped within %g s: its step hangs", timeout_s)

    def _call(self, action: Callable[[], object], done: Done | None = None) -> None:
        call = _Call(action, done or (lambda _result, _error: None))
        with self._lock:
            if not self._closed:
                self._calls.put(call)
                return
        call.done(None, self._refusal())

    def _refusal(self) -> EngineDeadError:
        why = "" if self._failure is None else f": {self._failure}"
        return EngineDeadError(f"expected a running engine, got a closed one{why}")

    # --- on the engine's thread ---

    def _run(self) -> None:
        while self._serve_calls():
            try:
                events = self._core.step()
            except EngineDeadError as error:
                self._failure = str(error)
                events = self._core.take_events()
            except Exception as error:  # unexpected even by the core: no caller may be left waiting for a dead thread
                self._failure = str(self._core.die(error))
                events = self._core.take_events()
            self._dispatch(events)
            if self._failure is not None:
                break
        self._shut_down()

    def _serve_calls(self) -> bool:
        """Execute pending calls; blocks while the engine is idle. False when the thread should stop."""
        while True:
            try:
                call = self._calls.get(block=not self._core.has_work)
            except queue.Empty:
                return True
            if call is None:
                return False
            self._serve(call)

    def _serve(self, call: _Call) -> None:
        try:
            result = call.action()
        except Exception as error:
            _tell(call.done, None, error)
        else:
            _tell(call.done, result, None)

    def _dispatch(self, events: list[EngineEvent]) -> None:
        by_request: dict[str, list[EngineEvent]] = {}
        for event in events:
            by_request.setdefault(event.request_id, []).append(event)
        for request_id, own in by_request.items():
            listener = self._listeners.get(request_id)
            if isinstance(own[-1], EndOfRequest):
                self._listeners.pop(request_id, None)
            if listener is not None:
                _tell(listener, own)

    def _shut_down(self) -> None:
        with self._lock:
            self._closed = True
        if self._failure is None:
            for request_id in list(self._listeners):
                self._core.abort(request_id)
            self._dispatch(self._core.take_events())
        while not self._calls.empty():
            call = self._calls.get()
            if call is not None:
                _tell(call.done, None, self._refusal())


def _tell(callback: Callable[..., None], *args: object) -> None:
    """Invoke a user callback; its exceptions are logged and must not affect other requests."""
    try:
        callback(*args)
    except Exception:
        logger.exception("an engine listener raised an exception")


class EngineStream:
    """The events of one request, as a blocking iterator.

    Closing it early, or leaving its `with` block, cancels the request.

    Args:
        sink: queue that receives the events; by default a private one, which iteration reads. A shared one is read by
            its creator.
    Raises:
        InvalidRequestError, OverloadedError, EngineDeadError: see `EngineCore.add`; raised by the constructor.
    """

    def __init__(
        self, engine: EngineThread, request: EngineRequest, sink: queue.SimpleQueue[EngineEvent] | None = None
    ) -> None:
        self.request_id = request.request_id
        self._engine = engine
        self._events = sink or queue.SimpleQueue()
        self._ended = self._exhausted = False
        accepted: queue.SimpleQueue[tuple[object, BaseException | None]] = queue.SimpleQueue()
        engine.submit(request, self._listen, lambda result, error: accepted.put((result, error)))
        quoted_s, error = accepted.get()
        if error is not None:
            self._ended = True
            raise error
        assert isinstance(quoted_s, float)
        self.quoted_start_s = quoted_s

    def _listen(self, events: list[EngineEvent]) -> None:
        """Called on the engine's thread."""
        for event in events:
            self._ended = isinstance(event, EndOfRequest)
            self._events.put(event)

    def __iter__(self) -> Iterator[EngineEvent]:
        """All events up to the terminal one."""
        while not self._exhausted:
            event = self._events.get()
            self._exhausted = isinstance(event, EndOfRequest)
            yield event

    def close(self) -> None:
        if not self._ended:
            self._engine.abort(self.request_id)

    def __enter__(self) -> EngineStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def get_stats(engine: EngineThread) -> EngineStats:
    """Engine statistics; blocks until they are available."""
    answer: queue.SimpleQueue[tuple[object, BaseException | None]] = queue.SimpleQueue()
    engine.stats(lambda result, error: answer.put((result, error)))
    result, error = answer.get()
    if error is not None:
        raise error
    assert isinstance(result, EngineStats)
    return result
