"""`generate_remote` writes the files of the local command over both protocols, and says early what is wrong."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from musicgen_serving.client.command import generate_remote
from musicgen_serving.errors import NotFoundError, NotOfferedError
from serving.client.running import running
from serving.fake_service import FakeService, tone

from musicgen.cli.options import GenerateOptions
from musicgen.cli.parser import parse
from musicgen.errors import InvalidRequestError
from serving import fake_service

BOTH = pytest.mark.parametrize("protocol", ["http", "grpc"])


def options(*words: str, **changes: Any) -> GenerateOptions:
    values = vars(parse(["generate", *words]))
    fields = GenerateOptions.__dataclass_fields__
    return GenerateOptions(**{name: values[name] for name in values if name in fields} | changes)


@BOTH
def test_files_and_report(protocol: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    service = FakeService()
    melody = tmp_path / "tune.wav"
    soundfile.write(melody, np.zeros(3200, np.float32), 32000)
    wanted = options(
        "happy rock", "sad jazz", "--melody", str(melody), "--duration", "2", "--seed", "7", "--batch", "2",
        "--num-samples", "2", "--strategy", "clip", "-o", str(tmp_path / "out"), "--json", "--plot", "--top-k", "0",
    )  # fmt: skip
    with running(service) as there:
        assert generate_remote(wanted, there.url(protocol), None) == 0
    stems = ["happy-rock_tune_seed7", "happy-rock_tune_seed8", "sad-jazz_tune_seed9", "sad-jazz_tune_seed10"]
    for index, stem in enumerate(stems):
        samples, rate = soundfile.read(tmp_path / "out" / f"{stem}.wav", dtype="float32")
        assert rate == 32000
        np.testing.assert_allclose(samples, tone(7 + index, 64000)[0].numpy(), atol=1 / 32768)
        assert (tmp_path / "out" / f"{stem}.png").stat().st_size > 1000
    assert len(service.requests) == 4
    assert all(request.melody == melody.read_bytes() for request in service.requests)
    assert all(request.sampling.top_k == 0 for request in service.requests)
    lines = capsys.readouterr().out.splitlines()
    assert there.url(protocol) in lines[0]
    assert lines[1] == "seed 7 to 10"
    summary = json.loads(lines[-1])
    assert [Path(file["path"]).stem for file in summary["files"]] == stems
    assert summary["license"] == "MIT"
    assert summary["audio_s"] == 8.0


@BOTH
def test_a_refusal_ends_the_command(protocol: str, tmp_path: Path) -> None:
    service = FakeService(refusal=NotOfferedError("stems: not offered"))
    with running(service) as there, pytest.raises(NotOfferedError, match="stems"):
        generate_remote(options("a", "b", "-o", str(tmp_path)), there.url(protocol), None)
    assert list(tmp_path.iterdir()) == []


@BOTH
def test_nothing_is_said_before_the_service_accepts(
    protocol: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with running(FakeService()) as there, pytest.raises(InvalidRequestError, match="duration"):
        generate_remote(options("a", "--duration", "500", "-o", str(tmp_path / "out")), there.url(protocol), None)
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_file_and_stdout(tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    with running(FakeService()) as there:
        for out in (str(tmp_path / "song.flac"), "-"):
            assert generate_remote(options("a", "--duration", "0.5", "-o", out), there.http_url, None) == 0
    assert soundfile.info(tmp_path / "song.flac").frames == 16000
    audio = capsysbinary.readouterr().out.partition(b"RIFF")
    assert soundfile.info(io.BytesIO(b"".join(audio[1:]))).frames == 16000


@BOTH
def test_one_failure_cancels_the_others(protocol: str, tmp_path: Path) -> None:
    service = FakeService(chunk_delay_s=0.05, failure=NotOfferedError("gone"), num_chunks_before_failure=3)
    with running(service) as there, pytest.raises(NotOfferedError, match="gone"):
        generate_remote(options("a", "b", "--duration", "60", "-o", str(tmp_path)), there.url(protocol), None)
    assert service.left == service.entered


def test_what_can_be_known_is_said_before_the_work(tmp_path: Path) -> None:
    nobody = "grpc://127.0.0.1:1"
    with pytest.raises(InvalidRequestError, match="device"):
        generate_remote(options("a", "--device", "cuda"), nobody, None)
    with pytest.raises(InvalidRequestError, match="No such file"):
        generate_remote(options("a", "--melody", str(tmp_path / "none.wav"), "-o", str(tmp_path)), nobody, None)
    service = FakeService()
    with running(service) as there, pytest.raises(NotFoundError, match="demo"):
        generate_remote(options("a", "--model", "other", "-o", str(tmp_path)), there.grpc_url, None)
    assert service.requests == []


@BOTH
def test_the_services_first_model_is_the_default(
    protocol: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fake_service, "MODEL", replace(fake_service.MODEL, name="melody", license="CC-BY-NC 4.0"))
    service = FakeService()
    with running(service) as there:
        assert generate_remote(options("a", "--duration", "0.5", "-o", str(tmp_path)), there.url(protocol), None) == 0
    assert [request.model for request in service.requests] == ["melody"]
    assert "model melody; licence of the weights: CC-BY-NC 4.0" in capsys.readouterr().out
