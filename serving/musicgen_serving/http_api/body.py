"""Request bytes → `GenerationBody`: JSON, or multipart/form-data with files.

Reads with a timeout per message and parses large bodies in a thread. Opens no files or URLs: audio comes in the body.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from pydantic import ValidationError
from python_multipart.exceptions import FormParserError
from starlette.datastructures import Headers, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from musicgen.errors import InvalidRequestError
from musicgen_serving.http_api.errors import plain_text
from musicgen_serving.http_api.schemas import RECORDING_FIELDS, GenerationBody

_INLINE_BYTES = 65536
"""Smaller bodies are parsed inline, which is faster than a thread."""
_MAX_FILES, _MAX_FIELDS = 4, 200


class _InMemoryParser(MultiPartParser):
    spool_max_size = 2**62  # the body is in memory already, and bounded


async def read_body(request: Request, stall_s: float) -> bytes:
    """The whole body. Raises: HTTPException 408: no data for `stall_s`; ClientDisconnect; TooLargeError."""
    parts: list[bytes] = []
    while True:
        try:
            async with asyncio.timeout(stall_s):
                message = await request.receive()
        except TimeoutError:
            raise HTTPException(408, f"timed out after {stall_s:g} s waiting for the request body") from None
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


async def parse_body(headers: Headers, content: bytes) -> GenerationBody:
    """The fields of a request.

    Raises:
        InvalidRequestError: malformed JSON or multipart, an unknown field, or a value of the wrong type or range.
        HTTPException: 415: unsupported media type.
    """
    kind = headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind == "application/json":
        if len(content) <= _INLINE_BYTES:
            return _from_json(content)
        return await asyncio.to_thread(_from_json, content)
    if kind == "multipart/form-data":
        if len(content) <= _INLINE_BYTES:
            return _from_form(await _form_items(headers, content))
        # In the thread's own event loop: the parser is a coroutine, but never waits when the body is in memory.
        return await asyncio.to_thread(lambda: _from_form(asyncio.run(_form_items(headers, content))))
    raise HTTPException(415, "Content-Type: expected application/json or multipart/form-data")


def _from_json(content: bytes) -> GenerationBody:
    try:
        return GenerationBody.model_validate_json(content, strict=True)
    except ValidationError as error:
        raise _invalid(error) from None


def _from_form(fields: dict[str, object]) -> GenerationBody:
    try:
        return GenerationBody.model_validate(fields)
    except ValidationError as error:
        raise _invalid(error) from None


async def _form_items(headers: Headers, content: bytes) -> dict[str, object]:
    async def once() -> AsyncGenerator[bytes, None]:
        yield content

    parser = _InMemoryParser(
        headers, once(), max_files=_MAX_FILES, max_fields=_MAX_FIELDS, max_part_size=max(1, len(content))
    )
    try:
        form = await parser.parse()
    except (MultiPartException, FormParserError, ValueError, LookupError) as error:
        reason = error.message if isinstance(error, MultiPartException) else "a malformed one"
        raise InvalidRequestError("a multipart/form-data body", plain_text(reason, 200)) from None
    fields: dict[str, object] = {}
    try:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile) and name not in RECORDING_FIELDS:
                hint = f"only {' and '.join(RECORDING_FIELDS)} may be files"
                raise InvalidRequestError("a text field", "a file", hint, param=plain_text(name, 100))
            _put(fields, name, await value.read() if isinstance(value, UploadFile) else value)
    finally:
        await form.close()
    return fields


def _put(fields: dict[str, object], name: str, value: object) -> None:
    """Repeated prompts become a list; no other field may be repeated."""
    if name not in fields:
        fields[name] = value
    elif name == "prompt":
        earlier = fields[name]
        fields[name] = [*earlier, value] if isinstance(earlier, list) else [earlier, value]
    else:
        raise InvalidRequestError("each field at most once", "a duplicate", param=plain_text(name, 100))


def _invalid(error: ValidationError) -> InvalidRequestError:
    """The first problem, without echoing any submitted value."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    # `loc` starts with the field and ends with the alternative of a union.
    param = plain_text(str(first["loc"][0]), 100) if first["loc"] else None
    if first["type"] == "json_invalid":
        return InvalidRequestError("a JSON object", plain_text(first["msg"], 200))
    if first["type"] == "extra_forbidden":
        return InvalidRequestError("a field of this API", "an unknown field", "see /docs", param=param)
    reason = first["msg"].removeprefix("Value error, ")
    return InvalidRequestError("a value of the documented type and range", plain_text(reason, 300), param=param)
