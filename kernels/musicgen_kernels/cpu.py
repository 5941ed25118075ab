"""The CPU backend: hands addresses and sizes of checked tensors to the compiled kernels of one
instruction-set level.

It checks what only this backend asks for (dtypes, memory order); the compiled code checks indices and
lengths. Threads: as many as `torch.get_num_threads()`.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

from .isa import load_level
from .sampling import SampleBatch


class CpuBackend:
    """The operations of one level.

    Attributes:
        level: "baseline", "avx2" or "avx512".
        native: its compiled module.
    """

    def __init__(self, level: str, native: ModuleType) -> None:
        self.level, self.native = level, native

    def unavailable(self, operation: str, device_type: str, dtype: torch.dtype) -> str | None:
        """Why this backend cannot run the operation; None when it can."""
        if device_type != "cpu":
            return "it runs on the CPU only"
        if dtype == torch.float64:
            return "it computes in float32; float64 is the reference's"
        return None

    def delayed_sample_step(
        self, logits: Tensor, batch: SampleBatch, delays: Tensor, sequences: Tensor, out: Tensor
    ) -> None:
        """See `musicgen_kernels.sampling.delayed_sample_step`."""
        tensors = (
            *(logits, batch.row_offsets, batch.slots, batch.steps, batch.num_frames, batch.seeds),
            *(batch.guidance, batch.guidance_beta, batch.temperature, batch.top_k, batch.top_p),
            *(delays, sequences, out),
        )
        num_rows, num_codebooks, num_codes = logits.shape
        sizes = (
            *(batch.slots.shape[0], num_rows, sequences.shape[0], sequences.shape[2]),
            *(num_codebooks, num_codes),
        )
        pointers = tuple(tensor.data_ptr() for tensor in tensors)
        self.native.delayed_sample_step(pointers, sizes, torch.get_num_threads())


@functools.cache
def load(level: str | None) -> CpuBackend:
    """The backend at a level; None: the environment's choice, or the best that runs here.

    Raises:
        BackendUnavailableError: it is not built or not supported.
    """
    return CpuBackend(*load_level(level))
