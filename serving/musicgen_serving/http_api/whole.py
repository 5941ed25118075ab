"""Non-streaming responses: one piece as a file, or any number as JSON, sent once everything is generated."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import time
from collections.abc import AsyncIterator

import torch
from torch import Tensor

from musicgen.types import FinishReason
from musicgen_serving.audio_formats import encode_whole, file_rate, levelled, media_type
from musicgen_serving.budget import whole_bytes
from musicgen_serving.http_api.delivery import (
    PieceOrder,
    Sender,
    Wish,
    common_headers,
    error_of,
    file_metadata,
    next_started,
)
from musicgen_serving.http_api.schemas import GenerationResult, PieceResult, UsageBody
from musicgen_serving.types import GenerationEnd, GenerationEvent, GenerationRequest, PieceAudio, PieceReport, Started


class WholeDelivery:
    """One response with Content-Length."""

    def __init__(self, request: GenerationRequest, wish: Wish) -> None:
        self._request, self._wish = request, wish

    async def deliver(self, events: AsyncIterator[GenerationEvent], out: Sender) -> None:
        started = await next_started(events)
        num_samples = started.num_samples - self._request.first_sample
        out.hold(whole_bytes(len(self._request.pieces), num_samples, started.channels))
        order = PieceOrder(self._request, started)
        parts: list[list[Tensor]] = [[] for _ in self._request.pieces]
        end: GenerationEnd | None = None
        async for event in events:
            if isinstance(event, PieceAudio):
                order.take(event)
                parts[event.piece].append(event.samples)
            elif isinstance(event, GenerationEnd):
                end = event
        if end is None or end.reason is not FinishReason.FINISHED:
            raise error_of(end)
        order.check_complete()
        # Safe in a thread even if the handler is cancelled: encoding shares no state with it.
        files = await asyncio.to_thread(self._encode, started, parts)
        if self._wish.as_json:
            body = await asyncio.to_thread(_to_json, self._request, self._wish, started, end, files)
            kind = "application/json"
        else:
            (body,) = files
            kind = media_type(self._wish.response_format, started.sample_rate, started.channels)
        rate = file_rate(self._wish.response_format, started.sample_rate)
        headers = common_headers(self._request, started, kind, rate) | _end_headers(end, body)
        await out.start(headers)
        await out.write(body, last=True)

    def _encode(self, started: Started, parts: list[list[Tensor]]) -> list[bytes]:
        files = []
        for index, part in enumerate(parts):
            samples = torch.cat(part, dim=-1)
            samples = levelled(samples, started.sample_rate, self._wish.loudness_lufs)
            metadata = file_metadata(self._request, started, index, self._wish)
            files.append(encode_whole(samples, started.sample_rate, self._wish.response_format, metadata))
        return files


def _end_headers(end: GenerationEnd, body: bytes) -> dict[str, str]:
    usage = usage_of(end)
    return {
        "Content-Length": str(len(body)),
        "X-Checksum": ",".join(piece.checksum for piece in _in_order(end)),
        "X-Billed-Seconds": f"{usage.billed_s:g}",
        "X-Num-Frames": str(usage.num_frames),
        "X-Queue-Seconds": f"{usage.queue_s:.6f}",
        "X-Prefill-Seconds": f"{usage.prefill_s:.6f}",
        "X-Decode-Seconds": f"{usage.decode_s:.6f}",
        "X-Num-Failovers": str(usage.num_failovers),
    }


def _in_order(end: GenerationEnd) -> list[PieceReport]:
    return sorted(end.pieces, key=lambda piece: piece.piece)


def usage_of(end: GenerationEnd) -> UsageBody:
    """The sums over all pieces."""
    return UsageBody(
        billed_s=end.billed_s,
        num_frames=sum(piece.num_frames for piece in end.pieces),
        queue_s=sum(piece.queue_s for piece in end.pieces),
        prefill_s=sum(piece.prefill_s for piece in end.pieces),
        decode_s=sum(piece.decode_s for piece in end.pieces),
        num_failovers=sum(piece.num_failovers for piece in end.pieces),
    )


def _to_json(request: GenerationRequest, wish: Wish, started: Started, end: GenerationEnd, files: list[bytes]) -> bytes:
    data = [
        PieceResult(
            index=index,
            seed=started.seeds[index],
            audio=base64.b64encode(content).decode(),
            num_samples=report.num_samples,
            checksum=report.checksum,
            audio_checksum=hashlib.sha256(content).hexdigest(),
        )
        for index, (content, report) in enumerate(zip(files, _in_order(end), strict=True))
    ]
    result = GenerationResult(
        id=request.request_id,
        created=int(time.time()),
        model=started.model,
        finish_reason=end.reason.value,
        response_format=wish.response_format,
        sample_rate=file_rate(wish.response_format, started.sample_rate),
        channels=started.channels,
        data=data,
        usage=usage_of(end),
    )
    return result.model_dump_json().encode()
