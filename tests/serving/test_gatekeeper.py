"""The gatekeeper alone: admission, repeats, cancellation, edges that die, and books that always balance."""

from __future__ import annotations

import asyncio
import json
import pickle
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from musicgen_serving.admission import AdmissionRequest, Gatekeeper, Progress, Settlement, Stop, Ticket
from musicgen_serving.deployments.gatekeeper import GRACE_S, LocalGatekeeper
from musicgen_serving.errors import ConflictError, NotFoundError, UnauthenticatedError
from musicgen_serving.settings import ServeSettings, load_settings

from musicgen.errors import InvalidRequestError, OverloadedError, QuotaExceededError
from musicgen.types import FinishReason

START = 1_700_000_040.0 // 86400 * 86400
SILENCE_S = 10.0


opened: list[LocalGatekeeper] = []


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    while opened:
        opened.pop().close()


class Clock:
    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> float:
        return self.now


class Setting:
    """A gatekeeper with its clock, and short forms of its calls."""

    def __init__(self, file: Path | None = None, settings: ServeSettings | None = None, **times: Any) -> None:
        self.clock = Clock()
        values = {
            "models": [{"name": "demo", "max_requests": 2}],
            "admission": {"max_wait_s": 20.0},
            "failover": {"edge_silence_s": SILENCE_S},
            "access": {
                "tenants": [
                    {"name": "a", "key_sha256": ["a" * 64], "tenant_class": "paid"},
                    {"name": "b", "key_sha256": ["b" * 64], "weight": 2.0},
                    {"name": "one", "max_concurrent": 1},
                    {"name": "small", "audio_s_per_minute": 30},
                ],
                "usage_file": file,
            },
        }
        self.settings = settings or load_settings(values)
        self.admitted: dict[str, tuple[Ticket, float]] = {}
        self.superseded: set[str] = set()
        """Ids of requests that a report was told to stop because of a retry."""
        self.keeper = self.new(**times)

    def new(self, **times: Any) -> LocalGatekeeper:
        keeper = LocalGatekeeper(self.settings, clock=self.clock, wall_clock=self.clock, **times)
        opened.append(keeper)
        return keeper

    async def admit(
        self, request_id: str, tenant: str = "a", audio_s: float = 10.0, key: str | None = None, fingerprint: str = ""
    ) -> Ticket:
        ticket = await self.keeper.admit(AdmissionRequest(request_id, tenant, "demo", audio_s, key, fingerprint))
        self.admitted[request_id] = ticket, audio_s
        return ticket

    async def report(self, edge: str, *tickets: Ticket, done_s: float = 0.0, audio_s: float = 10.0) -> list[str]:
        stops = await self.keeper.report(edge, [Progress(t, "demo", audio_s, done_s, done_s) for t in tickets])
        self.superseded.update(stop.serial for stop in stops if stop.superseded)
        return [stop.serial for stop in stops]

    async def settle(
        self,
        which: str | Ticket,
        made_s: float = 10.0,
        reason: FinishReason = FinishReason.FINISHED,
        total_s: float = 0.0,
        code: str | None = None,
    ) -> None:
        """Of a ticket, or of the latest one with this id."""
        ticket, audio_s = self.admitted[which if isinstance(which, str) else which.request_id]
        ticket = ticket if isinstance(which, str) else which
        progress = Progress(ticket, "demo", audio_s, made_s, made_s)
        await self.keeper.settle(Settlement(progress, reason, 0.5, total_s, 0, code))

    async def total(self, name: str) -> int:
        counts = await self.keeper.counts()
        return counts.running if name == "running" else sum(getattr(counts, name).values())


def run(body: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(body(), 20.0)

    asyncio.run(bounded())


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in file.read_text().splitlines()]


def test_it_is_a_gatekeeper() -> None:
    async def body() -> None:
        keeper: Gatekeeper = Setting().keeper
        with pytest.raises(UnauthenticatedError) as caught:
            await keeper.authenticate("no such key")
        assert isinstance(pickle.loads(pickle.dumps(caught.value)), UnauthenticatedError)

    run(body)


