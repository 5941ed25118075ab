"""Every format, decoded back and compared sample for sample: whole, streamed, as events."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from musicgen_serving.audio_formats import file_rate, stream_encoder
from musicgen_serving.http_api.openapi import EXPOSED_HEADERS
from serving.http_api.conftest import Client
from serving.http_api.fakes import RATE, checksum, samples_of

from musicgen.audio_encode import encode_audio, generation_metadata
from musicgen.loudness import measure_loudness

NUM_SAMPLES = RATE // 2
TYPES = {
    "wav": "audio/wav",
    "flac": "audio/flac",
    "mp3": "audio/mpeg",
    "ogg": "audio/ogg",
    "opus": "audio/ogg; codecs=opus",
    "pcm16": "audio/pcm; encoding=s16le; rate=32000; channels=1",
    "f32": "audio/pcm; encoding=f32le; rate=32000; channels=1",
}


def events_of(text: str) -> list[dict[str, Any]]:
    events = []
    for block in text.split("\n\n")[:-1]:
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        events.append(event)
    return events


def check_same(ours: np.ndarray[Any, Any], whole: np.ndarray[Any, Any], format: str) -> None:
    """Equal; of opus, which is resampled in parts, −40 dB may differ."""
    assert ours.shape == whole.shape
    allowed = 1e-2 if format == "opus" else 0.0
    assert np.linalg.norm(ours - whole) <= allowed * np.linalg.norm(whole)


def decoded(content: bytes, format: str, dtype: str = "int16", channels: int = 1) -> np.ndarray[Any, Any]:
    if format in ("pcm16", "f32"):
        return np.frombuffer(content, "<i2" if format == "pcm16" else "<f4").reshape(-1, channels)
    return soundfile.read(io.BytesIO(content), dtype=dtype, always_2d=True)[0]


@pytest.mark.parametrize("format", TYPES)
def test_whole_piece_is_what_the_library_writes(client: Client, format: str) -> None:
    response = client.post(response_format=format)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == TYPES[format]
    assert int(response.headers["content-length"]) == len(response.content)
    samples = samples_of(7, NUM_SAMPLES)
    if format == "f32":
        assert response.content == samples.numpy().astype("<f4").tobytes()
        assert hashlib.sha256(response.content).hexdigest() == response.headers["x-checksum"]
    elif format == "pcm16":
        wav = encode_audio(samples, RATE, "wav")
        assert response.content == wav[-len(response.content) :]
        assert len(response.content) == NUM_SAMPLES * 2
    else:
        tags = generation_metadata("demo", 7, license="MIT")
        expected = encode_audio(samples, RATE, format, metadata=tags)
        assert np.array_equal(decoded(response.content, format), decoded(expected, format))
        with soundfile.SoundFile(io.BytesIO(response.content)) as file:
            assert str(file.samplerate) == response.headers["x-sample-rate"]
            if format != "mp3":  # libsndfile writes an mp3's tags but reads another version of them
                assert "Machine-made music; model: demo; seed: 7" in file.comment
    assert response.headers["x-seed"] == "7"
    assert response.headers["x-checksum"] == checksum(samples)
    assert response.headers["x-num-samples"] == str(NUM_SAMPLES)
    assert response.headers["x-billed-seconds"] == "0.5"
    ours = {name for name in response.headers if name.startswith("x-")}
    documented = {name.lower() for name in EXPOSED_HEADERS}
    assert ours <= documented, "a page of another origin cannot read it"


@pytest.mark.parametrize("model", ["demo", "stereo"])
@pytest.mark.parametrize("format", TYPES)
def test_streamed_is_whole(client: Client, format: str, model: str) -> None:
    options = {"response_format": format, "model": model, "duration_s": 2.6, "seed": 11}
    whole, streamed = client.post(**options), client.post(**options, stream=True)
    assert streamed.status_code == 200, streamed.text
    assert "content-length" not in streamed.headers
    for name in ("content-type", "x-sample-rate", "x-channels", "x-num-samples", "x-first-sample"):
        assert streamed.headers[name] == whole.headers[name]
    channels = 2 if model == "stereo" else 1
    ours = decoded(streamed.content, format, "float32", channels)
    check_same(ours, decoded(whole.content, format, "float32", channels), format)
    assert len(ours) == round(2.6 * int(streamed.headers["x-sample-rate"]))
    if format in ("wav", "pcm16", "f32"):  # flac and mp3 begin with checksums of all, Ogg with a random serial number
        assert streamed.content == whole.content


def test_several_chunks_were_streamed(client: Client) -> None:
    client.post(stream=True, response_format="pcm16")
    assert client.service.num_chunks == -(-NUM_SAMPLES // client.service.chunk)
    assert client.service.requests[-1].chunks is not None


@pytest.mark.parametrize("step", [1, 999, 4096, 70000])
@pytest.mark.parametrize("format", TYPES)
def test_a_stream_does_not_depend_on_its_chunks(format: str, step: int) -> None:
    num_samples = 2000 if step == 1 else 140_000
    samples = samples_of(1, num_samples)
    tags = generation_metadata("demo", 1)
    encoder = stream_encoder(format, RATE, 1, num_samples, tags)
    parts = [encoder.encode(samples[:, start : start + step]) for start in range(0, num_samples, step)]
    content = b"".join([*parts, encoder.finish()])
    if format in ("pcm16", "f32"):
        return_value = stream_encoder(format, RATE, 1, num_samples, tags).encode(samples)
        assert content == return_value
    else:
        whole = encode_audio(samples, RATE, format, metadata=tags)
        check_same(decoded(content, format, "float32"), decoded(whole, format, "float32"), format)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("format", ["mp3", "opus"])
def test_little_is_held_back(format: str, channels: int) -> None:
    encoder = stream_encoder(format, RATE, channels, 10 * RATE, generation_metadata("demo", 1))
    content = b""
    for step, samples in enumerate(torch.split(samples_of(1, 2 * RATE, channels), RATE // 50, dim=-1)):
        content += encoder.encode(samples)
        given_s = (step + 1) / 50
        if step in (24, 49, 99):
            heard = decoded(content, format, channels=channels)
            assert given_s - len(heard) / file_rate(format, RATE) < 0.15


@pytest.mark.parametrize("format", ["pcm16", "f32"])
def test_events_carry_the_same_samples(client: Client, format: str) -> None:
    options = {"response_format": format, "prompt": ["a", "b"], "num_samples": 2}
    response = client.post(**options, stream_format="sse")
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    events = events_of(response.text)
    assert events[0]["type"] == "music.generation.started"
    assert events[0]["seeds"] == [7, 8, 9, 10]
    assert events[0]["num_samples"] == NUM_SAMPLES
    pieces = [b"", b"", b"", b""]
    size = 2 if format == "pcm16" else 4
    for event in events[1:-1]:
        assert event["type"] == "music.audio.delta"
        assert event["sample_offset"] == len(pieces[event["piece"]]) // size
        pieces[event["piece"]] += base64.b64decode(event["audio"])
    progress = [event["progress"] for event in events[1:-1]]
    assert progress == sorted(progress)
    assert progress[-1] == 1.0
    end = events[-1]
    assert end["type"] == "music.generation.done"
    assert end["finish_reason"] == "finished"
    assert end["error"] is None
    assert end["usage"]["billed_s"] == 2.0
    for index, piece in enumerate(end["pieces"]):
        whole = client.post(response_format=format, seed=7 + index)
        assert pieces[index] == whole.content
        assert piece["seed"] == 7 + index
        assert piece["checksum"] == checksum(samples_of(7 + index, NUM_SAMPLES))
        assert piece["audio_checksum"] == hashlib.sha256(pieces[index]).hexdigest()
        assert (piece["queue_s"], piece["prefill_s"], piece["decode_s"]) == (0.1, 0.2, 0.3)


def test_events_are_pcm16_by_default_and_never_files(client: Client) -> None:
    assert events_of(client.post(stream_format="sse").text)[0]["response_format"] == "pcm16"
    assert client.post(stream_format="sse", response_format="wav").status_code == 400


@pytest.mark.parametrize("options", [{"prompt": ["a", "b"]}, {"num_samples": 2}])
def test_several_pieces_come_as_json(client: Client, options: dict[str, Any]) -> None:
    result = client.post(**options, response_format="flac").json()
    assert [piece["seed"] for piece in result["data"]] == [7, 8]
    for piece in result["data"]:
        content = base64.b64decode(piece["audio"])
        assert hashlib.sha256(content).hexdigest() == piece["audio_checksum"]
        samples = samples_of(piece["seed"], NUM_SAMPLES)
        assert piece["checksum"] == checksum(samples)
        assert np.array_equal(decoded(content, "flac"), decoded(encode_audio(samples, RATE, "flac"), "flac"))
    assert result["usage"]["billed_s"] == 1.0
    assert result["usage"]["num_frames"] == 100
    assert client.post(**options, stream=True).json()["error"]["param"] == "stream"


def test_one_piece_as_json_on_request(client: Client) -> None:
    response = client.request(
        "POST", "/v1/music/generations", json={"duration_s": 0.1}, headers={"Accept": "text/html, application/json;q=1"}
    )
    assert len(response.json()["data"]) == 1
    assert response.json()["id"] == response.headers["x-request-id"]


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("audio/wav, application/json", "application/json"),
        ("audio/wav, application/json;q=0", "audio/wav"),
        ("audio/flac, application/json;q=0.5", "audio/flac"),
        ("audio/flac;q=0.2, application/json; Q=0.5", "application/json"),
        ("audio/flac;q=0, audio/mpeg;q=0.1, */*;q=0.1", "audio/mpeg"),
        ("audio/*", "audio/wav"),
        ("text/html;q=abc, ;;, audio/ogg", "audio/ogg"),
    ],
)
def test_what_the_client_accepts_decides(client: Client, accept: str, kind: str) -> None:
    def kind_of(**fields: Any) -> str:
        body = {"duration_s": 0.1, **fields}
        response = client.request("POST", "/v1/music/generations", json=body, headers={"Accept": accept})
        return str(response.headers["content-type"])

    assert kind_of() == kind
    if kind != "application/json":
        assert kind_of(response_format="mp3") == "audio/mpeg", "what the body says goes first"


@pytest.mark.parametrize("format", ["wav", "pcm16", "f32", "flac"])
def test_the_rest_of_a_broken_stream(client: Client, format: str) -> None:
    whole = client.post(response_format=format)
    rest = client.post(response_format=format, stream=True, first_sample=6001)
    assert rest.headers["x-first-sample"] == "6001"
    assert np.array_equal(decoded(rest.content, format), decoded(whole.content, format)[6001:])
    beyond = client.post(response_format=format, stream=True, first_sample=NUM_SAMPLES)
    assert beyond.status_code == 400
    assert beyond.json()["error"]["param"] == "first_sample"


@pytest.mark.parametrize("format", ["mp3", "ogg", "opus"])
def test_the_rest_in_a_lossy_format_is_a_file_of_its_own(client: Client, format: str) -> None:
    rest = client.post(response_format=format, stream=True, first_sample=6001)
    assert (rest.headers["x-first-sample"], rest.headers["x-num-samples"]) == ("6001", str(NUM_SAMPLES))
    alone = encode_audio(samples_of(7, NUM_SAMPLES)[:, 6001:], RATE, format)
    check_same(decoded(rest.content, format, "float32"), decoded(alone, format, "float32"), format)


def test_loudness(client: Client) -> None:
    response = client.post(response_format="f32", loudness=-20, duration_s=2.0)
    samples = torch.from_numpy(np.frombuffer(response.content, "<f4").copy())[None]
    measured = measure_loudness(samples, RATE)
    assert measured is not None
    assert abs(measured + 20) < 0.1
    for options in ({"stream": True}, {"stream_format": "sse"}, {"first_sample": 5}):
        refused = client.post(loudness=-20, **options)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "loudness"


@pytest.mark.parametrize("stream", [False, True])
def test_a_file_names_the_sampling_that_is_not_the_default(client: Client, stream: bool) -> None:
    response = client.post(response_format="flac", stream=stream, temperature=0.5, top_k=250)
    with soundfile.SoundFile(io.BytesIO(response.content)) as file:
        assert file.comment.startswith("Machine-made music; model: demo; seed: 7; temperature: 0.5; licence")
