"""This machine's limits, measured alongside a benchmark: read bandwidth, arithmetic peaks, load."""

from __future__ import annotations

import os
import statistics
from dataclasses import dataclass

import torch
from musicgen_kernels.isa import load_level, supported_levels, zero_bytes

STREAM_BYTES = 256 << 20
DRIFT_LIMIT = 0.10
PROBES = 40


@dataclass(frozen=True, slots=True)
class Peaks:
    """Arithmetic peaks of all threads together, in operations per second (a multiply-add counts as two).

    Attributes:
        fp32: with fp32 multiply-adds.
        int8: with 8-bit multiply-adds.
    """

    fp32: float
    int8: float


class Machine:
    """Multi-threaded probes: arithmetic at one instruction-set level, bandwidth at the best one."""

    def __init__(self, level: str | None, num_threads: int) -> None:
        self.level, self._native = load_level(level)
        self.num_threads = num_threads
        self._reader = load_level(supported_levels()[0])[1]  # the limit of the memory, not of the level
        self._buffer = zero_bytes(STREAM_BYTES).fill_(1)

    def stream_bytes_per_s(self) -> float:
        """Read bandwidth: the median of five passes over 256 MiB, all threads."""
        address = self._buffer.data_ptr()
        seconds = [self._reader.stream_read_seconds(address, STREAM_BYTES, self.num_threads) for _ in range(5)]
        return STREAM_BYTES / float(statistics.median(seconds))

    def flush(self) -> None:
        """Evict everything else from the caches."""
        self._reader.stream_read_seconds(self._buffer.data_ptr(), STREAM_BYTES, self.num_threads)

    def peaks(self) -> Peaks:
        """The best of many probes of a few ms each: threads, especially new ones, may share a core in some of them."""
        fp32 = max(self._native.fma_per_second(self.num_threads) for _ in range(PROBES))
        int8 = max(self._native.int8_per_second(self.num_threads) for _ in range(PROBES))
        return Peaks(2 * fp32, 2 * int8)


def load_average() -> float:
    """Load average of the last minute."""
    return os.getloadavg()[0]


def gpu_name() -> str | None:
    """Name of the current GPU; None without one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None
