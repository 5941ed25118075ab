"""The service on a cluster: what it gives equals the API in this process, and it can be asked about itself."""

from __future__ import annotations

import base64
import io
import itertools
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import httpx2
import numpy as np
import pytest
import ray
import soundfile
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from musicgen_serving.app import actor_options
from musicgen_serving.client import Chunk, connect
from musicgen_serving.errors import NotFoundError
from musicgen_serving.proto.musicgen.v1 import music_service_pb2 as pb
from musicgen_serving.proto.musicgen.v1.music_service_pb2_grpc import MusicServiceStub
from musicgen_serving.settings import ReplicaSettings
from musicgen_serving.tenancy import hash_key
from serving.cluster.conftest import DURATION_S, PROMPT, SEED, Running

from musicgen.audio_encode import encode_audio
from musicgen.errors import RequestCancelledError

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's: what it warns of is not ours
GENERATIONS = "/v1/music/generations"
LOSSLESS = ("wav", "flac", "pcm16", "f32")
GRPC_FORMATS = {
    "wav": pb.AUDIO_FORMAT_WAV,
    "flac": pb.AUDIO_FORMAT_FLAC,
    "pcm16": pb.AUDIO_FORMAT_PCM16LE,
    "f32": pb.AUDIO_FORMAT_F32LE,
}
SPEC = pb.GenerationSpec(prompts=[PROMPT], seed=SEED, duration_s=DURATION_S)


def decoded(content: bytes, format: str) -> np.ndarray[Any, Any]:
    if format in ("pcm16", "f32"):
        return np.frombuffer(content, "<i2" if format == "pcm16" else "<f4")
    return soundfile.read(io.BytesIO(content), dtype="int16")[0]


def expected(wanted: torch.Tensor, format: str) -> np.ndarray[Any, Any]:
    """The API's samples as the library's own file of the format holds them (a flac rounds otherwise than a wav)."""
    if format == "f32":
        return wanted[0].numpy()
    kind = "flac" if format == "flac" else "wav"
    return decoded(encode_audio(wanted, 32000, kind), kind)


@pytest.mark.parametrize("format", LOSSLESS)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_http_gives_the_samples_of_the_api(service: Running, wanted: torch.Tensor, format: str, stream: bool) -> None:
    body = {"prompt": PROMPT, "seed": SEED, "duration_s": DURATION_S, "response_format": format, "stream": stream}
    response = httpx2.post(service.endpoints.http + GENERATIONS, json=body, timeout=60)
    assert response.status_code == 200, response.text
    assert np.array_equal(decoded(response.content, format), expected(wanted, format))


@pytest.mark.parametrize("format", LOSSLESS)
def test_grpc_gives_the_samples_of_the_api(service: Running, wanted: torch.Tensor, format: str) -> None:
    request = pb.GenerateRequest(spec=SPEC, audio_format=GRPC_FORMATS[format])
    with grpc.insecure_channel(str(service.endpoints.grpc).removeprefix("grpc://")) as channel:
        answer = MusicServiceStub(channel).Generate(request, timeout=60)
    assert np.array_equal(decoded(answer.pieces[0].audio, format), expected(wanted, format))


@pytest.mark.parametrize("format", ["pcm16", "f32"])
def test_grpc_streams_the_samples_of_the_api(service: Running, wanted: torch.Tensor, format: str) -> None:
    request = pb.StreamGenerateRequest(spec=SPEC, audio_format=GRPC_FORMATS[format])
    with grpc.insecure_channel(str(service.endpoints.grpc).removeprefix("grpc://")) as channel:
        answers = list(MusicServiceStub(channel).StreamGenerate(request, timeout=60))
    content = b"".join(answer.audio.audio for answer in answers if answer.WhichOneof("event") == "audio")
    assert np.array_equal(decoded(content, format), expected(wanted, format))
    assert sum(answer.WhichOneof("event") == "audio" for answer in answers) > 3


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_melody_sounds_the_same_over_both(service: Running, protocol: str, wanted: torch.Tensor) -> None:
    melody = encode_audio(wanted, 32000, "wav")
    options: dict[str, Any] = {"melody": melody, "seed": SEED, "duration_s": 2.0}
    with connect(service.url(protocol)) as client, connect(service.endpoints.http) as other:
        streamed, whole = client.stream(PROMPT, **options).read(), other.generate(PROMPT, **options)
    assert np.array_equal(streamed.samples, whole.samples)
    assert not np.array_equal(streamed.samples[0], wanted[0, : streamed.samples.shape[-1]].numpy())


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_request_can_be_watched_and_cancelled(service: Running, protocol: str) -> None:
    service.inside.delay("lm.step=0.02")
    with connect(service.url(protocol)) as client:
        stream = client.stream(PROMPT, duration_s=60, request_id=f"watched-{protocol}")
        chunks = iter(stream)
        assert isinstance(next(chunks), Chunk)
        assert client.status(f"watched-{protocol}").state == "running"
        client.cancel(f"watched-{protocol}")
        with pytest.raises(RequestCancelledError):
            list(chunks)
        assert client.status(f"watched-{protocol}").state == "cancelled"
        with pytest.raises(NotFoundError):
            client.status("no-such-request")
    lines = [json.loads(line) for line in service.usage_file.read_text().splitlines()]
    (mine,) = (line for line in lines if line["request_id"] == f"watched-{protocol}")
    assert mine["reason"] == "cancelled"


