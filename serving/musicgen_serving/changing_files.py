"""Files that operators replace while the service runs: the list of tenants, certificates and keys.

Owns whether they say something new. Each look reads them instead of asking for their times: they are small, a volume of
Kubernetes changes a link and no file, and two writes may bear the same time. Knows nothing of what they mean.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

LOOK_S = 2.0
"""Between two looks. What is new counts from the second look that finds it, so within twice as long."""


@dataclass(frozen=True, slots=True)
class _Unreadable:
    path: Path
    errno: int


class ChangingFiles:
    """Some files that belong together.

    Args:
        paths: of the files. What they say now is known, and no news.
    """

    def __init__(self, *paths: Path) -> None:
        self._paths = paths
        self._known = self._seen = self._read()

    @property
    def contents(self) -> tuple[bytes, ...]:
        """What is known that they say, in the order of their paths.

        Raises:
            OSError: one of them cannot be read.
        """
        if isinstance(self._known, _Unreadable):
            raise OSError(self._known.errno, os.strerror(self._known.errno), str(self._known.path))
        return self._known

    def have_changed(self) -> bool:
        """Look at them. True, once, if they say something new, and said the same when they were looked at before: what
        is half written at one look is not at the next."""
        before, self._seen = self._seen, self._read()
        if self._seen == self._known or self._seen != before:
            return False
        self._known = self._seen
        return True

    def _read(self) -> tuple[bytes, ...] | _Unreadable:
        contents = []
        for path in self._paths:
            try:
                contents.append(path.read_bytes())
            except OSError as error:
                return _Unreadable(path, error.errno or 0)
        return tuple(contents)


async def keep_looking(look: Callable[[], None]) -> None:
    """Call `look` every few seconds until this is cancelled, in a thread: reading and parsing may take their time.

    An error in it is logged by its kind alone, because its words could show what the files hold.
    """
    while True:
        await asyncio.sleep(LOOK_S)
        try:
            await asyncio.to_thread(look)
        except Exception as error:
            log.error("a look at files that may change failed: %s", type(error).__name__)
