"""Retry policy for lost replicas. Independent of the work that is retried."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from musicgen.errors import InternalError
from musicgen_serving.components import BrokenError, LostError
from musicgen_serving.errors import ReplicaLostError
from musicgen_serving.settings import FailoverSettings

logger = logging.getLogger(__name__)

T = TypeVar("T")


class RepeatedFailure:
    """Distinguishes a failure that recurs on every replica from one that another replica may not have."""

    def __init__(self) -> None:
        self._last: str | None = None

    def check(self, error: BaseException) -> None:
        """Record a failed attempt. Raises: InternalError: a live replica has failed twice in a row in the same way."""
        failure = str(error) if isinstance(error, BrokenError) else None
        if failure is not None and failure == self._last:
            raise InternalError("a service component failed repeatedly with the same error; see the replica logs")
        self._last = failure


class Failover:
    """The remaining attempts of one unit of work. Progress resets them.

    Args:
        what: description of the work, for the log.
        max_attempts: overrides the setting, if smaller.
    """

    def __init__(self, settings: FailoverSettings, what: str, max_attempts: int | None = None) -> None:
        self._settings, self._what = settings, what
        self._max_attempts = min(settings.max_attempts, max_attempts or settings.max_attempts)
        self._num_in_a_row = 0
        self._repetition = RepeatedFailure()
        self.num_failures = 0

    def progress(self) -> None:
        """The work advanced: earlier failures no longer count."""
        self._num_in_a_row = 0
        self._repetition = RepeatedFailure()

    async def lost(self, error: BaseException) -> None:
        """An attempt failed: back off before the next one.

        Raises:
            ReplicaLostError: it was the last attempt.
            InternalError: live replicas fail in the same way, so more attempts are pointless.
        """
        self.num_failures += 1
        self._num_in_a_row += 1
        logger.warning("%s: attempt %d failed: %s", self._what, self._num_in_a_row, _first_line(error))
        self._repetition.check(error)
        if self._num_in_a_row >= self._max_attempts:
            raise ReplicaLostError("a component of the service is unavailable; retry later")
        wait_s = self._settings.backoff_s * 2 ** (self._num_in_a_row - 1)
        await asyncio.sleep(min(wait_s, self._settings.max_backoff_s))


async def call_with_failover(
    settings: FailoverSettings, what: str, call: Callable[[], Awaitable[T]], max_attempts: int | None = None
) -> tuple[T, int]:
    """Call, retrying while replicas are lost. Returns the result and the number of failed attempts.

    Args:
        max_attempts: overrides the setting, if smaller.
    Raises:
        ReplicaLostError: attempts exhausted. InternalError: they fail in the same way. Other errors propagate.
    """
    failover = Failover(settings, what, max_attempts)
    while True:
        try:
            async with asyncio.timeout(settings.call_s):
                return await call(), failover.num_failures
        except (LostError, TimeoutError) as error:
            await failover.lost(error)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
