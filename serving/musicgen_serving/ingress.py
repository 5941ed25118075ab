"""The ingresses as Ray replicas: the service behind HTTP or gRPC, calling its components through handles. No logic."""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

from musicgen_serving.generation import GenerationService
from musicgen_serving.grpc_api import server as grpc_server
from musicgen_serving.http_api import server as http_server
from musicgen_serving.http_api.app import create_app
from musicgen_serving.metrics import RayRecorder, node_metrics
from musicgen_serving.pipeline import Pipeline
from musicgen_serving.ray_components import Handle, RayComponents, RayGatekeeper
from musicgen_serving.replicas import set_up
from musicgen_serving.request_metrics import RequestMetrics
from musicgen_serving.settings import EdgeSettings, ServeSettings

logger = logging.getLogger(__name__)

Parts = tuple[Handle, Handle, Handle, Handle]
"""Handles of one model's language model, codec, text encoder and chroma extractor."""
COUNT_S = 2.0
"""Interval of counting the engines."""


class Server(Protocol):
    """A running server of either protocol."""

    async def stop(self, grace_s: float) -> None: ...


class Ingress:
    """Base of both ingresses: the service in this process, calling its components through handles, behind a server.

    Uses its own servers instead of Serve's proxies: the gRPC proxy has no TLS and loses cancellations, the HTTP proxy
    has no TLS and no flow control, and each response takes two more hops.

    Args:
        parts: by model name, handles of its language model, codec, text encoder and chroma extractor.
    """

    part = "ingress"
    _server: Server

    def __init__(
        self, edge: EdgeSettings, settings: ServeSettings, parts: dict[str, Parts], gatekeeper: Handle
    ) -> None:
        set_up(self.part, settings.observability)
        self.edge, self.settings = edge, settings
        pipelines = {
            name: Pipeline(RayComponents(handles, settings.failover.lease_s), settings.failover)
            for name, handles in parts.items()
        }
        self._engines = {name: handles[0] for name, handles in parts.items()}
        metrics = RequestMetrics(RayRecorder(), settings.observability.player_buffer_s)
        self.gatekeeper = RayGatekeeper(gatekeeper)
        self.service = GenerationService(settings, pipelines, self.gatekeeper, metrics)

    async def start(self) -> None:
        """Start reporting, and counting the engines."""
        await self.service.start()
        self._counting = asyncio.create_task(self._count_engines())

    async def _count_engines(self) -> None:
        """Report the number of engines to the gatekeeper, whose estimates depend on it."""
        while True:
            for model, engine in self._engines.items():
                try:
                    loads = await engine.broadcast("load").results_async(timeout_s=COUNT_S, return_exceptions=True)
                    await self.gatekeeper.set_capacity(model, sum(not isinstance(load, Exception) for load in loads))
                except Exception as error:  # retried at the next interval
                    logger.warning("model %s: counting its engines failed: %s", model, type(error).__name__)
            await asyncio.sleep(COUNT_S)

    async def __del__(self) -> None:
        """Awaited by Serve when the replica stops: drains running requests and settles them."""
        self.service.leave()
        await asyncio.sleep(self.edge.lame_duck_s)
        await self._server.stop(self.settings.drain_s)
        await self.service.close()

    def check_health(self) -> None:
        """An ingress that responds is healthy; the health of its components is reported by `/readyz`."""


class HttpIngress(Ingress):
    """The HTTP API. Root of the application graph: binds the deployments that no other deployment references."""

    part = "http"

    async def __init__(  # type: ignore[misc]
        self, settings: ServeSettings, parts: dict[str, Parts], gatekeeper: Handle, *_others: Handle
    ) -> None:
        super().__init__(settings.http, settings, parts, gatekeeper)
        await self.start()
        app = create_app(self.service, metrics=node_metrics, cors_origins=settings.http.cors_origins)
        self._server = await http_server.start_server(app, settings.http, settings.limits.reader_stall_s)


class GrpcIngress(Ingress):
    """The gRPC API."""

    part = "grpc"

    async def __init__(  # type: ignore[misc]
        self, settings: ServeSettings, parts: dict[str, Parts], gatekeeper: Handle
    ) -> None:
        super().__init__(settings.grpc, settings, parts, gatekeeper)
        await self.start()
        self._server = await grpc_server.start_server(lambda: self.service, settings.grpc, settings.limits)
