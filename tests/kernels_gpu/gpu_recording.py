"""Records calls of the CUDA operations as files that `host_replay.cpp` reads; its header gives the format."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Run = Callable[..., None]


def recording(run: Run, folder: Path) -> Run:
    """`musicgen_kernels.cuda._run` that also writes each call to a file in `folder`, numbered."""
    numbers = itertools.count(len(list(folder.iterdir())))

    def record(
        operation: str,
        tensors: Sequence[Tensor | None],
        integers: Sequence[int],
        reals: Sequence[float] = (),
    ) -> None:
        buffers = _buffers(tensors)
        before = [_bytes(storage) for storage in buffers.values()]
        run(operation, tensors, integers, reals)
        path = folder / f"{next(numbers):05d}-{operation}"
        parts = [b"MGKR", _ints(len(buffers))]
        for content in before:
            parts += [_ints(len(content)), content]
        name = operation.encode()
        parts += [_ints(len(name)), name, _ints(len(tensors))]
        order = list(buffers)
        for t in tensors:
            parts.append(_ints(-1, 0) if t is None else _ints(order.index(_key(t)), _offset(t)))
        parts += [_ints(len(integers), *integers), _ints(len(reals)), struct.pack(f"<{len(reals)}d", *reals)]
        parts += [_bytes(storage) for storage in buffers.values()]
        path.write_bytes(b"".join(parts))

    return record


def _buffers(tensors: Sequence[Tensor | None]) -> dict[int, torch.UntypedStorage]:
    return {_key(t): t.untyped_storage() for t in tensors if t is not None}


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _offset(tensor: Tensor) -> int:
    return tensor.storage_offset() * tensor.element_size()


def _bytes(storage: Any) -> bytes:
    return bytes(torch.tensor([], dtype=torch.uint8).set_(storage).numpy())


def _ints(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}q", *values)
