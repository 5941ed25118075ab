"""Whether a part still works: failures in a row that are no caller's mistake, and a proof when there are too many.

One bad request that a part cannot take must not have the part replaced, again and again: so failures alone condemn
nothing. After some of them the part has to do work that it is known to be able to do; if it cannot, it is broken.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

from musicgen.errors import MusicGenError

logger = logging.getLogger(__name__)

MAX_IN_A_ROW = 3
"""Failures after which a part must prove itself."""


class SelfCheck:
    """Watches the calls of one part.

    Args:
        part: its name, for the log.
        prove: does work that must succeed; nothing that is remembered from before counts.
    """

    def __init__(self, part: str, prove: Callable[[], Awaitable[object]]) -> None:
        self._part, self._prove = part, prove
        self._num_in_a_row = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Around one call. An error that is not the project's own is counted, and logged with its traceback here, where
        it happened: callers get only what it says."""
        try:
            yield
        except MusicGenError:
            raise
        except Exception:
            self._num_in_a_row += 1
            logger.exception("%s: failure %d in a row", self._part, self._num_in_a_row)
            raise
        self._num_in_a_row = 0

    async def check(self) -> None:
        """Raises: RuntimeError: the part is broken; its replica must be replaced."""
        if self._num_in_a_row < MAX_IN_A_ROW:
            return
        try:
            await self._prove()
        except Exception as error:
            raise RuntimeError(
                f"{self._part}: {self._num_in_a_row} failures in a row, and the last was: {error}"
            ) from error
        logger.warning("%s: it works, whatever failed %d times in a row", self._part, self._num_in_a_row)
        self._num_in_a_row = 0
