"""Running means of what steps take."""

from __future__ import annotations

import pytest

from musicgen.engine.step_times import FORGET_STEPS, MEMORY, StepTimes


def test_the_first_step_does_not_count() -> None:
    times = StepTimes()
    times.add(5.0, 3)
    assert (times.mean_s, times.of(3)) == (0.0, None)
    times.add(0.01, 3)
    assert (times.mean_s, times.of(3)) == (0.01, 0.01)


def test_steps_are_told_apart_by_their_rows() -> None:
    times = StepTimes()
    for seconds, num_rows in ((9.0, None), (1.0, 3), (2.0, 8), (9.0, None), (2.0, 3)):
        times.add(seconds, num_rows)
    assert times.of(3) == pytest.approx(MEMORY * 1.0 + (1 - MEMORY) * 2.0)
    assert times.of(8) == 2.0
    assert times.of(11) is None


def test_what_was_seen_long_ago_is_forgotten() -> None:
    times = StepTimes()
    for _ in range(2):
        times.add(1.0, 3)
    for _ in range(FORGET_STEPS - 1):
        times.add(2.0, 8)
    assert times.of(3) == 1.0
    times.add(2.0, 8)
    assert times.of(3) is None
    times.add(4.0, 3)
    assert times.of(3) == 4.0
