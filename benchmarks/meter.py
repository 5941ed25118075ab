"""State of the machine during a timed span: read bandwidth, load from other processes, memory.

The performance of a shared machine varies from one second to the next, so a timed span is compared with probes taken
within it.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import psutil
import torch

from benchmarks.machine import Machine, load_average


@dataclass(frozen=True, slots=True)
class Reading:
    """One timed span."""

    wall_s: float
    stream_bytes_s: float
    """Median of the probes' read bandwidth."""
    stream_drift: float
    """Ratio of the largest to the smallest probe."""
    others_cores: float
    """Mean number of cores kept busy by other processes."""
    load_average: float
    """Of the last minute, at the end."""


class Meter:
    """Measures the duration of its context; call `probe` within it."""

    def __init__(self, num_threads: int | None = None) -> None:
        self._machine = Machine(None, num_threads or torch.get_num_threads())
        self.probes: list[float] = []

    def __enter__(self) -> Meter:
        self.probe()
        self._began, self._busy, self._own = time.perf_counter(), _busy_s(), _own_s()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._wall_s = time.perf_counter() - self._began
        busy_s, own_s = _busy_s() - self._busy, _own_s() - self._own
        self._others = max(0.0, busy_s - own_s) / self._wall_s
        self.probe()

    def probe(self) -> float:
        """Current read bandwidth in bytes per second."""
        self.probes.append(self._machine.stream_bytes_per_s())
        return self.probes[-1]

    def reading(self) -> Reading:
        """The result; call after exiting the context."""
        return Reading(
            wall_s=self._wall_s,
            stream_bytes_s=statistics.median(self.probes),
            stream_drift=max(self.probes) / min(self.probes),
            others_cores=self._others,
            load_average=load_average(),
        )


def reset_peak_memory() -> None:
    """Reset the peak memory of this process, if the system supports it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_memory_bytes() -> int:
    """Peak resident memory since the start or the last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return int(psutil.Process().memory_info().rss)


def _busy_s() -> float:
    """CPU seconds spent on this machine by all processes."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0))


def _own_s() -> float:
    own = psutil.Process().cpu_times()
    return float(own.user + own.system)
