"""One stream that is ended early from outside: cancelled, timed out, or reset.

Determines the right moment and records what it observes; evaluates nothing.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

from musicgen_serving.client import Chunk, MusicRequest, Report, Retries, Start, connect
from musicgen_serving.errors import NotFoundError

from benchmarks.reset_proxy import ResetProxy
from musicgen.errors import MusicGenError

WAYS = ("cancel", "deadline", "reset")
ONCE = Retries(max_attempts=1)
FAR_S = 600.0
"""A distant deadline: the engine rejects deadlines that it does not expect to meet, and delayed steps take long."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How and when to end the stream."""

    way: str
    ready: str
    """`sent`: when told; `first`: at the first audio; `last`: at the last but one chunk."""
    after_s: float
    """Delay from that moment; for a deadline, from the start."""
    num_before_last: int
    """Samples before the last chunk."""


class Victim(threading.Thread):
    """Streams one piece and ends it as planned."""

    def __init__(self, url: str, request: MusicRequest, plan: Plan, proxy: ResetProxy) -> None:
        super().__init__(daemon=True)
        self.request, self.plan = request, plan
        self._url, self._control_url = url, url
        self._route = None
        if plan.way == "reset":
            parts = urlsplit(url)
            self._route = proxy.route(parts.hostname or "", parts.port or 0)
            self._url = f"{parts.scheme}://127.0.0.1:{self._route.port}"
        self._timer: threading.Timer | None = None
        self.ended_at: float | None = None
        """When it was cancelled (monotonic seconds)."""
        self.num_samples = self.num_wanted = 0
        self.answer = ""
        """The service's response to the cancellation."""
        self.whole = False
        """It finished normally."""
        self.error: MusicGenError | None = None

    def run(self) -> None:
        timeout_s = self.plan.after_s if self.plan.way == "deadline" else FAR_S
        if self.plan.way == "deadline":
            self.ended_at = time.monotonic() + timeout_s
        with connect(self._url, retries=ONCE, timeout_s=timeout_s) as client:
            try:
                for event in client.events(self.request):
                    if isinstance(event, Start):
                        self.num_wanted = event.num_samples
                    elif isinstance(event, Chunk):
                        self.num_samples += event.samples.shape[-1]
                        is_last = self.num_samples >= self.plan.num_before_last
                        if self.plan.ready == "first" or (self.plan.ready == "last" and is_last):
                            self.begin_to_end()
                    elif isinstance(event, Report):
                        self.whole = True
            except MusicGenError as error:
                self.error = error

    def begin_to_end(self) -> None:
        """Schedule its end after `Plan.after_s`. Only the first call has an effect."""
        if self.plan.way != "deadline" and self._timer is None:
            self._timer = threading.Timer(self.plan.after_s, self._end)
            self._timer.daemon = True
            self._timer.start()

    def _end(self) -> None:
        if self._route is not None:
            self.ended_at = time.monotonic()
            self._route.reset()
            return
        with connect(self._control_url, retries=ONCE, timeout_s=30) as client:
            assert self.request.request_id is not None
            for _ in range(100):
                self.ended_at = time.monotonic()
                try:
                    self.answer = client.cancel(self.request.request_id).state
                except NotFoundError:  # sent, but not admitted yet
                    time.sleep(0.02)
                else:
                    return

    def finish(self, timeout_s: float) -> bool:
        """Wait until it has ended; returns whether it has."""
        self.join(timeout_s)
        if self._timer is not None:
            self._timer.join(timeout_s)
        return not self.is_alive()
