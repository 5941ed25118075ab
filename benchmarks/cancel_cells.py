"""The cells of the cancellation matrix: which race each is after, how it is made to happen, and how it is judged.

Owns what counts as a hit (the end came in the phase that was meant) and what counts as lost (work went on after it).
Knows the service by its URLs and a few looks into it, wherever it runs.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import httpx2
from musicgen_serving.client import MusicRequest, connect
from musicgen_serving.deployments.language_model import Load

from benchmarks.cancel_victim import Plan, Victim
from benchmarks.reset_proxy import ResetProxy
from musicgen.errors import OverloadedError

MAX_REQUESTS = 16
"""Pieces that the language model of the service must be set to decode at the same time."""
SETTLE_S = 10.0
"""What has not ended so long after everybody wanted its end is lost."""
LOOK_S = 0.005


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


def run_cell(
    service: Service, way: str, phase: Phase, protocol: str, per_cell: int, proxy: ResetProxy, rng: random.Random
) -> Cell:
    """Waves of victims until `per_cell` were ended in the phase that was meant."""
    cell = Cell(way, phase.name, protocol)
    url = service.http if protocol == "http" else service.grpc
    _quick(service, url)
    num_before_last = _calibrate(url, phase) if phase.ready == "last" else 0
    deadline_s, size = phase.deadline_s, phase.wave
    if way == "deadline" and protocol == "grpc":  # the engine refuses what it does not foresee to finish in time
        deadline_s += {"queued": 4.0, "decode": 1.0}.get(phase.name, 0.3)
        size = 1 if phase.name == "prefill" else size  # the next one would be refused after so long a step
    for wave in itertools.count():
        size = min(size, per_cell - cell.num_hits)
        if size <= 0 or cell.num_lost or wave >= 8 + 4 * per_cell // size:
            break
        if way == "deadline":
            _quick(service, url)
        name = f"{way}-{phase.name.replace(' ', '-')}-{protocol}-{wave}-{rng.randrange(10**9)}"
        base_s = deadline_s if way == "deadline" else 0.0
        plans = [Plan(way, phase.ready, base_s + rng.uniform(0, phase.window_s), num_before_last) for _ in range(size)]
        # The engine foresees when a place is free: a deadline must lie behind that.
        with _blockers(service, phase, 2.0 if way == "deadline" and protocol == "grpc" else 20.0):
            victims = _run_wave(service, url, name, phase, plans, proxy, cell)
        early = sum(_is_refused(v) or _is_early(v, phase) for v in victims)
        late = sum(v.whole or _is_late(v, phase) for v in victims)
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
        _until(lambda: service.load().num_accepted - before.num_accepted + _num_over(victims) >= len(victims), 10)
    else:
        time.sleep(0.1)
    service.delay(phase.after)
    if phase.ready == "sent":
        for victim in victims:
            victim.begin_to_end()
    looks = _watch(service, before, victims)
    _judge(service, before, victims, phase, looks, cell)
    return victims


def _watch(service: Service, before: Load, victims: list[Victim]) -> list[tuple[float, Load]]:
    """Looks at the language model until it has let go of all victims, or has had time enough."""
    looks = []
    quiet_since: float | None = None
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        load = service.load()
        now = time.monotonic()
        looks.append((now, load))
        if _num_over(victims) < len(victims):
            time.sleep(LOOK_S)
            continue
        quiet_since = quiet_since or now
        is_free = load.num_running + load.num_waiting == before.num_running + before.num_waiting
        if is_free or now - quiet_since > SETTLE_S:
            break
        time.sleep(LOOK_S)
    return looks


def _judge(
    service: Service, before: Load, victims: list[Victim], phase: Phase, looks: list[tuple[float, Load]], cell: Cell
) -> None:
    after = looks[-1][1]
    for victim in victims:
        if not victim.finish(SETTLE_S):
            cell.num_lost += 1
            cell.reasons.append("the client still waits")
            continue
        state = _final_state(service, victim)
        if state == "running" or (state == "finished" and not victim.whole and not phase.lm_may_finish):
            cell.num_lost += 1
            cell.reasons.append(f"the gatekeeper says {state}; the client saw {type(victim.error).__name__}")
        elif victim.whole and victim.answer in ("running", "cancelled"):
            cell.num_lost += 1
            cell.reasons.append(f"it came to its end, though the answer to its being cancelled was {victim.answer}")
        elif victim.whole or _is_refused(victim) or _is_early(victim, phase) or _is_late(victim, phase):
            cell.num_missed += 1
        else:
            cell.num_hits += 1
    left = after.num_running + after.num_waiting - before.num_running - before.num_waiting
    others = max(-left, 0)  # those that took all places have come to their own end
    ran_on = after.num_finished - before.num_finished - sum(v.whole for v in victims) - others
    if phase.lm_may_finish:
        ran_on = 0
    if left > 0 or ran_on > 0:
        cell.num_lost += max(left, 0) + max(ran_on, 0)
        cell.reasons.append(f"{left} still at the language model, {ran_on} ran to their end")
    _releases(before, victims, looks, cell)


def _releases(before: Load, victims: list[Victim], looks: list[tuple[float, Load]], cell: Cell) -> None:
    """Ends wanted and requests let go, both in the order of time, taken as pairs."""
    wanted = sorted(v.ended_at for v in victims if v.ended_at is not None and not v.whole)
    ended_before = before.num_cancelled
    last_at, last = looks[0][0], looks[0][1]
    done: list[tuple[float, int]] = [(last_at, last.num_steps)] * (last.num_cancelled - ended_before)
    for at, load in looks[1:]:
        done += [(at, load.num_steps)] * (load.num_cancelled - last.num_cancelled)
        last = load
    if len(done) != len(wanted):
        return  # some had been let go of before: no pairs
    for wish, (at, steps) in zip(wanted, done, strict=True):
        cell.release_s.append(max(0.0, at - wish))
        steps_then = next((load.num_steps for then, load in looks if then >= wish), steps)
        cell.release_steps.append(max(0, steps - steps_then))


def _final_state(service: Service, victim: Victim) -> str:
    deadline = time.monotonic() + SETTLE_S
    state = "running"
    assert victim.request.request_id is not None
    while state == "running" and time.monotonic() < deadline:
        state = service.state(victim.request.request_id)
        if state == "running":
            time.sleep(0.02)
    return state


def _is_early(victim: Victim, phase: Phase) -> bool:
    if phase.ready == "last":
        return victim.num_samples < victim.plan.num_before_last
    return phase.ready == "first" and victim.num_samples == 0


def _is_late(victim: Victim, phase: Phase) -> bool:
    return phase.ready == "sent" and victim.num_samples > 0


def _is_refused(victim: Victim) -> bool:
    return isinstance(victim.error, OverloadedError)


def _num_over(victims: list[Victim]) -> int:
    return sum(victim.ident is not None and not victim.is_alive() for victim in victims)


def _quick(service: Service, url: str) -> None:
    """Bring the engine's own mean of its step times back to what it is without delays."""
    service.delay("")
    with connect(url) as client:
        client.generate("quick", duration_s=1.5, seed=1)


def _calibrate(url: str, phase: Phase) -> int:
    """Samples of a piece before its last chunk."""
    with connect(url) as client:
        return [chunk.sample_offset for chunk in client.stream("any", duration_s=phase.duration_s, seed=1)][-1]


@contextmanager
def _blockers(service: Service, phase: Phase, duration_s: float) -> Iterator[None]:
    """For `queued`: requests that take all places of the language model; they leave at the end."""
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
    """Everything is back, also what the blockers had."""
    service.delay("")
    deadline = time.monotonic() + SETTLE_S
    load = service.load()
    while load.num_running + load.num_waiting + load.pages_held and time.monotonic() < deadline:
        time.sleep(0.05)
        load = service.load()
    if load.num_running + load.num_waiting + load.pages_held:
        cell.num_lost += 1
        cell.reasons.append(f"at the end {load.pages_held} pages are held, {load.num_running} requests run")


def _until(condition: object, timeout_s: float) -> None:
    """Raises: TimeoutError."""
    deadline = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        if time.monotonic() > deadline:
            raise TimeoutError(f"expected all requests to come in within {timeout_s:g} s, some have not")
        time.sleep(0.01)
