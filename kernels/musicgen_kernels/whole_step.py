"""With what a decoder runs its steps: the CPU's one call where that can be, else one operation after another.

It looks at the device, the head dimension and MUSICGEN_KERNELS_BACKEND; what the operations then choose is `backend`'s.
"""

from __future__ import annotations

from torch import Tensor

from .backend import OPERATIONS, from_environment
from .cpu import HEAD_DIMS
from .cpu_step import CpuStep
from .errors import BackendUnavailableError
from .pages import KVStore
from .step import DecoderWeights, StepBatch, step_by_operations, write_cross_by_operations

_STEP_OPERATIONS = tuple(name for name in OPERATIONS if name != "delayed_sample_step")


class StepByOperations:
    """A decoder that runs one operation after another, on any device; used as `CpuStep` is.

    Args:
        weights: in an order that the operations' backends read.
        backend: for every operation; None chooses.
    """

    def __init__(self, weights: DecoderWeights, *, backend: str | None = None) -> None:
        self.weights, self.backend = weights, backend

    def run(
        self, batch: StepBatch, pages: KVStore, cross_pages: KVStore | None = None, *, num_threads: int | None = None
    ) -> Tensor:
        """See `step_by_operations`. `num_threads` is not used: operations ask the calling thread."""
        return step_by_operations(self.weights, batch, pages, cross_pages, backend=self.backend)

    def write_cross(
        self, states: Tensor, page_table: Tensor, query_offsets: Tensor, lens: Tensor, cross_pages: KVStore
    ) -> None:
        """See `write_cross_by_operations`."""
        tensors = (states, page_table, query_offsets, lens, cross_pages)
        write_cross_by_operations(self.weights, *tensors, backend=self.backend)


def whole_step(weights: DecoderWeights) -> CpuStep | StepByOperations:
    """What runs the steps of a decoder here.

    On the CPU it is the one call, at the level that the environment names, if it names one. It is the operations where
    the environment names something else for any of them, where the kernels are not built, and for head dimensions
    that they do not have.

    Raises:
        BackendUnavailableError: the environment asks for a level of the CPU backend that cannot run here.
        KernelArgumentError: weights of the wrong shape, dtype or order.
    """
    if weights.embeddings.device.type != "cpu":
        return StepByOperations(weights)
    asked = {from_environment(name) for name in _STEP_OPERATIONS}
    named = {name or "cpu" for name in asked}
    if len(named) > 1 or not all(name.startswith("cpu") for name in named):
        return StepByOperations(weights)
    if weights.dim // weights.num_heads not in HEAD_DIMS:
        return StepByOperations(weights, backend="reference")  # the compiled attention has only those
    try:
        return CpuStep(weights, backend=named.pop())
    except BackendUnavailableError:
        if asked != {None}:
            raise
        return StepByOperations(weights)
