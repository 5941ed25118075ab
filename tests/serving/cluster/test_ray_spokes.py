"""What an error of a handle means to its caller, and which keys the gatekeeper is asked for."""

from __future__ import annotations

import asyncio

import pytest
from musicgen_serving import ray_spokes
from musicgen_serving.admission import Tenant
from musicgen_serving.errors import UnauthenticatedError
from musicgen_serving.ray_spokes import RayGatekeeper, translated
from musicgen_serving.spokes import LostError
from ray.exceptions import ActorDiedError, RayTaskError

from musicgen.errors import EngineDeadError, InvalidRequestError, OverloadedError

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


class Keys(RayGatekeeper):
    """Knows one key; counts what it is asked."""

    def __init__(self) -> None:
        super().__init__(None)  # type: ignore[arg-type]
        self.asked: list[object] = []

    async def _call(self, method: str, *arguments: object) -> Tenant:
        self.asked.append(arguments[0])
        if arguments[0] != "good":
            raise UnauthenticatedError("expected a known API key, got another")
        return Tenant("a", "default", 1.0, 0, None, None)


def test_a_known_key_is_asked_for_once_in_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_spokes, "KNOWN_S", 0.2)

    async def run() -> list[object]:
        keys = Keys()
        for _ in range(3):
            assert (await keys.authenticate("good")).name == "a"
            with pytest.raises(UnauthenticatedError):
                await keys.authenticate("bad")
        await asyncio.sleep(0.25)
        await keys.authenticate("good")
        return keys.asked

    assert asyncio.run(run()) == ["good", "bad", "bad", "bad", "good"]
