"""What an error of a handle means to its caller, and which keys the gatekeeper is asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from typing import Any

import grpc
import pytest
from musicgen_serving import ray_components
from musicgen_serving.admission import Tenant
from musicgen_serving.components import BrokenError, LostError
from musicgen_serving.deployments.gatekeeper import LocalGatekeeper
from musicgen_serving.error_values import ErrorValue
from musicgen_serving.errors import UnauthenticatedError
from musicgen_serving.ray_components import RayComponents, RayGatekeeper, call, translated
from musicgen_serving.settings import load_settings
from musicgen_serving.tenancy import hash_key
from ray.exceptions import ActorDiedError, RayTaskError

from musicgen.errors import EngineDeadError, InvalidRequestError, MusicGenError, OverloadedError
from musicgen.types import CodesRequest, Conditioning, EngineRequest, SamplingParams, Window

REFUSED = OverloadedError("full", retry_after_s=2.0)
BAD = InvalidRequestError("words", "none", param="prompt")


def of_task(cause: Exception) -> RayTaskError:
    return RayTaskError("generate", "a traceback with /paths", cause)


@pytest.mark.parametrize("error", [REFUSED, BAD])
def test_the_projects_own_errors_are_passed_on(error: Exception) -> None:
    assert translated(error) is error
    assert translated(of_task(error)) is error


@pytest.mark.parametrize(
    "error",
    [ActorDiedError(), of_task(ValueError("a bug")), of_task(EngineDeadError("broken")), EngineDeadError("broken")],
    ids=["dead actor", "bug", "dead engine in a task", "dead engine"],
)
def test_all_else_is_a_loss(error: BaseException) -> None:
    lost = translated(error)
    assert isinstance(lost, LostError)
    assert "traceback" not in str(lost)


@pytest.mark.parametrize(
    ("error", "is_broken"),
    [
        (of_task(ValueError("a bug")), True),
        (of_task(ValueError("a bug")).as_instanceof_cause(), True),
        (ValueError("a bug"), True),
        (of_task(MemoryError("full")), False),
        (of_task(EngineDeadError("broken")), False),
        (ActorDiedError(), False),
        (grpc.RpcError(), False),
        (RuntimeError("Unexpected error (StatusCode.INTERNAL): gone."), False),
    ],
    ids=str,
)
def test_what_the_replicas_code_raised_is_told_from_what_befell_it(error: BaseException, is_broken: bool) -> None:
    lost = translated(error)
    assert isinstance(lost, LostError)
    assert isinstance(lost, BrokenError) == is_broken
    assert not is_broken or str(lost) == "ValueError: a bug"


class Response:
    """What a handle gives, to be awaited or iterated: an error is raised, for None one waits."""

    def __init__(self, give: Callable[[], object]) -> None:
        self._give = give
        self.num_cancels = 0

    def cancel(self) -> None:
        self.num_cancels += 1

    async def __anext__(self) -> object:
        given = self._give()
        if isinstance(given, BaseException):
            raise given
        if given is None:
            await asyncio.sleep(3600)
        return given

    def __aiter__(self) -> Response:
        return self

    def __await__(self) -> Generator[Any, None, object]:
        return self.__anext__().__await__()


class Handle:
    """One whose every method answers so."""

    def __init__(self, give: Callable[[], object]) -> None:
        self.response = Response(give)

    def options(self, **_: object) -> Handle:
        return self

    def __getattr__(self, name: str) -> Handle:
        return self

    def remote(self, *_: object, **__: object) -> Response:
        return self.response


async def ask(handle: Handle, *, streamed: bool) -> object:
    if not streamed:
        return await call(handle)
    components = RayComponents((handle,) * 4, lease_s=3600.0)  # type: ignore[arg-type]
    request = EngineRequest("1", CodesRequest(((Window(0, 8), Conditioning(None, None)),), SamplingParams(seed=0)))
    async with components.generate(request) as events:
        return await anext(events)


@pytest.mark.parametrize("streamed", [False, True], ids=["call", "stream"])
@pytest.mark.parametrize("error", [grpc.RpcError, asyncio.CancelledError], ids=["connection", "cancelled over there"])
def test_a_replica_that_drops_a_call_is_a_loss(error: type[BaseException], streamed: bool) -> None:
    handle = Handle(error)

    with pytest.raises(LostError):
        asyncio.run(ask(handle, streamed=streamed))
    assert handle.response.num_cancels == 1


@pytest.mark.parametrize("streamed", [False, True], ids=["call", "stream"])
def test_a_caller_that_is_cancelled_cancels_the_call(streamed: bool) -> None:
    handle = Handle(lambda: None)

    async def run() -> None:
        task = asyncio.create_task(ask(handle, streamed=streamed))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert handle.response.num_cancels == 1


@pytest.mark.parametrize("streamed", [False, True], ids=["call", "stream"])
@pytest.mark.parametrize("error", [REFUSED, BAD], ids=["overloaded", "invalid"])
def test_a_refusal_that_is_answered_is_raised(error: MusicGenError, streamed: bool) -> None:
    with pytest.raises(type(error)) as caught:
        asyncio.run(ask(Handle(lambda: ErrorValue(error)), streamed=streamed))
    assert caught.value is error


class Keys(RayGatekeeper):
    """Knows one key; counts what it is asked."""

    def __init__(self) -> None:
        super().__init__(Handle(lambda: None))  # type: ignore[arg-type]
        self.asked: list[object] = []

    async def _call(self, method: str, *arguments: object) -> Tenant:
        self.asked.append(arguments[0])
        if arguments[0] != hash_key("good"):
            raise UnauthenticatedError("expected a known API key, got another")
        return Tenant("a", "default", 1.0, 0, None, None)


def test_a_known_key_is_asked_for_once_in_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_components, "KNOWN_S", 0.2)

    async def run() -> list[object]:
        keys = Keys()
        for _ in range(3):
            assert (await keys.authenticate("good")).name == "a"
            with pytest.raises(UnauthenticatedError):
                await keys.authenticate("bad")
        await asyncio.sleep(0.25)
        await keys.authenticate("good")
        return keys.asked

    good, bad = hash_key("good"), hash_key("bad")
    assert asyncio.run(run()) == [good, bad, bad, bad, good], "and no key itself goes to another process"


def test_the_gatekeeper_knows_keys_by_their_hashes() -> None:
    access = {"tenants": [{"name": "a", "key_sha256": [hash_key("good")]}]}

    async def run() -> None:
        keeper = LocalGatekeeper(load_settings({"access": access}))
        for find in (keeper.authenticate("good"), keeper.find_tenant(hash_key("good"))):
            assert (await find).name == "a"
        for refuse in (keeper.authenticate(hash_key("good")), keeper.find_tenant("good"), keeper.find_tenant(None)):
            with pytest.raises(UnauthenticatedError):
                await refuse

    asyncio.run(run())