def test_a_life_from_admission_to_the_ledger(tmp_path: Path) -> None:
    async def body() -> None:
        s = Setting(tmp_path / "usage")
        ticket = await s.admit("r", "b")
        assert ticket == Ticket("r", "b", "default", 2.0, 0, 0.0, ticket.serial)
        assert ticket.serial
        s.clock.now += 2.0
        assert await s.report("edge", ticket, done_s=4.0) == []
        status = await s.keeper.status("b", "r")
        assert (status.state, status.audio_s, status.done_s, status.age_s) == ("running", 10.0, 4.0, 2.0)
        s.clock.now += 1.0
        await s.settle("r", total_s=3.0)
        await s.settle("r", 0.0, FinishReason.FAILED)  # a second one changes nothing
        status = await s.keeper.status("b", "r")
        assert (status.state, status.done_s, status.error) == ("finished", 10.0, None)
        counts = await s.keeper.counts()
        assert counts.admitted == counts.finished == {("default", "demo"): 1}
        assert counts.failed == counts.cancelled == counts.rejected == {}
        (line,) = lines(tmp_path / "usage")
        assert (line["request_id"], line["reason"], line["billed_s"], line["tenant"]) == ("r", "finished", 10.0, "b")
        await s.keeper.check()

    run(body)


def test_refusals_are_typed_timed_and_counted() -> None:
    async def body() -> None:
        s = Setting()
        await s.admit("1", "one", 30.0)
        with pytest.raises(QuotaExceededError) as concurrent:
            await s.admit("2", "one")
        assert concurrent.value.retry_after_s == pytest.approx(30.0)
        with pytest.raises(InvalidRequestError) as quota:
            await s.admit("2", "small", 31.0)
        assert quota.value.param == "duration_s"
        await s.admit("3", "small", 30.0)
        with pytest.raises(OverloadedError) as overloaded:
            await s.admit("4", "a")
        assert overloaded.value.retry_after_s == pytest.approx(40.0)  # two slots at 0.5 each
        with pytest.raises(NotFoundError):
            await s.keeper.admit(AdmissionRequest("5", "a", "mp3 please", 1.0))
        with pytest.raises(UnauthenticatedError):
            await s.admit("6", "nobody")
        assert (await s.keeper.counts()).rejected == {
            ("default", "demo", "rate_limit_exceeded"): 1,
            ("default", "demo", "invalid_request"): 1,
            ("paid", "demo", "overloaded"): 1,
            ("paid", "", "not_found"): 1,
        }
        assert await s.total("admitted") == await s.total("running") == 2
        assert (await s.keeper.counts()).models["demo"].wait_s == pytest.approx(60.0)
        for request_id in "1", "3":
            await s.settle(request_id)
        await s.admit("2", "one")  # what was refused left nothing behind
        await s.admit("4", "a")
        await s.keeper.check()

    run(body)


def test_audio_that_was_not_made_can_be_asked_for_again() -> None:
    async def body() -> None:
        s = Setting()
        await s.admit("1", "small", 30.0)
        with pytest.raises(QuotaExceededError) as caught:
            await s.admit("2", "small", 10.0)
        assert caught.value.retry_after_s is not None
        await s.settle("1", 19.2, FinishReason.CANCELLED)
        await s.settle("1", 0.0, FinishReason.CANCELLED)
        with pytest.raises(QuotaExceededError):
            await s.admit("2", "small", 10.1)
        await s.admit("2", "small", 10.0)

    run(body)


def test_a_refused_overload_takes_no_allowance_and_quota_no_place() -> None:
    async def body() -> None:
        s = Setting()
        await s.admit("1", "a", 60.0)
        await s.admit("2", "b", 60.0)
        for _ in range(3):
            with pytest.raises(OverloadedError):
                await s.admit("3", "small", 30.0)
        await s.settle("1")
        await s.settle("2")
        await s.admit("3", "small", 30.0)
        for _ in range(3):
            with pytest.raises(QuotaExceededError):
                await s.admit("4", "small", 30.0)
        counts = await s.keeper.counts()
        assert counts.models["demo"].num_requests == 1

    run(body)


