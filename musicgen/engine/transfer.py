"""Packs many small arrays into one buffer, so that one copy transfers them to a device."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 16
"""Bytes. Triton recompiles a kernel for pointers that are not aligned to this."""

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """The position of an array in the buffer."""

    start: int
    shape: Shape
    dtype: torch.dtype

    def of(self, memory: Tensor) -> Tensor:
        """A view of the array in a buffer of this layout."""
        num_bytes = math.prod(self.shape) * self.dtype.itemsize
        return memory[self.start : self.start + num_bytes].view(self.dtype).view(self.shape)


def lay_out(arrays: Mapping[str, tuple[Shape, torch.dtype]]) -> tuple[dict[str, Place], int]:
    """The position of each array, and the total size in bytes."""
    places, end = {}, 0
    for name, (shape, dtype) in arrays.items():
        places[name] = Place(end, shape, dtype)
        end += -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
    return places, end


def new_host_memory(num_bytes: int, device: torch.device) -> Tensor:
    """A host buffer from which copies to `device` can be asynchronous."""
    return torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")


def send(arrays: Mapping[str, np.ndarray], device: torch.device) -> dict[str, Tensor]:
    """The arrays as tensors on a device."""
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    places, num_bytes = lay_out({name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()})
    memory = new_host_memory(num_bytes, device)
    for name, place in places.items():
        place.of(memory).copy_(tensors[name])
    received = memory.to(device, non_blocking=True)
    return {name: place.of(received) for name, place in places.items()}
