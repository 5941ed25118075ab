"""The operations as Triton kernels, one module per operation or group of related operations.

Functions receive the validated arguments of the public operations. They run on NVIDIA GPUs; with TRITON_INTERPRET=1
set before Triton is imported they run on CPU tensors in Triton's interpreter, which is slow and meant for tests. They
launch on PyTorch's current stream, never synchronise, and allocate at most a workspace through PyTorch's allocator, so
a CUDA graph can capture them.
"""

from __future__ import annotations

import torch

from ..gpu import too_old
from .append import append_paged_kv
from .attention import cross_attention, paged_attention
from .linear import linear
from .norm import embed_codes, layer_norm
from .runtime import interpreted
from .sampling import delayed_sample_step

__all__ = [
    "append_paged_kv",
    "cross_attention",
    "delayed_sample_step",
    "embed_codes",
    "layer_norm",
    "linear",
    "paged_attention",
    "unavailable",
]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_DTYPES = {
    "append_paged_kv": (*_FLOATS, torch.int8),
    "paged_attention": (*_FLOATS, torch.int8),
    "cross_attention": (*_FLOATS, torch.int8),
    "delayed_sample_step": (torch.float32,),
}


def unavailable(operation: str, device: str, dtype: torch.dtype, head_dim: int | None = None) -> str | None:
    """Why this backend cannot run the operation on that device and dtype; None if it can. Supports all head dims."""
    wanted = "cpu" if interpreted() else "cuda"
    if device.partition(":")[0] != wanted:
        reason = "in Triton's interpreter" if interpreted() else "outside Triton's interpreter"
        return f"{reason}, runs on {wanted} tensors only"
    if dtype not in _DTYPES.get(operation, _FLOATS):
        return f"has no kernel for {dtype}"
    return None if interpreted() else too_old(device)
