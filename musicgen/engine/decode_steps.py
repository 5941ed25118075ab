"""Runs decode steps on persistent buffers: as CUDA graphs, captured for a few batch sizes, or as prepared calls.

In a decode step, launching a kernel takes longer than running it; a graph launches all kernels at once. A graph has
fixed kernels and addresses, so a step of n rows runs in the smallest graph that fits and is padded with inert rows (see
`decode_buffers`). Without graphs there is no padding, and buffers are recreated when the number of rows changes. The
graphs' buffers also work on a CPU, so everything but the capture itself is tested without a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from musicgen_kernels.backend import report

from musicgen.engine.decode_buffers import DecodeBuffers, DecodeShape

logger = logging.getLogger(__name__)

Call = Callable[[], object]
"""A whole step: reads `step` and `sampling` of its buffers, writes `out`. To be captured, it must neither synchronise
nor read values on the host. It must be deterministic and keep no state between runs."""
Prepare = Callable[[DecodeBuffers], Call]
"""Builds the call for a set of buffers, hoisting all work that need not be repeated at each step."""

NUM_WARM_UPS = 2
"""Runs before a capture, to compile and load kernels and let libraries allocate workspaces."""


def graph_sizes(max_rows: int) -> list[int]:
    """Batch sizes to capture: powers of two up to 16, then multiples of 8; the last is `max_rows`.

    Padding at most doubles the rows of a step; from 16 rows on it adds at most 7.
    """
    sizes = [1, 2, 4, 8, *range(16, max_rows, 8)]
    return [*(size for size in sizes if size < max_rows), max_rows]


def why_not(device: torch.device, head_dim: int) -> str | None:
    """Why decode steps of a model cannot be captured on a device; None if they can, or need no capture."""
    if device.type != "cuda":
        return None
    slow = [choice.operation for choice in report(str(device), head_dim=head_dim) if choice.backend == "reference"]
    return f"{', '.join(slow)} on the reference backend, which reads values on the host" if slow else None


@dataclass(slots=True, eq=False)
class _Ready:
    buffers: DecodeBuffers
    call: Call


class DecodeSteps:
    """Runs decode steps.

    Args:
        sizes: batch sizes that get a graph, ascending; None: no graphs.
        uses: the objects that a call reads and writes besides its buffers. If any of them has been replaced, its
            addresses have changed, and all calls are rebuilt.
    """

    def __init__(
        self,
        sizes: list[int] | None,
        shape: DecodeShape,
        device: torch.device,
        prepare: Prepare,
        uses: Callable[[], tuple[object, ...]],
    ) -> None:
        self.sizes = sizes
        self._shape, self._device, self._prepare, self._uses = shape, device, prepare, uses
        self._used: tuple[object, ...] = ()
        self._ready: dict[tuple[int, int], _Ready] = {}
        self._pool: Any = None
        self._stream: Any = None
        """Of all captures: memory of the graphs' pool is only reused on the stream that it was allocated on."""
        is_gpu = device.type == "cuda"
        self._captures = sizes is not None and is_gpu
        self._guard = functools.partial(torch.cuda.device, device) if is_gpu else contextlib.nullcontext

    def buffers(self, num_rows: int, num_requests: int) -> DecodeBuffers:
        """Buffers for this many rows and requests: the existing ones of that size, or new, cleared ones."""
        used = self._uses()
        if len(used) != len(self._used) or any(a is not b for a, b in zip(used, self._used, strict=True)):
            self._ready.clear()
            self._used, self._pool = used, None
        if self.sizes is not None:
            num_rows = num_requests = next(size for size in self.sizes if size >= num_rows)
        ready = self._ready.get((num_rows, num_requests))
        if ready is None:
            if self.sizes is None:
                self._ready.clear()  # the number of rows changes often: keeping every size would add up
            ready = self._ready[num_rows, num_requests] = self._new(num_rows, num_requests)
        return ready.buffers

    def run(self, buffers: DecodeBuffers) -> np.ndarray:
        """Run the step in `buffers.host`; returns the codes `[num_requests, K]`, including padding requests."""
        with self._guard():
            buffers.upload()
            self._ready[buffers.num_rows, buffers.num_requests].call()
            return buffers.download()

    def capture_all(self) -> None:
        """Capture all sizes now, largest first, so that the others reuse its memory pool."""
        for size in reversed(self.sizes or []):
            self.buffers(size, size)

    def _new(self, num_rows: int, num_requests: int) -> _Ready:
        with self._guard():
            buffers = DecodeBuffers(num_rows, num_requests, self._shape, self._device)
            buffers.upload()
            return _Ready(buffers, self._capture(self._prepare(buffers), num_rows))

    def _capture(self, call: Call, num_rows: int) -> Call:
        """Capture the step as a graph, with padding only, so that warm-up and capture have no side effects."""
        if not self._captures:
            return call
        try:
            return self._captured(call)
        except Exception:  # fall back to running without graphs
            logger.exception("cannot capture a decode step of %d rows; decoding continues without graphs", num_rows)
            self._captures = False
            return call

    def _captured(self, call: Call) -> Call:
        self._stream = self._stream or torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream, current = self._stream, torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(NUM_WARM_UPS):
                call()
        current.wait_stream(stream)
        if self._pool is None:
            # One pool for all graphs: they run one at a time, and nothing in the pool outlives a step.
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads, such as the codec's, may allocate during the capture.
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                call()
        finally:
            torch.cuda.set_stream(current)  # a capture that fails to end leaves its own stream current
        return graph.replay
