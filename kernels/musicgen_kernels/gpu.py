"""Device requirements of the GPU backends."""

from __future__ import annotations

import torch

OLDEST = (8, 0)
"""Compute capability of Ampere: asynchronous copies and bfloat16 products."""


def too_old(device: str) -> str | None:
    """Why a GPU ("cuda:1"; "cuda" is the current one) cannot run the kernels; None if it can, or if there is no GPU."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) >= OLDEST:
        return None
    return f"the GPU has compute capability {major}.{minor}, the kernels need {OLDEST[0]}.{OLDEST[1]}"
