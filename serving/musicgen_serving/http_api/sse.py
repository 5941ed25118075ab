"""Generations as server-sent events: `music.generation.started`, `music.audio.delta`, one terminal event.

A stream without `music.generation.done`, `.failed` or `.cancelled` was interrupted.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

from musicgen.types import FinishReason
from musicgen_serving.audio_formats import encode_raw
from musicgen_serving.errors import report
from musicgen_serving.http_api.delivery import (
    PieceOrder,
    Sender,
    Wish,
    common_headers,
    error_of,
    next_audio,
    next_started,
)
from musicgen_serving.http_api.errors import ConnectionCutError, error_object
from musicgen_serving.http_api.whole import usage_of
from musicgen_serving.types import GenerationEnd, GenerationEvent, GenerationRequest, PieceAudio, Started

logger = logging.getLogger(__name__)

MEDIA_TYPE = "text/event-stream; charset=utf-8"
_TERMINAL = {
    FinishReason.FINISHED: "music.generation.done",
    FinishReason.FAILED: "music.generation.failed",
    FinishReason.CANCELLED: "music.generation.cancelled",
}


class SseDelivery:
    """Server-sent events. Pieces may interleave; each piece's audio is in order."""

    def __init__(self, request: GenerationRequest, wish: Wish) -> None:
        self._request, self._wish = request, wish
        self._hashes = [hashlib.sha256() for _ in request.pieces]
        self._num_given = 0

    async def deliver(self, events: AsyncIterator[GenerationEvent], out: Sender) -> None:
        started = await next_started(events)
        event: GenerationEvent = await next_audio(events)
        headers = common_headers(self._request, started, MEDIA_TYPE, started.sample_rate)
        await out.start(headers | {"X-Accel-Buffering": "no"})
        await out.write(_event("music.generation.started", self._started(started)))
        order = PieceOrder(self._request, started)
        try:
            while isinstance(event, PieceAudio):
                order.take(event)
                delta = await asyncio.to_thread(self._delta, started, event)
                await out.write(_event("music.audio.delta", delta))
                event = await events.__anext__()
            if isinstance(event, GenerationEnd) and event.reason is FinishReason.FINISHED:
                order.check_complete()
        except (ConnectionCutError, OSError):
            raise
        except Exception as error:
            logger.exception("request %s failed while sending events", self._request.request_id)
            event = GenerationEnd(self._request.request_id, FinishReason.FAILED, (), 0.0, error)
        if not isinstance(event, GenerationEnd):
            raise ConnectionCutError("the event stream ended without a terminal event")
        await out.write(_event(_TERMINAL[event.reason], self._end(started, event)), last=True)

    def _started(self, started: Started) -> dict[str, Any]:
        return {
            "id": self._request.request_id,
            "model": started.model,
            "seeds": started.seeds,
            "sample_rate": started.sample_rate,
            "channels": started.channels,
            "num_pieces": len(self._request.pieces),
            "num_samples": started.num_samples,
            "first_sample": self._request.first_sample,
            "response_format": self._wish.response_format,
            "quoted_start_s": started.quoted_start_s,
        }

    def _delta(self, started: Started, audio: PieceAudio) -> dict[str, Any]:
        content = encode_raw(audio.samples, self._wish.response_format)
        self._hashes[audio.piece].update(content)
        self._num_given += audio.samples.shape[-1]
        num_wanted = (started.num_samples - self._request.first_sample) * len(self._request.pieces)
        return {
            "piece": audio.piece,
            "sample_offset": audio.sample_offset,
            "num_samples": audio.samples.shape[-1],
            "progress": round(self._num_given / num_wanted, 6),
            "audio": base64.b64encode(content).decode(),
        }

    def _end(self, started: Started, end: GenerationEnd) -> dict[str, Any]:
        pieces = [
            {
                "index": piece.piece,
                "seed": started.seeds[piece.piece],
                "num_samples": piece.num_samples,
                "checksum": piece.checksum,
                "audio_checksum": self._hashes[piece.piece].hexdigest(),
                "num_frames": piece.num_frames,
                "queue_s": piece.queue_s,
                "prefill_s": piece.prefill_s,
                "decode_s": piece.decode_s,
                "num_failovers": piece.num_failovers,
            }
            for piece in sorted(end.pieces, key=lambda piece: piece.piece)
        ]
        is_finished = end.reason is FinishReason.FINISHED
        return {
            "id": self._request.request_id,
            "finish_reason": end.reason.value,
            "pieces": pieces,
            "usage": usage_of(end).model_dump(),
            "error": None if is_finished else error_object(report(error_of(end))),
        }


def _event(name: str, values: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps({'type': name, **values}, separators=(',', ':'))}\n\n".encode()
