"""Stalled readers: they request a long stream, read its beginning and nothing more, and keep the connection open.

Run them together with a `MemoryWatch`; they only report when each of their requests ended, by polling its status.
"""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import grpc.aio
import httpx2
from musicgen_serving.proto.musicgen.v1 import music_service_pb2 as pb
from musicgen_serving.proto.musicgen.v1.music_service_pb2_grpc import MusicServiceStub

from benchmarks.serving_clients import PATH

SMALL_BYTES = 4096
"""Size of the readers' buffers, as far as the system allows it."""
_CHANNEL = (
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", SMALL_BYTES),
    ("grpc.use_local_subchannel_pool", 1),
)


@dataclass(frozen=True, slots=True)
class Stalled:
    """Outcomes of the readers' requests."""

    num_readers: int
    ended_s: list[float]
    """When the service reported each request as ended, since the start."""
    states: dict[str, int]
    """States of the requests at the end."""
    watched_s: float


async def stall(
    http_url: str, grpc_url: str, num_readers: int, duration_s: float, watch_s: float, model: str, api_key: str | None
) -> Stalled:
    """Stall half of the readers over each protocol; watch them for at most `watch_s` seconds.

    Args:
        duration_s: of the piece that each requests, in float32.
    """
    began = time.perf_counter()
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    ids = [f"stalled-{time.time_ns()}-{i}" for i in range(num_readers)]
    readers = [
        _http_reader(http_url, headers, request_id, model, duration_s)
        if i % 2 == 0
        else _grpc_reader(grpc_url, api_key, request_id, model, duration_s)
        for i, request_id in enumerate(ids)
    ]
    tasks = [asyncio.create_task(reader) for reader in readers]
    ended: dict[str, float] = {}
    states: dict[str, str] = {}
    async with httpx2.AsyncClient(base_url=http_url, headers=headers, timeout=30) as client:
        while len(ended) < num_readers and time.perf_counter() - began < watch_s:
            await asyncio.sleep(0.5)
            for request_id in ids:
                if request_id in ended:
                    continue
                answer = await client.get(f"{PATH}/{request_id}")
                state = answer.json()["status"] if answer.status_code == 200 else f"status {answer.status_code}"
                states[request_id] = state
                if state in ("finished", "cancelled", "failed"):
                    ended[request_id] = time.perf_counter() - began
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return Stalled(num_readers, sorted(ended.values()), dict(Counter(states.values())), time.perf_counter() - began)


async def _http_reader(url: str, headers: dict[str, str], request_id: str, model: str, duration_s: float) -> None:
    """Sends a request and reads nothing beyond what the buffers hold."""
    host, _, port = url.partition("://")[2].rpartition(":")
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BYTES)
    connection.setblocking(False)
    await asyncio.get_running_loop().sock_connect(connection, (host, int(port)))
    _, writer = await asyncio.open_connection(sock=connection, limit=SMALL_BYTES)
    fields = {"model": model, "duration_s": duration_s, "stream": True, "response_format": "f32"}
    body = json.dumps(fields).encode()
    lines = {
        "Host": "x",
        "Content-Type": "application/json",
        "Content-Length": len(body),
        "X-Request-Id": request_id,
        **headers,
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    writer.write(f"POST {PATH} HTTP/1.1\r\n{head}\r\n".encode() + body)
    try:
        await writer.drain()
        await asyncio.Event().wait()
    finally:
        writer.transport.abort()


async def _grpc_reader(url: str, api_key: str | None, request_id: str, model: str, duration_s: float) -> None:
    """Reads only the first message."""
    metadata = () if api_key is None else (("authorization", f"Bearer {api_key}"),)
    async with grpc.aio.insecure_channel(url.removeprefix("grpc://"), options=_CHANNEL) as channel:
        stub: Any = MusicServiceStub(channel)
        spec = pb.GenerationSpec(model=model, duration_s=duration_s)
        call = stub.StreamGenerate(pb.StreamGenerateRequest(spec=spec, request_id=request_id), metadata=metadata)
        try:
            with suppress(grpc.aio.AioRpcError):
                await call.read()
            await asyncio.Event().wait()
        finally:
            call.cancel()
