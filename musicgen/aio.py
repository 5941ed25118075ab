"""Blocking iterators for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Generator
from typing import TypeVar

T = TypeVar("T")


async def iterate_in_threads(start: Callable[[], Generator[T, None, None]]) -> AsyncGenerator[T, None]:
    """The items of `start()`, which is called and advanced in threads of the loop's default executor.

    Leaving early, or a cancellation, closes the generator once it has returned from its current item.
    """
    loop, end = asyncio.get_running_loop(), object()
    items = await asyncio.to_thread(start)
    pending: asyncio.Future[T | object] | None = None
    try:
        while True:
            pending = loop.run_in_executor(None, next, items, end)
            item = await asyncio.shield(pending)
            if item is end:
                return
            yield item  # type: ignore[misc]  # not `end`
    finally:
        if pending is not None and not pending.done():  # a generator that runs cannot be closed
            await asyncio.wait({pending})
        await asyncio.to_thread(items.close)
