"""Smallest sufficient number, by exponential search and bisection."""

from __future__ import annotations

from collections.abc import Callable

from musicgen.errors import InvalidRequestError

MOST = 4096


def fewest(meets: Callable[[int], bool], *, start: int = 1) -> int:
    """The smallest n ≥ 1 with `meets(n)`, which is assumed to be monotonic.

    Args:
        meets: called once for each number tried.
        start: initial guess; the closer, the fewer calls.
    Raises:
        InvalidRequestError: not even 4096 is enough.
    """
    too_few, enough, stride = 0, None, 1
    guess = min(start, MOST)
    while enough is None or enough - too_few > 1:
        if meets(guess):
            enough = guess
            guess = max(too_few + 1, enough - stride) if too_few == 0 else (too_few + enough) // 2
        else:
            too_few = guess
            if too_few == MOST:
                raise InvalidRequestError("an objective that can be met", f"one that {MOST} replicas miss")
            guess = min(MOST, too_few + stride) if enough is None else (too_few + enough) // 2
        stride *= 2
    return enough
