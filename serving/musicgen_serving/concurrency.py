"""Habits of asyncio that the pipeline needs: receiving ahead of the consumer, waiting for several at once, ending tasks
for certain."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

T = TypeVar("T")

MAX_WAITING = 1024
"""Items that may wait for the consumer of `ahead`: all codes of a long piece. A replica does not wait for who is slow
to take them, so it costs nothing more to know what it has made."""
CANCEL_AGAIN_S = 1.0


async def ahead(events: AsyncGenerator[T, None]) -> AsyncGenerator[list[T], None]:
    """The events, received while the consumer works; those that came meanwhile are handed over together."""
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
    """All results, or the first error, after which nothing goes on."""
    tasks = [asyncio.create_task(call) for call in calls]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        await ended(*tasks)


async def ended(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks and wait until they have ended.

    A task may miss a cancellation: before Python 3.12 `asyncio.wait_for`, which libraries use, forgets one that comes
    in the moment in which what it waits for is there. So it is cancelled again, seldom enough to leave it time to clean
    up.
    """
    while waiting := [task for task in tasks if not task.done()]:
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting, timeout=CANCEL_AGAIN_S)
