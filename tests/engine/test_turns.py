"""Places of tenants, and who goes first in a step: a flood must not keep another tenant's listener waiting."""

from __future__ import annotations

import pytest
from engine.fakes import FakeRunner, Listener, VirtualClock, codes_request, new_core

from musicgen.engine.core import EngineCore
from musicgen.engine.fairness import Places
from musicgen.engine.sequence import Sequence
from musicgen.engine.turns import MAX_EXPEDITED_STEPS, PATIENCE_S, PLAYER_BUFFER_S
from musicgen.types import ChunkPolicy, EngineRequest

STREAM = ChunkPolicy(first_frames=6, max_frames=6)


def asked(**tenants: tuple[int, int, float]) -> Places:
    """Eight places, and tenants that ask for so many, run so many of them, and have a weight."""
    places = Places(8)
    for tenant, (num_asked, num_running, weight) in tenants.items():
        for _ in range(num_asked):
            places.ask(tenant, weight)
        for _ in range(num_running):
            places.take(tenant)
    return places


def test_whoever_asks_for_much_more_than_its_share_floods() -> None:
    assert not asked(a=(6, 6, 1.0), b=(6, 0, 1.0)).some_flood
    places = asked(a=(7, 6, 1.0), b=(6, 0, 1.0))
    assert places.some_flood
    assert places.is_modest("b")
    assert not places.is_modest("a")
    places.leave("a", ran=True)
    assert not places.some_flood
    assert not asked(a=(9, 0, 3.0), b=(3, 0, 1.0)).some_flood
    assert asked(a=(9, 0, 3.0), b=(4, 0, 1.0)).is_modest("a")


def test_a_tenant_by_itself_floods_nobody() -> None:
    places = asked(a=(40, 8, 1.0))
    assert not places.some_flood
    assert not places.is_owed("a", 1.0)
    assert places.is_owed("b", 1.0), "whoever comes now is owed a place"
    places.ask("b", 1.0)
    assert places.is_modest("b")


def test_who_floods_is_owed_its_share_and_who_does_not_what_it_asks_for() -> None:
    places = asked(a=(40, 8, 1.0), b=(40, 3, 1.0))
    assert places.is_owed("b", 1.0), "though it floods too"
    places.take("b")
    assert not places.is_owed("b", 1.0)
    assert not places.is_owed("a", 1.0)
    modest = asked(a=(40, 8, 1.0), b=(6, 5, 1.0))
    assert modest.is_owed("b", 1.0)
    modest.take("b")
    assert not modest.is_owed("b", 1.0)


def test_one_place_is_owed_to_whoever_does_not_flood() -> None:
    """However small its share."""
    places = asked(a=(40, 8, 98.0), b=(1, 0, 1.0), c=(2, 0, 1.0))
    assert places.is_owed("b", 1.0)
    assert not places.is_owed("c", 1.0)
    places.take("b")
    assert not places.is_owed("b", 1.0)


def costly_core(num_pages: int = 1000, max_requests: int = 4, row_s: float = 1e-3) -> EngineCore:
    """An engine whose steps take longer the more rows they have."""
    clock = VirtualClock()
    return new_core(runner=FakeRunner(num_pages, clock, 2e-3, row_s), clock=clock, max_requests=max_requests)


def flooded(max_requests: int = 4, num_pages: int = 1000, row_s: float = 1e-3) -> EngineCore:
    """An engine all of whose places are `flood`'s streams, one a frame ahead of the other, and all well ahead of their
    listeners."""
    core = costly_core(num_pages, max_requests, row_s)
    for i in range(9 * max_requests):
        core.add(EngineRequest(f"flood{i}", codes_request(30 + i % 10, text=i), tenant="flood", chunks=STREAM))
    while not core.scheduler.running or min(s.num_frames for s in core.scheduler.running) < 20:
        core.step()
    assert len(core.scheduler.running) == max_requests
    for sequence in core.scheduler.running:
        assert sequence.times.first_chunk is not None
        sequence.times.first_chunk += 1.0
    return core


def running(core: EngineCore) -> dict[str, Sequence]:
    return {s.request.request_id: s for s in core.scheduler.running}


