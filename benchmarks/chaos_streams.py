"""Listeners that stream pieces one after another over both protocols and compare each with the undisturbed one.

Independent of Ray and of what is killed.
"""

from __future__ import annotations

import hashlib
import itertools
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from musicgen_serving.client import Chunk, MusicRequest, Retries, Start, connect
from musicgen_serving.client.types import to_bytes
from musicgen_serving.player import Player

from musicgen.errors import MusicGenError

BUFFER_S = 0.5
"""Playback buffer of the simulated player."""


@dataclass(slots=True)
class Tally:
    """Outcomes of all pieces. Mutated by all listeners, under `lock`."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    num_finished: int = 0
    num_different: int = 0
    """Finished with audio that differs from the undisturbed piece."""
    failed: Counter[str] = field(default_factory=Counter)
    """Admitted, but not finished; by error."""
    refused: Counter[str] = field(default_factory=Counter)
    """Not admitted: an error before the first event; by error."""
    underruns_s: list[float] = field(default_factory=list)
    """Underrun of each piece at its player, in seconds."""

    def take_underruns(self) -> tuple[int, list[float]]:
        """Number of pieces finished since the last call, and the nonzero underruns among them."""
        with self.lock:
            heard, self.underruns_s = self.underruns_s, []
        return len(heard), [seconds for seconds in heard if seconds > 0]


@dataclass(frozen=True, slots=True)
class Song:
    """A piece to request repeatedly."""

    prompt: str
    seed: int
    duration_s: float
    melody: bytes | None = None

    def request(self, number: int) -> MusicRequest:
        return MusicRequest(
            self.prompt,
            seed=self.seed,
            duration_s=self.duration_s,
            melody=self.melody,
            request_id=f"chaos-{self.seed}-{number}",
        )


def undisturbed(url: str, song: Song) -> str:
    """Checksum of a piece without disturbance."""
    with connect(url) as client:
        return (
            client.stream(song.prompt, seed=song.seed, duration_s=song.duration_s, melody=song.melody)
            .read()
            .report.checksum
        )


class Listener(threading.Thread):
    """Streams one piece repeatedly until stopped; the current piece is still received to its end.

    Args:
        checksum: of the undisturbed piece.
        retries: None: a lost connection is a failure.
    """

    def __init__(self, url: str, song: Song, checksum: str, tally: Tally, retries: Retries | None) -> None:
        super().__init__(daemon=True)
        self._url, self._song, self._checksum, self._tally = url, song, checksum, tally
        self._retries = retries or Retries(max_attempts=1)
        self._stopping = threading.Event()
        self.received_at: list[float] = []
        """Arrival times of audio (monotonic seconds)."""

    def stop(self) -> None:
        self._stopping.set()

    def run(self) -> None:
        with connect(self._url, retries=self._retries, timeout_s=180) as client:
            for number in itertools.count():
                if self._stopping.is_set():
                    return
                self._listen(client, self._song.request(number))

    def _listen(self, client: object, request: MusicRequest) -> None:
        player, digest, start, num_samples = Player(BUFFER_S), hashlib.sha256(), None, 0
        try:
            for event in client.events(request):  # type: ignore[attr-defined]
                if isinstance(event, Start):
                    start = event
                elif isinstance(event, Chunk) and start is not None:
                    now = time.monotonic()
                    self.received_at.append(now)
                    digest.update(to_bytes(event.samples))
                    num_new = event.samples.shape[-1]
                    num_samples += num_new
                    player.receive(now, num_new / start.sample_rate, last=num_samples == start.num_samples)
        except MusicGenError as error:
            with self._tally.lock:
                kind = self._tally.refused if start is None else self._tally.failed
                kind[f"{type(error).__name__}: {error}"[:120]] += 1
            time.sleep(0.5)
            return
        with self._tally.lock:
            self._tally.num_finished += 1
            self._tally.num_different += digest.hexdigest() != self._checksum
            self._tally.underruns_s.append(player.underrun_s)


def longest_silence_s(listeners: Sequence[Listener], since: float, until: float) -> float:
    """The longest interval without audio at any listener that overlaps `since` … `until`.

    Never 0: chunks are up to a second apart, and a new piece takes a moment to start.
    """
    longest = 0.0
    for listener in listeners:
        times = list(listener.received_at)
        for earlier, later in itertools.pairwise(times):
            if later > since and earlier < until:
                longest = max(longest, later - earlier)
    return longest


def all_heard(listeners: Sequence[Listener], since: float) -> bool:
    """Whether every listener has received audio since then."""
    return all(listener.received_at and listener.received_at[-1] > since for listener in listeners)
