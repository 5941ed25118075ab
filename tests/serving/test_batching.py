"""Calls taken together: one batch at a time, each its own result or error, and nothing for callers that left."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import pytest
from musicgen_serving.batching import Batcher


class Doubling:
    """Doubles numbers; a negative one is an error. Waits in each batch until it is let go."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.go = threading.Event()

    def __call__(self, numbers: Sequence[int]) -> list[int | Exception]:
        self.batches.append(list(numbers))
        assert self.go.wait(5)
        return [ValueError(str(number)) if number < 0 else 2 * number for number in numbers]


def test_what_comes_during_a_batch_makes_up_the_next_ones() -> None:
    async def body() -> None:
        compute = Doubling()
        batcher = Batcher(compute, max_batch=3)
        first = asyncio.create_task(batcher(1))
        await asyncio.sleep(0.01)
        others = [asyncio.create_task(batcher(number)) for number in (2, -3, 4, 5)]
        await asyncio.sleep(0.01)
        assert batcher.num_calls == 5
        compute.go.set()
        results = await asyncio.gather(first, *others, return_exceptions=True)
        assert compute.batches == [[1], [2, -3, 4], [5]]
        assert [r if isinstance(r, int) else str(r) for r in results] == [2, 4, "-3", 8, 10]
        assert batcher.num_calls == 0

    asyncio.run(body())


def test_a_caller_that_left_costs_nothing_and_harms_nobody() -> None:
    async def body() -> None:
        compute = Doubling()
        batcher = Batcher(compute, max_batch=8)
        calls = [asyncio.create_task(batcher(number)) for number in range(4)]
        await asyncio.sleep(0.01)  # 0 to 3 are under way as one batch
        late = [asyncio.create_task(batcher(number)) for number in (10, 11)]
        await asyncio.sleep(0.01)
        calls[1].cancel()
        late[0].cancel()
        compute.go.set()
        assert await asyncio.gather(calls[0], calls[2], calls[3], late[1]) == [0, 4, 6, 22]
        assert compute.batches == [[0, 1, 2, 3], [11]]
        with pytest.raises(asyncio.CancelledError):
            await calls[1]

    asyncio.run(body())


def test_what_a_batch_raises_is_every_callers_error_and_the_next_batch_goes_on() -> None:
    batches: list[list[int]] = []

    def compute(numbers: Sequence[int]) -> list[int | Exception]:
        batches.append(list(numbers))
        if 0 in numbers:
            raise RuntimeError("no memory")
        return [2 * number for number in numbers if number > 0]  # one too few where a number is negative

    async def body() -> list[int | BaseException]:
        batcher = Batcher(compute, max_batch=2)
        calls = asyncio.gather(*(batcher(number) for number in (0, 1, 2, -3, 4)), return_exceptions=True)
        return await asyncio.wait_for(calls, 5)

    first, second, third, fourth, last = asyncio.run(body())
    assert batches == [[0, 1], [2, -3], [4]]
    assert all(isinstance(error, RuntimeError) for error in (first, second, third, fourth))
    assert last == 8
