"""Tasks that miss a cancellation still end: `asyncio.wait_for` of Python 3.11 and before makes them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from types import SimpleNamespace
from typing import Any

import pytest
from musicgen_serving import concurrency
from musicgen_serving.concurrency import ahead, ended, together
from musicgen_serving.generation_task import GenerationTask
from musicgen_serving.pipeline import PieceStarted

from musicgen.errors import RequestCancelledError


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(concurrency, "CANCEL_AGAIN_S", 0.02)


class Deaf:
    """Misses the first cancellation, like a `wait_for` that was just done."""

    def __init__(self) -> None:
        self.num_missed = 0

    async def wait(self, seconds: float = 60.0) -> None:
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            if self.num_missed == 1:
                raise
            self.num_missed += 1
            await asyncio.sleep(seconds)


def test_a_deaf_task_is_cancelled_again() -> None:
    async def check() -> None:
        deaf = Deaf()
        task = asyncio.create_task(deaf.wait())
        await asyncio.sleep(0)
        await asyncio.wait_for(ended(task), 5)
        assert task.cancelled()
        assert deaf.num_missed == 1

    asyncio.run(check())


def test_cleaning_up_is_not_disturbed() -> None:
    async def clean() -> str:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            await asyncio.sleep(0.005)
            return "clean"
        return ""

    async def check() -> None:
        task = asyncio.create_task(clean())
        await asyncio.sleep(0)
        await ended(task)
        assert task.result() == "clean"

    asyncio.run(check())


def test_together_ends_the_deaf() -> None:
    async def fail() -> None:
        await asyncio.sleep(0)
        raise ValueError("one of them")

    async def check() -> None:
        with pytest.raises(ValueError, match="one of them"):
            await asyncio.wait_for(together(Deaf().wait(), fail()), 5)

    asyncio.run(check())


def test_ahead_ends_the_deaf() -> None:
    async def events() -> AsyncGenerator[int, None]:
        yield 1
        await Deaf().wait()

    async def check() -> None:
        before = asyncio.all_tasks()
        async with aclosing(ahead(events())) as batches:
            assert await anext(batches) == [1]
        assert asyncio.all_tasks() == before

    asyncio.run(asyncio.wait_for(check(), 5))


class DeafPipeline:
    """Goes on with its piece when it is first cancelled, as long as somebody takes what it makes."""

    async def prepare(self, *_: object) -> Any:
        return SimpleNamespace()

    async def run(self, prepared: Any, piece: int, *_: object) -> AsyncGenerator[PieceStarted, None]:
        for _ in range(2):
            yield PieceStarted(piece, 0.0)
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        while True:
            yield PieceStarted(piece, 0.0)


def _task() -> GenerationTask:
    request: Any = SimpleNamespace(pieces=(None,), trace_parent=None, request_id="a", model="demo")
    return GenerationTask(DeafPipeline(), request, None, None)  # type: ignore[arg-type]


def test_a_consumer_that_leaves_a_deaf_maker_is_free() -> None:
    async def check() -> None:
        before = asyncio.all_tasks()
        task = _task()
        async with aclosing(task.events()) as events:
            await anext(events)
            await asyncio.sleep(0.01)  # it fills up and waits for room
        assert asyncio.all_tasks() == before

    asyncio.run(asyncio.wait_for(check(), 5))


def test_a_deaf_maker_that_is_stopped_ends_its_consumer() -> None:
    async def check() -> None:
        before = asyncio.all_tasks()
        task = _task()
        events = task.events()
        for _ in range(3):
            await anext(events)
        task.stop(RequestCancelledError("enough"))
        with pytest.raises(RequestCancelledError, match="enough"):
            await anext(events)
        assert asyncio.all_tasks() == before

    asyncio.run(asyncio.wait_for(check(), 5))
