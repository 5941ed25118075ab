"""What steps take, as measured: over all, and by how many rows they decode. Knows no sequence and no clock."""

from __future__ import annotations

MEMORY = 0.9
"""How much of a running mean each new step keeps."""
FORGET_STEPS = 1000
"""After so many steps a number of rows is as if it had never been seen: its last step may have been an odd one."""


class StepTimes:
    """Running means of the time of a step."""

    def __init__(self) -> None:
        self.mean_s = 0.0
        """Of all steps; 0: none yet."""
        self._by_rows: dict[int, tuple[float, int]] = {}
        """A mean, and the number of its last step."""
        self._num_steps = 0
        self._is_cold = True

    def add(self, step_s: float, num_rows: int | None) -> None:
        """A step has been taken.

        The very first does not count: it pays for what happens once, and whoever comes next would be told of minutes
        and refused.

        Args:
            step_s: how long it took.
            num_rows: that it decoded; None: it computed prompts too.
        """
        if self._is_cold:
            self._is_cold = False
            return
        self.mean_s = _faded(self.mean_s or None, step_s)
        self._num_steps += 1
        if num_rows is not None:
            self._by_rows[num_rows] = _faded(self.of(num_rows), step_s), self._num_steps

    def of(self, num_rows: int) -> float | None:
        """Of a step that decodes so many rows and does nothing else; None: there was none lately."""
        mean_s, last_step = self._by_rows.get(num_rows, (None, 0))
        return mean_s if self._num_steps - last_step < FORGET_STEPS else None


def _faded(mean_s: float | None, step_s: float) -> float:
    """The running mean after one step more."""
    return step_s if mean_s is None else MEMORY * mean_s + (1 - MEMORY) * step_s
