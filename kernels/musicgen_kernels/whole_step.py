"""Selects how a decoder runs its steps: in a single call on the CPU where possible, otherwise operation by operation.

Depends on the device, the head dimension and MUSICGEN_KERNELS_BACKEND; backends of individual operations are selected
in `backend`.
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
    """A decoder that runs operation by operation, on any device, with the interface of `CpuStep`.

    Args:
        weights: in an order that the operations' backends support.
        backend: for every operation; None selects them automatically.
    """

    def __init__(self, weights: DecoderWeights, *, backend: str | None = None) -> None:
        self.weights, self.backend = weights, backend

    def run(
        self, batch: StepBatch, pages: KVStore, cross_pages: KVStore | None = None, *, num_threads: int | None = None
    ) -> Tensor:
        """See `step_by_operations`. `num_threads` is ignored: operations use the calling thread's setting."""
        return step_by_operations(self.weights, batch, pages, cross_pages, backend=self.backend)

    def write_cross(
        self, states: Tensor, page_table: Tensor, query_offsets: Tensor, lens: Tensor, cross_pages: KVStore
    ) -> None:
        """See `write_cross_by_operations`."""
        tensors = (states, page_table, query_offsets, lens, cross_pages)
        write_cross_by_operations(self.weights, *tensors, backend=self.backend)


def whole_step(weights: DecoderWeights) -> CpuStep | StepByOperations:
    """The step implementation for a decoder on this machine.

    On the CPU it is the single call, at the level named by the environment, if any. It falls back to operations if the
    environment names another backend for any of them, if the kernels are not built, and for head dimensions that they
    do not support.

    Raises:
        BackendUnavailableError: the environment requests a level of the CPU backend that cannot run here.
        KernelArgumentError: weights of the wrong shape, dtype or order.
    """
    if weights.embeddings.device.type != "cpu":
        return StepByOperations(weights)
    asked = {from_environment(name) for name in _STEP_OPERATIONS}
    named = {name or "cpu" for name in asked}
    if len(named) > 1 or not all(name.startswith("cpu") for name in named):
        return StepByOperations(weights)
    if weights.dim // weights.num_heads not in HEAD_DIMS:
        return StepByOperations(weights, backend="reference")  # the compiled attention supports only those
    try:
        return CpuStep(weights, backend=named.pop())
    except BackendUnavailableError:
        if asked != {None}:
            raise
        return StepByOperations(weights)
