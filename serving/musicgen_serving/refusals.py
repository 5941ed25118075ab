"""The project's own errors between processes: answers, not failures.

Serve takes whatever a method of a replica raises for a failure of the deployment: it logs a traceback and counts an
error. Of a request that is refused neither is true, and most are refused when there is least time for a page of log.
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
    """In place of a result, or of an item of a stream: what was raised. Seen by nobody but `answer`."""

    error: MusicGenError


def told(method: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """A method of a replica that returns a `Refusal` where `method` raises one of the project's own errors.

    Not of a dead engine: that is a failure, and the replica must be replaced.
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
    """As `told`, for a method that is a stream: the refusal is its last item."""

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
    """What a replica answered. Raises: MusicGenError: it refused."""
    if isinstance(result, Refusal):
        raise result.error
    return result
