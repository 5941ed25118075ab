"""The client over both protocols: the same audio, errors and endings; streams that survive cut connections."""

from __future__ import annotations

import hashlib
import io
import logging
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from musicgen_serving.client import BrokenAnswerError, ConnectionLostError, Retries, Tls, connect
from musicgen_serving.client.base import Client
from musicgen_serving.client.types import Chunk, Report, Start, to_bytes
from musicgen_serving.errors import (
    ConflictError,
    DeadlineExceededError,
    NotFoundError,
    NotOfferedError,
    SupersededError,
    TooLargeError,
    UnauthenticatedError,
)
from musicgen_serving.settings import LimitSettings
from serving.client.running import Cuts, running
from serving.fake_service import API_KEY, FakeService, tone

from musicgen.errors import (
    DeadlineTooShortError,
    InvalidRequestError,
    MusicGenError,
    OverloadedError,
    QuotaExceededError,
    RequestCancelledError,
)

BOTH = pytest.mark.parametrize("protocol", ["http", "grpc"])
QUICK = Retries(max_attempts=4, first_backoff_s=0.01, max_backoff_s=0.02, max_wait_s=0.5)
ONCE = Retries(max_attempts=1)


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Failures that are meant are not logged; the level is put back afterwards."""
    caplog.set_level(logging.CRITICAL, logger="musicgen_serving")


@BOTH
@pytest.mark.parametrize("channels", [1, 2])
def test_whole_and_streamed_pieces_are_what_was_made(protocol: str, channels: int) -> None:
    service = FakeService(channels=channels)
    with running(service) as there, connect(there.url(protocol)) as client:
        whole = client.generate("happy rock", duration_s=1.0, seed=7, model="demo", request_id="mine")
        stream = client.stream("happy rock", duration_s=1.0, seed=7)
        chunks = list(stream)
    expected = tone(7, 32000, channels).numpy()
    np.testing.assert_array_equal(whole.samples, expected)
    np.testing.assert_array_equal(np.concatenate([chunk.samples for chunk in chunks], axis=-1), expected)
    assert [chunk.sample_offset for chunk in chunks] == [0, 8000, 16000, 24000]
    assert (whole.sample_rate, whole.seed, whole.model, whole.request_id) == (32000, 7, "demo", "mine")
    assert stream.start is not None
    assert (stream.start.seed, stream.start.channels, stream.start.num_samples) == (7, channels, 32000)
    for report in (whole.report, stream.report):
        assert report is not None
        assert (report.num_samples, report.num_frames, report.billed_s) == (32000, 50, 1.0)
        assert (report.queue_s, report.prefill_s, report.decode_s, report.num_failovers) == (0.1, 0.2, 0.3, 1)
        assert report.checksum == hashlib.sha256(to_bytes(whole.samples)).hexdigest()


@BOTH
def test_all_fields_arrive(protocol: str) -> None:
    service = FakeService()
    recording = io.BytesIO()
    soundfile.write(recording, np.zeros(3200, np.float32), 32000, format="WAV")
    content = recording.getvalue()
    with running(service) as there, connect(there.url(protocol)) as client:
        for files in ({}, {"melody": content, "prompt_audio": content, "stems": True, "melody_guidance": 4.0}):
            client.stream(
                "words", model="demo", duration_s=2.0, seed=5, temperature=0.5, top_k=0, top_p=0.9, greedy=True,
                guidance_scale=2.0, extend_stride_s=9.0, idempotency_key="once", **files,
            ).read()  # fmt: skip
        client.generate(duration_s=1.0)
    without, full, empty = service.requests
    for request in (without, full):
        assert [(piece.prompt, piece.seed) for piece in request.pieces] == [("words", 5)]
        assert (request.duration_s, request.extend_stride_s, request.idempotency_key) == (2.0, 9.0, "once")
        sampling = request.sampling
        assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.greedy) == (0.5, 0, 0.9, True)
        assert (sampling.guidance_scale, sampling.melody_guidance) == (2.0, 4.0 if request is full else None)
        assert request.chunks is not None
    assert (without.melody, without.prompt_audio, without.stems) == (None, None, False)
    assert (full.melody, full.prompt_audio, full.stems) == (content, content, True)
    assert empty.pieces[0].prompt is None
    assert (empty.sampling.top_k, empty.sampling.temperature, empty.chunks) == (250, 1.0, None)
    assert empty.idempotency_key


@BOTH
def test_recordings_may_be_local_files(protocol: str, tmp_path: Path) -> None:
    service, path = FakeService(), tmp_path / "tune.wav"
    soundfile.write(path, np.zeros(3200, np.float32), 32000)
    with running(service) as there, connect(there.url(protocol)) as client:
        client.generate("x", duration_s=1.0, melody=str(path), prompt_audio=path)
        with pytest.raises(InvalidRequestError, match=r"gone\.wav \(No such file") as failure:
            client.generate("x", melody="gone.wav")
    (request,) = service.requests
    assert request.melody == request.prompt_audio == path.read_bytes()
    assert failure.value.param == "melody"


@BOTH
def test_models_status_cancel_and_keys(protocol: str) -> None:
    service = FakeService(keys=(API_KEY,))
    with running(service) as there:
        with connect(there.url(protocol), API_KEY) as client:
            client.generate("x", duration_s=1.0, request_id="mine")
            (model,) = client.models()
            assert (model.name, model.license, model.melody, model.window_s) == ("demo", "MIT", True, 30.0)
            status = client.status("mine")
            assert (status.state, status.audio_s, status.done_s, status.error) == ("running", 1.0, 0.5, None)
            assert client.cancel("mine").state == "cancelled"
            with pytest.raises(NotFoundError):
                client.status("other")
        with connect(there.url(protocol)) as client, pytest.raises(UnauthenticatedError):
            client.models()
    assert service.cancelled == ["mine"]


ERRORS = [
    InvalidRequestError("an integer", "'x'", "write one", param="top_k"),
    TooLargeError("expected less, got more"),
    NotOfferedError("stems: not here", param="stems"),
    UnauthenticatedError("expected a key"),
    InvalidRequestError("fewer words", "more", param="prompt"),
    InvalidRequestError("a melody", "", param="melody"),
    NotFoundError("expected a served model", param="model"),
    ConflictError("expected a new id"),
    QuotaExceededError("used up", retry_after_s=12.0),
    RequestCancelledError("cancelled by somebody"),
    SupersededError("a retry took over"),
    DeadlineExceededError("too late"),
    DeadlineTooShortError("never by then"),
    OverloadedError("later, please", retry_after_s=3.0),
]


@BOTH
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_errors_are_the_projects_own(protocol: str, error: MusicGenError) -> None:
    service = FakeService(refusal=error)
    with running(service) as there, connect(there.url(protocol), retries=QUICK) as client:
        for call in (client.generate, lambda prompt: client.stream(prompt).read()):
            with pytest.raises(type(error)) as failure:
                call("x")
            assert str(failure.value) == str(error)
            for name in ("param", "retry_after_s", "expected", "got", "hint"):
                assert getattr(failure.value, name, None) == getattr(error, name, None)
    assert len(service.requests) == 2  # no error of these is tried again so soon


@BOTH
def test_a_failure_in_the_middle_ends_the_stream(protocol: str) -> None:
    service = FakeService(failure=DeadlineExceededError("too late"), num_chunks_before_failure=2)
    with running(service) as there, connect(there.url(protocol), retries=QUICK) as client:
        stream = client.stream("x", duration_s=1.0)
        chunks = iter(stream)
        for _ in range(2):
            next(chunks)
        with pytest.raises(DeadlineExceededError, match="too late"):
            next(chunks)
        assert stream.report is None


@BOTH
def test_an_overload_is_waited_out(protocol: str) -> None:
    service = FakeService(refusal=OverloadedError("later", retry_after_s=0.2))
    patient = Retries(max_attempts=20, first_backoff_s=0.05, max_backoff_s=0.1, max_wait_s=2.0)
    with running(service) as there, connect(there.url(protocol), retries=patient) as client:
        stream = iter(client.stream("x", duration_s=1.0))
        threading.Timer(0.5, lambda: setattr(service, "refusal", None)).start()
        start = time.monotonic()
        assert next(stream).sample_offset == 0
        assert time.monotonic() - start >= 0.4
    assert len(service.requests) <= 5  # the service's own pause was kept


@BOTH
def test_a_cut_stream_goes_on_where_it_was(protocol: str) -> None:
    service = FakeService(chunk_s=0.1, chunk_delay_s=0.01)
    cuts = Cuts([70_000, 90_000, 50_000])
    with running(service, cuts) as there, connect(there.url(protocol), retries=QUICK) as client:
        stream = client.stream("x", duration_s=5.0, seed=9, request_id="mine")
        generated = stream.read()
    np.testing.assert_array_equal(generated.samples, tone(9, 160_000).numpy())
    assert not cuts.after_bytes
    firsts = [request.first_sample for request in service.requests]
    assert len(firsts) >= 4
    assert firsts == sorted(firsts)
    assert firsts[0] == 0 < firsts[-1]
    assert len({request.request_id for request in service.requests}) == len(firsts)
    assert len({request.fingerprint for request in service.requests}) == 1
    assert generated.report.num_samples == 160_000 - firsts[-1]


@BOTH
def test_a_cut_answer_is_asked_for_again(protocol: str) -> None:
    service = FakeService()
    with running(service, Cuts([50_000])) as there, connect(there.url(protocol), retries=QUICK) as client:
        generated = client.generate("x", duration_s=2.0, seed=9)
    np.testing.assert_array_equal(generated.samples, tone(9, 64_000).numpy())
    assert len(service.requests) == 2
    assert len({request.idempotency_key for request in service.requests}) == 1


@BOTH
def test_attempts_are_bounded(protocol: str) -> None:
    service = FakeService()
    cuts = Cuts([0] * 50)
    with running(service, cuts) as there, connect(there.url(protocol), retries=QUICK) as client:
        with pytest.raises(ConnectionLostError):
            client.stream("x", duration_s=2.0).read()
        assert len(cuts.after_bytes) < 50


@BOTH
def test_nobody_there(protocol: str) -> None:
    nobody = f"{protocol}://127.0.0.1:1"
    with connect(nobody, retries=QUICK) as client, pytest.raises(ConnectionLostError) as error:
        client.generate("x")
    assert str(error.value).startswith(f"{nobody}: no response (")
    assert "Connection refused); is the service running" in str(error.value)


def test_the_port_of_the_other_protocol() -> None:
    with running(FakeService()) as there:
        http, grpc = there.grpc_url.replace("grpc:", "http:"), there.http_url.replace("http:", "grpc:")
        for url, reason, name in ((http, "illegal request line", "HTTP"), (grpc, "Failed parsing HTTP/2", "gRPC")):
            with connect(url, retries=ONCE) as client, pytest.raises(ConnectionLostError) as error:
                client.models()
            hint = f"is the service running, and is this its {name} port?"
            assert str(error.value) == f"{url}: no response ({reason}); {hint}"


@BOTH
def test_a_time_out(protocol: str) -> None:
    with running(FakeService(start_delay_s=60)) as there:
        with connect(there.url(protocol), timeout_s=0.3) as client, pytest.raises(DeadlineExceededError):
            client.generate("x", duration_s=1.0)
        _wait_until_left(there.service)


@BOTH
def test_leaving_a_stream_cancels(protocol: str) -> None:
    service = FakeService(chunk_delay_s=60)
    with running(service) as there, connect(there.url(protocol)) as client:
        with client.stream("x", duration_s=10.0) as stream:
            next(iter(stream))
            assert service.left == 0
        _wait_until_left(service)
        assert service.num_given == 1


def _wait_until_left(service: FakeService) -> None:
    end_at = time.monotonic() + 5
    while service.left < service.entered and time.monotonic() < end_at:
        time.sleep(0.01)
    assert service.left == service.entered == 1


@pytest.mark.parametrize("url", ["ftp://x", "localhost:9000", "grpc://", "grpc://host/path", ""])
def test_urls(url: str) -> None:
    with pytest.raises(InvalidRequestError, match="url"):
        connect(url)


def test_secure_urls_are_secure() -> None:
    with connect("grpcs://127.0.0.1:1", tls=Tls(), retries=ONCE) as client, pytest.raises(ConnectionLostError):
        client.models()


@BOTH
def test_large_limits_are_the_services(protocol: str) -> None:
    service = FakeService(limits=LimitSettings(max_duration_s=1.0))
    with running(service) as there, connect(there.url(protocol)) as client:
        with pytest.raises(InvalidRequestError) as failure:
            client.generate("x", duration_s=2.0)
        assert failure.value.param == "duration_s"


class Scripted(Client):
    """Each attempt plays one list of events; an error in it is raised."""

    def __init__(self, *attempts: list[object]) -> None:
        super().__init__(QUICK)
        self.attempts = list(attempts)
        self.firsts: list[int] = []

    def _events(self, request, first_sample):  # type: ignore[no-untyped-def]
        self.firsts.append(first_sample)
        for event in self.attempts.pop(0):
            if isinstance(event, Exception):
                raise event
            yield event

    cancel = status = models = close = _whole = lambda *_: None  # type: ignore[assignment]


def chunk(first: int, last: int) -> Chunk:
    return Chunk(tone(1, 100).numpy()[:, first:last], first)


def report(first: int, last: int) -> Report:
    checksum = hashlib.sha256(to_bytes(tone(1, 100).numpy()[:, first:last])).hexdigest()
    return Report(last - first, checksum, 1, 0.0, 0.0, 0.0, 0, 1.0)


START = Start("id", "demo", 1, 32000, 1, 100)
LOST = ConnectionLostError("gone")


def test_only_the_report_is_missing() -> None:
    client = Scripted([START, chunk(0, 100), LOST], [START, chunk(99, 100), report(99, 100)])
    np.testing.assert_array_equal(client.stream("x").read().samples, tone(1, 100).numpy())
    assert client.firsts == [0, 99]


@pytest.mark.parametrize(
    "attempts",
    [
        [[START, chunk(0, 60), report(0, 60)]],
        [[START, chunk(0, 50), chunk(60, 100), report(0, 100)]],
        [[START, chunk(0, 100), report(0, 99)]],
        [[START, chunk(0, 60), LOST], [START, chunk(50, 100), report(50, 100)]],
        [[START, chunk(0, 60), LOST], [Start("id", "demo", 2, 32000, 1, 100), chunk(60, 100), report(60, 100)]],
    ],
    ids=["early_end", "gap", "checksum", "wrong_place", "another_piece"],
)
def test_wrong_audio_is_refused(attempts: list[list[object]]) -> None:
    with pytest.raises(BrokenAnswerError):
        Scripted(*attempts).stream("x").read()


def test_progress_renews_the_attempts() -> None:
    cut = [[START, chunk(first, first + 10), LOST] for first in range(0, 90, 10)]
    client = Scripted(*cut, [START, chunk(90, 100), report(90, 100)])
    assert client.stream("x").read().samples.shape == (1, 100)
    assert len(client.firsts) == 10


def test_a_key_that_a_lost_attempt_holds_is_waited_for() -> None:
    conflict = ConflictError("in use")
    client = Scripted([START, chunk(0, 10), LOST], [conflict], [START, chunk(10, 100), report(10, 100)])
    assert client.stream("x").read().samples.shape == (1, 100)
    with pytest.raises(ConflictError):
        Scripted([conflict]).stream("x").read()


@BOTH
def test_the_client_needs_neither_torch_nor_ray(protocol: str) -> None:
    """So that other services can use it without installing them."""
    code = (
        "import sys\n"
        "from musicgen_serving.client import connect\n"
        "with connect(sys.argv[1], api_key=sys.argv[2]) as client:\n"
        "    client.generate('happy rock')\n"
        "    for chunk in client.stream('happy rock'): pass\n"
        "heavy = 'torch', 'ray', 'transformers', 'soundfile', 'pydantic', 'fastapi', 'yaml'\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    with running(FakeService()) as service:
        command = [sys.executable, "-c", code, service.url(protocol), API_KEY]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
