"""Measured step times: overall and by the number of decoded rows."""

from __future__ import annotations

MEMORY = 0.9
"""Decay of the running means."""
FORGET_STEPS = 1000
"""The mean for a number of rows expires after this many steps, because it may rest on an outlier."""


class StepTimes:
    """Running means of the step time."""

    def __init__(self) -> None:
        self.mean_s = 0.0
        """Mean of all steps; 0: none yet."""
        self._by_rows: dict[int, tuple[float, int]] = {}
        """Mean and index of the last step, by number of rows."""
        self._num_steps = 0
        self._is_cold = True

    def add(self, step_s: float, num_rows: int | None) -> None:
        """Record a step.

        The very first is ignored: with its one-time costs, the next requests would be quoted minutes and rejected.

        Args:
            step_s: duration.
            num_rows: rows decoded; None: the step included prefill.
        """
        if self._is_cold:
            self._is_cold = False
            return
        self.mean_s = _faded(self.mean_s or None, step_s)
        self._num_steps += 1
        if num_rows is not None:
            self._by_rows[num_rows] = _faded(self.of(num_rows), step_s), self._num_steps

    def of(self, num_rows: int) -> float | None:
        """Mean time of a decode-only step of `num_rows` rows; None: no recent one."""
        mean_s, last_step = self._by_rows.get(num_rows, (None, 0))
        return mean_s if self._num_steps - last_step < FORGET_STEPS else None


def _faded(mean_s: float | None, step_s: float) -> float:
    """The running mean after another step."""
    return step_s if mean_s is None else MEMORY * mean_s + (1 - MEMORY) * step_s
