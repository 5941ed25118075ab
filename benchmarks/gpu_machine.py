"""GPU counterpart of `machine`: measures a GPU's limits alongside the kernel benchmark, and times kernels on it.

Work is captured in a CUDA graph and timed by events on its stream, which excludes Python and launch overhead. Nothing
here has been run on a GPU yet; `refusal` says why a backend cannot be measured on this machine.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from musicgen_kernels.backend import unavailable

GPU_BACKENDS = ("cuda", "triton")
STREAM_BYTES = 4 << 30
MATRIX_SIZE = 8192
GRAPH_WARM_UPS = 2


def refusal(backend: str) -> str | None:
    """Why a GPU backend cannot be measured here; None if it can."""
    if not torch.cuda.is_available():
        return "no GPU available to PyTorch (torch.cuda.is_available() is False)"
    return unavailable(backend, "layer_norm", "cuda", torch.float32)


class GpuMachine:
    """The current GPU, with the interface of `machine.Machine` plus timing.

    Args:
        dtype: of the activations; the peak for 16-bit types is measured with matrix products.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        major, minor = torch.cuda.get_device_capability()
        self.level, self.dtype = f"sm_{major}{minor}", dtype
        self._buffer = torch.ones(STREAM_BYTES // 4, device="cuda")

    def stream_bytes_per_s(self) -> float:
        """Read bandwidth: the median of five sums over 4 GiB."""
        return STREAM_BYTES / statistics.median(self.seconds_of(lambda: self._buffer.sum(), 5))

    def peak_rates(self) -> dict[str, float]:
        """Operations per second of square matrix products, in float32 (without TF32) and the activations' dtype."""
        torch.backends.cuda.matmul.allow_tf32 = False
        found = {}
        for name, dtype in (("fp32", torch.float32), ("16-bit", self.dtype)):
            if name == "16-bit" and dtype == torch.float32:
                continue
            a = torch.randn(MATRIX_SIZE, MATRIX_SIZE, device="cuda").to(dtype)
            seconds = self.seconds_of(lambda a=a: a @ a, 5)[0]  # type: ignore[misc]
            found[name] = 2.0 * MATRIX_SIZE**3 / seconds
        return found

    def seconds_of(self, run: Callable[[], object], repeats: int, *, cold: bool = False) -> list[float]:
        """Sorted times of `repeats` replays of the work that `run` launches; `cold`: after reading 4 GiB of data."""
        graph = self._captured(run)
        graph.replay()
        times = []
        for _ in range(repeats):
            if cold:
                self._buffer.sum()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        return sorted(times)

    @staticmethod
    def _captured(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
        """Capture after a few warm-up runs on a side stream, in which kernels are compiled and memory is allocated."""
        beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(GRAPH_WARM_UPS):
                run()
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph
