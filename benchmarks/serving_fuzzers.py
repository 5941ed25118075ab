"""Those who send broken requests: four kinds, each a function that sends so many and counts what came back.

A finding is an answer that a service must never give (see `_is_bad_http`, `_BAD_CODES`), or none within `HANG_S`.
"""

from __future__ import annotations

import asyncio
import base64
import json
import random
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
import httpx2
from musicgen_serving.proto.musicgen.v1 import music_service_pb2 as pb

from benchmarks.serving_broken import bombs, mutated, recordings

HANG_S = 30.0
MAX_FINDINGS = 20
MAX_ATTEMPTS = 8
"""Seeds that are tried for one operation, as long as it has not had its share."""
PATH = "/v1/music/generations"
SHORT_S = 0.06
"""What is made, where anything is."""
_BAD_CODES = {"INTERNAL", "UNKNOWN", "DATA_LOSS", "ABORTED", "OUT_OF_RANGE"}
_CODES = {code.value[0]: code.name for code in grpc.StatusCode}


@dataclass(slots=True)
class Findings:
    """What one fuzzer saw."""

    num_sent: int = 0
    by_answer: dict[str, int] = field(default_factory=dict)
    bad: list[str] = field(default_factory=list)
    """At most `MAX_FINDINGS`, in words."""
    num_bad: int = 0
    longest_s: float = 0.0

    def answer(self, name: str, seconds: float, bad: str | None = None) -> None:
        self.num_sent += 1
        self.by_answer[name] = self.by_answer.get(name, 0) + 1
        self.longest_s = max(self.longest_s, seconds)
        if bad is not None:
            self.num_bad += 1
            if len(self.bad) < MAX_FINDINGS:
                self.bad.append(bad)


def _is_bad_http(status: int) -> bool:
    """5xx, other than the 503 of an overload and the 504 of a deadline that the request set itself."""
    return status >= 500 and status not in (503, 504)


# --- the OpenAPI document ---


