"""Python client of the service: one interface over HTTP and gRPC.

with connect("grpc://localhost:9000", api_key="…") as client:
    generated = client.generate("happy rock", duration_s=8, seed=7)
    for chunk in client.stream("sad jazz"):
        play(chunk.samples)
"""

from __future__ import annotations

from urllib.parse import urlsplit

from musicgen.errors import InvalidRequestError
from musicgen_serving.client.base import Client, Stream
from musicgen_serving.client.types import (
    BrokenAnswerError,
    Chunk,
    ConnectionLostError,
    Generated,
    MusicRequest,
    Report,
    Retries,
    Start,
    Tls,
)

__all__ = [
    "BrokenAnswerError",
    "Chunk",
    "Client",
    "ConnectionLostError",
    "Generated",
    "MusicRequest",
    "Report",
    "Retries",
    "Start",
    "Stream",
    "Tls",
    "connect",
]


def connect(
    url: str,
    api_key: str | None = None,
    *,
    tls: Tls | None = None,
    timeout_s: float | None = None,
    retries: Retries | None = None,
) -> Client:
    """A client for `http://`, `https://`, `grpc://host:port` or `grpcs://host:port` (TLS). Connects when used.

    Args:
        timeout_s: timeout of one attempt; None: no timeout.
    Raises:
        InvalidRequestError: unsupported URL.
    """
    parts = urlsplit(url)
    if parts.scheme in ("http", "https") and parts.netloc:
        from musicgen_serving.client.http import HttpClient

        return HttpClient(url, api_key, tls=tls, timeout_s=timeout_s, retries=retries)
    if parts.scheme in ("grpc", "grpcs") and parts.netloc and not parts.path.strip("/"):
        from musicgen_serving.client.grpc import GrpcClient

        secured = tls or Tls() if parts.scheme == "grpcs" else None
        return GrpcClient(parts.netloc, api_key, tls=secured, timeout_s=timeout_s, retries=retries)
    expected = "http://, https://, grpc://host:port or grpcs://host:port"
    raise InvalidRequestError(expected, repr(url), "for example grpc://localhost:9000", param="url")
