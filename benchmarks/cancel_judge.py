"""Evaluates a wave of ended streams: which ended in the intended phase, and which were not cancelled."""

from __future__ import annotations

import time

from musicgen_serving.deployments.language_model import Load

from benchmarks.cancel_types import Cell, Phase, Service
from benchmarks.cancel_victim import Victim
from musicgen.errors import DeadlineTooShortError

SETTLE_S = 10.0
"""A request that has not ended this long after its cancellation counts as lost."""
LOOK_S = 0.005


def watch(service: Service, before: Load, victims: list[Victim]) -> list[tuple[float, Load]]:
    """Samples the language model's load until it has released all victims, or times out."""
    looks = []
    quiet_since: float | None = None
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        load = service.load()
        now = time.monotonic()
        looks.append((now, load))
        if num_over(victims) < len(victims):
            time.sleep(LOOK_S)
            continue
        quiet_since = quiet_since or now
        is_free = load.num_running + load.num_waiting == before.num_running + before.num_waiting
        if is_free or now - quiet_since > SETTLE_S:
            break
        time.sleep(LOOK_S)
    return looks


def judge(
    service: Service, before: Load, victims: list[Victim], phase: Phase, looks: list[tuple[float, Load]], cell: Cell
) -> None:
    """Classify every victim as hit, missed or lost."""
    after = looks[-1][1]
    for victim in victims:
        if not victim.finish(SETTLE_S):
            cell.num_lost += 1
            cell.reasons.append("the client is still waiting")
            continue
        state = _final_state(service, victim)
        if state == "running" or (state == "finished" and not victim.whole and not phase.lm_may_finish):
            cell.num_lost += 1
            cell.reasons.append(f"the gatekeeper says {state}; the client saw {type(victim.error).__name__}")
        elif victim.whole and victim.answer in ("running", "cancelled"):
            cell.num_lost += 1
            cell.reasons.append(f"it finished, although its cancellation was answered with {victim.answer}")
        elif victim.whole or is_refused(victim) or is_early(victim, phase) or is_late(victim, phase):
            cell.num_missed += 1
        else:
            cell.num_hits += 1
    left = after.num_running + after.num_waiting - before.num_running - before.num_waiting
    others = max(-left, 0)  # the blockers have finished
    ran_on = after.num_finished - before.num_finished - sum(v.whole for v in victims) - others
    if phase.lm_may_finish:
        ran_on = 0
    if left > 0 or ran_on > 0:
        cell.num_lost += max(left, 0) + max(ran_on, 0)
        cell.reasons.append(f"{left} still at the language model, {ran_on} ran to completion")
    _releases(before, victims, looks, cell)


def _releases(before: Load, victims: list[Victim], looks: list[tuple[float, Load]], cell: Cell) -> None:
    """Pair cancellations with releases, both in chronological order."""
    wanted = sorted(v.ended_at for v in victims if v.ended_at is not None and not v.whole)
    ended_before = before.num_cancelled
    last_at, last = looks[0][0], looks[0][1]
    done: list[tuple[float, int]] = [(last_at, last.num_steps)] * (last.num_cancelled - ended_before)
    for at, load in looks[1:]:
        done += [(at, load.num_steps)] * (load.num_cancelled - last.num_cancelled)
        last = load
    if len(done) != len(wanted):
        return  # some had been released before: cannot be paired
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


def is_early(victim: Victim, phase: Phase) -> bool:
    """It ended before its phase."""
    if phase.ready == "last":
        return victim.num_samples < victim.plan.num_before_last
    return phase.ready == "first" and victim.num_samples == 0


def is_late(victim: Victim, phase: Phase) -> bool:
    """It ended after its phase."""
    return phase.ready == "sent" and victim.num_samples > 0


def is_refused(victim: Victim) -> bool:
    """The engine rejected its deadline."""
    return isinstance(victim.error, DeadlineTooShortError)


def num_over(victims: list[Victim]) -> int:
    """Victims that have ended."""
    return sum(victim.ident is not None and not victim.is_alive() for victim in victims)
