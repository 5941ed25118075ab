"""Muon (Jordan 2024), the optimiser of the transformer's matrices: orthogonalised momentum.

`torch.optim.Muon`, which a test compares this one with, multiplies in bfloat16: without bfloat16 instructions, a step
of the demo model takes ten seconds with it, but only some hundredths of a second in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Newton-Schulz coefficients: singular values in (0, 1] converge to about 1 after `NUM_ITERATIONS`."""
NUM_ITERATIONS = 5
RMS = 0.2
"""RMS of an update relative to the learning rate: about that of AdamW, so that the same rates can be used."""


class Muon(torch.optim.Optimizer):
    """Updates matrices in place, with Nesterov's momentum and decoupled weight decay.

    Args:
        params: matrices, or groups of them.
    """

    def __init__(self, params: Iterable[Any], lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every matrix that has a gradient."""
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is not None:
                    self._update(matrix, matrix.grad, group["lr"], group["weight_decay"])

    def _update(self, matrix: Tensor, gradient: Tensor, lr: float, weight_decay: float) -> None:
        momentum = self.state[matrix].setdefault("momentum_buffer", torch.zeros_like(matrix))
        momentum.lerp_(gradient, 1 - MOMENTUM)
        update = orthogonalised(gradient.lerp(momentum, MOMENTUM))
        matrix.mul_(1 - lr * weight_decay)
        matrix.add_(update, alpha=-lr * RMS * math.sqrt(max(matrix.shape)))


def orthogonalised(matrix: Tensor) -> Tensor:
    """`[m, n]` → about U Vᵀ of its singular value decomposition U S Vᵀ."""
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / x.norm().clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(NUM_ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x
