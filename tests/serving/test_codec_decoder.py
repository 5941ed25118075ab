"""The codec of one replica: whose error an error is, who goes first, and one recording at a time."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

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
def test_a_piece_that_cannot_be_decoded_harms_no_other(
    codec: CodecDecoder, max_batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, and together as on a GPU."""
    good, other = pieces(codec, [9, 30])
    bad = replace(good, codes=good.codes + 4096)

    async def run() -> list[Any]:
        monkeypatch.setattr(codec, "_decode", Batcher(codec._decode_all, max_batch))
        return await asyncio.gather(*(codec.decode(piece) for piece in (good, bad, other)), return_exceptions=True)

    first, error, second = asyncio.run(run())
    assert isinstance(error, InvalidRequestError)
    for piece, (samples, state) in ((good, first), (other, second)):
        assert samples.shape == (1, 640 * piece.codes.shape[-1])
        assert state.finished
        assert (samples - asyncio.run(codec.decode(piece))[0]).abs().max() <= 1e-5


def test_the_first_state_is_on_the_host(codec: CodecDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes to ingresses, which may have no GPU."""
    on_device, on_host = Mock(), torch.zeros(3)
    on_device.cpu.return_value = on_host
    monkeypatch.setattr(codec._codec, "initial_state", lambda: StreamState(on_device, 0, 0, False))
    assert torch.equal(asyncio.run(codec.initial_state()).values, on_host)


def test_calls_take_turns_cell_by_cell_and_what_is_urgent_waits_for_none(
    codec: CodecDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the cells that are not urgent wait until what is urgent has been decoded."""
    long, short, first = pieces(codec, [130, 40, 12])
    wanted = [asyncio.run(codec.decode(piece))[0] for piece in (long, short, first)]
    order: list[tuple[str, int]] = []
    decoded = threading.Event()
    decode_all = codec._decode_all

    def noted(name: str) -> Batcher[StreamPiece, tuple[Tensor, StreamState]]:
        def decode(cells: Sequence[StreamPiece]) -> Sequence[tuple[Tensor, StreamState] | Exception]:
            assert name == "urgent" or decoded.wait(10)
            order.extend((name, cell.codes.shape[-1]) for cell in cells)
            results = decode_all(cells)
            decoded.set()
            return results

        return Batcher(decode, max_batch=1)

    async def run() -> list[tuple[Tensor, StreamState]]:
        monkeypatch.setattr(codec, "_decode", noted("other"))
        monkeypatch.setattr(codec, "_decode_urgently", noted("urgent"))
        others = asyncio.gather(codec.decode(long), codec.decode(short))
        await asyncio.sleep(0.02)
        assert await codec.num_calls() == 2
        urgent = await codec.decode(first, urgent=True)
        return [*await others, urgent]

    results = asyncio.run(run())
    assert order == [("urgent", 12), *(("other", n) for n in (12, 12, 18, 18, 27, 10, 41, 32))]
    for (samples, state), samples_alone in zip(results, wanted, strict=True):
        assert state.finished
        assert torch.equal(samples, samples_alone)


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
