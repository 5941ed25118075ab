"""The register towards a gatekeeper that is slow: no ticket without a settlement, whoever leaves and when."""

from __future__ import annotations

import asyncio
import contextvars

import pytest
from musicgen_serving.admission import AdmissionRequest, Settlement, Ticket
from musicgen_serving.register import Register

from musicgen.errors import OverloadedError
from musicgen.types import FinishReason

REQUEST = AdmissionRequest("mine", "tenant", "demo", 1.0)
of_caller: contextvars.ContextVar[str] = contextvars.ContextVar("of_caller", default="nobody")


class SlowGatekeeper:
    """Admits when told; keeps what was settled and in whose context it was called."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.refuses = False
        self.settled: list[Settlement] = []
        self.contexts: list[str] = []

    async def admit(self, request: AdmissionRequest) -> Ticket:
        self.contexts.append(of_caller.get())
        await self.go.wait()
        if self.refuses:
            raise OverloadedError("full")
        return Ticket(request.request_id, request.tenant, "default", 1.0, 0, 0.0)

    async def settle(self, settlement: Settlement) -> None:
        self.contexts.append(of_caller.get())
        self.settled.append(settlement)


def test_a_ticket_is_passed_on() -> None:
    async def run() -> None:
        gatekeeper = SlowGatekeeper()
        gatekeeper.go.set()
        ticket = await Register(gatekeeper).admit(REQUEST)  # type: ignore[arg-type]
        assert ticket.request_id == "mine"
        assert gatekeeper.settled == []

    asyncio.run(run())


@pytest.mark.parametrize("refuses", [False, True])
def test_whoever_leaves_while_being_admitted_leaves_no_ticket_behind(refuses: bool) -> None:
    async def run() -> list[Settlement]:
        gatekeeper = SlowGatekeeper()
        gatekeeper.refuses = refuses
        caller = asyncio.create_task(Register(gatekeeper).admit(REQUEST))  # type: ignore[arg-type]
        await asyncio.sleep(0.01)
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        gatekeeper.go.set()
        await asyncio.sleep(0.01)
        return gatekeeper.settled

    settled = asyncio.run(run())
    expected = [] if refuses else [("mine", FinishReason.CANCELLED, 0.0)]
    assert [(s.request_id, s.reason, s.billed_s) for s in settled] == expected


def test_the_gatekeeper_is_not_called_in_the_context_of_a_request() -> None:
    """Ray Serve knows by the context which calls to cancel when a client has left; these must not be among them."""

    async def run() -> list[str]:
        of_caller.set("a request")
        gatekeeper = SlowGatekeeper()
        caller = asyncio.create_task(Register(gatekeeper).admit(REQUEST))  # type: ignore[arg-type]
        await asyncio.sleep(0.01)
        caller.cancel()
        gatekeeper.go.set()
        await asyncio.sleep(0.01)
        return gatekeeper.contexts

    assert asyncio.run(run()) == ["nobody", "nobody"]
