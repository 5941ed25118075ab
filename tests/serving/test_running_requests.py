"""The running_requests towards a gatekeeper that is slow: no ticket without a settlement, whoever leaves and when."""

from __future__ import annotations

import asyncio

import pytest
from musicgen_serving import running_requests
from musicgen_serving.admission import AdmissionRequest, Settlement, Ticket
from musicgen_serving.errors import ReplicaLostError
from musicgen_serving.running_requests import RunningRequests

from musicgen.errors import OverloadedError
from musicgen.types import FinishReason

REQUEST = AdmissionRequest("mine", "tenant", "demo", 1.0, num_pieces=2)


class SlowGatekeeper:
    """Admits when told; keeps what was settled."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.refuses = False
        self.settled: list[Settlement] = []

    async def admit(self, request: AdmissionRequest) -> Ticket:
        await self.go.wait()
        if self.refuses:
            raise OverloadedError("full")
        return Ticket(request.request_id, request.tenant, "default", 1.0, 0, 0.0)

    async def settle(self, settlement: Settlement) -> None:
        self.settled.append(settlement)


def test_a_ticket_is_passed_on() -> None:
    async def run() -> None:
        gatekeeper = SlowGatekeeper()
        gatekeeper.go.set()
        ticket = await RunningRequests(gatekeeper).admit(REQUEST)  # type: ignore[arg-type]
        assert ticket.request_id == "mine"
        assert gatekeeper.settled == []

    asyncio.run(run())


@pytest.mark.parametrize("refuses", [False, True])
def test_whoever_leaves_while_being_admitted_leaves_no_ticket_behind(refuses: bool) -> None:
    async def run() -> list[Settlement]:
        gatekeeper = SlowGatekeeper()
        gatekeeper.refuses = refuses
        caller = asyncio.create_task(RunningRequests(gatekeeper).admit(REQUEST))  # type: ignore[arg-type]
        await asyncio.sleep(0.01)
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        gatekeeper.go.set()
        await asyncio.sleep(0.01)
        return gatekeeper.settled

    settled = asyncio.run(run())
    expected = [] if refuses else [("mine", FinishReason.CANCELLED, "demo", 1.0, 2, 0.0)]
    ends = [(s.request_id, s.reason, s.progress) for s in settled]
    assert [(i, r, p.model, p.audio_s, p.num_pieces, p.billed_s) for i, r, p in ends] == expected


def test_what_is_not_settled_yet_is_settled_before_the_replica_goes() -> None:
    async def run() -> list[Settlement]:
        gatekeeper = SlowGatekeeper()
        there = RunningRequests(gatekeeper)  # type: ignore[arg-type]
        caller = asyncio.create_task(there.admit(REQUEST))
        await asyncio.sleep(0.01)
        caller.cancel()
        asyncio.get_running_loop().call_later(0.1, gatekeeper.go.set)
        await there.close()
        return gatekeeper.settled

    assert len(asyncio.run(run())) == 1


class FailingGatekeeper:
    """Fails in ways of its own, and in the ways that are expected; then answers."""

    def __init__(self) -> None:
        self.errors: dict[str, list[Exception]] = {
            "report": [RuntimeError("not foreseen"), ReplicaLostError("gone")],
            "listen": [ReplicaLostError("gone"), RuntimeError("not foreseen")],
        }
        self.answered: set[str] = set()
        self.all_answered = asyncio.Event()

    async def report(self, edge: str, progress: object) -> list[str]:
        return self._answer("report")

    async def wait_cancelled(self, edge: str) -> list[str]:
        answer = self._answer("listen")
        await asyncio.sleep(0.01)
        return answer

    def _answer(self, what: str) -> list[str]:
        if self.errors[what]:
            raise self.errors[what].pop(0)
        self.answered.add(what)
        if len(self.answered) == 2:
            self.all_answered.set()
        return []


def test_no_error_of_the_gatekeeper_ends_the_register(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Edges that are silent lose their requests."""
    monkeypatch.setattr(running_requests, "REPORT_S", 0.01)
    monkeypatch.setattr(running_requests, "RETRY_S", 0.01)

    async def run() -> None:
        gatekeeper = FailingGatekeeper()
        there = RunningRequests(gatekeeper)  # type: ignore[arg-type]
        there.start()
        await asyncio.wait_for(gatekeeper.all_answered.wait(), 5)
        await there.close()

    asyncio.run(run())
    assert sorted(record.levelname for record in caplog.records) == ["ERROR", "ERROR", "WARNING", "WARNING"]
