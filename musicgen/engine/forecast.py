"""Forecasts page and row usage. Lengths are known in advance, so future usage can be computed exactly.

All demands advance together, by one position per row and step. A demand only grows until it ends, so usage peaks just
before some demand ends, and only those moments need checking. As long as a forecast fits, all requests can advance
together to their ends without running out of pages; the scheduler maintains this invariant at every step.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from musicgen_kernels import PAGE_LEN


@dataclass(frozen=True, slots=True)
class Demand:
    """Resources that one request holds from `start` on, for `num_steps` steps."""

    num_rows: int
    length: int
    """Positions per row at `start`."""
    num_steps: int
    """Steps until everything is released."""
    growth: int = 1
    """Positions that each step adds to a row: 1, or 0 if `length` is already the maximum."""
    num_held: int = 0
    """Number of its pages that are already held."""
    num_freed: int = 0
    """Currently held pages that it will free at its end, as the last of their holders to end."""
    start: int = 0
    """Steps from now until it starts."""

    @property
    def end(self) -> int:
        """Steps from now until it ends."""
        return self.start + self.num_steps

    @property
    def most_pages(self) -> int:
        """Pages at its end."""
        return self.num_rows * -(-(self.length + self.growth * self.num_steps) // PAGE_LEN)

    def at(self, start: int) -> Demand:
        return replace(self, start=start)


@dataclass(frozen=True, slots=True)
class Capacity:
    num_pages: int
    num_rows: int
    num_requests: int

    @property
    def limits(self) -> np.ndarray:
        """`[3]`"""
        return np.array([self.num_pages, self.num_rows, self.num_requests])


class Forecast:
    """Predicted usage of a set of demands.

    Args:
        num_held: total pages held now.
        demands: all requests that hold pages, and any candidates.
    """

    def __init__(self, num_held: int, demands: Iterable[Demand]) -> None:
        self._num_held, self._fields = num_held, _fields(demands)

    def add(self, demand: Demand) -> None:
        """Add a demand."""
        self._fields = np.concatenate([self._fields, _fields([demand])])

    def fits(self, capacity: Capacity) -> bool:
        """Whether pages, rows and requests stay within `capacity` at all times."""
        if not len(self._fields):
            return self._num_held <= capacity.num_pages
        return bool((self._held_at(self._ends).max(1) <= capacity.limits).all())

    def earliest_start(self, demand: Demand, capacity: Capacity) -> int | None:
        """The first step at which `demand` could start: now or at the end of another demand; None if it never fits."""
        if demand.num_rows > capacity.num_rows or demand.most_pages > capacity.num_pages:
            return None
        ends = self._ends
        starts = np.unique(np.concatenate([[0], ends + 1]))
        moments = np.concatenate([ends, starts + demand.num_steps])
        free = capacity.limits[:, None] - self._held_at(moments)
        since = moments - starts[:, None]
        pages = demand.num_rows * -(-(demand.length + demand.growth * since) // PAGE_LEN) - demand.num_held
        fits = (pages <= free[0]) & (demand.num_rows <= free[1]) & (free[2] >= 1)
        is_active = (since >= 0) & (since <= demand.num_steps)
        can_start = (fits | ~is_active).all(1)
        return int(starts[can_start.argmax() if can_start.any() else -1])

    @property
    def _ends(self) -> np.ndarray:
        """Steps from now until each demand ends."""
        ends: np.ndarray = self._fields[:, _END]
        return ends

    def _held_at(self, moments: np.ndarray) -> np.ndarray:
        """`[3, moments]` pages, rows and requests held at each of `moments`, in steps from now."""
        rows, length, end, growth, num_held, num_freed, start = self._fields.T
        moments = moments[:, None]
        is_active = (moments >= start) & (moments <= end)
        pages = rows * -(-(length + growth * (moments - start)) // PAGE_LEN) - num_held
        pages = np.where(is_active, pages, np.where(moments > end, -num_freed, 0))
        return np.stack([self._num_held + pages.sum(1), (is_active * rows).sum(1), is_active.sum(1)])


_END = 2


def _fields(demands: Iterable[Demand]) -> np.ndarray:
    """`[demands, 7]`"""
    fields = [(d.num_rows, d.length, d.end, d.growth, d.num_held, d.num_freed, d.start) for d in demands]
    return np.array(fields, dtype=np.int64).reshape(-1, 7)
