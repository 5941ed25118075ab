"""Fast tensor serialization between replicas: pickles tensors as NumPy arrays.

Torch pickles a tensor as an embedded file, which costs 0.2 ms to write and 0.25 ms to read regardless of size; an array
costs a twentieth of that.
"""

from __future__ import annotations

import copyreg
from typing import Any

import numpy as np
import torch
from torch import Tensor


def pickle_tensors_as_arrays() -> None:
    """Enable for this process. Any process that can import this module can unpickle the result."""
    copyreg.pickle(Tensor, _reduced)


def _reduced(tensor: Tensor) -> str | tuple[Any, ...]:
    if tensor.device.type != "cpu" or tensor.requires_grad or tensor.dtype == torch.bfloat16:  # unsupported by NumPy
        return tensor.__reduce_ex__(5)  # type: ignore[no-any-return, no-untyped-call]
    return _tensor, (tensor.numpy(),)


def _tensor(array: np.ndarray[Any, Any]) -> Tensor:
    return torch.from_numpy(array if array.flags.writeable else array.copy())