def test_other_tenants_see_nothing() -> None:
    async def body() -> None:
        s = Setting()
        await s.admit("r", "a", key="k", fingerprint="f")
        for _ in range(2):
            for call in (s.keeper.status, s.keeper.cancel):
                with pytest.raises(NotFoundError) as other:
                    await call("b", "r")
                with pytest.raises(NotFoundError) as nothing:
                    await call("b", "no such request")
                assert str(other.value) == str(nothing.value)
            await s.settle("r")
        assert (await s.keeper.status("a", "r")).state == "finished"


def test_ids_and_keys_are_each_tenants_own() -> None:
    async def body() -> None:
        s = Setting()
        first = await s.admit("r", "a", key="k", fingerprint="f")
        other = await s.admit("r", "b", key="k", fingerprint="other")
        assert (await s.keeper.cancel("b", "r")).state == "running"
        assert await s.report("edge", first, other) == [other.serial]
        await s.settle(other, 1.0, FinishReason.CANCELLED)
        assert [(await s.keeper.status(tenant, "r")).state for tenant in "ab"] == ["running", "cancelled"]
        await s.settle(first)
        assert [(await s.keeper.status(tenant, "r")).state for tenant in "ab"] == ["finished", "cancelled"]
        await s.keeper.check()

    run(body)


def test_what_ended_is_remembered_for_a_while_and_in_number(tmp_path: Path) -> None:
    async def body() -> None:
        s = Setting(remember_s=100.0, max_remembered=3)
        for index in range(5):
            await s.admit(str(index), key=f"k{index}", fingerprint="f")
            await s.settle(str(index))
        for index in range(5):
            if index < 2:
                with pytest.raises(NotFoundError):
                    await s.keeper.status("a", str(index))
            else:
                await s.keeper.status("a", str(index))
        await s.admit("again", key="k0", fingerprint="other")  # its first use is forgotten
        with pytest.raises(ConflictError):
            await s.admit("again too", key="k4", fingerprint="other")
        s.clock.now += 100.5
        with pytest.raises(NotFoundError):
            await s.keeper.status("a", "4")
        await s.admit("again too", key="k4", fingerprint="other")
        assert len(s.keeper._registry._keys) == 2

    run(body)


def test_cancel_reaches_a_waiting_edge_at_once_and_answers_with_the_end() -> None:
    async def body() -> None:
        s = Setting(poll_s=15.0, cancel_wait_s=15.0)
        ticket = await s.admit("r")
        await s.report("edge", ticket)
        other = asyncio.create_task(s.keeper.wait_cancelled("other edge"))

        async def edge() -> None:
            assert await s.keeper.wait_cancelled("edge") == [Stop(ticket.serial)]
            await s.settle("r", 3.0, FinishReason.CANCELLED)

        task = asyncio.create_task(edge())
        await asyncio.sleep(0)
        status = await asyncio.wait_for(s.keeper.cancel("a", "r"), 5.0)
        assert (status.state, status.done_s) == ("cancelled", 3.0)
        await task
        assert not other.done()
        other.cancel()
        assert (await s.keeper.cancel("a", "r")).state == "cancelled"

    run(body)


def test_cancel_reaches_an_edge_that_comes_later_and_one_that_missed_the_answer() -> None:
    async def body() -> None:
        s = Setting(poll_s=0.01, cancel_wait_s=0.0)
        ticket = await s.admit("r")
        assert await s.keeper.wait_cancelled("edge") == []
        assert (await s.keeper.cancel("a", "r")).state == "running"
        assert await s.keeper.wait_cancelled("edge") == [Stop(ticket.serial)]  # nobody has reported it: all are told
        assert await s.keeper.wait_cancelled("other") == [Stop(ticket.serial)]
        assert await s.keeper.wait_cancelled("edge") == []  # once
        assert await s.report("edge", ticket) == [ticket.serial]  # but every report says it again
        assert await s.report("edge", ticket) == [ticket.serial]
        assert await s.keeper.wait_cancelled("third") == []
        await s.settle("r", 0.0, FinishReason.CANCELLED)
        assert await s.report("edge", ticket) == []  # a report that was under way when it settled
        await s.keeper.check()
        assert await s.total("admitted") == 1

    run(body)


