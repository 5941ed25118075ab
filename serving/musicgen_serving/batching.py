"""Dynamic batching: calls that arrive while a batch is running form the next one. When idle, a call starts at once.

Unlike Ray Serve's `@serve.batch`, this also works outside a replica, as in tests.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Batcher(Generic[Item, Result]):
    """Runs a function of several items on a thread, one batch at a time.

    Args:
        compute: returns a result or an error for each item, in order. An exception from it applies to every item.
        executor: where to run `compute`; None: the event loop's default executor.
    """

    def __init__(
        self,
        compute: Callable[[Sequence[Item]], Sequence[Result | Exception]],
        max_batch: int,
        executor: Executor | None = None,
    ) -> None:
        self._compute, self._max_batch, self._executor = compute, max_batch, executor
        self._waiting: deque[tuple[Item, asyncio.Future[Result]]] = deque()
        self._worker: asyncio.Task[None] | None = None
        self.num_calls = 0
        """Calls queued and in flight."""

    async def __call__(self, item: Item) -> Result:
        """The result of one item. Raises: the error that `compute` returned for it."""
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        self.num_calls += 1
        try:
            return await future
        finally:
            self.num_calls -= 1

    def _results(self, items: Sequence[Item]) -> Sequence[Result | Exception]:
        try:
            results = self._compute(items)
        except Exception as error:
            return [error] * len(items)
        if len(results) != len(items):
            return [RuntimeError(f"expected {len(items)} results, got {len(results)}")] * len(items)
        return results

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            batch = [self._waiting.popleft() for _ in range(min(self._max_batch, len(self._waiting)))]
            wanted = [(item, future) for item, future in batch if not future.cancelled()]
            if not wanted:
                continue
            results = await loop.run_in_executor(self._executor, self._results, [item for item, _ in wanted])
            for (_, future), result in zip(wanted, results, strict=True):
                if future.cancelled():
                    continue
                if isinstance(result, Exception):
                    future.set_exception(result)
                else:
                    future.set_result(result)
