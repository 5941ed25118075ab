"""The engine on a thread of its own: commands in through one queue, events out to each request's listener.

The only code that touches an `EngineCore` while the thread runs. Listeners are called on the engine's thread and must
return at once; `async_engine` and the API hand events on to theirs.
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
"""Gets all events of its request of one step, in order."""
Done = Callable[[object, BaseException | None], None]
"""Gets the outcome of a call: a result, or an error."""


@dataclass(frozen=True, slots=True, eq=False)
class _Call:
    """Something to be done on the engine's thread, and where the outcome goes."""

    action: Callable[[], object]
    done: Done


class EngineThread:
    """Runs an engine until `close`. All methods may be called from any thread.

    Args:
        core: used by this thread alone from now on.
    """

    def __init__(self, core: EngineCore, name: str = "musicgen-engine") -> None:
        self._core = core
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._listeners: dict[str, Listener] = {}
        self._failure: str | None = None
        self._closed = False
        self._lock = threading.Lock()
        """Held while a call is put, or the last ones are taken: none is left without an answer."""
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def failure(self) -> str | None:
        """Why the engine is dead; None while it is well."""
        return self._failure

    def submit(self, request: EngineRequest, listener: Listener, done: Done) -> None:
        """Add a request. `done(quoted_start_s, None)` or `done(None, error)` is called on the engine's thread, before
        any event."""

        def add() -> float:
            quoted_s = self._core.add(request)
            self._listeners[request.request_id] = listener
            return quoted_s

        self._call(add, done)

    def abort(self, request_id: str) -> None:
        """Cancel a request; nothing happens if it has ended."""
        self._call(lambda: self._core.abort(request_id))

    def renew(self, request_id: str) -> None:
        """Renew the lease of a request."""
        self._call(lambda: self._core.renew(request_id))

    def stats(self, done: Done) -> None:
        """Hand an `EngineStats` to `done`."""
        self._call(self._core.stats, done)

    def close(self, timeout_s: float | None = 60.0) -> None:
        """Cancel everything, tell every listener, end the thread."""
        with self._lock:
            if not self._closed:
                self._calls.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)

    def _call(self, action: Callable[[], object], done: Done | None = None) -> None:
        call = _Call(action, done or (lambda _result, _error: None))
        with self._lock:
            if not self._closed:
                self._calls.put(call)
                return
        call.done(None, self._refusal())

    def _refusal(self) -> EngineDeadError:
        why = "" if self._failure is None else f": {self._failure}"
        return EngineDeadError(f"expected a running engine, got one that is closed{why}")

    # --- on the engine's thread ---

    def _run(self) -> None:
        while self._serve_calls():
            try:
                events = self._core.step()
            except EngineDeadError as error:
                self._failure = str(error)
                events = self._core.take_events()
            except Exception as error:  # not even the core has expected it: nobody may wait for a thread that is gone
                self._failure = str(self._core.die(error))
                events = self._core.take_events()
            self._dispatch(events)
            if self._failure is not None:
                break
        self._shut_down()

    def _serve_calls(self) -> bool:
        """Do what was asked for; waits while there is no work. False when the thread is to end."""
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
    """Call somebody else's code; its error is its own, and must not reach other requests."""
    try:
        callback(*args)
    except Exception:
        logger.exception("a listener of the engine failed")


class EngineStream:
    """The events of one request, for a thread that waits for them.

    Closing it before its end, or leaving its `with`, cancels the request.

    Args:
        sink: where the events go; a queue of its own by default, which is what iterating reads. Requests may share
            one, read by whoever made it.
    Raises:
        InvalidRequestError, OverloadedError, EngineDeadError: as `EngineCore.add`, from the constructor.
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
        """All events, the terminal one last; nothing after it."""
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
    """The engine's figures, for a thread that waits for them."""
    answer: queue.SimpleQueue[tuple[object, BaseException | None]] = queue.SimpleQueue()
    engine.stats(lambda result, error: answer.put((result, error)))
    result, error = answer.get()
    if error is not None:
        raise error
    assert isinstance(result, EngineStats)
    return result
