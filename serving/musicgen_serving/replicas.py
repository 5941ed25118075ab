"""What runs in Ray's processes: the plain parts, set up, warmed, watched. Owns processes' threads and logs; no logic.

A replica counts as started when its constructor returns: then it is loaded and warm. Serve asks `check_health`.
"""

from __future__ import annotations

import asyncio
import logging
import os
from contextlib import suppress

import torch
from fastapi import FastAPI
from ray import serve

from musicgen.errors import OverloadedError
from musicgen_serving.admission import AdmissionRequest, Ticket
from musicgen_serving.autoscaling import LOAD
from musicgen_serving.deployments.chroma import ChromaExtractor
from musicgen_serving.deployments.codec import CodecDecoder
from musicgen_serving.deployments.gatekeeper import LocalGatekeeper
from musicgen_serving.deployments.language_model import LanguageModel
from musicgen_serving.deployments.text_encoder import TextEncoder
from musicgen_serving.generation import GenerationService
from musicgen_serving.grpc_api.server import GrpcServer, start_server
from musicgen_serving.http_api.app import create_app
from musicgen_serving.metrics import RayRecorder, node_metrics
from musicgen_serving.pipeline import Pipeline
from musicgen_serving.ray_spokes import Handle, RayGatekeeper, RaySpokes
from musicgen_serving.settings import LimitSettings, ModelSettings, ServeSettings
from musicgen_serving.watch import Watch

Parts = tuple[Handle, Handle, Handle, Handle]
"""Handles of one model's language model, codec, text encoder and chroma extractor."""
GAUGES_S = 1.0
"""Between two looks at a replica's load."""
COUNT_S = 2.0
"""Between two counts of the engines."""


def set_up(log_level: str, num_threads: int | None = 1) -> None:
    """Prepare the process of a replica.

    Args:
        num_threads: of torch; None leaves torch's own choice. One by default: results are the same in every process.
    """
    logging.getLogger("musicgen_serving").setLevel(log_level)
    logging.getLogger("musicgen").setLevel(log_level)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if num_threads is not None:
        torch.set_num_threads(num_threads)


def _labels(model: str) -> dict[str, str]:
    return {"model": model, "replica": serve.get_replica_context().replica_id.unique_id}


class LanguageModelReplica(LanguageModel):
    """The engine of one replica."""

    async def __init__(self, settings: ModelSettings, log_level: str) -> None:  # type: ignore[misc]
        set_up(log_level, settings.num_threads or os.cpu_count())
        super().__init__(settings)
        await self.warm_up()
        self._gauges = asyncio.create_task(self._show_gauges(_labels(settings.name)))

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Asked by Serve."""
        return {LOAD: (await self.load()).queued_frames}

    async def _show_gauges(self, labels: dict[str, str]) -> None:
        recorder = RayRecorder()
        while True:
            await asyncio.sleep(GAUGES_S)
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

    async def __init__(self, settings: ModelSettings, limits: LimitSettings, log_level: str) -> None:  # type: ignore[misc]
        set_up(log_level)
        super().__init__(settings, limits)
        await self.warm_up()
        self._gauges = asyncio.create_task(self._show_gauges(_labels(settings.name)))

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Asked by Serve."""
        return {LOAD: await self.num_calls()}

    async def _show_gauges(self, labels: dict[str, str]) -> None:
        recorder = RayRecorder()
        while True:
            await asyncio.sleep(GAUGES_S)
            recorder.set("codec_calls", await self.num_calls(), labels)


class TextEncoderReplica(TextEncoder):
    """The text encoder of one replica."""

    async def __init__(self, settings: ModelSettings, log_level: str) -> None:  # type: ignore[misc]
        set_up(log_level)
        super().__init__(settings)
        await self.warm_up()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Asked by Serve."""
        return {LOAD: await self.num_calls()}


class ChromaReplica(ChromaExtractor):
    """The melody features of one replica."""

    async def __init__(self, settings: ModelSettings, limits: LimitSettings, log_level: str) -> None:  # type: ignore[misc]
        set_up(log_level)
        super().__init__(settings, limits)
        await self.warm_up()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Asked by Serve."""
        return {LOAD: await self.num_calls()}


