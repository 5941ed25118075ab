"""Asyncio load clients for both protocols: one streamed request each, recording everything received with its time.

Unlike the public client, they neither retry nor verify checksums: a load test must see every rejection.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio
import httpx2
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from musicgen_serving.proto.musicgen.v1 import music_service_pb2 as pb
from musicgen_serving.proto.musicgen.v1.music_service_pb2_grpc import MusicServiceStub

from benchmarks.serving_plan import Ask, Outcome

PATH = "/v1/music/generations"
TERMINAL = ("music.generation.done", "music.generation.failed", "music.generation.cancelled")
_DETAILS = "grpc-status-details-bin"


class Listener:
    """One connection pool for each protocol; `began` is the load's start on `time.perf_counter`.

    Args:
        http_url, grpc_url: e.g. `http://host:port`, `grpc://host:port`; None if no request needs it.
        timeout_s: a longer request ends with status `timeout`.
    """

    def __init__(self, http_url: str | None, grpc_url: str | None, timeout_s: float) -> None:
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=256)
        self._http = httpx2.AsyncClient(base_url=http_url or "http://none", timeout=None, limits=limits)
        target = (grpc_url or "grpc://127.0.0.1:1").removeprefix("grpc://")
        self._channel = grpc.aio.insecure_channel(target, options=[("grpc.max_receive_message_length", -1)])
        self._stub: Any = MusicServiceStub(self._channel)
        self._timeout_s = timeout_s
        self.began = time.perf_counter()

    async def warm_up(self, protocols: set[str]) -> None:
        """Open the connections ahead of the first request."""
        if "http" in protocols:
            await self._http.get("/healthz")
        if "grpc" in protocols:
            async with asyncio.timeout(30):
                await self._channel.channel_ready()

    async def close(self) -> None:
        await self._http.aclose()
        await self._channel.close()

    @property
    def now(self) -> float:
        return time.perf_counter() - self.began

    async def listen(self, ask: Ask) -> Outcome:
        """Send one request and receive its stream."""
        outcome = Outcome(ask.request_id, ask.protocol, ask.duration_s, ask.at_s, ask.api_key, sent_s=self.now)
        run = self._over_http if ask.protocol == "http" else self._over_grpc

        def end(status: str) -> None:
            outcome.num_terminal += 1
            outcome.status = status

        try:
            async with asyncio.timeout(self._timeout_s):
                await run(ask, outcome, end)
        except TimeoutError:
            end("timeout")
        except (httpx2.TransportError, httpx2.StreamError):
            end("cut")
        outcome.ended_s = self.now
        if outcome.num_terminal == 0:
            outcome.status = "cut"
        return outcome

    async def _over_http(self, ask: Ask, outcome: Outcome, end: Callable[[str], None]) -> None:
        body = {
            "model": ask.model,
            "prompt": ask.prompt,
            "duration_s": ask.duration_s,
            "seed": ask.seed,
            "stream_format": "sse",
            "response_format": "pcm16",
        }
        headers = {"X-Request-Id": ask.request_id}
        if ask.api_key is not None:
            headers["Authorization"] = f"Bearer {ask.api_key}"
        async with self._http.stream("POST", PATH, json=body, headers=headers) as response:
            if response.status_code != 200:
                await response.aread()
                end(_code_of(response))
                return
            rate = int(response.headers["x-sample-rate"])
            async for line in response.aiter_lines():
                if not line.startswith("data:"):
                    continue
                event = json.loads(line[5:])
                if event["type"] == "music.audio.delta":
                    outcome.chunks.append((self.now, event["num_samples"] / rate))
                elif event["type"] in TERMINAL:
                    done = event["type"] == TERMINAL[0]
                    end("finished" if done else event["error"]["code"])

    async def _over_grpc(self, ask: Ask, outcome: Outcome, end: Callable[[str], None]) -> None:
        spec = pb.GenerationSpec(model=ask.model, prompts=[ask.prompt], duration_s=ask.duration_s, seed=ask.seed)
        message = pb.StreamGenerateRequest(spec=spec, request_id=ask.request_id, audio_format=pb.AUDIO_FORMAT_PCM16LE)
        metadata = () if ask.api_key is None else (("authorization", f"Bearer {ask.api_key}"),)
        call = self._stub.StreamGenerate(message, metadata=metadata)
        rate = 0
        try:
            async for answer in call:
                kind = answer.WhichOneof("event")
                if kind == "started":
                    rate = answer.started.sample_rate * answer.started.channels
                elif kind == "audio":
                    outcome.chunks.append((self.now, len(answer.audio.audio) / 2 / rate))
                elif kind == "finished":
                    end("finished")
        except grpc.aio.AioRpcError as error:
            end(_reason_of(error))
        finally:
            call.cancel()


def _code_of(response: httpx2.Response) -> str:
    try:
        return str(response.json()["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return f"status_{response.status_code}"


def _reason_of(error: grpc.aio.AioRpcError) -> str:
    """The stable error code, as over HTTP; the status name if the service did not respond."""
    for key, value in error.trailing_metadata() or ():
        if key == _DETAILS and isinstance(value, bytes):
            for detail in status_pb2.Status.FromString(value).details:
                if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
                    return str(error_details_pb2.ErrorInfo.FromString(detail.value).reason).lower()
    return f"status_{error.code().name.lower()}"
