"""Progress over all pieces of a call: a bar or a user callback."""

from __future__ import annotations

from collections.abc import Callable

from tqdm import tqdm

ProgressCallback = Callable[[int, int], None]
"""Called with the frames generated so far and the frames to generate, over all pieces of a call."""


class Progress:
    """Reports completed units of a call as a bar or to a callback, or not at all."""

    def __init__(self, total: int, show: bool, callback: ProgressCallback | None, *, unit: str = "frame") -> None:
        self._total, self._callback, self._done = total, callback, 0
        self.is_shown = show or callback is not None
        self._bar = tqdm(total=total, unit=unit, disable=not show or callback is not None)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def advance(self, count: int) -> None:
        """Record `count` more completed units."""
        self._done += count
        self._bar.update(count)
        if self._callback is not None:
            self._callback(self._done, self._total)