async def pass_time(s: Setting, seconds: float, *alive: tuple[str, Ticket]) -> None:
    """Time with reports of those edges that live."""
    for _ in range(round(seconds * 2)):
        s.clock.now += 0.5
        for edge, ticket in alive:
            await s.report(edge, ticket, done_s=2.0)
        await s.report("idle edge")


def test_requests_of_an_edge_that_died_are_settled_as_cancelled(tmp_path: Path) -> None:
    async def body() -> None:
        s = Setting(tmp_path / "usage")
        dead, alive = await s.admit("dead", "small", 30.0), await s.admit("alive")
        await s.report("edge 1", dead, done_s=4.5, audio_s=30.0)
        await pass_time(s, SILENCE_S + GRACE_S - 0.5, ("edge 2", alive))
        assert await s.total("running") == 2
        await pass_time(s, 2.5, ("edge 2", alive))
        assert (await s.keeper.status("small", "dead")).state == "cancelled"
        assert (await s.keeper.status("a", "alive")).state == "running"
        (line,) = lines(tmp_path / "usage")
        assert (line["request_id"], line["billed_s"], line["error_code"]) == ("dead", 4.5, "edge_lost")
        assert await s.report("edge 1", dead, done_s=9.0) == [dead.serial]  # it was only slow: told to stop
        await s.settle("dead", 9.0)
        assert len(lines(tmp_path / "usage")) == 1
        await s.admit("next", "small", 25.0)  # what it had not made was given back
        await s.keeper.check()

    run(body)


def test_a_ticket_that_no_edge_received_ends_too() -> None:
    async def body() -> None:
        s = Setting()
        await s.admit("r")
        await pass_time(s, SILENCE_S + GRACE_S + 2.0)
        assert await s.total("cancelled") == 1

    run(body)


def test_a_gatekeeper_that_was_held_up_blames_no_edge() -> None:
    async def body() -> None:
        s = Setting()
        tickets = [await s.admit("1"), await s.admit("2")]
        for index, ticket in enumerate(tickets):
            await s.report(f"edge {index}", ticket)
        s.clock.now += 60.0  # its process stood still; then the reports that waited come one after the other
        await s.report("edge 0", tickets[0])
        s.clock.now += 1.5
        await s.report("edge 1", tickets[1])
        await pass_time(s, 20.0, ("edge 0", tickets[0]), ("edge 1", tickets[1]))
        assert await s.total("running") == 2
        assert await s.total("cancelled") == 0

    run(body)


def test_a_new_gatekeeper_takes_over_what_runs(tmp_path: Path) -> None:
    async def body() -> None:
        s = Setting(tmp_path / "usage")
        ticket = await s.admit("r", audio_s=40.0)
        s.keeper = s.new()
        s.clock.now += 1.0
        assert await s.report("edge", ticket, done_s=4.0, audio_s=40.0) == []
        status = await s.keeper.status("a", "r")
        assert (status.state, status.done_s) == ("running", 4.0)
        load = (await s.keeper.counts()).models["demo"]
        assert load.left_s == pytest.approx(36.0)
        assert load.speed == pytest.approx(1.0)  # what was made before says nothing
        with pytest.raises(ConflictError):
            await s.admit("r")
        await s.settle("r", 40.0)
        assert await s.total("finished") == 1
        assert len(lines(tmp_path / "usage")) == 1
        unserved = Progress(Ticket("x", "a", "paid", 1.0, 0, 0.0), "gone", 1.0, 0.0, 0.0)
        assert await s.keeper.report("edge", [unserved]) == []
        assert await s.total("admitted") == 1
        await s.keeper.check()

    run(body)


