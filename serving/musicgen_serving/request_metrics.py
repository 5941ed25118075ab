"""Request metrics and log lines: counters, timings. Never contain prompts, keys or tenant names.

`RequestMetrics` measures; a `Recorder` receives the values (Ray metrics in a cluster, a list in tests).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Protocol

from musicgen.types import FinishReason
from musicgen_serving.player import Player
from musicgen_serving.types import GenerationEnd

logger = logging.getLogger(__name__)

CONTINUITY_LIMIT_S = 0.1
"""A stream with less total underrun counts as continuous."""


class Recorder(Protocol):
    """Receives values for the metrics in `metrics.METRICS`."""

    def count(self, name: str, amount: float, labels: Mapping[str, str]) -> None: ...

    def observe(self, name: str, value: float, labels: Mapping[str, str]) -> None: ...


class RequestMetrics:
    """Measures requests.

    Args:
        buffer_s: playback buffer of the simulated player.
        clock: seconds.
    """

    def __init__(self, recorder: Recorder, buffer_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.recorder, self.buffer_s, self.clock = recorder, buffer_s, clock

    def rejected(self, model: str, tenant_class: str, code: str) -> None:
        """A request was not admitted."""
        labels = {"model": model, "tenant_class": tenant_class, "reason": code}
        self.recorder.count("requests_rejected", 1, labels)

    def admitted(self, request_id: str, model: str, tenant_class: str, *, is_stream: bool) -> RequestTimer:
        """A request was admitted; call `ended` on the result when it ends."""
        self.recorder.count("requests_admitted", 1, {"model": model, "tenant_class": tenant_class})
        return RequestTimer(self, request_id, model, tenant_class, is_stream=is_stream)


class RequestTimer:
    """One request, from admission to its end."""

    def __init__(
        self, metrics: RequestMetrics, request_id: str, model: str, tenant_class: str, *, is_stream: bool
    ) -> None:
        self._metrics, self._request_id, self._is_stream = metrics, request_id, is_stream
        self._labels = {"model": model, "tenant_class": tenant_class}
        self._began = metrics.clock()
        self._players: dict[int, Player] = {}
        self.first_audio_s: float | None = None
        """Seconds from admission to the first audio."""

    def audio(self, piece: int, audio_s: float, *, last: bool) -> None:
        """Audio is delivered to the caller."""
        now = self._metrics.clock()
        if self.first_audio_s is None:
            self.first_audio_s = now - self._began
            self._metrics.recorder.observe("time_to_first_audio_seconds", self.first_audio_s, self._labels)
        player = self._players.setdefault(piece, Player(self._metrics.buffer_s))
        player.receive(now, audio_s, last=last)

    @property
    def total_s(self) -> float:
        return self._metrics.clock() - self._began

    def ended(self, end: GenerationEnd, audio_s: float, error_code: str | None, frame_rate_hz: float) -> None:
        """Record the terminal event; `audio_s` seconds were delivered."""
        recorder, labels, total_s = self._metrics.recorder, self._labels, self.total_s
        reason = {**labels, "reason": error_code or end.reason.value}
        name = {"finished": "requests_finished", "cancelled": "requests_cancelled", "failed": "requests_failed"}
        recorder.count(name[end.reason.value], 1, reason)
        recorder.count("audio_seconds", audio_s, labels)
        recorder.count("failovers", sum(piece.num_failovers for piece in end.pieces), labels)
        for piece in end.pieces:
            recorder.observe("queue_seconds", piece.queue_s, labels)
            if piece.num_frames:
                work_s = piece.prefill_s + piece.decode_s
                recorder.observe("real_time_factor", work_s * frame_rate_hz / piece.num_frames, labels)
        if end.reason is FinishReason.FINISHED and audio_s and self._is_stream:
            self._continuity()
        logger.info(
            end.reason.value,
            extra={
                "request_id": self._request_id,
                "audio_s": round(audio_s, 3),
                "total_s": round(total_s, 3),
                "first_audio_s": self.first_audio_s,
                "code": error_code,
                **self._labels,
            },
        )

    def _continuity(self) -> None:
        underrun_s = sum(player.underrun_s for player in self._players.values())
        self._metrics.recorder.count("underrun_seconds", underrun_s, self._labels)
        ok = "yes" if underrun_s <= CONTINUITY_LIMIT_S else "no"
        self._metrics.recorder.count("streams_played", 1, {**self._labels, "continuous": ok})
