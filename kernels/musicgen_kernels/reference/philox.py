"""Philox4x32-10, the counter-based generator of Salmon, Moraes, Dror, Shaw (SC 2011), in integer tensor
arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox4x32(counter: Tensor, key: Tensor) -> Tensor:
    """Ten rounds.

    Args:
        counter: [..., 4] int64, each in [0, 2³²).
        key: [..., 2] int64, each in [0, 2³²), broadcast against the counter.

    Returns:
        [..., 4] int64 words in [0, 2³²).
    """
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key.unbind(-1)
    for _ in range(10):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return torch.stack([c0, c1, c2, c3], dim=-1)


def uniforms(seed: int, step: int, codebook: int, num_codes: int) -> Tensor:
    """The uniforms in (0, 1) of one draw, [num_codes] float32, exact: ((x >> 9) + ½)·2⁻²³."""
    num_blocks = (num_codes + 3) // 4
    counter = torch.zeros(num_blocks, 4, dtype=torch.int64)
    counter[:, 0], counter[:, 1] = step, codebook
    counter[:, 2] = torch.arange(num_blocks)
    key = torch.tensor([seed & _MASK, (seed >> 32) & _MASK])
    words = philox4x32(counter, key).flatten()[:num_codes]
    return ((words >> 9).float() + 0.5) * 2.0**-23


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a·b, using 16 bits of b at a time, so that products fit int64."""
    low_part = a * (b & 0xFFFF)
    high = (a * (b >> 16) + (low_part >> 16)) >> 16
    return high & _MASK, (a * b) & _MASK