async def repeat_with_living_edge(s: Setting, request_id: str, key: str | None) -> None:
    ticket = await s.admit("first", "one", key="k", fingerprint="f")
    await s.report("edge", ticket)
    seen: list[Stop] = []

    async def edge() -> None:
        seen.extend(await s.keeper.wait_cancelled("edge"))
        await asyncio.sleep(0.02)
        assert await s.total("admitted") == 1  # the repeat waits for this end
        await s.settle("first", 2.0, FinishReason.CANCELLED)

    task = asyncio.create_task(edge())
    again = await s.admit(request_id, "one", key=key, fingerprint="f")
    await task
    assert seen == [Stop(ticket.serial, superseded=True)]
    assert again.request_id == request_id
    assert (await s.keeper.status("one", request_id)).state == "running"
    assert await s.report("edge", again) == []
    assert await s.keeper.wait_cancelled("edge") == []
    assert (await s.total("admitted"), await s.total("cancelled"), await s.total("running")) == (2, 1, 1)
    await s.keeper.check()


@pytest.mark.parametrize(("request_id", "key"), [("second", "k"), ("first", "k"), ("first", None), ("first", "k2")])
def test_a_repeat_takes_the_place_of_the_first(request_id: str, key: str | None) -> None:
    run(lambda: repeat_with_living_edge(Setting(takeover_s=10.0, poll_s=0.05), request_id, key))


@pytest.mark.parametrize("silent_s", [0.0, 4.0])
def test_a_repeat_need_not_wait_for_an_edge_that_died(tmp_path: Path, silent_s: float) -> None:
    async def body() -> None:
        s = Setting(tmp_path / "usage", takeover_s=3.0 if silent_s else 0.05)
        ticket = await s.admit("r", key="k", fingerprint="f")
        await s.report("dead edge", ticket, done_s=5.0)
        s.clock.now += silent_s
        again = await asyncio.wait_for(s.admit("r", key="k", fingerprint="f"), 0.5)
        (line,) = lines(tmp_path / "usage")
        assert (line["reason"], line["billed_s"], line["error_code"]) == ("cancelled", 5.0, "superseded")
        # The dead edge was only slow.
        assert await s.report("dead edge", ticket, done_s=6.0) == [ticket.serial]
        assert await s.report("new edge", again, done_s=0.0) == []
        assert await s.report("dead edge", ticket, done_s=6.0) == [ticket.serial]
        assert s.superseded == {ticket.serial}
        assert await s.report("new edge", again, done_s=7.0) == []
        await s.settle(ticket, 6.0, FinishReason.CANCELLED, total_s=silent_s + 2.0)  # the first one's end, late
        assert (await s.keeper.status("a", "r")).state == "running"
        s.clock.now += 3.0
        await s.settle("r", 10.0, total_s=3.0)
        assert (await s.keeper.status("a", "r")).state == "finished"
        await s.keeper.check()

    run(body)


def test_the_same_name_for_something_else_is_a_conflict() -> None:
    async def body() -> None:
        s = Setting()
        await s.admit("r", key="k", fingerprint="f")
        for request_id, key, fingerprint in [("r", None, ""), ("r", None, "g"), ("s", "k", "g"), ("r", "k", "g")]:
            with pytest.raises(ConflictError):
                await s.admit(request_id, key=key, fingerprint=fingerprint)
        assert (await s.keeper.counts()).rejected == {("paid", "demo", "conflict"): 4}
        assert await s.keeper.report("edge", []) == []
        assert (await s.keeper.status("a", "r")).state == "running"
        await s.settle("r")
        with pytest.raises(ConflictError):
            await s.admit("s", key="k", fingerprint="g")
        await s.admit("r", key="k", fingerprint="f")
        assert await s.total("admitted") == 2

    run(body)


def test_repeats_at_the_same_moment_leave_one() -> None:
    async def body() -> None:
        s = Setting(takeover_s=0.05)
        await s.admit("0", "one", key="k", fingerprint="f")
        results = await asyncio.gather(
            *(s.admit(str(index), "one", key="k", fingerprint="f") for index in range(1, 5)), return_exceptions=True
        )
        assert all(isinstance(result, Ticket) for result in results)
        assert (await s.total("running"), await s.total("cancelled")) == (1, 4)
        await s.keeper.check()

    run(body)


