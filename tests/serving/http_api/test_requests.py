"""What arrives at the service: fields, seeds, ids, keys, recordings in JSON and multipart; and the small routes."""

from __future__ import annotations

import asyncio
import base64
import io
import random
from typing import Any

import numpy as np
import pytest
import soundfile
from musicgen_serving.http_api.middleware import EdgeMiddleware, is_internal_header
from musicgen_serving.settings import LimitSettings
from serving.http_api.conftest import URL, Client
from serving.http_api.fakes import FakeService


def form(client: Client, fields: dict[str, Any], files: Any = None, **options: Any) -> Any:
    # A file that is not there makes the client send multipart even without one.
    return client.request("POST", URL, data=fields, files=files or {"prompt": (None, "x")}, **options)


def audio_file(format: str, subtype: str | None = None, seconds: float = 0.2, channels: int = 1) -> bytes:
    sink = io.BytesIO()
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, (int(seconds * 16000), channels))
    soundfile.write(sink, noise, 16000, subtype, format=format)
    return sink.getvalue()


def test_all_fields_arrive(client: Client, recording: bytes, recording_base64: str) -> None:
    fields = {
        "model": "stereo",
        "prompt": ["a", "b"],
        "duration_s": 0.25,
        "num_samples": 2,
        "seed": 2**63 - 2,
        "temperature": 0.5,
        "top_k": 50,
        "top_p": 0.9,
        "greedy": True,
        "guidance_scale": 2.5,
        "melody_guidance": 4.0,
        "extend_stride_s": 5.0,
        "stems": True,
        "first_sample": 3,
        "deadline_s": 30.5,
    }
    json_fields = {**fields, "melody": recording_base64, "prompt_audio": recording_base64}
    assert client.request("POST", URL, json=json_fields).status_code == 200
    files = {"melody": ("../../etc/passwd", recording, "text/html"), "prompt_audio": ("", recording)}
    texts = {key: str(value) if not isinstance(value, list) else value for key, value in fields.items()}
    response = form(client, texts, {key: value for key, value in files.items() if value[0]} | {
        "prompt_audio": ("x", recording)})  # fmt: skip
    assert response.status_code == 200, response.text
    for request in client.service.requests:
        assert request.model == "stereo"
        assert [(piece.prompt, piece.seed) for piece in request.pieces] == [
            ("a", 2**63 - 2), ("a", 2**63 - 1), ("b", 0), ("b", 1)]  # fmt: skip
        assert request.duration_s == 0.25
        sampling = request.sampling
        assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.greedy) == (0.5, 50, 0.9, True)
        assert (sampling.guidance_scale, sampling.melody_guidance) == (2.5, 4.0)
        assert request.melody == recording
        assert request.prompt_audio == recording
        assert request.stems
        assert request.extend_stride_s == 5.0
        assert request.first_sample == 3
        assert request.deadline_s == 30.5
        assert request.chunks is None
    assert len(client.service.requests) == 2


def test_defaults(client: Client) -> None:
    assert client.request("POST", URL, json={"duration_s": 0.1}).status_code == 200
    (request,) = client.service.requests
    assert request.model == "demo"
    assert [piece.prompt for piece in request.pieces] == [None]
    assert request.sampling.guidance_scale == 3.0
    assert request.sampling.top_k == 250
    assert request.idempotency_key is None


def test_seeds_without_a_seed(client: Client) -> None:
    def seed(**headers: str) -> int:
        client.request("POST", URL, json={"duration_s": 0.1, "num_samples": 8}, headers=headers)
        seeds = [piece.seed for piece in client.service.requests[-1].pieces]
        assert seeds == list(range(seeds[0], seeds[0] + 8))
        assert 0 <= seeds[0] <= seeds[-1] < 2**53, "what JavaScript reads as it is"
        return seeds[0]

    assert seed() != seed()
    first = seed(**{"Idempotency-Key": "k1"})
    assert first == seed(**{"Idempotency-Key": "k1"})
    assert first != seed(**{"Idempotency-Key": "k2"})


