"""Inputs and output of a decode step with a fixed number of rows, at fixed addresses.

Used by steps that are prepared once and run many times: a CUDA graph, or a validated call on the CPU. All inputs share
one allocation, so that one copy uploads a step. Independent of sequences and kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from musicgen_kernels import SampleBatch
from musicgen_kernels.step import StepBatch

from musicgen.engine.transfer import Shape, lay_out, new_host_memory


@dataclass(frozen=True, slots=True)
class DecodeShape:
    """Properties shared by the buffers of all sizes."""

    num_codebooks: int
    max_pages: int
    max_text_pages: int | None
    """None: no cross-attention."""
    special_token: int
    spare_page: int
    """An otherwise unused page that padding rows write to."""
    spare_slot: int
    """The same in the buffer of codes."""


class DecodeBuffers:
    """A step of `num_rows` rows of one new position each, and of `num_requests` requests. Some may be padding.

    A padding row feeds the special token to its own position in the spare page and attends to nothing else. A padding
    request has no rows and decides step 0 of an empty piece in the spare slot, which yields the special token without
    sampling.

    Attributes:
        host: the inputs by their names in `StepBatch` and `SampleBatch`, to be written before `upload`.
        step, sampling: the same on the device.
        out: `[num_requests, K]` int32 on the device, the codes.
    """

    def __init__(self, num_rows: int, num_requests: int, shape: DecodeShape, device: torch.device) -> None:
        self.num_rows, self.num_requests, self.shape = num_rows, num_requests, shape
        places, num_bytes = lay_out(_inputs(num_rows, num_requests, shape))
        self._is_gpu = device.type == "cuda"
        self._sent = new_host_memory(num_bytes, device)
        self._received = torch.empty_like(self._sent, device=device) if self._is_gpu else self._sent
        self.out = torch.zeros(num_requests, shape.num_codebooks, dtype=torch.int32, device=device)
        self._out = torch.zeros(self.out.shape, dtype=torch.int32, pin_memory=True) if self._is_gpu else self.out
        self._codes = self._out.numpy()
        self.host = {name: place.of(self._sent).numpy() for name, place in places.items()}
        tensors = {name: place.of(self._received) for name, place in places.items()}
        self.sampling = SampleBatch(**{name: tensors.pop(name) for name in SampleBatch.__slots__})
        self.step = StepBatch(**tensors)
        self.clear()

    def clear(self) -> None:
        """Make all rows and requests padding."""
        for array in self.host.values():
            array.fill(0)
        self.host["query_offsets"][:] = np.arange(self.num_rows + 1)
        self.host["logit_tokens"][:] = np.arange(self.num_rows)
        self.host["codes"].fill(self.shape.special_token)
        self.host["kv_lens"].fill(1)
        self.host["page_table"].fill(self.shape.spare_page)
        self.host["slots"].fill(self.shape.spare_slot)

    def upload(self) -> None:
        """Copy the inputs to the device on its current stream.

        They may be overwritten after the next `download`, which synchronises.
        """
        if self._is_gpu:
            self._received.copy_(self._sent, non_blocking=True)

    def download(self) -> np.ndarray:
        """Wait for the codes `[num_requests, K]` and return a copy."""
        if self._is_gpu:
            self._out.copy_(self.out, non_blocking=True)
            torch.cuda.current_stream(self.out.device).synchronize()
        return self._codes.copy()


def _inputs(num_rows: int, num_requests: int, shape: DecodeShape) -> dict[str, tuple[Shape, torch.dtype]]:
    rows: Shape = (num_rows,)
    requests: Shape = (num_requests,)
    ints = {
        "codes": (num_rows, shape.num_codebooks),
        "query_offsets": (num_rows + 1,),
        "kv_lens": rows,
        "page_table": (num_rows, shape.max_pages),
        "logit_tokens": rows,
        "row_offsets": (num_requests + 1,),
        **dict.fromkeys(("slots", "steps", "num_frames", "top_k"), requests),
    }
    if shape.max_text_pages is not None:
        ints |= {"cross_page_table": (num_rows, shape.max_text_pages), "cross_lens": rows}
    floats = dict.fromkeys(("guidance", "guidance_beta", "temperature", "top_p"), requests)
    kinds = ((ints, torch.int32), ({"seeds": requests}, torch.int64), (floats, torch.float32))
    return {name: (size, dtype) for sizes, dtype in kinds for name, size in sizes.items()}
