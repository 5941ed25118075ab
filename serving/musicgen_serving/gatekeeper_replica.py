"""The gatekeeper as a Ray replica. A singleton; requests wait while it restarts, so it must not load torch."""

from __future__ import annotations

import asyncio

from musicgen_serving import process
from musicgen_serving.deployments.gatekeeper import LocalGatekeeper
from musicgen_serving.error_values import returns_errors
from musicgen_serving.metrics import RayRecorder
from musicgen_serving.settings import ServeSettings
from musicgen_serving.watched_files import poll


class GatekeeperReplica(LocalGatekeeper):
    """The singleton gatekeeper."""

    find_tenant, admit = returns_errors(LocalGatekeeper.find_tenant), returns_errors(LocalGatekeeper.admit)
    cancel, status = returns_errors(LocalGatekeeper.cancel), returns_errors(LocalGatekeeper.status)

    async def __init__(self, settings: ServeSettings) -> None:  # type: ignore[misc]
        process.set_up("gatekeeper", settings.observability)
        super().__init__(settings)
        self._gauges = asyncio.create_task(self._show_gauges())
        self._looking = asyncio.create_task(poll(self.tenants.look))

    async def _show_gauges(self) -> None:
        recorder = RayRecorder()
        while True:
            await asyncio.sleep(process.GAUGES_S)
            counts = await self.counts()
            recorder.set("usage_lines_lost", counts.num_lines_lost, {})
            recorder.set("tenants_stale", self.tenants.is_stale, {})
            for model, load in counts.models.items():
                recorder.set("quoted_wait_seconds", load.wait_s, {"model": model})

    def check_health(self) -> None:
        """A gatekeeper that responds is healthy."""