@pytest.mark.parametrize(
    ("change", "is_same"),
    [
        ({}, True),
        ({"first_sample": 100}, True),
        ({"stream": True}, True),
        ({"stream_format": "sse"}, True),
        ({"response_format": "flac"}, True),
        ({"model": "demo"}, True),
        ({"num_samples": 1, "temperature": 1}, True),
        ({"prompt": ["x"]}, True),
        ({"prompt": "y"}, False),
        ({"prompt": None}, False),
        ({"duration_s": 0.2}, False),
        ({"seed": 8}, False),
        ({"num_samples": 2}, False),
        ({"temperature": 0.9}, False),
        ({"top_k": 1}, False),
        ({"top_p": 0.5}, False),
        ({"greedy": True}, False),
        ({"guidance_scale": 1}, False),
        ({"melody_guidance": 3, "melody": "recording"}, False),
        ({"extend_stride_s": 17}, False),
        ({"loudness": -14}, False),
        ({"model": "stereo"}, False),
        ({"melody": "recording"}, False),
        ({"prompt_audio": "recording"}, False),
    ],
    ids=str,
)
def test_fingerprint_is_of_what_decides_the_result(
    client: Client, recording_base64: str, change: dict[str, Any], is_same: bool
) -> None:
    fields = {"duration_s": 0.1, "prompt": "x", "seed": 7}
    changed = {key: recording_base64 if value == "recording" else value for key, value in change.items()}
    for body in (fields, {**fields, **changed}):
        response = client.request("POST", URL, json=body, headers={"Idempotency-Key": "k"})
        assert response.status_code == 200, response.text
    first, second = client.service.requests
    assert len(first.fingerprint) == 64
    assert (first.fingerprint == second.fingerprint) == is_same


@pytest.mark.parametrize("key", ["", "k" * 256, "k\u00e9"])
def test_idempotency_keys_have_a_form(client: Client, key: str) -> None:
    headers = [(b"Idempotency-Key", key.encode("latin-1"))]
    response = client.request("POST", URL, json={"duration_s": 0.1}, headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "idempotency_key"


@pytest.mark.parametrize("given", ["song-17", "A" * 128, "a.b_c:d"])
def test_good_request_ids_are_kept(client: Client, given: str) -> None:
    for url in (URL, "/nowhere", "/healthz"):
        response = client.request("POST", url, json={"duration_s": 0.1}, headers={"X-Request-Id": given})
        assert response.headers.get_list("x-request-id") == [given]
    assert client.service.requests[0].request_id == given


@pytest.mark.parametrize("given", ["A" * 129, "a b", "../x", "a\u00e9", "-a", 'a"b'])
def test_other_request_ids_are_refused_and_not_echoed(client: Client, given: str) -> None:
    headers = [(b"X-Request-Id", given.encode("latin-1"))]
    response = client.request("POST", URL, json={"duration_s": 0.1}, headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "request_id"
    assert response.headers["x-request-id"] not in ("", given)


def test_a_request_without_an_id_gets_one(client: Client) -> None:
    for headers in ({}, {"X-Request-Id": ""}):
        response = client.request("POST", URL, json={"duration_s": 0.1}, headers=headers)
        assert response.headers["x-request-id"] == client.service.requests[-1].request_id != ""


@pytest.mark.parametrize(
    ("given", "is_kept"),
    [
        ("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", True),
        ("00-00000000000000000000000000000000-b7ad6b7169203331-01", False),
        ("ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", False),
        ("nonsense", False),
    ],
)
def test_trace_parent(client: Client, given: str, is_kept: bool) -> None:
    client.request("POST", URL, json={"duration_s": 0.1}, headers={"traceparent": given})
    assert client.service.requests[0].trace_parent == (given if is_kept else None)


@pytest.mark.parametrize(
    ("format", "subtype"),
    [("WAV", "PCM_16"), ("WAV", "FLOAT"), ("FLAC", None), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", None),
     ("AIFF", None), ("RF64", "PCM_16")],
)  # fmt: skip
def test_recordings_of_any_kind(client: Client, format: str, subtype: str | None) -> None:
    content = audio_file(format, subtype)
    response = form(client, {"duration_s": "0.1"}, {"melody": ("x.txt", content, "text/plain")})
    assert response.status_code == 200, response.text
    assert client.service.requests[0].melody == content


def wav_that_lies(seconds: int) -> bytes:
    content = bytearray(audio_file("RF64", "PCM_16", 0.02))
    at = content.index(b"ds64")
    content[at + 16 : at + 24] = (seconds * 32000).to_bytes(8, "little")
    content[at + 24 : at + 32] = (seconds * 16000).to_bytes(8, "little")
    return bytes(content)


def flac_that_lies(seconds: int) -> bytes:
    content = bytearray(audio_file("FLAC", None, 0.02))
    content[22:26] = (seconds * 16000).to_bytes(4, "big")
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 400),
        (b"\x00" * 1000, 400),
        (b"RIFF", 400),
        (b"RIFF\x00\x00\x00\x00WAVE", 400),
        (b"RIFF\x24\x00\x00\x00AVI LIST" + b"\x00" * 100, 400),
        (b"fLaC" + b"\x00" * 100, 400),
        (b"OggS" + b"\xff" * 100, 400),
        (b"ID3\x04\x00\x00\x00\x00\x0f\x76" + b"\x00" * 2000, 400),
        (b"<html>", 400),
        (b"\x89PNG\r\n\x1a\n" + b"\x00" * 50, 400),
        (audio_file("WAV", "PCM_16", 0.0), 400),
        (audio_file("WAV", "PCM_16", 0.01, 9), 400),
        (audio_file("CAF", "PCM_16"), 400),
        (audio_file("AU", "PCM_16"), 400),
        (flac_that_lies(36000), 400),
        (audio_file("FLAC", None, 601.0)[:100_000], 400),
        (audio_file("WAV", "PCM_16", 7.0), 413),
    ],
    ids=range(17),
)
@pytest.mark.parametrize("field", ["melody", "prompt_audio"])
def test_what_is_no_recording(client: Client, content: bytes, status: int, field: str) -> None:
    responses = [
        form(client, {}, {field: ("song.wav", content, "audio/wav")}),
        client.request("POST", URL, json={field: base64.b64encode(content).decode()}),
    ]
    for response in responses:
        assert response.status_code == status, response.text
        assert response.json()["error"]["param"] == field
    assert client.service.requests == []


