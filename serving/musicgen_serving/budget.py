"""Memory budget of one ingress replica: uploads plus buffered non-streaming responses.

Request limits bound a single request; this bounds their sum, so that many large requests at once are rejected instead
of exhausting memory. Confined to one event loop, hence no locks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from musicgen.errors import OverloadedError

RETRY_S = 2.0


def whole_bytes(num_pieces: int, num_samples: int, channels: int) -> int:
    """Memory of a non-streaming response: float32 samples, and as much again for encoding."""
    return num_pieces * num_samples * channels * 4 * 2


class Budget:
    """Bytes in use, and their limit.

    Args:
        max_bytes: returns the limit for all requests together. A single request is always accepted: its own limits
            bound it.
    """

    def __init__(self, max_bytes: Callable[[], int]) -> None:
        self.max_bytes = max_bytes
        self.held = 0

    @contextmanager
    def share(self, num_bytes: int = 0) -> Iterator[Share]:
        """The memory of one request, released on exit from the context.

        Args:
            num_bytes: initial reservation.
        Raises:
            OverloadedError: the budget is exhausted.
        """
        share = Share(self)
        try:
            share.take(num_bytes)
            yield share
        finally:
            self.held -= share.held


class Share:
    """One request's share of a budget. Set by `Budget.share`."""

    def __init__(self, budget: Budget) -> None:
        self._budget, self.held = budget, 0

    def take(self, num_bytes: int) -> None:
        """Reserve more bytes. Raises: OverloadedError: the budget is exhausted; nothing was reserved."""
        budget = self._budget
        if budget.held > self.held and budget.held + num_bytes > budget.max_bytes():
            message = f"too many large requests are in progress to accept {num_bytes} more bytes"
            raise OverloadedError(f"{message}; retry in {RETRY_S:g} s", retry_after_s=RETRY_S)
        budget.held += num_bytes
        self.held += num_bytes
