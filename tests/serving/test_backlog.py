"""The quoted wait against queues worked out by hand, the speed against known ones, and no refusal without need."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from musicgen_serving.backlog import MAX_RETRY_S, MEMORY_S, Backlog, ModelLoad

from musicgen.errors import OverloadedError


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def backlog(
    clock: Clock, *, num_replicas: int = 1, num_slots: int = 2, speed: float = 2.0, max_wait_s: float = 20.0
) -> Backlog:
    return Backlog(num_replicas, num_slots, speed, max_wait_s, clock)


def add(queue: Backlog, request_id: str, audio_s: float, tenant: str = "a", **fields: float) -> None:
    queue.add(
        request_id,
        tenant,
        fields.get("weight", 1.0),
        int(fields.get("priority", 0)),
        audio_s,
        int(fields.get("num_pieces", 1)),
    )


def quote(queue: Backlog, tenant: str = "a", weight: float = 1.0, priority: int = 0) -> float:
    return queue.quote(tenant, weight, priority)


def test_an_idle_service_refuses_nobody_however_slow_it_is() -> None:
    queue = backlog(Clock(), speed=1e-6)
    assert queue.check("a", 1.0, 0) == 0.0
    add(queue, "1", 1e9)
    assert queue.check("a", 1.0, 0) == 0.0  # there is a second slot
    add(queue, "2", 1e9)
    with pytest.raises(OverloadedError) as caught:
        queue.check("a", 1.0, 0)
    assert caught.value.retry_after_s == MAX_RETRY_S


def test_the_wait_is_when_a_slot_is_free() -> None:
    # Two slots at 2 seconds of audio a second: each moves at 1.
    queue = backlog(Clock())
    add(queue, "1", 10.0)
    add(queue, "2", 6.0)
    assert quote(queue) == pytest.approx(6.0)
    add(queue, "3", 5.0)  # follows 2, until 11
    assert quote(queue) == pytest.approx(10.0)  # follows 1
    add(queue, "4", 1.0)  # follows 1, until 11
    assert quote(queue) == pytest.approx(11.0)
    assert queue.load().wait_s == pytest.approx(11.0)
    assert queue.load().left_s == pytest.approx(22.0)
    queue.remove("2", 0.0)  # 3 takes its slot: 10 and 5, then 4 until 6
    assert quote(queue) == pytest.approx(6.0)


def test_what_was_given_out_is_no_longer_ahead() -> None:
    clock = Clock()
    queue = backlog(clock)
    add(queue, "1", 10.0)
    add(queue, "2", 10.0)
    clock.now += 4.0
    queue.progress("1", 4.0)
    queue.progress("2", 4.0)
    assert queue.speed == pytest.approx(2.0, rel=0.01)
    assert quote(queue) == pytest.approx(6.0, rel=0.01)
    queue.progress("1", 3.0)  # an old report
    assert quote(queue) == pytest.approx(6.0, rel=0.01)


def test_pieces_take_slots_each() -> None:
    queue = backlog(Clock(), num_slots=4, speed=4.0)
    add(queue, "1", 24.0, num_pieces=3)
    assert quote(queue) == 0.0
    add(queue, "2", 10.0, num_pieces=2)  # one of its pieces has to wait: until 13 with 5 + 8
    assert quote(queue) == pytest.approx(5.0)
    add(queue, "3", 2.0)
    queue.remove("1", 0.0)
    assert quote(queue) == 0.0


def test_more_than_a_slot_each_counts_the_earliest() -> None:
    # Both have begun although there is one slot: what the engine still holds comes first.
    clock = Clock()
    queue = backlog(clock, num_slots=1, speed=1.0)
    add(queue, "1", 2.0)
    add(queue, "2", 10.0)
    clock.now += 2.0
    queue.progress("1", 1.0)
    queue.progress("2", 1.0)
    assert quote(queue) == pytest.approx(9.0)  # not 1: that is when the first of the two ends


def test_a_tenant_waits_for_its_own_flood_and_others_by_weight() -> None:
    queue = backlog(Clock(), num_slots=1, speed=1.0)
    add(queue, "running", 10.0, "flood")
    for index in range(10):
        add(queue, str(index), 10.0, "flood")
    assert quote(queue, "flood") == pytest.approx(110.0)
    assert quote(queue, "quiet") == pytest.approx(20.0)  # the one that runs, and the flood's oldest
    add(queue, "q", 10.0, "quiet")
    assert quote(queue, "quiet") == pytest.approx(40.0)  # its own, and two of the flood's
    assert quote(queue, "quiet", weight=2.0) == pytest.approx(30.0)  # or one
    add(queue, "q2", 10.0, "quiet")
    assert quote(queue, "quiet", weight=2.0) == pytest.approx(50.0)
    assert quote(queue, "flood") == pytest.approx(130.0)


def test_many_quiet_tenants_wait_for_each_other() -> None:
    queue = backlog(Clock(), num_slots=1, speed=1.0)
    add(queue, "running", 5.0, "x")
    for index in range(6):
        assert quote(queue, f"t{index}") == pytest.approx(5.0 * (index + 1))
        add(queue, str(index), 5.0, f"t{index}")


def test_priority_goes_before_shares() -> None:
    queue = backlog(Clock(), num_slots=1, speed=1.0)
    add(queue, "running", 10.0, "x")
    add(queue, "low", 7.0, "low", priority=1)
    add(queue, "high", 5.0, "high", priority=-1)
    assert quote(queue, "n", priority=-2) == pytest.approx(10.0)
    assert quote(queue, "n", priority=0) == pytest.approx(15.0)
    assert quote(queue, "n", priority=2) == pytest.approx(22.0)


def test_a_refusal_says_when_the_wait_will_be_short_enough() -> None:
    clock = Clock()
    queue = backlog(clock, num_slots=1, speed=1.0, max_wait_s=20.0)
    add(queue, "1", 30.0)
    with pytest.raises(OverloadedError) as caught:
        queue.check("a", 1.0, 0)
    retry_s = caught.value.retry_after_s
    assert retry_s == pytest.approx(10.0)
    for _ in range(10):
        clock.now += 1.0
        queue.progress("1", clock.now - 100.0)
    assert queue.check("a", 1.0, 0) == pytest.approx(20.0, rel=1e-6)


def simulate(queue: Backlog, clock: Clock, num_requests: int, speed: float, lump_s: float, seconds: int) -> None:
    """`num_requests` endless requests that together make `speed`; each gives out whole lumps."""
    for index in range(num_requests):
        add(queue, f"r{index}", 1e9, f"t{index}")
    begin = clock.now
    for _ in range(seconds):
        clock.now += 1.0
        for index in range(num_requests):
            done_s = (clock.now - begin) * speed / num_requests
            queue.progress(f"r{index}", done_s // lump_s * lump_s)
    for index in range(num_requests):
        queue.remove(f"r{index}", 0.0)


@pytest.mark.parametrize("lump_s", [0.1, 5.0, 20.0])
def test_the_speed_of_full_slots_is_found(lump_s: float) -> None:
    clock = Clock()
    queue = backlog(clock, num_slots=4, speed=1.0)
    simulate(queue, clock, 8, 12.0, lump_s, int(8 * MEMORY_S))
    assert queue.speed == pytest.approx(12.0, rel=0.35 if lump_s > 1 else 0.02)
    simulate(queue, clock, 8, 3.0, lump_s, int(8 * MEMORY_S))
    assert queue.speed == pytest.approx(3.0, rel=0.7 if lump_s > 5 else 0.35 if lump_s > 1 else 0.02)


def test_few_pieces_raise_the_speed_but_do_not_lower_it() -> None:
    clock = Clock()
    queue = backlog(clock, num_slots=4, speed=1.0)
    simulate(queue, clock, 1, 3.0, 0.1, 200)
    assert queue.speed == pytest.approx(3.0, rel=0.02)
    simulate(queue, clock, 8, 20.0, 0.1, 200)
    assert queue.speed == pytest.approx(20.0, rel=0.02)
    simulate(queue, clock, 1, 3.0, 0.1, 1000)
    assert queue.speed == pytest.approx(20.0, rel=0.02)
    clock.now += 10_000.0  # idle time says nothing
    assert queue.speed == pytest.approx(20.0, rel=0.02)


def test_time_of_a_silent_engine_counts_when_all_slots_are_taken() -> None:
    clock = Clock()
    queue = backlog(clock, num_slots=2, speed=4.0)
    simulate(queue, clock, 2, 4.0, 0.1, 100)
    for index in range(3):
        add(queue, str(index), 8.0)
    before_s = quote(queue)
    clock.now += 2 * MEMORY_S
    queue.progress("0", 0.01)
    assert quote(queue) > 4 * before_s


def test_time_without_an_engine_says_nothing_of_its_speed() -> None:
    """While the only replica is replaced audio stops; the next one is no slower for that."""
    clock = Clock()
    queue = backlog(clock, speed=4.0)
    add(queue, "1", 40.0)
    add(queue, "2", 40.0)
    add(queue, "3", 40.0)
    before = queue.speed
    queue.set_capacity(0)
    for _ in range(10):
        clock.now += MEMORY_S / 5
        queue.set_capacity(0)
    queue.set_capacity(1)
    assert queue.speed == pytest.approx(before)
    clock.now += MEMORY_S
    queue.set_capacity(1)
    assert queue.speed < before / 1.5, "now it is there and silent"


def test_replicas_bring_slots_and_speed_in_proportion() -> None:
    clock = Clock()
    queue = backlog(clock, num_replicas=2, num_slots=1, speed=1.0)
    for index in range(4):
        add(queue, str(index), 10.0)
    assert queue.speed == pytest.approx(2.0)
    assert quote(queue) == pytest.approx(20.0)
    queue.set_capacity(4)
    assert queue.speed == pytest.approx(4.0)
    assert quote(queue) == pytest.approx(10.0)
    queue.set_capacity(5)
    assert quote(queue) == 0.0
    queue.set_capacity(0)  # all are being replaced
    assert quote(queue) == pytest.approx(40.0)
    queue.set_capacity(2)
    assert queue.speed == pytest.approx(2.0)


def test_what_an_adopted_request_had_made_is_no_speed() -> None:
    clock = Clock()
    queue = backlog(clock, num_slots=1, speed=1.0)
    add(queue, "1", 100.0)
    queue.progress("1", 60.0, counts=False)
    clock.now += 1.0
    queue.progress("1", 61.0)
    assert queue.speed == pytest.approx(1.0, rel=0.01)
    assert quote(queue) == pytest.approx(39.0, rel=0.01)
    assert queue.end_s("1") == pytest.approx(39.0, rel=0.01)


@given(
    st.lists(st.tuples(st.floats(0.1, 60), st.integers(1, 3), st.sampled_from("ab")), max_size=12),
    st.integers(1, 4),
    st.floats(0.5, 8),
)
@settings(max_examples=150, deadline=None)
def test_more_work_never_shortens_a_wait(works: list[tuple[float, int, str]], num_slots: int, speed: float) -> None:
    queue = backlog(Clock(), num_slots=num_slots, speed=speed)
    last = {"a": 0.0, "b": 0.0, "c": 0.0}
    for index, (audio_s, num_pieces, tenant) in enumerate(works):
        add(queue, str(index), audio_s, tenant, num_pieces=num_pieces)
        now = {name: quote(queue, name) for name in last}
        assert all(now[name] >= last[name] - 1e-9 for name in last)
        load = queue.load()
        assert max(now.values()) <= load.wait_s + 1e-9 <= load.left_s * num_slots / speed + 1e-6
        last = now
    for index in range(len(works)):
        queue.remove(str(index), 0.0)
    assert queue.load() == ModelLoad(wait_s=0.0, speed=queue.speed, left_s=0.0, num_requests=0)


def test_a_tenant_below_its_share_is_not_refused_because_another_floods() -> None:
    queue = backlog(Clock(), num_slots=4, speed=0.1)
    for number in range(10):
        add(queue, f"flood {number}", 10.0, tenant="flood")
    with pytest.raises(OverloadedError):
        queue.check("flood", 1.0, 0)
    for number in range(3):  # half of the slots, at equal weights, and half as many again
        assert queue.check("steady", 1.0, 0) > 20.0
        add(queue, f"steady {number}", 10.0, tenant="steady")
    with pytest.raises(OverloadedError):
        queue.check("steady", 1.0, 0)
    assert queue.check("steady", 4.0, 0) > 20.0  # four are fewer than four fifths of six
    with pytest.raises(OverloadedError):
        queue.check("light", 0.1, 1)  # others go before it


def test_bursts_are_for_those_whom_a_flood_keeps_waiting() -> None:
    """Two that share the slots fairly are refused beyond their shares."""
    queue = backlog(Clock(), num_slots=4, speed=0.1)
    for number in range(2):
        for tenant in ("one", "other"):
            add(queue, f"{tenant} {number}", 10.0, tenant=tenant)
    with pytest.raises(OverloadedError):
        queue.check("one", 1.0, 0)
    for number in range(2, 4):
        add(queue, f"other {number}", 10.0, tenant="other")
    assert queue.check("one", 1.0, 0) > 20.0
