"""The codec of one replica: whose error an error is, who goes first, and one recording at a time."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from musicgen_serving.batching import Batcher
from musicgen_serving.deployments.codec import CodecDecoder
from musicgen_serving.settings import LimitSettings, ModelSettings
from torch import Tensor

from musicgen.codec_stream import StreamPiece, StreamState
from musicgen.errors import InvalidRequestError


@pytest.fixture(scope="module")
def codec() -> CodecDecoder:
    return CodecDecoder(ModelSettings(), LimitSettings())


def pieces(codec: CodecDecoder, num_frames: list[int]) -> list[StreamPiece]:
    """Whole pieces from the beginning."""
    state = asyncio.run(codec.initial_state())
    generator = torch.Generator().manual_seed(3)
    return [StreamPiece(torch.randint(0, 1024, (4, n), generator=generator), state, last=True) for n in num_frames]


@pytest.mark.parametrize("max_batch", [1, 16])
def test_a_piece_that_cannot_be_decoded_harms_no_other(codec: CodecDecoder, max_batch: int) -> None:
    """On a CPU, and together as on a GPU."""
    good, other = pieces(codec, [9, 30])
    bad = replace(good, codes=good.codes + 4096)

    async def run() -> list[Any]:
        codec._decode = Batcher(codec._decode_all, max_batch)
        return await asyncio.gather(*(codec.decode(piece) for piece in (good, bad, other)), return_exceptions=True)

    first, error, second = asyncio.run(run())
    assert isinstance(error, InvalidRequestError)
    for piece, (samples, state) in ((good, first), (other, second)):
        assert samples.shape == (1, 640 * piece.codes.shape[-1])
        assert state.finished
        assert (samples - asyncio.run(codec.decode(piece))[0]).abs().max() <= 1e-5


def test_streams_that_begin_go_first(codec: CodecDecoder) -> None:
    begins, other = pieces(codec, [12, 12])
    goes_on = asyncio.run(codec.decode(replace(other, last=False)))[1]
    order: list[int] = []

    async def run() -> None:
        decode = codec._decode_all

        def noted(given: list[StreamPiece]) -> list[tuple[Tensor, StreamState] | Exception]:
            order.extend(piece.state.num_frames for piece in given)
            return list(decode(given))

        codec._decode = Batcher(noted, max_batch=1)
        later = replace(other, state=goes_on, codes=other.codes[:, :6])
        await asyncio.gather(*(codec.decode(piece) for piece in (later, later, later, begins)))

    asyncio.run(run())
    assert order == [0, 12, 12, 12]


def test_recordings_are_encoded_one_after_the_other(codec: CodecDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after a caller has left: what its thread still holds counts. An error is its own caller's only."""
    busy = threading.Lock()

    def encode(content: bytes, duration_s: float) -> Tensor:
        assert busy.acquire(blocking=False), "two at the same time"
        try:
            time.sleep(0.05)
            if content == b"bad":
                raise InvalidRequestError("a good one", "a bad one")
            return torch.tensor([len(content)])
        finally:
            busy.release()

    monkeypatch.setattr(codec, "_encode_one", encode)

    async def run() -> list[Any]:
        gone = asyncio.create_task(codec.encode(b"gone", 1.0))
        await asyncio.sleep(0.02)
        gone.cancel()
        calls = (codec.encode(content, 1.0) for content in (b"1", b"bad", b"333"))
        return await asyncio.gather(*calls, return_exceptions=True)

    one, error, three = asyncio.run(run())
    assert (int(one), int(three)) == (1, 3)
    assert isinstance(error, InvalidRequestError)
