"""A model that is gone is nobody's concern but that of those who ask for it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from musicgen_serving import generation
from musicgen_serving.admission import Tenant
from musicgen_serving.components import LostError
from musicgen_serving.deployments.gatekeeper import LocalGatekeeper
from musicgen_serving.deployments.language_model import ModelCard
from musicgen_serving.errors import NotFoundError, ReplicaLostError, report
from musicgen_serving.generation import GenerationService
from musicgen_serving.request_metrics import RequestMetrics
from musicgen_serving.settings import FailoverSettings, ModelSettings, ServeSettings
from serving.in_process import ListRecorder

from musicgen.weights import open_checkpoint

ANYBODY = Tenant("ada", "default", 1.0, 0, None, None)
NAMES = ("silent", "lost", "well")


class Parts:
    """Of a model that answers, that does not, or that takes for ever."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.num_calls = 0

    async def describe(self) -> ModelCard:
        self.num_calls += 1
        if self._name == "silent":
            await asyncio.sleep(3600)
        if self._name == "lost":
            raise LostError("planned")
        return ModelCard(open_checkpoint("demo").config, "float32")


def with_models(work: Callable[[GenerationService, dict[str, Parts]], Awaitable[Any]]) -> Any:
    """Run `work` with a service of three models, of which one answers."""

    async def run() -> Any:
        settings = ServeSettings(
            models=[ModelSettings(name=name) for name in NAMES],
            failover=FailoverSettings(backoff_s=0.001, max_backoff_s=0.01),
        )
        parts = {name: Parts(name) for name in NAMES}
        pipelines: Any = {name: SimpleNamespace(components=parts[name]) for name in NAMES}
        gatekeeper = LocalGatekeeper(settings)
        try:
            return await work(
                GenerationService(settings, pipelines, gatekeeper, RequestMetrics(ListRecorder(), 0.5)), parts
            )
        finally:
            gatekeeper.close()

    return asyncio.run(run())


def test_one_model_is_known_without_asking_the_others() -> None:
    async def work(service: GenerationService, parts: dict[str, Parts]) -> None:
        assert (await service.model(ANYBODY, "well")).name == "well"
        assert [part.num_calls for part in parts.values()] == [0, 0, 1]
        only_well = Tenant("bob", "default", 1.0, 0, None, frozenset({"well"}))
        assert (await service.model(only_well, None)).name == "well"
        with pytest.raises(NotFoundError, match="expected one of well, got 'lost'") as hidden:
            await service.model(only_well, "lost")
        assert report(hidden.value).param == "model"
        with pytest.raises(NotFoundError, match="silent, lost, well"):
            await service.model(ANYBODY, "another")
        with pytest.raises(NotFoundError, match="no served model"):
            await service.model(Tenant("eve", "default", 1.0, 0, None, frozenset()), None)
        with pytest.raises(ReplicaLostError):
            await service.model(ANYBODY, "lost")

    with_models(work)


def test_the_list_has_those_that_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "READINESS_WAIT_S", 0.05)

    async def work(service: GenerationService, parts: dict[str, Parts]) -> None:
        assert [info.name for info in await service.models(ANYBODY)] == ["well"]
        assert [info.name for info in await service.models(ANYBODY)] == ["well"]
        assert [part.num_calls for part in parts.values()] == [2, 2, 1], "what is known is not asked again"

    with_models(work)
