"""Arrival times of requests: Poisson or bursty. Independent of their contents and of the replicas."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Process = Literal["poisson", "gamma", "bursts"]
BURST_TIME_SHARE = 0.2
BURST_MEAN_S = 10.0


@dataclass(frozen=True, slots=True)
class Arrivals:
    """A point process of a given mean rate.

    poisson: independent listeners. gamma: intervals with the coefficient of variation `burstiness`. bursts: a
    Poisson process whose rate jumps between two levels (Markov-modulated); a burst lasts 10 s on average, bursts
    cover a fifth of the time and have `burstiness` times the calm rate.
    """

    process: Process
    rate_hz: float
    burstiness: float = 3.0

    def times(self, num: int, rng: np.random.Generator) -> npt.NDArray[np.float64]:
        """`[num]` ascending times in seconds, from 0 on."""
        if self.process == "gamma":
            shape = self.burstiness**-2
            return np.cumsum(rng.gamma(shape, 1 / (shape * self.rate_hz), num))
        unit = np.cumsum(rng.exponential(1.0, num))
        if self.process == "poisson":
            return unit / self.rate_hz
        return self._modulated(unit, rng)

    def _modulated(self, unit: npt.NDArray[np.float64], rng: np.random.Generator) -> npt.NDArray[np.float64]:
        """Map a Poisson process of rate 1 through the inverse of the integrated rate."""
        calm_hz = self.rate_hz / (1 - BURST_TIME_SHARE + BURST_TIME_SHARE * self.burstiness)
        calm_s = BURST_MEAN_S * (1 - BURST_TIME_SHARE) / BURST_TIME_SHARE
        ends, mass, is_burst = [0.0], [0.0], False
        while mass[-1] < unit[-1]:
            span = rng.exponential(BURST_MEAN_S if is_burst else calm_s)
            ends.append(ends[-1] + span)
            mass.append(mass[-1] + span * calm_hz * (self.burstiness if is_burst else 1.0))
            is_burst = not is_burst
        return np.interp(unit, mass, ends)
