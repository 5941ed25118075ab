"""The OpenAPI document: what FastAPI cannot see by itself, because the bodies are read by hand.

JSON and multipart bodies of a generation, its kinds of responses, headers, keys; and no status that is never sent.
"""

from __future__ import annotations

import copy
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from musicgen_serving.http_api.schemas import RECORDING_FIELDS, ErrorBody, GenerationBody, GenerationResult

_BODY_REF = "#/components/schemas/GenerationBody"
_FORM_REF = "#/components/schemas/GenerationForm"
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_SECURITY: list[dict[str, list[str]]] = [{"BearerKey": []}, {"ApiKeyHeader": []}, {}]
_SECURITY_SCHEMES = {
    "BearerKey": {"type": "http", "scheme": "bearer", "description": "An API key. A service in open mode needs none."},
    "ApiKeyHeader": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}


def _error(description: str, *, retry: bool = False) -> dict[str, Any]:
    headers = {"Retry-After": {"description": "Whole seconds.", "schema": {"type": "integer"}}}
    return {"model": ErrorBody, "description": description} | ({"headers": headers} if retry else {})


ERRORS: dict[int | str, dict[str, Any]] = {
    401: _error("No API key, or an unknown one."),
    404: _error("No such thing, or none that this key may know of."),
    500: _error("The service's own fault."),
    503: _error("The service cannot take it now.", retry=True),
}
"""Responses of every route that needs a key."""

GENERATION_RESPONSES: dict[int | str, dict[str, Any]] = ERRORS | {
    200: {
        "description": "Audio of one piece in the format that was asked for; JSON for several pieces or with `Accept: "
        "application/json`; events with `stream_format: sse`.",
        "model": GenerationResult,
        "content": {
            "audio/wav": _BINARY,
            "audio/flac": _BINARY,
            "audio/mpeg": _BINARY,
            "audio/ogg": _BINARY,
            "audio/pcm": _BINARY,
            "text/event-stream": {"schema": {"type": "string"}},
        },
        "headers": {
            name: {"description": text, "schema": {"type": "string"}}
            for name, text in {
                "X-Request-Id": "Id of the generation.",
                "X-Seed": "Seed of each piece, with commas between them.",
                "X-Sample-Rate": "Of the audio, in Hz.",
                "X-Channels": "Channels of the audio.",
                "X-Num-Samples": "Samples a channel of the whole piece, at the model's rate.",
                "X-First-Sample": "Sample of the piece at which the audio begins.",
                "X-Checksum": "Whole results: SHA-256 of each piece's samples as made: float32, little-endian, "
                "interleaved.",
                "X-Billed-Seconds": "Whole results: seconds that count against the allowance: made, and not charged "
                "before.",
                "X-Num-Frames": "Whole results: decoded codec frames, all pieces together.",
                "X-Queue-Seconds": "Whole results: seconds in the engine's queue, all pieces together.",
                "X-Prefill-Seconds": "Whole results: seconds of prefill, all pieces together.",
                "X-Decode-Seconds": "Whole results: seconds of decoding, all pieces together.",
            }.items()
        },
    },
    400: _error("Malformed, or a value out of its range; `param` names the field."),
    403: _error("The key may not do this."),
    408: _error("The body did not come."),
    409: _error("The request id is in use, or the Idempotency-Key was used for another request."),
    413: _error("The body, a recording or a text is too large."),
    415: _error("Neither JSON nor multipart/form-data."),
    429: _error("An allowance is used up.", retry=True),
    499: _error("The request was cancelled before its first audio."),
    504: _error("A deadline passed before the first audio."),
}


EXPOSED_HEADERS = [*GENERATION_RESPONSES[200]["headers"], "X-Model", "Retry-After"]
"""What pages of other origins may read."""


def _header(name: str, description: str, example: str, **schema: Any) -> dict[str, Any]:
    shape = {"type": "string", **schema}
    return {"name": name, "in": "header", "required": False, "description": description, "schema": shape,
            "example": example}  # fmt: skip


GENERATION_DOCS: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": {"$ref": _BODY_REF}},
            "multipart/form-data": {"schema": {"$ref": _FORM_REF}},
        },
    },
    "parameters": [
        _header("X-Request-Id", "Id of the generation; made if absent.", "my-song-17", maxLength=128),
        _header(
            "Idempotency-Key",
            "Makes a repeat safe: the same key means the same request and, without a seed, the same audio. Repeated "
            "within ten minutes of its end, it is charged only for what had not been made before.",
            "5f1c7a",
            minLength=1,
            maxLength=255,
        ),
        _header("traceparent", "W3C trace context.", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
    ],
}


class MusicApi(FastAPI):
    """FastAPI with the whole document."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            document = get_openapi(
                title=self.title,
                version=self.version,
                description=self.description,
                routes=self.routes,
                tags=self.openapi_tags,
            )
            self.openapi_schema = _completed(document)
        return self.openapi_schema


def _completed(document: dict[str, Any]) -> dict[str, Any]:
    for path, operations in document["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)  # FastAPI's own validation error: never sent here
            if path.startswith("/v1/"):
                operation["security"] = _SECURITY
    components = document.setdefault("components", {})
    components["securitySchemes"] = _SECURITY_SCHEMES
    schemas = components.setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    body = GenerationBody.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas["GenerationBody"], schemas["GenerationForm"] = body, _as_form(body)
    return document


def _as_form(body: dict[str, Any]) -> dict[str, Any]:
    """The same fields in multipart: recordings are files, and a field that is null is left out."""
    form = copy.deepcopy(body)
    form["title"] = "GenerationForm"
    for name, field in form["properties"].items():
        if name in RECORDING_FIELDS:
            field.pop("anyOf")
            field.update(type="string", format="binary")
        elif "anyOf" in field:
            field["anyOf"] = [kind for kind in field["anyOf"] if kind.get("type") != "null"]
    form["properties"]["prompt"]["anyOf"] = [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]
    for field in form["properties"].values():
        if field.get("default", 0) is None:
            del field["default"]
    return form
