"""The inputs and the output of a decode step of so many rows, at addresses that never change.

What a CUDA graph reads and writes. All inputs lie in one piece of memory and in one like it on the host, so that a step
is sent with one copy. Knows neither sequences nor kernels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from musicgen_kernels import SampleBatch
from musicgen_kernels.step import StepBatch
from torch import Tensor

ALIGNMENT = 16
"""Bytes. Triton compiles a kernel again for an address that is no multiple of it."""


@dataclass(frozen=True, slots=True)
class DecodeShape:
    """What every number of rows has in common."""

    num_codebooks: int
    max_pages: int
    max_text_pages: int | None
    """None: no cross-attention."""
    special_token: int
    spare_page: int
    """A page that nobody else has: rows that are not there write to it."""
    spare_slot: int
    """The same in the buffer of codes."""


class DecodeBuffers:
    """A step of `num_rows` rows of one new position each, and as many requests, most of which are not there.

    A row that is not there feeds the special token to a position of its own in the spare page, and attends to nothing
    else. A request that is not there has no rows and decides step 0 of a piece of no frames, which is the special token
    without a draw, in the spare slot.

    Attributes:
        host: the inputs by the names of `StepBatch` and `SampleBatch`, to be written before `upload`.
        step, sampling: the same on the device.
        out: `[num_rows, K]` int32 on the device, the codes.
    """

    def __init__(self, num_rows: int, shape: DecodeShape, device: torch.device) -> None:
        self.num_rows, self.shape = num_rows, shape
        places, num_bytes = _places(num_rows, shape)
        is_gpu = device.type == "cuda"
        self._sent = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=is_gpu)
        self._received = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        self.out = torch.zeros(num_rows, shape.num_codebooks, dtype=torch.int32, device=device)
        self._out = torch.zeros(self.out.shape, dtype=torch.int32, pin_memory=is_gpu)
        self.host = {name: _view(self._sent, place).numpy() for name, place in places.items()}
        tensors = {name: _view(self._received, place) for name, place in places.items()}
        self.sampling = SampleBatch(**{name: tensors.pop(name) for name in SampleBatch.__slots__})
        self.step = StepBatch(**tensors)
        self.clear()

    def clear(self) -> None:
        """Nobody is there."""
        for array in self.host.values():
            array.fill(0)
        self.host["query_offsets"][:] = np.arange(self.num_rows + 1)
        self.host["logit_tokens"][:] = np.arange(self.num_rows)
        self.host["codes"].fill(self.shape.special_token)
        self.host["kv_lens"].fill(1)
        self.host["page_table"].fill(self.shape.spare_page)
        self.host["slots"].fill(self.shape.spare_slot)

    def upload(self) -> None:
        """Send the inputs to the device, behind what its current stream has to do.

        They may be written again after the next `download`, which waits.
        """
        self._received.copy_(self._sent, non_blocking=True)

    def download(self) -> np.ndarray:
        """The codes `[num_rows, K]` when they are there; a copy."""
        self._out.copy_(self.out, non_blocking=True)
        if self.out.device.type == "cuda":
            torch.cuda.current_stream(self.out.device).synchronize()
        return self._out.numpy().copy()


@dataclass(frozen=True, slots=True)
class _Place:
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _places(num_rows: int, shape: DecodeShape) -> tuple[dict[str, _Place], int]:
    """Where each input lies, and how much room they take."""
    rows, offsets = (num_rows,), (num_rows + 1,)
    ints: dict[str, tuple[int, ...]] = {
        "codes": (num_rows, shape.num_codebooks),
        "query_offsets": offsets,
        "kv_lens": rows,
        "page_table": (num_rows, shape.max_pages),
        "logit_tokens": rows,
        "row_offsets": offsets,
        **dict.fromkeys(("slots", "steps", "num_frames", "top_k"), rows),
    }
    if shape.max_text_pages is not None:
        ints |= {"cross_page_table": (num_rows, shape.max_text_pages), "cross_lens": rows}
    floats = dict.fromkeys(("guidance", "guidance_beta", "temperature", "top_p"), rows)
    places, start = {}, 0
    for sizes, dtype in ((ints, torch.int32), ({"seeds": rows}, torch.int64), (floats, torch.float32)):
        for name, size in sizes.items():
            places[name] = place = _Place(start, size, dtype)
            start += -(-place.num_bytes // ALIGNMENT) * ALIGNMENT
    return places, start


def _view(memory: Tensor, place: _Place) -> Tensor:
    return memory[place.start : place.start + place.num_bytes].view(place.dtype).view(place.shape)
