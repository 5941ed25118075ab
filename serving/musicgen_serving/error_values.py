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
class ErrorValue:
    """An exception in place of a result or stream item. Only seen by `unwrap`."""

    error: MusicGenError


def returns_errors(method: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """Decorates a replica method to return an `ErrorValue` instead of raising a `MusicGenError`.

    Except for a dead engine: that is a failure, and the replica must be replaced.
    """

    @functools.wraps(method)
    async def wrapped(*args: P.args, **kwargs: P.kwargs) -> Any:
        try:
            return await method(*args, **kwargs)
        except EngineDeadError:
            raise
        except MusicGenError as error:
            return ErrorValue(error)

    return wrapped


def streams_errors(method: Callable[P, AsyncGenerator[T, None]]) -> Callable[P, AsyncGenerator[T, None]]:
    """As `returns_errors`, for a streaming method: the error is the last item."""

    @functools.wraps(method)
    async def wrapped(*args: P.args, **kwargs: P.kwargs) -> AsyncGenerator[Any, None]:
        try:
            async with aclosing(method(*args, **kwargs)) as items:
                async for item in items:
                    yield item
        except EngineDeadError:
            raise
        except MusicGenError as error:
            yield ErrorValue(error)

    return wrapped


def unwrap(result: T | ErrorValue) -> T:
    """The result of a replica call. Raises: MusicGenError: the call was refused."""
    if isinstance(result, ErrorValue):
        raise result.error
    return result
