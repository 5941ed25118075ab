"""Decode steps as CUDA graphs, one for each of a few numbers of rows.

At a decode step a GPU needs less time for a kernel than the host for its launch; a graph launches all of them at once.
It computes the same kernels on the same addresses each time, so a step of n rows runs in the smallest graph that holds
them, and the rows that are not there are inert (see `decode_buffers`). Elsewhere than on a GPU the same function runs
on the same buffers, without a graph: so everything but the capture itself is tested without one.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from musicgen_kernels.backend import report

from musicgen.engine.decode_buffers import DecodeBuffers, DecodeShape

logger = logging.getLogger(__name__)

Compute = Callable[[DecodeBuffers], None]
"""A whole step: reads `step` and `sampling`, writes `out`. It neither waits for the GPU nor looks at a value."""

NUM_WARM_UPS = 2
"""Runs before a capture, in which kernels are compiled and loaded and libraries take their workspaces."""


def bucket_sizes(max_rows: int) -> list[int]:
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
class _Bucket:
    buffers: DecodeBuffers
    run: Callable[[], object]


class DecodeGraphs:
    """Runs decode steps of up to `max_rows` rows.

    Args:
        compute: the step. It must give the same for the same inputs, whatever it was run with before.
        uses: what `compute` reads and writes besides the buffers. Where one of these is another object than at the
            capture, its addresses are too, and all graphs are made anew.
    """

    def __init__(
        self,
        max_rows: int,
        shape: DecodeShape,
        device: torch.device,
        compute: Compute,
        uses: Callable[[], tuple[object, ...]],
    ) -> None:
        self.sizes = bucket_sizes(max_rows)
        self._shape, self._device, self._compute, self._uses = shape, device, compute, uses
        self._used: tuple[object, ...] = ()
        self._buckets: dict[int, _Bucket] = {}
        self._pool: Any = None
        self._captures = device.type == "cuda"

    def buffers(self, num_rows: int) -> DecodeBuffers:
        """Those of the smallest graph for `num_rows` rows, which is captured if need be: then all of them are clear."""
        used = self._uses()
        if len(used) != len(self._used) or any(a is not b for a, b in zip(used, self._used, strict=True)):
            self._buckets.clear()
            self._used, self._pool = used, None
        size = next(size for size in self.sizes if size >= num_rows)
        if size not in self._buckets:
            self._buckets[size] = self._new_bucket(size)
        return self._buckets[size].buffers

    def run(self, buffers: DecodeBuffers) -> np.ndarray:
        """Compute what was written to `buffers.host`: the codes `[size, K]`, rows that are not there included."""
        with self._on_device():
            buffers.upload()
            self._buckets[buffers.num_rows].run()
            return buffers.download()

    @torch.inference_mode()
    def prepare(self) -> None:
        """Capture every size now, the largest first: the others then find their memory in its pool."""
        for size in reversed(self.sizes):
            self.buffers(size)

    def _new_bucket(self, size: int) -> _Bucket:
        with self._on_device():
            buffers = DecodeBuffers(size, self._shape, self._device)
            buffers.upload()
            return _Bucket(buffers, self._capture(buffers))

    def _capture(self, buffers: DecodeBuffers) -> Callable[[], object]:
        """A graph of the step; of nobody's rows, so that neither warm-up nor capture changes anything for anyone."""

        def eager() -> None:
            self._compute(buffers)

        if not self._captures:
            return eager
        try:
            return self._captured(eager)
        except Exception:  # slower is better than nothing: the engine goes on without graphs
            logger.exception(
                "a decode step of %d rows cannot be captured; decoding goes on without graphs", buffers.num_rows
            )
            self._captures = False
            return eager

    def _captured(self, eager: Callable[[], None]) -> Callable[[], object]:
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(NUM_WARM_UPS):
                eager()
        current.wait_stream(stream)
        if self._pool is None:
            # One for all: whatever outlives a step lies outside of it, and steps run one after another.
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads, such as the codec's, may allocate meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            eager()
        return graph.replay

    def _on_device(self) -> AbstractContextManager[object]:
        return torch.cuda.device(self._device) if self._device.type == "cuda" else contextlib.nullcontext()
