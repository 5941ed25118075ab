"""Runs decode steps on buffers that stay: as CUDA graphs, one for each of a few numbers of rows, or as prepared calls.

At a decode step a GPU needs less time for a kernel than the host for its launch; a graph launches all of them at once.
It computes the same kernels on the same addresses each time, so a step of n rows runs in the smallest graph that holds
them, and the rows that are not there are inert (see `decode_buffers`). Without graphs there are no more rows than are
there, and buffers are made anew when their number changes. The graphs' buffers can be had on a CPU too: so everything
but the capture itself is tested without a GPU.
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
"""A whole step: reads `step` and `sampling` of its buffers, writes `out`. To be captured, it may neither wait for the
GPU nor look at a value. It must give the same for the same inputs, whatever it was run with before."""
Prepare = Callable[[DecodeBuffers], Call]
"""Makes the call for some buffers, and does everything that need not be done at each step."""

NUM_WARM_UPS = 2
"""Runs before a capture, in which kernels are compiled and loaded and libraries take their workspaces."""


def graph_sizes(max_rows: int) -> list[int]:
    """Numbers of rows that get a graph: powers of two up to 16, then every eighth; the last is `max_rows`.

    A step computes at most twice the rows that are there, and from 16 on at most 7 more.
    """
    sizes = [1, 2, 4, 8, *range(16, max_rows, 8)]
    return [*(size for size in sizes if size < max_rows), max_rows]


def why_not(device: torch.device) -> str | None:
    """Why decode steps cannot be captured on a device; None if they can, or are run without capture."""
    if device.type != "cuda":
        return None
    slow = [choice.operation for choice in report(str(device)) if choice.backend == "reference"]
    return f"{', '.join(slow)} on the reference, which looks at values" if slow else None


@dataclass(slots=True, eq=False)
class _Ready:
    buffers: DecodeBuffers
    call: Call


class DecodeSteps:
    """Runs decode steps.

    Args:
        sizes: numbers of rows that get a graph, ascending; None: no graphs.
        uses: what a call reads and writes besides its buffers. Where one of these is another object than when the call
            was made, its addresses are too, and all calls are made anew.
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
        is_gpu = device.type == "cuda"
        self._captures = sizes is not None and is_gpu
        self._guard = functools.partial(torch.cuda.device, device) if is_gpu else contextlib.nullcontext

    def buffers(self, num_rows: int, num_requests: int) -> DecodeBuffers:
        """With room for so many: those that were used for as many before, or new ones, which are clear."""
        used = self._uses()
        if len(used) != len(self._used) or any(a is not b for a, b in zip(used, self._used, strict=True)):
            self._ready.clear()
            self._used, self._pool = used, None
        if self.sizes is not None:
            num_rows = num_requests = next(size for size in self.sizes if size >= num_rows)
        ready = self._ready.get((num_rows, num_requests))
        if ready is None:
            if self.sizes is None:
                self._ready.clear()  # whoever comes or goes changes their number: one of each would be many
            ready = self._ready[num_rows, num_requests] = self._new(num_rows, num_requests)
        return ready.buffers

    def run(self, buffers: DecodeBuffers) -> np.ndarray:
        """Compute what was written to `buffers.host`: the codes `[num_requests, K]`, absent requests included."""
        with self._guard():
            buffers.upload()
            self._ready[buffers.num_rows, buffers.num_requests].call()
            return buffers.download()

    def capture_all(self) -> None:
        """Capture every size now, the largest first: the others then find their memory in its pool."""
        for size in reversed(self.sizes or []):
            self.buffers(size, size)

    def _new(self, num_rows: int, num_requests: int) -> _Ready:
        with self._guard():
            buffers = DecodeBuffers(num_rows, num_requests, self._shape, self._device)
            buffers.upload()
            return _Ready(buffers, self._capture(self._prepare(buffers), num_rows))

    def _capture(self, call: Call, num_rows: int) -> Call:
        """A graph of the step; of nobody's rows, so that neither warm-up nor capture changes anything for anyone."""
        if not self._captures:
            return call
        try:
            return self._captured(call)
        except Exception:  # slower is better than nothing: the engine goes on without graphs
            logger.exception("a decode step of %d rows cannot be captured; decoding goes on without graphs", num_rows)
            self._captures = False
            return call

    def _captured(self, call: Call) -> Call:
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(NUM_WARM_UPS):
                call()
        current.wait_stream(stream)
        if self._pool is None:
            # One for all: whatever outlives a step lies outside of it, and steps run one after another.
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads, such as the codec's, may allocate meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            call()
        return graph.replay
