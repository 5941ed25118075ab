"""Many small arrays in one piece of memory, so that one copy carries them to a device. Knows not what they are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 16
"""Bytes. Triton compiles a kernel again for an address that is no multiple of it."""

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """Where an array lies."""

    start: int
    shape: Shape
    dtype: torch.dtype

    def of(self, memory: Tensor) -> Tensor:
        """The array in such a piece of memory, as a view."""
        num_bytes = math.prod(self.shape) * self.dtype.itemsize
        return memory[self.start : self.start + num_bytes].view(self.dtype).view(self.shape)


def lay_out(arrays: Mapping[str, tuple[Shape, torch.dtype]]) -> tuple[dict[str, Place], int]:
    """The place of each array, and the bytes that all take."""
    places, end = {}, 0
    for name, (shape, dtype) in arrays.items():
        places[name] = Place(end, shape, dtype)
        end += -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
    return places, end


def new_host_memory(num_bytes: int, device: torch.device) -> Tensor:
    """Bytes on the host, from which a copy to `device` need not wait."""
    return torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")


def send(arrays: Mapping[str, np.ndarray], device: torch.device) -> dict[str, Tensor]:
    """The arrays as tensors of a device."""
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    places, num_bytes = lay_out({name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()})
    memory = new_host_memory(num_bytes, device)
    for name, place in places.items():
        place.of(memory).copy_(tensors[name])
    received = memory.to(device, non_blocking=True)
    return {name: place.of(received) for name, place in places.items()}
