"""How many bytes of callers one edge holds at the same time: what they upload, and whole answers until they are sent.

Limits of a single request bound one; this bounds all of them together, so that many large ones at once are refused
instead of ending the process. One loop's: nothing here is locked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from musicgen.errors import OverloadedError

RETRY_S = 2.0


def whole_bytes(num_pieces: int, num_samples: int, channels: int) -> int:
    """What a whole answer holds: float32 samples, and as much again while they are encoded."""
    return num_pieces * num_samples * channels * 4 * 2


class Budget:
    """What is held, and how much may be.

    Args:
        max_bytes: gives those of all requests together. One that is alone is taken whatever its size: its own limits
            bound it.
    """

    def __init__(self, max_bytes: Callable[[], int]) -> None:
        self.max_bytes = max_bytes
        self.held = 0

    @contextmanager
    def share(self, num_bytes: int = 0) -> Iterator[Share]:
        """What one request holds, from now until the context is left.

        Args:
            num_bytes: that it begins with.
        Raises:
            OverloadedError: too much is held already.
        """
        share = Share(self)
        try:
            share.take(num_bytes)
            yield share
        finally:
            self.held -= share.held


class Share:
    """One request's part of a budget. Set by `Budget.share`."""

    def __init__(self, budget: Budget) -> None:
        self._budget, self.held = budget, 0

    def take(self, num_bytes: int) -> None:
        """Hold so many more. Raises: OverloadedError: too much is held already; nothing was added."""
        budget = self._budget
        if budget.held > self.held and budget.held + num_bytes > budget.max_bytes():
            message = f"expected room for {num_bytes} bytes more, got too many large requests at the same time"
            raise OverloadedError(f"{message}; retry in {RETRY_S:g} s, or send less at once", retry_after_s=RETRY_S)
        budget.held += num_bytes
        self.held += num_bytes
