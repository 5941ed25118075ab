"""The compute components as Ray replicas: setup, warm-up, gauges. Owns the processes' threads; no logic.

A replica is started when its constructor returns: loaded and warmed up. Serve polls `check_health`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing

import torch
from ray import serve
from torch import Tensor

from musicgen.codec_stream import StreamPiece, StreamState
from musicgen.types import EngineRequest
from musicgen_serving import process, tracing, wire
from musicgen_serving.autoscaling import LOAD
from musicgen_serving.deployments.chroma import ChromaExtractor, Recording
from musicgen_serving.deployments.codec import CodecDecoder
from musicgen_serving.deployments.language_model import LanguageModel, LanguageModelEvent
from musicgen_serving.deployments.text_encoder import TextEncoder
from musicgen_serving.error_values import returns_errors, streams_errors
from musicgen_serving.metrics import RayRecorder
from musicgen_serving.settings import LimitSettings, ModelSettings, ObservabilitySettings

COMPUTE_NICENESS = 5
"""Of compute threads, so that event loops, whose work is short, run first on shared cores. The codec's thread for first
audio keeps normal priority."""
SAME_EVERYWHERE = 1
"""torch threads, where results must be identical in every process."""


def set_up(part: str, observability: ObservabilitySettings, num_threads: int | None = None) -> None:
    """Prepare the process of a replica that handles tensors.

    Args:
        part: name of the component, for logs and spans.
        num_threads: number of torch threads, in a replica that computes; None in one that does not.
    """
    process.set_up(part, observability)
    wire.pickle_tensors_as_arrays()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    torch.set_num_threads(num_threads or 1)
    if num_threads is not None:
        # On Linux niceness is per thread, and inherited by the threads that these start.
        executor = ThreadPoolExecutor(initializer=os.nice, initargs=(COMPUTE_NICENESS,))
        asyncio.get_running_loop().set_default_executor(executor)


def _labels(model: str) -> dict[str, str]:
    return {"model": model, "replica": serve.get_replica_context().replica_id.unique_id}


class LanguageModelReplica(LanguageModel):
    """The engine of one replica."""

    async def __init__(self, settings: ModelSettings, observability: ObservabilitySettings) -> None:  # type: ignore[misc]
        # Leave one core to the codec and the ingresses: an engine step stalls if any of its threads is preempted.
        num_threads = settings.num_threads or max(1, len(os.sched_getaffinity(0)) - 1)
        set_up("language-model", observability, num_threads)
        await asyncio.to_thread(super().__init__, settings)  # the engine's threads inherit this one's niceness
        await self.warm_up()
        self._gauges = asyncio.create_task(self._show_gauges(_labels(settings.name)))

    @streams_errors
    async def generate(
        self, request: EngineRequest, trace: str | None = None
    ) -> AsyncGenerator[LanguageModelEvent, None]:
        """As `LanguageModel.generate`, in a span under `trace`."""
        with tracing.long_span("language_model.generate", trace, request_id=request.request_id):
            async with aclosing(super().generate(request)) as events:
                async for event in events:
                    yield event

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Polled by Serve."""
        return {LOAD: (await self.load()).queued_frames}

    async def _show_gauges(self, labels: dict[str, str]) -> None:
        recorder = RayRecorder()
        while True:
            await asyncio.sleep(process.GAUGES_S)
            load = await self.load()
            recorder.set("step_seconds", load.step_s, labels)
            recorder.set("batch_pieces", load.num_running, labels)
            recorder.set("waiting_pieces", load.num_waiting, labels)
            recorder.set("queued_frames", load.queued_frames, labels)
            recorder.set("kv_pages_used", load.pages_held, labels)
            recorder.set("kv_pages", load.pages_total, labels)

    async def __del__(self) -> None:
        await self.close()


class CodecReplica(CodecDecoder):
    """The codec of one replica."""

    async def __init__(  # type: ignore[misc]
        self, settings: ModelSettings, limits: LimitSettings, observability: ObservabilitySettings
    ) -> None:
        set_up("codec", observability, SAME_EVERYWHERE)
        super().__init__(settings, limits, urgent_thread=ThreadPoolExecutor(1))  # with niceness 0
        await self.warm_up()
        self._gauges = asyncio.create_task(self._show_gauges(_labels(settings.name)))

    @returns_errors
    async def decode(
        self, piece: StreamPiece, *, urgent: bool = False, trace: str | None = None
    ) -> tuple[Tensor, StreamState]:
        """As `CodecDecoder.decode`, in a span under `trace`."""
        with tracing.span("codec.decode", trace, frames=piece.codes.shape[-1]):
            return await super().decode(piece, urgent=urgent)

    @returns_errors
    async def encode(self, content: bytes, duration_s: float, trace: str | None = None) -> Tensor:
        """As `CodecDecoder.encode`, in a span under `trace`."""
        with tracing.span("codec.encode", trace):
            return await super().encode(content, duration_s)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Polled by Serve."""
        return {LOAD: await self.num_calls()}

    async def _show_gauges(self, labels: dict[str, str]) -> None:
        recorder = RayRecorder()
        while True:
            await asyncio.sleep(process.GAUGES_S)
            recorder.set("codec_calls", await self.num_calls(), labels)


class TextEncoderReplica(TextEncoder):
    """The text encoder of one replica."""

    check_prompt = returns_errors(TextEncoder.check_prompt)

    async def __init__(self, settings: ModelSettings, observability: ObservabilitySettings) -> None:  # type: ignore[misc]
        set_up("text-encoder", observability, SAME_EVERYWHERE)
        super().__init__(settings)
        await self.warm_up()

    @returns_errors
    async def encode(self, prompt: str, trace: str | None = None) -> Tensor:
        """As `TextEncoder.encode`, in a span under `trace`."""
        with tracing.span("text_encoder.encode", trace):
            return await super().encode(prompt)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Polled by Serve."""
        return {LOAD: await self.num_calls()}


class ChromaReplica(ChromaExtractor):
    """The melody features of one replica."""

    check_stems = returns_errors(ChromaExtractor.check_stems)

    async def __init__(  # type: ignore[misc]
        self, settings: ModelSettings, limits: LimitSettings, observability: ObservabilitySettings
    ) -> None:
        set_up("chroma", observability, SAME_EVERYWHERE)
        super().__init__(settings, limits)
        await self.warm_up()

    @returns_errors
    async def extract(self, recording: Recording, trace: str | None = None) -> list[Tensor]:
        """As `ChromaExtractor.extract`, in a span under `trace`."""
        with tracing.span("chroma.extract", trace):
            return await super().extract(recording)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Polled by Serve."""
        return {LOAD: await self.num_calls()}
