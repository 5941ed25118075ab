"""Change detection for files that operators replace at runtime: tenants, certificates and keys.

Polls the contents rather than modification times: the files are small, Kubernetes volumes swap a symlink instead of
writing a file, and two writes may have the same timestamp. Independent of the files' meaning.
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
"""Polling interval. A change takes effect at the second poll that sees it, so within twice this time."""


@dataclass(frozen=True, slots=True)
class _Unreadable:
    path: Path
    errno: int


class WatchedFiles:
    """A group of files that change together.

    Args:
        paths: of the files. Their current contents are the baseline.
    """

    def __init__(self, *paths: Path) -> None:
        self._paths = paths
        self._known = self._seen = self._read()

    @property
    def contents(self) -> tuple[bytes, ...]:
        """The last accepted contents, in the order of the paths.

        Raises:
            OSError: one of the files could not be read.
        """
        if isinstance(self._known, _Unreadable):
            raise OSError(self._known.errno, os.strerror(self._known.errno), str(self._known.path))
        return self._known

    def have_changed(self) -> bool:
        """Poll the files. True, once per change, if the contents are new and identical in two consecutive polls, so
        that half-written files are not picked up."""
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


async def poll(look: Callable[[], None]) -> None:
    """Call `look` every `LOOK_S` seconds until cancelled, in a thread, because reading and parsing may be slow.

    Exceptions are logged by type only, because their messages could reveal file contents.
    """
    while True:
        await asyncio.sleep(LOOK_S)
        try:
            await asyncio.to_thread(look)
        except Exception as error:
            log.error("reloading changed files failed: %s", type(error).__name__)
