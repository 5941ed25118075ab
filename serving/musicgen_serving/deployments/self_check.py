"""Health check of a component: counts consecutive internal failures, and runs a self-test when there are too many.

Failures alone do not mark a component as unhealthy, or a single poisonous request could get replica after replica
replaced. Only a component that also fails a self-test with known-good input is broken.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

from musicgen.errors import MusicGenError

logger = logging.getLogger(__name__)

MAX_IN_A_ROW = 3
"""Consecutive failures that trigger a self-test."""


class SelfCheck:
    """Watches the calls of one component.

    Args:
        part: name of the component, for the log.
        prove: the self-test: does known-good work, bypassing caches.
    """

    def __init__(self, part: str, prove: Callable[[], Awaitable[object]]) -> None:
        self._part, self._prove = part, prove
        self._num_in_a_row = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Wraps one call. Unexpected exceptions are counted, and logged here with their traceback, because callers only
        receive the message."""
        try:
            yield
        except MusicGenError:
            raise
        except Exception:
            self._num_in_a_row += 1
            logger.exception("%s: consecutive failure %d", self._part, self._num_in_a_row)
            raise
        self._num_in_a_row = 0

    async def check(self) -> None:
        """Raises: RuntimeError: the component is broken; its replica must be replaced."""
        if self._num_in_a_row < MAX_IN_A_ROW:
            return
        try:
            await self._prove()
        except Exception as error:
            raise RuntimeError(
                f"{self._part}: self-test failed after {self._num_in_a_row} consecutive failures: {error}"
            ) from error
        logger.warning("%s: self-test passed after %d consecutive failures", self._part, self._num_in_a_row)
        self._num_in_a_row = 0
