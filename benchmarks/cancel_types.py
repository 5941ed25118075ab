"""Types of the cancellation matrix: the race that each cell targets, how it is provoked, and the results."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from musicgen_serving.deployments.language_model import Load

MAX_REQUESTS = 16
"""Required `max_requests` of the service's language model."""


class Service(Protocol):
    """The service under test: one language model with `MAX_REQUESTS` slots and failpoints enabled."""

    http: str
    grpc: str

    def load(self) -> Load:
        """Load of the language model."""

    def state(self, request_id: str) -> str:
        """State of a request at the gatekeeper; `unknown` if it has none."""

    def delay(self, text: str) -> None:
        """Set the failpoints."""


@dataclass(frozen=True, slots=True)
class Phase:
    """How a race is provoked."""

    name: str
    ready: str
    """See `Plan`."""
    window_s: float
    """The stream is ended at a random moment of a window of this length."""
    duration_s: float
    before: str
    """Failpoints while requests are sent."""
    after: str
    """Failpoints once they have arrived."""
    deadline_s: float
    """Start of the window for deadlines, relative to the request; adjusted if it misses the phase."""
    wave: int = 16
    lm_may_finish: bool = False
    """The language model may have generated all codes before the stream is ended."""


SLOW = "lm.step=0.05"
PHASES = (
    Phase("queued", "sent", 0.5, 1.0, "", "lm.step=0.2", 0.5),
    Phase("prefill", "sent", 0.6, 1.0, "lm.prefill=1.2", "lm.prefill=1.2", 0.15, wave=8),
    Phase("decode", "first", 1.0, 3.0, "", SLOW, 1.5),
    Phase("sending", "first", 0.8, 3.0, "edge.send=0.2", "edge.send=0.2", 0.8, lm_may_finish=True),
    Phase("last chunk", "last", 0.6, 2.0, "codec.last=0.8", "codec.last=0.8", 0.8, wave=8, lm_may_finish=True),
)
PROTOCOLS = ("http", "grpc")


@dataclass(slots=True)
class Cell:
    """Results of one cell."""

    way: str
    phase: str
    protocol: str
    num_hits: int = 0
    num_missed: int = 0
    """Ended in another phase or after the end of the piece, or the engine rejected the deadline."""
    num_lost: int = 0
    release_s: list[float] = field(default_factory=list)
    """From the cancellation until the language model released the request, where it still held it."""
    release_steps: list[int] = field(default_factory=list)
    """The same in engine steps, at the resolution of the load samples."""
    reasons: list[str] = field(default_factory=list)
    """Why victims were lost."""
