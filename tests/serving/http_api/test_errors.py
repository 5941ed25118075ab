"""Every failure: its status, its shape, its headers, and not a word too much."""

from __future__ import annotations

import gzip
import json
import logging
from typing import Any

import httpx2
import pytest
from musicgen_serving.errors import (
    ConflictError,
    DeadlineExceededError,
    NotOfferedError,
    ReplicaLostError,
    SupersededError,
)
from musicgen_serving.http_api.middleware import max_body_bytes
from serving.http_api.conftest import URL, Client
from serving.http_api.fakes import KEY, FakeService

from musicgen.errors import (
    DeadlineTooShortError,
    EngineDeadError,
    InvalidRequestError,
    MusicGenError,
    OverloadedError,
    QuotaExceededError,
    WeightsError,
)
from musicgen.types import FinishReason

SECRET = "/srv/secret/replica-7"
REFUSALS: list[tuple[BaseException, int, str, str]] = [
    (InvalidRequestError("a melody model", "demo", param="melody"), 400, "invalid_request_error", "invalid_request"),
    (NotOfferedError("no stems", param="stems"), 400, "invalid_request_error", "not_available_here"),
    (ConflictError("the key was used"), 409, "invalid_request_error", "conflict"),
    (QuotaExceededError("used up", retry_after_s=12.2), 429, "rate_limit_error", "rate_limit_exceeded"),
    (QuotaExceededError("used up"), 429, "rate_limit_error", "rate_limit_exceeded"),
    (OverloadedError("busy", retry_after_s=0.2), 503, "overloaded_error", "overloaded"),
    (ReplicaLostError("gone"), 503, "overloaded_error", "temporarily_unavailable"),
    (EngineDeadError(SECRET), 503, "overloaded_error", "temporarily_unavailable"),
    (SupersededError("a retry took over"), 499, "request_cancelled", "superseded"),
    (DeadlineExceededError("late"), 504, "timeout_error", "deadline_exceeded"),
    (DeadlineTooShortError("never by then"), 504, "timeout_error", "deadline_too_short"),
    (WeightsError(SECRET), 500, "server_error", "internal_error"),
    (MusicGenError(SECRET), 500, "server_error", "internal_error"),
    (RuntimeError(SECRET), 500, "server_error", "internal_error"),
]


def check_error(response: httpx2.Response, status: int, code: str | None = None) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert list(body) == ["error"]
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["type"]
    assert code is None or error["code"] == code
    assert response.headers["x-request-id"]
    assert ("retry-after" in response.headers) == (status in (429, 503))
    assert SECRET not in response.text
    assert "Traceback" not in response.text
    return error


@pytest.mark.parametrize("how", [{}, {"stream": True}, {"stream_format": "sse"}])
@pytest.mark.parametrize(("error", "status", "type", "code"), REFUSALS, ids=lambda value: str(value)[:20])
def test_refusals_are_plain_http_errors(
    client: Client, error: BaseException, status: int, type: str, code: str, how: dict[str, Any]
) -> None:
    client.service.refuse = error
    response = client.post(**how)
    assert check_error(response, status, code)["type"] == type
    if getattr(error, "retry_after_s", None) == 12.2:
        assert response.headers["retry-after"] == "13"
    assert client.service.num_left == 1


@pytest.mark.parametrize("how", [{}, {"stream": True}, {"stream_format": "sse"}])
@pytest.mark.parametrize(
    ("reason", "error", "status"),
    [
        (FinishReason.FAILED, ReplicaLostError("gone"), 503),
        (FinishReason.FAILED, None, 500),
        (FinishReason.FAILED, KeyError(SECRET), 500),
        (FinishReason.CANCELLED, None, 499),
        (FinishReason.CANCELLED, DeadlineExceededError("late"), 504),
    ],
)
def test_failures_before_the_first_audio(
    client: Client, how: dict[str, Any], reason: FinishReason, error: BaseException | None, status: int
) -> None:
    client.service.fail_after, client.service.reason, client.service.error = 0, reason, error
    check_error(client.post(**how), status)


@pytest.mark.parametrize(
    ("reason", "error", "code"),
    [
        (FinishReason.FAILED, ReplicaLostError("gone"), "temporarily_unavailable"),
        (FinishReason.FAILED, KeyError(SECRET), "internal_error"),
        (FinishReason.CANCELLED, None, "cancelled"),
    ],
)
def test_failures_in_a_stream(client: Client, reason: FinishReason, error: BaseException | None, code: str) -> None:
    client.service.fail_after, client.service.reason, client.service.error = 2, reason, error
    with pytest.raises(Exception, match="did not finish"):  # the server cuts the connection at that
        client.post(stream=True)
    response = client.post(stream_format="sse")
    assert response.status_code == 200
    last = json.loads(response.text.split("data: ")[-1])
    assert last["type"] == f"music.generation.{reason.value}"
    assert last["error"]["code"] == code
    assert response.text.count("music.audio.delta") == 2 * 2
    assert SECRET not in response.text
    assert response.text.count("event: music.generation.done") == 0
    assert client.service.num_left == 2


