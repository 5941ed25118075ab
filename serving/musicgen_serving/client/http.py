"""The client over HTTP: whole pieces as raw samples, streams as server-sent events ending with a checksum."""

from __future__ import annotations

import base64
import binascii
import json
import ssl
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import httpx2

from musicgen.errors import MusicGenError
from musicgen_serving.client.base import Client
from musicgen_serving.client.errors import error_from, no_response
from musicgen_serving.client.types import (
    BrokenAnswerError,
    Chunk,
    ConnectionLostError,
    Event,
    Generated,
    MusicRequest,
    Report,
    Retries,
    Start,
    Tls,
    from_bytes,
)
from musicgen_serving.errors import DeadlineExceededError
from musicgen_serving.types import GenerationStatus, ModelInfo

_PATH = "/v1/music/generations"
_CONNECT_S = 10.0
_FIELDS = (
    "prompt", "model", "stems", "duration_s", "seed", "temperature", "top_k", "top_p", "greedy", "guidance_scale",
    "melody_guidance", "extend_stride_s",
)  # fmt: skip
_FILES = ("melody", "prompt_audio")
_UNREACHABLE = (500, 502, 503, 504)
"""Statuses that a proxy may return in place of the service; the service's own errors have a JSON error body."""


class HttpClient(Client):
    """A client of `/v1/music/generations`.

    Args:
        url: e.g. `http://host:8000`.
        tls: for https; None: the system's trust store.
        timeout_s: read timeout, and total timeout of a streaming attempt; None: no timeout.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        *,
        tls: Tls | None = None,
        timeout_s: float | None = None,
        retries: Retries | None = None,
    ) -> None:
        super().__init__(retries)
        self._url, self._timeout_s = url, timeout_s
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        verify = _context(tls) if tls is not None else True
        timeout = httpx2.Timeout(timeout_s, connect=_CONNECT_S)
        self._http = httpx2.Client(base_url=url, headers=headers, timeout=timeout, verify=verify)

    def cancel(self, request_id: str) -> GenerationStatus:
        return _status(self._json("DELETE", f"{_PATH}/{request_id}"))

    def status(self, request_id: str) -> GenerationStatus:
        return _status(self._json("GET", f"{_PATH}/{request_id}"))

    def models(self) -> list[ModelInfo]:
        with _well_formed():
            return [_model(model) for model in self._json("GET", "/v1/models")["data"]]

    def close(self) -> None:
        self._http.close()

    @contextmanager
    def _own_errors(self) -> Iterator[None]:
        try:
            yield
        except httpx2.ReadTimeout as error:
            raise DeadlineExceededError("the request timed out") from error
        except (httpx2.TransportError, httpx2.StreamError) as error:
            raise no_response(self._url, str(error) or type(error).__name__, "HTTP") from error

    def _json(self, method: str, path: str) -> dict[str, Any]:
        with self._own_errors(), _well_formed():
            response = self._http.request(method, path)
            _raise_for_error(response)
            answer: dict[str, Any] = response.json()
            return answer

    def _whole(self, request: MusicRequest) -> Generated:
        with self._own_errors(), _well_formed():
            response = self._http.post(_PATH, **_body(request, 0, events=False))
            _raise_for_error(response)
            headers = response.headers
            channels = int(headers["x-channels"])
            samples = from_bytes(response.content, channels)
            return Generated(
                samples,
                int(headers["x-sample-rate"]),
                int(headers["x-seed"]),
                headers["x-model"],
                headers["x-request-id"],
                Report(
                    samples.shape[-1],
                    headers["x-checksum"],
                    int(headers["x-num-frames"]),
                    float(headers["x-queue-seconds"]),
                    float(headers["x-prefill-seconds"]),
                    float(headers["x-decode-seconds"]),
                    int(headers["x-num-failovers"]),
                    float(headers["x-billed-seconds"]),
                ),
            )

    def _events(self, request: MusicRequest, first_sample: int) -> Generator[Event, None, None]:
        body = _body(request, first_sample, events=True)
        end_at = None if self._timeout_s is None else time.monotonic() + self._timeout_s
        channels = 1
        with self._own_errors(), _well_formed(), self._http.stream("POST", _PATH, **body) as response:
            if response.status_code != 200:
                response.read()
            _raise_for_error(response)
            for line in response.iter_lines():
                if end_at is not None and time.monotonic() > end_at:
                    raise DeadlineExceededError("the stream timed out")
                if not line.startswith("data:"):
                    continue
                values = json.loads(line[5:])
                kind = values["type"]
                if kind == "music.generation.started":
                    channels = values["channels"]
                    yield _start(values)
                elif kind == "music.audio.delta":
                    yield Chunk(from_bytes(base64.b64decode(values["audio"]), channels), values["sample_offset"])
                elif kind == "music.generation.done":
                    yield _report(values)
                elif kind in ("music.generation.failed", "music.generation.cancelled"):
                    error = values["error"]
                    raise error_from(error["code"], error["message"], error["param"])


def _context(tls: Tls) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=None if tls.ca is None else str(tls.ca))
    if tls.certificate is not None:
        context.load_cert_chain(tls.certificate, tls.key)
    return context


def _body(request: MusicRequest, first_sample: int, *, events: bool) -> dict[str, Any]:
    """Arguments of a POST: JSON, or multipart if there are files."""
    fields = {name: getattr(request, name) for name in _FIELDS if getattr(request, name) is not None}
    if request.prompt == "":
        del fields["prompt"]  # as in gRPC: unconditional
    fields |= {"response_format": "f32", "first_sample": first_sample}
    if events:
        fields["stream_format"] = "sse"
    files = {name: (name, getattr(request, name)) for name in _FILES if getattr(request, name) is not None}
    headers = {"Idempotency-Key": request.idempotency_key}
    if request.request_id is not None:
        headers["X-Request-Id"] = request.request_id
    if not files:
        return {"json": fields, "headers": headers}
    return {"data": {name: _text(value) for name, value in fields.items()}, "files": files, "headers": headers}


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


@contextmanager
def _well_formed() -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, binascii.Error, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BrokenAnswerError(f"invalid response ({type(error).__name__})") from error
    except ValueError as error:
        if isinstance(error, MusicGenError):
            raise
        raise BrokenAnswerError("invalid response") from error


def _raise_for_error(response: httpx2.Response) -> None:
    """Raises: the exception for an error response."""
    status = response.status_code
    if status == 200:
        return
    after = response.headers.get("retry-after", "")
    retry_after_s = float(after) if after.isdigit() else None
    try:
        error = response.json()["error"]
        code, message, param = error["code"], error["message"], error["param"]
    except (ValueError, KeyError, TypeError):
        if status in _UNREACHABLE:
            raise ConnectionLostError(f"no response from the service (status {status})") from None
        raise BrokenAnswerError(f"unexpected response with status {status}; is this the right URL?") from None
    raise error_from(code, message, param, retry_after_s)


def _start(values: dict[str, Any]) -> Start:
    return Start(
        values["id"],
        values["model"],
        values["seeds"][0],
        values["sample_rate"],
        values["channels"],
        values["num_samples"],
    )


def _report(values: dict[str, Any]) -> Report:
    piece = values["pieces"][0]
    return Report(
        piece["num_samples"],
        piece["checksum"],
        piece["num_frames"],
        piece["queue_s"],
        piece["prefill_s"],
        piece["decode_s"],
        piece["num_failovers"],
        values["usage"]["billed_s"],
    )


def _status(values: dict[str, Any]) -> GenerationStatus:
    with _well_formed():
        return GenerationStatus(
            values["id"],
            values["model"],
            values["status"],
            values["audio_s"],
            values["done_s"],
            values["age_s"],
            values["error"],
        )


def _model(values: dict[str, Any]) -> ModelInfo:
    names = ("license", "sample_rate", "channels", "melody", "max_duration_s", "window_s", "weights")
    return ModelInfo(values["id"], *(values[name] for name in names))
