"""A cancellation that comes in the moment in which a timed call ends is not forgotten."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from musicgen_serving.code_stream import _timed
from musicgen_serving.deployments.gatekeeper import _wait
from musicgen_serving.deployments.language_model import Alive
from musicgen_serving.failover import call_with_failover
from musicgen_serving.grpc_api.call import Call
from musicgen_serving.http_api.body import read_body
from musicgen_serving.http_api.delivery import Sender
from musicgen_serving.proto.musicgen.v1 import music_service_pb2 as pb
from musicgen_serving.settings import FailoverSettings
from serving.fake_service import TENANT, FakeService


class Answer:
    """Stands for whatever is called: each call waits until `come`."""

    def __init__(self) -> None:
        self.come = asyncio.Event()

    async def write(self, message: object) -> dict[str, Any]:
        await self.come.wait()
        return {"type": "http.request", "body": b""}

    async def receive(self) -> dict[str, Any]:
        return await self.write(None)


async def _grpc_write(answer: Answer) -> None:
    await Call(answer, FakeService(), TENANT, "r", None, None).write(pb.StreamGenerateResponse())  # type: ignore[arg-type]


async def _http_write(answer: Answer) -> None:
    await Sender(answer.write, 5.0).write(b"x")  # type: ignore[arg-type]


async def _http_read(answer: Answer) -> None:
    await read_body(answer, 5.0)  # type: ignore[arg-type]


async def _replica(answer: Answer) -> None:
    await call_with_failover(FailoverSettings(), "codec", answer.receive)


async def _engine(answer: Answer) -> None:
    async def events() -> Any:
        await answer.come.wait()
        yield Alive()
        await asyncio.sleep(5)

    async for _ in _timed(events(), FailoverSettings()):
        pass


async def _gatekeeper(answer: Answer) -> None:
    await _wait(answer.come, 5.0)


@pytest.mark.parametrize("num_turns", range(4))
@pytest.mark.parametrize("wait", [_grpc_write, _http_write, _http_read, _replica, _engine, _gatekeeper])
def test_it_is_cancelled(wait: Callable[[Answer], Awaitable[None]], num_turns: int) -> None:
    """However many turns of the loop have passed since what it waits for was there, unless it has ended."""

    async def run() -> None:
        answer = Answer()
        waiting = asyncio.ensure_future(wait(answer))
        await asyncio.sleep(0.01)
        answer.come.set()
        for _ in range(num_turns):
            await asyncio.sleep(0)
        if waiting.done():
            return
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(waiting, 2)

    asyncio.run(run())
