"""Passing `MusicGenError`s between processes as return values.

Serve treats any exception raised by a replica method as a failure of the deployment: it logs a traceback and counts an
error. A rejected request is neither, and rejections peak when there is the least time for writing logs.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from musicgen.errors import EngineDeadError, MusicGenError

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Refusal:
    """An exception in place of a result or stream item. Only seen by `answer`."""

    error: MusicGenError


def told(method: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """Decorates a replica method to return a `Refusal` instead of raising a `MusicGenError`.

    Except for a dead engine: that is a failure, and the replica must be replaced.
    """

    @functools.wraps(method)
    async def wrapped(*args: P.args, **kwargs: P.kwargs) -> Any:
        try:
            return await method(*args, **kwargs)
        except EngineDeadError:
            raise
        except MusicGenError as error:
            return Refusal(error)

    return wrapped


def told_in_stream(method: Callable[P, AsyncGenerator[T, None]]) -> Callable[P, AsyncGenerator[T, None]]:
    """As `told`, for a streaming method: the refusal is the last item."""

    @functools.wraps(method)
    async def wrapped(*args: P.args, **kwargs: P.kwargs) -> AsyncGenerator[Any, None]:
        try:
            async with aclosing(method(*args, **kwargs)) as items:
                async for item in items:
                    yield item
        except EngineDeadError:
            raise
        except MusicGenError as error:
            yield Refusal(error)

    return wrapped


def answer(result: T | Refusal) -> T:
    """The result of a replica call. Raises: MusicGenError: the call was refused."""
    if isinstance(result, Refusal):
        raise result.error
    return result
