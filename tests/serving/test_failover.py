"""When to try again: what is lost may be found elsewhere, what fails everywhere alike is not tried for long."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from musicgen_serving.components import BrokenError, LostError
from musicgen_serving.errors import ReplicaLostError, report
from musicgen_serving.failover import call_with_failover
from musicgen_serving.settings import FailoverSettings

from musicgen.errors import InternalError

SETTINGS = FailoverSettings(max_attempts=5, backoff_s=0.001, max_backoff_s=0.001)


def attempts(errors: Sequence[Exception]) -> int:
    """How many calls it takes, if those fail so one after the other."""
    left = list(errors)
    num_calls = 0

    async def call() -> None:
        nonlocal num_calls
        num_calls += 1
        if left:
            raise left.pop(0)

    try:
        asyncio.run(call_with_failover(SETTINGS, "part", call))
    except (InternalError, ReplicaLostError) as error:
        error.add_note(str(num_calls))
        raise
    return num_calls


def test_what_is_lost_is_tried_elsewhere() -> None:
    assert attempts([LostError("gone")] * 4) == 5
    assert attempts([TimeoutError()] * 4) == 5
    with pytest.raises(ReplicaLostError):
        attempts([LostError("gone")] * 5)


def test_the_same_failure_of_two_replicas_that_live_is_an_internal_error() -> None:
    with pytest.raises(InternalError) as caught:
        attempts([BrokenError("ValueError: a bug")] * 9)
    assert caught.value.__notes__ == ["2"]
    seen = report(caught.value)
    assert (seen.http_status, seen.grpc_code, seen.code) == (500, "INTERNAL", "internal_error")
    assert "bug" not in seen.message


def test_failures_that_differ_may_be_over_elsewhere() -> None:
    same = BrokenError("RuntimeError: no memory")
    assert (
        attempts(
            [
                same,
                BrokenError("ValueError: a bug"),
                same,
                LostError("gone"),
            ]
        )
        == 5
    )
    assert attempts([same, LostError("gone"), same]) == 4
