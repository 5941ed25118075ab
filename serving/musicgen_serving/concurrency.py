"""Asyncio helpers: prefetching from a generator, fail-fast gather, reliable cancellation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

T = TypeVar("T")

MAX_WAITING = 1024
"""Queue size of `ahead`: enough for all codes of a long piece. Replicas do not wait for slow consumers, so buffering
here costs nothing extra."""
CANCEL_AGAIN_S = 1.0


async def ahead(events: AsyncGenerator[T, None]) -> AsyncGenerator[list[T], None]:
    """The events, received in the background while the consumer works; yields all that have arrived at once."""
    queue: asyncio.Queue[T | BaseException | None] = asyncio.Queue(MAX_WAITING)

    async def receive() -> None:
        try:
            async with aclosing(events):
                async for event in events:
                    await queue.put(event)
            await queue.put(None)
        except Exception as error:
            await queue.put(error)

    receiver = asyncio.create_task(receive())
    try:
        while True:
            batch = [await queue.get()]
            while not queue.empty():
                batch.append(queue.get_nowait())
            ready = [event for event in batch if not (event is None or isinstance(event, BaseException))]
            if ready:
                yield ready
            if batch[-1] is None:
                return
            if isinstance(batch[-1], BaseException):
                raise batch[-1]
    finally:
        await ended(receiver)


async def together(*calls: Coroutine[Any, Any, Any]) -> list[Any]:
    """All results, or the first error, after which the other calls are cancelled."""
    tasks = [asyncio.create_task(call) for call in calls]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        await ended(*tasks)


async def ended(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks and wait until they have ended.

    A task may miss a cancellation: before Python 3.12, `asyncio.wait_for`, which libraries use, drops one that arrives
    just as its awaitable completes. Tasks are therefore cancelled repeatedly, at intervals long enough for cleanup.
    """
    while waiting := [task for task in tasks if not task.done()]:
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting, timeout=CANCEL_AGAIN_S)