def test_damaged_recordings_never_fail_the_service(client: Client) -> None:
    rng = random.Random(5)
    whole = [audio_file(*kind) for kind in (("WAV", "PCM_16"), ("FLAC",), ("OGG", "VORBIS"), ("AIFF",))]
    for number in range(80):
        content = bytearray(rng.choice(whole))
        for _ in range(rng.randint(1, 6)):
            content[rng.randrange(min(len(content), 120))] = rng.randrange(256)
        content = content[: rng.randrange(1, len(content))] if number % 3 == 0 else content
        response = form(client, {"duration_s": "0.01"}, {"melody": ("x", bytes(content))})
        assert response.status_code in (200, 400), response.text


@pytest.mark.parametrize(
    ("fields", "files", "param"),
    [
        ({"tempo": "3"}, None, "tempo"),
        ({"duration_s": "nan"}, None, "duration_s"),
        ({"duration_s": "inf"}, None, "duration_s"),
        ({"duration_s": ""}, None, "duration_s"),
        ({"duration_s": ["1", "2"]}, None, "duration_s"),
        ({"stream": "perhaps"}, None, "stream"),
        ({}, {"prompt": ("x.txt", b"text")}, "prompt"),
        ({}, [("melody", ("a", b"RIFF")), ("melody", ("b", b"RIFF"))], "melody"),
        ({"melody": "a.wav"}, None, "melody"),
    ],
    ids=str,
)
def test_wrong_forms(client: Client, fields: Any, files: Any, param: str) -> None:
    response = form(client, fields, files)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("multipart/form-data", b""),
        ("multipart/form-data; boundary=", b"--\r\n"),
        ("multipart/form-data; boundary=b", b""),
        ("multipart/form-data; boundary=b", b"garbage"),
        ("multipart/form-data; boundary=b", b"--b\r\n\r\nx\r\n--b--"),
        ("multipart/form-data; boundary=b", b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nx'),
        ("multipart/form-data; boundary=b; charset=klingon",
         b'--b\r\nContent-Disposition: form-data; name="seed"\r\n\r\n\xff\r\n--b--'),
        ("multipart/form-data; boundary=" + "b" * 5000, b"--b"),
        ("multipart/form-data; boundary=b", b"--b\r\nContent-Disposition\r\n: x\r\n\r\n"),
        ("multipart/form-data; boundary=b", b"".join(
            b'--b\r\nContent-Disposition: form-data; name="f%d"\r\n\r\nx\r\n' % i for i in range(300)) + b"--b--"),
    ],
    ids=range(10),
)  # fmt: skip
def test_broken_forms(client: Client, kind: str, body: bytes) -> None:
    response = client.request("POST", URL, content=body, headers={"Content-Type": kind})
    assert response.status_code in (200, 400), response.text
    if response.status_code == 400:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_status_and_cancel(client: Client) -> None:
    client.request("POST", URL, json={"duration_s": 0.1}, headers={"X-Request-Id": "mine"})
    expected = {"id": "mine", "object": "music.generation", "model": "demo", "status": "running", "audio_s": 10.0,
                "done_s": 2.5, "age_s": 3.0, "error": None}  # fmt: skip
    assert client.request("GET", f"{URL}/mine").json() == expected
    assert client.request("DELETE", f"{URL}/mine").json() == {**expected, "status": "cancelled"}
    assert client.service.cancelled == ["mine"]
    assert client.request("DELETE", f"{URL}/another").status_code == 404


