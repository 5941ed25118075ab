"""The cells of the cancellation matrix: which race each is after, how it is made to happen, and what was seen of it.

Does nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from musicgen_serving.deployments.language_model import Load

MAX_REQUESTS = 16
"""Pieces that the language model of the service must be set to decode at the same time."""


class Service(Protocol):
    """The service under test: one language model with `MAX_REQUESTS`, ready to be delayed."""

    http: str
    grpc: str

    def load(self) -> Load:
        """Of the language model."""

    def state(self, request_id: str) -> str:
        """Of a request, as the gatekeeper knows it; `unknown` if it does not."""

    def delay(self, text: str) -> None:
        """What the delay points say from now on."""


@dataclass(frozen=True, slots=True)
class Phase:
    """How a race is made to happen."""

    name: str
    ready: str
    """See `Plan`."""
    window_s: float
    """The end is wanted at a random moment of a window of this length."""
    duration_s: float
    before: str
    """Delays while requests are sent."""
    after: str
    """Delays once they are in."""
    deadline_s: float
    """Where the window of a deadline begins, counted from the request; corrected if it misses the phase."""
    wave: int = 16
    lm_may_finish: bool = False
    """The language model may have made all codes before the end is wanted."""


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
    """What was seen of one cell."""

    way: str
    phase: str
    protocol: str
    num_hits: int = 0
    num_missed: int = 0
    """The end came in another phase, or after the end of the piece, or the engine refused the deadline at once."""
    num_lost: int = 0
    release_s: list[float] = field(default_factory=list)
    """From the moment the end was wanted until the language model had let go, where it still had the request."""
    release_steps: list[int] = field(default_factory=list)
    """The same in the engine's steps, as far as looks every few milliseconds can tell."""
    reasons: list[str] = field(default_factory=list)
    """Of what was lost."""