def test_slow_allowances_let_nobody_pass_twice() -> None:
    async def body() -> None:
        s = Setting()
        gate = asyncio.Event()
        take = s.keeper._quotas.take

        async def slow(*args: Any) -> Any:
            await gate.wait()
            return await take(*args)

        s.keeper._quotas.take = slow  # type: ignore[method-assign]
        first = asyncio.create_task(s.admit("1", "one", key="k", fingerprint="f"))
        await asyncio.sleep(0)
        with pytest.raises(QuotaExceededError):
            await s.admit("2", "one")
        with pytest.raises(ConflictError):
            await s.admit("3", "one", key="k", fingerprint="f")
        with pytest.raises(ConflictError):
            await s.admit("1", "one")
        await s.keeper.check()
        first.cancel()  # whoever asked went away: nothing is left of it
        with pytest.raises(asyncio.CancelledError):
            await first
        gate.set()
        await s.admit("1", "one", key="k", fingerprint="another")
        assert await s.total("admitted") == await s.total("running") == 1
        await s.keeper.check()

    run(body)


def test_replicas_raise_what_is_taken() -> None:
    async def body() -> None:
        s = Setting()
        await s.admit("1", audio_s=60.0)
        await s.admit("2", audio_s=60.0)
        with pytest.raises(OverloadedError):
            await s.admit("3")
        await s.keeper.set_capacity("demo", 2)
        await s.admit("3")

    run(body)


def test_a_repeat_with_the_same_key_is_not_charged_twice(tmp_path: Path) -> None:
    async def body() -> None:
        s = Setting(tmp_path / "usage", remember_s=100.0)
        asked = {"tenant": "small", "audio_s": 20.0, "key": "k", "fingerprint": "f"}
        await s.admit("1", **asked)
        await s.settle("1", 12.0, FinishReason.CANCELLED)
        goes_on = await s.admit("2", **asked)
        assert goes_on.paid_s == 12.0
        with pytest.raises(QuotaExceededError):
            await s.admit("other", "small", 11.0)  # 12 are spent and 8 taken, of 30
        await s.settle("2", 20.0)
        again = await s.admit("3", **asked)
        await s.settle("3", 5.0, FinishReason.CANCELLED)  # what was finished before stays paid
        assert again.paid_s == (await s.admit("4", **asked)).paid_s == 20.0
        await s.settle("4", 20.0)
        assert [line["billed_s"] for line in lines(tmp_path / "usage")] == [12.0, 8.0, 0.0, 0.0]
        assert (await s.keeper.status("small", "4")).done_s == 20.0
        with pytest.raises(QuotaExceededError):
            await s.admit("other", "small", 11.0)
        other_key = await s.admit("5", "small", 10.0, "k5", "f")
        assert other_key.paid_s == 0.0
        await s.settle("5", 0.0, FinishReason.CANCELLED)
        s.clock.now += 100.5
        assert (await s.admit("6", **asked)).paid_s == 0.0  # forgotten
        await s.keeper.check()

    run(body)


def test_a_repeat_that_was_refused_forgets_nothing_that_was_billed() -> None:
    async def body() -> None:
        s = Setting()
        asked = {"tenant": "small", "audio_s": 20.0, "key": "k", "fingerprint": "f"}
        await s.admit("1", **asked)
        await s.settle("1", 12.0, FinishReason.CANCELLED)
        await s.admit("meanwhile", "small", 15.0)
        with pytest.raises(QuotaExceededError):
            await s.admit("2", **asked)
        await s.settle("meanwhile", 0.0, FinishReason.CANCELLED)
        assert (await s.admit("2", **asked)).paid_s == 12.0

    run(body)


def test_what_an_edge_made_and_did_not_give_out_counts_when_it_dies(tmp_path: Path) -> None:
    async def body() -> None:
        s = Setting(tmp_path / "usage", takeover_s=0.01)
        ticket = await s.admit("r", key="k", fingerprint="f")
        await s.keeper.report("edge", [Progress(ticket, "demo", 10.0, 1.0, 7.5)])
        again = await s.admit("r", key="k", fingerprint="f")
        (line,) = lines(tmp_path / "usage")
        assert (line["error_code"], line["billed_s"], again.paid_s) == ("superseded", 7.5, 7.5)

    run(body)


