"""Progress over the pieces of a call: a bar, or the caller's own function."""

from __future__ import annotations

from collections.abc import Callable

from tqdm import tqdm

ProgressCallback = Callable[[int, int], None]
"""Called with the frames generated so far and the frames to generate, over all pieces of a call."""


class Progress:
    """Frames over all pieces of a call, shown as a bar or told to a callback."""

    def __init__(self, num_pieces: int, num_frames: int, show: bool, callback: ProgressCallback | None) -> None:
        self._num_frames, self._total, self._callback = num_frames, num_pieces * num_frames, callback
        self._done_before = self._last = 0
        self._bar = tqdm(total=self._total, unit="frame", disable=not show or callback is not None)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def frames(self, num_frames: int) -> None:
        """`num_frames` frames of the current piece are known."""
        done = self._done_before + num_frames
        if done == self._last:
            return
        self._bar.update(done - self._last)
        self._last = done
        if self._callback is not None:
            self._callback(done, self._total)

    def next_piece(self) -> None:
        self._done_before += self._num_frames
