"""The service in one separate process without Ray: real components of the demo model, gatekeeper, both ingresses.

For leak detection: unlike in a cluster, all resources can be counted. As a command it prints its URLs as a line of
JSON, then its current resources for each input line, and stops at the end of input.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import psutil
import torch
from musicgen_serving.components import LocalComponents
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
from musicgen_serving.settings import ServeSettings, load_settings


@dataclass(frozen=True, slots=True)
class Held:
    """Resources held by the process at one moment."""

    rss_bytes: int
    num_files: int
    """Open files and sockets."""
    num_threads: int
    num_tasks: int
    """Asyncio tasks."""
    pages: int
    """KV pages."""
    pieces: int
    """Waiting or running in the engine."""
    running: int
    """Running requests, according to the gatekeeper."""
    backlog: int
    """Requests in the gatekeeper's queue model."""
    admitted: int
    ended: dict[str, int] = field(default_factory=dict)
    rejected: dict[str, int] = field(default_factory=dict)
    engine: dict[str, int] = field(default_factory=dict)
    balanced: str = "yes"
    """`yes`, or why the gatekeeper's counters do not balance."""


class _Recorder:
    """Discards metrics."""

    def count(self, name: str, amount: float, labels: Any) -> None: ...

    def observe(self, name: str, value: float, labels: Any) -> None: ...


class Local:
    """A running service; created by `local_service`."""

    def __init__(self, engine: LanguageModel, gatekeeper: LocalGatekeeper, http_url: str, grpc_url: str) -> None:
        self._engine, self._gatekeeper = engine, gatekeeper
        self.http_url, self.grpc_url = http_url, grpc_url

    async def look(self) -> Held:
        gc.collect()
        process, load, counts = psutil.Process(), await self._engine.load(), await self._gatekeeper.counts()
        balanced = "yes"
        try:
            await self._gatekeeper.check()
        except RuntimeError as error:
            balanced = str(error)
        ended = {name: sum(getattr(counts, name).values()) for name in ("finished", "cancelled", "failed")}
        rejected: dict[str, int] = {}
        for (_, _, code), count in counts.rejected.items():
            rejected[code] = rejected.get(code, 0) + count
        return Held(
            rss_bytes=process.memory_info().rss,
            num_files=process.num_fds(),
            num_threads=threading.active_count(),
            num_tasks=len(asyncio.all_tasks()),
            pages=load.pages_held,
            pieces=load.num_running + load.num_waiting,
            running=counts.running,
            backlog=sum(model.num_requests for model in counts.models.values()),
            admitted=sum(counts.admitted.values()),
            ended=ended,
            rejected=rejected,
            engine={n: getattr(load, f"num_{n}") for n in ("accepted", "finished", "cancelled", "failed")},
            balanced=balanced,
        )


@asynccontextmanager
async def local_service(settings: ServeSettings) -> AsyncIterator[Local]:
    """Start the first model of the settings and both ingresses on free ports."""
    torch.set_num_threads(1)
    model, limits = settings.models[0], settings.limits
    engine = LanguageModel(model)
    await engine.warm_up()
    parts = LocalComponents(engine, CodecDecoder(model, limits), TextEncoder(model), ChromaExtractor(model, limits))
    gatekeeper = LocalGatekeeper(settings)
    metrics = RequestMetrics(_Recorder(), settings.observability.player_buffer_s)
    service = GenerationService(settings, {model.name: Pipeline(parts, settings.failover)}, gatekeeper, metrics)
    await service.start()
    any_grpc, any_http = (edge.model_copy(update={"port": 0}) for edge in (settings.grpc, settings.http))
    grpc = await grpc_server.start_server(lambda: service, any_grpc, limits)
    http = await http_server.start_server(create_app(service), any_http, limits.reader_stall_s)
    try:
        yield Local(engine, gatekeeper, f"http://127.0.0.1:{http.port}", f"grpc://127.0.0.1:{grpc.port}")
    finally:
        await http.stop(1)
        await grpc.stop(0)
        await service.close()
        await engine.close()
        gatekeeper.close()


class LocalProcess:
    """A local service in a separate process; created by `local_process`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        urls = json.loads(self._line())
        self.http_url, self.grpc_url = str(urls["http_url"]), str(urls["grpc_url"])

    def look(self) -> Held:
        assert self._process.stdin is not None
        print("look", file=self._process.stdin, flush=True)
        return Held(**json.loads(self._line()))

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the local service exited; see its output above")
        return line


@contextmanager
def local_process(settings: dict[str, Any]) -> Iterator[LocalProcess]:
    """Run a service with these settings for the duration of the context."""
    command = [sys.executable, "-m", "benchmarks.serving_local", json.dumps(settings)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield LocalProcess(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
        assert process.stdout is not None
        process.stdout.close()


async def _run(settings: ServeSettings) -> None:
    async with local_service(settings) as local:
        print(json.dumps({"http_url": local.http_url, "grpc_url": local.grpc_url}), flush=True)
        while await asyncio.to_thread(sys.stdin.readline):
            print(json.dumps(asdict(await local.look())), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", help="service settings as JSON")
    asyncio.run(_run(load_settings(json.loads(parser.parse_args().settings))))


if __name__ == "__main__":
    main()
