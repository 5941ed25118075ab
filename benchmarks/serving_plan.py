"""A load's schedule of requests, and their outcomes. Value types only; serialized as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Literal

import numpy as np

from benchmarks.simulation.arrivals import Arrivals

Protocol = Literal["http", "grpc"]
PROMPTS = ("happy rock", "sad jazz", "calm piano over soft rain", "fast techno with a deep bass", "a slow waltz")


@dataclass(frozen=True, slots=True)
class Ask:
    """One request of a load."""

    request_id: str
    at_s: float
    """Seconds after the load's start, regardless of earlier requests."""
    protocol: Protocol
    prompt: str
    duration_s: float
    seed: int
    model: str
    api_key: str | None = None


@dataclass(slots=True)
class Outcome:
    """Outcome of one request, as seen by its client. Times are seconds after the load's start."""

    request_id: str
    protocol: Protocol
    duration_s: float
    planned_s: float
    api_key: str | None = None
    sent_s: float = 0.0
    ended_s: float = 0.0
    status: str = ""
    """`finished`, or the error code, such as `overloaded`; `cut` for a connection without a proper end."""
    num_terminal: int = 0
    """Number of terminal events, statuses and errors received: must be 1."""
    chunks: list[tuple[float, float]] = field(default_factory=list)
    """Arrival time and seconds of audio of each chunk."""

    @property
    def audio_s(self) -> float:
        return sum(seconds for _, seconds in self.chunks)

    @property
    def first_audio_s(self) -> float | None:
        """From the planned sending time to the first audio."""
        return self.chunks[0][0] - self.planned_s if self.chunks else None

    @property
    def answer_s(self) -> float:
        """From sending to the end."""
        return self.ended_s - self.sent_s


def plan(
    num_requests: int,
    rate_hz: float,
    durations_s: Iterable[float],
    protocols: Iterable[Protocol],
    *,
    model: str = "demo",
    seed: int = 0,
    burstiness: float = 1.0,
    api_key: str | None = None,
    name: str = "r",
) -> list[Ask]:
    """A load of `num_requests`; durations and protocols rotate, so that two runs of one mix request the same.

    Args:
        rate_hz: mean requests per second; infinite: all at once.
        burstiness: coefficient of variation of inter-arrival times; 1 is a Poisson process.
        name: prefix of request ids.
    """
    rng = np.random.default_rng(seed)
    if np.isinf(rate_hz):
        times = np.zeros(num_requests)
    else:
        process: Literal["poisson", "gamma"] = "poisson" if burstiness == 1 else "gamma"
        times = Arrivals(process, rate_hz, burstiness).times(num_requests, rng)
    durations, kinds = list(durations_s), list(protocols)
    return [
        Ask(
            f"{name}-{seed}-{i}",
            float(time),
            # Combine every duration with every protocol.
            kinds[(i % len(durations) + i // len(durations)) % len(kinds)],
            PROMPTS[i % len(PROMPTS)],
            durations[i % len(durations)],
            1000 * seed + i,
            model,
            api_key,
        )
        for i, time in enumerate(times)
    ]


def to_lines(values: Iterable[Ask] | Iterable[Outcome]) -> str:
    return "".join(json.dumps(asdict(value)) + "\n" for value in values)


def asks(lines: Iterable[str]) -> Iterator[Ask]:
    return (Ask(**json.loads(line)) for line in lines)


def outcomes(lines: Iterable[str]) -> Iterator[Outcome]:
    for line in lines:
        raw = json.loads(line)
        yield Outcome(**{**raw, "chunks": [(at, seconds) for at, seconds in raw["chunks"]]})
