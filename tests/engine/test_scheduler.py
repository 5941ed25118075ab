"""Admission, the order of admission, and what a step holds: the promises that no page is ever missing."""

from __future__ import annotations

import random

import pytest
from engine.fakes import FakeRunner, codes_request, new_core, run_all

from musicgen.config import BURST, EngineConfig, SchedulerConfig
from musicgen.engine.core import EngineCore
from musicgen.engine.scheduler import MAX_OWED_SLIP_STEPS, MAX_SLIP_STEPS
from musicgen.engine.sequence import Phase
from musicgen.types import ChunkPolicy, EngineRequest, FinishReason


def test_a_shared_page_is_not_counted_as_freed_when_its_first_holder_ends() -> None:
    """`second` shares the prefix of `first`, which ends soon; its pages stay, beside the growing `other`.

    At the end 7 + 3 pages are needed: `second` has to wait for `other` where there are 9.
    """
    core = new_core(9, max_rows=8)
    core.add(EngineRequest("first", codes_request(2, num_rows=1, text=1, text_len=62)))
    core.add(EngineRequest("other", codes_request(40, num_rows=1, text=2, text_len=1)))
    core.step()
    core.add(EngineRequest("second", codes_request(40, num_rows=1, text=1, text_len=62)))
    assert len(run_all(core).ends) == 3


def test_rows_of_one_request_that_share_pages_do_not_keep_it_out() -> None:
    """Without a melody the melody-only row is the null row; once kept, its pages are shared between the two.

    Three rows of 80 positions (5 pages each) fit 15 pages, and must fit again when some of them are the same page.
    """
    core = new_core(15)
    piece = codes_request(70, num_rows=3, text=2, text_len=36)
    for request_id in ("first", "again"):
        core.add(EngineRequest(request_id, piece))
        assert run_all(core, max_steps=500).ends[request_id].reason is FinishReason.FINISHED


def test_two_that_are_ready_and_unsafe_alone_take_turns() -> None:
    """Both have their prefill, the step holds only one, and no page is left for either to run ahead."""
    core = new_core(15, max_rows=12, max_step_rows=3, max_requests=3)
    core.add(EngineRequest("wide", codes_request(32, num_rows=3, text=1, text_len=45)))
    core.add(EngineRequest("narrow", codes_request(16, num_rows=1, text=2, text_len=14)))
    assert len(run_all(core, max_steps=600).ends) == 2


def served(core: EngineCore, tenants: str, num_each: int, weights: dict[str, float]) -> list[dict[str, float]]:
    """Weighted frames that each tenant was charged, after every step in which all of them still wait."""
    for i in range(num_each):
        for tenant in tenants:
            codes = codes_request(20 if tenant == "a" else 40, num_rows=1, seed=i, text_len=1)
            core.add(EngineRequest(f"{tenant}{i}", codes, tenant=tenant, weight=weights[tenant]))
    history = []
    while {s.request.tenant for s in core.scheduler.waiting.all()} == set(tenants):
        core.step()
        history.append({tenant: core.scheduler.counters[tenant] for tenant in tenants})
    return history


