"""What an error of a handle means to its caller."""

from __future__ import annotations

import pytest
from musicgen_serving.ray_spokes import translated
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
