"""The RPCs of `musicgen.v1.MusicService`. Each holds the service's context while it runs and exits it as soon as the
client disconnects: grpc cancels the call's task, and nothing here shields a task or generator from that.

The RPCs are plain coroutines that write to their context. An async generator cancelled between two messages would be
closed only some time later.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import partial

import torch
from torch import Tensor

from musicgen.errors import MusicGenError, RequestCancelledError
from musicgen.types import ChunkPolicy, FinishReason
from musicgen_serving.budget import Budget, Share, whole_bytes
from musicgen_serving.grpc_api import convert
from musicgen_serving.grpc_api.call import Call, Context, ServiceGetter, begin
from musicgen_serving.grpc_api.requests import loudness_lufs, to_request
from musicgen_serving.proto.musicgen.v1 import music_service_pb2 as pb
from musicgen_serving.proto.musicgen.v1 import music_service_pb2_grpc as pb_grpc
from musicgen_serving.types import GenerationEnd, GenerationEvent, PieceAudio, Started


class MusicServicer(pb_grpc.MusicServiceServicer):
    """Thin adapter: converts messages and delegates to the service."""

    def __init__(self, get_service: ServiceGetter, budget: Budget) -> None:
        self._get_service, self._budget = get_service, budget

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:
        async with begin(context, self._get_service, request.request_id) as call:
            with self._budget.share() as share:
                with call.counting_refusals():
                    share.take(request.ByteSize())
                    audio_format = convert.checked_format(request.audio_format, stream=False)
                    generation = await to_request(request, call, chunks=None)
                license = (await call.service.model(call.tenant, generation.model)).license
                async with call.service.generate(call.tenant, generation) as events:
                    started, parts, end = await _collect(events, share)
                encode = partial(
                    convert.file_bytes, audio_format, generation.sampling, started, license, loudness_lufs(request.spec)
                )
                answer = await asyncio.to_thread(_whole, started, parts, end, encode)
            await call.send_request_id()
        return answer

    async def StreamGenerate(self, request: pb.StreamGenerateRequest, context: Context) -> None:
        async with begin(context, self._get_service, request.request_id) as call:
            with self._budget.share() as share:
                with call.counting_refusals():
                    share.take(request.ByteSize())
                    audio_format = convert.checked_format(request.audio_format, stream=True)
                    generation = await to_request(request, call, chunks=ChunkPolicy())
                async with call.service.generate(call.tenant, generation) as events:
                    await _stream(events, call, audio_format)

    async def CancelGeneration(
        self, request: pb.CancelGenerationRequest, context: Context
    ) -> pb.CancelGenerationResponse:
        async with begin(context, self._get_service) as call:
            status = convert.from_status(await call.service.cancel(call.tenant, request.request_id))
            await call.send_request_id()
        return pb.CancelGenerationResponse(status=status)

    async def GetGeneration(self, request: pb.GetGenerationRequest, context: Context) -> pb.GetGenerationResponse:
        async with begin(context, self._get_service) as call:
            status = convert.from_status(await call.service.status(call.tenant, request.request_id))
            await call.send_request_id()
        return pb.GetGenerationResponse(status=status)

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        async with begin(context, self._get_service) as call:
            models = [convert.from_model(model) for model in await call.service.models(call.tenant)]
            await call.send_request_id()
        return pb.ListModelsResponse(models=models)


async def _stream(events: AsyncIterator[GenerationEvent], call: Call, audio_format: pb.AudioFormat) -> None:
    """Send the events. `started` waits for the first audio, so that an earlier failure is just a status."""
    started: Started | None = None
    num_sent = 0
    async for event in events:
        if isinstance(event, Started):
            started = event
            continue
        assert started is not None  # the service's first event
        if isinstance(event, GenerationEnd):
            _raise_unless_finished(event)
        if num_sent == 0:
            await call.send_request_id()
            await call.write(pb.StreamGenerateResponse(started=convert.from_started(started)))
        num_sent += 1
        if isinstance(event, GenerationEnd):
            await call.write(pb.StreamGenerateResponse(finished=convert.from_end(event, started.seeds)))
            return
        for chunk in convert.from_audio(event, audio_format):
            await call.write(pb.StreamGenerateResponse(audio=chunk))
    raise RuntimeError("the event stream ended without a terminal event")


async def _collect(
    events: AsyncIterator[GenerationEvent], share: Share
) -> tuple[Started, list[list[Tensor]], GenerationEnd]:
    """Collect all events of a request: its start, the samples of each piece, its end."""
    started: Started | None = None
    parts: list[list[Tensor]] = []
    async for event in events:
        if isinstance(event, Started):
            share.take(whole_bytes(len(event.seeds), event.num_samples, event.channels))
            started, parts = event, [[] for _ in event.seeds]
        elif isinstance(event, PieceAudio):
            parts[event.piece].append(event.samples)
        else:
            _raise_unless_finished(event)
            assert started is not None  # the service's first event
            return started, parts, event
    raise RuntimeError("the event stream ended without a terminal event")


def _whole(
    started: Started, parts: list[list[Tensor]], end: GenerationEnd, encode: Callable[[Tensor, int], bytes]
) -> pb.GenerateResponse:
    """Args: encode: samples `[C, N]` of a piece, and its index → bytes."""
    reports = convert.from_end(end, started.seeds)
    answer = pb.GenerateResponse(started=convert.from_started(started), billed_s=end.billed_s)
    for piece, (samples, report) in enumerate(zip(parts, reports.pieces, strict=True)):
        whole = torch.cat(samples, dim=-1) if samples else torch.zeros(started.channels, 0)
        answer.pieces.add(audio=encode(whole, piece), report=report)
    return answer


def _raise_unless_finished(end: GenerationEnd) -> None:
    if end.reason is FinishReason.CANCELLED:
        raise end.error or RequestCancelledError("the request was cancelled")
    if end.reason is FinishReason.FAILED:
        raise end.error or MusicGenError("the request failed for an unknown reason")
