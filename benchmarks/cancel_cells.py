"""Runs the cells of the cancellation matrix: waves of streams that are ended at random moments of a phase.

Accesses the service through its URLs and `cancel_types.Service`, wherever it runs.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx2
from musicgen_serving.client import MusicRequest, connect

from benchmarks.cancel_judge import SETTLE_S, is_early, is_late, is_refused, judge, num_over, watch
from benchmarks.cancel_types import MAX_REQUESTS, Cell, Phase, Service
from benchmarks.cancel_victim import Plan, Victim
from benchmarks.reset_proxy import ResetProxy


def run_cell(
    service: Service, way: str, phase: Phase, protocol: str, per_cell: int, proxy: ResetProxy, rng: random.Random
) -> Cell:
    """Waves of victims until `per_cell` of them ended in the intended phase."""
    cell = Cell(way, phase.name, protocol)
    url = service.http if protocol == "http" else service.grpc
    _quick(service, url)
    num_before_last = _calibrate(url, phase) if phase.ready == "last" else 0
    deadline_s, size = phase.deadline_s, phase.wave
    if way == "deadline" and protocol == "grpc":  # the engine rejects deadlines that it does not expect to meet
        deadline_s += {"queued": 4.0, "decode": 1.0}.get(phase.name, 0.3)
        size = 1 if phase.name == "prefill" else size  # another one would be rejected after such a long step
    for wave in itertools.count():
        size = min(size, per_cell - cell.num_hits)
        if size <= 0 or cell.num_lost or wave >= 8 + 4 * per_cell // size:
            break
        if way == "deadline":
            _quick(service, url)
        name = f"{way}-{phase.name.replace(' ', '-')}-{protocol}-{wave}-{rng.randrange(10**9)}"
        base_s = deadline_s if way == "deadline" else 0.0
        plans = [Plan(way, phase.ready, base_s + rng.uniform(0, phase.window_s), num_before_last) for _ in range(size)]
        # The engine predicts when a slot becomes free: a deadline must lie after that.
        with _blockers(service, phase, 2.0 if way == "deadline" and protocol == "grpc" else 20.0):
            victims = _run_wave(service, url, name, phase, plans, proxy, cell)
        early = sum(is_refused(v) or is_early(v, phase) for v in victims)
        late = sum(v.whole or is_late(v, phase) for v in victims)
        deadline_s *= 1.25 if early > size / 2 else 0.8 if late > size / 2 else 1.0
    _at_rest(service, cell)
    return cell


def _run_wave(
    service: Service, url: str, name: str, phase: Phase, plans: list[Plan], proxy: ResetProxy, cell: Cell
) -> list[Victim]:
    before = service.load()
    service.delay(phase.before)
    victims = []
    for number, plan in enumerate(plans):
        request = MusicRequest("cancel", seed=number, duration_s=phase.duration_s, request_id=f"{name}-{number}")
        victims.append(Victim(url, request, plan, proxy))
    for victim in victims:
        victim.start()
    if phase.ready != "sent" or phase.name == "queued":
        _until(lambda: service.load().num_accepted - before.num_accepted + num_over(victims) >= len(victims), 10)
    else:
        time.sleep(0.1)
    service.delay(phase.after)
    if phase.ready == "sent":
        for victim in victims:
            victim.begin_to_end()
    looks = watch(service, before, victims)
    judge(service, before, victims, phase, looks, cell)
    return victims


def _quick(service: Service, url: str) -> None:
    """Bring the engine's mean step time back to its value without delays."""
    service.delay("")
    with connect(url) as client:
        client.generate("quick", duration_s=1.5, seed=1)


def _calibrate(url: str, phase: Phase) -> int:
    """Number of samples before the last chunk of a piece."""
    with connect(url) as client:
        return [chunk.sample_offset for chunk in client.stream("any", duration_s=phase.duration_s, seed=1)][-1]


@contextmanager
def _blockers(service: Service, phase: Phase, duration_s: float) -> Iterator[None]:
    """For `queued`: requests that occupy all slots of the language model; they disconnect at the end."""
    if phase.name != "queued":
        yield
        return
    url = f"{service.http}/v1/music/generations"
    body = {"num_samples": 8, "duration_s": duration_s, "stream_format": "sse", "prompt": "block"}
    with httpx2.Client(timeout=60) as client:
        streams = [client.stream("POST", url, json=body) for _ in range(MAX_REQUESTS // 8)]
        for stream in streams:
            stream.__enter__()
        try:
            _until(lambda: service.load().num_running == MAX_REQUESTS, 30)
            yield
        finally:
            for stream in streams:
                stream.__exit__(None, None, None)


def _at_rest(service: Service, cell: Cell) -> None:
    """Check that all resources have been released, including those of the blockers."""
    service.delay("")
    deadline = time.monotonic() + SETTLE_S
    load = service.load()
    while load.num_running + load.num_waiting + load.pages_held and time.monotonic() < deadline:
        time.sleep(0.05)
        load = service.load()
    if load.num_running + load.num_waiting + load.pages_held:
        cell.num_lost += 1
        cell.reasons.append(f"at the end, {load.pages_held} pages are still held, {load.num_running} requests running")


def _until(condition: object, timeout_s: float) -> None:
    """Raises: TimeoutError."""
    deadline = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        if time.monotonic() > deadline:
            raise TimeoutError(f"not all requests arrived within {timeout_s:g} s")
        time.sleep(0.01)
