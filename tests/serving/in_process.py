"""The whole service in one process, without Ray: the real parts of the embedded model, the real gatekeeper, both edges.

What replicas would add (processes that die, messages between them) is for the tests with a cluster.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import torch
from musicgen_serving.components import Components, LocalComponents
from musicgen_serving.deployments.chroma import ChromaExtractor
from musicgen_serving.deployments.codec import CodecDecoder
from musicgen_serving.deployments.gatekeeper import LocalGatekeeper
from musicgen_serving.deployments.language_model import LanguageModel
from musicgen_serving.deployments.text_encoder import TextEncoder
from musicgen_serving.generation import GenerationService
from musicgen_serving.grpc_api import server as grpc_server
from musicgen_serving.http_api import server as http_server
from musicgen_serving.http_api.app import create_app
from musicgen_serving.pipeline import Pipeline
from musicgen_serving.request_metrics import RequestMetrics
from musicgen_serving.settings import ModelSettings, ServeSettings

T = TypeVar("T")


class ListRecorder:
    """Keeps what was counted and observed."""

    def __init__(self) -> None:
        self.counted: dict[tuple[str, str], float] = {}
        """By name and reason (or nothing)."""
        self.observed: dict[str, list[float]] = {}

    def count(self, name: str, amount: float, labels: Any) -> None:
        key = (name, labels.get("reason", ""))
        self.counted[key] = self.counted.get(key, 0) + amount

    def observe(self, name: str, value: float, labels: Any) -> None:
        self.observed.setdefault(name, []).append(value)


class InProcess:
    """The service and its edges on a loop of their own, in a thread.

    Args:
        wrap: what stands between the pipeline and the parts, such as one that loses calls.
    """

    def __init__(
        self, settings: ServeSettings | None = None, wrap: Callable[[Components], Components] = lambda s: s
    ) -> None:
        self.settings = settings or ServeSettings()
        self.recorder = ListRecorder()
        self._wrap = wrap
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.run(self._start())

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float = 120) -> T:
        """Run on the service's loop and wait."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout_s)

    async def _start(self) -> None:
        torch.set_num_threads(1)
        model, limits = self.settings.models[0], self.settings.limits
        self.engine = LanguageModel(model)
        await self.engine.warm_up()
        self.codec = CodecDecoder(model, limits)
        parts = LocalComponents(self.engine, self.codec, TextEncoder(model), ChromaExtractor(model, limits))
        pipeline = Pipeline(self._wrap(parts), self.settings.failover)
        self.gatekeeper = LocalGatekeeper(self.settings)
        metrics = RequestMetrics(self.recorder, self.settings.observability.player_buffer_s)
        self.service = GenerationService(self.settings, {model.name: pipeline}, self.gatekeeper, metrics)
        await self.service.start()
        any_port = {"port": 0}
        grpc, http = (edge.model_copy(update=any_port) for edge in (self.settings.grpc, self.settings.http))
        self.grpc = await grpc_server.start_server(lambda: self.service, grpc, limits)
        self._http = await http_server.start_server(create_app(self.service), http, limits.reader_stall_s)
        self.grpc_url, self.http_url = f"grpc://127.0.0.1:{self.grpc.port}", f"http://127.0.0.1:{self._http.port}"

    def close(self) -> None:
        self.run(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _stop(self) -> None:
        await self._http.stop(1)
        await self.grpc.stop(0)
        await self.service.close()
        await self.engine.close()
        self.gatekeeper.close()


def small_settings(**sections: Any) -> ServeSettings:
    """Settings for tests: the embedded model with little memory."""
    model = ModelSettings(kv_memory_bytes=64 * 2**20, num_threads=1)
    return ServeSettings(**{"models": [model], **sections})