def test_what_a_part_refuses_is_no_failure_in_its_log(service: Running) -> None:
    """The chroma extractor, the codec, the gatekeeper."""
    broken = base64.b64encode(b"fLaC" + bytes(400)).decode()
    bodies = [{"prompt": PROMPT, "melody": broken}, {"prompt": PROMPT, "prompt_audio": broken}]
    before = num_tracebacks()
    answers = [httpx2.post(service.endpoints.http + GENERATIONS, json=body, timeout=30) for body in bodies]
    answers.append(httpx2.get(f"{service.endpoints.http}{GENERATIONS}/no-such-request", timeout=30))
    assert [answer.status_code for answer in answers] == [400, 400, 404], [answer.text for answer in answers]
    assert num_tracebacks() == before


def num_tracebacks() -> int:
    """In whatever any process of the cluster has written so far."""
    folder = Path(ray._private.worker.global_worker.node.get_logs_dir_path())
    return sum(path.read_text(errors="replace").count("Traceback") for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_the_models_are_listed(service: Running, protocol: str) -> None:
    with connect(service.url(protocol)) as client:
        (model,) = client.models()
    assert (model.name, model.sample_rate, model.channels, model.melody) == ("demo", 32000, 1, True)


def test_health_readiness_and_metrics(service: Running) -> None:
    http = service.endpoints.http
    assert httpx2.get(http + "/healthz").status_code == 200
    ready = httpx2.get(http + "/readyz", timeout=10)
    assert (ready.status_code, ready.json()["ready"]) == (200, True)
    with grpc.insecure_channel(str(service.endpoints.grpc).removeprefix("grpc://")) as channel:
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
    assert health.status == health_pb2.HealthCheckResponse.SERVING
    names = ("musicgen_requests_finished", "musicgen_kv_pages_used", "musicgen_time_to_first_audio_seconds")
    text = shown_metrics(service, lambda text: all(name in text for name in names))
    assert PROMPT not in text


def test_tenants_change_while_the_service_runs(service: Running) -> None:
    url = service.endpoints.http + "/v1/models"

    def models(key: str | None) -> int | None:
        """How many of them a key may use; None: it is refused."""
        answer = httpx2.get(url, headers={} if key is None else {"X-API-Key": key}, timeout=10)
        return None if answer.status_code == 401 else len(answer.json()["data"])

    try:
        listed = [{"name": "a", "key_sha256": [hash_key("key-1")], "models": ["none"]}]
        service.tenants_file.write_text(json.dumps(listed))
        keys = (
            f"never the same {number}" for number in itertools.count()
        )  # as long as there are no keys, any is taken
        until(lambda: models(next(keys)) is None, 15)
        assert (models("key-1"), models(None)) == (0, 1)
        service.tenants_file.write_text("none")
        shown_metrics(service, lambda text: re.search(r"^musicgen_tenants_stale\S* 1", text, re.MULTILINE) is not None)
        assert models("key-1") == 0
    finally:
        service.tenants_file.write_text("[]")


def shown_metrics(service: Running, condition: Callable[[str], bool]) -> str:
    """The metrics, once the condition holds for them: the node's agent is told of them every few seconds."""
    texts = [""]

    def holds() -> bool:
        texts.append(httpx2.get(service.endpoints.http + "/metrics", timeout=10).text)
        return condition(texts[-1])

    until(holds, 30)
    return texts[-1]


def until(condition: Callable[[], bool], seconds: float) -> None:
    """Wait until it holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(1)


@ray.remote
def visible_gpus() -> str | None:
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def test_a_replica_that_books_no_gpu_sees_none(service: Running) -> None:
    assert ray.get(visible_gpus.options(**actor_options(ReplicaSettings())).remote()) == ""
