"""The edges in Ray's processes: the service, reaching its parts through handles, behind HTTP or gRPC. No logic."""

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
from musicgen_serving.ray_spokes import Handle, RayGatekeeper, RaySpokes
from musicgen_serving.replicas import set_up
from musicgen_serving.settings import EdgeSettings, ServeSettings
from musicgen_serving.watch import Watch

logger = logging.getLogger(__name__)

Parts = tuple[Handle, Handle, Handle, Handle]
"""Handles of one model's language model, codec, text encoder and chroma extractor."""
COUNT_S = 2.0
"""Between two counts of the engines."""


class Server(Protocol):
    """A server of either protocol, listening."""

    async def stop(self, grace_s: float) -> None: ...


class Ingress:
    """What both ingresses are: the service in this process, reaching its parts through handles, and a server before it.

    The servers are our own. Serve's proxies would take connections for all nodes, but: that of gRPC has no TLS and
    loses cancellations, that of HTTP has no TLS and no flow control, and each answer takes two more hops.

    Args:
        parts: for each model's name, handles of its language model, codec, text encoder and chroma extractor.
    """

    part = "ingress"
    _server: Server

    def __init__(
        self, edge: EdgeSettings, settings: ServeSettings, parts: dict[str, Parts], gatekeeper: Handle
    ) -> None:
        set_up(self.part, settings.observability)
        self.edge, self.settings = edge, settings
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
                try:
                    loads = await engine.broadcast("load").results_async(timeout_s=COUNT_S, return_exceptions=True)
                    await self.gatekeeper.set_capacity(model, sum(not isinstance(load, Exception) for load in loads))
                except Exception as error:  # the next count comes soon
                    logger.warning("model %s: its engines could not be counted: %s", model, type(error).__name__)
            await asyncio.sleep(COUNT_S)

    async def __del__(self) -> None:
        """Serve awaits it when the replica is to end: what is under way ends, what is to be settled is settled."""
        self.service.leave()
        await asyncio.sleep(self.edge.lame_duck_s)
        await self._server.stop(self.settings.drain_s)
        await self.service.close()

    def check_health(self) -> None:
        """An ingress that answers is well; whether its parts are is `/readyz`."""


class HttpIngress(Ingress):
    """The HTTP API. The root of the application: it holds the handles of all that nobody else does."""

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
