"""The project's own errors travel between processes as values; all else is raised there."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncGenerator

import pytest
from musicgen_serving.error_values import ErrorValue, returns_errors, streams_errors, unwrap

from musicgen.errors import EngineDeadError, InvalidRequestError, MusicGenError, OverloadedError

REFUSED = OverloadedError("full", retry_after_s=2.0)
BAD = InvalidRequestError("words", "none", param="prompt")
FAILURES = [EngineDeadError("broken"), ValueError("a bug"), asyncio.CancelledError()]


class Part:
    """Doubles numbers, or counts up to one; an error is raised."""

    def __init__(self) -> None:
        self.num_left = 0

    @returns_errors
    async def double(self, what: int | BaseException) -> int:
        if isinstance(what, BaseException):
            raise what
        return 2 * what

    @streams_errors
    async def count(self, end: int, error: BaseException | None = None) -> AsyncGenerator[int, None]:
        try:
            for number in range(end):
                yield number
            if error is not None:
                raise error
        finally:
            self.num_left += 1


@pytest.mark.parametrize("error", [REFUSED, BAD], ids=repr)
def test_a_refusal_is_an_answer(error: MusicGenError) -> None:
    async def run() -> None:
        part = Part()
        assert unwrap(await part.double(4)) == 8
        refusal = pickle.loads(pickle.dumps(await part.double(error)))
        *items, last = [item async for item in part.count(2, error)]
        assert (items, last) == ([0, 1], ErrorValue(error))
        with pytest.raises(type(error)) as caught:
            unwrap(refusal)
        assert (str(caught.value), caught.value.__dict__) == (str(error), error.__dict__)

    asyncio.run(run())


@pytest.mark.parametrize("error", FAILURES, ids=repr)
def test_a_failure_is_raised(error: BaseException) -> None:
    async def run() -> None:
        part = Part()
        with pytest.raises(type(error)):
            await part.double(error)
        with pytest.raises(type(error)):
            async for _ in part.count(2, error):
                pass

    asyncio.run(run())


def test_a_stream_that_is_left_ends_there_too() -> None:
    async def run() -> None:
        part = Part()
        stream = part.count(5)
        await anext(stream)
        await stream.aclose()
        assert part.num_left == 1

    asyncio.run(run())