def test_what_ended_while_the_gatekeeper_was_away_is_in_the_ledger_once(tmp_path: Path) -> None:
    async def body() -> None:
        s = Setting(tmp_path / "usage")
        ticket = await s.admit("r", "b", key="k", fingerprint="f")
        s.keeper = s.new()
        await s.settle("r", 9.0, FinishReason.FINISHED)
        assert await s.report("edge", ticket, done_s=4.0) == []  # from before its end: it is not adopted
        await s.settle("r", 9.0, FinishReason.FINISHED)
        assert await s.total("running") == 0
        assert await s.total("admitted") == await s.total("finished") == 1
        (line,) = lines(tmp_path / "usage")
        assert (line["request_id"], line["tenant"], line["asked_s"], line["billed_s"]) == ("r", "b", 10.0, 9.0)
        status = await s.keeper.status("b", "r")
        assert (status.state, status.done_s) == ("finished", 9.0)
        assert (await s.admit("again", "b", key="k", fingerprint="f")).paid_s == 9.0
        await s.keeper.check()

    run(body)


def test_the_late_end_of_an_earlier_request_is_not_that_of_its_repeat(tmp_path: Path) -> None:
    """The first was admitted by the earlier gatekeeper, its repeat with the same id by the new one."""

    async def body() -> None:
        s = Setting(tmp_path / "usage")
        first = await s.admit("r", key="k", fingerprint="f")
        s.keeper = s.new()
        repeat = await s.admit("r", key="k", fingerprint="f")
        assert await s.report("edge", first, done_s=3.0) == [first.serial]
        assert await s.report("new edge", repeat, done_s=1.0) == []
        assert await s.report("edge", first, done_s=4.0) == [first.serial]
        await s.settle(first, 4.0, FinishReason.CANCELLED)
        assert (await s.keeper.status("a", "r")).state == "running"
        await s.settle(repeat, 10.0)
        assert [(line["reason"], line["billed_s"]) for line in lines(tmp_path / "usage")] == [
            ("cancelled", 4.0),
            ("finished", 10.0),
        ]
        await s.keeper.check()

    run(body)


def test_a_new_gatekeeper_knows_the_keys_of_what_runs() -> None:
    async def body() -> None:
        s = Setting(takeover_s=0.01)
        ticket = await s.admit("r", key="k", fingerprint="f")
        s.keeper = s.new(takeover_s=0.01)
        await s.report("edge", ticket, done_s=3.0)
        with pytest.raises(ConflictError):
            await s.admit("other", key="k", fingerprint="g")
        assert (await s.admit("again", key="k", fingerprint="f")).paid_s == 3.0
        assert (await s.total("running"), await s.total("cancelled")) == (1, 1)

    run(body)


def test_its_process_loads_no_torch() -> None:
    """Requests wait while it is replaced: it has to be there quickly."""
    code = "import sys; import musicgen_serving.gatekeeper_replica; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def list_tenants(s: Setting, *tenants: dict[str, Any]) -> None:
    """Write the tenants file anew and let the gatekeeper look at it until it counts."""
    assert s.settings.access.tenants_file is not None
    s.settings.access.tenants_file.write_text(json.dumps(tenants))
    for _ in range(2):
        s.keeper.tenants.look()


def setting_of_file(folder: Path, *tenants: dict[str, Any]) -> Setting:
    file = folder / "tenants.yaml"
    file.write_text(json.dumps(tenants))
    access = {"tenants_file": file, "usage_file": folder / "usage", "open": True}
    models = [{"name": "demo", "max_requests": 2}]
    return Setting(settings=load_settings({"models": models, "access": access}), takeover_s=0.01)


