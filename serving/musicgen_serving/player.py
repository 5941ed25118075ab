"""Simulated real-time player of a stream, to measure buffer underruns.

Starts playing once `buffer_s` seconds are buffered; after an underrun it rebuffers `buffer_s` seconds.
"""

from __future__ import annotations


class Player:
    """Player of one piece. Times are seconds of any one clock."""

    def __init__(self, buffer_s: float) -> None:
        self._buffer_s = buffer_s
        self._received_s = 0.0
        self._played_s = 0.0
        self._since: float | None = None
        """Start time of the current playback; None while buffering."""
        self._waiting_from: float | None = None
        self.underrun_s = 0.0
        """Seconds of silence after playback first started."""
        self.num_underruns = 0

    def receive(self, now: float, audio_s: float, *, last: bool = False) -> None:
        """Audio arrives."""
        self._play_until(now)
        self._received_s += audio_s
        if self._since is None and (last or self._received_s - self._played_s >= self._buffer_s):
            if self._waiting_from is not None:
                self.underrun_s += now - self._waiting_from
                self._waiting_from = None
            self._since = now

    def _play_until(self, now: float) -> None:
        if self._since is None:
            return
        left_s = self._received_s - self._played_s
        if now - self._since > left_s + 1e-9:  # underrun in between
            self._waiting_from = self._since + left_s
            self.num_underruns += 1
            self._played_s = self._received_s
            self._since = None
        else:
            self._played_s += now - self._since
            self._since = now