@pytest.mark.parametrize("stream", [STREAM, None], ids=["a stream", "nobody listens"])
def test_who_hears_nothing_goes_before_those_with_sound_in_hand(stream: ChunkPolicy | None) -> None:
    core = flooded()
    core.add(EngineRequest("steady", codes_request(40, text=60), tenant="steady", chunks=stream))
    core.step()
    before = {name: s.num_frames for name, s in running(core).items()}
    while running(core)["steady"].num_frames < 6:
        core.step()
    others = {s.num_frames - before[name] for name, s in running(core).items() if name.startswith("flood")}
    assert others == ({0} if stream is not None else {6})
    core.step()
    core.step()
    more = {s.num_frames - before[name] for name, s in running(core).items() if name.startswith("flood")}
    assert more == ({2} if stream is not None else {8})


def test_it_goes_first_beyond_the_places_of_the_flood_when_pages_are_short() -> None:
    core = flooded(num_pages=28)
    core.add(EngineRequest("steady", codes_request(40, text=60), tenant="steady", chunks=STREAM))
    core.step()
    assert sum(s.demand().most_pages for s in core.scheduler.running) > 28, "a forecast must say whether it may"
    before = {name: s.num_frames for name, s in running(core).items()}
    for _ in range(4):
        core.step()
    advanced = {name: s.num_frames - before[name] for name, s in running(core).items()}
    assert advanced.pop("steady") == 4
    assert set(advanced.values()) == {0}


def let_slack(core: EngineCore, sequence: Sequence, slack_s: float) -> None:
    """Let the listener be so near to silence."""
    turns, times = core.scheduler._turns, sequence.times
    assert times.first_chunk is not None
    times.first_chunk += slack_s - turns._slack_s(sequence, core._clock(), core._step_times.mean_s)


def advance(core: EngineCore, num_steps: int) -> dict[str, int]:
    """By how many frames each of those that run has advanced."""
    before = {name: s.num_frames for name, s in running(core).items()}
    for _ in range(num_steps):
        core.step()
    return {name: s.num_frames - before[name] for name, s in running(core).items() if name in before}


@pytest.mark.parametrize("row_s", [1e-3, 4e-3], ids=["an engine that keeps up", "a slower one"])
def test_only_the_buffer_of_a_player_is_used_up(row_s: float) -> None:
    """And none where all are slower than playback: it could not be filled again."""
    core = flooded(row_s=row_s)
    near, other = core.scheduler.running[:2]
    core.add(EngineRequest("steady", codes_request(40, text=60), tenant="steady", chunks=STREAM))
    core.step()
    buffer_s = PLAYER_BUFFER_S if row_s == 1e-3 else 0.0
    for sequence in core.scheduler.running:
        if sequence.times.first_chunk is not None:
            let_slack(core, sequence, 3.0)
    let_slack(core, near, 0.02 - buffer_s)
    let_slack(core, other, 0.5 - buffer_s)
    advanced = advance(core, 4)
    assert advanced.pop(other.request.request_id) == 0
    assert advanced.pop("steady") == advanced.pop(near.request.request_id) == 4
    assert set(advanced.values()) == {0}


def test_who_is_silent_is_passed_but_not_in_every_step() -> None:
    """Its listener is no worse off than one who hears nothing yet, whose tenant asks for less."""
    core = flooded()
    silent = min(core.scheduler.running, key=lambda s: s.num_frames)
    chunks = ChunkPolicy(first_frames=40, max_frames=40)
    core.add(EngineRequest("steady", codes_request(40, text=60), tenant="steady", chunks=chunks))
    core.step()
    let_slack(core, silent, -3.0)
    advanced = advance(core, 3 * (MAX_EXPEDITED_STEPS + 1))
    assert advanced.pop("steady") == 3 * (MAX_EXPEDITED_STEPS + 1)
    assert set(advanced.values()) == {3}