class GatekeeperReplica(LocalGatekeeper):
    """The one gatekeeper."""

    async def __init__(self, settings: ServeSettings) -> None:  # type: ignore[misc]
        set_up(settings.observability.log_level)
        super().__init__(settings)
        self._draining = False
        self._gauges = asyncio.create_task(self._show_gauges())

    async def admit(self, request: AdmissionRequest) -> Ticket:
        """Raises: OverloadedError: the service is about to stop. Others: as `LocalGatekeeper.admit`."""
        if self._draining:
            raise OverloadedError("the service is shutting down; retry when it is back")
        return await super().admit(request)

    async def drain(self) -> int:
        """Take nothing more in. Returns how many requests still run."""
        self._draining = True
        return (await self.counts()).running

    async def _show_gauges(self) -> None:
        recorder = RayRecorder()
        while True:
            await asyncio.sleep(GAUGES_S)
            for model, load in (await self.counts()).models.items():
                recorder.set("quoted_wait_seconds", load.wait_s, {"model": model})

    def check_health(self) -> None:
        """A gatekeeper that answers is well."""


class Ingress:
    """What both ingresses are: the service in this process, reaching its parts through handles.

    Args:
        parts: for each model's name, handles of its language model, codec, text encoder and chroma extractor.
    """

    def __init__(self, settings: ServeSettings, parts: dict[str, Parts], gatekeeper: Handle) -> None:
        set_up(settings.observability.log_level)
        self.settings = settings
        pipelines = {
            name: Pipeline(RaySpokes(handles, settings.failover.lease_s), settings.failover)
            for name, handles in parts.items()
        }
        self._engines = {name: handles[0] for name, handles in parts.items()}
        watch = Watch(RayRecorder(), settings.observability.player_buffer_s)
        self.gatekeeper = RayGatekeeper(gatekeeper)
        self.service = GenerationService(settings, pipelines, self.gatekeeper, watch)

    async def start(self) -> None:
        """Begin to report, and to count the engines."""
        await self.service.start()
        self._counting = asyncio.create_task(self._count_engines())

    async def _count_engines(self) -> None:
        """Tell the gatekeeper how many engines there are: what it foresees depends on it."""
        while True:
            for model, engine in self._engines.items():
                with suppress(Exception):  # the next count comes soon
                    loads = await engine.broadcast("load").results_async(timeout_s=COUNT_S, return_exceptions=True)
                    await self.gatekeeper.set_capacity(model, sum(not isinstance(load, Exception) for load in loads))
            await asyncio.sleep(COUNT_S)

    def check_health(self) -> None:
        """An ingress that answers is well; whether its parts are is `/readyz`."""


class HttpIngress(Ingress):
    """The HTTP API behind Serve's proxy."""

    async def __init__(  # type: ignore[misc]
        self, settings: ServeSettings, parts: dict[str, Parts], gatekeeper: Handle, *_others: Handle
    ) -> None:
        super().__init__(settings, parts, gatekeeper)
        await self.start()

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self.service, metrics=node_metrics, id_is_echoed=True)


class GrpcIngress(Ingress):
    """The gRPC API: a server of its own in the replica, because Serve's proxy loses cancellations and has no TLS."""

    async def __init__(  # type: ignore[misc]
        self, settings: ServeSettings, parts: dict[str, Parts], gatekeeper: Handle
    ) -> None:
        super().__init__(settings, parts, gatekeeper)
        await self.start()
        self._server: GrpcServer = await start_server(lambda: self.service, settings.grpc, settings.limits)

    async def port(self) -> int:
        """The port that it listens on."""
        return self._server.port

    async def __del__(self) -> None:
        await self._server.stop(self.settings.drain_s)
