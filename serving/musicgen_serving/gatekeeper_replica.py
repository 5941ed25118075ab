"""The gatekeeper as a Ray replica. A singleton; requests wait while it restarts, so it must not load torch."""

from __future__ import annotations

import asyncio

from musicgen_serving import process
from musicgen_serving.changing_files import keep_looking
from musicgen_serving.deployments.gatekeeper import LocalGatekeeper
from musicgen_serving.metrics import RayRecorder
from musicgen_serving.refusals import told
from musicgen_serving.settings import ServeSettings


class GatekeeperReplica(LocalGatekeeper):
    """The singleton gatekeeper."""

    find_tenant, admit = told(LocalGatekeeper.find_tenant), told(LocalGatekeeper.admit)
    cancel, status = told(LocalGatekeeper.cancel), told(LocalGatekeeper.status)

    async def __init__(self, settings: ServeSettings) -> None:  # type: ignore[misc]
        process.set_up("gatekeeper", settings.observability)
        super().__init__(settings)
        self._gauges = asyncio.create_task(self._show_gauges())
        self._looking = asyncio.create_task(keep_looking(self.tenants.look))

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
