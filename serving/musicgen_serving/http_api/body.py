"""Request bytes → `GenerationBody`: JSON, or multipart/form-data with files.

Reads with a timeout per message and parses large bodies in a thread. Opens no files or URLs: audio comes in the body.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Iterable
from difflib import get_close_matches

from pydantic import ValidationError
from pydantic_core import ErrorDetails
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
_MAX_PROBLEMS = 10
_SHOULD = re.compile("(?:Value error, )?(?:Input should be|String should have) (.+)", re.DOTALL)


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
        HTTPException: 415: unsupported media type, or a compressed body.
    """
    coding = headers.get("content-encoding", "identity").strip().lower()
    if coding != "identity":
        message = f"Content-Encoding: expected none, got {plain_text(coding, 50)}; send the body uncompressed"
        raise HTTPException(415, message, {"Accept-Encoding": "identity"})
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
    """All problems, the first one as the error's own, without echoing any submitted value."""
    problems: dict[str, list[ErrorDetails]] = {}
    for found in error.errors(include_url=False, include_context=False, include_input=False):
        if not found["loc"]:
            is_json = found["type"] != "json_invalid"
            reason = "" if is_json else plain_text(found["msg"].removeprefix("Invalid JSON: "), 200)
            return InvalidRequestError("a JSON object", "another value" if is_json else "invalid JSON", reason)
        # `loc` starts with the field and ends with the alternative of a union.
        problems.setdefault(plain_text(str(found["loc"][0]), 100), []).append(found)
    first, *others = (_problem(param, found) for param, found in list(problems.items())[:_MAX_PROBLEMS])
    hint = "; ".join(filter(None, [first.hint, *map(str, others)]))
    return InvalidRequestError(first.expected, first.got, hint, param=first.param)


def _problem(param: str, found: Iterable[ErrorDetails]) -> InvalidRequestError:
    if any(detail["type"] == "extra_forbidden" for detail in found):
        near = get_close_matches(param, GenerationBody.model_fields, 1, cutoff=0.7)
        hint = f"did you mean {near[0]}?" if near else "see /docs"
        return InvalidRequestError("a field of this API", "an unknown field", hint, param=param)
    expected = " or ".join(dict.fromkeys(_expected(detail["msg"]) for detail in found))
    return InvalidRequestError(expected, "", param=param)


def _expected(message: str) -> str:
    """Pydantic's message as the rest of "expected …"."""
    should = _SHOULD.fullmatch(message)
    if should is None:
        return f"a valid value ({plain_text(message, 200)})"
    what = plain_text(should[1], 300)
    return f"a value {what}" if what.startswith(("greater", "less")) else what