def test_only_those_that_are_passed_count_as_silent() -> None:
    """However long the one that goes first has heard nothing, those with sound in hand lose nothing."""
    core = flooded()
    chunks = ChunkPolicy(first_frames=40, max_frames=40)
    core.add(EngineRequest("steady", codes_request(40, text=60), tenant="steady", chunks=chunks))
    core.step()
    admitted = running(core)["steady"].times.admitted
    assert admitted is not None
    running(core)["steady"].times.admitted = admitted - 10 * PATIENCE_S
    advanced = advance(core, MAX_EXPEDITED_STEPS + 5)
    assert advanced.pop("steady") == MAX_EXPEDITED_STEPS + 5
    assert set(advanced.values()) == {0}


def test_a_tenant_within_its_share_is_not_left_to_fall_silent() -> None:
    """Where all together are slower than their listeners, and it alone is not."""
    core = flooded(row_s=4e-3)
    core.add(EngineRequest("steady", codes_request(40, text=60), tenant="steady", chunks=STREAM))
    while "steady" not in running(core) or running(core)["steady"].times.first_chunk is None:
        core.step()
    steady = running(core)["steady"]
    for sequence in core.scheduler.running:
        let_slack(core, sequence, -0.3 if sequence is steady else -1.0)
    advanced = advance(core, 2 * (MAX_EXPEDITED_STEPS + 1))
    assert advanced.pop("steady") == 2 * (MAX_EXPEDITED_STEPS + 1)
    assert set(advanced.values()) == {2}


@pytest.mark.parametrize("heard", [False, True], ids=["unheard", "heard"])
def test_nobody_is_passed_for_nothing(heard: bool) -> None:
    """Where steps are much the same without them; or where even so it would fall silent."""
    core = flooded(row_s=10e-3) if heard else flooded(row_s=1e-5)
    core.add(EngineRequest("steady", codes_request(40, text=60), tenant="steady", chunks=STREAM))
    while "steady" not in running(core) or (heard and running(core)["steady"].times.first_chunk is None):
        core.step()
    for sequence in core.scheduler.running:
        if sequence.times.first_chunk is not None:
            let_slack(core, sequence, -1.0 if heard else 1.0)
    advance(core, 1)  # what a step takes without them may be found out
    assert set(advance(core, 4).values()) == {4}


def test_nobody_prefills_beside_whoever_hears_nothing() -> None:
    core = flooded()
    ending = min(core.scheduler.running, key=lambda s: s.num_steps_left)
    core.abort(ending.request.request_id)  # another of the flood comes in its place
    core.add(EngineRequest("steady", codes_request(40, text=60), tenant="steady", chunks=STREAM))
    core.step()
    (new,) = [s for s in core.scheduler.running if s.request.tenant == "flood" and s.num_frames == 0]
    num_computed = new.num_computed
    while running(core)["steady"].times.first_chunk is None:
        assert new.num_computed == num_computed
        core.step()
    core.step()
    assert new.num_computed > num_computed


def test_the_flood_is_not_put_off_for_ever() -> None:
    """Whoever is passed waits for `PATIENCE_S`, and keeps its pace then, however short the others' pieces are."""
    core = costly_core()
    for i in range(40):
        chunks = None if i % 2 else STREAM
        core.add(EngineRequest(f"flood{i}", codes_request(40, text=i), tenant="flood", chunks=chunks))
    listener = Listener()
    for i in range(400):
        if "steady" not in {s.request.tenant for s in core.scheduler.running}:
            core.add(EngineRequest(f"steady{i}", codes_request(5, text=60), tenant="steady", chunks=STREAM))
        listener.take(core.step())
    longest_s = PATIENCE_S + 40 / 50
    made = sum(s.num_frames for s in core.scheduler.running if s.request.tenant == "flood")
    made += 40 * sum(name.startswith("flood") for name in listener.ends)
    assert made >= 0.8 * 4 * 40 * core._clock() / longest_s


def test_two_that_share_fairly_advance_together() -> None:
    core = new_core(1000, max_requests=4)
    for tenant in "ab":
        for i in range(2):
            core.add(EngineRequest(f"{tenant}{i}", codes_request(40, text=i), tenant=tenant, chunks=STREAM))
    for _ in range(10):
        core.step()
    before = {s: s.num_frames for s in core.scheduler.running}
    for _ in range(10):
        core.step()
    assert [s.num_frames - num_frames for s, num_frames in before.items()] == [10] * 4
