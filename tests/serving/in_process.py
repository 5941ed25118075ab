"""The whole service in one process, without Ray: the real parts of the embedded model, the real gatekeeper, both edges.

What replicas would add (processes that die, messages between them) is for the tests with a cluster.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import torch
import uvicorn
from musicgen_serving.deployments.chroma import ChromaExtractor
from musicgen_serving.deployments.codec import CodecDecoder
from musicgen_serving.deployments.gatekeeper import LocalGatekeeper
from musicgen_serving.deployments.language_model import LanguageModel
from musicgen_serving.deployments.text_encoder import TextEncoder
from musicgen_serving.generation import GenerationService
from musicgen_serving.grpc_api.server import GrpcServer, start_server
from musicgen_serving.http_api.app import create_app
from musicgen_serving.pipeline import Pipeline
from musicgen_serving.settings import ModelSettings, ServeSettings
from musicgen_serving.spokes import LocalSpokes, Spokes
from musicgen_serving.watch import Watch

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

    def __init__(self, settings: ServeSettings | None = None, wrap: Callable[[Spokes], Spokes] = lambda s: s) -> None:
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
        parts = LocalSpokes(self.engine, self.codec, TextEncoder(model), ChromaExtractor(model, limits))
        pipeline = Pipeline(self._wrap(parts), self.settings.failover)
        self.gatekeeper = LocalGatekeeper(self.settings)
        watch = Watch(self.recorder, self.settings.observability.player_buffer_s)
        self.service = GenerationService(self.settings, {model.name: pipeline}, self.gatekeeper, watch)
        await self.service.start()
        self.grpc: GrpcServer = await start_server(
            lambda: self.service, self.settings.grpc.model_copy(update={"port": 0}), limits
        )
        self.grpc_url = f"grpc://127.0.0.1:{self.grpc.port}"
        config = uvicorn.Config(create_app(self.service), port=0, log_level="error", lifespan="off")
        self._http = uvicorn.Server(config)
        self._http_task = asyncio.create_task(self._http.serve())
        while not self._http.started:
            await asyncio.sleep(0.01)
        port = self._http.servers[0].sockets[0].getsockname()[1]
        self.http_url = f"http://127.0.0.1:{port}"

    def close(self) -> None:
        self.run(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _stop(self) -> None:
        self._http.should_exit = True
        await self._http_task
        await self.grpc.stop(0)
        await self.service.close()
        await self.engine.close()
        self.gatekeeper.close()


def small_settings(**sections: Any) -> ServeSettings:
    """Settings for tests: the embedded model with little memory."""
    model = ModelSettings(kv_memory_bytes=64 * 2**20, num_threads=1)
    return ServeSettings(**{"models": [model], **sections})
