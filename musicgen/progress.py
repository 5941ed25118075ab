"""Progress over the pieces of a call: a bar, or the caller's own function."""

from __future__ import annotations

from collections.abc import Callable

from tqdm import tqdm

ProgressCallback = Callable[[int, int], None]
"""Called with the frames generated so far and the frames to generate, over all pieces of a call."""


class Progress:
    """Frames over all pieces of a call, shown as a bar or told to a callback; nothing if neither is wanted."""

    def __init__(self, num_frames: int, show: bool, callback: ProgressCallback | None) -> None:
        self._total, self._callback, self._done = num_frames, callback, 0
        self.is_shown = show or callback is not None
        self._bar = tqdm(total=num_frames, unit="frame", disable=not show or callback is not None)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def advance(self, num_frames: int) -> None:
        """`num_frames` more frames are made."""
        self._done += num_frames
        self._bar.update(num_frames)
        if self._callback is not None:
            self._callback(self._done, self._total)
