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
    num_private: int = 0
    """Of those, the ones that its end will free: nobody else holds them."""
    start: int = 0
    """Steps from now until it begins."""

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


class Forecast:
    """The future of a set of demands.

    Args:
        num_held: pages held now, by anyone.
        demands: all requests that hold pages, and any that are to be tried.
    """

    def __init__(self, capacity: Capacity, num_held: int, demands: Sequence[Demand]) -> None:
        self._capacity, self._num_held, self._demands = capacity, num_held, list(demands)

    def fits(self, *more: Demand) -> bool:
        """Whether pages and rows suffice at every moment, with `more` demands on top."""
        demands = [*self._demands, *more]
        if not demands:
            return self._num_held <= self._capacity.num_pages
        fields = np.array(
            [(d.num_rows, d.length, d.num_steps, d.growth, d.num_held, d.num_private, d.start) for d in demands],
            dtype=np.int64,
        )
        rows, length, num_steps, growth, num_held, num_private, start = fields.T
        end = start + num_steps
        moments = np.unique(end)[:, None]
        active = (moments >= start) & (moments <= end)
        pages = rows * -(-(length + growth * (moments - start)) // PAGE_LEN) - num_held
        delta = np.where(active, pages, np.where(moments > end, -num_private, 0))
        return bool(
            self._num_held + delta.sum(1).max() <= self._capacity.num_pages
            and (active * rows).sum(1).max() <= self._capacity.num_rows
        )

    def earliest_start(self, demand: Demand) -> int | None:
        """The first step at which `demand` could begin; None if it does not fit even alone."""
        if not Forecast(self._capacity, 0, [demand]).fits():
            return None
        starts = [0, *sorted({d.start + d.num_steps + 1 for d in self._demands})]
        return next((start for start in starts if self.fits(demand.at(start))), starts[-1])
