"""Many replicas behind a load balancer, which assigns every request to one of them in order of arrival.

Replicas are independent, so each is advanced only when the balancer inspects it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from benchmarks.simulation.fairness_gap import FairnessGap
from benchmarks.simulation.job import Outcome
from benchmarks.simulation.replica import Replica, ReplicaConfig, Use
from benchmarks.simulation.workload import Request

Balancing = Literal["two", "least", "random"]
OnProgress = Callable[[int, int], None]
"""Called with the number of requests sent so far, and the total."""
PROGRESS_EVERY = 1000


@dataclass(frozen=True, slots=True)
class Look:
    """State of the replica that a request was sent to, at that time. Poisson arrivals see time averages."""

    at_s: float
    num_running: int
    num_waiting: int
    page_share: float


@dataclass(frozen=True, slots=True)
class Run:
    """A finished simulation."""

    config: ReplicaConfig
    outcomes: list[Outcome]
    """One per request, in order of arrival."""
    looks: list[Look]
    uses: list[Use]
    """One per replica."""
    fairness: list[FairnessGap]
    """One per replica."""


def run(
    requests: Sequence[Request],
    num_replicas: int,
    config: ReplicaConfig,
    *,
    balancing: Balancing = "two",
    seed: int = 0,
    leaps: bool = True,
    on_progress: OnProgress | None = None,
) -> Run:
    """Serve all requests until the last one has ended.

    Args:
        balancing: two: the less loaded of two random replicas, by remaining row-steps; least: the least loaded of all;
            random: any.
        leaps: False simulates every step individually (slow; the same outcomes).
    """
    replicas = [Replica(i, config, leaps) for i in range(num_replicas)]
    rng = np.random.default_rng((seed, 2))
    num_looked_at = {"two": min(2, num_replicas), "least": num_replicas, "random": 1}[balancing]
    looks = []
    for sent, request in enumerate(requests, 1):
        now = request.arrived_s + config.listening.before_s
        seen = range(num_replicas) if balancing == "least" else _draw(rng, num_replicas, num_looked_at)
        for i in seen:
            replicas[i].advance(now)
        chosen = replicas[min(seen, key=lambda i: replicas[i].load_left)]
        running, waiting = len(chosen.scheduler.running), len(chosen.scheduler.waiting)
        looks.append(Look(now, running, waiting, chosen.allocator.num_held / chosen.allocator.num_pages))
        chosen.submit(request, now)
        if on_progress is not None and sent % PROGRESS_EVERY == 0:
            on_progress(sent, len(requests))
    for replica in replicas:
        replica.advance(float("inf"))
        replica.check()
    outcomes = sorted((o for r in replicas for o in r.outcomes), key=lambda o: o.request.number)
    return Run(config, outcomes, looks, [r.use for r in replicas], [r.fairness for r in replicas])


def _draw(rng: np.random.Generator, num: int, num_drawn: int) -> list[int]:
    """Distinct random replicas."""
    first = int(rng.integers(num))
    if num_drawn == 1:
        return [first]
    return [first, (first + 1 + int(rng.integers(num - 1))) % num]
