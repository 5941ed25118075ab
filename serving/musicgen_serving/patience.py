"""How often and how long to try again when a replica is lost. Knows nothing of what is tried."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from musicgen_serving.errors import InternalError, ReplicaLostError
from musicgen_serving.settings import FailoverSettings
from musicgen_serving.spokes import BrokenError, LostError

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Repetition:
    """Tells a failure that is the same wherever it is tried from one that another replica may not have."""

    def __init__(self) -> None:
        self._last: str | None = None

    def check(self, error: BaseException) -> None:
        """An attempt failed so. Raises: InternalError: so did the one before, in a replica that lives."""
        failure = str(error) if isinstance(error, BrokenError) else None
        if failure is not None and failure == self._last:
            raise InternalError("a part of the service failed twice in the same way; its replicas' logs say how")
        self._last = failure


class Patience:
    """The attempts that one piece of work has left. Progress fills them up again.

    Args:
        what: the work, for the log.
        max_attempts: in the place of the settings', if it is less.
    """

    def __init__(self, settings: FailoverSettings, what: str, max_attempts: int | None = None) -> None:
        self._settings, self._what = settings, what
        self._max_attempts = min(settings.max_attempts, max_attempts or settings.max_attempts)
        self._num_in_a_row = 0
        self._repetition = Repetition()
        self.num_failures = 0

    def progress(self) -> None:
        """The work got on: failures before this count no more."""
        self._num_in_a_row = 0
        self._repetition = Repetition()

    async def lost(self, error: BaseException) -> None:
        """An attempt failed: wait before the next.

        Raises:
            ReplicaLostError: that was the last one.
            InternalError: replicas that live fail in the same way: more attempts would too.
        """
        self.num_failures += 1
        self._num_in_a_row += 1
        logger.warning("%s: attempt %d lost: %s", self._what, self._num_in_a_row, _first_line(error))
        self._repetition.check(error)
        if self._num_in_a_row >= self._max_attempts:
            raise ReplicaLostError("the service lost a part of itself and could not replace it in time; retry later")
        wait_s = self._settings.backoff_s * 2 ** (self._num_in_a_row - 1)
        await asyncio.sleep(min(wait_s, self._settings.max_backoff_s))


async def insist(
    settings: FailoverSettings, what: str, call: Callable[[], Awaitable[T]], max_attempts: int | None = None
) -> tuple[T, int]:
    """Call, and again while replicas are lost. Returns the result and how often one was lost.

    Args:
        max_attempts: in the place of the settings', if it is less.
    Raises:
        ReplicaLostError: the attempts are used up. InternalError: they fail alike. Other errors are passed on.
    """
    patience = Patience(settings, what, max_attempts)
    while True:
        try:
            async with asyncio.timeout(settings.call_s):
                return await call(), patience.num_failures
        except (LostError, TimeoutError) as error:
            await patience.lost(error)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
