"""grpc.health.v1, derived from the service's readiness."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from musicgen_serving.grpc_api.call import ServiceGetter
from musicgen_serving.service import Readiness

NAME = str(health.SERVICE_NAME)
PERIOD_S = 0.5
"""Polling interval of the readiness."""
_log = logging.getLogger(__name__)


class Health:
    """Reports the overall health (empty name), that of each of `services`, and that of each component in the readiness
    details, such as a model, by name. Everything is NOT_SERVING until `watch` has polled the service.
    """

    def __init__(self, server: grpc.aio.Server, services: tuple[str, ...]) -> None:
        self._names = ("", *services)
        self._parts: set[str] = set()
        self._servicer: Any = health.aio.HealthServicer()  # type: ignore[attr-defined]  # unknown to grpc-stubs
        self._watcher: asyncio.Task[None] | None = None
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)

    async def watch(self, get_service: ServiceGetter) -> None:
        """Start polling the readiness."""
        await self._set(Readiness(False, {}))
        self._watcher = asyncio.create_task(self._watch(get_service))

    async def close(self) -> None:
        """Report NOT_SERVING from now on, so that load balancers stop sending requests."""
        if self._watcher is not None:
            self._watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watcher
        await self._servicer.enter_graceful_shutdown()

    async def _watch(self, get_service: ServiceGetter) -> None:
        while True:
            try:
                readiness = await get_service().readiness()
            except Exception as error:
                _log.warning("readiness check failed: %s", type(error).__name__)
                readiness = Readiness(False, {})
            await self._set(readiness)
            await asyncio.sleep(PERIOD_S)

    async def _set(self, readiness: Readiness) -> None:
        known = health_pb2.HealthCheckResponse
        self._parts |= readiness.details.keys()
        serve = {part: readiness.details.get(part) == "ready" for part in self._parts}
        for name, ready in {**serve, **dict.fromkeys(self._names, readiness.ready)}.items():
            await self._servicer.set(name, known.SERVING if ready else known.NOT_SERVING)