def openapi(http_url: str, grpc_url: str, num: int, seed: int) -> Findings:
    """What schemathesis makes of the document: half of it valid, half of it not."""
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as hypothesis_seed
    from schemathesis import GenerationMode

    found = Findings()
    schema = schemathesis.openapi.from_url(f"{http_url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    # The one that makes music last: it gets what is left, for others soon have nothing new to try.
    operations.sort(key=lambda operation: operation.method == "post")
    parts = [(operation, mode) for operation in operations for mode in GenerationMode]
    for number, (operation, mode) in enumerate(parts):
        is_post = operation.method == "post"
        share = (num - found.num_sent) // (len(parts) - number) if is_post else num // (2 * len(parts))
        end = found.num_sent + max(1, share)
        for attempt in range(MAX_ATTEMPTS):
            if found.num_sent >= end:
                break
            options = settings(
                max_examples=end - found.num_sent,
                deadline=None,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            send = given(case=operation.as_strategy(generation_mode=mode))(lambda case: _call(case, found))
            # What is raised comes from making a case, which ends the examples of this seed: `_call` raises nothing.
            with suppress(Exception):
                hypothesis_seed(seed + number + 100 * attempt)(options(send))()
    return found


def _call(case: Any, found: Findings) -> None:
    """Send one case of schemathesis'."""
    if isinstance(case.body, dict) and isinstance(case.body.get("duration_s"), int | float):
        case.body["duration_s"] = min(case.body["duration_s"], SHORT_S)
    began = time.perf_counter()
    try:
        response = case.call(timeout=HANG_S)
    except Exception as error:
        found.answer(type(error).__name__, time.perf_counter() - began, f"{case.operation.label}: {error!r}")
        return
    status = response.status_code
    bad = None
    if _is_bad_http(status):
        bad = f"{case.operation.label}: {status} {response.text[:300]}, for {case.body!r:.300}"
    found.answer(str(status), time.perf_counter() - began, bad)


# --- protobuf ---


def protobuf(http_url: str, grpc_url: str, num: int, seed: int) -> Findings:
    """Messages that are valid, extreme, mutated or noise, to every method; some calls are left soon."""
    return asyncio.run(_protobuf(grpc_url, num, seed))


async def _protobuf(grpc_url: str, num: int, seed: int) -> Findings:
    rng, found = random.Random(seed), Findings()
    sounds = list(recordings(rng).values())
    async with grpc.aio.insecure_channel(grpc_url.removeprefix("grpc://")) as channel:
        streaming = channel.unary_stream("/musicgen.v1.MusicService/StreamGenerate")
        methods = {
            name: channel.unary_unary(f"/musicgen.v1.MusicService/{name}")
            for name in ("Generate", "CancelGeneration", "GetGeneration", "ListModels")
        }

        async def send() -> None:
            name = rng.choice(["Generate", "StreamGenerate", "Generate", "StreamGenerate", *methods])
            data = _message(name, rng, sounds)
            timeout_s = rng.choice([HANG_S] * 9 + [0.02])
            began = time.perf_counter()
            try:
                if name == "StreamGenerate":
                    async for _ in streaming(data, timeout=timeout_s):
                        pass
                else:
                    await methods[name](data, timeout=timeout_s)
                code = "OK"
            except grpc.aio.AioRpcError as error:
                code = error.code().name
                if code == "DEADLINE_EXCEEDED" and timeout_s < HANG_S:
                    code = "left soon"
                details = error.details()
            bad = code in _BAD_CODES or code == "DEADLINE_EXCEEDED"
            text = f"{name} {code} {details}: {data[:200].hex()}" if bad else None
            found.answer(code, time.perf_counter() - began, text)

        await _side_by_side(send, num, 8)
    return found


def _message(method: str, rng: random.Random, sounds: list[bytes]) -> bytes:
    """Bytes of a request of a method."""
    if method == "ListModels":
        message: Any = pb.ListModelsRequest()
    elif method in ("CancelGeneration", "GetGeneration"):
        kind = pb.CancelGenerationRequest if method == "CancelGeneration" else pb.GetGenerationRequest
        message = kind(request_id=_text(rng))
    else:
        kind = pb.GenerateRequest if method == "Generate" else pb.StreamGenerateRequest
        message = kind(spec=_spec(rng, sounds), audio_format=rng.choice([0, 0, 1, 2, 3, 4, 5, 6, 7, 99]))
        if rng.random() < 0.3:
            message.request_id = _text(rng)
        if rng.random() < 0.3:
            message.idempotency_key = rng.choice(["a", "b", _text(rng)])
    data: bytes = message.SerializeToString()
    if rng.random() < 0.5:
        data = mutated(data, rng)
    return rng.randbytes(rng.randint(0, 200)) if rng.random() < 0.05 else data


def _spec(rng: random.Random, sounds: list[bytes]) -> pb.GenerationSpec:
    """A spec of which each field is now and then extreme."""
    spec = pb.GenerationSpec(duration_s=SHORT_S)
    number = [0.0, -1.0, 1e308, -1e308, float("nan"), float("inf"), 1e-300, 1.0]
    count = [0, -1, 1, 2, 2**31 - 1, -(2**31)]
    spec.prompts.extend(_text(rng) for _ in range(rng.choice([0, 1, 1, 1, 2, 9])))
    for name in ("duration_s", "extend_stride_s"):
        if rng.random() < 0.1:
            setattr(spec, name, rng.choice(number))
    if rng.random() < 0.1:
        spec.num_samples = rng.choice(count)
    if rng.random() < 0.3:
        spec.seed = rng.choice([*count, 2**63 - 1, -(2**63)])
    if rng.random() < 0.1:
        spec.first_sample = rng.choice([*count, 100, 2**63 - 1])
    if rng.random() < 0.2:
        for name in ("temperature", "top_p", "guidance_scale", "melody_guidance"):
            if rng.random() < 0.5:
                setattr(spec.sampling, name, rng.choice(number))
    if rng.random() < 0.2:
        spec.sampling.top_k = rng.choice(count)
    if rng.random() < 0.1:
        spec.model = _text(rng)
    if rng.random() < 0.1:
        spec.melody = rng.choice(sounds)
    spec.stems = rng.random() < 0.02
    return spec


def _text(rng: random.Random) -> str:
    return rng.choice(
        ["", "happy rock", "\0", "ä" * 300, "../../etc/passwd", "x" * 5000, "\U0001f3b5", " ", "a/b", "1"]
    )


# --- recordings ---


def audio(http_url: str, grpc_url: str, num: int, seed: int) -> Findings:
    """Broken recordings as melody or beginning: in multipart, in JSON, over gRPC."""
    return asyncio.run(_audio(http_url, grpc_url, num, seed))


async def _audio(http_url: str, grpc_url: str, num: int, seed: int) -> Findings:
    rng, found = random.Random(seed), Findings()
    sounds, large = recordings(rng), bombs()
    async with (
        httpx2.AsyncClient(base_url=http_url, timeout=HANG_S) as http,
        grpc.aio.insecure_channel(grpc_url.removeprefix("grpc://")) as channel,
    ):
        generate = channel.unary_unary("/musicgen.v1.MusicService/Generate")

        async def send() -> None:
            if rng.random() < 0.01:
                name, content = rng.choice(sorted(large.items()))
            else:
                name = rng.choice(sorted(sounds))
                content = sounds[name] if rng.random() < 0.05 else mutated(sounds[name], rng)
            field_name, how = rng.choice(["melody", "prompt_audio"]), rng.choice(["multipart", "json", "grpc"])
            duration_s = SHORT_S if field_name == "melody" else 0.5
            began, bad = time.perf_counter(), None
            try:
                if how == "grpc":
                    spec = pb.GenerationSpec(duration_s=duration_s, **{field_name: content})
                    status = await _status(generate(pb.GenerateRequest(spec=spec).SerializeToString(), timeout=HANG_S))
                    is_bad = status in _BAD_CODES or status == "DEADLINE_EXCEEDED"
                else:
                    status = str(await _post(http, how, field_name, content, duration_s))
                    is_bad = _is_bad_http(int(status))
                if is_bad:
                    bad = f"{how} {field_name} {name}: {status}; {len(content)} bytes, {content[:80].hex()}"
            except httpx2.HTTPError as error:
                status = type(error).__name__
                bad = f"{how} {field_name} {name}: {error!r}; {len(content)} bytes, {content[:80].hex()}"
            found.answer(status, time.perf_counter() - began, bad)

        await _side_by_side(send, num, 6)
    return found


async def _post(http: httpx2.AsyncClient, how: str, name: str, content: bytes, duration_s: float) -> int:
    if how == "multipart":
        files, data = {name: ("recording", content)}, {"duration_s": str(duration_s)}
        return (await http.post(PATH, data=data, files=files)).status_code
    body = {"duration_s": duration_s, name: base64.b64encode(content).decode()}
    return (await http.post(PATH, json=body)).status_code


async def _status(call: Awaitable[Any]) -> str:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return "OK"


# --- the wire ---


def wire(http_url: str, grpc_url: str, num: int, seed: int) -> Findings:
    """Bytes that are hardly HTTP or HTTP/2, and connections that end in the middle."""
    return asyncio.run(_wire(http_url, grpc_url, num, seed))


async def _wire(http_url: str, grpc_url: str, num: int, seed: int) -> Findings:
    rng, found = random.Random(seed), Findings()
    targets = [_address(http_url)] * 9 + [_address(grpc_url)]

    async def send() -> None:
        began, target = time.perf_counter(), rng.choice(targets)
        data, bad, leaves = _raw(rng), None, rng.random() < 0.3
        reader, writer = await asyncio.open_connection(*target)
        try:
            writer.write(data)
            await writer.drain()
            if not leaves:
                writer.write_eof()
            # A server may wait for the rest of what is not finished; then the client leaves.
            async with asyncio.timeout(0.02 if leaves else HANG_S):
                head = await reader.read(64)
            words = head.split(b" ")
            name = words[1].decode("latin-1") if head.startswith(b"HTTP/1") and len(words) > 1 else "no HTTP answer"
            if name.isdigit() and _is_bad_http(int(name)):
                bad = f"{data[:300]!r}: {name}"
        except TimeoutError:
            name = "left soon" if leaves else "no answer"
            bad = None if leaves else f"{data[:300]!r}: no answer and no end"
        except OSError as error:
            name = type(error).__name__
        finally:
            writer.transport.abort()
        found.answer(name, time.perf_counter() - began, bad)

    await _side_by_side(send, num, 8)
    return found


def _address(url: str) -> tuple[str, int]:
    host, _, port = url.partition("://")[2].rpartition(":")
    return host, int(port)


def _raw(rng: random.Random) -> bytes:
    """A request over HTTP/1.1 with something wrong in it."""
    body = json.dumps({"duration_s": SHORT_S, "stream": rng.random() < 0.5}).encode()
    length = rng.choice([str(len(body))] * 4 + ["0", "-1", "9" * 30, str(len(body) - 3), str(len(body) + 5), "x", ""])
    kind = rng.choice(["application/json"] * 4 + ["multipart/form-data; boundary=x", "multipart/form-data", "\xff", ""])
    method = rng.choice(["POST"] * 4 + ["GET", "DELETE", "PUT", "TRACE", "\0"])
    path = rng.choice([PATH] * 5 + ["/", PATH + "/%00", PATH + "/../../x", "/v1/models/\xff", PATH + "/" + "a" * 9000])
    lines = [
        f"{method} {path} HTTP/1.1",
        "Host: x",
        f"Content-Type: {kind}",
        f"Content-Length: {length}",
        "Connection: close",
    ]
    if rng.random() < 0.2:
        lines.append(rng.choice(["Transfer-Encoding: chunked", "X-Request-Id: \x01", "Idempotency-Key: " + "k" * 5000]))
    if rng.random() < 0.1:
        lines += [f"X-{i}: {'y' * 100}" for i in range(rng.choice([5, 500]))]
    data = "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body
    return mutated(data, rng) if rng.random() < 0.4 else data


async def _side_by_side(send: Callable[[], Awaitable[None]], num: int, width: int) -> None:
    """`num` times, `width` at the same time."""
    left = num

    async def work() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            await send()

    await asyncio.gather(*(work() for _ in range(width)))


FUZZERS: dict[str, Callable[[str, str, int, int], Findings]] = {
    "openapi": openapi,
    "protobuf": protobuf,
    "audio": audio,
    "wire": wire,
}