@pytest.mark.parametrize("weights", [{"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 4.0}])
def test_backlogged_tenants_differ_by_one_request_at_most(weights: dict[str, float]) -> None:
    """While both wait and nothing is passed over, the smaller counter goes next: so the gap is one request's."""
    core = new_core(1000, max_requests=2)
    history = served(core, "ab", 30, weights)
    most = max(20 / weights["a"], 40 / weights["b"])
    assert max(abs(counters["a"] - counters["b"]) for counters in history) <= most
    assert len(history) > 300
    last = history[-1]
    assert last["a"] * weights["a"] / (last["b"] * weights["b"]) == pytest.approx(weights["a"] / weights["b"], rel=0.25)


def test_a_pause_earns_no_credit() -> None:
    """Whether others wait when a tenant comes back, or everything is served at once."""
    core = new_core(1000, max_requests=2)
    for i in range(6):  # tenant a is alone for a while; nothing waits at the end of it
        core.add(EngineRequest(f"a{i}", codes_request(40), tenant="a"))
        run_all(core)
    assert core.scheduler.counters["a"] == 6 * 80
    core.add(EngineRequest("b", codes_request(40), tenant="b"))
    assert core.scheduler.counters["b"] == 6 * 80
    assert core.scheduler.counters["a"] == 6 * 80


@pytest.mark.parametrize("max_requests", [2, 4, 8])
def test_whoever_has_less_than_its_share_begins_at_once(max_requests: int) -> None:
    """In places beyond those that a flood can have; they are nobody's for long."""
    core = new_core(1000, max_requests=max_requests)
    burst = int(BURST * max_requests / 2)

    def running(tenant: str = "") -> int:
        return sum(s.request.request_id.startswith(tenant) for s in core.scheduler.running)

    for i in range(9 * max_requests):
        core.add(EngineRequest(f"a{i}", codes_request(40, text=i), tenant="a"))
    for _ in range(20):
        core.step()
        assert running() <= max_requests
    assert running() == max_requests
    for i in range(burst):
        core.add(EngineRequest(f"b{i}", codes_request(20, text=90 + i), tenant="b"))
    core.step()
    assert running("a") == max_requests
    assert running("b") == min(burst, max_requests // 2), "all places are taken, or all that a burst may have"
    while running("a") == max_requests:
        core.step()
    while running("b"):
        core.step()
        assert running() <= max_requests + max_requests // 2
        assert running("a") <= max_requests
    for _ in range(100):
        core.step()
    assert running("a") == max_requests, "the flood has its places again"


def test_whoever_floods_too_gets_its_share_and_no_more() -> None:
    core = new_core(1000, max_requests=6)
    for tenant, weight in {"a": 1.0, "b": 2.0}.items():
        for i in range(40):
            request = codes_request(40, text=i)
            core.add(EngineRequest(f"{tenant}{i}", request, tenant=tenant, weight=weight))
            core.step()
    for _ in range(200):
        core.step()
    held = [sum(s.request.tenant == tenant for s in core.scheduler.running) for tenant in "ab"]
    assert held == [2, 4], "six places by weight"


def test_what_was_not_made_is_given_back() -> None:
    core = new_core()
    core.add(EngineRequest("a", codes_request(40, num_rows=3)))
    for _ in range(12):
        core.step()
    assert core.scheduler.counters[""] == 120
    made = core.scheduler.running[0].num_frames
    assert 0 < made < 40
    core.abort("a")
    assert core.scheduler.counters[""] == 3 * made
    core.add(EngineRequest("waiting", codes_request(40)))
    core.abort("waiting")
    assert core.scheduler.counters[""] == 3 * made


def test_a_large_request_is_not_put_off_by_a_stream_of_small_ones() -> None:
    """Small ones go first while they do not delay it; their prefills, at one position a step, always do a little."""
    core = new_core(12, prefill_tokens=1, max_requests=8)
    for i in range(3):
        core.add(EngineRequest(f"first{i}", codes_request(20, num_rows=1, text=i + 1, text_len=20)))
    core.step()
    core.add(EngineRequest("large", codes_request(40, num_rows=3, text=9, text_len=1)))
    large = next(s for s in core.scheduler.waiting.all() if s.request.request_id == "large")
    num_steps = num_small = 0
    while large.phase is Phase.WAITING:
        if len(core.scheduler.waiting) < 6:
            num_small += 1
            codes = codes_request(4, num_rows=1, text=10 + num_small, text_len=20)
            core.add(EngineRequest(f"small{num_small}", codes))
        core.step()
        num_steps += 1
        assert num_steps < 400, "it starves"


@pytest.mark.parametrize(("slip", "passes"), [(0, True), (MAX_SLIP_STEPS + 1, False)])
def test_nobody_passes_one_that_is_late_for_want_of_pages(slip: int, passes: bool) -> None:
    core = new_core(11, max_requests=8)
    for i in range(2):
        core.add(EngineRequest(f"first{i}", codes_request(20, num_rows=1, text=i + 1, text_len=20)))
    core.step()
    core.add(EngineRequest("large", codes_request(40, num_rows=3, text=9, text_len=1)))
    core.step()
    large = core.scheduler.waiting.next()
    assert large is not None
    large.promised_step = core.scheduler._num_steps + core.scheduler._reserve(large)[0].start - slip
    core.add(EngineRequest("small", codes_request(4, num_rows=1, text=10, text_len=20)))
    core.step()
    assert ("small" in {s.request.request_id for s in core.scheduler.running}) is passes


@pytest.mark.parametrize("seed", range(5))
def test_a_quoted_start_is_not_missed(seed: int) -> None:
    """If nobody comes later, requests of one size start by the step that they were quoted, but for prefills.

    Of mixed sizes the quote is an estimate: small ones that pass may delay those behind the first in turn. A
    prompt of three positions takes a step; so the start may be late by a step for each one that began before.
    """
    rng = random.Random(seed)
    num_frames, num_rows = rng.choice([15, 20, 40]), rng.randint(1, 3)
    core = new_core(20, max_requests=4)
    quotes: dict[str, int] = {}
    for i in range(20):
        codes = codes_request(num_frames, num_rows=num_rows, text=3 + i, text_len=1, seed=i)
        request = EngineRequest(str(i), codes)
        sequence = core._new_sequence(request)
        quotes[str(i)] = core.scheduler.steps_to_start(sequence)
        core.add(request)
    starts: dict[str, int] = {}
    for step in range(2000):
        if not core.has_work:
            break
        core.step()
        for sequence in core.scheduler.running:
            starts.setdefault(sequence.request.request_id, step)
    assert max(quotes.values()) > 40
    late = {i: starts[i] - quote for i, quote in quotes.items() if i in starts}
    assert len(late) == 20
    assert max(late.values()) <= 20


def test_prefill_beside_decodes_keeps_to_its_budget() -> None:
    core = new_core(prefill_tokens=5)
    core.add(EngineRequest("running", codes_request(40)))
    core.step()
    core.step()
    core.add(EngineRequest("long", codes_request(20, text=2, text_len=60)))
    run_all(core)
    assert isinstance(core.runner, FakeRunner)
    assert core.runner.most_prefill_beside_decode == 5


def test_the_listener_nearest_to_silence_goes_first() -> None:
    """When a step cannot hold all: a stream with frames to spare waits for one that has none."""
    core = new_core(max_step_rows=3)
    ahead = EngineRequest("ahead", codes_request(40, num_rows=2, text_len=1), chunks=ChunkPolicy(1, 1))
    core.add(ahead)
    for _ in range(25):
        core.step()
    core.add(EngineRequest("new", codes_request(40, num_rows=2, text=2, text_len=1), chunks=ChunkPolicy(1, 1)))
    before = core.scheduler.running[0].num_frames
    for _ in range(8):
        core.step()
    ahead_of_time, new = core.scheduler.running
    assert ahead_of_time.num_frames <= before + 3
    assert new.num_frames >= 4


def test_a_lower_number_is_admitted_first_whatever_the_shares() -> None:
    core = new_core(max_requests=1)
    for name, tenant, priority in (("usual", "a", 0), ("late", "b", 1), ("next", "a", 0), ("first", "a", -1)):
        core.add(EngineRequest(name, codes_request(5), tenant=tenant, priority=priority))
    assert list(run_all(core).ends) == ["first", "usual", "next", "late"]


def test_a_lower_number_goes_first_in_steps_that_do_not_hold_all() -> None:
    """Until its end, although the other's listener falls silent."""
    core = new_core(max_step_rows=3)
    core.add(EngineRequest("low", codes_request(40), priority=1, chunks=ChunkPolicy(1, 4)))
    for _ in range(10):
        core.step()
    (low,) = core.scheduler.running
    assert low.times.first_chunk is not None
    core.add(EngineRequest("high", codes_request(40, text=2), priority=0, chunks=ChunkPolicy(1, 4)))
    core.step()
    num_frames = low.num_frames
    while core.stats().num_running == 2:
        assert low.num_frames == num_frames
        core.step()
    assert list(run_all(core).ends) == ["low"]


def test_whoever_is_owed_a_place_is_quoted_no_wait() -> None:
    core = new_core(1000, max_requests=4)
    for i in range(20):
        core.add(EngineRequest(f"a{i}", codes_request(40, text=i), tenant="a"))
    for _ in range(5):
        core.step()
    quotes = [core.add(EngineRequest(name, codes_request(40, text=50), tenant=name[0])) for name in ("b0", "a20")]
    assert quotes[0] == 0.0
    assert quotes[1] > 0.0
    core.step()
    assert "b0" in {s.request.request_id for s in core.scheduler.running}


@pytest.mark.parametrize(("slip", "passes"), [(MAX_SLIP_STEPS + 1, True), (MAX_OWED_SLIP_STEPS + 1, False)])
def test_whoever_is_owed_a_place_passes_one_that_is_late_but_not_for_ever(slip: int, passes: bool) -> None:
    core = new_core(1000, max_requests=4)
    for i in range(20):
        core.add(EngineRequest(f"a{i}", codes_request(40, text=i), tenant="a"))
    while len(core.scheduler.running) < 4:
        core.step()
    first = core.scheduler.waiting.next()
    assert first is not None
    first.promised_step = core.scheduler._num_steps + min(s.num_steps_left for s in core.scheduler.running) - slip
    core.add(EngineRequest("b", codes_request(40, text=50), tenant="b"))
    core.step()
    assert ("b" in {s.request.request_id for s in core.scheduler.running}) is passes


def test_prefill_budgets_depend_on_the_device_unless_given() -> None:
    def budgets(config: SchedulerConfig, device_type: str) -> tuple[int | None, int | None]:
        chosen = config.resolved(device_type)
        return chosen.prefill_tokens, chosen.idle_prefill_tokens

    assert budgets(SchedulerConfig(), "cpu") == (64, 512)
    assert budgets(SchedulerConfig(), "cuda") == (256, 2048)
    assert budgets(SchedulerConfig(prefill_tokens=10), "cuda") == (10, 80)
    assert budgets(SchedulerConfig(idle_prefill_tokens=100), "cpu") == (64, 100)
    assert EngineConfig().resolved("cuda").scheduler == SchedulerConfig().resolved("cuda")
