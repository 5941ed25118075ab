"""Places of tenants, and who goes first in a step: a flood must not keep another tenant's listener waiting."""

from __future__ import annotations

import pytest
from engine.fakes import codes_request, new_core, run_all

from musicgen.engine.core import EngineCore
from musicgen.engine.fairness import Places
from musicgen.engine.sequence import Sequence
from musicgen.types import ChunkPolicy, EngineRequest

STREAM = ChunkPolicy(first_frames=6, max_frames=6)


def test_shares_of_places_follow_the_weights() -> None:
    places = Places(8)
    assert places.has_room("a", 1.0, num_more=4)
    assert not places.has_room("a", 1.0, num_more=5), "whoever runs alone is left half"
    for _ in range(5):
        places.take("a", 1.0)
    assert not places.some_exceed, "nobody else runs"
    places.take("b", 3.0)
    assert places.some_exceed
    assert places.has_room("b", 3.0, num_more=5)
    assert not places.has_room("b", 3.0, num_more=6)
    for _ in range(3):
        places.give_back("a")
    assert not places.some_exceed
    places.give_back("b")
    assert places.has_room("a", 1.0, num_more=2)


def test_one_request_is_everyones_share() -> None:
    places = Places(2)
    for tenant in "abcd":
        places.take(tenant, 1.0)
    assert not places.some_exceed
    assert places.has_room("a", 1.0)
    assert not places.has_room("a", 1.0, num_more=1)


def flooded(max_requests: int = 4) -> EngineCore:
    """An engine all of whose places but the last are `flood`'s streams, one a frame ahead of the other, and all well
    ahead of their listeners."""
    core = new_core(1000, max_requests=max_requests)
    core.add(EngineRequest("known", codes_request(2, text=50), tenant="steady"))
    run_all(core)
    for i in range(9 * max_requests):
        core.add(EngineRequest(f"flood{i}", codes_request(30 + i % 10, text=i), tenant="flood", chunks=STREAM))
    while not core.scheduler.running or min(s.num_frames for s in core.scheduler.running) < 20:
        core.step()
    assert len(core.scheduler.running) == max_requests - 1
    for sequence in core.scheduler.running:
        assert sequence.times.first_chunk is not None
        sequence.times.first_chunk += 1.0
    return core


def running(core: EngineCore) -> dict[str, Sequence]:
    return {s.request.request_id: s for s in core.scheduler.running}


def test_a_tenant_below_its_share_gets_the_next_place() -> None:
    """Although it runs one already, and more of the flood waited before it came."""
    core = flooded(max_requests=6)
    flood = set(running(core))
    for i in range(2):
        core.add(EngineRequest(f"steady{i}", codes_request(40, text=60 + i), tenant="steady", chunks=STREAM))
    core.step()
    assert set(running(core)) == flood | {"steady0"}, "the place that was left is taken at once"
    while "steady1" not in running(core):
        core.step()
        assert set(running(core)) <= flood | {"steady0", "steady1"}, "another went before"
    assert flood & set(running(core)), "it waited for more ends than one"


@pytest.mark.parametrize("stream", [STREAM, None], ids=["a stream", "nobody listens"])
def test_who_hears_nothing_goes_before_those_with_sound_in_hand(stream: ChunkPolicy | None) -> None:
    core = flooded()
    core.add(EngineRequest("steady", codes_request(40, text=60), tenant="steady", chunks=stream))
    core.step()
    before = {name: s.num_frames for name, s in running(core).items()}
    while running(core)["steady"].num_frames < 6:
        core.step()
    others = [s.num_frames - before[name] for name, s in running(core).items() if name.startswith("flood")]
    assert others == ([0] * 3 if stream is not None else [6] * 3)
    core.step()
    core.step()
    assert [s.num_frames - before[name] - others[0] for name, s in running(core).items() if name in before][:3] == [
        2
    ] * 3


def test_who_would_fall_silent_is_not_passed() -> None:
    core = flooded()
    silent = min(core.scheduler.running, key=lambda s: s.num_frames)
    assert silent.times.first_chunk is not None
    silent.times.first_chunk -= 1.0
    core.add(EngineRequest("steady", codes_request(40, text=60), tenant="steady", chunks=STREAM))
    core.step()
    before = {name: s.num_frames for name, s in running(core).items()}
    for _ in range(4):
        core.step()
    advanced = {name: s.num_frames - before[name] for name, s in running(core).items()}
    assert advanced.pop("steady") == advanced.pop(silent.request.request_id) == 4
    assert set(advanced.values()) == {0}


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