@pytest.mark.parametrize("broken", ["raises", "gap", "offset"])
def test_a_service_that_breaks_its_promise_never_looks_whole(client: Client, broken: str) -> None:
    client.service.raise_in_stream = ValueError(SECRET) if broken == "raises" else None
    client.service.skip_chunk = broken == "gap"
    client.service.offset_error = int(broken == "offset")
    with pytest.raises(Exception, match="did not finish"):
        client.post(stream=True)
    last = json.loads(client.post(stream_format="sse").text.split("data: ")[-1])
    assert last["type"] == "music.generation.failed"
    assert last["error"]["code"] == "internal_error"
    assert SECRET not in json.dumps(last)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"duration_s": 0}, "duration_s"),
        ({"duration_s": -1}, "duration_s"),
        ({"duration_s": 121}, "duration_s"),
        ({"duration_s": 1e308}, "duration_s"),
        ({"duration_s": "1"}, "duration_s"),
        ({"duration_s": True}, "duration_s"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 10**400}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"num_samples": 0}, "num_samples"),
        ({"num_samples": 9}, "num_samples"),
        ({"num_samples": 10**30}, "num_samples"),
        ({"prompt": []}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": [["a"]]}, "prompt"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_k": 2**31}, "top_k"),
        ({"top_p": 1.1}, "top_p"),
        ({"guidance_scale": 1e5}, "guidance_scale"),
        ({"melody_guidance": -1e5}, "melody_guidance"),
        ({"extend_stride_s": 0}, "extend_stride_s"),
        ({"loudness": 1}, "loudness"),
        ({"loudness": -71}, "loudness"),
        ({"stems": True}, "stems"),
        ({"melody_guidance": 3}, "melody_guidance"),
        ({"prompt": ["a"] * 9}, "prompt"),
        ({"prompt": ["a"] * 3, "num_samples": 3}, "num_samples"),
        ({"first_sample": -1}, "first_sample"),
        ({"response_format": "aac"}, "response_format"),
        ({"stream_format": "websocket"}, "stream_format"),
        ({"stream": "yes"}, "stream"),
        ({"model": ""}, "model"),
        ({"tempo": 120}, "tempo"),
        ({"x" * 5000: 1}, "x" * 100),
        ({"melody": "not base64!"}, "melody"),
        ({"melody": "https://example.com/song.wav"}, "melody"),
        ({"melody": "/etc/passwd"}, "melody"),
        ({"melody": "file:///etc/passwd"}, "melody"),
        ({"prompt_audio": 5}, "prompt_audio"),
        ({"prompt_audio": ""}, "prompt_audio"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_wrong_fields(client: Client, fields: dict[str, Any], param: str) -> None:
    assert check_error(client.post(**fields), 400, "invalid_request")["param"] == param
    assert client.service.requests == []


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"prompt": "\\ud800"}',
        b'{"duration_s": NaN}',
        b'{"duration_s": Infinity}',
        b'{"temperature": 1e999}',
        b'{"top_p": -Infinity}',
        b'{"seed": ' + b"9" * 10_000 + b"}",
        b'{"duration_s": 1' + b"0" * 400 + b"}",
        '{"prompt": "café"}'.encode("utf-16"),
    ],
    ids=lambda body: repr(body[:20]),
)
def test_broken_json(client: Client, body: bytes) -> None:
    response = client.request("POST", URL, content=body, headers={"Content-Type": "application/json"})
    check_error(response, 400, "invalid_request")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "expected a JSON object, got invalid JSON; EOF while parsing a value at line 1 column 0"),
        (b"[]", "expected a JSON object, got another value"),
        (b'{"duration_s": 0}', "duration_s: expected a value greater than 0"),
        (b'{"stream": 3}', "stream: expected a valid boolean"),
        (b'{"melody": "a.wav"}', "melody: expected a base64-encoded audio file, not a URL or path"),
        (b'{"duration": 5}', "duration: expected a field of this API, got an unknown field; did you mean duration_s?"),
        (b'{"tempo": 5}', "tempo: expected a field of this API, got an unknown field; see /docs"),
        (
            b'{"top_p": 2, "duration_s": "long", "tempo": 3}',
            "duration_s: expected a valid number; top_p: expected a value less than or equal to 1; "
            "tempo: expected a field of this API, got an unknown field; see /docs",
        ),
    ],
    ids=lambda value: value[:30],
)
def test_messages_say_all_that_is_wrong(client: Client, body: bytes, message: str) -> None:
    error = check_error(client.request("POST", URL, content=body), 400, "invalid_request")
    assert error["message"] == message
    assert error["param"] == (message.split(":")[0] if ":" in message else None)


