"""How many pages and rows will be held when: lengths are known, so the future is arithmetic.

All demands advance together, one position a row a step. A demand only grows until it ends, so the most is held just
before some demand ends, and it is enough to look at those moments. As long as a forecast fits, letting everyone
advance together to the end never runs out of pages; the scheduler keeps that true at every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from musicgen_kernels import PAGE_LEN


@dataclass(frozen=True, slots=True)
class Demand:
    """What one request holds from `start` on, for `num_steps` steps."""

    num_rows: int
    length: int
    """Positions a row at `start`."""
    num_steps: int
    """Steps until everything is released."""
    growth: int = 1
    """Positions that each step adds to a row: 1, or 0 where `length` is the most it will ever be."""
    num_held: int = 0
    """Of its pages, those that are held already."""
    num_freed: int = 0
    """Pages held now that its end will free: it is the last of their holders to end."""
    start: int = 0
    """Steps from now until it begins."""

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


class Forecast:
    """The future of a set of demands.

    Args:
        num_held: pages held now, by anyone.
        demands: all requests that hold pages, and any that are to be tried.
    """

    def __init__(self, capacity: Capacity, num_held: int, demands: Sequence[Demand]) -> None:
        self._capacity, self._num_held, self._demands = capacity, num_held, list(demands)

    def fits(self, *more: Demand) -> bool:
        """Whether pages, rows and requests suffice at every moment, with `more` demands on top."""
        demands = [*self._demands, *more]
        if not demands:
            return self._num_held <= self._capacity.num_pages
        most = self._held_at(np.array([d.end for d in demands]), demands).max(1)
        return bool((most <= self._limits).all())

    def earliest_start(self, demand: Demand) -> int | None:
        """The first step at which `demand` could begin, of now and the ends of others; None if it never fits."""
        if not Forecast(self._capacity, 0, [demand]).fits():
            return None
        ends = np.array([d.end for d in self._demands], dtype=np.int64)
        starts = np.unique([0, *(ends + 1)])
        moments = np.concatenate([ends, starts + demand.num_steps])
        free = self._limits[:, None] - self._held_at(moments, self._demands)
        since = moments - starts[:, None]
        pages = demand.num_rows * -(-(demand.length + demand.growth * since) // PAGE_LEN) - demand.num_held
        fits = (pages <= free[0]) & (demand.num_rows <= free[1]) & (free[2] >= 1)
        is_active = (since >= 0) & (since <= demand.num_steps)
        can_start = (fits | ~is_active).all(1)
        return int(starts[can_start.argmax() if can_start.any() else -1])

    @property
    def _limits(self) -> np.ndarray:
        capacity = self._capacity
        return np.array([capacity.num_pages, capacity.num_rows, capacity.num_requests])

    def _held_at(self, moments: np.ndarray, demands: Sequence[Demand]) -> np.ndarray:
        """`[3, moments]` pages, rows and requests that are held at each of `moments`, in steps from now."""
        fields = np.array(
            [(d.num_rows, d.length, d.end, d.growth, d.num_held, d.num_freed, d.start) for d in demands],
            dtype=np.int64,
        ).reshape(-1, 7)
        rows, length, end, growth, num_held, num_freed, start = fields.T
        moments = moments[:, None]
        is_active = (moments >= start) & (moments <= end)
        pages = rows * -(-(length + growth * (moments - start)) // PAGE_LEN) - num_held
        pages = np.where(is_active, pages, np.where(moments > end, -num_freed, 0))
        return np.stack([self._num_held + pages.sum(1), (is_active * rows).sum(1), is_active.sum(1)])
