"""Tensors between processes arrive as they were sent, whichever way they are pickled."""

from __future__ import annotations

import copyreg
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from musicgen_serving import wire
from ray import cloudpickle
from torch import Tensor

from musicgen.codec_stream import StreamPiece, StreamState


@pytest.fixture(autouse=True)
def as_arrays() -> Iterator[None]:
    wire.pickle_tensors_as_arrays()
    yield
    copyreg.dispatch_table.pop(Tensor)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12, dtype=torch.int32).reshape(3, 4),
        torch.arange(12.0).reshape(3, 4).T,
        torch.arange(12.0)[2:5],
        torch.tensor(7),
        torch.empty(4, 0, dtype=torch.int32),
        torch.tensor([True, False]),
        torch.ones(3, dtype=torch.bfloat16),
        torch.ones(3, dtype=torch.float16),
        torch.ones(3, requires_grad=True),
    ],
    ids=lambda tensor: f"{tensor.dtype}{list(tensor.shape)}",
)
@pytest.mark.parametrize("dumps", [pickle.dumps, cloudpickle.dumps])
def test_a_tensor_arrives_as_it_was(tensor: Tensor, dumps: Callable[[object], bytes]) -> None:
    arrived = pickle.loads(dumps({"tensor": tensor}))["tensor"]

    assert arrived.dtype == tensor.dtype
    assert arrived.requires_grad == tensor.requires_grad
    assert torch.equal(arrived, tensor)


def test_what_arrives_can_be_written_to_though_its_buffer_came_apart() -> None:
    buffers: list[pickle.PickleBuffer] = []
    sent = pickle.dumps(torch.ones(4), protocol=5, buffer_callback=buffers.append)

    arrived = pickle.loads(sent, buffers=[bytes(buffer) for buffer in buffers])

    arrived += 1
    assert arrived.tolist() == [2.0] * 4


def test_no_file_travels_with_a_piece_of_a_stream() -> None:
    piece = StreamPiece(torch.zeros(4, 12, dtype=torch.int32), StreamState(torch.zeros(1, 64), 0, 0, False), last=False)

    assert len(pickle.dumps(piece)) < 4 * 12 * 4 + 64 * 4 + 800
