"""A tenant beside one that floods, on an engine whose steps take longer the more they compute: what its listeners wait.

The clock is the runner's, so the figures are exact: they are the scheduler's alone, without processors and sockets.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from engine.fakes import CONFIG, FakeLanguageModel, FakeRunner, VirtualClock, codes_request

from musicgen.config import EngineConfig, SchedulerConfig
from musicgen.engine.batch import ScheduledBatch
from musicgen.engine.core import EngineCore
from musicgen.types import ChunkPolicy, EndOfRequest, EngineRequest, Window

NUM_PIECES = 80
"""Of the steady tenant, about."""
PLACES = 8
TOKEN_S = 0.02e-3
"""Of a step's time for each position."""
NUM_WAITING = 14
"""Of the flood; more come, and are refused as admission would."""
PREBUFFER_S = 0.3
"""Of the players."""


class LongLanguageModel(FakeLanguageModel):
    """One whose pieces of some seconds have one window."""

    config = replace(CONFIG, max_duration_s=30.0)


class CostlyRunner(FakeRunner):
    """Computes nothing; its steps take longer the more they would."""

    def __init__(self, clock: VirtualClock, base_s: float, request_s: float) -> None:
        super().__init__(4000)
        self._turned, self._base_s, self._request_s = clock, base_s, request_s

    def run(self, batch: ScheduledBatch) -> np.ndarray:
        num_requests = len({id(chunk.sequence) for chunk in batch.chunks})
        self._turned.now += self._base_s + self._request_s * num_requests + TOKEN_S * batch.num_tokens
        return np.zeros((len(batch.deciding), 2), np.int32)

    def frames(self, slot: int, start: int, end: int) -> torch.Tensor:
        return torch.zeros(2, end - start, dtype=torch.int32)


@dataclass
class Heard:
    """What came of one tenant's pieces."""

    first_s: list[float] = field(default_factory=list)
    """From arrival to the first chunk."""
    audio_s: float = 0.0
    silent_s: float = 0.0

    def percentile(self, percent: float) -> float:
        return float(np.percentile(self.first_s, percent))


def capacity(base_s: float, request_s: float) -> float:
    """Frames a second of an engine whose places are all taken."""
    return PLACES / (base_s + PLACES * (request_s + 2 * TOKEN_S))


def span_s(base_s: float, request_s: float) -> float:
    """For how long requests come."""
    return NUM_PIECES * 6 * 100 / capacity(base_s, request_s)


def play(base_s: float, request_s: float, *, flood: bool) -> dict[str, Heard]:
    """Two tenants: Poisson arrivals at a sixth of what the engine can do; and, if wanted, three times all of it."""
    clock = VirtualClock()
    config = EngineConfig(scheduler=SchedulerConfig(max_requests=PLACES, max_rows=3 * PLACES))
    runner = CostlyRunner(clock, base_s, request_s)
    core = EngineCore(LongLanguageModel(), config, runner=runner, clock=clock)  # type: ignore[arg-type]
    capacity_hz = capacity(base_s, request_s) / 100
    seconds = span_s(base_s, request_s)
    rng = random.Random(5)
    arrivals = []
    for tenant, rate in (("steady", capacity_hz / 6), ("flood", 3 * capacity_hz * flood)):
        at = rng.expovariate(rate) if rate else seconds
        while at < seconds:
            arrivals.append((at, tenant))
            at += rng.expovariate(rate)
    arrivals.sort()
    came: dict[str, float] = {}
    chunks: dict[str, list[tuple[float, float]]] = {}
    while arrivals or core.has_work:
        while arrivals and (arrivals[0][0] <= clock.now or not core.has_work):
            at, tenant = arrivals.pop(0)
            clock.now = max(clock.now, at)
            if sum(s.request.tenant == tenant for s in core.scheduler.waiting.all()) < NUM_WAITING:
                name = f"{tenant}{len(came)}"
                codes = codes_request(
                    windows=[Window(0, rng.choice([50, 100, 150]))], text=rng.randrange(1000), text_len=60
                )
                core.add(EngineRequest(name, codes, tenant=tenant, chunks=ChunkPolicy()))
                came[name] = at
        for event in core.step():
            if not isinstance(event, EndOfRequest):
                chunks.setdefault(event.request_id, []).append((clock.now, event.codes.shape[-1] / 50))
    heard = {"steady": Heard(), "flood": Heard()}
    for name, given in chunks.items():
        tenant = heard[name.rstrip("0123456789")]
        tenant.first_s.append(given[0][0] - came[name])
        empty_at = given[0][0] + PREBUFFER_S
        for at, seconds in given:
            tenant.silent_s += max(0.0, at - empty_at)
            empty_at = max(at, empty_at) + seconds
            tenant.audio_s += seconds
    return heard


STEPS = {
    "steps grow": (1.2e-3, 0.75e-3),
    "steps are much the same": (6e-3, 0.1e-3),
    "all are slower than playback, one is not": (5e-3, 2.5e-3),
    "so is one": (20e-3, 0.5e-3),
}
"""Of an engine: what a step takes, and what for each request more."""


@pytest.mark.parametrize("steps", STEPS)
def test_a_flood_moves_the_first_sound_of_another_tenant_by_less_than_a_quarter(steps: str) -> None:
    base_s, request_s = STEPS[steps]
    alone = play(base_s, request_s, flood=False)["steady"]
    beside = play(base_s, request_s, flood=True)
    steady, flood = beside["steady"], beside["flood"]
    assert len(steady.first_s) == len(alone.first_s) > 60
    assert steady.percentile(95) <= 1.25 * alone.percentile(95)
    assert flood.percentile(50) > 5 * steady.percentile(50), "it was no flood"
    most_s = span_s(base_s, request_s) * capacity(base_s, request_s) / 50
    assert steady.audio_s + flood.audio_s > 0.85 * most_s, "the engine did less than it can"
    if base_s + request_s + 2 * TOKEN_S < 1 / 50:
        assert steady.silent_s < 0.01 * steady.audio_s
    if capacity(base_s, request_s) > 50 * PLACES:
        assert flood.silent_s < 0.01 * flood.audio_s
