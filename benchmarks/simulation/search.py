"""The smallest number that will do, by steps that double and bisection. Knows nothing of what is tried."""

from __future__ import annotations

from collections.abc import Callable

from musicgen.errors import InvalidRequestError

MOST = 4096


def fewest(meets: Callable[[int], bool], *, start: int = 1) -> int:
    """The smallest n ≥ 1 with `meets(n)`, which is taken to stay true from there on.

    Args:
        meets: is called once for each number that is tried.
        start: a first guess; the nearer, the fewer numbers are tried.
    Raises:
        InvalidRequestError: not even 4096 will do.
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
                raise InvalidRequestError("an objective that some number of replicas meets", f"none of {MOST} do")
            guess = min(MOST, too_few + stride) if enough is None else (too_few + enough) // 2
        stride *= 2
    return enough
