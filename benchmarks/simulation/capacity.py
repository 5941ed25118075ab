"""Capacity of a replica in closed form: the reference for load, and a check of the simulation.

A saturated replica holds N streams at every step. The mean step then reads the matrices once and N times the mean
length of a stream's rows, and computes N decode positions per row plus the prefill of arriving streams.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from musicgen_kernels import PAGE_LEN

from benchmarks.simulation.step_time import StepLoad, StepTime
from benchmarks.simulation.workload import Request, num_rows
from musicgen.config import ModelConfig, SchedulerConfig


@dataclass(frozen=True, slots=True)
class Capacity:
    """Capacity of one saturated replica."""

    num_streams: float
    step_s: float
    requests_s: float
    frames_s: float
    """New frames per second, over all streams."""

    @property
    def real_time_streams(self) -> float:
        """Listeners that can be served at 50 frames per second each."""
        return self.frames_s / 50


@dataclass(frozen=True, slots=True)
class _Mean:
    """Per-request means of a workload."""

    num_frames: float
    num_steps: float
    num_rows: float
    prefill: float
    """Positions computed before the first step, excluding shared ones."""
    prefill_attended: float
    read: float
    """Positions read, summed over all decode steps and rows."""
    pages: float
    """Unshared pages, summed over all decode steps."""


def capacity(
    requests: Sequence[Request],
    config: ModelConfig,
    step_time: StepTime,
    num_pages: int,
    scheduler: SchedulerConfig,
    *,
    fill: float = 1.0,
) -> Capacity:
    """The closed form for requests of this mix, all within one window.

    Args:
        fill: mean share of pages in use when pages are the limit.
    """
    means = np.mean([_of_request(request, config) for request in requests], axis=0)
    mean = _Mean(*(float(value) for value in means))
    num_streams = min(
        float(scheduler.max_requests),
        scheduler.max_rows / mean.num_rows,
        num_pages * fill * mean.num_steps / mean.pages,
    )
    arriving = num_streams / mean.num_steps  # requests that start per step
    read = num_streams * mean.read / mean.num_steps + arriving * mean.prefill
    attended = num_streams * mean.read / mean.num_steps + arriving * mean.prefill_attended
    num_positions = num_streams * mean.num_rows + arriving * mean.prefill
    load = StepLoad(round(num_positions), np.array([read]), np.array([attended]))
    step_s = float(step_time.seconds(load)[0])
    requests_s = arriving / step_s
    return Capacity(num_streams, step_s, requests_s, requests_s * mean.num_frames)


def _of_request(request: Request, config: ModelConfig) -> tuple[float, ...]:
    rows, num_steps = num_rows(request.kind), request.num_new + config.delay_pattern.max_delay
    prefix_len = text_read = shared = 0
    if config.chroma is None:
        text_read = request.text_len * (rows - 1)
    else:
        prefix_len = config.chroma.num_frames + request.text_len
        shared = prefix_len // PAGE_LEN * PAGE_LEN  # the null row's
        if request.kind in ("text", "continuation"):
            shared += config.chroma.num_frames // PAGE_LEN * PAGE_LEN  # the absence of a melody is shared by all
    begin = prefix_len + request.num_known
    lengths = begin + np.arange(1, num_steps + 1)
    return (
        float(request.num_new),
        float(num_steps),
        float(rows),
        float(rows * begin - shared),
        (rows * begin - shared) * begin / 2,
        float(rows * lengths.sum() + num_steps * text_read),
        float((rows * -(-lengths // PAGE_LEN) - shared // PAGE_LEN).sum()),
    )
