"""The reference backend: every operation in plain PyTorch, written for readability rather than speed.

The functions receive the validated arguments of the public operations (see `sampling`, `attention`, `linear`, `norm`
for shapes and semantics). They run on any device; float64 inputs are computed in float64.
"""

from __future__ import annotations

import torch

from .attention import append_paged_kv, cross_attention, paged_attention
from .dense import embed_codes, layer_norm, linear
from .philox import philox4x32, uniforms
from .sampling import delayed_sample_step

__all__ = [
    "append_paged_kv",
    "cross_attention",
    "delayed_sample_step",
    "embed_codes",
    "layer_norm",
    "linear",
    "paged_attention",
    "philox4x32",
    "unavailable",
    "uniforms",
]


def unavailable(operation: str, device: str, dtype: torch.dtype, head_dim: int | None = None) -> str | None:
    """None: the reference supports everything on all devices."""
    return None
