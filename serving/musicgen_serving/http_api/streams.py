"""One piece as chunked audio, sent while it is generated. A failure can only be signalled by closing the connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from musicgen.types import FinishReason
from musicgen_serving.audio_formats import file_rate, media_type, stream_encoder
from musicgen_serving.http_api.delivery import (
    PieceOrder,
    Sender,
    Wish,
    common_headers,
    error_of,
    file_metadata,
    next_audio,
    next_started,
)
from musicgen_serving.http_api.errors import ConnectionCutError
from musicgen_serving.types import GenerationEnd, GenerationEvent, GenerationRequest, PieceAudio


class StreamDelivery:
    """Chunked audio in any of the API's formats."""

    def __init__(self, request: GenerationRequest, wish: Wish) -> None:
        self._request, self._wish = request, wish

    async def deliver(self, events: AsyncIterator[GenerationEvent], out: Sender) -> None:
        started = await next_started(events)
        audio: GenerationEvent = await next_audio(events)
        num_left = started.num_samples - self._request.first_sample
        format, rate = self._wish.response_format, started.sample_rate
        metadata = file_metadata(self._request, started, 0, self._wish)
        # In a thread as well: writing the head of a file already involves some encoding.
        encoder = await asyncio.to_thread(stream_encoder, format, rate, started.channels, num_left, metadata)
        order = PieceOrder(self._request, started)
        kind = media_type(format, rate, started.channels)
        await out.start(common_headers(self._request, started, kind, file_rate(format, rate)))
        try:
            while isinstance(audio, PieceAudio):
                order.take(audio)
                await out.write(await asyncio.to_thread(encoder.encode, audio.samples))
                audio = await events.__anext__()
            if not isinstance(audio, GenerationEnd) or audio.reason is not FinishReason.FINISHED:
                raise error_of(audio)
            order.check_complete()
            rest = await asyncio.to_thread(encoder.finish)
        except Exception as error:
            if isinstance(error, (ConnectionCutError, OSError)):
                raise
            raise ConnectionCutError("the generation did not finish") from error
        await out.write(rest, last=True)