def test_models(client: Client) -> None:
    listed = client.request("GET", "/v1/models").json()
    assert listed["object"] == "list"
    assert listed["data"][1] == {
        "id": "stereo", "object": "model", "license": "CC-BY-NC 4.0", "sample_rate": 32000, "channels": 2,
        "melody": False, "max_duration_s": 120.0, "window_s": 30.0, "weights": "int8"}  # fmt: skip
    assert client.request("GET", "/v1/models/stereo").json() == listed["data"][1]
    assert client.request("GET", "/v1/models/other").status_code == 404


def test_health(service: FakeService) -> None:
    client = Client(service)
    assert client.request("GET", "/healthz").json() == {"status": "ok"}
    assert client.request("GET", "/readyz").json() == {
        "ready": True, "details": {"demo/language_model": "ready"}}  # fmt: skip
    service.ready = False
    response = client.request("GET", "/readyz")
    assert response.status_code == 503
    assert response.json()["details"] == {"demo/language_model": "warming"}
    assert response.json()["error"]["code"] == "overloaded"
    assert int(response.headers["retry-after"]) >= 1


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics"])
def test_probes_may_ask_for_the_head_alone(client: Client, path: str) -> None:
    assert client.request("HEAD", path).status_code == 200


def test_metrics(client: Client) -> None:
    response = client.request("GET", "/metrics")
    assert response.text == "musicgen_requests_total 3\n"
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"


@pytest.mark.parametrize(
    ("name", "is_internal"),
    [
        ("X-Request-Timeout-Seconds", True),
        ("x-request-disconnect-disabled", True),
        ("serve_multiplexed_model_id", True),
        ("Serve-Multiplexed-Model-Id", True),
        ("x-session-id", True),
        ("X-Serve-Router-Target", True),
        ("x-request-id", False),
        ("x-api-key", False),
        ("server", False),
        ("traceparent", False),
    ],
)
def test_internal_headers(name: str, is_internal: bool) -> None:
    assert is_internal_header(name) == is_internal
    seen: list[bytes] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.extend(key for key, _ in scope["headers"])

    scope = {"type": "http", "headers": [(name.lower().encode(), b"1"), (b"accept", b"*/*")]}
    asyncio.run(EdgeMiddleware(app, LimitSettings)(scope, None, None))  # type: ignore[arg-type]
    assert seen == [b"accept"] if is_internal else [name.lower().encode(), b"accept"]
