"""grpc.health.v1, as the service's readiness is. Knows of the service only whether it is ready."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from musicgen_serving.grpc_api.call import ServiceGetter

NAME = str(health.SERVICE_NAME)
PERIOD_S = 0.5
"""Between two looks at the readiness."""
_log = logging.getLogger(__name__)


class Health:
    """Answers for the whole server (the empty name) and for each of `services`; not serving until `watch` found so."""

    def __init__(self, server: grpc.aio.Server, services: tuple[str, ...]) -> None:
        self._names = ("", *services)
        self._servicer: Any = health.aio.HealthServicer()  # type: ignore[attr-defined]  # unknown to grpc-stubs
        self._watcher: asyncio.Task[None] | None = None
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)

    async def watch(self, get_service: ServiceGetter) -> None:
        """Keep the answers right from now on."""
        await self._set(ready=False)
        self._watcher = asyncio.create_task(self._watch(get_service))

    async def close(self) -> None:
        """Not serving, for ever: no balancer sends anything here any more."""
        if self._watcher is not None:
            self._watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watcher
        await self._servicer.enter_graceful_shutdown()

    async def _watch(self, get_service: ServiceGetter) -> None:
        while True:
            try:
                ready = (await get_service().readiness()).ready
            except Exception as error:
                _log.warning("the service's readiness is unknown: %s", type(error).__name__)
                ready = False
            await self._set(ready=ready)
            await asyncio.sleep(PERIOD_S)

    async def _set(self, *, ready: bool) -> None:
        known = health_pb2.HealthCheckResponse
        for name in self._names:
            await self._servicer.set(name, known.SERVING if ready else known.NOT_SERVING)