def test_a_tenant_that_is_taken_away_ends_what_it_has_begun(tmp_path: Path) -> None:
    async def body() -> None:
        kept = {"name": "kept", "key_sha256": ["b" * 64]}
        gone = {"name": "gone", "key_sha256": ["a" * 64], "tenant_class": "paid", "audio_s_per_day": 100}
        s = setting_of_file(tmp_path, gone, kept)
        assert (await s.keeper.find_tenant("a" * 64)).name == "gone"
        tickets = [await s.admit(name, "gone", key=name, fingerprint="f") for name in ("1", "2", "3")]
        list_tenants(s, kept)
        with pytest.raises(UnauthenticatedError):
            await s.keeper.find_tenant("a" * 64)
        with pytest.raises(UnauthenticatedError):
            await s.admit("4", "gone")
        with pytest.raises(UnauthenticatedError):
            await s.admit("1", "gone", key="1", fingerprint="f")  # its connection broke: too late to take it up
        s.clock.now += 1.0
        assert await s.report("edge", *tickets, done_s=2.0) == []
        assert (await s.keeper.status("gone", "1")).done_s == 2.0
        await s.settle("1", 10.0)
        assert (await s.keeper.cancel("gone", "2")).state == "running"
        assert await s.report("edge", *tickets[1:], done_s=3.0) == [tickets[1].serial]
        await s.settle("2", 3.0, FinishReason.CANCELLED)
        former, s.keeper = s.keeper, s.new()  # and one that never knew the tenant
        assert await s.report("edge", tickets[2], done_s=4.0) == []
        await s.settle("3", 10.0)
        assert [(line["tenant"], line["reason"], line["billed_s"]) for line in lines(tmp_path / "usage")] == [
            ("gone", "finished", 10.0),
            ("gone", "cancelled", 3.0),
            ("gone", "finished", 10.0),
        ]
        await s.keeper.check()
        assert (await s.keeper.counts()).finished == {("paid", "demo"): 1}
        s.keeper = former
        await s.settle("3", 10.0)
        await s.keeper.check()
        list_tenants(s, {**gone, "audio_s_per_day": 33}, kept)
        await s.admit("5", "gone", 10.0)  # what it used before still counts, what it did not make was given back
        with pytest.raises(QuotaExceededError):
            await s.admit("6", "gone", 1.0)

    run(body)


def test_new_limits_and_weights_hold_for_new_requests(tmp_path: Path) -> None:
    async def body() -> None:
        a = {"name": "a", "key_sha256": ["a" * 64]}
        s = setting_of_file(tmp_path, {**a, "max_concurrent": 2})
        tickets = [await s.admit("1"), await s.admit("2")]
        with pytest.raises(QuotaExceededError):
            await s.admit("3")
        list_tenants(s, {**a, "max_concurrent": 3, "weight": 4.0, "priority": -1, "tenant_class": "paid"})
        ticket = await s.admit("3")
        assert (ticket.weight, ticket.priority, ticket.tenant_class) == (4.0, -1, "paid")
        assert {(t.weight, t.priority, t.tenant_class) for t in tickets} == {(1.0, 0, "default")}
        list_tenants(s, {**a, "max_concurrent": 1})
        assert await s.report("edge", *tickets, ticket, done_s=1.0) == [], "what runs is not cut"
        for request_id in ("1", "2", "3"):
            with pytest.raises(QuotaExceededError):
                await s.admit("4")
            await s.settle(request_id)
        await s.admit("4")
        await s.keeper.check()

    run(body)


def test_a_list_that_changes_during_an_admission_harms_nothing(tmp_path: Path) -> None:
    """A repeat waits for the end of what it repeats; its tenant is taken away meanwhile."""

    async def body() -> None:
        a = {"name": "a", "key_sha256": ["a" * 64], "audio_s_per_day": 100}
        s = setting_of_file(tmp_path, a)
        await s.admit("1", key="k", fingerprint="f")
        await s.report("edge", s.admitted["1"][0], done_s=3.0)
        repeat = asyncio.create_task(s.admit("2", key="k", fingerprint="f"))
        await asyncio.sleep(0)
        assert not repeat.done()
        list_tenants(s)
        await s.settle("1", 4.0, FinishReason.CANCELLED)
        assert (await repeat).paid_s == 4.0
        await s.settle("2", 10.0)
        assert [line["billed_s"] for line in lines(tmp_path / "usage")] == [4.0, 6.0]
        await s.keeper.check()

    run(body)