def test_compressed_bodies(client: Client) -> None:
    for coding in ("gzip", "br, gzip", "x" * 1000):
        headers = {"Content-Type": "application/json", "Content-Encoding": coding}
        response = client.request("POST", URL, content=gzip.compress(b"{}"), headers=headers)
        assert "Content-Encoding" in check_error(response, 415, "unsupported_media_type")["message"]
    assert client.post(duration_s=0.1).status_code == 200


def test_prompts_that_are_too_long(client: Client) -> None:
    assert check_error(client.post(prompt="x" * 2001), 413, "too_large")["param"] == "prompt"
    assert client.post(prompt="\N{MUSICAL SYMBOL G CLEF}" * 2000, duration_s=0.1).status_code == 200


@pytest.mark.parametrize("prompt", ["", "Ünïcödé 音楽 \N{MUSICAL NOTE}", "a\x00b\r\nX-Evil: 1", None, [None, "a"]])
def test_any_text_is_taken_as_it_is(client: Client, prompt: Any) -> None:
    response = client.post(prompt=prompt, duration_s=0.1)
    assert response.status_code == 200, response.text
    expected = prompt if isinstance(prompt, list) else [prompt]
    assert [piece.prompt for piece in client.service.requests[-1].pieces] == expected
    assert "x-evil" not in response.headers


@pytest.mark.parametrize(
    ("kind", "status"), [("text/plain", 415), ("application/x-www-form-urlencoded", 415), ("nonsense", 415)]
)
def test_other_media_types(client: Client, kind: str, status: int) -> None:
    response = client.request("POST", URL, content=b"{}", headers={"Content-Type": kind})
    check_error(response, status, "unsupported_media_type")


def test_bodies_that_are_too_large(client: Client) -> None:
    largest = max_body_bytes(client.service.limits)
    announced = client.request("POST", URL, content=b"x" * (largest + 1))
    check_error(announced, 413, "too_large")

    async def chunks() -> Any:
        for _ in range(largest // 1000 + 2):
            yield b"x" * 1000

    check_error(client.request("POST", URL, content=chunks()), 413, "too_large")
    assert client.service.requests == []


@pytest.mark.parametrize(
    "headers",
    [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic eDp5"}, {"X-API-Key": "k" * 5000}],
)
@pytest.mark.parametrize(("method", "url"), [("POST", URL), ("GET", f"{URL}/a"), ("DELETE", f"{URL}/a"),
                                             ("GET", "/v1/models"), ("GET", "/v1/models/demo")])  # fmt: skip
def test_keys(service: FakeService, headers: dict[str, str], method: str, url: str) -> None:
    service.is_open = False
    client = Client(service)
    response = client.request(method, url, headers=headers)
    check_error(response, 401, "invalid_api_key")
    assert response.headers["www-authenticate"] == "Bearer"
    for good in ({"Authorization": f"bearer {KEY}"}, {"X-API-Key": KEY}):
        assert client.request("GET", "/v1/models", headers=good).status_code == 200


def test_unknown_routes_and_methods(client: Client) -> None:
    check_error(client.request("GET", "/v2/nothing"), 404, "not_found")
    check_error(client.request("GET", "/v1/models/"), 404, "not_found")
    response = client.request("PUT", URL, json={})
    check_error(response, 405, "method_not_allowed")
    assert "POST" in response.headers["allow"]
    assert check_error(client.post(model="nobody"), 404, "not_found")["param"] == "model"
    for id in ("nobody", "%00", "a" * 500, "%F0%9F%8E%B5", ".."):
        assert client.request("GET", f"{URL}/{id}").status_code in (404, 405)
        assert client.request("DELETE", f"{URL}/{id}").status_code in (404, 405)


def test_the_unforeseen_is_logged_with_its_request_and_not_told(
    client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    client.service.refuse = RuntimeError(SECRET)
    with caplog.at_level(logging.ERROR):
        response = client.request("POST", URL, json={"prompt": "a secret song"}, headers={"X-Request-Id": "abc"})
    check_error(response, 500, "internal_error")
    assert "abc" in caplog.text
    assert SECRET in caplog.text
    assert "a secret song" not in caplog.text


def test_what_the_edge_refuses_is_counted_once(client: Client, service: FakeService) -> None:
    """The service counts what it refuses itself: unknown keys, and whatever it finds wrong with a request."""
    client.post(stream=True, first_sample=2**40)
    assert service.refused == []
    client.post(duration_s=-1)
    client.post(melody="no base64")
    client.request("POST", URL, content=b"<xml/>", headers={"Content-Type": "text/xml"})
    client.request("POST", URL, json={}, headers={"Authorization": "Basic eDp5"})
    codes = [("invalid_request", "default")] * 2 + [("unsupported_media_type", "default"), ("invalid_api_key", "")]
    assert service.refused == codes
