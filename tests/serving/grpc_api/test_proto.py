"""The .proto: the modules beside it are its own, other languages' compilers take it, every field has its words."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from musicgen_serving.proto.generate import ROOT, SOURCE, generate


def test_generated_modules_are_those_of_the_proto(tmp_path: Path) -> None:
    made = generate(tmp_path)
    assert len(made) == 4
    for path in made:
        committed = ROOT / path.relative_to(tmp_path)
        assert path.read_text() == committed.read_text(), "run python -m musicgen_serving.proto.generate"


@pytest.mark.parametrize(
    ("language", "result"),
    [
        ("cpp", "musicgen/v1/music_service.pb.h"),
        ("java", "musicgen/v1/MusicServiceOuterClass.java"),
        ("csharp", "MusicService.cs"),
        ("kotlin", "musicgen/v1/GenerateRequestKt.kt"),
        ("php", "Musicgen/V1/GenerateRequest.php"),
        ("ruby", "musicgen/v1/music_service_pb.rb"),
        ("objc", "musicgen/v1/MusicService.pbobjc.h"),
    ],
)
def test_other_languages(language: str, result: str, tmp_path: Path) -> None:
    protoc = shutil.which("protoc")  # that of grpcio-tools knows Python only
    if protoc is None:
        pytest.skip("needs protoc")
    command = [protoc, f"--proto_path={ROOT}", f"--{language}_out={tmp_path}", SOURCE]
    subprocess.run(command, check=True, timeout=60)
    assert "GenerateRequest" in (tmp_path / result).read_text()


def test_everything_has_a_comment() -> None:
    lines = (ROOT / SOURCE).read_text().splitlines()
    declaration = re.compile(r"\s*(message|enum|service|rpc|oneof|optional|repeated|[\w.]+ \w+ = \d|\w+ = \d)")
    bare = [
        line.strip()
        for before, line in itertools.pairwise(lines)
        if declaration.match(line) and not before.strip().startswith("//")
    ]
    assert bare == []
